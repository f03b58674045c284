"""The pipeline as a picture: its components, their channels, how far each level is compressed, and where the peak is.

A bar is a level of a network: as tall as its feature maps are high (on a square root's scale), as wide as it has channels.
What is drawn follows from the settings that the pipeline is built from and from an `Explanation`; nothing is measured here.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from sdfit.backends.pipeline import TEXT, TEXT_WIDTH, UNET, VAE
from sdfit.files import Kind, Output, write
from sdfit.study.derivation.explain import Component, Explanation
from sdfit.units import format_bytes
from sdfit.workload import VAE_SCALE, variant_name

DIAGRAM = Kind("diagram", (".svg",), b"<!-- drawn by sdfit -->")
WIDTH, HEIGHT, MIDDLE, TALLEST = 1280, 620, 330, 190
INK, SOFT, BAR, PEAK, PAPER = "#222222", "#6b6b6b", "#9dbbd8", "#D55E00", "#ffffff"
GAP = 7
UNET_CHANNELS = (320, 640, 1280, 1280)
"""diffusers' default of `UNet2DConditionModel`, which Stable Diffusion v1.5 has."""
_ENDS = {"conv_in": 0, "conv_out": -1, "conv_norm_out": -1, "conv_act": -1}


@dataclass(frozen=True, slots=True)
class Bar:
    """A level: its channels, by how much its sides are divided, and what it is called in a module's path."""

    channels: int
    divided: int
    path: str


def _unet() -> list[Bar]:
    down = [Bar(c, VAE_SCALE << min(i, 3), f"down_blocks.{i}") for i, c in enumerate(UNET_CHANNELS)]
    up = [Bar(c, VAE_SCALE << (3 - i), f"up_blocks.{i}") for i, c in enumerate(reversed(UNET_CHANNELS))]
    return [*down, Bar(UNET_CHANNELS[-1], VAE_SCALE << 3, "mid_block"), *up]


def _encoder() -> list[Bar]:
    channels: Any = VAE["block_out_channels"]
    return [
        *(Bar(c, 1 << i, f"down_blocks.{i}") for i, c in enumerate(channels)),
        Bar(channels[-1], VAE_SCALE, "mid_block"),
    ]


def _decoder() -> list[Bar]:
    channels: Any = tuple(reversed(VAE["block_out_channels"]))  # type: ignore[call-overload]
    blocks = [Bar(c, VAE_SCALE >> i, f"up_blocks.{i}") for i, c in enumerate(channels)]
    return [Bar(channels[0], VAE_SCALE, "mid_block"), *blocks]


def peak_bar(path: str, part: str, bars: list[Bar]) -> int | None:
    """Which of a part's bars a module lies in; None if it is of another part.

    Parameters
    ----------
    path : str
        Of the module, as `Explanation.path` has it.
    part : str
        ``unet``, ``vae.encoder`` or ``vae.decoder``.

    Examples
    --------
    >>> peak_bar("vae.decoder.up_blocks.3.resnets.2.conv1", "vae.decoder", _decoder())
    4
    >>> peak_bar("unet.conv_in", "unet", _unet()), peak_bar("unet.conv_in", "vae.encoder", _encoder())
    (0, None)
    """
    if path != part and not path.startswith(part + "."):
        return None
    rest = path[len(part) + 1 :]
    for i, bar in enumerate(bars):
        if rest == bar.path or rest.startswith(bar.path + "."):
            return i
    end = _ENDS.get(rest.split(".")[0])
    return None if end is None else end % len(bars)


def diagram(told: Explanation, path: Path | str) -> Path:
    """Draw the pipeline of an explanation as SVG.

    Raises
    ------
    SdfitError
        If the file cannot be written, or does not end in ``.svg``.
    """
    write(Output(Path(path), svg(told).encode(), DIAGRAM))
    return Path(path)


def svg(told: Explanation) -> str:
    """The picture as text."""
    w, sizes = told.workload, {c.name: c for c in told.components}
    height, width = w.effective_height, w.effective_width
    lines = [
        _text(
            30,
            36,
            f"Stable Diffusion v1.5 img2img, {height}x{width}, batch {w.batch_size}, {variant_name(w.variant)}",
            18,
        )
    ]
    lines.append(
        _text(
            30,
            60,
            f"peak {format_bytes(told.peak_bytes)} ({told.made_by}): {told.operation} in {told.path}",
            14,
            fill=PEAK,
        )
    )
    x = 30.0
    x = _picture(lines, x, f"{w.batch_size} x 3 x {height}x{width}", "image")
    if w.vae == "kl":
        x = _part(lines, told, x, "vae.encoder", _encoder(), "VAE encoder", None)
    else:
        x = _block(lines, x, "VAE encoder (tiny)", None, told.path.startswith("vae.encoder"))
    x = _picture(lines, x, f"{w.batch_size} x 4 x {height // VAE_SCALE}x{width // VAE_SCALE}", "latents", small=True)
    left = x
    x = _part(lines, told, x, "unet", _unet(), f"UNet, {w.unet_batch} sample(s), every step", sizes.get("unet"))
    _text_encoder(lines, told, left, x, sizes.get("text_encoder"))
    if w.vae == "kl":
        x = _part(lines, told, x, "vae.decoder", _decoder(), "VAE decoder", sizes.get("vae"))
    else:
        x = _block(lines, x, "VAE decoder (tiny)", sizes.get("vae"), told.path.startswith("vae.decoder"))
    x = _picture(lines, x, f"{w.batch_size} x 3 x {height}x{width}", "image", last="safety_checker" not in sizes)
    if "safety_checker" in sizes:
        _block(lines, x, "safety checker", sizes["safety_checker"], told.stage == "safety_checker", last=True)
    lines += _legend(told)
    body = "\n".join(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" role="img">\n'
        f"{DIAGRAM.mark.decode()}\n<title>{escape(f'Where the memory of {height}x{width} goes')}</title>\n"
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>\n{body}\n</svg>\n'
    )


def _text(x: float, y: float, words: str, size: int = 11, *, anchor: str = "start", fill: str = INK) -> str:
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{escape(words)}</text>'
    )


def _rect(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" fill="{fill}"/>'


def _arrow(x: float, end: float) -> str:
    return (
        f'<path d="M{x:.0f} {MIDDLE}H{end - 5:.0f}" stroke="{SOFT}" fill="none"/>'
        f'<path d="M{end - 6:.0f} {MIDDLE - 4}L{end:.0f} {MIDDLE}L{end - 6:.0f} {MIDDLE + 4}Z" fill="{SOFT}"/>'
    )


def _picture(lines: list[str], x: float, shape: str, name: str, *, small: bool = False, last: bool = False) -> float:
    side = TALLEST / VAE_SCALE**0.5 if small else TALLEST
    lines.append(
        f'<rect x="{x:.0f}" y="{MIDDLE - side / 2:.0f}" width="14" height="{side:.0f}" fill="none" stroke="{SOFT}"/>'
    )
    lines.append(_text(x, MIDDLE + side / 2 + 16, name, 12))
    lines.append(_text(x, MIDDLE + side / 2 + 30, shape, 10, fill=SOFT))
    if not last:
        lines.append(_arrow(x + 22, x + 52))
    return x + 60


def _part(
    lines: list[str], told: Explanation, x: float, part: str, bars: list[Bar], name: str, component: Component | None
) -> float:
    """A network: its levels, their channels below, how far their sides are divided above; the peak's level in its colour."""
    at, start = peak_bar(told.path, part, bars), x
    for i, bar in enumerate(bars):
        tall, wide = TALLEST / bar.divided**0.5, 12 + bar.channels / 30
        here = i == at
        lines.append(_rect(x, MIDDLE - tall / 2, wide, tall, PEAK if here else BAR))
        lines.append(
            _text(
                x + wide / 2, MIDDLE + tall / 2 + 13, str(bar.channels), 9, anchor="middle", fill=PEAK if here else INK
            )
        )
        lines.append(
            _text(
                x + wide / 2,
                MIDDLE - tall / 2 - 5,
                "1" if bar.divided == 1 else f"1/{bar.divided}",
                9,
                anchor="middle",
                fill=SOFT,
            )
        )
        if here:
            lines.append(_text(x + wide / 2, MIDDLE + tall / 2 + 28, "peak", 12, anchor="middle", fill=PEAK))
        x += wide + max(GAP, 26 - wide)
    _caption(lines, (start + x) / 2, name, component)
    lines.append(_arrow(x + 2, x + 22))
    return x + 28


def _caption(lines: list[str], x: float, name: str, component: Component | None) -> None:
    below = MIDDLE + TALLEST / 2 + 45
    lines.append(_text(x, below, name, 13, anchor="middle"))
    if component is not None:
        there = "on the card at the peak" if component.resident else "not on the card at the peak"
        lines.append(_text(x, below + 16, f"{component.parameters:,} parameters", 10, anchor="middle", fill=SOFT))
        lines.append(
            _text(x, below + 30, f"{format_bytes(component.size_bytes)}, {there}", 10, anchor="middle", fill=SOFT)
        )


def _block(
    lines: list[str], x: float, name: str, component: Component | None, peak: bool, *, last: bool = False
) -> float:
    """A component that is drawn as one block."""
    lines.append(_rect(x, MIDDLE - 35, 70, 70, PEAK if peak else BAR))
    if peak:
        lines.append(_text(x + 35, MIDDLE + 50, "peak", 12, anchor="middle", fill=PEAK))
    _caption(lines, x + 35, name, component)
    if not last:
        lines.append(_arrow(x + 76, x + 104))
    return x + 112


def _text_encoder(lines: list[str], told: Explanation, left: float, right: float, component: Component | None) -> None:
    """The prompt's branch, which every level of the UNet looks at."""
    x, y, peak = (left + right) / 2 - 150, 118, told.stage == "text_encoder"
    lines.append(_rect(x, y - 20, 120, 34, PEAK if peak else BAR))
    lines.append(_text(x + 60, y + 2, "text encoder", 13, anchor="middle"))
    if component is not None:
        lines.append(
            _text(
                x - 8,
                y - 6,
                f"{component.parameters:,} parameters, {TEXT['num_hidden_layers']} layers",
                10,
                anchor="end",
                fill=SOFT,
            )
        )
        there = "on" if component.resident else "not on"
        lines.append(
            _text(
                x - 8,
                y + 8,
                f"{format_bytes(component.size_bytes)}, {there} the card at the peak",
                10,
                anchor="end",
                fill=SOFT,
            )
        )
    w = told.workload
    shape = f"{w.unet_batch} x {w.tokens} x {TEXT_WIDTH}: keys and values of every cross-attention ({UNET['attention_head_dim']} heads)"
    lines.append(_text(x + 130, y + 2, shape, 10, fill=SOFT))
    lines.append(f'<path d="M{x + 60:.0f} {y + 16}V{y + 62}" stroke="{SOFT}" fill="none" stroke-dasharray="3 3"/>')
    lines.append(f'<path d="M{x + 56:.0f} {y + 60}L{x + 60:.0f} {y + 67}L{x + 64:.0f} {y + 60}Z" fill="{SOFT}"/>')


def _legend(told: Explanation) -> list[str]:
    """The stages' peaks as bars, the highest in the peak's colour."""
    top, x, found = max(told.stage_peaks.values()), 30, []
    step = (WIDTH - 60) / len(told.stage_peaks)
    for stage, amount in told.stage_peaks.items():
        colour = PEAK if stage == told.stage else BAR
        found.append(_rect(x, 560, (step - 20) * amount / top, 10, colour))
        found.append(_text(x, 552, stage.replace("_", " "), 11))
        found.append(_text(x, 588, format_bytes(amount), 11, fill=PEAK if stage == told.stage else SOFT))
        x += round(step)
    found.append(_text(30, 530, "most that is live in each stage, weights included", 11, fill=SOFT))
    return found
