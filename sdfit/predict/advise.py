"""What fits: the largest size, the largest batch, and which option makes a run fit.

``memory`` is what PyTorch may take: the card's total less its CUDA context and other processes. A run fits if the
upper bound of its prediction, at the chosen level, is no more than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from sdfit.errors import InvalidWorkload, SdfitError, UnknownVariant
from sdfit.predict.artifact import Artifact
from sdfit.predict.prediction import Prediction
from sdfit.units import format_bytes, parse_bytes
from sdfit.workload import MAX_BATCH_SIZE, MAX_SIDE, MIN_SIDE, VAE_SCALE, Workload, check_keywords, whole_number

SAFE_LEVEL = 0.99
"""Share of runs that a bound should hold for, unless the model has too few scores to promise it."""


class Model(Protocol):
    """What is asked: a `sdfit.predict.predictor.Predictor`."""

    artifact: Artifact

    @property
    def name(self) -> str:
        """The card."""

    def predict_workload(self, workload: Workload, *, metric: str, level: float) -> Prediction:
        """Predict for a `Workload`."""


class NothingFits(SdfitError):
    """Not even the smallest run of that kind fits."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Option:
    """A change that makes a run fit, and what the changed run needs at most [bytes]."""

    change: dict[str, Any]
    upper_bytes: float
    prediction: Prediction


def best_metric(predictor: Model) -> str:
    """The metric that says whether a run fits: ``required`` where the model has it, else the safer ``reserved``."""
    known = predictor.artifact.metrics
    return next((m for m in ("required", "reserved") if known.get(m)), "allocated")


def safe_level(predictor: Model, metric: str) -> float:
    """The level at which bounds are asked for: `SAFE_LEVEL`, or the highest that the model's scores support."""
    scores = len(predictor.artifact.scores.get(metric, {}).get("", []))
    return min(SAFE_LEVEL, scores / (scores + 1)) if scores else SAFE_LEVEL


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
    metric = metric or best_metric(predictor)
    level = safe_level(predictor, metric) if level is None else level
    prediction = predictor.predict_workload(workload, metric=metric, level=level)
    if math.isinf(prediction.upper):
        scores = len(predictor.artifact.scores.get(prediction.metric, {}).get("", []))
        raise InvalidWorkload(
            f"'{predictor.name}' has {scores} scores, too few for level {level:g}; ask for at most "
            f"{scores / (scores + 1):.3f} (--level), or sweep more sizes",
            level=level,
            scores=scores,
        )
    return prediction


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
    return bound(predictor, workload, metric, level).upper <= parse_bytes(memory)


def largest(
    predictor: Model,
    *,
    memory: str | float,
    aspect: tuple[int, int] = (1, 1),
    step: int = 64,
    metric: str | None = None,
    level: float | None = None,
    **options: Any,
) -> tuple[int, int]:
    """The largest size of an aspect ratio that fits.

    Parameters
    ----------
    aspect : (int, int)
        Width to height, as in ``(3, 2)``.
    step : int
        Both sides are multiples of it [pixels]; a multiple of 8.
    **options
        The workload's other fields.

    Returns
    -------
    (height, width)
        Pixels.

    Raises
    ------
    NothingFits
        If the smallest does not fit.
    """
    check_keywords(options)
    across, down = (whole_number("aspect", part, 1, 100) for part in _pair(aspect))
    if whole_number("step", step, VAE_SCALE, 1024) % VAE_SCALE:
        raise InvalidWorkload(f"step is {step}; it must be a multiple of {VAE_SCALE}", given=step)
    short, long = sorted((across, down))
    limit = parse_bytes(memory)

    def size(k: int) -> tuple[int, int]:
        return size_of_aspect(k, (across, down), step)

    def upper(k: int) -> float:
        return bound(predictor, Workload(*size(k), **options), metric, level).upper

    first = -(-MIN_SIDE // step)
    last = max(MAX_SIDE * short // (long * step), first)
    while last > first and max(size(last)) > MAX_SIDE:  # the long side is rounded, perhaps up
        last -= 1
    return size(_last_below(limit, upper, first, last, f"no size of {across}:{down} fits {format_bytes(limit)}"))


def size_of_aspect(k: int, aspect: tuple[int, int], step: int) -> tuple[int, int]:
    """The size (height, width) [pixels] whose shorter side is ``k`` steps, the longer one rounded to whole steps.

    Examples
    --------
    >>> size_of_aspect(8, (3, 2), 64), size_of_aspect(8, (9, 16), 64)
    ((512, 768), (896, 512))
    """
    across, down = aspect
    short, long = sorted(aspect)
    sides = k * step, max(round(k * long / short), 1) * step
    return sides if down <= across else (sides[1], sides[0])


def max_batch_size(
    predictor: Model,
    height: int,
    width: int,
    prompt_length: int = 77,
    *,
    memory: str | float,
    metric: str | None = None,
    level: float | None = None,
    **options: Any,
) -> int:
    """The largest number of images per call that fits.

    Raises
    ------
    NothingFits
        If one image does not fit.
    """
    check_keywords(options)
    limit = parse_bytes(memory)

    def upper(batch: int) -> float:
        return bound(predictor, Workload(height, width, prompt_length, batch, **options), metric, level).upper

    complaint = f"not even one image of {height}x{width} fits {format_bytes(limit)}"
    return _last_below(limit, upper, 1, MAX_BATCH_SIZE, complaint)


_CHANGES: tuple[dict[str, Any], ...] = (
    {"attention": "sdpa"},
    {"vae_slicing": True},
    {"vae_tiling": True},
    {"vae_slicing": True, "vae_tiling": True},
    {"dtype": "float16"},
    {"dtype": "float16", "attention": "sdpa"},
    {"dtype": "float16", "attention": "sdpa", "vae_slicing": True, "vae_tiling": True},
    {"offload": "model"},
    {"offload": "model", "vae_tiling": True},
    {"batch_size": 1},
)
"""Tried in this order: from what costs least in time or quality to what costs most."""


def options_that_fit(
    predictor: Model,
    workload: Workload,
    *,
    memory: str | float,
    metric: str | None = None,
    level: float | None = None,
) -> list[Option]:
    """Which changes of options make a workload fit, the cheapest first; variants that were never swept are left out."""
    limit = parse_bytes(memory)
    found = []
    for change in _CHANGES:
        changed = replace(workload, **change)
        if changed == workload or any(getattr(workload, name) == value for name, value in change.items()):
            continue
        try:
            prediction = bound(predictor, changed, metric, level)
        except UnknownVariant:
            continue
        if prediction.upper <= limit:
            found.append(Option(change, prediction.upper, prediction))
    return found


def _pair(aspect: Any) -> tuple[Any, Any]:
    try:
        across, down = aspect
    except (TypeError, ValueError):
        raise InvalidWorkload(
            f"aspect is {aspect!r}; it must be two whole numbers such as (3, 2)", given=aspect
        ) from None
    return across, down


LARGEST_DROP = 2.0
"""How far beyond the limit to look on: inside a swept domain no bound falls by more where a regime begins (of four
tensors per pixel three remain)."""


def _last_below(limit: float, upper: Callable[[int], float], first: int, last: int, complaint: str) -> int:
    """The largest k from first to last with ``upper(k) <= limit``.

    The bound rises with k, but for drops where a regime begins (past 2^31 elements convolutions are split): beyond the
    first k that is too large there may be others that are not.
    """
    if upper(first) > limit:
        raise NothingFits(complaint)
    low, high = first, last
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if upper(middle) <= limit else (low, middle - 1)
    for k in range(low + 1, last + 1):
        needed = upper(k)
        if needed <= limit:
            low = k
        elif needed > LARGEST_DROP * limit:
            break
    return low
