"""The trace beside the measurement, stage by stage: what is left over belongs to kernels.

    python -m sdfit.study.lab beside data/h200/<date>-default.jsonl [--kernels h200] [--take 60]

Each recorded workload is traced again, bare or with the kernel workspaces of a card, and the difference of each
stage's peak is shown per variant of the stage and regime, in bytes per pixel of a pass: a workspace of so many
channels. The operation named is the one at the stage's traced peak; where a kernel holds more than the trace knows,
the real peak may lie at another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from sdfit.backends.trace.observe import observed
from sdfit.backends.trace.tracer import Tracer
from sdfit.equation.regimes import REGIMES, regime
from sdfit.equation.sizes import Sizes
from sdfit.equation.stages import UNET_STAGES, StageKey, stage_key
from sdfit.records import Record
from sdfit.units import aligned, format_bytes


@dataclass(frozen=True, slots=True)
class Difference:
    """How far the records of one stage, variant and regime lie above their traces.

    Parameters
    ----------
    key : tuple of str
        The stage and the fields that matter to it.
    regime : str
        One of `sdfit.equation.terms.REGIMES`.
    operation : str
        At the traced peak of most of the runs, with its module.
    bytes_per_pixel : float
        Median of the difference over the pixels of a pass, all its images together [B/px].
    median_bytes, worst_bytes : int
        Of the difference [bytes].
    rows : int
    """

    key: StageKey
    regime: str
    operation: str
    bytes_per_pixel: float
    median_bytes: int
    worst_bytes: int
    rows: int


def beside(records: Sequence[Record], tracer: Tracer) -> tuple[Difference, ...]:
    """Trace the workloads of some records and compare the stage peaks.

    Parameters
    ----------
    records : sequence of Record
        Those that did not succeed are skipped.
    tracer : Tracer
        Bare, or with the workspaces that are to be tested.
    """
    found: dict[tuple[StageKey, str], list[tuple[float, float, str]]] = defaultdict(list)
    for record in records:
        if record.outcome != "ok":
            continue
        w = record.workload
        traced, observer = observed(tracer, w, tensors=True, key=lambda name: name.stage)
        sizes = Sizes.of_workloads([w])
        for stage, peak in record.stage_peaks_bytes.items():
            if stage not in traced.stage_peaks:
                continue
            key = stage_key(stage, w.variant)
            above = peak - record.weights_bytes(stage)
            expected = traced.stage_peaks[stage] - _weights(record, stage, traced.weights_bytes + traced.unsplit_bytes)
            pixels = float(np.asarray(sizes.n * sizes.A if stage in UNET_STAGES else sizes.m * sizes.P).item())
            name = observer.peaks[stage].name if stage in observer.peaks else None
            where = f"{name.operation} in {name.path}" if name else ""
            label = REGIMES[int(np.asarray(regime(stage, sizes)).item())].words
            found[key, label].append((above - expected, pixels, where))
    return tuple(_difference(key, label, rows) for (key, label), rows in sorted(found.items()))


def _weights(record: Record, stage: str, all_bytes: int) -> int:
    """The traced weights that are on the card in a stage."""
    if record.workload.offload == "none":
        return all_bytes
    return record.weights_bytes(stage)


def _difference(key: StageKey, label: str, rows: list[tuple[float, float, str]]) -> Difference:
    sizes = [d for d, _, _ in rows]
    places = [where for _, _, where in rows]
    return Difference(
        key,
        label,
        max(set(places), key=places.count),
        median(d / pixels for d, pixels, _ in rows),
        round(median(sizes)),
        round(max(sizes) if max(sizes) >= -min(sizes) else min(sizes)),
        len(rows),
    )


def table(found: Sequence[Difference]) -> str:
    """The differences as aligned text, those of most bytes per pixel first."""
    lines = [("stage", "regime", "at the traced peak", "rows", "median", "worst", "B/px")]
    for d in sorted(found, key=lambda d: -abs(d.bytes_per_pixel)):
        shown = (format_bytes(d.median_bytes), format_bytes(d.worst_bytes), f"{d.bytes_per_pixel:,.1f}")
        lines.append((" ".join(d.key), d.regime, d.operation, str(d.rows), *shown))
    return aligned(lines, left=3)
