"""Every published measurement of allocated memory, traced: what ``data/published/residuals.csv`` is made of."""

from __future__ import annotations

import csv
import io
from dataclasses import astuple, fields
from pathlib import Path

from sdfit.backends.trace.tracer import Tracer
from sdfit.files import Kind, Output, shipped
from sdfit.files import write as write_files
from sdfit.predict.conformal import LEAST_SCALE_BYTES
from sdfit.predict.simulation.card import Traced
from sdfit.predict.simulation.workspaces import workspaces_for
from sdfit.study.comparison import published
from sdfit.study.comparison.residuals import Residual
from sdfit.workload import DTYPE_BYTES, Workload


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


def others() -> tuple[published.PublishedRow, ...]:
    """The published rows of ``other.csv``, collected after the rules of the workspace table stood."""
    return tuple(published.read(shipped("data/published") / "other.csv"))


def trace_all() -> tuple[Residual, ...]:
    """Trace every published row of allocated memory; takes about a minute."""
    tracer, found = Tracer(), []
    for row in sorted((*published.rows(), *others()), key=lambda r: (r.dtype, r.id)):
        if row.metric != "allocated":
            continue
        expected, traced = trace_published(row, tracer)
        at_peak = max(traced.stage_peaks, key=lambda stage: traced.stage_peaks[stage])
        weights = traced.resident_bytes[at_peak] + traced.unsplit_bytes if row.scope == "total" else 0
        activation = max(expected - weights, LEAST_SCALE_BYTES)
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
    lines, names = io.StringIO(), [f.name for f in fields(Residual)]
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(astuple(r) for r in found)
    write_files(Output(file, lines.getvalue().encode(), Kind("table", (".csv",), ",".join(names).encode())))
