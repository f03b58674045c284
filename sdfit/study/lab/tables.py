"""What a campaign (`sdfit.study.lab`) found so far, as text: its state, its speed, the proofs, the holdout, the caps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sdfit.equation.metrics import METRICS
from sdfit.errors import SdfitError, UnknownVariant, listed
from sdfit.predict.advise import SAFE_LEVEL
from sdfit.predict.predictor import Predictor
from sdfit.records import Record, RecordsFile, read
from sdfit.study.lab import capped, proofs
from sdfit.units import aligned, format_bytes, percent

if TYPE_CHECKING:
    from sdfit.study.lab.campaign import Campaign

GRIDS = ("default", "holdout", "required")
RATE_PIXELS = 1024 * 1024
"""The rate is told for single images up to this size."""


def tables(campaign: Campaign) -> str:
    """Everything that is known so far, as text."""
    parts = [state(campaign), _speed(campaign), _proof_table(campaign)]
    predictor, held = campaign.predictor(), campaign.records("holdout")
    if predictor is not None and held is not None:
        parts.append(_holdout_table(predictor, held))
    if predictor is not None:
        parts.append(_capped_table(campaign, predictor))
    return "\n\n".join(p for p in [*parts, *campaign.notes] if p)


def state(campaign: Campaign) -> str:
    """How much of each grid is there, and whether it was measured at all."""
    lines: list[Sequence[str]] = [("part", "done", "of", "oom", "crash", "required")]
    for grid in GRIDS:
        found = campaign.records(grid)
        rows = found.records if found else []
        counts = [sum(r.outcome == o for r in rows) for o in ("ok", "oom", "crash")]
        required = sum(r.required_bytes is not None for r in rows)
        total = len(campaign.plan(grid).workloads)
        lines.append((grid, *(str(n) for n in (counts[0] + counts[1], total, counts[1], counts[2], required))))
    title = "measured" if campaign.backend == "cuda" else f"SIMULATED (--backend {campaign.backend}): a rehearsal"
    return f"{title}, {campaign.folder}\n" + aligned(lines)


def _speed(campaign: Campaign) -> str:
    """How fast this call was, without the bisected runs."""
    plain = [(r, s) for r, s in campaign.runs if r.outcome == "ok" and r.required_bytes is None and r.stage_s]
    small = [s for r, s in plain if r.workload.pixels <= RATE_PIXELS and r.workload.batch_size == 1]
    own = sum(sum(r.stage_s.values()) for r, _ in plain)
    if not small or not own:
        return ""
    total = sum(s for _, s in plain)
    return (
        f"this call: {60 * len(small) / sum(small):.0f} workloads a minute at single images up to 1024²; "
        f"{total / own:.2f} x the pipeline's own time over all {len(plain)}"
    )


def _proof_table(campaign: Campaign) -> str:
    path = campaign.side_file("proofs")
    if not path.exists():
        return ""
    rows = proofs.Log(path).rows
    lines: list[Sequence[str]] = [("condition - reference [B]", "runs", "stages", "allocated", "reserved", "baseline")]
    for entry in proofs.compared(rows):
        cells = [_span(entry[name]) for name in ("stages", "allocated", "reserved", "baseline")]
        lines.append((entry["condition"], str(entry["runs"]), *cells))
    text = [aligned(lines)]
    for row in rows:
        context = row.get("environment", {}).get("context_bytes")
        if row["condition"] == proofs.REFERENCE and row["index"] == 0 and context is not None:
            text.append(f"CUDA context, bare: {format_bytes(context)}")
        if "kernels" in row:
            text += _kernel_lines(row["kernels"])
    return "\n".join(text)


def _kernel_lines(kernels: Sequence[dict[str, Any]]) -> list[str]:
    by_dtype: dict[str, list[str]] = {}
    for k in kernels:
        if "choice" in k:
            by_dtype.setdefault(k["dtype"], []).append(f"{k['head_dim']} x {k['rows']} {k['choice']}")
    return [f"attention kernels, {dtype}, head_dim x rows: {listed(found)}" for dtype, found in by_dtype.items()]


def _span(span: tuple[int, int] | None) -> str:
    if span is None:
        return "-"
    return str(span[0]) if span[0] == span[1] else f"{span[0]} .. {span[1]}"


def _holdout_table(predictor: Predictor, held: RecordsFile) -> str:
    lines: list[Sequence[str]] = [("holdout", "rows", "median", "worst", "in 95 %", "over 0.99 bound", "reserves more")]
    ok = [r for r in held.records if r.outcome == "ok" and _known(predictor, r)]
    for metric in METRICS:
        rows = [r for r in ok if getattr(r, f"{metric}_bytes") is not None]
        if not rows or (metric != "allocated" and not predictor.artifact.metrics.get(metric)):
            continue
        judged = [_judged(predictor, r, metric) for r in rows]
        errors, inside, over, more = (np.array(column) for column in zip(*judged, strict=True))
        cells = (np.median(errors), errors.max(), inside.mean(), over.mean(), more.mean())
        lines.append((metric, str(len(rows)), *(percent(float(c)) for c in cells)))
    return aligned(lines)


def _known(predictor: Predictor, record: Record) -> bool:
    """Whether the model has seen that variant; a sweep that was cut short may lack some."""
    try:
        predictor.variant(record.workload.variant)
    except UnknownVariant:
        return False
    return True


def _judged(predictor: Predictor, record: Record, metric: str) -> tuple[float, bool, bool, float]:
    actual = float(getattr(record, f"{metric}_bytes"))
    guess = predictor.predict_workload(record.workload, metric=metric, level=0.95)
    low, high = guess.interval[:2]
    bound = predictor.predict_workload(record.workload, metric=metric, level=SAFE_LEVEL).upper
    return abs(guess / actual - 1), low <= actual <= high, actual > bound, bound / actual - 1


def _capped_table(campaign: Campaign, predictor: Predictor) -> str:
    planned = capped.tries(predictor)
    found: list[Record] = []
    for path in sorted((campaign.folder / "proofs").glob("*-capped-*.jsonl")):
        rows = read(path).records
        try:
            capped.verdict(planned, rows)
        except SdfitError:
            continue  # of an earlier model
        found = rows
    if not found:
        return ""
    lines: list[Sequence[str]] = [("cap", "batch", "must run", "", "must fail", "")]
    right = 0
    for one, ran, failed in capped.verdict(planned, found):
        right += ran == "ok" and failed == "oom"
        sizes = [f"{w.height}x{w.width}" for w in (one.must_run, one.must_fail)]
        lines.append((format_bytes(one.cap_bytes), str(one.must_run.batch_size), sizes[0], ran, sizes[1], failed))
    return f"{aligned(lines)}\n{right} of {len(planned)} tries came out as the model said"
