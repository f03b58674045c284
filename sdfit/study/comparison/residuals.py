"""How far the calibrated trace lies from what others measured: the scores of models that rest on published numbers.

`python -m sdfit.study.comparison.residuals` traces every published row of allocated memory with the workspaces of its card and writes
``data/published/residuals.csv``; `scores` reads that file. A model of provenance ``published`` takes its intervals
from here and not from how well its equation follows the trace, which is a hundred times better and beside the point.

What it does not know: two thirds of the rows are 512x512; rows that measure the same thing on the same card are not
independent; no published row holds required memory, and reserved memory was published of the VAE alone.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from sdfit.backends.trace.workspaces import workspaces_for
from sdfit.predict.conformal import LEAST_ACTIVATION_BYTES
from sdfit.shipped import shipped
from sdfit.study.comparison import published
from sdfit.workload import DTYPE_BYTES, Workload

if TYPE_CHECKING:
    from sdfit.backends.trace.tracer import Traced, Tracer

FILE = "residuals.csv"
REASONS = {"COL-003": "see `T4_EXCESS` in sdfit/backends/trace/workspaces.py"}
"""Why a row is missed, as far as anybody knows; a row that is not here is not explained."""


@dataclass(frozen=True, slots=True)
class Residual:
    """One published row beside its trace.

    Parameters
    ----------
    id, card, pipeline : str
        As in `sdfit.study.comparison.published.PublishedRow`.
    height, width, batch_size : int
    published_bytes, traced_bytes : int
        What was measured by others, and what the trace with kernel workspaces gives.
    activation_bytes : int
        Of the traced bytes, what is not weights.
    """

    id: str
    card: str
    pipeline: str
    height: int
    width: int
    batch_size: int
    published_bytes: int
    traced_bytes: int
    activation_bytes: int

    @property
    def error(self) -> float:
        """The trace's error relative to the published number."""
        return (self.traced_bytes - self.published_bytes) / self.published_bytes

    @property
    def score(self) -> float:
        """The conformal score: how far the published number lies above the trace, in units of the activations."""
        return (self.published_bytes - self.traced_bytes) / self.activation_bytes


def read(file: Path | None = None) -> tuple[Residual, ...]:
    """Read the shipped residuals, or another file of the same columns.

    Examples
    --------
    >>> next(r.error for r in read() if r.id == "OM-020")
    0.0
    """
    path = file or shipped("data/published") / FILE
    with path.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return tuple(
        Residual(
            row["id"],
            row["card"],
            row["pipeline"],
            int(row["height"]),
            int(row["width"]),
            int(row["batch_size"]),
            int(row["published_bytes"]),
            int(row["traced_bytes"]),
            int(row["activation_bytes"]),
        )
        for row in rows
    )


def scores() -> list[float]:
    """The scores of all published rows, in ascending order."""
    return sorted(r.score for r in read())


def trace_published(row: published.PublishedRow, tracer: Tracer, *, keep_events: bool = False) -> tuple[int, Traced]:
    """Trace what a published row measured, with the workspaces of its card; return the bytes to compare and the trace.

    Parameters
    ----------
    row : PublishedRow
    tracer : Tracer
        Its ``workspace`` is replaced. One tracer for many rows saves building its pipelines again.

    Notes
    -----
    The `above_weights` rows took their baseline with cuBLAS warm and the image to encode on the card, so both are
    taken off; the latents to decode were scaled into a second tensor, so they are not.
    """
    tracer.workspace = workspaces_for(row.card)
    workload = Workload(
        row.height,
        row.width,
        batch_size=row.batch_size,
        guidance_scale=7.5 if row.guidance_scale is None else row.guidance_scale,
        dtype=row.dtype,
        attention=row.attention,
        vae_tiling=row.vae_tiling,
        offload=row.offload,
        safety_checker=row.safety_checker,
    )
    traced = tracer.run(workload, task=row.pipeline, keep_events=keep_events)
    expected_bytes = traced.peak_bytes
    if row.scope == "above_weights":
        expected_bytes -= traced.weights_bytes + traced.standing_bytes
        if row.pipeline == "vae_encode":
            expected_bytes -= 3 * workload.pixels * workload.batch_size * DTYPE_BYTES[row.dtype]
    return expected_bytes, traced


def trace_all() -> tuple[Residual, ...]:
    """Trace every published row of allocated memory; takes about a minute."""
    from sdfit.backends.trace.tracer import Tracer

    tracer, found = Tracer(), []
    rows = (*published.rows(), *published.read(shipped("data/published") / "other.csv"))
    for row in sorted(rows, key=lambda r: (r.dtype, r.id)):
        if row.metric != "allocated":
            continue
        expected, traced = trace_published(row, tracer)
        # under offload the peak holds fewer weights than there are; what is left then is the floor of the scale
        weights = traced.weights_bytes + traced.unsplit_bytes if row.scope == "total" and row.offload == "none" else 0
        activation = max(expected - weights, LEAST_ACTIVATION_BYTES)
        found.append(
            Residual(
                row.id,
                row.card,
                row.pipeline,
                row.height,
                row.width,
                row.batch_size,
                row.peak_bytes,
                expected,
                activation,
            )
        )
    return tuple(sorted(found, key=lambda r: r.id))


def write(found: tuple[Residual, ...], file: Path) -> None:
    """Write residuals as CSV."""
    with file.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow([f.name for f in fields(Residual)])
        writer.writerows(astuple(r) for r in found)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else shipped("data/published") / FILE
    write(trace_all(), target)
    print(target)
