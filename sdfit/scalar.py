"""The equation of one variant as one small Python function, for speed.

`compile_peak` writes the max over stages out with the coefficients in it. Stages that can never set the peak are left
out: those whose every coefficient is covered by another stage with the same terms. Calling the result costs about a
microsecond; a test holds it to the array form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sdfit.basis import MANY_ELEMENTS, TERMS, TILE_PIXELS, WIDEST_CHANNELS, StageKey, tiled_pixels


def compile_peak(
    models: Mapping[str, Mapping[str, Any]],
    keys: Mapping[str, StageKey],
    weights: Mapping[str, int],
    slicing: bool,
    tiling: bool,
) -> Callable[[int, int, int, int, int], float]:
    """Compile ``peak(height, width, tokens, batch, unet_batch)`` in bytes, from effective sides [pixels]."""
    many = MANY_ELEMENTS // WIDEST_CHANNELS
    lines = ["def peak(h, w, L, B, n):", "    A = h * w"]
    if tiling:
        lines += [
            f"    P = (h if h < {TILE_PIXELS} else {TILE_PIXELS}) * (w if w < {TILE_PIXELS} else {TILE_PIXELS})",
            f"    T = tiles(h) * tiles(w) if h > {TILE_PIXELS} or w > {TILE_PIXELS} else A",
        ]
    else:
        lines.append("    P = T = A")
    lines += [
        f"    m = {'1' if slicing else 'B'}",
        f"    r = (m > 1) + 2 * (m * P >= {many})",
        "    u = n > 1",
    ]
    peaks: list[str] = []
    for stage, model in models.items():
        if any(_covered(stage, other, models, weights) for other in models if other != stage):
            continue
        index = "u" if stage == "unet" else "r"
        parts = [str(float(weights[stage]))]
        for column, name in enumerate(model["terms"]):
            values = [model["coef"][row][column] for row in model["regimes"]]
            if not any(values):
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


def _covered(stage: str, other: str, models: Mapping[str, Mapping[str, Any]], weights: Mapping[str, int]) -> bool:
    """Whether ``other`` is at least as high as ``stage`` everywhere; of two equal ones only the later is covered."""
    mine, theirs = models[stage], models[other]
    if list(mine["terms"]) != list(theirs["terms"]) or (stage == "unet") != (other == "unet"):
        return False
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
