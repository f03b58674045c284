"""Interval half-widths from conformal scores.

A score is how far a held-out run lay from its prediction, in units of the predicted activations:
``(actual - predicted) / activation``. With n exchangeable scores the k-th smallest of them, k = ceil((n + 1)·level),
bounds a new run's score with probability at least ``level``, whatever the distribution (Vovk et al. 2005; Lei et al.
2018). Where k > n the scores cannot support the level and the bound is infinite: saying so is the honest answer.

What it does not know: runs outside the swept domain are not exchangeable with those inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sdfit.errors import InvalidWorkload

LEAST_ACTIVATION_BYTES = 1 << 20
"""Floor of the scale of a score: activations below it would make any error look large."""
Rule = Callable[[Sequence[float], float], float]
"""`half_width` or `upper_width`."""


def scale(peaks: Mapping[str, Any], weights: Mapping[str, float]) -> Any:
    """What a score is in units of [bytes]: the largest activations of any stage, at least 1 MiB; numbers or arrays.

    Activations are what lies above the weights that are on the card in that stage: under offload a stage whose weights
    set the peak may have next to none.

    Examples
    --------
    >>> scale({"unet": 9 << 20, "vae": 8 << 20}, {"unet": 8 << 20, "vae": 5 << 20}) >> 20
    3
    """
    above = [peaks[stage] - weights[stage] for stage in peaks]
    if not any(isinstance(a, np.ndarray) for a in above):
        return max(LEAST_ACTIVATION_BYTES, *above)
    return np.maximum.reduce([np.maximum(a, LEAST_ACTIVATION_BYTES) for a in above])


def relative_width(scores: Mapping[str, Sequence[float]], families: Iterable[str], level: float, rule: Rule) -> float:
    """The width by the scores of the first family that has enough of them for the level; infinite if none has.

    Examples
    --------
    >>> relative_width({"": [0.1, 0.2, 0.3, 0.4]}, ("sdpa", ""), 0.8, upper_width)
    0.4
    """
    widths = (rule(scores.get(name, ()), level) for name in families)
    return next((width for width in widths if math.isfinite(width)), math.inf)


def check_level(level: float) -> float:
    """Check that a level lies strictly between 0 and 1."""
    if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level < 1:
        raise InvalidWorkload(f"level is {level!r}; it must lie between 0 and 1, for example 0.95", given=level)
    return float(level)


def quantile(sorted_scores: Sequence[float], level: float) -> float:
    """The conformal quantile of scores in ascending order.

    Examples
    --------
    >>> quantile([0.1, 0.2, 0.3, 0.4], 0.8)
    0.4
    >>> quantile([0.1, 0.2, 0.3, 0.4], 0.95)
    inf
    """
    # the subtraction undoes the rounding in products such as 20 * 0.95 = 19.000000000000004
    rank = math.ceil((len(sorted_scores) + 1) * level - 1e-9)
    return sorted_scores[rank - 1] if rank <= len(sorted_scores) else math.inf


def half_width(sorted_scores: Sequence[float], level: float) -> float:
    """The two-sided half-width, relative to the activations.

    Examples
    --------
    >>> half_width([-0.4, -0.1, 0.2, 0.3], 0.8)
    0.4
    """
    return quantile(sorted(abs(s) for s in sorted_scores), level)


def upper_width(sorted_scores: Sequence[float], level: float) -> float:
    """The one-sided bound above the prediction, relative to the activations; never below the prediction itself.

    Examples
    --------
    >>> upper_width([-0.4, -0.3, -0.2, -0.1], 0.8)
    0.0
    """
    return max(quantile(sorted_scores, level), 0.0)
