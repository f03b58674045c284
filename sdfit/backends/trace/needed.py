"""What a run requires, by trace and replay, for `sdfit.predict.replayed`."""

from __future__ import annotations

from sdfit.backends.trace.tracer import Tracer
from sdfit.predict.predictor import Predictor
from sdfit.predict.replayed import Replayed
from sdfit.predict.simulation.replay import smallest_cap, without
from sdfit.predict.simulation.workspaces import workspaces_for
from sdfit.workload import Workload

PATIENCE = 12
"""One question takes a handful of runs; only who asks many gains by the programs of their modules."""


class Needed:
    """``needed(workload, metric) -> bytes``: traces a run and replays it through the allocator.

    Parameters
    ----------
    kernels : str
        Whose workspaces the kernels take: an architecture such as ``sm75``, or a card.
    """

    def __init__(self, kernels: str) -> None:
        self.kernels = kernels
        self._tracer = Tracer(workspaces_for(kernels), patience=PATIENCE)

    def __reduce__(self) -> tuple[type[Needed], tuple[str]]:
        return (Needed, (self.kernels,))

    def __call__(self, workload: Workload, metric: str) -> int:
        """The smallest cap under which the run succeeds; ``minimum``: if no kernel takes a workspace."""
        traced = self._tracer.run(workload, keep_events=True)
        assert traced.events is not None
        events = traced.events if metric == "required" else without(traced.events, traced.workspaces)
        return smallest_cap(events)


def replaying(model: Predictor, *, limit_bytes: float | None = None) -> Replayed:
    """Let a model settle by replay what its equation leaves open.

    Parameters
    ----------
    model : Predictor
        As `sdfit.load` gives it.
    limit_bytes : float, optional
        See `sdfit.predict.replayed.Replayed`.

    Examples
    --------
    >>> import sdfit, warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     f = replaying(sdfit.load("t4"))  # doctest: +SKIP
    >>> f.largest(aspect=(3, 2), memory="8 GiB", attention="eager")  # doctest: +SKIP
    (512, 768)
    """
    return Replayed(model, Needed(model.artifact.name), limit_bytes=limit_bytes)
