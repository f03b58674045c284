"""The figure of curves: what is varied across, memory up, each curve with its band, each card's memory as a line."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sdfit.judging.figures import blank, save
from sdfit.study.comparison.curve import UNITS, Curves
from sdfit.units import GIB, format_bytes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
"""Okabe and Ito's, told apart with any colour vision; the kind of line says the same once more."""
LINES = ("-", "--", "-.", ":")
INK, GRID = "#222222", "#dddddd"
FARTHEST = 2.0
"""The axis ends at so many times the cards' memory where one curve goes far beyond and would press the others flat; and a
memory so far above all curves is not drawn."""


def draw(found: Curves, path: Path | str) -> Path:
    """Draw curves and write the figure to a file; the ending says the format.

    Raises
    ------
    DependencyError
        If matplotlib is not installed.
    SdfitError
        If the file cannot be written, or the ending names no format.
    """
    figure, axes = blank(10, 5.5)
    memories: dict[int, list[str]] = {}
    for curve in found.curves:
        if curve.memory_bytes is not None:
            memories.setdefault(curve.memory_bytes, []).append(curve.name.split(" ")[0])
    edge = FARTHEST * max(memories, default=0)
    tops = [max(curve.peak_bytes) for curve in found.curves]
    cut = min(tops) < edge / FARTHEST and max(tops) > edge
    for i, curve in enumerate(found.curves):
        colour, line = COLOURS[i % len(COLOURS)], LINES[i % len(LINES)]
        at, peak, low, high = (
            np.array(v, dtype=float) for v in (curve.at, curve.peak_bytes, curve.low_bytes, curve.high_bytes)
        )
        known = np.isfinite(high)
        axes.fill_between(at[known], low[known] / GIB, high[known] / GIB, color=colour, alpha=0.18, lw=0)
        beyond = f", up to {format_bytes(tops[i])}" if cut and tops[i] > edge else ""
        axes.plot(at, peak / GIB, line, color=colour, lw=1.6, label=curve.name + beyond)
    for memory, cards in memories.items():
        if memory > FARTHEST * max(tops):  # it would press the curves flat; the table says that all stay below it
            continue
        axes.axhline(memory / GIB, color=INK, lw=1, ls=(0, (5, 3)))
        whose = ", ".join(dict.fromkeys(cards))
        axes.annotate(
            f"memory of {whose}: {format_bytes(memory)}", (found.curves[0].at[0], memory / GIB), xytext=(2, 3),
            textcoords="offset points", fontsize=9, color=INK,
        )  # fmt: skip
    axes.set_ylim(0, edge / GIB if cut else None)
    axes.set_xlim(found.curves[0].at[0], found.curves[0].at[-1])
    unit = UNITS[found.over]
    axes.set_xlabel(unit if unit == found.over else f"{found.over} [{unit}]", color=INK)
    axes.set_ylabel(f"{found.metric} memory [GiB], bands {100 * found.level:g} %", color=INK)
    axes.grid(color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="upper left", frameon=False, fontsize=9, bbox_to_anchor=(0, 0.94))
    w = found.workload
    fixed = {
        "height": f"height {w.height}",
        "width": f"width {w.width}",
        "batch": f"batch {w.batch_size}",
        "tokens": f"{w.prompt_length} tokens",
    }
    gone = {"size": ("height", "width")}.get(found.over, (found.over,))
    simulated = "" if all(c.provenance == "measured" for c in found.curves) else " (predicted from a simulation)"
    axes.set_title(
        ", ".join(v for k, v in fixed.items() if k not in gone) + simulated, loc="left", fontsize=11, color=INK
    )
    return save(figure, path)
