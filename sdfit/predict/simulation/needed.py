"""What a run requires, by simulation and replay, for `sdfit.predict.replayed`: numpy and the standard library are all it takes."""

from __future__ import annotations

from sdfit.predict.simulation.replay import smallest_cap, without
from sdfit.predict.simulation.simulate import Simulator, uncollected
from sdfit.predict.simulation.workspaces import workspaces_for
from sdfit.workload import Workload


class Needed:
    """``needed(workload, metric) -> bytes``: simulates a run and replays it through the allocator.

    Parameters
    ----------
    kernels : str
        Whose workspaces the kernels take: an architecture such as ``sm75``, or a card.

    Raises
    ------
    NotSimulated
        When called, for a run that is not covered (see `sdfit.predict.simulation.simulate`).

    Examples
    --------
    >>> Needed("sm75")(Workload(512, 512), "required")
    3523215360
    """

    def __init__(self, kernels: str) -> None:
        self.kernels = kernels
        self._simulator = Simulator(workspaces_for(kernels))

    def __reduce__(self) -> tuple[type[Needed], tuple[str]]:
        return (Needed, (self.kernels,))

    def __call__(self, workload: Workload, metric: str, limit_bytes: float | None = None) -> int:
        """The smallest cap under which the run succeeds [bytes]; ``minimum``: if no kernel takes a workspace.

        Where that is above ``limit_bytes``, what is given may be any number between the two, and is found sooner.
        """
        with uncollected():
            return self._needed(workload, metric, limit_bytes)

    def _needed(self, workload: Workload, metric: str, limit_bytes: float | None) -> int:
        if limit_bytes is not None and metric == "required":
            live = self._simulator.run(workload).peak_bytes
            if live > limit_bytes:
                return live
        simulated = self._simulator.run(workload, keep_events=True)
        assert simulated.events is not None
        events = simulated.events if metric == "required" else without(simulated.events, simulated.workspaces)
        return smallest_cap(events, limit_bytes=None if limit_bytes is None else int(limit_bytes))
