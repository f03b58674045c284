"""Draw a recorded run and its trace one above the other: live memory over the same operations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdfit.equation.weights import rounded
from sdfit.judging.figures import blank, save
from sdfit.predict.simulation.workspaces import Architecture
from sdfit.study.calibration.calibration import Calibration
from sdfit.study.calibration.operations import TracedRun
from sdfit.study.calibration.rules import predicted
from sdfit.units import GIB, format_bytes
from sdfit.workload import variant_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, CARD, TRACE, PEAK, PRIOR = "#222222", "#0072B2", "#009E73", "#D55E00", "#8a8a8a"
BANDS = ("#ffffff", "#f0f1f4")
NAMES = {
    "text_encoder": "text",
    "vae_encoder_blocks": "VAE encoder",
    "vae_encoder_mid": "VAE encoder",
    "unet": "UNet",
    "unet_deep": "UNet",
    "vae_decoder_mid": "VAE decoder",
    "vae_decoder_blocks": "VAE decoder",
    "safety_checker": "safety checker",
}
NARROW = 0.09
"""A band below this share of the width is stretched to it."""

Points = Sequence[tuple[int, int]]


def traced_live(run: TracedRun, table: Architecture, standing_bytes: int) -> list[tuple[int, int]]:
    """Live bytes of the trace at each change, with the workspaces of a table, by operation number.

    Parameters
    ----------
    run : TracedRun
        Of a trace without workspaces.
    table : Architecture
    standing_bytes : int
        What is there all the time beside the weights.
    """
    measured = dict(table.measured)
    of_block = {made.block: i for i, ran in enumerate(run.operations) for made in ran.made}
    last = {ran.made[-1].block for ran in run.operations if ran.made}
    live, now = standing_bytes, 0
    points: list[tuple[int, int]] = []
    for block, size in run.events:
        live += size
        now = of_block.get(block, now) if size > 0 else now
        if block not in of_block and not points:
            continue  # the weights
        points.append((now, live))
        if size > 0 and block in last:
            shapes = run.operations[now].shapes
            held = measured.get(shapes)
            held = predicted(table, shapes) if held is None else held
            if held:
                points += [(now, live + rounded(held)), (now, live)]
    return points


def draw(
    calibration: Calibration,
    run: TracedRun,
    table: Architecture,
    path: str | Path,
    *,
    word: str,
    base: Architecture | None = None,
) -> Path:
    """Draw both and write the figure; the ending says the format.

    Parameters
    ----------
    calibration : Calibration
    run : TracedRun
        The trace that it was made with.
    table : Architecture
        Whose workspaces the trace gets.
    path : str or Path
    word : str
        What the recorded run is: measured, recorded or simulated.
    base : Architecture, optional
        The kernels known before; a grey line behind shows the trace with them.

    Raises
    ------
    SdfitError
        If the file cannot be written, or the ending names no format.
    """
    standing = sum(s.counted_bytes for s in calibration.standing) + calibration.unsplit_bytes
    both = (calibration.live, traced_live(run, table, standing))
    prior = traced_live(run, base, standing) if base is not None else None
    stages = [ran.stage for ran in run.operations]
    scale, bands = _scale(stages)
    lowest, highest = min(v for p in both for _, v in p), max(v for p in (*both, prior or ()) for _, v in p)
    room = max(highest - lowest, 1)
    figure, upper = blank(11, 6.4)
    upper.remove()
    axes = figure.subplots(2, 1, sharex=True, sharey=True)
    titles = (f"{calibration.card} ({word})", f"trace (simulated), kernels of the table '{table.name}'")
    for ax, points, colour, title in zip(axes, both, (CARD, TRACE), titles, strict=True):
        _one(ax, points, scale, bands, colour, title)
        if base is not None and prior is not None and points is both[1]:
            before, _, _ = _curve(prior, scale)
            ax.plot(*before, color=PRIOR, lw=0.8, zorder=1.5)
            ax.text(
                0.008, 0.74, f"grey: with the kernels of '{base.name}'", transform=ax.transAxes, fontsize=8.5, color=INK
            )
        ax.set_ylim((lowest - 0.06 * room) / GIB, (highest + 0.2 * room) / GIB)
    w = calibration.workload
    axes[0].set_title(
        f"{w.effective_height}x{w.effective_width}, batch {w.batch_size}, guidance {w.guidance_scale:g}, "
        f"{variant_name(w.variant)}: live memory over one run",
        loc="left", fontsize=11, color=INK,
    )  # fmt: skip
    axes[1].set_xlabel("operations, in the order they run (short stages are stretched)", color=INK)
    return save(figure, path)


def _scale(stages: Sequence[str]) -> tuple[np.ndarray, list[tuple[str, float, float]]]:
    """Where each operation lies, and the bands of the stages."""
    runs = [(name, len(list(group))) for name, group in groupby(NAMES[stage] for stage in stages)]
    edges = np.cumsum([0, *(max(count, NARROW * len(stages)) for _, count in runs)])
    pieces = [
        np.linspace(a, b, count, endpoint=False) for (a, b), (_, count) in zip(pairwise(edges), runs, strict=True)
    ]
    bands = [(name, float(a), float(b)) for (a, b), (name, _) in zip(pairwise(edges), runs, strict=True)]
    return np.append(np.concatenate(pieces), edges[-1]), bands


def _curve(points: Points, scale: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray, np.ndarray]:
    """The line of a run; of each operation that changes anything also its place and its highest value [GiB]."""
    place = np.array([at for at, _ in points])
    live = np.array([v for _, v in points], dtype=float) / GIB
    # what happens within one operation is drawn as its highest and its last value
    first = np.flatnonzero(np.append(True, np.diff(place) > 0))
    highest = np.maximum.reduceat(live, first)
    last = live[np.append(first[1:] - 1, len(live) - 1)]
    begins, ends = scale[place[first]], scale[np.append(place[first][1:], len(scale) - 1)]
    x = np.ravel(np.column_stack([begins, begins, ends]))
    y = np.ravel(np.column_stack([highest, last, last]))
    return (x, y), begins, highest


def _one(
    axes: Axes, points: Points, scale: np.ndarray, bands: list[tuple[str, float, float]], colour: str, title: str
) -> None:
    (x, y), begins, highest = _curve(points, scale)
    for i, (name, left, right) in enumerate(bands):
        axes.axvspan(left, right, color=BANDS[i % 2], lw=0, zorder=0)
        axes.text((left + right) / 2, 0.97, name, transform=axes.get_xaxis_transform(), ha="center", va="top",
                  fontsize=8.5, color=INK)  # fmt: skip
    axes.fill_between(x, 0, y, color=colour, alpha=0.2, lw=0, zorder=1)
    axes.plot(x, y, color=colour, lw=0.8, zorder=2)
    peak = int(np.argmax(highest))
    right = begins[peak] < scale[-1] / 2
    axes.plot([begins[peak]], [highest[peak]], "o", ms=5, color=PEAK, zorder=3)
    axes.annotate(f"{format_bytes(highest[peak] * GIB)}", (begins[peak], highest[peak]),
                  xytext=(8 if right else -8, 3), textcoords="offset points", ha="left" if right else "right",
                  fontsize=9, color=PEAK)  # fmt: skip
    axes.set_xlim(0, scale[-1])
    axes.set_ylabel("live memory [GiB]", color=INK)
    axes.text(0.008, 0.82, title, transform=axes.transAxes, fontsize=9.5, color=colour)
    axes.set_xticks([])
    axes.grid(axis="y", color="#dddddd", lw=0.6, zorder=0.5)
    axes.tick_params(colors=INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
