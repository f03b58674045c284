"""Figures of an evaluation: predicted against recorded, and what is left over.

Colours are Okabe and Ito's, distinct with any colour vision; the marker's shape says the variant once more. A figure whose
records are no measurement says so on itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from sdfit.errors import RecordsError
from sdfit.judging.evaluate import evaluate
from sdfit.judging.evaluation import Evaluation, Point
from sdfit.judging.figures import blank, save
from sdfit.predict.predictor import Predictor
from sdfit.records import RecordsFile
from sdfit.units import GIB
from sdfit.workload import variant_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = ("o", "X", "s", "^", "D", "v", "P")
INK, GRID, FAINT = "#222222", "#dddddd", "#888888"
MOST_VARIANTS = 7
"""More than these share the last colour, as "other"."""
TICKS_GIB = (0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
SIDES = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)


def predicted_against_actual(evaluation: Evaluation, path: Path | str, *, metric: str = "allocated") -> Path:
    """Draw each run's predicted over its recorded peak, on log axes with the line of equality, and write it to a file.

    Parameters
    ----------
    evaluation : Evaluation
    path : path
        Where to; the ending says the format (png, svg, pdf).
    metric : str

    Raises
    ------
    RecordsError
        If no run has that metric.
    SdfitError
        If the file cannot be written, or its ending names no format.
    DependencyError
        If matplotlib is not installed.
    """
    points = _chosen(evaluation, metric)
    figure, axes = blank(7.4, 6.6)
    low = min(min(p.actual_bytes, p.predicted_bytes) for p in points) / GIB
    high = max(max(p.actual_bytes, p.predicted_bytes) for p in points) / GIB
    low, high = low * 0.93, high * 1.08
    axes.plot([low, high], [low, high], color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    for name, mine, colour, marker in _by_variant(points):
        x, y = (np.array(v) / GIB for v in ([p.actual_bytes for p in mine], [p.predicted_bytes for p in mine]))
        _scatter(axes, x, y, mine, colour, marker, name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis, limits in ((axes.xaxis, axes.set_xlim), (axes.yaxis, axes.set_ylim)):
        limits(low, high)
        axis.set_major_locator(FixedLocator(_ticks(low, high)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_aspect("equal")
    axes.set_xlabel(f"{evaluation.source} peak of {metric} memory [GiB]")
    axes.set_ylabel("predicted peak [GiB]")
    _dress(axes, evaluation, f"{evaluation.artifact}: predicted against {evaluation.source}", points)
    return save(figure, path)


def residuals(evaluation: Evaluation, path: Path | str, *, metric: str = "allocated") -> Path:
    """Draw each run's relative error over the pixels of one image, its interval as a thin line, and write it to a file.

    Parameters, errors: as `predicted_against_actual`.
    """
    points = _chosen(evaluation, metric)
    figure, axes = blank(10.0, 5.0)
    axes.axhline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    groups = _by_variant(points)
    for place, (name, mine, colour, marker) in enumerate(groups):
        # variants of one size stand side by side, not on top of each other
        shift = 1.014 ** (place - (len(groups) - 1) / 2)
        x = np.array([p.workload.pixels for p in mine], dtype=float) * shift
        y = 100 * np.array([p.error for p in mine])
        finite = np.array([np.isfinite(p.high_bytes) for p in mine])
        ends = 100 * np.array([[p.predicted_bytes - p.low_bytes, p.high_bytes - p.predicted_bytes] for p in mine]).T
        ends = ends / np.array([p.actual_bytes for p in mine])
        axes.errorbar(
            x[finite], y[finite], yerr=ends[:, finite], fmt="none", ecolor=colour, elinewidth=0.7, alpha=0.45, zorder=3
        )
        _scatter(axes, x, y, mine, colour, marker, name)
    sizes = [p.workload.pixels for p in points]
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) * 0.87, max(sizes) * 1.15)
    left, right = axes.get_xlim()
    axes.xaxis.set_major_locator(FixedLocator([s * s for s in SIDES if left <= s * s <= right]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value**0.5)}²"))
    most = max(abs(end) for end in axes.get_ylim())
    axes.set_ylim(-most, most)
    axes.yaxis.set_major_locator(MaxNLocator(7, symmetric=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g} %" if value else "0"))
    axes.set_xlabel("pixels of one image, log scale")
    axes.set_ylabel(f"predicted / {evaluation.source} - 1")
    level = f"{100 * evaluation.level:g} % interval"
    _dress(
        axes, evaluation, f"{evaluation.artifact}: relative error of {metric}, with its {level}", points, beside=True
    )
    return save(figure, path)


def draw_all(predictor: Predictor, data: RecordsFile, folder: Path | str, level: float = 0.95) -> list[Path]:
    """Draw both figures of every metric that the records and the artifact have, into a folder.

    Returns
    -------
    list of Path
        ``<artifact>-<metric>-predicted.png`` and ``<artifact>-<metric>-residuals.png``.

    Raises
    ------
    RecordsError
        If the artifact can be held against none of the rows.
    SdfitError
        If they cannot be written; see `sdfit.files.write`.
    """
    evaluation, folder = evaluate(predictor, data, level), Path(folder)
    paths = []
    for metric in dict.fromkeys(point.metric for point in evaluation.points):
        stem = f"{evaluation.artifact}-{metric}"
        paths.append(predicted_against_actual(evaluation, folder / f"{stem}-predicted.png", metric=metric))
        paths.append(residuals(evaluation, folder / f"{stem}-residuals.png", metric=metric))
    return paths


def simulated_words(evaluation: Evaluation) -> str:
    """What a figure must say of its records: nothing for measurements."""
    words = {"trace": "simulated (trace)", "fake": "simulated (made-up card)", "unknown": "records of unknown origin"}
    return words.get(evaluation.backend, "")


def _chosen(evaluation: Evaluation, metric: str) -> list[Point]:
    points = [p for p in evaluation.points if p.metric == metric]
    if not points:
        known = sorted({p.metric for p in evaluation.points})
        raise RecordsError(f"no run has '{metric}' to draw; there are: {', '.join(known) or 'none'}", metric=metric)
    return points


def _by_variant(points: list[Point]) -> list[tuple[str, list[Point], str, str]]:
    """Name, points, colour and marker of each variant, the most frequent first."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(variant_name(point.workload.variant), []).append(point)
    order = sorted(found, key=lambda name: (-len(found[name]), name))
    if len(order) > MOST_VARIANTS:
        rest = order[MOST_VARIANTS - 1 :]
        found[f"{len(rest)} other variants"] = [p for name in rest for p in found[name]]
        order = [*order[: MOST_VARIANTS - 1], f"{len(rest)} other variants"]
    return [(name, found[name], PALETTE[i], MARKERS[i]) for i, name in enumerate(order)]


def _scatter(axes: Axes, x: np.ndarray, y: np.ndarray, mine: list[Point], colour: str, marker: str, name: str) -> None:
    """Full markers inside the swept domain, hollow ones outside."""
    outside = np.array([p.extrapolated for p in mine])
    look: dict[str, Any] = {"s": 34, "marker": marker, "alpha": 0.85, "zorder": 4}
    label = f"{name} ({len(mine)})"
    axes.scatter(x[~outside], y[~outside], color=colour, linewidths=0.5, edgecolors="white", label=label, **look)
    if outside.any():
        hollow: dict[str, Any] = {"facecolors": "none", "edgecolors": colour, "linewidths": 1.1}
        axes.scatter(x[outside], y[outside], label=None if (~outside).any() else label, **hollow, **look)


def _ticks(low: float, high: float) -> list[float]:
    ticks = [t for t in TICKS_GIB if low <= t <= high]
    return ticks if len(ticks) > 1 else [float(f"{v:.3g}") for v in np.geomspace(low, high, 4)]


def _dress(axes: Axes, evaluation: Evaluation, title: str, points: list[Point], *, beside: bool = False) -> None:
    axes.grid(color=GRID, linewidth=0.7, zorder=1)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title(title, loc="left", fontsize=12, pad=20)
    note = " · ".join(
        part
        for part in (
            f"{len(points)} runs",
            f"model: {evaluation.provenance}",
            "hollow: outside the swept domain" if any(p.extrapolated for p in points) else "",
        )
        if part
    )
    axes.annotate(note, (0, 1.008), xycoords="axes fraction", ha="left", va="bottom", fontsize=8.5, color=FAINT)
    words = simulated_words(evaluation)
    if words:
        axes.annotate(
            words, (0.985, 0.03), xycoords="axes fraction", ha="right", fontsize=15, color=FAINT, alpha=0.8, zorder=1.5,
            fontweight="bold",
        )  # fmt: skip
    place: dict[str, Any] = {"bbox_to_anchor": (1.01, 1), "borderaxespad": 0} if beside else {}
    axes.legend(loc="upper left", fontsize=8.5, framealpha=0.9, edgecolor=GRID, **place)
