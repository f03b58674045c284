"""Everything that a card is needed for, as one command that can be cut short and run again.

    python -m sdfit.study.lab campaign --gpu h200 --folder data/h200 --budget 9m

Parts, in the order of what would be missed most: a few runs of every kind with the allocator's history (for ``sdfit
calibrate``: nothing tells as much in so few seconds), the default grid and the holdout without their largest runs, the
required capacities, the proofs (`sdfit.study.lab.proofs`), the largest runs, then the fit and the card as a smaller one
(`sdfit.study.lab.capped`). Each record is on the disk before the next run starts; a part skips what the folder holds.
Tables (`sdfit.study.lab.tables`) come last. ``--dry-run`` prints the plan; ``--backend fake`` or ``trace`` rehearse it
without a card.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from sdfit.equation.stages import StageKey, stage_key
from sdfit.errors import SdfitError, listed
from sdfit.predict.predictor import Predictor
from sdfit.records import Record, RecordsFile, pool, read
from sdfit.study.comparison import residuals
from sdfit.study.lab import capped, proofs
from sdfit.sweep.grid import Plan, load
from sdfit.sweep.run import Progress, sweep, workloads_left
from sdfit.units import format_bytes
from sdfit.workload import Workload

GRIDS = ("history", "default", "holdout", "required")
LARGEST = "-largest"
LARGEST_PIXELS = 8_000_000
"""Pixels times UNet samples from which a run is one of the largest: few, and they take most of the time."""
BUDGETS_S = {
    "history": 180.0,
    "default": 540.0,
    "holdout": 300.0,
    "required": 420.0,
    "proofs": 240.0,
    "default-largest": 540.0,
    "holdout-largest": 240.0,
    "fit": 120.0,
    "capped": 300.0,
}
"""The most that a part may take in one call, so that none eats the call alone; the rest comes with the next one."""
PARTS = tuple(BUDGETS_S)
SIDE = Path("proofs")
"""Subfolder of files that are never fitted: proofs, and runs under caps."""


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
        """For the backend; only a card is told to bisect and its like, a trace gives all with its workspaces."""
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

    def predictor(self) -> Predictor | None:
        """The model, if it was fitted."""
        from sdfit.predict.loading import load_artifact

        return Predictor(load_artifact(self.model), self.model) if self.model.exists() else None

    def side_file(self, name: str) -> Path:
        """A file that is never fitted, whatever the date on which it was begun."""
        known = sorted((self.folder / SIDE).glob(f"*-{name}.jsonl"))
        return known[-1] if known else self.folder / SIDE / f"{date.today().isoformat()}-{name}.jsonl"


def run(campaign: Campaign, parts: Sequence[str]) -> None:
    """Run the parts for which there is time; what fails in one is noted, and the next one begins."""
    for part in parts:
        if campaign.left_s(part) <= 0:
            campaign.notes.append(f"{part}: no time left in this call")
            continue
        print(f"-- {part}, up to {campaign.left_s(part):.0f} s", file=sys.stderr, flush=True)
        try:
            if part.removesuffix(LARGEST) in GRIDS:
                _grid(campaign, part)
            else:
                _OTHER[part](campaign)
        except Exception as error:  # card time is dear: the parts after it, and the tables, must still come
            campaign.failed.append(part)
            known = isinstance(error, SdfitError)
            campaign.notes.append(
                f"{part} failed: {error}" if known else f"{part} failed: {type(error).__name__}: {error}"
            )


def _grid(campaign: Campaign, part: str) -> None:
    grid = part.removesuffix(LARGEST)
    plan = campaign.plan(grid)
    wanted = set(_unfinished(campaign, part))
    if not wanted:
        return  # without starting a worker
    last = [0.0]

    def report(progress: Progress) -> None:
        assert progress.record is not None
        campaign.runs.append((progress.record, progress.elapsed_s - last[0]))
        last[0] = progress.elapsed_s
        if len(campaign.runs) % 20 == 0:
            print(f"   {grid}: {progress.done} of {progress.total}, {progress.oom} oom", file=sys.stderr, flush=True)

    options = campaign.options(bisect=grid == "required")
    sweep(
        plan,
        campaign.backend,
        options,
        campaign.file(grid),
        workers=1,
        budget_s=campaign.left_s(part),
        only=wanted.__contains__,
        histories=plan.workloads if grid == "history" else (),
        report=report,
    )


def is_large(workload: Workload) -> bool:
    """Whether a run is one of the largest, which come last.

    Examples
    --------
    >>> is_large(Workload(2048, 2048)), is_large(Workload(2048, 2048, guidance_scale=1))
    (True, False)
    """
    return workload.unet_batch * workload.pixels > LARGEST_PIXELS


def _unfinished(campaign: Campaign, part: str) -> list[Workload]:
    grid = part.removesuffix(LARGEST)
    found = campaign.records(grid)
    left = workloads_left(campaign.plan(grid), found.records if found else [])
    return [w for w in left if f"{grid}{LARGEST}" not in PARTS or is_large(w) == (part != grid)]


def _proofs(campaign: Campaign) -> None:
    path, workloads = campaign.side_file("proofs"), campaign.plan("proofs").workloads
    if not proofs.prove(path, workloads, campaign.backend, campaign.options(), campaign.in_time("proofs")):
        campaign.notes.append("proofs: unfinished")


def _fit(campaign: Campaign) -> None:
    from sdfit.fit.fit import FEWEST_SIZES, fit

    data = pool([f for f in (campaign.records("default"), campaign.records("required")) if f is not None]).undisturbed()
    sizes: dict[StageKey, set[int]] = {}
    for record in data.records:
        if record.outcome == "ok":
            sizes.setdefault(stage_key("unet", record.workload.variant), set()).add(record.workload.pixels)
    # a sweep that was cut short must still give a model of what it saw enough of
    thin = {key for key, seen in sizes.items() if len(seen) < FEWEST_SIZES}
    kept = [r for r in data.records if stage_key("unet", r.workload.variant) not in thin]
    campaign.notes += [f"fit: too few sizes yet of {' '.join(key[1:])}; left out" for key in sorted(thin)]
    fit(replace(data, records=kept), published=residuals.read()).save(campaign.model)


def _capped(campaign: Campaign) -> None:
    predictor = campaign.predictor()
    if predictor is None:
        raise SdfitError("there is no model yet; the part 'fit' makes it")
    if campaign.backend == "trace":
        raise SdfitError("a trace has no capacity; rehearse this part with --backend fake")
    planned = capped.tries(predictor)
    home = campaign.folder / SIDE
    path = capped.run(planned, campaign.backend, campaign.options(), home, campaign.in_time("capped"))
    campaign.notes.append(f"capped: {path.name}")


_OTHER: dict[str, Callable[[Campaign], None]] = {"proofs": _proofs, "fit": _fit, "capped": _capped}


def dry_run(campaign: Campaign, parts: Sequence[str]) -> str:
    """Say what each part would run, and what is there already."""
    lines = []
    for part in parts:
        lines.append(f"{part}: at most {BUDGETS_S[part]:.0f} s a call")
        if part.removesuffix(LARGEST) in GRIDS:
            lines[-1] += f", {len(_unfinished(campaign, part))} runs left"
        if part in (*GRIDS, "proofs"):
            lines[-1] += f"\n{campaign.plan(part).summary()}"
    runs = len(campaign.plan("proofs").workloads)
    lines += [f"proofs, {runs} workloads each: {c.name}: {c.question}" for c in proofs.CONDITIONS if "proofs" in parts]
    if "capped" in parts:
        count = len(capped.CAPS_BYTES) * len(capped.SHAPES)
        lines.append(f"capped: {count} tries of two runs, at {listed(format_bytes(c) for c in capped.CAPS_BYTES)}")
    return "\n\n".join(lines)
