"""The figure of strategies: memory across; above it time with the frontier, below it every strategy by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sdfit.judging.figures import save
from sdfit.study.comparison.strategies import ASKED
from sdfit.units import GIB, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sdfit.study.comparison.strategies import Strategies, Strategy

INK, SOFT, GRID = "#222222", "#8a8a8a", "#dddddd"
COLOURS = {"fits": "#0072B2", "may fit": "#E69F00", "does not fit": "#D55E00"}
FARTHEST = 2.5
"""The axis ends at so many times the card's memory, or the peak of the run as asked."""
MARKS = {"fits": "o", "may fit": "s", "does not fit": "X"}


def draw(found: Strategies, path: Path | str) -> Path:
    """Draw strategies and write the figure to a file; the ending says the format.

    Raises
    ------
    DependencyError
        If matplotlib is not installed.
    SdfitError
        If the file cannot be written, or the ending names no format.
    """
    rows = [row for row in found.rows if row.prediction is not None]
    timed = [row for row in rows if row.time is not None]
    heights = [3.2 if timed else 0.0, 0.25 * len(rows) + 0.9]
    figure = Figure(figsize=(11, sum(heights) + 0.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    panels = [height for height in heights if height]
    axes = figure.subplots(len(panels), 1, sharex=True, gridspec_kw={"height_ratios": panels}, squeeze=False)[:, 0]
    if timed:
        _times(axes[0], timed)
    memory = found.memory_bytes / GIB
    edge = FARTHEST * max([memory, *(row.prediction / GIB for row in rows if row.name == ASKED and row.prediction)])
    _names(axes[-1], rows, edge)
    for one in axes:
        one.axvline(memory, color=INK, lw=1.2, ls="--", zorder=1)
        one.grid(axis="x", color=GRID, lw=0.6)
        one.set_axisbelow(True)
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
    axes[0].annotate(
        f" memory {format_bytes(found.memory_bytes)}", (memory, 1), xycoords=("data", "axes fraction"), va="bottom",
        ha="center", fontsize=9, color=INK,
    )  # fmt: skip
    axes[-1].set_xlabel(f"{found.metric} memory [GiB]; the line reaches to what it takes at most", color=INK)
    axes[-1].set_xlim(
        0, min(edge, 1.1 * max([memory, *(row.prediction.upper / GIB for row in rows if row.prediction)]))
    )
    shown = [pair for one in axes for pair in zip(*one.get_legend_handles_labels(), strict=True)]
    figure.legend(*zip(*shown, strict=True), loc="outside lower right", ncols=len(shown), frameon=False, fontsize=9)
    w = found.workload
    source = rows[0].prediction.provenance if rows[0].prediction is not None else ""
    title = f"{w.effective_height}x{w.effective_width}, batch {w.batch_size}, {found.card}"
    axes[0].set_title(title + ("" if source == "measured" else " (memory simulated)"), loc="left", fontsize=11, pad=18)
    return save(figure, path)


def _times(axes: Axes, rows: list[Strategy]) -> None:
    """Memory across, time up, and the frontier between them."""
    ends = sorted((float(r.prediction or 0) / GIB, r.time.seconds_per_image) for r in rows if r.frontier and r.time)
    if len(ends) > 1:
        axes.step(*zip(*ends, strict=True), where="post", color=SOFT, lw=1.2, zorder=2, label="frontier")
    for row in rows:
        assert row.prediction is not None and row.time is not None
        place = (row.prediction / GIB, row.time.seconds_per_image)
        axes.plot(*place, MARKS[row.answer], ms=7, color=COLOURS[row.answer], zorder=3)
        axes.annotate(row.name, place, xytext=(7, 4), textcoords="offset points", fontsize=8, color=INK)
    axes.set_ylim(0, 1.2 * max(row.time.seconds_per_image for row in rows if row.time))
    axes.set_ylabel("seconds per image", color=INK)


def _names(axes: Axes, rows: list[Strategy], edge: float) -> None:
    """Every strategy on a line of its own, the least memory at the top; what lies beyond the edge is told in words."""
    for level, row in enumerate(rows):
        assert row.prediction is not None
        peak, most = row.prediction / GIB, row.prediction.upper / GIB
        if peak > edge:
            words = f"{format_bytes(row.prediction)} \N{RIGHTWARDS ARROW} "
            axes.text(edge, level, words, ha="right", va="center", fontsize=8, color=COLOURS[row.answer])
            continue
        axes.plot([peak, most], [level, level], color=COLOURS[row.answer], lw=1.5, alpha=0.6, zorder=2)
        axes.plot([peak], [level], MARKS[row.answer], ms=6, color=COLOURS[row.answer], zorder=3)
    axes.set_yticks(range(len(rows)), [("* " if row.frontier else "") + row.name for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.8)
    answers = [a for a in COLOURS if any(row.answer == a for row in rows)]
    for answer in answers:
        axes.plot([], [], MARKS[answer], color=COLOURS[answer], label=answer)
