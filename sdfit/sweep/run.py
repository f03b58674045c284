"""Run a grid and keep what came of it.

A sweep skips what its file holds already, runs the rest in worker processes, and appends each record the moment it is
there. To resume is to run the same command again: at most the workloads under way are repeated. Crashed workloads are
tried again on resume; an out-of-memory run is an answer and is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from sdfit.errors import RecordsError, SdfitError
from sdfit.files import file_name
from sdfit.records import RECORDS, Record, read
from sdfit.sweep.grid import Plan
from sdfit.sweep.journal import Journal
from sdfit.sweep.ray import RayPool
from sdfit.sweep.workers import Job, LocalPool, crashed, default_workers
from sdfit.workload import Workload


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a sweep stands."""

    done: int
    total: int
    oom: int
    crashed: int
    elapsed_s: float
    eta_s: float | None
    record: Record | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a sweep left behind: its file, counts, and whether the plan is complete."""

    path: Path
    done: int
    total: int
    oom: int
    crashed: int
    skipped: int
    complete: bool
    notes: list[str]


def default_path(name: str, plan: Plan, folder: Path | str = "data", backend: str = "cuda") -> Path:
    """``data/<name>/<date>-<grid>.jsonl``; a trace's name ends in ``-trace``.

    An unfinished file of the same grid is resumed, whatever its date.
    """
    home = Path(folder, file_name(name))
    grid = f"{plan.name}-trace" if backend == "trace" else plan.name
    for path in sorted(home.glob(f"*-{grid}.jsonl"), reverse=True):
        if _finished(path) < len(plan.workloads):
            return path
    return home / f"{date.today().isoformat()}-{grid}.jsonl"


def _finished(path: Path) -> int:
    """Workloads of a file that need not run again."""
    try:
        return len(finished(read(path).records))
    except RecordsError:  # to be told when it is opened for writing
        return 0


def finished(records: Iterable[Record]) -> dict[int, Record]:
    """The rows that need not run again, by index: a later row replaces an earlier one, and a crash is tried again."""
    latest = {r.index: r for r in records}
    return {index: r for index, r in latest.items() if r.outcome != "crash"}


def workloads_left(plan: Plan, records: Iterable[Record]) -> list[Workload]:
    """What a plan still lacks."""
    known = finished(records)
    return [w for i, w in enumerate(plan.workloads) if i not in known]


def record_of(index: int, workload: Workload, fields: Mapping[str, Any]) -> Record:
    """Make the row of a result; what a backend says that no row can be is a crash row with the reason."""
    try:
        return Record(index, workload, **fields)
    except (RecordsError, TypeError) as error:
        return Record(index, workload, **crashed(f"the backend's result is no record: {error}"))


def sweep(
    plan: Plan,
    backend: str,
    options: Mapping[str, Any],
    out: Path | None = None,
    *,
    engine: str = "local",
    workers: int | None = None,
    budget_s: float | None = None,
    only: Callable[[Workload], bool] = lambda workload: True,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Run what a plan still lacks.

    Parameters
    ----------
    plan : Plan
    backend : {'cuda', 'trace', 'fake'}
    options : mapping
        For the backend.
    out : Path, optional
        The records file; None: `default_path`.
    engine : {'local', 'ray'}
    workers : int, optional
        None: one per card, or per processor for a trace.
    budget_s : float, optional
        Start no further workload after this many seconds.
    only : callable
        ``only(workload)``: leave out the others this time; they are still part of the plan.
    report : callable
        Called after each record.

    Raises
    ------
    DeviceError
        If the card asked for, or a free processor for a Ray actor, is not there.
    RecordsError
        If the file was swept under other conditions, or is being written by another sweep.
    """
    options = dict(options) | {"num_inference_steps": plan.num_inference_steps}
    pool_class = RayPool if engine == "ray" else LocalPool
    pool = pool_class(backend, options, workers or default_workers(backend))
    try:
        environment = pool.environment() | {
            "grid": plan.name,
            "grid_sha256": plan.sha256,
            "seed": plan.seed,
            "num_inference_steps": plan.num_inference_steps,
        }
        path = out or default_path(str(environment["name"]), plan, backend=backend)
        with Journal(path, environment, RECORDS) as journal:
            return _run(plan, pool, journal, budget_s, only, report)
    finally:
        pool.close()


def _run(
    plan: Plan,
    pool: Any,
    journal: Journal[Record],
    budget_s: float | None,
    only: Callable[[Workload], bool],
    report: Callable[[Progress], None],
) -> Outcome:
    started = time.monotonic()
    known = finished(journal.rows)
    foreign = [i for i, r in known.items() if i >= len(plan.workloads) or r.workload != plan.workloads[i]]
    if foreign:
        raise SdfitError(f"row {foreign[0]} of '{journal.path}' is not of this grid; choose another file with --out")
    outcomes = [r.outcome for r in known.values()]
    done, oom, crashed = len(known), outcomes.count("oom"), 0

    def jobs() -> Iterator[Job]:
        for index, workload in enumerate(plan.workloads):
            if index in known or not only(workload):
                continue
            if budget_s is not None and time.monotonic() - started > budget_s:
                return
            yield index, workload

    for fresh, (index, fields) in enumerate(pool.run(jobs()), start=1):
        record = record_of(index, plan.workloads[index], fields)
        journal.append(record)
        oom += record.outcome == "oom"
        if record.outcome == "crash":
            crashed += 1
        else:
            done += 1
        elapsed = time.monotonic() - started
        left = len(plan.workloads) - done - crashed
        report(Progress(done, len(plan.workloads), oom, crashed, elapsed, elapsed / fresh * left, record))
    complete = done == len(plan.workloads)
    return Outcome(journal.path, done, len(plan.workloads), oom, crashed, len(known), complete, journal.notes)
