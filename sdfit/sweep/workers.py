"""Local processes that run workloads for a sweep; `sdfit.sweep.ray` has the same on any machines of a cluster.

Jobs go in and results come out as they are there, one job at a time per worker, with a fresh worker where one died or
says that it is tainted. A worker that dies takes down its job, not the sweep.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from sdfit.backends import open_backend
from sdfit.backends.environment import quiet_libraries
from sdfit.errors import DeviceError, SdfitError, SweepWarning
from sdfit.workload import Workload

Job = tuple[int, Workload]
Result = tuple[int, dict[str, Any]]
Environment = Mapping[str, Any]
Take = Callable[[Environment], Job | None]
"""What a worker in that environment is to do next; None: nothing more."""
Heard = tuple[Environment, int, dict[str, Any]]
"""In which environment, which job, and what came of it."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
LIMIT_S = 1800.0
"""So long a workload may take, or a worker to start: what takes longer has stopped. The slowest, bisected, takes minutes."""
SAFE_PATH = "PYTHONSAFEPATH"
"""Keeps Python from importing modules of the current folder, where anybody's ``pickle.py`` may lie."""


def crashed(message: str) -> dict[str, Any]:
    """The fields of a record for a job that ended without a result."""
    return {"outcome": "crash", "message": message}


def run_one(backend: Any, workload: Workload) -> dict[str, Any]:
    """Measure; an exception becomes a crash row."""
    try:
        fields: dict[str, Any] = backend.measure(workload)
        return fields
    except Exception as error:  # any failure of the pipeline is a row, and the sweep goes on
        return crashed(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def left_out(why: str) -> None:
    """Say that a worker takes no part."""
    warnings.warn(f"a worker is left out: {why}", SweepWarning, stacklevel=3)


class LocalPool:
    """Worker processes on this machine.

    Parameters
    ----------
    backend : str
    options : mapping
        For `sdfit.backends.open_backend`.
    workers : int
        How many at once; one per card.
    devices : sequence of str
        Cards as CUDA counts them: each worker sees one of them and no other. Empty: each sees what this process sees.
    limit_s : float
        A workload that takes longer is given up: its worker is killed, and it is a crash row.
    """

    def __init__(
        self,
        backend: str,
        options: Mapping[str, Any],
        workers: int,
        devices: Sequence[str] = (),
        limit_s: float = LIMIT_S,
    ) -> None:
        self.backend, self.options, self.limit_s = backend, dict(options), limit_s
        self.devices: list[str | None] = [*devices] or [None] * workers
        self._differ = bool(devices) or backend == "cuda"  # what one worker has no job for, another may
        self._context = multiprocessing.get_context("spawn")
        self._live: list[_Worker] = []

    def environment(self) -> dict[str, Any]:
        """Start the first worker and ask it what its numbers depend on."""
        worker = self._start(self.devices[0])
        self._heard_from()
        answer = worker.receive()
        if isinstance(answer, SdfitError):
            raise answer
        worker.environment = answer
        return dict(answer)

    def at_most(self, jobs: int) -> None:
        """Start no more workers than there are jobs or, without a card, processors; cards may be of several kinds."""
        if not self._differ:
            del self.devices[max(min(jobs, os.cpu_count() or 1), 1) :]

    def run(self, jobs: Iterable[Job]) -> Iterator[Result]:
        """Yield each job's result as it comes; stopping early ends the workers."""
        queue = iter(jobs)
        for _, index, fields in self.run_for(lambda environment: next(queue, None)):
            yield index, fields

    def run_for(self, take: Take) -> Iterator[Heard]:
        """As `run`, where what is to be done depends on the card that a worker has."""
        if not self._live:
            self.environment()
        try:
            for device in self.devices[len(self._live) :]:
                self._start(device)
            while self._live:
                for worker in list(self._live):
                    if worker.environment is not None and worker.job is None:
                        job = worker.first or take(worker.environment)
                        if job is None:
                            self._drop([worker, *([] if self._differ else self._unneeded())])
                        else:
                            worker.give(job)
                for connection in self._heard_from():
                    heard = self._hear(next(w for w in self._live if w.connection is connection), take)
                    if heard is not None:
                        yield heard
        finally:
            self.close()

    def _heard_from(self) -> list[Any]:
        """Wait until a worker says something or ends; one that takes too long is made to."""
        if not self._live:
            return []
        now = time.monotonic()
        for worker in self._live:
            if now - worker.since >= self.limit_s:
                worker.late = self.limit_s
                worker.process.kill()  # even one that was stopped; its pipe then closes
        first = min((w.since for w in self._live if w.late is None), default=now)
        return wait([w.connection for w in self._live], max(first + self.limit_s - now, 0.01))

    def close(self) -> None:
        """End all workers."""
        self._drop(list(self._live))

    def _start(self, device: str | None, first: Job | None = None) -> _Worker:
        worker = _Worker(self._context, self.backend, self.options, device, first)
        self._live.append(worker)
        return worker

    def _unneeded(self) -> list[_Worker]:
        """Those that are still starting, with no job waiting for them."""
        return [w for w in self._live if w.environment is None and w.first is None]

    def _drop(self, workers: list[_Worker]) -> None:
        for worker in workers:
            worker.end()
            self._live.remove(worker)

    def _hear(self, worker: _Worker, take: Take) -> Heard | None:
        answer = worker.receive()
        if worker.environment is None:
            if isinstance(answer, DeviceError) and worker.first is None:
                left_out(str(answer))
                self._drop([worker])
                return None
            if isinstance(answer, SdfitError):
                raise answer
            worker.environment = answer
            return None
        assert worker.job is not None
        index, worker.job = worker.job[0], None
        if isinstance(answer, SdfitError):
            fields, tainted = crashed(str(answer)), True
        else:
            fields, tainted = answer
        if tainted:
            self._drop([worker])
            job = take(worker.environment)
            if job is not None:
                self._start(worker.device, job)
        return worker.environment, index, fields


class _Worker:
    """One process and the pipe to it."""

    def __init__(
        self, context: Any, backend: str, options: dict[str, Any], device: str | None, first: Job | None
    ) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, backend, options, device), daemon=True)
        before = os.environ.get(SAFE_PATH)
        os.environ[SAFE_PATH] = "1"
        try:
            self.process.start()
        finally:
            os.environ.pop(SAFE_PATH) if before is None else os.environ.update({SAFE_PATH: before})
        theirs.close()
        self.late: float | None = None
        self.since = time.monotonic()  # it is waited for; late: how long, if that was too long
        self.device, self.first = device, first
        self.environment: dict[str, Any] | None = None  # until it is ready
        self.job: Job | None = None

    def give(self, job: Job) -> None:
        self.job, self.first, self.since = job, None, time.monotonic()
        with suppress(OSError):  # it died while it was idle: `receive` finds out, and the job is a crash row
            self.connection.send(job[1].to_dict())

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            if self.late is not None:
                return SdfitError(f"no answer within {self.late:g} s: the worker process was ended", worker_died=True)
            code = self.process.exitcode
            how = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
            return SdfitError(f"the worker process died ({how})", worker_died=True)

    def end(self) -> None:
        self.connection.close()
        if self.job is not None:
            self.process.terminate()
        self.process.join(0.1 if self.late is not None else 2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(connection: Connection, backend: str, options: dict[str, Any], device: str | None) -> None:
    """A worker's life: say the environment, then answer workloads until the pipe closes."""
    if device is not None:
        os.environ[VISIBLE] = device  # CUDA reads it when it is first used
    for name in ("SIGINT", "SIGHUP"):  # Ctrl-C and a terminal that closes are the parent's to handle
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    quiet_libraries()
    try:
        first: Any
        try:
            made = open_backend(backend, options)
            first = made.environment()
        except SdfitError as error:
            first = error
        connection.send(first)
    except OSError:  # the parent needs no further worker
        return
    if isinstance(first, SdfitError):
        return
    while True:
        try:
            workload = Workload.from_dict(connection.recv())
        except (EOFError, OSError):
            return
        fields = run_one(made, workload)
        try:
            connection.send((fields, made.tainted))
        except OSError:
            return
        if made.tainted:
            return


def _end_with(parent: Any) -> None:
    """A worker that is in the middle of a workload must not hold the card when nobody hears it any more."""
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def default_workers(backend: str) -> int:
    """One worker per card, or per processor for a trace."""
    if backend == "trace":
        return os.cpu_count() or 1
    if backend == "cuda":
        import torch

        return max(int(torch.cuda.device_count()), 1)
    return 1


def cards_named(text: str, count: int) -> list[str]:
    """Read a list of cards, as ``0,1`` or by their UUIDs, counted as CUDA_VISIBLE_DEVICES lets this process see them.

    Parameters
    ----------
    text : str
    count : int
        How many cards there are.

    Raises
    ------
    DeviceError
        If one is named twice or is not there.

    Examples
    --------
    >>> cards_named("0, 2", 4)
    ['0', '2']
    """
    seen = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    names = [name.strip() for name in text.split(",")]
    found = []
    for name in names:
        there = int(name) < count if name.isdecimal() else name.startswith(("GPU-", "MIG-"))
        if not there or names.count(name) > 1:
            raise DeviceError(
                f"the cards asked for are '{text}', and there are {count}; name each once, counted from 0, as in "
                f"{','.join(str(i) for i in range(max(count, 1)))}",
                given=text,
            )
        found.append(seen[int(name)] if seen and name.isdecimal() else name)
    return found
