"""Ray actors that run workloads for a sweep, on any machines of a cluster.

An actor has a card, or a processor for a trace, and a process to itself. The driver, which is the process that writes the
records, gives an actor one workload at a time. Where a machine is lost, its workload is done again by another actor; where
only the actor's process died, the workload is what killed it, and that is its row.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
import time
import warnings
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sdfit
from sdfit.backends.environment import quiet_libraries
from sdfit.errors import DeviceError, SdfitError, SweepWarning, needs
from sdfit.records import kind_of
from sdfit.sweep.workers import LIMIT_S, Environment, Heard, Job, Result, Take, crashed, left_out, run_one, started
from sdfit.workload import Workload

START_S = 300.0
"""So long a cluster may take to start an actor while no other works; PyTorch from a slow disk takes a minute."""
FREED_S = 5.0
"""So long after an actor's end Ray may count its card as taken."""
MOST_LOSSES = 3
"""Machines that one workload may be lost with before it is a crash row: it might be what takes them down."""
STORE_BYTES = 100 << 20
"""Of a cluster of this machine alone; what is sent is a few KiB."""


@dataclass(eq=False, slots=True)
class _Member:
    """An actor as the driver sees it."""

    actor: Any
    spare: bool  # it stands in for one that is gone, and waits for room if there is none
    environment: dict[str, Any] | None = None  # until it is ready
    node: str | None = None
    job: Job | None = None
    since: float = 0.0  # when it was given its job
    late: bool = False
    doubted: bool = False  # it was out of reach with its job; whether it lives is being asked


class RayPool:
    """As `sdfit.sweep.workers.LocalPool`: an actor per card, or per processor for a backend that needs no card.

    Parameters
    ----------
    backend : str
    options : mapping
        For `sdfit.backends.open_backend`.
    workers : int, optional
        How many at once. None, or more than are free in the cluster: as many as are free.
    address : str, optional
        Of a cluster to join, as ``auto``, ``10.0.0.1:6379`` or ``ray://10.0.0.1:10001``; None: one of this machine.
    limit_s : float
        Give a workload up after so many seconds; it is a crash row then.

    Raises
    ------
    DependencyError
        If Ray is not installed.
    DeviceError
        If the cluster cannot be joined or has no card, or no processor, free.
    """

    def __init__(
        self,
        backend: str,
        options: Mapping[str, Any],
        workers: int | None = None,
        address: str | None = None,
        limit_s: float = LIMIT_S,
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise needs("ray", "ray") from error
        self.ray, self.backend, self.options = ray, backend, dict(options)
        self._started = 0
        self._starting: dict[Any, _Member] = {}  # by the reference to what is waited for
        self._busy: dict[Any, _Member] = {}
        self._idle: list[_Member] = []
        self._refused: list[_Member] = []  # they hold cards that were not asked for until the others have started
        self._again: list[tuple[Environment, Job]] = []
        self._losses: Counter[int] = Counter()
        self.limit_s = limit_s
        self._own = not ray.is_initialized()
        if self._own:
            self._join(address)
        on_card = backend == "cuda" or "cards" in self.options
        self._what = what = "GPU" if on_card else "CPU"
        self._freed = time.monotonic() + FREED_S  # what ended before this pool was made holds nothing any more
        free, total = self._room(workers)
        if not free:  # an actor would wait for one for ever
            self.close()
            held = f"has none of its {total} {what}s free" if total else f"has no {what}"
            raise DeviceError(
                f"this Ray cluster {held}; add a machine with one, or type: --engine local", resource=what
            )
        self._free = free
        self.wanted = free if workers is None else min(workers, free)
        if workers is not None and workers > free:
            warnings.warn(
                f"{free} workers, not {workers}: no more {what}s are free in this Ray cluster",
                SweepWarning,
                stacklevel=2,
            )
        need = {"num_gpus": 1, "num_cpus": 0} if on_card else {"num_cpus": 1}
        self._remote = ray.remote(**need, max_restarts=0)(_Actor)

    def environment(self) -> dict[str, Any]:
        """Start the actors and return what the numbers of the first one that is ready depend on."""
        while len(self._starting) < self.wanted:
            self._start()
        while not self._idle:
            for reference in self._wait():
                self._settle(reference)
        return dict(self._idle[0].environment or {})

    def run(self, jobs: Iterable[Job]) -> Iterator[Result]:
        """Yield each job's result as it comes."""
        queue = iter(jobs)
        for _, index, fields in self.run_for(lambda environment: next(queue, None)):
            yield index, fields

    def run_for(self, take: Take) -> Generator[Heard, None, None]:
        """As `run`, where what is to be done depends on the card that an actor has."""
        while True:
            self._give(take)
            late = self._again or any(not member.spare for member in self._starting.values())
            if not self._busy and not (late and self._starting):
                return
            for reference in self._wait():
                if reference in self._starting:
                    self._settle(reference)
                else:
                    member = self._busy.pop(reference)
                    heard = self._hear(reference, member)
                    if heard is None:
                        continue
                    yield heard
                    if member not in self._idle:  # whether there is more to do is known once that row is kept
                        job = self._redone(heard[0]) or take(heard[0])
                        if job is not None:
                            self._instead(heard[0], job)

    def close(self) -> None:
        """End the actors, and leave the cluster if this pool joined it."""
        for member in (*self._starting.values(), *self._busy.values(), *self._idle, *self._refused):
            self.ray.kill(member.actor)
        if self._own:
            self.ray.shutdown()

    def _join(self, address: str | None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a warning about what it will do one day
        address = address or os.environ.get("RAY_ADDRESS")
        alone: dict[str, Any] = {"address": "local", "include_dashboard": False, "object_store_memory": STORE_BYTES}
        try:
            if address:
                _knock(address)
            where = {"address": address} if address else alone
            if not (address or "").startswith("ray://"):
                where["job_config"] = _job()
            with _signals_kept():
                self.ray.init(log_to_driver=False, logging_level=logging.ERROR, **where)
        except Exception as error:  # Ray raises several kinds, and bare ones where its processes do not start
            why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise DeviceError(
                f"cannot join the Ray cluster '{address}' ({why}); is it up, and has it this machine's Python and Ray?"
                if address
                else f"Ray does not start on this machine ({why}); leave out --engine ray, or join a cluster with --address",
                address=address,
            ) from error

    def _room(self, wanted: int | None) -> tuple[int, int]:
        """How many cards or processors are free, and how many there are."""
        while True:
            total, free = (
                int(resources.get(self._what, 0))
                for resources in (self.ray.cluster_resources(), self.ray.available_resources())
            )
            if free >= min(wanted or total, total) or time.monotonic() > self._freed:
                return free, total
            time.sleep(0.1)

    def _has_another(self) -> bool:
        """Whether there is a card that no actor of this pool has been given, where some were taken when it was made."""
        if self._started >= self._free:
            coming = len(self._starting)  # they may or may not have theirs already
            self._free = max(self._free, self._started + self._room(coming + 1)[0] - coming)
        return self._started < self._free

    def _start(self, spare: bool = False) -> None:
        self._started += not spare
        actor = self._remote.remote(self.backend, self.options)
        self._starting[actor.introduce.remote()] = _Member(actor, spare)

    def _wait(self) -> list[Any]:
        """All that is there, as soon as something is; an actor that is over the limit is ended."""
        waited_for = [*self._starting, *self._busy]
        now = time.monotonic()
        first = min((m.since + self.limit_s for m in self._busy.values()), default=now + START_S)
        timeout = None if math.isinf(first) else max(first - now, 0.01)
        some: list[Any] = self.ray.wait(waited_for, timeout=timeout)[0]
        if not some and not self._busy:
            raise DeviceError(
                f"this Ray cluster started no worker within {START_S:.0f} s; see 'ray status', and run the same command to go on"
            )
        there: list[Any] = self.ray.wait(waited_for, num_returns=len(waited_for), timeout=0)[0]
        done = set(there)
        for reference, member in self._busy.items():
            if reference not in done and time.monotonic() - member.since >= self.limit_s:
                member.since, member.late = math.inf, True
                self.ray.kill(member.actor)  # which is then heard of as any other that died
        return there

    def _settle(self, reference: Any) -> None:
        """An actor is ready, or will not be."""
        member = self._starting.pop(reference)
        try:
            answer, member.node, version = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            answer = SdfitError(f"it did not start ({_last_line(error)}); install this sdfit on every machine")
        else:
            if version != sdfit.__version__:
                answer = SdfitError(f"its machine has sdfit {version}, and this one {sdfit.__version__}")
        if not isinstance(answer, SdfitError):
            member.environment = answer
            self._idle.append(member)
        else:
            self._refused.append(member)
            if not member.spare and self._has_another():
                self._start()
            elif not (self._starting or self._busy or self._idle):
                raise answer
            left_out(str(answer))
        if not self._starting:
            while self._refused:
                self.ray.kill(self._refused.pop().actor)

    def _give(self, take: Take) -> None:
        """Give each idle actor a job, as far as there are any for its kind of card."""
        idle, self._idle = self._idle, []
        for member in idle:
            assert member.environment is not None
            job = self._redone(member.environment) or take(member.environment)
            if job is None:
                self._idle.append(member)  # it may yet do again what another loses
            else:
                member.job, member.since = job, time.monotonic()
                self._busy[member.actor.measure.remote(job[1].to_dict())] = member

    def _redone(self, environment: Environment) -> Job | None:
        """A job of this kind of card that is to be done again."""
        for place, (lost, job) in enumerate(self._again):
            if kind_of(lost) == kind_of(environment):
                del self._again[place]
                return job
        return None

    def _instead(self, environment: Environment, job: Job) -> None:
        """Start an actor in the place of one that is gone, for a job of its kind of card."""
        self._again.append((environment, job))
        self._start(spare=True)

    def _hear(self, reference: Any, member: _Member) -> Heard | None:
        """What came of a job; None if it is to be done again, or if that is not known yet."""
        assert member.job is not None and member.environment is not None
        job = member.job
        lost = member.doubted
        try:
            answer = self.ray.get(reference)
        except self.ray.exceptions.ActorUnavailableError:
            member.doubted = True
            self._busy[member.actor.introduce.remote()] = member  # answered, or refused once its fate is known
            return None
        except self.ray.exceptions.RayError as error:
            lost = not member.late and self._is_lost(member)
            how = (
                f"no answer within {self.limit_s:g} s: the actor was ended"
                if member.late
                else f"the actor died ({type(error).__name__})"
            )
            fields, tainted = crashed(how), True
        else:
            fields, tainted = (crashed("out of reach"), True) if lost else answer
        if lost:
            self._losses[job[0]] += 1
            fields = crashed(f"its machine was lost, {MOST_LOSSES} times")
        if not tainted:
            self._idle.append(member)
            return member.environment, job[0], fields
        self.ray.kill(member.actor)
        if lost and self._losses[job[0]] < MOST_LOSSES:
            self._instead(member.environment, job)
            return None
        return member.environment, job[0], fields

    def _is_lost(self, member: _Member) -> bool:
        """Whether an actor's machine is gone, and not only its process."""
        return not any(node["NodeID"] == member.node and node["Alive"] for node in self.ray.nodes())


def _knock(address: str) -> None:
    """Fail at once where nobody answers: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Take back what Ray makes of SIGTERM: it ends the process in the midst of Ray's C++, with a dump and the rows under way."""
    mine = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # that answer, in the midst of it
        raise KeyboardInterrupt from None
    finally:
        if mine and before is not None:
            signal.signal(signal.SIGTERM, before)


def _job() -> Any:
    """What Ray is told of the job: that its actors import nothing from the current folder, where anybody's ``numpy.py`` may lie."""
    from ray.job_config import JobConfig

    job = JobConfig()
    job._runtime_env_has_working_dir = lambda: (
        True
    )  # asked before that folder goes on their path; nothing else prevents it
    return job


def _last_line(error: BaseException) -> str:
    return [line.strip() for line in str(error).splitlines() if line.strip()][-1]


class _Actor:
    """A backend in a Ray actor."""

    def __init__(self, backend: str, options: dict[str, Any]) -> None:
        quiet_libraries()
        self.made, self.first = started(backend, options)

    def introduce(self) -> tuple[Any, str, str]:
        """What the numbers depend on, or why there are none; on which machine; the version of sdfit."""
        import ray

        return self.first, ray.get_runtime_context().get_node_id(), sdfit.__version__

    def measure(self, workload: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        fields = run_one(self.made, Workload.from_dict(workload))
        return fields, self.made.tainted
