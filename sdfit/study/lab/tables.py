"""What a campaign (`sdfit.study.lab`) found so far, as text: its state, its speed, the proofs, the holdout, the caps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdfit.errors import RecordsError, SdfitError, listed
from sdfit.judging.evaluate import evaluate
from sdfit.predict.predictor import Predictor
from sdfit.records import Record, RecordsFile, read, read_rows
from sdfit.study.lab import capped, proofs
from sdfit.study.lab.campaign import GRIDS, SIDE, Campaign
from sdfit.units import aligned, format_bytes

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
    _, rows, _ = read_rows(path, proofs.PROOFS)
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
    try:
        return f"holdout: {evaluate(predictor, held).table()}"
    except RecordsError as error:  # a sweep that was cut short may lack its variants
        return f"holdout: {error}"


def _capped_table(campaign: Campaign, predictor: Predictor) -> str:
    planned = capped.tries(predictor)
    found: list[Record] = []
    for path in sorted((campaign.folder / SIDE).glob("*-capped-*.jsonl")):
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
