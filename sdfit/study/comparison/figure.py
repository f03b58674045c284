"""The figure of a comparison: predicted / actual of every case on a log axis, one line per system."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from sdfit.judging.figures import blank, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sdfit.study.comparison.compare import Comparison, Summary

# Okabe and Ito's colours, distinct to readers with any colour vision; the marker's shape says the same once more
SAFE, DEAD = "#0072B2", "#D55E00"
INK, GRID = "#222222", "#dddddd"
TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
LANES = 13
"""Points of one system with nearly one ratio are spread over so many heights."""


def draw(comparison: Comparison, path: Path | str, *, title: str = "Predicted / actual peak memory") -> Path:
    """Draw predicted / actual of every case, a line per system, and write it to a file.

    Parameters
    ----------
    comparison : Comparison
    path : path
        Where to; the ending says the format (png, svg, pdf).
    title : str

    Raises
    ------
    DependencyError
        If matplotlib is not installed.
    SdfitError
        If the file cannot be written, or the ending names no format.
    """
    lines = comparison.summary
    drawing, axes = blank(11, 1.6 + 0.52 * len(lines))
    _frame(axes, [row.predicted_bytes / row.actual_bytes for row in comparison.rows], [line.title for line in lines])
    for level, line in enumerate(lines):
        ratios = [row.predicted_bytes / row.actual_bytes for row in comparison.rows if row.system == line.system]
        _points(axes, level, ratios)
        place = (1.015, level)
        axes.annotate(_note(line), place, xycoords=("axes fraction", "data"), va="center", fontsize=9, color=INK)
    if comparison.source == "simulated":
        title += " (the actual one simulated)"
    axes.set_title(title, loc="left", fontsize=12, pad=26)
    return save(drawing, path)


def _note(line: Summary) -> str:
    over = "" if line.over_reserved is None else f", over-reserves {line.over_reserved:.1%}"
    return f"{line.out_of_memory} of {line.cases} out of memory{over}"


def _points(axes: Axes, level: int, ratios: list[float]) -> None:
    """One system's points; nearly equal ones are spread upwards and downwards so that all are seen."""
    crowd: dict[int, int] = {}
    for marker, colour, dead in (("o", SAFE, False), ("X", DEAD, True)):
        x, y = [], []
        for ratio in sorted(r for r in ratios if (r < 1) == dead):
            near = round(60 * math.log(ratio))
            lane = crowd[near] = crowd.get(near, -1) + 1
            lane %= LANES
            x.append(ratio)
            y.append(level + 0.05 * ((lane + 1) // 2) * (-1) ** lane)
        axes.scatter(x, y, s=26, marker=marker, color=colour, alpha=0.8, linewidths=0.4, edgecolors="white", zorder=3)
    middle = median(ratios)
    axes.plot([middle, middle], [level - 0.38, level + 0.38], color=INK, linewidth=1.6, zorder=4)


def _frame(axes: Axes, ratios: list[float], titles: list[str]) -> None:
    low, high = min(0.7, *ratios) * 0.9, max(1.5, *ratios) * 1.1
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{tick:g}x" for tick in ticks])
    axes.axvspan(low, 1, color=DEAD, alpha=0.07, zorder=0, linewidth=0)
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    axes.set_ylim(len(titles) - 0.45, -0.55)
    axes.set_yticks(range(len(titles)), titles)
    axes.grid(axis="x", color=GRID, linewidth=0.7, zorder=1)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("predicted / actual, log scale; below 1x a run capped at the prediction runs out of memory")
    shown = [
        Line2D([], [], marker="o", linestyle="", color=SAFE, label="fits"),
        Line2D([], [], marker="X", linestyle="", color=DEAD, label="out of memory"),
        Line2D([], [], marker="|", linestyle="", color=INK, markersize=11, markeredgewidth=1.6, label="median"),
    ]
    above = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "borderaxespad": 0.2}
    axes.legend(handles=shown, ncols=3, frameon=False, fontsize=9, **above)
