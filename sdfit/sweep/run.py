"""Run a grid and keep what came of it.

A sweep skips what its file holds already, runs the rest in worker processes, and appends each record the moment it is
there. To resume is to run the same command again: at most the workloads under way are repeated. A workload that crashed,
or that another program's memory disturbed, is tried again after the others, `MOST_TRIES` times in all; then its last row
stands. An out-of-memory run is an answer.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from sdfit.backends.history import ENDING, HISTORY
from sdfit.errors import RecordsError, SdfitError
from sdfit.files import Output, file_name, write
from sdfit.records import RECORDS, Record, kind_of, latest, read_rows
from sdfit.sweep.grid import Plan
from sdfit.sweep.journal import Journal
from sdfit.sweep.ray import RayPool
from sdfit.sweep.workers import LIMIT_S, Job, LocalPool, crashed, default_workers, left_out
from sdfit.workload import Workload

Choose = Callable[[Sequence[Record]], Iterator[int]]


MOST_TRIES = 3
"""A workload that gave no answer so often is left at that, and the sweep is complete without it."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a sweep stands: the counts of `Outcome`, and how many workloads still have to run, or to run again."""

    done: int
    total: int
    oom: int
    crashed: int
    left: int
    elapsed_s: float
    eta_s: float | None
    record: Record | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a sweep left behind: its file, and how many workloads of the plan it has what of.

    ``done`` have a result, ``oom`` of them out of memory, ``disturbed`` of them beside another program whose memory came or
    went; ``crashed`` have none; ``skipped`` were there already. Where it is ``complete`` none needs to be tried again.
    """

    path: Path
    done: int
    total: int
    oom: int
    crashed: int
    disturbed: int
    skipped: int
    complete: bool
    notes: list[str]
    paths: tuple[Path, ...]
    """One file for each kind of card; ``path`` is the first."""


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


def history_path(records: Path, index: int) -> Path:
    """Where the history of a workload goes: a folder beside the records, a file named by its place in the plan.

    Examples
    --------
    >>> history_path(Path("data/h200/2026-11-25-quick.jsonl"), 3).as_posix()
    'data/h200/2026-11-25-quick-history/0003.pickle.gz'
    """
    return records.with_name(f"{records.name.split('.')[0]}-history") / f"{index:04d}{ENDING}"


def _finished(path: Path) -> int:
    """Workloads of a file that need not run again."""
    try:
        return len(finished(read_rows(path, RECORDS)[1]))
    except RecordsError:  # to be told when it is opened for writing
        return 0


def finished(records: Iterable[Record]) -> dict[int, Record]:
    """The rows that need not run again, by index: answers, and what gave none in `MOST_TRIES` tries."""
    rows = list(records)
    tries = Counter(r.index for r in rows if not r.is_answer)
    return {i: r for i, r in latest(rows).items() if r.is_answer or tries[i] >= MOST_TRIES}


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


class _File:
    """The records of one kind of card: what its file lacks, and how far it is."""

    def __init__(
        self, plan: Plan, journal: Journal[Record], only: Callable[[Workload], bool], choose: Choose | None
    ) -> None:
        self.plan, self.journal = plan, journal
        foreign = [r.index for r in journal.rows if not _is_of(plan, r)]
        if foreign:
            raise SdfitError(
                f"row {foreign[0]} of '{journal.path}' is not of this grid; choose another file with --out"
            )
        known = finished(journal.rows)
        self.skipped = self.finished = len(known)
        self.rows = latest(journal.rows)
        self._answers = [r for r in journal.rows if not r.disturbed]
        self._tries = Counter(r.index for r in journal.rows if not r.is_answer)
        self._again: deque[int] = deque()
        places = range(len(plan.workloads)) if choose is None else choose(self._answers)
        self._places = (i for i in places if i not in known and only(plan.workloads[i]))

    def take(self) -> Job | None:
        """What is to run next; what has to run again comes last."""
        place = next(self._places, None)
        if place is None and self._again:
            place = self._again.popleft()
        return None if place is None else (place, self.plan.workloads[place])

    def put(self, index: int, fields: Mapping[str, Any]) -> Record:
        fields = dict(fields)
        history = fields.pop("history", None)
        if history is not None:  # before its record, after which nobody would run it again
            write(Output(history_path(self.journal.path, index), history, HISTORY))
        record = record_of(index, self.plan.workloads[index], fields)
        self.journal.append(record)
        self.rows[index] = latest([self.rows.get(index, record), record])[index]
        if not record.disturbed:
            self._answers.append(record)
        self._tries[index] += not record.is_answer
        if record.is_answer or self._tries[index] >= MOST_TRIES:
            self.finished += 1
        else:
            self._again.append(index)
        return record

    def counts(self) -> Counter[str]:
        """Rows by what they are; see `Outcome`."""
        rows = self.rows.values()
        found = Counter(r.outcome for r in rows)
        of_it = {"done": found["ok"] + found["oom"], "oom": found["oom"], "crashed": found["crash"]}
        return Counter(of_it | {"disturbed": sum(r.disturbed for r in rows), "skipped": self.skipped})


def _is_of(plan: Plan, row: Record) -> bool:
    return row.index < len(plan.workloads) and row.workload == plan.workloads[row.index]


class _Sweep:
    """Hands out a plan to workers, and keeps each row in the file of the card that it came from.

    Every kind of card runs the whole plan. Cards are of one kind where the facts agree that their numbers depend on.
    """

    def __init__(
        self,
        plan: Plan,
        backend: str,
        out: Path | None,
        budget_s: float | None,
        only: Callable[[Workload], bool],
        choose: Choose | None,
        held: ExitStack,
    ) -> None:
        self.plan, self.backend, self.out, self.budget_s, self.only = plan, backend, out, budget_s, only
        self.choose = choose
        self.started, self.ran = time.monotonic(), 0
        self.files: dict[str, _File | None] = {}
        self._held = held

    def file_of(self, environment: Mapping[str, Any]) -> _File | None:
        """The file that rows of an environment belong to; None for a card that has to be left out."""
        kind = kind_of(environment)
        if kind not in self.files:
            self.files[kind] = self._opened(environment)
        return self.files[kind]

    def take(self, environment: Mapping[str, Any]) -> Job | None:
        """See `sdfit.sweep.workers.Take`."""
        if self.budget_s is not None and time.monotonic() - self.started > self.budget_s:
            return None
        file = self.file_of(environment)
        return file.take() if file else None

    def put(self, environment: Mapping[str, Any], index: int, fields: Mapping[str, Any]) -> Progress:
        """Keep a row."""
        file = self.file_of(environment)
        assert file is not None  # nothing was given to a worker without one
        record = file.put(index, fields)
        self.ran += 1
        total, left = self.outcome(), self._left()
        elapsed = time.monotonic() - self.started
        eta = elapsed / self.ran * left
        return Progress(total.done, total.total, total.oom, total.crashed, left, elapsed, eta, record)

    def outcome(self) -> Outcome:
        """Where it stands, all files together."""
        files = [file for file in self.files.values() if file]
        counts = sum((file.counts() for file in files), Counter())
        total = len(self.plan.workloads) * len(files)
        notes = [note for f in files for note in f.journal.notes]
        paths = tuple(f.journal.path for f in files)
        names = ("done", "oom", "crashed", "disturbed", "skipped")
        return Outcome(
            paths[0],
            total=total,
            complete=not self._left(),
            notes=notes,
            paths=paths,
            **{name: counts[name] for name in names},
        )

    def _left(self) -> int:
        return sum(len(self.plan.workloads) - file.finished for file in self.files.values() if file)

    def _opened(self, environment: Mapping[str, Any]) -> _File | None:
        there = [file.journal.path for file in self.files.values() if file]
        path = self.out or default_path(str(environment["name"]), self.plan, backend=self.backend)
        if path in there:
            left_out(f"it has {environment.get('gpu')} and would write '{path}', where rows of another kind of card go")
            return None
        facts = dict(environment) | {
            "grid": self.plan.name,
            "grid_sha256": self.plan.sha256,
            "seed": self.plan.seed,
            "num_inference_steps": self.plan.num_inference_steps,
        }
        return _File(self.plan, self._held.enter_context(Journal(path, facts, RECORDS)), self.only, self.choose)


def sweep(
    plan: Plan,
    backend: str,
    options: Mapping[str, Any],
    out: Path | None = None,
    *,
    engine: str = "local",
    workers: int | None = None,
    devices: Sequence[str] = (),
    address: str | None = None,
    budget_s: float | None = None,
    limit_s: float = LIMIT_S,
    only: Callable[[Workload], bool] = lambda workload: True,
    histories: Collection[Workload] = (),
    choose: Choose | None = None,
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
        The records file; None: `default_path` of each kind of card.
    engine : {'local', 'ray'}
    workers : int, optional
        None: one per card, or per processor for a trace.
    devices : sequence of str
        Engine ``local``: a worker for each of these cards (see `sdfit.sweep.workers.cards_named`).
    address : str, optional
        Engine ``ray``: the cluster to join.
    budget_s : float, optional
        Start no further workload after this many seconds.
    limit_s : float
        Give a workload up after so many seconds; it is a crash row then, as any other.
    only : callable
        ``only(workload)``: leave out the others this time; they are still part of the plan.
    histories : collection of Workload
        Of these a card also writes its allocator's history down, to `history_path` beside the records.
    choose : callable, optional
        ``choose(records)`` gives the places of the workloads to run, one after the other, as long as more are wanted;
        ``records``, those of one kind of card, grows as they come. None: all, in the plan's order.
    report : callable
        Called after each record.

    Raises
    ------
    DeviceError
        If the card asked for, or the cluster, or a free card or processor in it, is not there.
    RecordsError
        If the file was swept under other conditions, or is being written by another sweep.
    """
    options = dict(options) | {"num_inference_steps": plan.num_inference_steps}
    if backend == "cuda" and histories:
        options["histories"] = [workload.to_dict() for workload in histories]
    pool: RayPool | LocalPool
    if engine == "ray":
        pool = RayPool(backend, options, workers, address, limit_s)
    else:
        most = max(min(workers or default_workers(backend), len(plan.workloads)), 1)
        pool = LocalPool(backend, options, most, devices, limit_s)
    with ExitStack() as held:
        held.callback(pool.close)
        first = pool.environment()
        one = _Sweep(plan, backend, out, budget_s, only, choose, held)
        mine = one.file_of(first)
        if isinstance(pool, LocalPool) and mine is not None:
            pool.at_most(len(plan.workloads) - mine.skipped)
        heard = pool.run_for(one.take)
        held.callback(heard.close)  # while this is still heard, not whenever it is collected
        for environment, index, fields in heard:
            report(one.put(environment, index, fields))
        return one.outcome()
