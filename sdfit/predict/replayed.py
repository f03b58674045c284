"""Required memory by replay: a model that simulates each run for what it requires.

How PyTorch's allocator packs blocks into segments jumps from one size to the next by up to a quarter of the activations,
which no equation in the sizes follows. A replay of the run's allocations through a model of the allocator does. `replaying`
simulates the run (`sdfit.predict.simulation.simulate` says which runs it covers), with numpy alone, in some hundredths of a
second, where the equation takes microseconds.
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
from sdfit.predict.simulation.workspaces import workspaces_for
from sdfit.workload import Workload

REPLAYED = ("required", "minimum")
"""The metrics that a replay gives."""
FAR = 2.0
"""Times a limit by which the equation's number is never too high: inside a swept domain it is off by an eighth at most."""
Replay = Callable[[Workload, str, float | None], int]
"""``replay(workload, metric, limit) -> bytes`` for the metrics of `REPLAYED`; what is above a limit, if there is one, may be
less than what is needed. Raises `NotSimulated` for a run that it does not know."""


class ReplayedPrediction(Prediction):
    """A prediction whose value is a replay's. Its interval rests on the published whole runs beside their traces alone."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return (ReplayedPrediction, (float(self), *self._facts))

    @property
    def replayed(self) -> bool:
        """Yes."""
        return True

    @property
    def extrapolated(self) -> bool:
        """A replay knows no swept domain."""
        return False

    def chance_within(self, memory_bytes: float) -> float:
        """The chance that the run needs no more than some memory, by what published runs lay beside their traces."""
        variant, _, metric, _ = self._facts
        told = self._told()
        return variant.replayed_chance(told["peaks"], metric, memory_bytes - self)

    def _margin(self, level: float, *, upper: bool) -> float:
        variant, _, metric, _ = self._facts
        return float(variant.replayed_margin(self._told()["peaks"], metric, level, upper=upper))


class Replayed(Predictor):
    """A model that replays runs for what they require; everything else is the model's. `sdfit.load` gives it.

    Parameters
    ----------
    model : Predictor
        One whose records are traces with kernel workspaces (``provenance`` published).
    replay : callable
        See `Replay`; of the same kernels as the model. What it raises `NotSimulated` for stays the equation's.
    limit_bytes : float, optional
        Replay only runs of which the model's own bounds do not say whether they need more than this [bytes]; of those that
        do, the number may be too low. None: replay all.

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
        self._at_least: dict[tuple[Workload, str], int] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (_again, (self._model, self._replay, self.limit_bytes))

    @property
    def equation(self) -> Predictor:
        """The regression alone: microseconds, and tables of any length."""
        return self._model

    def within(self, limit_bytes: float) -> Replayed:
        """The same model, for questions whether runs need more than this [bytes]; what was replayed is shared."""
        twin = Replayed(self._model, self._replay, limit_bytes=limit_bytes)
        twin._needs, twin._at_least = self._needs, self._at_least
        return twin

    def predict_workload(
        self, workload: Workload, *, metric: str = "allocated", level: float = DEFAULT_LEVEL
    ) -> Prediction:
        """Predict for a `Workload`: by replay, if that is what is asked and the equation does not settle it."""
        found = super().predict_workload(workload, metric=metric, level=level)
        known = (workload, metric) in self._needs
        if metric not in REPLAYED or (not known and self._settled(found)):
            return found
        try:
            needed = self._needed(workload, metric)
        except NotSimulated:
            return found
        return ReplayedPrediction(needed, self.variant(workload.variant), workload, metric, level)

    def _needed(self, workload: Workload, metric: str) -> int:
        """What a run needs; above the limit, perhaps less than that [bytes]. Each is replayed once."""
        key, limit = (workload, metric), self.limit_bytes
        if key in self._needs:
            return self._needs[key]
        if limit is not None and self._at_least.get(key, 0) > limit:
            return self._at_least[key]
        needed = self._replay(workload, metric, limit)
        known = self._needs if limit is None or needed <= limit else self._at_least
        known[key] = needed
        return needed

    def _settled(self, found: Prediction) -> bool:
        if self.limit_bytes is None or math.isinf(found.upper):
            return False
        if found > FAR * self.limit_bytes:
            return True
        surest = Prediction(float(found), found._facts[0], found.workload, found.metric, max(SURE, found.level))
        return not surest.lower <= self.limit_bytes < surest.upper


def replaying(model: Predictor) -> Predictor:
    """Let a model replay runs for what they require; one whose runs cannot be replayed stays as it is.

    Examples
    --------
    >>> import sdfit, warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     f = sdfit.load("t4")
    >>> f.largest(aspect=(3, 2), memory="8 GiB", attention="eager")
    (576, 896)
    """
    return model if why_not(model) else Replayed(model, Needed(model.artifact.name))


def why_not(model: Predictor) -> str:
    """Why a model's runs cannot be replayed; empty if they can."""
    if model.provenance != "published" or not model.artifact.metrics.get("required"):
        return (
            f"'{model.name}' rests on {model.provenance} runs; a replay settles only what rests on a trace with kernel "
            "workspaces: ask the model itself"
        )
    if REPLAYED_FAMILY not in model.artifact.scores.get("required", {}):
        return f"'{model.name}' was fitted before runs could be replayed; fit it again: sdfit fit"
    table = model.artifact.environment.get("workspaces")
    try:
        same = table == workspaces_for(model.artifact.name).label
    except SdfitError:
        same = False
    return "" if same else f"'{model.name}' rests on the kernels of another table than this sdfit knows: {table}"


SURE = 0.99
"""Level of the equation's bounds beyond which a run is not replayed."""


def _again(model: Predictor, replay: Replay, limit_bytes: float | None) -> Replayed:
    return Replayed(model, replay, limit_bytes=limit_bytes)
