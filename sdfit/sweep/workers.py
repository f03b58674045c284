"""Local processes that run workloads for a sweep; `sdfit.sweep.ray` has the same on any machines of a cluster.

Jobs go in and results come out as they are there, one job at a time per worker, with a fresh worker where one died or
says that it is tainted. A worker that dies takes down its job, not the sweep.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from sdfit.backends import open_backend
from sdfit.backends.environment import quiet_libraries
from sdfit.errors import SdfitError
from sdfit.workload import Workload

Job = tuple[int, Workload]
Result = tuple[int, dict[str, Any]]


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


class LocalPool:
    """Worker processes on this machine.

    Parameters
    ----------
    backend : str
    options : mapping
        For `sdfit.backends.open_backend`.
    workers : int
        How many at once; one per card.
    """

    def __init__(self, backend: str, options: Mapping[str, Any], workers: int) -> None:
        self.backend, self.options, self.workers = backend, dict(options), workers
        self._context = multiprocessing.get_context("spawn")
        self._live: list[_Worker] = []

    def environment(self) -> dict[str, Any]:
        """Start the first worker and ask it what its numbers depend on."""
        worker = self._start()
        answer = worker.receive()
        if isinstance(answer, SdfitError):
            raise answer
        worker.ready = True
        environment: dict[str, Any] = answer
        return environment

    def run(self, jobs: Iterable[Job]) -> Iterator[Result]:
        """Yield each job's result as it comes; stopping early ends the workers."""
        queue = iter(jobs)
        try:
            left = next(queue, None)
            while left is not None or any(w.job for w in self._live):
                while left is not None and len(self._live) < self.workers:
                    self._start()
                for worker in self._live:
                    if left is not None and worker.ready and worker.job is None:
                        worker.give(left)
                        left = next(queue, None)
                if left is None:
                    self._drop([w for w in self._live if w.job is None])
                if not self._live:
                    continue
                for connection in wait([w.connection for w in self._live]):
                    worker = next(w for w in self._live if w.connection is connection)
                    result = self._hear(worker)
                    if result is not None:
                        yield result
        finally:
            self.close()

    def close(self) -> None:
        """End all workers."""
        self._drop(list(self._live))

    def _start(self) -> _Worker:
        worker = _Worker(self._context, self.backend, self.options)
        self._live.append(worker)
        return worker

    def _drop(self, workers: list[_Worker]) -> None:
        for worker in workers:
            worker.end()
            self._live.remove(worker)

    def _hear(self, worker: _Worker) -> Result | None:
        answer = worker.receive()
        if isinstance(answer, SdfitError):
            if worker.job is None or not answer.facts.get("worker_died"):
                raise answer
            index = worker.job[0]
            self._drop([worker])
            return index, crashed(str(answer))
        if not worker.ready:
            worker.ready = True  # its environment; the first worker's was taken for all
            return None
        fields, tainted = answer
        assert worker.job is not None
        index, worker.job = worker.job[0], None
        if tainted:
            self._drop([worker])
        return index, fields


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, context: Any, backend: str, options: dict[str, Any]) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, backend, options), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False
        self.job: Job | None = None

    def give(self, job: Job) -> None:
        self.job = job
        with suppress(OSError):  # it died while it was idle: `receive` finds out, and the job is a crash row
            self.connection.send(job[1].to_dict())

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode
            how = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
            return SdfitError(f"the worker process died ({how})", worker_died=True)

    def end(self) -> None:
        self.connection.close()
        if self.job is not None:
            self.process.terminate()
        self.process.join(2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(connection: Connection, backend: str, options: dict[str, Any]) -> None:
    """A worker's life: say the environment, then answer workloads until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
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
