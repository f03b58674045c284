"""Intervals, bounds and chances from conformal scores.

A score is how far a held-out run lay from its prediction, in units of `scale`: ``(actual - predicted) / scale``. With n
exchangeable scores the k-th smallest of them, k = ceil((n + 1)·level), bounds a new run's score with probability at
least ``level``, whatever the distribution (Vovk et al. 2005; Lei et al. 2018). Where k > n the scores cannot support
the level and the bound is infinite: saying so is the honest answer.

`Scores` keeps a sample as some of its order statistics, many in the tails and few in the middle. Where the wanted one
is not kept, the next further out stands for it, so a bound is never narrower than the whole sample's.

What it does not know: runs outside the swept domain are not exchangeable with those inside.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sdfit.errors import InvalidWorkload, shown

LEAST_SCALE_BYTES = 1 << 20
"""Floor of the scale of a score: activations below it would make any error look large."""
WEIGHTS_SHARE = 1 / 2
"""How much of the weights counts in the scale. Of what published runs lie beside their traces, a few MB stay the same
whatever the size: the order in which the components were loaded, and rounding in print."""
PACKED_SHARE = 1 / 8
"""The same of what packing adds: a stage whose weights come and go leaves some of their segments unused."""
LEAST_LEVEL = 1e-6
"""Below it the arithmetic of ranks ends, and a bound would come out as wide as the sample."""
KEPT = 6
"""Order statistics kept of each tail in full; further in, the ranks grow by half each."""


class Scores(NamedTuple):
    """The conformal scores of a family of runs.

    Parameters
    ----------
    size : int
        How many there are.
    ranks : sequence of int
        Of the scores that are kept, from 1 to ``size``, ascending.
    values : sequence of float
        Those scores, ascending.
    """

    size: int
    ranks: Sequence[int]
    values: Sequence[float]

    @classmethod
    def of(cls, scores: Any) -> Scores:
        """Keep a sample of scores, to six digits.

        Examples
        --------
        >>> Scores.of([0.25, -1.0])
        Scores(size=2, ranks=[1, 2], values=[-1.0, 0.25])
        >>> len(Scores.of(range(100_000)).ranks)
        58
        """
        ranked = np.sort(np.asarray(scores, dtype=float).ravel())
        ranks = kept_ranks(len(ranked))
        return cls(len(ranked), ranks, [float(f"{ranked[k - 1]:.6g}") for k in ranks])

    @classmethod
    def read(cls, count: int, values: Sequence[float]) -> Scores:
        """Take scores from an artifact, which holds no ranks: they follow from the count."""
        return cls(count, kept_ranks(count), values)

    def quantile(self, level: float) -> float:
        """The bound above which a new score lies with a probability of at most 1 - level.

        Examples
        --------
        >>> four = Scores.of([0.1, 0.2, 0.3, 0.4])
        >>> four.quantile(0.8), four.quantile(0.95)
        (0.4, inf)
        """
        # the subtraction undoes the rounding in products such as 20 * 0.95 = 19.000000000000004
        rank = max(math.ceil((self.size + 1) * level - 1e-9), 1)
        return self.values[bisect_left(self.ranks, rank)] if rank <= self.size else math.inf

    def lower_quantile(self, level: float) -> float:
        """The bound below which a new score lies with a probability of at most 1 - level.

        Examples
        --------
        >>> Scores.of([0.1, 0.2, 0.3, 0.4]).lower_quantile(0.8)
        0.1
        """
        rank = min(math.floor((self.size + 1) * (1 - level) + 1e-9), self.size)
        return self.values[bisect_right(self.ranks, rank) - 1] if rank >= 1 else -math.inf

    def share_below(self, score: float) -> float:
        """The chance that a new score is at most this one: the least that the sample allows.

        Examples
        --------
        >>> Scores.of([0.1, 0.2, 0.3, 0.4]).share_below(0.3)
        0.6
        """
        kept = bisect_right(self.values, score)
        return (self.ranks[kept - 1] if kept else 0) / (self.size + 1)


class Packing(NamedTuple):
    """What the allocator adds to live memory, for a kind of run that was never seen: in units of `scale` with `PACKED_SHARE`.

    Each kind that was seen counts once, with the run that needed most of it, and the one that needed least: a new kind is one
    draw of kinds. At a level that so few do not reach the furthest of them stands. ``rough``: how much less, and more, live
    memory may be than the equation says.
    """

    least: Scores
    most: Scores
    rough: tuple[float, float] = (0.0, 0.0)

    def end(self, level: float, *, upper: bool) -> float:
        """The one-sided bound of what is added.

        Examples
        --------
        >>> Packing(Scores.of([0.0, 0.1]), Scores.of([0.2, 0.5])).end(0.99, upper=True)
        0.5
        """
        level = min(level, supported_level(self.most))
        return self.most.quantile(level) + self.rough[1] if upper else self.least.lower_quantile(level) - self.rough[0]

    def chance(self, added: float) -> float:
        """The chance that no more than so much is added."""
        return self.most.share_below(added - self.rough[1])


NONE = Scores(0, (), ())
"""Of a family without scores."""


def kept_ranks(count: int) -> list[int]:
    """Ranks from 1 to ``count``: the first and last `KEPT`, and towards the middle ever fewer.

    Examples
    --------
    >>> kept_ranks(30)
    [1, 2, 3, 4, 5, 6, 9, 13, 15, 16, 18, 22, 25, 26, 27, 28, 29, 30]
    """
    half = (count + 1) // 2
    below = list(range(1, min(KEPT, half) + 1))
    while below and below[-1] < half:
        below.append(min(below[-1] + max(below[-1] // 2, 1), half))
    return sorted({*below, *(count + 1 - rank for rank in below)})


def scale(
    peaks: Mapping[str, Any], weights: Mapping[str, float], stretch: Any = 1.0, share: float = WEIGHTS_SHARE
) -> Any:
    """What a score is in units of [bytes]: the largest activations of any stage and a share of its weights.

    Activations are what lies above the weights that are on the card in that stage: under offload a stage whose weights
    set the peak may have next to none. ``stretch`` widens them outside the swept domain; weights are what they are.

    Examples
    --------
    >>> scale({"unet": 9 << 20, "vae": 8 << 20}, {"unet": 8 << 20, "vae": 4 << 20}) / 2**20
    6.0
    """
    above = []
    for stage, peak in peaks.items():
        resident = weights[stage]
        above.append((peak - resident) * stretch + share * resident)
    if not isinstance(above[0], np.ndarray):
        return max(LEAST_SCALE_BYTES, *above)
    return np.maximum.reduce([np.maximum(a, LEAST_SCALE_BYTES) for a in above])


STAYS_BYTES = 8 << 30
"""What a published whole run needs beside its trace stays the same, as far as the rows say; that it is twice as much where the
activations are so many is a little above the upper 95 % limit of its growth (`sdfit.study.comparison.residuals.growth`)."""


def scale_beside_trace(activation_bytes: Any) -> Any:
    """What the score of a run that was simulated is in units of [bytes].

    Examples
    --------
    >>> scale_beside_trace(5 << 30) / 2**30
    13.0
    """
    return STAYS_BYTES + activation_bytes


def best(scores: Mapping[str, Scores], families: Iterable[str], level: float) -> Scores:
    """The scores of the narrowest family that has enough of them for the level; if none has, those of the last.

    Examples
    --------
    >>> few, many = Scores.of([0.1]), Scores.of([0.1, 0.2, 0.3, 0.4])
    >>> best({"sdpa": few, "": many}, ("sdpa", ""), 0.8).size
    4
    """
    found = NONE
    for name in families:
        found = scores.get(name, found)
        if math.isfinite(found.quantile(level)):
            return found
    return found


def supported_level(scores: Scores) -> float:
    """The highest level that a sample supports; 0 without any.

    Examples
    --------
    >>> supported_level(Scores.of([0.1, 0.2, 0.3]))
    0.75
    """
    return scores.size / (scores.size + 1)


def check_level(level: float) -> float:
    """Check that a level lies strictly between 0 and 1."""
    # by the type itself: what only says that it is a number need not compare as one
    if isinstance(level, bool) or not issubclass(type(level), int | float) or not LEAST_LEVEL <= level < 1:
        raise InvalidWorkload(
            f"level is {shown(level)}; it must lie between 0 and 1, and be {LEAST_LEVEL} at least, for example 0.95",
            given=level,
        )
    return float(level)
