"""The largest size and the largest batch that fit: the one that is sure, and the one that is likely.

``memory`` is what PyTorch may take: the card's total less its CUDA context and other processes. *Sure* is what the upper
bound at the chosen level allows, *likely* what the bound at level `LIKELY` does: more likely than not it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from sdfit.errors import InvalidWorkload, SdfitError, shown
from sdfit.predict.conformal import check_level
from sdfit.predict.verdict import Model, metric_and_level
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
    step: int | None = None,
    metric: str | None = None,
    level: float | None = None,
    **options: Any,
) -> LargestSize:
    """The largest size of an aspect ratio that fits.

    Parameters
    ----------
    aspect : (int, int)
        Width to height, as in ``(3, 2)``.
    step : int, optional
        Both sides are multiples of it [pixels]; a multiple of 8. None: as in `sizes_of_aspect`.
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
    sizes = _ladder(aspect, step)
    search = _among(sizes, predictor, memory, metric, level, options)
    sure, likely = search.sure_and_likely("no size of {}:{}".format(*aspect), lambda k: "x".join(map(str, sizes[k])))
    return LargestSize(sizes[sure], sizes[likely])


def largest_sure(
    predictor: Model,
    aspects: Iterable[tuple[int, int]],
    *,
    memory: str | float,
    level: float | None = None,
    **options: Any,
) -> dict[tuple[int, int], tuple[int, int] | None]:
    """The largest sizes of some aspect ratios that are sure to fit alone, as `largest` gives each; None where there is none."""
    ladders = {aspect: _ladder(aspect, None) for aspect in aspects}
    if not ladders:
        return {}
    sizes = sorted({size for ladder in ladders.values() for size in ladder}, key=lambda size: (size[0] * size[1], size))
    search = _among(sizes, predictor, memory, None, level, options)
    place = {sizes[k]: k for k in search.open(level)}  # of all of them at once: a table costs what a row does
    return {
        aspect: next((size for size in reversed(ladder) if size in place and search.is_sure(place[size], level)), None)
        for aspect, ladder in ladders.items()
    }


def _ladder(aspect: Any, step: int | None) -> list[tuple[int, int]]:
    """The sizes of an aspect ratio, which may be anything."""
    across, down = (whole_number("aspect", part, 1, 100) for part in _pair(aspect))
    if step is not None and whole_number("step", step, VAE_SCALE, 1024) % VAE_SCALE:
        raise InvalidWorkload(f"step is {step}; it must be a multiple of {VAE_SCALE}", given=step)
    return sizes_of_aspect((across, down), step)


def _among(
    sizes: Sequence[tuple[int, int]],
    predictor: Model,
    memory: str | float,
    metric: str | None,
    level: float | None,
    options: Mapping[str, Any],
) -> Search:
    """A search among sizes, by rising area."""
    check_keywords(options)
    table = Workload(*sizes[0], **options).to_dict()
    table |= dict(zip(("height", "width"), np.array(sizes).T, strict=True))
    return Search(predictor, parse_bytes(memory), metric, level, lambda k: Workload(*sizes[k], **options), table)


STEPS, SHARE = (64, 32, 16, 8), 16
"""Multiples that sides are searched in [pixels], and how many of them the shorter side has at least: one less costs 1 - (15/16)^2
= 12 % of the area, and what the longer side is rounded by."""


def sizes_of_aspect(aspect: tuple[int, int], step: int | None = None) -> list[tuple[int, int]]:
    """Sizes (height, width) [pixels] of an aspect ratio, by rising shorter side; at least one.

    Parameters
    ----------
    aspect : (int, int)
        Width to height.
    step : int, optional
        Both sides are multiples of it. None: of 64, which Stable Diffusion is used at, while that is at most a 16th of the shorter
        side; of 32, 16 or 8 below: of a small picture a step of 64 is a quarter of the area.

    Examples
    --------
    >>> [size for size in sizes_of_aspect((3, 2)) if 480 <= size[0] <= 576]
    [(480, 720), (496, 736), (512, 768), (544, 832), (576, 864)]
    >>> sizes_of_aspect((9, 16), 64)[6:8]
    [(768, 448), (896, 512)]
    """
    across, down = aspect
    short, long = sorted(aspect)
    found: list[tuple[int, int]] = []
    for side, each in _shorter_sides(step):
        other = max(round(side // each * long / short), 1) * each
        if found and other > MAX_SIDE:
            break
        found.append((side, other) if down <= across else (other, side))
    return found


@cache
def _shorter_sides(step: int | None) -> list[tuple[int, int]]:
    """Shorter sides that are tried, with the multiples that the longer side is rounded to [pixels]."""
    found: list[tuple[int, int]] = []
    side = -(-MIN_SIDE // (step or VAE_SCALE)) * (step or VAE_SCALE)
    while side <= MAX_SIDE:
        found.append((side, step or next((s for s in STEPS if s * SHARE <= side), VAE_SCALE)))
        side += found[-1][1]
    return found


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

    def run(batch: int) -> Workload:
        return Workload(height, width, prompt_length, batch, **options)

    table = run(1).to_dict() | {"batch_size": np.arange(1, MAX_BATCH_SIZE + 1)}
    search = Search(predictor, parse_bytes(memory), metric, level, lambda k: run(k + 1), table)
    sure, likely = search.sure_and_likely(f"not even one image of {height}x{width}", lambda k: str(k + 1))
    return LargestBatch(sure + 1, likely + 1)


@dataclass(frozen=True)
class Search:
    """The largest k whose run fits, at some levels.

    What is needed rises with k but for drops: past 2^31 elements convolutions are split, and how blocks are packed jumps from
    one size to the next. So the search goes down from the last; but for those that are beyond the limit by far, which a table
    of all tells at once.

    Parameters
    ----------
    model : Model
    limit_bytes : float
    metric, level
        As in `sdfit.predict.verdict.bound`.
    run : callable
        The workload of a k, counted from 0.
    table : mapping
        The workloads of all k, in columns.
    """

    model: Model
    limit_bytes: float
    metric: str | None
    level: float | None
    run: Callable[[int], Workload]
    table: Mapping[str, Any]

    def sure_and_likely(self, what: str, words: Callable[[int], str]) -> tuple[int, int]:
        """The largest k whose bound at the level is within the limit, and the largest whose bound at `LIKELY` is.

        Raises
        ------
        NothingFits
            If there is none that is sure; ``what`` says of what, ``words`` names a k.
        """
        low = LIKELY if self.level is None else min(check_level(self.level), LIKELY)
        certain, likely = set(self.open(self.level)), None
        sure = None
        # asked for less than the level, what is sure is at least as likely: what is not likely is not asked for more
        for index in self.open(low):
            if likely is None and self.is_sure(index, low):
                likely = index
            if likely is not None and index in certain and self.is_sure(index, self.level):
                sure = index
                break
        if sure is None:
            may = "" if likely is None else f"; likely to fit: {words(likely)}"
            raise NothingFits(f"{what} is sure to fit {format_bytes(self.limit_bytes)}{may}", likely=likely)
        return sure, max(sure, likely or sure)

    def largest(self, level: float | None) -> int | None:
        """The largest k whose bound at a level is within the limit."""
        return next((index for index in self.open(level) if self.is_sure(index, level)), None)

    def open(self, level: float | None) -> list[int]:
        """Those that are not beyond the limit by far, from the largest on."""
        metric, at = metric_and_level(self.model, self.metric, level)
        beyond = self.model.beyond(self.table, self.limit_bytes, metric=metric, level=at)
        return [int(index) for index in reversed(np.flatnonzero(~beyond).tolist())]

    def is_sure(self, index: int, level: float | None) -> bool:
        """Whether the bound of one at a level is within the limit."""
        metric, at = metric_and_level(self.model, self.metric, level)
        return self.model.is_sure(self.run(index), self.limit_bytes, metric=metric, level=at)


def _pair(aspect: Any) -> tuple[Any, Any]:
    try:
        across, down = aspect
    except (TypeError, ValueError):
        raise InvalidWorkload(
            f"aspect is {shown(aspect)}; it must be two whole numbers such as (3, 2)", given=aspect
        ) from None
    return across, down
