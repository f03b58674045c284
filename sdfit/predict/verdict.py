"""Does it fit: *fits*, *may fit* with its chance, or *does not fit*, and by how much.

``memory`` is what PyTorch may take: the card's total less its CUDA context and other processes. What decides is the
metric ``required``, the smallest cap under which a run succeeds, where the model has it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from sdfit.equation.metrics import check_metric
from sdfit.errors import InvalidWorkload, UnknownVariant
from sdfit.predict.artifact import Artifact
from sdfit.predict.conformal import check_level
from sdfit.predict.prediction import Prediction
from sdfit.units import parse_bytes
from sdfit.workload import Workload

SAFE_LEVEL = 0.99
"""Share of runs that a bound should hold for, unless the model has too few scores to promise it."""
FITS, MAY_FIT, DOES_NOT_FIT = "fits", "may fit", "does not fit"
ANSWERS = (FITS, MAY_FIT, DOES_NOT_FIT)


class Model(Protocol):
    """What is asked: a `sdfit.predict.predictor.Predictor`."""

    artifact: Artifact

    @property
    def name(self) -> str:
        """The card."""

    @property
    def wrong_half(self) -> bool:
        """Whether it is known of the card that it computes float16 wrongly."""

    def within(self, limit_bytes: float) -> Model:
        """The same, for many questions whether runs need more than a limit [bytes]: where the equation tells, numbers are its."""

    def is_sure(
        self, workload: Workload, limit_bytes: float, *, metric: str, level: float, simulated: bool = False
    ) -> bool:
        """Whether a run's upper bound is within a limit [bytes]; ``simulated``: nothing of it is to be the equation's."""

    def beyond(self, table: Any, limit_bytes: float, *, metric: str, level: float) -> Any:
        """Which of many runs surely have an upper bound above a limit."""

    def supported_level(self, metric: str) -> float:
        """The highest level that its scores support."""

    def predict_workload(self, workload: Workload, *, metric: str, level: float) -> Prediction:
        """Predict for a `Workload`."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """An answer to "does it fit", with the numbers in hand.

    Parameters
    ----------
    answer : {'fits', 'may fit', 'does not fit'}
        ``fits``: the upper bound of what is required is at most the memory. ``does not fit``: the lower bound is above
        it, and so is what the run would need with kernels that take no workspace. ``may fit``: between them.
    chance : float or None
        That the run succeeds, from conformal scores, 0 to 1; None for a model that is only traced.
    memory_bytes : int
        What was asked for.
    prediction : Prediction
        Of the metric that decides; its ``upper`` and ``lower`` are the bounds.
    slower : bool
        Whether it is likely to run, but only with slower kernels: what is required does not fit, and what would be without
        any convolution's workspace does.

    Notes
    -----
    PyTorch goes on to cuDNN's next plan when a workspace cannot be allocated; that it then succeeds everywhere between the
    two is likely, and nobody has published a measurement of it.
    """

    answer: str
    chance: float | None
    memory_bytes: int
    prediction: Prediction
    slower: bool = False

    @property
    def margin_bytes(self) -> float:
        """The memory less the upper bound [bytes]; negative is what is missing."""
        return self.memory_bytes - self.prediction.upper

    def to_dict(self) -> dict[str, Any]:
        """Plain values, amounts in bytes."""
        return {
            "answer": self.answer,
            "fits": self.answer == FITS,
            "chance": self.chance,
            "memory_bytes": self.memory_bytes,
            "margin_bytes": round(self.margin_bytes),
            "slower": self.slower,
            "supported_level": self.prediction.supported,
            **self.prediction.to_dict(),
        }


def best_metric(predictor: Model) -> str:
    """The metric that says whether a run fits: ``required`` where the model has it, else the safer ``reserved``."""
    known = predictor.artifact.metrics
    return next((m for m in ("required", "reserved") if m in known), "allocated")


def safe_level(predictor: Model, metric: str) -> float:
    """The level at which bounds are asked for: `SAFE_LEVEL`, or the highest that the model's scores support."""
    return min(SAFE_LEVEL, predictor.supported_level(metric) or SAFE_LEVEL)


def metric_and_level(predictor: Model, metric: str | None, level: float | None) -> tuple[str, float]:
    """What a question is asked of: `best_metric` and `safe_level` where nothing else is.

    Raises
    ------
    InvalidWorkload
        For a metric or a level that is none.
    """
    metric = best_metric(predictor) if metric is None else check_metric(metric)
    return metric, safe_level(predictor, metric) if level is None else check_level(level)


def bound(predictor: Model, workload: Workload, metric: str | None = None, level: float | None = None) -> Prediction:
    """Predict with the metric that decides about fitting.

    Parameters
    ----------
    metric : str, optional
        None: `best_metric`.
    level : float, optional
        None: `safe_level`.

    Raises
    ------
    InvalidWorkload
        If the model has too few scores for the level; an unknown bound is not the same as "does not fit".
    """
    metric, level = metric_and_level(predictor, metric, level)
    return finite(predictor, predictor.predict_workload(workload, metric=metric, level=level))


def finite(predictor: Model, prediction: Prediction) -> Prediction:
    """A prediction, if it has an upper bound; otherwise as `bound`."""
    if math.isinf(prediction.upper):
        level, highest = prediction.level, predictor.supported_level(prediction.metric)
        raise InvalidWorkload(
            f"'{predictor.name}' has too few scores for level {level:g}; ask for at most {highest:.3f} (--level), or sweep "
            "more sizes",
            level=level,
            highest=highest,
        )
    return prediction


def level_in_words(prediction: Prediction) -> str:
    """The level that a bound holds at, and, where it is less than was asked for, why."""
    return supported_in_words(prediction.supported, prediction.level)


def supported_in_words(supported: float, level: float) -> str:
    """The level that bounds hold at which some scores support up to another, and, where that is less, why.

    Examples
    --------
    >>> supported_in_words(0.99, 0.99), supported_in_words(38 / 39, 0.99)
    ('level 0.99', 'level 0.974, the most that 38 runs support')
    """
    if supported >= level or not supported:
        return f"level {level:.3g}"
    return f"level {supported:.3g}, the most that {round(supported / (1 - supported))} runs support"


def fits(
    predictor: Model,
    workload: Workload,
    *,
    memory: str | float,
    metric: str | None = None,
    level: float | None = None,
) -> bool:
    """Whether the workload's upper bound is at most ``memory``.

    Parameters
    ----------
    memory : str or float
        ``"15 GiB"``, or bytes.
    metric : str, optional
        None: `best_metric`.
    level : float, optional
        Share of runs that stay below the bound; None: `safe_level`.
    """
    metric, level = metric_and_level(predictor, metric, level)
    return predictor.is_sure(workload, parse_bytes(memory), metric=metric, level=level)


def verdict(
    predictor: Model,
    workload: Workload,
    *,
    memory: str | float,
    metric: str | None = None,
    level: float | None = None,
) -> Verdict:
    """Say whether a workload fits, may fit, or does not.

    Parameters
    ----------
    memory, metric, level
        As in `fits`.
    """
    memory_bytes = parse_bytes(memory)
    prediction = bound(predictor, workload, metric, level)
    if predictor.artifact.provenance == "traced":
        # no kernel workspaces: what it promises to fit may fail, what it says does not fit never does
        answer = DOES_NOT_FIT if prediction.lower > memory_bytes else MAY_FIT
        return Verdict(answer, None, memory_bytes, prediction)
    chance = prediction.chance_within(memory_bytes)
    if prediction.upper <= memory_bytes:
        return Verdict(FITS, max(chance, prediction.supported), memory_bytes, prediction)
    slower = prediction.lower > memory_bytes and _fits_without_workspaces(predictor, prediction, memory_bytes)
    answer = DOES_NOT_FIT if prediction.lower > memory_bytes and not slower else MAY_FIT
    return Verdict(answer, chance, memory_bytes, prediction, slower)


def _fits_without_workspaces(predictor: Model, needed: Prediction, memory_bytes: int) -> bool:
    """Whether the run would be sure to fit if no kernel took a workspace; no where that is not known."""
    if needed.metric != "required" or "minimum" not in predictor.artifact.metrics:
        return False
    try:
        return predictor.is_sure(
            needed.workload, memory_bytes, metric="minimum", level=needed.level, simulated=needed.replayed
        )
    except UnknownVariant:
        return False
