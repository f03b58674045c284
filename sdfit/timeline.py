"""Draw the live memory of one run over its operations, the stages as bands, the peak marked."""

from __future__ import annotations

from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdfit.errors import SdfitError, needs
from sdfit.explain import Explanation, explain
from sdfit.units import GIB, format_bytes
from sdfit.workload import Workload, variant_name

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise needs("plot", "matplotlib") from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sdfit.backends.trace import Tracer

INK, SOFT, WEIGHTS, ACTIVATIONS, PEAK = "#222222", "#8a8a8a", "#c9ced6", "#0072B2", "#D55E00"
BANDS = ("#ffffff", "#f3f4f6")
PHASES = {
    "text_encoder": "text\nencoder",
    "vae_encoder_blocks": "VAE\nencoder",
    "vae_encoder_mid": "VAE\nencoder",
    "unet": "UNet",
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
    figure = Figure(figsize=(11, 5), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw(axes, told)
    target = Path(path)
    try:
        figure.savefig(target)
    except (OSError, ValueError) as error:
        raise SdfitError(
            f"cannot write the figure {target}: {error}; give a path like timeline.png", path=str(target)
        ) from error
    return target


def _draw(axes: Axes, told: Explanation) -> None:
    live = np.array([amount for _, amount in told.history], dtype=float) / GIB
    phases = [PHASES[stage] for stage, _ in told.history]
    edges, names = [0], []
    for name, group in groupby(phases):
        names.append(name)
        edges.append(edges[-1] + len(list(group)))
    place, bounds = _places(edges)
    base = (told.weights_bytes + told.standing_bytes) / GIB
    above = max(told.peak_bytes / GIB - base, 0.01)
    # start a little below the weights: they never change, and with a small image they would fill the figure
    bottom, top = max(0.0, base - 0.3 * above), base + 1.55 * above
    for i, name in enumerate(names):
        axes.axvspan(bounds[i], bounds[i + 1], color=BANDS[i % 2], lw=0, zorder=0)
        axes.text(
            (bounds[i] + bounds[i + 1]) / 2,
            top - 0.03 * above,
            name,
            ha="center",
            va="top",
            fontsize=9,
            color=INK,
            linespacing=1.05,
        )
    x = np.append(place, bounds[-1])
    steps = np.append(live, live[-1])
    axes.axhspan(bottom, base, color=WEIGHTS, lw=0, zorder=1)
    axes.fill_between(x, base, np.maximum(steps, base), step="post", color=ACTIVATIONS, alpha=0.28, lw=0, zorder=1)
    gone = np.minimum(steps, base)  # with offload some of the weights are elsewhere
    axes.fill_between(x, gone, base, step="post", color="white", lw=0, zorder=1.5)
    axes.step(x, steps, where="post", color=ACTIVATIONS, lw=0.9, zorder=3)
    axes.axhline(base, color=SOFT, lw=0.8, zorder=2)
    held = "weights" + (" and what libraries hold" if told.standing_bytes else "")
    note = f"{held}: {format_bytes(base * GIB)}"
    axes.text(bounds[-1] * 0.99, (bottom + base) / 2, note, ha="right", va="center", fontsize=9, color=INK)
    _mark_peak(axes, told, place[told.peak_index], bounds[-1])
    axes.set_xlim(0, bounds[-1])
    axes.set_ylim(bottom, top)
    axes.set_ylabel("live memory [GiB]" + (", axis not from 0" if bottom else ""), color=INK)
    axes.set_xlabel("operations in the order they run (short stages are stretched)", color=INK)
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
