"""What the engines of a sweep cost, measured here: the time of a row beside its run, scaling, and what a lost machine costs.

The made-up card takes a set time and no processor, as a run on a card does for the driver; the trace takes a processor.
"""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdfit.backends.fake import FakeBackend
from sdfit.files import fingerprint
from sdfit.records import RECORDS
from sdfit.sweep import grid
from sdfit.sweep.grid import Plan
from sdfit.sweep.journal import Journal
from sdfit.sweep.run import Outcome, Progress, record_of, sweep
from sdfit.units import aligned
from sdfit.workload import Workload

DELAY_S = 0.2
ROWS, MANY = 2000, 1000
STORE = {"object_store_memory": 100 << 20}


def scaling(take: int, engines: Sequence[str] = ("local", "ray"), workers: Sequence[int] = (1, 2)) -> str:
    """Sweep made-up cards with each engine and number of workers; a row each.

    Parameters
    ----------
    take : int
        Runs of each sweep.
    """
    lines = [("made-up cards", "workers", "first row [s]", "rows/s", "beside the run [ms]", "processors wanted")]
    for engine in engines:
        for count in workers:
            found = _timed(_made_up(take), "fake", {"delay_s": DELAY_S}, engine, count)
            beside = f"{1000 * (count / found.pace - DELAY_S):.1f}"
            lines.append((engine, str(count), f"{found.before_s:.1f}", f"{found.pace:.2f}", beside, found.load))
    return aligned(lines, left=1)


def tracing(take: int, engines: Sequence[str] = ("local", "ray"), workers: Sequence[int] = (1, 2)) -> str:
    """Trace with each engine and number of workers, reserved and required memory too; a row each.

    Parameters
    ----------
    take : int
        Runs of each sweep: plain ones of the default grid, one pipeline. Those before half of them only count to the
        time until then, in which each worker builds its pipeline and finds what repeats.
    """
    plan = grid.load("default").for_the_trace()
    usual = Workload(512, 512).variant
    plan = replace(plan, workloads=tuple(w for w in plan.workloads if w.variant == usual)[:take])
    half = len(plan.workloads) // 2
    options = {"gpu": "t4", "workspaces": True}
    lines = [
        ("trace", "workers", f"{half} rows [s]", "rows/s from there", "times one worker", "processor time a row",
         "processors they had", "processors wanted")
    ]  # fmt: skip
    for engine in engines:
        alone = 0.0
        for count in workers:
            found = _timed(plan, "trace", options, engine, count, half)
            alone = alone or found.pace
            busy = f"{found.processor_s * found.pace:.2f}"
            lines.append(
                (engine, str(count), f"{found.before_s:.1f}", f"{found.pace:.2f}", f"{found.pace / alone:.2f}",
                 f"{1000 * found.processor_s:.0f} ms", busy, found.load)
            )  # fmt: skip
    return aligned(lines, left=1)


def driver() -> str:
    """What the process that writes the records spends and holds for each row."""
    import ray

    card, plan = FakeBackend(), _made_up(ROWS)
    results = [pickle.dumps(card.measure(w)) for w in plan.workloads]  # as they come from a worker
    with tempfile.TemporaryDirectory() as folder:
        with Journal(Path(folder, "r.jsonl"), card.environment(), RECORDS) as journal:
            started = time.perf_counter()
            records = [
                record_of(i, w, pickle.loads(r)) for i, (w, r) in enumerate(zip(plan.workloads, results, strict=True))
            ]
            made = time.perf_counter() - started
            tracemalloc.start()
            held = [record_of(0, plan.workloads[0], pickle.loads(results[0])) for _ in range(ROWS)]
            held_bytes = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
            del held
            started = time.perf_counter()
            for record in records:
                journal.append(record)
            written = time.perf_counter() - started
        size = Path(folder, "r.jsonl").stat().st_size
    own = not ray.is_initialized()
    if own:
        ray.init(
            address="local",
            num_cpus=1,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False,
            **STORE,
        )
    never = ray.remote(num_cpus=0, resources={"none": 1})(_nothing)
    soon = ray.remote(num_cpus=0)(_nothing)
    waiting = [never.remote() for _ in range(MANY)]
    there = [soon.remote() for _ in range(20)]
    ray.wait(there, num_returns=len(there))
    started = time.perf_counter()
    for reference in there:
        ray.wait([*waiting, reference], num_returns=1)
        ray.wait([*waiting, reference], num_returns=MANY + 1, timeout=0)
        ray.get(reference)
    waited = (time.perf_counter() - started) / len(there)
    if own:
        ray.shutdown()
    return aligned(
        [
            ("of the driver, for each row", "", ""),
            ("taken out of its message and checked", f"{1e6 * made / ROWS:.0f} us", ""),
            ("written and on the disk", f"{1e6 * written / ROWS:.0f} us", f"{size / ROWS:.0f} B"),
            ("held in memory", "", f"{held_bytes / ROWS:.0f} B"),
            (f"Ray asked which of {MANY} is done, and for its answer", f"{1e6 * waited:.0f} us", ""),
        ]
    )


def lost_machine(take: int) -> str:
    """Kill a machine of a cluster of three processes with workloads on it, and say what became of the rows."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **STORE})
    machine = cluster.add_node(num_cpus=2, **STORE)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    killed: list[float] = []
    times: list[float] = []

    def report(progress: Progress) -> None:
        times.append(time.monotonic())
        if progress.done == take // 3:
            cluster.remove_node(machine, allow_graceful=False)
            killed.append(time.monotonic())

    try:
        with tempfile.TemporaryDirectory() as folder:
            done = sweep(
                _made_up(take), "fake", {"delay_s": DELAY_S}, Path(folder, "r.jsonl"), engine="ray", report=report
            )
    finally:
        ray.shutdown()
        cluster.shutdown()
    return (
        f"{done.done} of {done.total} rows, {done.crashed} crashed; a machine with 2 of 3 workers was killed after row "
        f"{take // 3}; the last row came {times[-1] - killed[0]:.1f} s later, at {DELAY_S} s a run"
    )


def _made_up(count: int) -> Plan:
    workloads = tuple(Workload(256 + 8 * (i % 200), 256 + 8 * (i // 200)) for i in range(count))
    return Plan("engines", "", 0, 2, workloads, fingerprint([w.to_dict() for w in workloads]), ())


@dataclass(frozen=True, slots=True)
class Timed:
    """What a sweep took.

    Parameters
    ----------
    before_s : float
        Until so many rows were there [s].
    pace : float
        Rows a second from then on.
    processor_s : float
        What the workers took of the processors for each of those rows [s]; not a number where there is no /proc.
    load : str
        How many processors this machine's programs wanted in the last minute, of how many.
    """

    before_s: float
    pace: float
    processor_s: float
    load: str


def _timed(plan: Plan, backend: str, options: dict[str, Any], engine: str, workers: int, since: int = 1) -> Timed:
    """Sweep, and count from so many rows on."""
    times: list[float] = []
    taken: list[float] = []
    started = time.monotonic()

    def report(_: Progress) -> None:
        times.append(time.monotonic())
        if len(times) in (since, len(plan.workloads)):
            taken.append(_processor_s())

    with tempfile.TemporaryDirectory() as folder:
        outcome: Outcome = sweep(
            plan, backend, options, Path(folder, "r.jsonl"), engine=engine, workers=workers, report=report
        )
    assert len(times) == outcome.done == len(plan.workloads)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    rows = len(times) - since
    return Timed(
        times[since - 1] - started,
        rows / (times[-1] - times[since - 1]),
        (taken[-1] - taken[0]) / rows,
        f"{load:.1f} of {os.cpu_count()}",
    )


def _processor_s() -> float:
    """What the processes that this one started, and those that they started, have taken of the processors so far [s]."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            fields = path.read_text().rpartition(")")[2].split()
            parents[int(path.parent.name)], ticks[int(path.parent.name)] = int(fields[1]), sum(map(int, fields[11:13]))
    if not parents:
        return float("nan")
    mine = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    return sum(ticks[pid] for pid in mine - {os.getpid()}) / os.sysconf("SC_CLK_TCK")


def _nothing() -> int:
    return 0
