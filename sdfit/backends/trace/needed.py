"""What a run requires that `sdfit.predict.simulation` does not cover, by trace and replay: torch and diffusers are loaded when it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdfit.predict.predictor import Predictor
from sdfit.predict.replayed import Replayed
from sdfit.predict.replayed import replaying as simulating
from sdfit.predict.simulation.replay import smallest_cap, without
from sdfit.predict.simulation.workspaces import workspaces_for
from sdfit.workload import Workload

if TYPE_CHECKING:
    from sdfit.backends.trace.tracer import Tracer


class Traced:
    """``traced(workload, metric) -> bytes``: traces a run and replays it through the allocator.

    Parameters
    ----------
    kernels : str
        Whose workspaces the kernels take: an architecture such as ``sm75``, or a card.
    """

    def __init__(self, kernels: str) -> None:
        self.kernels = kernels
        self._tracer: Tracer | None = None

    def __reduce__(self) -> tuple[type[Traced], tuple[str]]:
        return (Traced, (self.kernels,))

    def __call__(self, workload: Workload, metric: str) -> int:
        """The smallest cap under which the run succeeds; ``minimum``: if no kernel takes a workspace."""
        if self._tracer is None:
            from sdfit.backends.trace.tracer import Tracer

            self._tracer = Tracer(workspaces_for(self.kernels))
        run = self._tracer.run(workload, keep_events=True)
        assert run.events is not None
        return smallest_cap(run.events if metric == "required" else without(run.events, run.workspaces))


def replaying(model: Predictor, *, limit_bytes: float | None = None) -> Replayed:
    """Let a model settle by replay what its equation leaves open: by simulation, and by trace what that does not cover.

    Parameters
    ----------
    model : Predictor
        As `sdfit.load` gives it.
    limit_bytes : float, optional
        See `sdfit.predict.replayed.Replayed`.
    """
    return simulating(model, limit_bytes=limit_bytes, otherwise=Traced(model.artifact.name))
