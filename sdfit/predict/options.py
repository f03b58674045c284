"""What to change so that a run fits: the cheapest sufficient changes first.

All combinations of the options that save memory are tried, with batches split and sizes as last resorts. What a change
costs is a rank, not a time: `COSTS` states it. No time is known that was measured on all cards. What a dearer value of a
field does is not named where a cheaper one does it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from sdfit.errors import UnknownVariant
from sdfit.predict.prediction import Prediction
from sdfit.predict.verdict import Model, bound, metric_and_level
from sdfit.units import parse_bytes
from sdfit.workload import VAE_SCALE, Workload

COSTS: Mapping[str, tuple[int, str]] = {
    # field or value   rank  what it costs
    "attention":        (0, "nothing: fused attention is also faster"),
    "vae_slicing":      (1, "the VAE takes the images one by one"),
    "batch_size":       (2, "more calls for the same images"),
    "vae_tiling":       (3, "the VAE works in tiles: slower, seams may show"),
    "safety_checker":   (5, "no check of what comes out"),
    "dtype":            (6, "half the precision; also faster"),
    "offload":          (8, "weights travel to the card for each call"),
    "vae":              (12, "another VAE, with less detail"),
    "offload=sequential": (20, "by far the slowest: weights travel module by module in every step; published: 2.4 times as "
                               "long on a GTX 1070, 4.4 times on a P100"),
    "offload=group_leaf": (22, "weights travel module by module in every step, the checker's too: expect it as slow as "
                               "sequential offload, nobody published its time"),
    "height":           (40, "a smaller picture"),
    "width":            (0, "a smaller picture"),
}  # fmt: skip
"""What each change costs, as ranks that add up: less is tried first. A judgement, not a measurement; the times are those of
``data/published/times.csv``, of the whole call at 512x512 beside the same without offload."""
SAVING: tuple[tuple[str, Any], ...] = (
    ("attention", "sdpa"),
    ("vae_slicing", True),
    ("vae_tiling", True),
    ("safety_checker", False),
    ("dtype", "float16"),
    ("offload", "model"),
    ("offload", "sequential"),
    ("offload", "group_leaf"),
    ("vae", "tiny"),
)
"""The values of each field that take less memory, the cheapest first; but for bfloat16, which takes no more than float16."""


def cost_of(name: str, value: Any) -> tuple[int, str]:
    """The rank of a change, and what it costs in words.

    Examples
    --------
    >>> cost_of("offload", "model")[0] < cost_of("offload", "sequential")[0] < cost_of("offload", "group_leaf")[0]
    True
    """
    return COSTS.get(f"{name}={value}") or COSTS[name]


def no_dearer(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a change touches no field that another does not, and none with a dearer value.

    Examples
    --------
    >>> no_dearer({"offload": "model"}, {"offload": "sequential", "vae_tiling": True})
    True
    """
    return all(
        name in other and (value == other[name] or cost_of(name, value)[0] < cost_of(name, other[name])[0])
        for name, value in one.items()
    )


@dataclass(frozen=True, slots=True)
class Option:
    """A change that makes a run fit.

    Parameters
    ----------
    change : dict
        Fields of `sdfit.workload.Workload` and their new values; none of them could be left out.
    prediction : Prediction
        Of the changed run, of the metric that decides.
    saved_bytes : float
        How much less the changed run needs at most.
    """

    change: dict[str, Any]
    prediction: Prediction
    saved_bytes: float

    @property
    def upper_bytes(self) -> float:
        """What the changed run needs at most [bytes]."""
        return self.prediction.upper

    @property
    def cost(self) -> int:
        """The ranks of `COSTS`, added up."""
        return sum(cost_of(*item)[0] for item in self.change.items())

    @property
    def costs(self) -> list[str]:
        """What it costs, in words, each once."""
        return list(dict.fromkeys(cost_of(*item)[1] for item in self.change.items()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, amounts in bytes."""
        return {
            "change": self.change,
            "upper_bytes": round(self.upper_bytes),
            "saved_bytes": round(self.saved_bytes),
            "costs": self.costs,
        }


def options_that_fit(
    predictor: Model,
    workload: Workload,
    *,
    memory: str | float,
    metric: str | None = None,
    level: float | None = None,
) -> list[Option]:
    """Which changes make a workload fit, the cheapest first by `COSTS`.

    Parameters
    ----------
    memory : str or float
        ``"15 GiB"``, or bytes.
    metric, level
        As in `sdfit.predict.verdict.bound`.

    Returns
    -------
    list of Option
        Empty if it fits as it is, or nothing helps. Variants that the model does not know are left out.
    """
    limit = parse_bytes(memory)
    search = _Search(predictor, workload, limit, metric, level)
    asked = search.predict({})
    if asked is None or asked.upper <= limit:
        return []
    now = asked.upper
    found: list[Option] = []
    for change in search.changes():
        # what contains a sufficient change has something that could be left out
        if not any(no_dearer(option.change, change) for option in found):
            sufficient = search.sufficient(change, found)
            if sufficient is not None:
                prediction = search.predict(sufficient)
                if prediction is not None and prediction.upper <= min(limit, now):
                    found.append(Option(sufficient, prediction, now - prediction.upper))
    return sorted(found, key=lambda option: (option.cost, len(option.change), option.upper_bytes))


class _Search:
    """Predictions of one workload with changes: quickly whether they suffice, and then the number that they get when asked about."""

    def __init__(
        self, predictor: Model, workload: Workload, limit: float, metric: str | None, level: float | None
    ) -> None:
        self.predictor, self.workload, self.limit, self.metric, self.level = predictor, workload, limit, metric, level

    def predict(self, change: Mapping[str, Any]) -> Prediction | None:
        """The changed run; None if the model does not know it."""
        try:
            return bound(self.predictor, replace(self.workload, **change), self.metric, self.level)
        except UnknownVariant:
            return None

    def fits(self, change: Mapping[str, Any]) -> bool:
        """Whether the changed run fits."""
        metric, level = metric_and_level(self.predictor, self.metric, self.level)
        try:
            return self.predictor.is_sure(replace(self.workload, **change), self.limit, metric=metric, level=level)
        except UnknownVariant:
            return False

    def changes(self) -> Iterator[dict[str, Any]]:
        """All combinations of single changes, the cheap before the dear, none before a part of it; last a smaller size."""
        w = self.workload
        single = [(name, value) for name, value in SAVING if getattr(w, name) != value]
        if w.dtype == "bfloat16" or self.predictor.wrong_half:
            single = [(name, value) for name, value in single if name != "dtype"]
        every = [
            dict(some)
            for count in range(len(single) + 1)
            for some in combinations(single, count)
            if len(dict(some)) == count  # one value a field
        ]
        yield from sorted(every, key=lambda change: (len(change), sum(cost_of(*item)[0] for item in change.items())))
        size = self._smaller_size()
        if size is not None:
            yield size

    def sufficient(self, change: dict[str, Any], found: list[Option]) -> dict[str, Any] | None:
        """The change, if it suffices; else with the largest smaller batch with which it does."""
        if change and self.fits(change):
            return change
        batch = self.workload.batch_size
        if batch == 1 or "height" in change or not self.fits(change | {"batch_size": 1}):
            return None
        most = 1
        for parts in range(2, batch):  # as few calls as possible
            smaller = -(-batch // parts)
            if smaller <= most:
                break
            if self.fits(change | {"batch_size": smaller}):
                most = smaller
                break
        split = change | {"batch_size": most}
        # if fewer changes allow the same batch, some of these could be left out
        fewer = (option.change for option in found if option.change.get("batch_size", 0) >= most)
        return (
            None
            if any(no_dearer({n: v for n, v in other.items() if n != "batch_size"}, change) for other in fewer)
            else split
        )

    def _smaller_size(self) -> dict[str, Any] | None:
        """The largest size of the same shape that fits, in steps of a latent along the shorter side."""
        w = self.workload
        short, long = sorted((w.effective_height, w.effective_width))

        def scaled(side: int) -> dict[str, Any]:
            other = round(side * long / short / VAE_SCALE) * VAE_SCALE
            return (
                {"height": side, "width": other}
                if w.effective_height <= w.effective_width
                else {"height": other, "width": side}
            )

        low, high = 64 // VAE_SCALE, short // VAE_SCALE - 1
        if high < low or not self.fits(scaled(low * VAE_SCALE)):
            return None
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits(scaled(middle * VAE_SCALE)) else (low, middle - 1)
        while low * VAE_SCALE > 64:  # one in a hundred bounds of the equation is too low
            asked = self.predict(scaled(low * VAE_SCALE))
            if asked is not None and asked.upper <= self.limit:
                break
            low -= 1
        return scaled(low * VAE_SCALE)
