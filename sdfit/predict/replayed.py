"""Required memory by replay: a model whose answers are settled by replaying the run, where its equation leaves them open.

How PyTorch's allocator packs blocks into segments jumps from one size to the next by up to a quarter of the activations,
which no equation in the sizes follows. A replay of the run's allocations through a model of the allocator does. `replaying`
simulates the run (`sdfit.predict.simulation.simulate` says which runs it covers), with numpy alone, in some hundredths of a
second; whoever can trace the others hands that in (`sdfit.backends.trace.needed`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from sdfit.equation.metrics import REPLAYED_FAMILY
from sdfit.errors import SdfitError
from sdfit.predict.prediction import Prediction
from sdfit.predict.predictor import DEFAULT_LEVEL, Predictor
from sdfit.predict.simulation.library import NotSimulated
from sdfit.predict.simulation.needed import Needed
from sdfit.workload import Workload

REPLAYED = ("required", "minimum")
"""The metrics that a replay gives."""
Replay = Callable[[Workload, str], int]
"""``replay(workload, metric) -> bytes`` for the metrics of `REPLAYED`."""


class ReplayedPrediction(Prediction):
    """A prediction whose value is a replay's. Its interval rests on the published whole runs beside their traces alone."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return (ReplayedPrediction, (float(self), *self._facts))

    @property
    def extrapolated(self) -> bool:
        """A replay knows no swept domain."""
        return False

    def chance_within(self, memory_bytes: float) -> float:
        """The chance that the run needs no more than some memory, by what published runs lay beside their traces."""
        variant, _, metric, _ = self._facts
        told = self._told()
        return variant.replayed_chance(told["peaks"], metric, memory_bytes - self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, amounts in bytes."""
        return super().to_dict() | {"replayed": True}

    def _margin(self, level: float, *, upper: bool) -> float:
        variant, _, metric, _ = self._facts
        return float(variant.replayed_margin(self._told()["peaks"], metric, level, upper=upper))


class Replayed(Predictor):
    """A model that replays runs for what they require; everything else is the model's.

    Parameters
    ----------
    model : Predictor
        One whose records are traces with kernel workspaces (``provenance`` published).
    replay : callable
        See `Replay`; of the same kernels as the model. What it raises `NotSimulated` for stays the equation's.
    limit_bytes : float, optional
        Replay only runs of which the model's own bounds do not say whether they need more than this [bytes]. None: all.

    Raises
    ------
    SdfitError
        If the model rests on something else than traces: a replay would then be less right than the model.

    Notes
    -----
    A replay is a simulation: it takes the workspace table and the allocator's rules to be right. The bound adds what published
    whole runs lay above their traces, the largest of them where there are too few for the level. Tables
    (`Predictor.predict`) are the equation's.
    """

    def __init__(self, model: Predictor, replay: Replay, *, limit_bytes: float | None = None) -> None:
        no = why_not(model)
        if no:
            raise SdfitError(no, provenance=model.provenance)
        super().__init__(model.artifact, model.path, model.name, model.card)
        self._model, self._replay, self.limit_bytes = model, replay, limit_bytes
        self._needs: dict[tuple[Workload, str], int] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (_again, (self._model, self._replay, self.limit_bytes))

    @property
    def equation(self) -> Predictor:
        """The model whose open questions are settled."""
        return self._model

    @property
    def replays(self) -> int:
        """How many runs were replayed so far."""
        return len(self._needs)

    def within(self, limit_bytes: float) -> Replayed:
        """The same model, for the question whether runs need more than this [bytes]; what was replayed is shared."""
        twin = Replayed(self._model, self._replay, limit_bytes=limit_bytes)
        twin._needs = self._needs
        return twin

    def predict_workload(
        self, workload: Workload, *, metric: str = "allocated", level: float = DEFAULT_LEVEL
    ) -> Prediction:
        """Predict for a `Workload`: by replay, if that is what is asked and the equation does not settle it."""
        found = super().predict_workload(workload, metric=metric, level=level)
        if metric not in REPLAYED or self._settled(found):
            return found
        key = workload, metric
        if key not in self._needs:
            try:
                self._needs[key] = self._replay(workload, metric)
            except NotSimulated:
                return found
        return ReplayedPrediction(self._needs[key], self.variant(workload.variant), workload, metric, level)

    def _settled(self, found: Prediction) -> bool:
        if self.limit_bytes is None or math.isinf(found.upper):
            return False
        surest = Prediction(float(found), found._facts[0], found.workload, found.metric, SURE)
        return not surest.lower <= self.limit_bytes < surest.upper


def replaying(model: Predictor, *, limit_bytes: float | None = None, otherwise: Replay | None = None) -> Replayed:
    """Let a model settle by replay what its equation leaves open.

    Parameters
    ----------
    model : Predictor
        As `sdfit.load` gives it.
    limit_bytes : float, optional
        See `Replayed`.
    otherwise : callable, optional
        See `Replay`: answers for the runs that a simulation does not cover; None: the equation does.

    Raises
    ------
    SdfitError
        See `Replayed`.

    Examples
    --------
    >>> import sdfit, warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     f = replaying(sdfit.load("t4"))
    >>> f.largest(aspect=(3, 2), memory="8 GiB", attention="eager")
    (512, 768)
    """
    no = why_not(model)
    if no:
        raise SdfitError(no, provenance=model.provenance)
    return Replayed(model, Needed(model.artifact.name, otherwise), limit_bytes=limit_bytes)


def why_not(model: Predictor) -> str:
    """Why a model's runs cannot be replayed; empty if they can."""
    if model.provenance != "published" or not model.artifact.metrics.get("required"):
        return (
            f"'{model.name}' rests on {model.provenance} runs; a replay settles only what rests on a trace with kernel "
            "workspaces: ask the model itself"
        )
    if REPLAYED_FAMILY not in model.artifact.scores.get("required", {}):
        return f"'{model.name}' was fitted before runs could be replayed; fit it again: sdfit fit"
    return ""


SURE = 0.99
"""Level of the equation's bounds beyond which a run is not replayed."""


def _again(model: Predictor, replay: Replay, limit_bytes: float | None) -> Replayed:
    return Replayed(model, replay, limit_bytes=limit_bytes)
