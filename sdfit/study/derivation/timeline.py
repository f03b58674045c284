"""Draw the live memory of one run over its operations, the stages as bands, the peak marked."""

from __future__ import annotations

from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdfit.equation.stages import resident
from sdfit.judging.figures import blank, save
from sdfit.study.derivation.explain import Explanation, explain
from sdfit.units import GIB, format_bytes
from sdfit.workload import Workload, variant_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sdfit.backends.trace.tracer import Tracer

INK, SOFT, WEIGHTS, ACTIVATIONS, PEAK = "#222222", "#8a8a8a", "#c9ced6", "#0072B2", "#D55E00"
BANDS = ("#ffffff", "#f3f4f6")
PHASES = {
    "text_encoder": "text\nencoder",
    "vae_encoder_blocks": "VAE\nencoder",
    "vae_encoder_mid": "VAE\nencoder",
    "unet": "UNet",
    "unet_deep": "UNet",
    "vae_decoder_mid": "VAE\ndecoder",
    "vae_decoder_blocks": "VAE\ndecoder",
    "safety_checker": "safety\nchecker",
}
NARROW = 0.12
"""A band below this share of the width is stretched to it, so that short stages (the VAE's) can be read."""


def timeline(
    workload: Workload, path: str | Path, *, tracer: Tracer | None = None, explanation: Explanation | None = None
) -> Path:
    """Draw live memory over a simulated run and write it to a file; the ending says the format.

    Parameters
    ----------
    workload : Workload
    path : str or Path
        For example ``timeline.png``.
    tracer : Tracer, optional
        See `explain`.
    explanation : Explanation, optional
        Of this workload, if there is one already; saves the run.

    Raises
    ------
    SdfitError
        If the file cannot be written, or the ending names no format.

    Examples
    --------
    >>> timeline(Workload(512, 512), "timeline.png")  # doctest: +SKIP
    PosixPath('timeline.png')
    """
    told = explanation if explanation is not None else explain(workload, tracer=tracer)
    figure, axes = blank(11, 5)
    _draw(axes, told)
    return save(figure, path)


def _draw(axes: Axes, told: Explanation) -> None:
    base = (told.weights_bytes + told.standing_bytes) / GIB
    above = max(told.peak_bytes / GIB - base, 0.01)
    # views, in-place operations and single rows change next to nothing: without them the blending of VAE tiles, row by
    # row, does not fill the figure
    shown = [0]
    for i, (stage, amount) in enumerate(told.history):
        before = told.history[shown[-1]]
        if i == told.peak_index or stage != before[0] or abs(amount - before[1]) > 2e-3 * above * GIB:
            shown.append(i)
    live = np.array([told.history[i][1] for i in shown], dtype=float) / GIB
    phases = [PHASES[told.history[i][0]] for i in shown]
    sizes = {c.name: c.size_bytes for c in told.components}
    weights = {
        stage: sum(sizes.get(name, 0) for name in resident(stage, told.workload.offload)) + told.standing_bytes
        for stage in told.stage_peaks
    }
    floors = np.array([weights[told.history[i][0]] for i in shown], dtype=float) / GIB
    edges, names = [0], []
    for name, group in groupby(phases):
        names.append(name)
        edges.append(edges[-1] + len(list(group)))
    place, bounds = _places(edges)
    # start a little below the weights: they never change, and with a small image they would fill the figure
    bottom = max(0.0, base - 0.3 * above) if floors.min() == floors.max() else 0.0
    top = base + 1.55 * above if bottom else 1.3 * told.peak_bytes / GIB
    room = top - bottom
    for i, name in enumerate(names):
        axes.axvspan(bounds[i], bounds[i + 1], color=BANDS[i % 2], lw=0, zorder=0)
        axes.text(
            (bounds[i] + bounds[i + 1]) / 2,
            top - 0.015 * room,
            name,
            ha="center",
            va="top",
            fontsize=9,
            color=INK,
            linespacing=1.05,
        )
    x = np.append(place, bounds[-1])
    steps = np.append(live, live[-1])
    floor = np.minimum(np.append(floors, floors[-1]), steps)
    axes.fill_between(x, bottom, floor, step="post", color=WEIGHTS, lw=0, zorder=1)
    axes.fill_between(x, floor, steps, step="post", color=ACTIVATIONS, alpha=0.28, lw=0, zorder=1)
    axes.step(x, floor, where="post", color=SOFT, lw=0.8, zorder=2)
    axes.step(x, steps, where="post", color=ACTIVATIONS, lw=0.9, zorder=3)
    held = "weights" + (" and what libraries hold" if told.standing_bytes else "")
    note = f"{held}: {format_bytes(base * GIB)}"
    middle = (x[shown.index(told.peak_index)] + bounds[-1] / 2) / 2
    low = (bottom + base) / 2 if bottom else 0.06 * room
    axes.text(middle, low, note, ha="center", va="center", fontsize=9, color=INK)
    _mark_peak(axes, told, place[shown.index(told.peak_index)], bounds[-1])
    axes.set_xlim(0, bounds[-1])
    axes.set_ylim(bottom, top)
    axes.set_ylabel("live memory [GiB]" + (", axis not from 0" if bottom else ""), color=INK)
    axes.set_xlabel("operations that change it, in the order they run (short stages are stretched)", color=INK)
    axes.set_xticks([])
    axes.grid(axis="y", color="#dddddd", lw=0.6, zorder=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    w = told.workload
    axes.set_title(
        f"{w.effective_height}x{w.effective_width}, batch {w.batch_size}, guidance {w.guidance_scale:g}, "
        f"{variant_name(w.variant)} (simulated)",
        loc="left",
        fontsize=11,
        color=INK,
    )


def _places(edges: list[int]) -> tuple[NDArray[np.float64], list[float]]:
    """Where each operation and each band's edge lies; bands too narrow to read are stretched."""
    widths = [max(after - before, NARROW * edges[-1]) for before, after in pairwise(edges)]
    bounds = [0.0, *np.cumsum(widths).tolist()]
    pieces = [
        np.linspace(bounds[i], bounds[i + 1], edges[i + 1] - edges[i], endpoint=False) for i in range(len(widths))
    ]
    return np.concatenate(pieces), bounds


def _mark_peak(axes: Axes, told: Explanation, x: float, width: float) -> None:
    peak = told.peak_bytes / GIB
    left = x > width / 2
    axes.plot([x], [peak], "o", ms=6, color=PEAK, zorder=4)
    axes.annotate(
        f"peak {format_bytes(told.peak_bytes)}\n{told.operation} in {told.path}",
        (x, peak),
        xytext=(10 if left else -10, 9),
        textcoords="offset points",
        ha="right" if left else "left",
        va="bottom",
        fontsize=9,
        color=PEAK,
        zorder=5,
    )
