"""The equation of one variant as one small Python function, for speed.

`compile_peak` writes the max over stages out with the coefficients in it. Stages that can never set the peak are left
out: those whose every coefficient is covered by another stage with the same terms. Calling the result costs about a
microsecond; a test holds it to the array form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sdfit.equation.terms import MANY_ELEMENTS, TERMS, TILE_PIXELS, WIDEST_CHANNELS, StageKey, tiled_pixels


def compile_peak(
    models: Mapping[str, Mapping[str, Any]],
    keys: Mapping[str, StageKey],
    weights: Mapping[str, int],
    slicing: bool,
    tiling: bool,
) -> Callable[[int, int, int, int, int], float]:
    """Compile ``peak(height, width, tokens, batch, unet_batch)`` in bytes, from effective sides [pixels]."""
    lines = ["def peak(h, w, L, B, n):", "    A = h * w", f"    m = {'1' if slicing else 'B'}", "    P = A"]
    if slicing or tiling:
        lines.append("    D = (B - m) * A")
    if tiling:
        side = f"(h if h < {TILE_PIXELS} else {TILE_PIXELS}) * (w if w < {TILE_PIXELS} else {TILE_PIXELS})"
        lines += [
            f"    if h > {TILE_PIXELS} or w > {TILE_PIXELS}:",
            f"        P = {side}",
            "        D += m * (tiles(h) * tiles(w) - P)",
        ]
    peaks: list[str] = []
    for stage, model in models.items():
        if any(_covered(stage, other, models, weights) for other in models if other != stage):
            continue
        index = _regime(stage)
        parts = [str(float(weights[stage]))]
        for column, name in enumerate(model["terms"]):
            values = [model["coef"][row][column] for row in model["regimes"]]
            if not any(values) or (name == "D" and not (slicing or tiling)):
                continue
            value = repr(values[0]) if len(set(values)) == 1 else f"{tuple(values)!r}[{index}]"
            parts.append(value if name == "1" else f"{value}*{TERMS[name].product}")
        lines.append(f"    p{len(peaks)} = {' + '.join(parts)}")
        peaks.append(f"p{len(peaks)}")
    lines.append(f"    return max({', '.join(peaks)})" if len(peaks) > 1 else f"    return {peaks[0]}")
    scope: dict[str, Any] = {"tiles": lambda side: int(tiled_pixels(side)), "max": max, "__builtins__": {}}
    exec("\n".join(lines), scope)  # the text holds numbers and names from this module only
    compiled: Callable[[int, int, int, int, int], float] = scope["peak"]
    return compiled


def _regime(stage: str) -> str:
    """The expression of a stage's regime, as `sdfit.equation.terms.regime` computes it."""
    images = "n" if stage == "unet" else "m"
    if stage not in WIDEST_CHANNELS:
        return f"{images} > 1"
    many = MANY_ELEMENTS // WIDEST_CHANNELS[stage]
    return f"0 if m == 1 else 1 if m * P < {many} else (2 if m == 2 else 3) + 2 * (m * P >= {2 * many})"


def _covered(stage: str, other: str, models: Mapping[str, Mapping[str, Any]], weights: Mapping[str, int]) -> bool:
    """Whether ``other`` is at least as high as ``stage`` everywhere; of two equal ones only the later is covered."""
    mine, theirs = models[stage], models[other]
    if list(mine["terms"]) != list(theirs["terms"]) or (stage == "unet") != (other == "unet"):
        return False
    several = len(set(mine["regimes"])) > 1 or len(set(theirs["regimes"])) > 1
    if several and WIDEST_CHANNELS.get(stage) != WIDEST_CHANNELS.get(other):
        # their regimes begin at other sizes, so every pair of them may meet
        worst = [max(row[i] for row in mine["coef"]) for i in range(len(mine["terms"]))]
        least = [min(row[i] for row in theirs["coef"]) for i in range(len(theirs["terms"]))]
        return (
            weights[stage] <= weights[other]
            and all(a <= b for a, b in zip(worst, least, strict=True))
            and worst != least
        )
    pairs = [
        (weights[stage], weights[other]),
        *(
            pair
            for a, b in zip(mine["regimes"], theirs["regimes"], strict=True)
            for pair in zip(mine["coef"][a], theirs["coef"][b], strict=True)
        ),
    ]
    if any(a > b for a, b in pairs):
        return False
    order = list(models)
    return any(a < b for a, b in pairs) or order.index(other) < order.index(stage)
