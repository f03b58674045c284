"""What a run requires, by simulation and replay, for `sdfit.predict.replayed`: numpy and the standard library are all it takes."""

from __future__ import annotations

from collections.abc import Callable

from sdfit.predict.simulation.library import NotSimulated
from sdfit.predict.simulation.replay import smallest_cap, without
from sdfit.predict.simulation.simulate import Simulator
from sdfit.predict.simulation.workspaces import workspaces_for
from sdfit.workload import Workload


class Needed:
    """``needed(workload, metric) -> bytes``: simulates a run and replays it through the allocator.

    Parameters
    ----------
    kernels : str
        Whose workspaces the kernels take: an architecture such as ``sm75``, or a card.
    otherwise : callable, optional
        Asked in the same way for a run that is not covered (see `sdfit.predict.simulation.simulate`); None: `NotSimulated` is raised.

    Examples
    --------
    >>> Needed("sm75")(Workload(512, 512), "required")
    3445620736
    """

    def __init__(self, kernels: str, otherwise: Callable[[Workload, str], int] | None = None) -> None:
        self.kernels, self.otherwise = kernels, otherwise
        self._simulator = Simulator(workspaces_for(kernels))

    def __reduce__(self) -> tuple[type[Needed], tuple[str, Callable[[Workload, str], int] | None]]:
        return (Needed, (self.kernels, self.otherwise))

    def __call__(self, workload: Workload, metric: str) -> int:
        """The smallest cap under which the run succeeds; ``minimum``: if no kernel takes a workspace."""
        try:
            simulated = self._simulator.run(workload, keep_events=True)
        except NotSimulated:
            if self.otherwise is None:
                raise
            return self.otherwise(workload, metric)
        assert simulated.events is not None
        events = simulated.events if metric == "required" else without(simulated.events, simulated.workspaces)
        return smallest_cap(events)
