"""Ray actors that run workloads for a sweep, on any machines of a cluster."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sdfit.backends import open_backend
from sdfit.backends.environment import quiet_libraries
from sdfit.errors import DeviceError, SdfitError, needs
from sdfit.sweep.workers import Job, Result, crashed, run_one
from sdfit.workload import Workload


class RayPool:
    """As `sdfit.sweep.workers.LocalPool`: an actor per card, or per processor for a backend that needs no card.

    Parameters
    ----------
    backend : str
    options : mapping
        For `sdfit.backends.open_backend`.
    workers : int
        How many at once; no more are made than the cluster has cards or processors free.

    Raises
    ------
    DependencyError
        If Ray is not installed.
    DeviceError
        If the cluster has no card, or no processor, free.
    """

    def __init__(self, backend: str, options: Mapping[str, Any], workers: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise needs("ray", "ray") from error
        self.ray, self.backend, self.options = ray, backend, dict(options)
        self._own = not ray.is_initialized()
        if self._own:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
        what, argument = ("GPU", "num_gpus") if backend == "cuda" else ("CPU", "num_cpus")
        free = int(ray.available_resources().get(what, 0))
        if not free:  # an actor would wait for one for ever
            self.close()
            raise DeviceError(
                f"no {what} is free in this Ray cluster; add a machine with one, or type: --engine local", resource=what
            )
        self.workers = min(workers, free)
        self._remote = ray.remote(**{argument: 1}, max_restarts=0)(_Actor)
        self._first: Any = None

    def environment(self) -> dict[str, Any]:
        """Start the first actor and ask it what its numbers depend on."""
        self._first = self._start()
        answer = self.ray.get(self._first.environment.remote())
        if isinstance(answer, SdfitError):
            raise answer
        environment: dict[str, Any] = answer
        return environment

    def run(self, jobs: Iterable[Job]) -> Iterator[Result]:
        """Yield each job's result as it comes."""
        queue = iter(jobs)
        idle = [self._first or self._start(), *(self._start() for _ in range(self.workers - 1))]
        busy: dict[Any, tuple[Any, int]] = {}
        left = next(queue, None)
        try:
            while left is not None or busy:
                while left is not None and idle:
                    actor = idle.pop()
                    busy[actor.measure.remote(left[1].to_dict())] = (actor, left[0])
                    left = next(queue, None)
                for done in self.ray.wait(list(busy), num_returns=1)[0]:
                    actor, index = busy.pop(done)
                    try:
                        fields, tainted = self.ray.get(done)
                    except self.ray.exceptions.RayError as error:
                        fields, tainted = crashed(f"the actor died ({type(error).__name__})"), True
                    if tainted:
                        self.ray.kill(actor)
                        actor = self._start()
                    idle.append(actor)
                    yield index, fields
        finally:
            for actor in [*idle, *(a for a, _ in busy.values())]:
                self.ray.kill(actor)

    def close(self) -> None:
        """Leave the cluster, if this pool joined it."""
        if self._own:
            self.ray.shutdown()

    def _start(self) -> Any:
        return self._remote.remote(self.backend, self.options)


class _Actor:
    """A backend in a Ray actor."""

    def __init__(self, backend: str, options: dict[str, Any]) -> None:
        quiet_libraries()
        self.made: Any
        try:
            self.made = open_backend(backend, options)
        except SdfitError as error:
            self.made = error

    def environment(self) -> Any:
        return self.made if isinstance(self.made, SdfitError) else self.made.environment()

    def measure(self, workload: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        fields = run_one(self.made, Workload.from_dict(workload))
        return fields, self.made.tainted
