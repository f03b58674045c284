"""Figures as inline SVG, drawn with the page's own colours: what was predicted beside what is true, and by how much it is off."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from sdfit.units import GIB, percent

WIDE, HIGH = 560, 380
LEFT, RIGHT, TOP, BOTTOM = 80, 14, 14, 46
LEAST_ERROR = 1e-4
"""Relative errors below it are drawn on a linear piece of the axis, larger ones on a logarithmic one."""


@dataclass(frozen=True, slots=True)
class Dot:
    """A run in a figure.

    Parameters
    ----------
    x, y : float
        In the units of the axes.
    words : str
        What a pointer on it reads; empty for one of many.
    """

    x: float
    y: float
    words: str = ""


def predicted_against_true(few: Sequence[Dot], many: Sequence[Dot]) -> str:
    """Predicted over true peaks, both axes logarithmic [bytes]; ``few`` are drawn large, over ``many``."""
    every = [value for dot in (*few, *many) for value in (dot.x, dot.y)]
    low, high = math.log2(min(every) / GIB) - 0.15, math.log2(max(every) / GIB) + 0.15

    def place(value: float) -> float:
        return (math.log2(value / GIB) - low) / (high - low)

    ticks = [(place(2.0**k * GIB), f"{2.0**k:g}") for k in range(math.ceil(low), math.floor(high) + 1)]
    line = f'<path class="diagonal" d="M{_x(0)} {_y(0)}L{_x(1)} {_y(1)}"/>'
    return _figure(few, many, place, place, ticks, ticks, "true peak [GiB]", "predicted [GiB]", line)


def errors_by_size(few: Sequence[Dot], many: Sequence[Dot]) -> str:
    """Relative errors over images times pixels [pixels]."""
    sizes = [dot.x for dot in (*few, *many)]
    low, high = math.log2(min(sizes)) - 0.3, math.log2(max(sizes)) + 0.3
    most = max((_signed_log(abs(dot.y)) for dot in (*few, *many)), default=1.0) + 0.25

    def across(value: float) -> float:
        return (math.log2(value) - low) / (high - low)

    def up(value: float) -> float:
        return (_signed_log(value) / most + 1) / 2

    x_ticks = [
        (across(4.0**k * 2**20), f"{4.0**k:g}" if k >= 0 else f"1/{4**-k}")
        for k in range(-4, 8)
        if 0 < across(4.0**k * 2**20) < 1
    ]
    levels = [level for level in (1e-3, 1e-2, 1e-1, 1.0) if up(level) < 1]
    y_ticks = [
        (up(v), percent(v, 1 if 0 < abs(v) < 0.01 else 0)) for v in (*(-level for level in levels), 0.0, *levels)
    ]
    line = f'<path class="diagonal" d="M{_x(0)} {_y(0.5)}L{_x(1)} {_y(0.5)}"/>'
    return _figure(few, many, across, up, x_ticks, y_ticks, "images × pixels [2²⁰ px]", "predicted / true - 1", line)


def _signed_log(value: float) -> float:
    """Linear up to `LEAST_ERROR`, logarithmic above."""
    size = abs(value)
    return math.copysign(size / LEAST_ERROR if size < LEAST_ERROR else 1 + math.log10(size / LEAST_ERROR), value)


def _figure(
    few: Sequence[Dot],
    many: Sequence[Dot],
    across: Callable[[float], float],
    up: Callable[[float], float],
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    x_title: str,
    y_title: str,
    line: str,
) -> str:
    """Axes, a line and dots; the many as one path of points, so that thousands stay small."""
    parts = [
        f'<svg class="figure" viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="{escape(y_title)} over {escape(x_title)}">'
    ]
    for at, text in x_ticks:
        parts.append(
            f'<path class="grid" d="M{_x(at)} {_y(0)}V{_y(1)}"/><text x="{_x(at)}" y="{HIGH - 26}" class="tick">{text}</text>'
        )
    for at, text in y_ticks:
        parts.append(
            f'<path class="grid" d="M{_x(0)} {_y(at)}H{_x(1)}"/><text x="{LEFT - 8}" y="{_y(at) + 4}" class="tick end">{text}</text>'
        )
    parts.append(line)
    if many:
        path = "".join(f"M{_x(across(d.x))} {_y(up(d.y))}h0" for d in many)
        parts.append(f'<path class="many" d="{path}"/>')
    for dot in few:
        parts.append(
            f'<circle class="few" cx="{_x(across(dot.x))}" cy="{_y(up(dot.y))}" r="4"><title>{escape(dot.words)}</title></circle>'
        )
    parts.append(f'<text x="{(LEFT + WIDE - RIGHT) / 2}" y="{HIGH - 6}" class="axis">{x_title}</text>')
    middle = (TOP + HIGH - BOTTOM) / 2
    parts.append(f'<text transform="translate(12 {middle}) rotate(-90)" class="axis">{y_title}</text></svg>')
    return "".join(parts)


def _x(share: float) -> float:
    return round(LEFT + share * (WIDE - LEFT - RIGHT), 1)


def _y(share: float) -> float:
    return round(HIGH - BOTTOM - share * (HIGH - TOP - BOTTOM), 1)
