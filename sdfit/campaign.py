"""Everything that a card is needed for, as one command that can be cut short and run again.

    python -m sdfit.campaign --gpu h200 --folder data/h200 --budget 9m

Parts, in the order of what would be missed most: the default grid, the holdout, the required capacities, the proofs
(`sdfit.proofs`), then the fit and the card as a smaller one (`sdfit.capped`). Each record is on the disk before the
next run starts; a part skips what the folder holds. Tables come last. ``--dry-run`` prints the plan;
``--backend fake`` or ``trace`` rehearse it without a card.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from sdfit import capped, proofs
from sdfit.advise import SAFE_LEVEL
from sdfit.errors import GridError, SdfitError, listed
from sdfit.grid import Plan, load
from sdfit.predictor import Predictor
from sdfit.records import METRICS, Record, RecordsFile, pool, read
from sdfit.sweep import Progress, sweep
from sdfit.text import aligned, percent
from sdfit.units import format_bytes, parse_duration

GRIDS = ("default", "holdout", "required")
PARTS = (*GRIDS, "proofs", "fit", "capped")
BUDGETS_S = {"default": 540.0, "holdout": 300.0, "required": 420.0, "proofs": 240.0, "fit": 60.0, "capped": 300.0}
"""The most that a part may take in one call, so that none eats the call alone; the rest comes with the next one."""
SIDE = Path("proofs")
"""Subfolder of files that are never fitted: proofs, and runs under caps."""
RATE_PIXELS = 1024 * 1024


@dataclass
class Campaign:
    """Where a campaign stands.

    Parameters
    ----------
    backend, gpu, folder : see the command line
    budget_s : float
        For this call.
    take : int, optional
        Only so many workloads of each grid: for a rehearsal.
    """

    backend: str
    gpu: str
    folder: Path
    budget_s: float
    take: int | None = None
    started: float = field(default_factory=time.monotonic)
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    runs: list[tuple[Record, float]] = field(default_factory=list)

    def left_s(self, part: str) -> float:
        """Seconds that a part may still begin runs in."""
        return min(BUDGETS_S[part], self.budget_s - (time.monotonic() - self.started))

    def in_time(self, part: str) -> Callable[[], bool]:
        """Ask whether a part may begin another run."""
        end = time.monotonic() + self.left_s(part)
        return lambda: time.monotonic() < end

    def options(self, **more: Any) -> dict[str, Any]:
        """For the backend; only a card knows ``required`` and its like, a trace gives it with its workspaces."""
        own = {"cuda": more, "trace": {"workspaces": True}}
        return {"gpu": self.gpu, **own.get(self.backend, {})}

    def plan(self, grid: str) -> Plan:
        """A grid's plan, shortened for a rehearsal."""
        plan = load(grid)
        if self.take is None or len(plan.workloads) <= self.take:
            return plan
        kept = [plan.workloads[i * len(plan.workloads) // self.take] for i in range(self.take)]  # of every block
        return replace(plan, workloads=tuple(kept), sha256=f"{plan.sha256}/{self.take}")

    def file(self, grid: str) -> Path:
        """The grid's records, whatever the date on which they were begun."""
        known = sorted(self.folder.glob(f"*-{grid}.jsonl"))
        return known[-1] if known else self.folder / f"{date.today().isoformat()}-{grid}.jsonl"

    def records(self, grid: str) -> RecordsFile | None:
        """What is there of a grid."""
        return read(self.file(grid)) if self.file(grid).exists() else None

    @property
    def model(self) -> Path:
        """Where the fit goes: beside the records, until somebody ships it."""
        return self.folder / f"{self.folder.name}.joblib"


def run(campaign: Campaign, parts: Sequence[str]) -> None:
    """Run the parts for which there is time; what fails in one is noted, and the next one begins."""
    for part in parts:
        if campaign.left_s(part) <= 0:
            campaign.notes.append(f"{part}: no time left in this call")
            continue
        print(f"-- {part}, up to {campaign.left_s(part):.0f} s", file=sys.stderr, flush=True)
        try:
            if part in GRIDS:
                _grid(campaign, part)
            else:
                _OTHER[part](campaign)
        except Exception as error:  # card time is dear: the parts after it, and the tables, must still come
            campaign.failed.append(part)
            known = isinstance(error, SdfitError)
            campaign.notes.append(
                f"{part} failed: {error}" if known else f"{part} failed: {type(error).__name__}: {error}"
            )


def _grid(campaign: Campaign, grid: str) -> None:
    plan = campaign.plan(grid)
    last = [0.0]

    def report(progress: Progress) -> None:
        assert progress.record is not None
        campaign.runs.append((progress.record, progress.elapsed_s - last[0]))
        last[0] = progress.elapsed_s
        if len(campaign.runs) % 20 == 0:
            print(f"   {grid}: {progress.done} of {progress.total}, {progress.oom} oom", file=sys.stderr, flush=True)

    options = campaign.options(required=grid == "required")
    sweep(
        plan, campaign.backend, options, campaign.file(grid), workers=1, budget_s=campaign.left_s(grid), report=report
    )


def _proofs(campaign: Campaign) -> None:
    log = proofs.Log(_dated(campaign, "proofs"))
    workloads = campaign.plan("proofs").workloads
    if not proofs.prove(log, workloads, campaign.backend, campaign.options(), campaign.in_time("proofs")):
        campaign.notes.append("proofs: unfinished")


def _dated(campaign: Campaign, name: str) -> Path:
    home = campaign.folder / SIDE
    known = sorted(home.glob(f"*-{name}.jsonl"))
    return known[-1] if known else home / f"{date.today().isoformat()}-{name}.jsonl"


def _fit(campaign: Campaign) -> None:
    from sdfit.fit import fit

    files = [f for f in (campaign.records("default"), campaign.records("required")) if f is not None]
    fit(pool(files)).save(campaign.model)


def _predictor(campaign: Campaign) -> Predictor | None:
    from sdfit.artifact import load_artifact

    return Predictor(load_artifact(campaign.model), campaign.model) if campaign.model.exists() else None


def _capped(campaign: Campaign) -> None:
    predictor = _predictor(campaign)
    if predictor is None:
        raise SdfitError("there is no model yet; the part 'fit' makes it")
    if campaign.backend == "trace":
        raise SdfitError("a trace has no capacity; rehearse this part with --backend fake")
    planned = capped.tries(predictor)
    home = campaign.folder / SIDE
    path = capped.run(planned, campaign.backend, campaign.options(), home, campaign.in_time("capped"))
    campaign.notes.append(f"capped: {path.name}")


_OTHER: dict[str, Callable[[Campaign], None]] = {"proofs": _proofs, "fit": _fit, "capped": _capped}


# -- tables --


def tables(campaign: Campaign) -> str:
    """Everything that is known so far, as text."""
    parts = [_state(campaign), _speed(campaign), _proof_table(campaign)]
    predictor, held = _predictor(campaign), campaign.records("holdout")
    if predictor is not None and held is not None:
        parts.append(_holdout_table(predictor, held))
    if predictor is not None:
        parts.append(_capped_table(campaign, predictor))
    return "\n\n".join(p for p in [*parts, *campaign.notes] if p)


def _state(campaign: Campaign) -> str:
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
    path = _dated(campaign, "proofs")
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
            text += [
                f"{k['dtype']} head_dim {k['head_dim']} rows {k['rows']}: {k['choice']}"
                for k in row["kernels"]
                if "choice" in k
            ]
    return "\n".join(text)


def _span(span: tuple[int, int] | None) -> str:
    if span is None:
        return "-"
    return str(span[0]) if span[0] == span[1] else f"{span[0]} .. {span[1]}"


def _holdout_table(predictor: Predictor, held: RecordsFile) -> str:
    lines: list[Sequence[str]] = [("holdout", "rows", "median", "worst", "in 95 %", "over 0.99 bound", "reserves more")]
    ok = [r for r in held.records if r.outcome == "ok"]
    for metric in METRICS:
        rows = [r for r in ok if getattr(r, f"{metric}_bytes") is not None]
        if not rows or (metric != "allocated" and not predictor.artifact.metrics.get(metric)):
            continue
        judged = [_judged(predictor, r, metric) for r in rows]
        errors, inside, over, more = (np.array(column) for column in zip(*judged, strict=True))
        cells = (np.median(errors), errors.max(), inside.mean(), over.mean(), more.mean())
        lines.append((metric, str(len(rows)), *(percent(float(c)) for c in cells)))
    return aligned(lines)


def _judged(predictor: Predictor, record: Record, metric: str) -> tuple[float, bool, bool, float]:
    actual = float(getattr(record, f"{metric}_bytes"))
    guess = predictor.predict_workload(record.workload, metric=metric, level=0.95)
    low, high = guess.interval[:2]
    bound = predictor.predict_workload(record.workload, metric=metric, level=SAFE_LEVEL).upper
    return abs(guess / actual - 1), low <= actual <= high, actual > bound, bound / actual - 1


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


def dry_run(campaign: Campaign, parts: Sequence[str]) -> str:
    """Say what each part would run, and what is there already."""
    lines = []
    for part in parts:
        if part in (*GRIDS, "proofs"):
            lines.append(f"{part} (at most {BUDGETS_S[part]:.0f} s a call)\n{campaign.plan(part).summary()}")
    runs = len(campaign.plan("proofs").workloads)
    lines += [f"proofs, {runs} workloads each: {c.name}: {c.question}" for c in proofs.CONDITIONS if "proofs" in parts]
    if "capped" in parts:
        count = len(capped.CAPS_BYTES) * len(capped.SHAPES)
        lines.append(f"capped: {count} tries of two runs, at {listed(format_bytes(c) for c in capped.CAPS_BYTES)}")
    return "\n\n".join([*lines, _state(campaign)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sdfit.campaign", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", default="auto", help="the card, as in h200; auto takes what is there")
    parser.add_argument("--backend", choices=("cuda", "trace", "fake"), default="cuda")
    parser.add_argument(
        "--folder", type=Path, required=True, help="where records are, and go; its name names the model"
    )
    parser.add_argument("--budget", default="9m", help="begin nothing new after this time")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {listed(PARTS)}")
    parser.add_argument("--take", type=int, default=None, help="only so many workloads of each grid: a rehearsal")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args(arguments)
    parts = [p for p in given.parts.split(",") if p]
    try:
        unknown = [p for p in parts if p not in PARTS]
        if unknown:
            raise GridError(f"there is no part '{unknown[0]}'; there are: {listed(PARTS)}", given=unknown[0])
        campaign = Campaign(given.backend, given.gpu, given.folder, parse_duration(given.budget), given.take)
        if given.dry_run:
            print(dry_run(campaign, parts))
            return 0
        run(campaign, parts)
        print(tables(campaign), flush=True)
    except SdfitError as error:
        print(f"sdfit: {error}", file=sys.stderr)
        return error.exit_code
    return 1 if campaign.failed else 0


if __name__ == "__main__":
    sys.exit(main())
