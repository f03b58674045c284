"""Packing by replay: a model that simulates each run for what it requires and reserves, and for all else that its equation does not know.

How PyTorch's allocator packs blocks into segments jumps from one size to the next by up to a quarter of the activations,
which no equation in the sizes follows. A replay of the run's allocations through a model of the allocator does. `replaying`
simulates the run (`sdfit.predict.simulation.simulate` says which runs it covers), with numpy alone, in some hundredths of a
second, where the equation takes microseconds. A combination of options that was never swept is simulated for every metric,
and so is a run in a regime that the equation describes to percents only (`sdfit.equation.regimes.is_rough`), or so far outside the
sweep that it goes astray (`sdfit.predict.variant.Variant`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Protocol

import numpy as np

from sdfit.equation.metrics import REPLAYED_FAMILY, check_metric
from sdfit.equation.regimes import REGIMES, edges, is_rough
from sdfit.equation.sizes import Sizes
from sdfit.equation.stages import STAGES, stages_of
from sdfit.errors import NeverSwept, SdfitError
from sdfit.predict import conformal
from sdfit.predict.prediction import Prediction
from sdfit.predict.predictor import DEFAULT_LEVEL, ROUNDING, Predictor
from sdfit.predict.simulated import ReplayedPrediction, Run
from sdfit.predict.simulation.library import NotSimulated
from sdfit.predict.simulation.needed import Needed, Stages, alike, least_bytes
from sdfit.predict.simulation.workspaces import workspaces_for
from sdfit.predict.table import predict_table
from sdfit.predict.variant import SURE
from sdfit.predict.verdict import finite
from sdfit.workload import STREAMED, Workload, variant_name

REPLAYED = ("reserved", "device", "required", "minimum")
"""The metrics that a replay gives of every run: all that hang on packing. What is allocated is the equation's where it has
coefficients."""
FAR = 2.0
"""Times a limit that the equation's bounds must be off where it knows no runs of a kind; and that what is live must be above, so
that all further up a ladder are beyond, for where convolutions are split half of it goes."""
NEAR = 1.02
"""Times a limit: what is counted as live includes remainders of blocks that a cap does without, some tens of MB."""


class Replay(Protocol):
    """What simulates runs: a `sdfit.predict.simulation.needed.Needed`. Raises `NotSimulated` for a run that it does not know."""

    def __call__(self, workload: Workload, metric: str) -> int:
        """A metric of a run [bytes]."""

    def suffices(self, workload: Workload, metric: str, cap_bytes: float) -> bool:
        """Whether a metric of a run is no more than a cap [bytes], which is found sooner than the metric."""

    def stages(self, workload: Workload) -> Stages:
        """The peak of each stage, and the weights that are on the card in it."""

    @property
    def patient(self) -> Replay:
        """The same for runs that nothing else answers: it takes longer ones, too."""


class Replayed(Predictor):
    """A model that simulates runs: for what they require and reserve, and for all else where it has no coefficients.

    `sdfit.load` gives it.

    Parameters
    ----------
    model : Predictor
        One whose records are traces with kernel workspaces (``provenance`` published).
    replay : Replay
        Of the same kernels as the model. What it raises `NotSimulated` for stays the equation's.
    limit_bytes : float, optional
        Simulate only runs of which the model's own bounds do not say whether they need more than this [bytes]. None: simulate all.

    Raises
    ------
    SdfitError
        If the model rests on something else than traces: a replay would then be less right than the model.

    Notes
    -----
    A replay is a simulation: it takes the workspace table and the allocator's rules to be right. The bound adds what published
    whole runs lay above their traces, the largest of them where there are too few for the level. Tables
    (`Predictor.predict`) are the equation's, but for the rows of combinations that it has no coefficients for: those are
    simulated one by one.
    """

    _simulates = True
    _plain_images = min(r.images[0] for r in REGIMES if r.rough)
    _plain_pixels = edges(STAGES)[0]

    def __init__(self, model: Predictor, replay: Replay, *, limit_bytes: float | None = None) -> None:
        no = why_not(model)
        if no:
            raise SdfitError(no, provenance=model.provenance)
        super().__init__(model.artifact, model.path, model.name, model.card)
        self._model, self._replay, self.limit_bytes = model, replay, limit_bytes
        self._needs: dict[tuple[Any, str], int] = {}
        self._runs: dict[Any, Run] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (partial(Replayed, limit_bytes=self.limit_bytes), (self._model, self._replay))

    @property
    def _alone(self) -> Callable[..., Prediction]:
        return self.predict_workload

    @property
    def equation(self) -> Predictor:
        """The regression alone: microseconds, and tables of any length."""
        return self._model

    def within(self, limit_bytes: float) -> Replayed:
        """The same model, for questions whether runs need more than this [bytes]; what was replayed is shared."""
        twin = object.__new__(Replayed)
        twin.__dict__ |= self.__dict__ | {"limit_bytes": limit_bytes}
        return twin

    def predict_workload(
        self, workload: Workload, *, metric: str = "allocated", level: float = DEFAULT_LEVEL
    ) -> Prediction:
        """Predict for a `Workload`: by replay, if that is what is asked and the equation does not settle it.

        Raises
        ------
        NeverSwept
            If the model has no coefficients for the variant, and the run is not simulated either; says why.
        """
        try:
            found = super().predict_workload(workload, metric=metric, level=level)
        except NeverSwept as never:
            with _never_simulated(self.artifact.name, workload, never):
                return self._by_simulation(workload, metric, level, self._replay.patient)
        if metric not in REPLAYED:
            strays = self.variant(workload.variant).strays and found.extrapolated
            if strays or is_rough(stages_of(workload.variant), Sizes.of_workload(workload)):
                with suppress(NotSimulated):
                    return self._by_simulation(workload, metric, level, self._replay)
            return found
        if self.limit_bytes is not None and _settled(found, self.limit_bytes):
            return found
        try:
            needed = self._needed(workload, metric, self._replay)
        except NotSimulated:
            return found
        return ReplayedPrediction(needed, Run.of(self.variant(workload.variant), workload), workload, metric, level)

    def is_sure(
        self, workload: Workload, limit_bytes: float, *, metric: str, level: float, simulated: bool = False
    ) -> bool:
        """As the model's; where the equation does not settle it, whether what the bound leaves of the limit suffices by simulation.

        Parameters
        ----------
        simulated : bool
            Whether the equation is not to settle it.
        """
        try:
            found = super().predict_workload(workload, metric=metric, level=level)
        except NeverSwept as never:
            if least_bytes(workload) > limit_bytes:
                return False
            with _never_simulated(self.artifact.name, workload, never):
                return self._suffices(
                    self._simulated(workload), workload, metric, limit_bytes, level, self._replay.patient
                )
        if metric not in REPLAYED:
            return super().is_sure(workload, limit_bytes, metric=metric, level=level)
        if simulated or not _settled(found, limit_bytes):
            if least_bytes(workload) > limit_bytes:
                return False
            run = Run.of(self.variant(workload.variant), workload)
            with suppress(NotSimulated):
                return self._suffices(run, workload, metric, limit_bytes, level, self._replay)
        return finite(self, found).upper <= limit_bytes

    def _suffices(
        self, run: Run, workload: Workload, metric: str, limit_bytes: float, level: float, replay: Replay
    ) -> bool:
        """Whether a run's bound is within a limit."""
        context = self.context_bytes if metric == "device" else 0
        cap = limit_bytes - context - ReplayedPrediction(0, run, workload, metric, level).upper
        return replay.suffices(workload, "reserved" if metric == "device" else metric, cap)

    def _by_simulation(self, workload: Workload, metric: str, level: float, replay: Replay) -> Prediction:
        """A run of which nothing is the equation's."""
        run = self._simulated(workload)
        return ReplayedPrediction(self._needed(workload, metric, replay), run, workload, metric, level)

    def _simulated(self, workload: Workload) -> Run:
        """What is known of such a run; each is simulated once."""
        key = alike(workload)
        if key not in self._runs:
            self._runs[key] = Run(self.artifact, workload.variant, *self._replay.patient.stages(workload))
        return self._runs[key]

    def beyond(self, table: Any, limit_bytes: float, *, metric: str, level: float) -> Any:
        """As the model's where it knows runs of their kind; of others those that by simulation have more live than that."""
        check_metric(metric)
        conformal.check_level(level)
        rows, near = max(map(np.size, table.values())), FAR if metric == "minimum" else NEAR
        try:
            if metric not in REPLAYED:
                return super().beyond(table, limit_bytes, metric=metric, level=level)
            value, (below, above) = predict_table(self.variant, table, metric, 2 * max(SURE, level) - 1, own=True)
        except NeverSwept:
            return self._live_beyond(table, np.arange(rows), limit_bytes, near)
        known = np.isfinite(above)
        beyond = known & (value - below > limit_bytes * (1 + ROUNDING))
        if known.all():
            return beyond
        return beyond | self._live_beyond(table, np.flatnonzero(~known), limit_bytes, near)

    def _live_beyond(self, table: Mapping[str, Any], ladder: Any, limit_bytes: float, near: float) -> Any:
        """Which rows of a ladder that the equation knows no runs of are beyond: from the first on whose live bytes alone are by far.

        What is live rises along a ladder but where convolutions are split, past 2^31 elements: there at most half of it goes. Of
        those below, downwards, each that is beyond by itself.
        """
        rows = max(map(np.size, table.values()))
        columns = {name: np.broadcast_to(column, rows).tolist() for name, column in table.items()}

        def is_beyond(at: int, most_bytes: float) -> bool:
            workload = Workload(**{name: column[ladder[at]] for name, column in columns.items()})
            try:
                return not self._replay.patient.suffices(workload, "allocated", most_bytes)
            except NotSimulated:  # nothing of it is known
                return False

        low, high = 0, len(ladder)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if is_beyond(middle, FAR * limit_bytes) else (middle + 1, high)
        while low and is_beyond(low - 1, near * limit_bytes):
            low -= 1
        beyond = np.zeros(rows, dtype=bool)
        beyond[ladder[low:]] = True
        return beyond

    def _needed(self, workload: Workload, metric: str, replay: Replay) -> int:
        """A metric of a run [bytes]; each is simulated once."""
        if metric == "device":
            return self._needed(workload, "reserved", replay) + self.context_bytes
        key = alike(workload), metric
        if key not in self._needs:
            self._needs[key] = replay(workload, metric)
        return self._needs[key]


@contextmanager
def _never_simulated(name: str, workload: Workload, never: NeverSwept) -> Iterator[None]:
    """Say why a run of a variant that was never swept has no answer."""
    try:
        yield
    except NotSimulated as reason:
        raise NeverSwept(
            f"'{name}' has no coefficients for {variant_name(workload.variant)}, and this run is not simulated: {reason}",
            variant=workload.variant,
        ) from never


def _settled(found: Prediction, limit_bytes: float) -> bool:
    """Whether the equation says for sure if a run needs more than a limit.

    Where it knows no runs of a kind, only far from the limit: of 5,600 drawn runs, most of them far outside what was swept, its
    upper end was never below what is live, and its lower end above that by 61 % at most; but not of those whose weights come
    module by module.
    """
    if not found.of_its_kind:
        beyond = found.lower > FAR * limit_bytes and found.workload.offload not in STREAMED
        return beyond or FAR * found.upper <= limit_bytes
    surest = found
    if found.level < SURE:
        surest = Prediction(float(found), found._facts[0], found.workload, found.metric, SURE)
    return not surest.lower <= limit_bytes < surest.upper


def replaying(model: Predictor) -> Predictor:
    """Let a model simulate runs; one whose runs cannot be replayed stays as it is.

    Examples
    --------
    >>> import sdfit, warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     f = sdfit.load("t4")
    >>> f.largest(aspect=(3, 2), memory="8 GiB", attention="eager")
    (608, 896)
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
    with suppress(SdfitError):
        if table == workspaces_for(model.artifact.name).label:
            return ""
    return f"'{model.name}' rests on the kernels of another table than this sdfit knows: {table}"
