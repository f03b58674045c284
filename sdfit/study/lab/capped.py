"""A card as a smaller one: does what the model says fits run, and does what it says does not fit fail?

The process is capped to 6, 8, 12, 16 and 24 GiB. For several aspect ratios and batches the largest size that the model
lets through must run, and the next size that it expects to need more than the cap must not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from sdfit.errors import SdfitError
from sdfit.files import fingerprint
from sdfit.predict.advise import NothingFits, largest, sizes_of_aspect
from sdfit.predict.predictor import Predictor
from sdfit.predict.verdict import SAFE_LEVEL, best_metric
from sdfit.records import RECORDS, Record, read
from sdfit.sweep.journal import Journal
from sdfit.sweep.run import finished, record_of
from sdfit.sweep.workers import LocalPool
from sdfit.units import GIB
from sdfit.workload import Workload

CAPS_BYTES = tuple(n * GIB for n in (6, 8, 12, 16, 24))
SHAPES: tuple[tuple[tuple[int, int], int], ...] = (((1, 1), 1), ((3, 2), 1), ((9, 16), 2), ((4, 3), 4))
"""Aspect ratios, width to height, and batches."""
STEP = 64


@dataclass(frozen=True, slots=True)
class Try:
    """Under a cap [bytes], one workload that must run and one that must fail."""

    cap_bytes: int
    must_run: Workload
    must_fail: Workload


def tries(
    predictor: Predictor,
    caps_bytes: Sequence[int] = CAPS_BYTES,
    shapes: Sequence[tuple[tuple[int, int], int]] = SHAPES,
) -> list[Try]:
    """Ask the model for its borders.

    Parameters
    ----------
    predictor : Predictor
    caps_bytes : sequence of int
    shapes : sequence of ((int, int), int)
        Aspect ratio, and images per call.

    Returns
    -------
    list of Try
        A combination of which not even the smallest size fits is left out.
    """
    metric = best_metric(predictor)
    found = []
    for cap, (aspect, batch) in itertools.product(caps_bytes, shapes):
        try:
            height, width = largest(
                predictor, memory=cap, aspect=aspect, step=STEP, metric=metric, level=SAFE_LEVEL, batch_size=batch
            )
        except NothingFits:
            continue
        runs = Workload(height, width, batch_size=batch)
        fails = runs
        for size in sizes_of_aspect(aspect, STEP):
            if min(size) > min(height, width):
                fails = Workload(*size, batch_size=batch)
                if predictor.predict_workload(fails, metric=metric) > cap:
                    break
        found.append(Try(cap, runs, fails))
    return found


def jobs_of(planned: Sequence[Try]) -> dict[int, list[tuple[int, Workload]]]:
    """Number the runs, by cap: even ones must run, odd ones must fail.

    Under each cap the failing ones come last, since each of them costs its process.
    """
    jobs: dict[int, list[tuple[int, Workload]]] = {}
    for parity in (0, 1):
        for i, one in enumerate(planned):
            jobs.setdefault(one.cap_bytes, []).append((2 * i + parity, one.must_fail if parity else one.must_run))
    return jobs


def run(
    planned: Sequence[Try],
    backend: str,
    options: Mapping[str, Any],
    folder: Path,
    in_time: Callable[[], bool] = lambda: True,
) -> Path:
    """Run what is planned, skipping what the folder's file of this plan holds; returns that file."""
    digest = fingerprint([[t.cap_bytes, t.must_run.to_dict(), t.must_fail.to_dict()] for t in planned])
    known = sorted(folder.glob(f"*-capped-{digest[:8]}.jsonl"))
    path = known[-1] if known else folder / f"{date.today().isoformat()}-capped-{digest[:8]}.jsonl"
    done = set(finished(read(path).records)) if path.exists() else set()
    for cap, jobs in jobs_of(planned).items():
        left = [(i, w) for i, w in jobs if i not in done]
        if left and in_time():
            _run_cap(path, digest, cap, left, backend, options, in_time)
    return path


def _run_cap(
    path: Path,
    digest: str,
    cap: int,
    left: list[tuple[int, Workload]],
    backend: str,
    options: Mapping[str, Any],
    in_time: Callable[[], bool],
) -> None:
    pool = LocalPool(backend, dict(options) | {"capacity_bytes": cap}, 1)
    try:
        environment = pool.environment() | {
            "grid": "capped",
            "grid_sha256": digest,
            "capacity_bytes": "cap_bytes of each row",
        }
        if environment["backend"] == "fake":
            environment["total_memory_bytes"] = None  # a made-up card is as large as its cap

        def jobs() -> Iterator[tuple[int, Workload]]:
            for job in left:
                if not in_time():
                    return
                yield job

        with Journal(path, environment, RECORDS) as journal:
            for index, fields in pool.run(jobs()):
                journal.append(record_of(index, dict(left)[index], fields | {"cap_bytes": cap}))
    finally:
        pool.close()


def verdict(planned: Sequence[Try], records: Sequence[Record]) -> list[tuple[Try, str, str]]:
    """What came of each try: the outcomes of the run that must run and of the one that must fail; ``-`` if not run.

    Raises
    ------
    SdfitError
        If the records are not of these tries.
    """
    by_index = {r.index: r for r in records}
    out = []
    for i, one in enumerate(planned):
        pair = []
        for index, workload in ((2 * i, one.must_run), (2 * i + 1, one.must_fail)):
            record = by_index.get(index)
            if record is not None and record.workload != workload:
                raise SdfitError(f"row {index} is not of these tries; run them again")
            pair.append(record.outcome if record else "-")
        out.append((one, pair[0], pair[1]))
    return out
