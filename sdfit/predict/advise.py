"""The largest size and the largest batch that fit: the one that is sure, and the one that is likely.

``memory`` is what PyTorch may take: the card's total less its CUDA context and other processes. *Sure* is what the upper
bound at the chosen level allows, *likely* what the bound at level `LIKELY` does: more likely than not it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sdfit.errors import InvalidWorkload, SdfitError, shown
from sdfit.predict.verdict import Model, bound
from sdfit.units import format_bytes, parse_bytes
from sdfit.workload import MAX_BATCH_SIZE, MAX_SIDE, MIN_SIDE, VAE_SCALE, Workload, check_keywords, whole_number

LIKELY = 0.5
"""Level of the bound behind an answer that is likely."""


class NothingFits(SdfitError):
    """Not even the smallest run of that kind is sure to fit; ``facts["likely"]`` is the largest that is likely to, or None."""

    exit_code = 3


class LargestSize(tuple[int, int]):
    """The largest size that is sure to fit: a tuple (height, width) [pixels].

    Attributes
    ----------
    likely : (int, int)
        The largest that is likely to, at least as large.
    """

    likely: tuple[int, int]

    def __new__(cls, sure: tuple[int, int], likely: tuple[int, int]) -> LargestSize:
        """Make one."""
        made = super().__new__(cls, sure)
        made.likely = likely
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self), self.likely


class LargestBatch(int):
    """The largest number of images that is sure to fit.

    Attributes
    ----------
    likely : int
        The largest that is likely to, at least as large.
    """

    likely: int

    def __new__(cls, sure: int, likely: int) -> LargestBatch:
        """Make one."""
        made = super().__new__(cls, sure)
        made.likely = likely
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        return int(self), self.likely


def largest(
    predictor: Model,
    *,
    memory: str | float,
    aspect: tuple[int, int] = (1, 1),
    step: int = 64,
    metric: str | None = None,
    level: float | None = None,
    **options: Any,
) -> LargestSize:
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
    LargestSize
        (height, width) [pixels], with the size that is likely to fit as ``.likely``.

    Raises
    ------
    NothingFits
        If the smallest is not sure to fit.
    """
    check_keywords(options)
    across, down = (whole_number("aspect", part, 1, 100) for part in _pair(aspect))
    if whole_number("step", step, VAE_SCALE, 1024) % VAE_SCALE:
        raise InvalidWorkload(f"step is {step}; it must be a multiple of {VAE_SCALE}", given=step)
    short, long = sorted((across, down))
    limit = parse_bytes(memory)

    def size(k: int) -> tuple[int, int]:
        return size_of_aspect(k, (across, down), step)

    model = predictor.within(limit)

    def upper(k: int, at: float | None) -> float:
        return bound(model, Workload(*size(k), **options), metric, at).upper

    first = -(-MIN_SIDE // step)
    last = max(MAX_SIDE * short // (long * step), first)
    while last > first and max(size(last)) > MAX_SIDE:  # the long side is rounded, perhaps up
        last -= 1
    words = lambda k: "x".join(map(str, size(k)))  # noqa: E731
    sure, likely = _sure_and_likely(limit, upper, level, (first, last), f"no size of {across}:{down}", words)
    return LargestSize(size(sure), size(likely))


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
) -> LargestBatch:
    """The largest number of images per call that fits.

    Returns
    -------
    LargestBatch
        A whole number, with the one that is likely to fit as ``.likely``.

    Raises
    ------
    NothingFits
        If one image is not sure to fit.
    """
    check_keywords(options)

    limit = parse_bytes(memory)
    model = predictor.within(limit)

    def upper(batch: int, at: float | None) -> float:
        return bound(model, Workload(height, width, prompt_length, batch, **options), metric, at).upper

    what = f"not even one image of {height}x{width}"
    return LargestBatch(*_sure_and_likely(limit, upper, level, (1, MAX_BATCH_SIZE), what, str))


_Upper = Callable[[int, float | None], float]
"""The bound [bytes] of what is asked for, by number and level."""


def _sure_and_likely(
    limit: float,
    upper: _Upper,
    level: float | None,
    ends: tuple[int, int],
    what: str,
    words: Callable[[int], str],
) -> tuple[int, int]:
    """The largest k whose bound at the level is within the limit, and the largest whose bound at `LIKELY` is.

    What is needed rises with k but for drops: past 2^31 elements convolutions are split, and how blocks are packed jumps
    from one size to the next. So the search goes down from the last.
    """

    def largest(at: float | None) -> int | None:
        return next((k for k in range(ends[1], ends[0] - 1, -1) if upper(k, at) <= limit), None)

    # asked for less than that, what is sure is at least as likely
    sure, likely = largest(level), largest(LIKELY if level is None else min(level, LIKELY))
    if sure is None:
        may = "" if likely is None else f"; likely to fit: {words(likely)}"
        raise NothingFits(f"{what} is sure to fit {format_bytes(limit)}{may}", likely=likely)
    return sure, max(sure, likely or sure)


def _pair(aspect: Any) -> tuple[Any, Any]:
    try:
        across, down = aspect
    except (TypeError, ValueError):
        raise InvalidWorkload(
            f"aspect is {shown(aspect)}; it must be two whole numbers such as (3, 2)", given=aspect
        ) from None
    return across, down
