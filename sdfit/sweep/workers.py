"""Local processes that run workloads for a sweep; `sdfit.sweep.ray` has the same on any machines of a cluster.

Jobs go in and results come out as they are there, one job at a time per worker, with a fresh worker where one died or
says that it is tainted. A worker that dies takes down its job, not the sweep; a card that is gone is asked for again a few
times, and its job then goes to another card of its kind.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from sdfit.backends import open_backend
from sdfit.backends.environment import NO_CARD, libraries_loaded, quiet_libraries
from sdfit.errors import DeviceError, SdfitError, SweepWarning
from sdfit.records import kind_of
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
PAUSES_S = (0.0, 2.0, 20.0)
"""Before each try to start a worker in the place of another: a driver that lost its card may have it back by then."""
PARENTS = [getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)]
"""Ctrl-C and a terminal that closes: they reach every process, and are the sweep's own to handle."""
MASKS = hasattr(signal, "pthread_sigmask")
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
        return crashed(_in_short(error))


def _in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def started(backend: str, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any] | SdfitError]:
    """Make a backend and ask it what its numbers depend on; or why it cannot be made, whatever that is."""
    try:
        with libraries_loaded(compiles=backend == "cuda"):
            made = open_backend(backend, options)
        return made, made.environment()
    except SdfitError as error:
        return None, error
    except Exception as error:  # a driver that is not well says so in many ways
        return None, SdfitError(f"the backend '{backend}' does not start ({_in_short(error)})")


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
        self._returned: list[tuple[Environment, Job]] = []  # of workers whose card is gone

    def environment(self) -> dict[str, Any]:
        """Start the first worker, or all where they are alike, and ask the one that is ready first what its numbers depend on."""
        if not self._differ:
            self.at_most(len(self.devices))
        for device in self.devices[: 1 if self._differ else None]:
            self._start(device)
        while not (ready := self._heard_from()):
            pass
        worker = next(w for w in self._live if w.connection in ready)
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

    def run_for(self, take: Take) -> Generator[Heard, None, None]:
        """As `run`, where what is to be done depends on the card that a worker has."""
        if not self._live:
            self.environment()
        try:
            for device in self.devices[len(self._live) :]:
                self._start(device)
            while True:
                for worker in self._live:
                    if worker.idle:
                        job = worker.first[1] if worker.first else self._next(worker.environment or {}, take)
                        if job is not None:
                            worker.give(job)
                if not any(self._expected(worker) for worker in self._live):
                    return  # until then one with nothing to do stays: another may yet lose its card, and give its job back
                for connection in self._heard_from():
                    worker = next(w for w in self._live if w.connection is connection)
                    heard = self._hear(worker)
                    if heard is None:
                        continue
                    yield heard
                    if worker not in self._live:  # whether there is more to do is known once that row is kept
                        job = self._next(heard[0], take)
                        if job is not None:
                            self._start(worker.device, (heard[0], job))
        finally:
            self.close()

    def _heard_from(self) -> list[Any]:
        """Wait until a worker says something or ends; one that takes too long is made to."""
        now = time.monotonic()
        waited_for = [w for w in self._live if not w.idle]
        for worker in waited_for:
            if now - worker.since >= self.limit_s:
                worker.late = self.limit_s
                worker.process.kill()  # even one that was stopped; its pipe then closes
        first = min((w.since for w in waited_for if w.late is None), default=now)
        return wait([w.connection for w in waited_for], max(first + self.limit_s - now, 0.01))

    def close(self) -> None:
        """End all workers."""
        self._drop(list(self._live))

    def _start(self, device: str | None, first: tuple[Environment, Job] | None = None, tries: int = 0) -> _Worker:
        worker = _Worker(self._context, self.backend, self.options, device, first, tries)
        self._live.append(worker)
        return worker

    def _next(self, environment: Environment, take: Take) -> Job | None:
        """A job that a worker gave back, or else a new one."""
        for place, (theirs, job) in enumerate(self._returned):
            if kind_of(theirs) == kind_of(environment):
                del self._returned[place]
                return job
        return take(environment)

    def _expected(self, worker: _Worker) -> bool:
        """Whether a worker will still say something: it works, or starts for a job or as a card that may be of its own kind."""
        return worker.job is not None or (worker.environment is None and (self._differ or worker.first is not None))

    def _drop(self, workers: list[_Worker]) -> None:
        for worker in workers:
            worker.end()
            self._live.remove(worker)

    def _hear(self, worker: _Worker) -> Heard | None:
        """What came of a worker's job, if it had one; it is not live any more if another has to take its place."""
        answer = worker.receive()
        if worker.environment is None:
            if isinstance(answer, SdfitError):
                self._drop([worker])
                self._not_started(worker, answer)
                return None
            worker.environment = answer
            if worker.first and kind_of(answer) != kind_of(worker.first[0]):
                self._returned.append(worker.first)  # it found another card than the one it stands in for
                worker.first = None
            return None
        assert worker.job is not None
        index, worker.job = worker.job[0], None
        fields, tainted = (crashed(str(answer)), True) if isinstance(answer, SdfitError) else answer
        if tainted:
            self._drop([worker])
        return worker.environment, index, fields

    def _not_started(self, worker: _Worker, why: SdfitError) -> None:
        """Try again where it stands in for another; in the end go on without it, if others are there."""
        if worker.first is not None:
            if worker.tries + 1 < len(PAUSES_S):
                self._start(worker.device, worker.first, worker.tries + 1)
                return
            self._returned.append(worker.first)
        if self._returned and not self._live:
            raise DeviceError(
                f"no worker starts any more: {why}; what was recorded is kept, run the same command to go on"
            )
        left_out(str(why))


class _Worker:
    """One process and the pipe to it."""

    def __init__(
        self,
        context: Any,
        backend: str,
        options: dict[str, Any],
        device: str | None,
        first: tuple[Environment, Job] | None,
        tries: int,
    ) -> None:
        self.connection, theirs = context.Pipe()
        pause_s = PAUSES_S[tries]
        arguments = (theirs, backend, options, device, pause_s)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        with _shielded():
            self.process.start()
        theirs.close()
        self.late: float | None = None
        self.since = time.monotonic() + pause_s  # it is waited for; late: how long, if that was too long
        self.device, self.first, self.tries = device, first, tries  # first: what it stands in for, and its job
        self.environment: dict[str, Any] | None = None  # until it is ready
        self.job: Job | None = None

    @property
    def idle(self) -> bool:
        """Whether it is ready and has no job."""
        return self.environment is not None and self.job is None

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
        if self.job is not None or self.environment is None:  # which it would first have to find
            self.process.terminate()
        self.process.join(0.1 if self.late is not None else 2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


@contextmanager
def _shielded() -> Iterator[None]:
    """Start a process that imports nothing from the current folder and never hears a signal of `PARENTS`, not even while it imports."""
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    mask: set[int] | None = None
    try:
        if MASKS:
            resource_tracker.ensure_running()  # which would unblock them in the midst of it
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS)
        yield
    finally:
        os.environ.pop(SAFE_PATH) if before is None else os.environ.update({SAFE_PATH: before})
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _serve(connection: Connection, backend: str, options: dict[str, Any], device: str | None, pause_s: float) -> None:
    """A worker's life: say the environment, then answer workloads until the pipe closes."""
    if device is not None:
        os.environ[VISIBLE] = device  # CUDA reads it when it is first used
    for number in PARENTS:
        signal.signal(number, signal.SIG_IGN)
    if MASKS:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENTS)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    quiet_libraries()
    time.sleep(pause_s)
    made, first = started(backend, options)
    try:
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
    return max(cards_here(backend), 1)


def cards_here(backend: str) -> int:
    """How many cards this process sees; a made-up one is always there."""
    if backend != "cuda":
        return 1
    import torch

    return int(torch.cuda.device_count())


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
        If there is no card, or one is named twice or is not there.

    Examples
    --------
    >>> cards_named("0, 2", 4)
    ['0', '2']
    """
    if not count:
        raise DeviceError(NO_CARD, given=text)
    seen = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    names = [name.strip() for name in text.split(",")]
    found = []
    for name in names:
        there = int(name) < count if name.isdecimal() else name.startswith(("GPU-", "MIG-"))
        if not there or names.count(name) > 1:
            raise DeviceError(
                f"the cards asked for are '{text}', and there are {count}; name each once, counted from 0, as in "
                f"{','.join(str(i) for i in range(count))}",
                given=text,
            )
        found.append(seen[int(name)] if seen and name.isdecimal() else name)
    return found
