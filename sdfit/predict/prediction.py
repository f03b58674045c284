"""A prediction: a float of bytes that knows its interval, the stage that sets the peak, and what it is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from sdfit.equation.sizes import Sizes
from sdfit.predict.artifact import Artifact
from sdfit.predict.conformal import Packing
from sdfit.workload import VariantKey, Workload, effective

BEYOND = "beyond allocated"
"""What a breakdown calls the part of a metric that is not allocated memory."""


class Basis(Protocol):
    """What a prediction rests on: a `sdfit.predict.variant.Variant`, or a run that was simulated."""

    artifact: Artifact
    key: VariantKey
    slicing: bool
    tiling: bool

    def stage_peaks(self, sizes: Sizes) -> dict[str, float]:
        """The peak of each stage [bytes], resident weights included."""

    def breakdown(self, sizes: Sizes, stage: str) -> dict[str, float]:
        """What a stage is made of [bytes]."""

    def stretch(self, sizes: Sizes) -> Any:
        """How far outside the known domain some sizes lie; 1 inside."""

    def standing(self, peaks: Mapping[str, float], sizes: Sizes) -> tuple[int, float]:
        """The place of its scores, and what they are in units of [bytes]."""

    def knows(self, metric: str, code: int) -> bool:
        """Whether the scores are those of runs of its own kind."""

    def packing(self, metric: str, code: int) -> Packing | None:
        """What may lie between live memory and the metric, where no runs of its own kind tell it; otherwise None."""

    def packed_unit(self, peaks: Mapping[str, Any], sizes: Sizes) -> Any:
        """What that is in units of [bytes]."""

    def quantile(self, metric: str, code: int, level: float, *, upper: bool) -> float:
        """How far above a prediction its one-sided bound lies, or below it, in those units."""

    def chance(self, peaks: Mapping[str, Any], sizes: Sizes, metric: str, spare_bytes: float, level: float) -> float:
        """The chance that a run needs no more than ``spare_bytes`` above its prediction."""


class Interval(NamedTuple):
    """A two-sided prediction interval [bytes]."""

    low: float
    high: float


class Prediction(float):
    """Bytes of one metric at its peak, with what it rests on. Frozen; pickles and copies whole.

    Parameters
    ----------
    value : float
        [bytes]
    variant : Basis
    workload : Workload, or tuple of its numbers
        The variant's key has the other fields.
    metric : str
    level : float
        Of ``interval`` and ``upper``.
    """

    __slots__ = ("_facts", "_known")
    _facts: tuple[Basis, Workload | tuple[Any, ...], str, float]
    _known: dict[str, Any]

    def __new__(
        cls, value: float, variant: Basis, workload: Workload | tuple[Any, ...], metric: str, level: float
    ) -> Prediction:
        """Make one; a tuple of numbers becomes a Workload when it is first asked for."""
        made = float.__new__(cls, value)
        _put_facts(made, (variant, workload, metric, level))
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Prediction is frozen: '{name}' cannot be set; call f again with other arguments")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Prediction is frozen: '{name}' cannot be deleted")

    def __reduce__(self) -> tuple[Any, ...]:
        return (Prediction, (float(self), *self._facts))

    def __copy__(self) -> Prediction:
        return self

    def __deepcopy__(self, memo: Any) -> Prediction:
        return self

    @property
    def metric(self) -> str:
        """Of what it is the peak: allocated, reserved, device or required."""
        return self._facts[2]

    @property
    def level(self) -> float:
        """Of ``interval`` and ``upper``."""
        return self._facts[3]

    @property
    def provenance(self) -> str:
        """What the numbers rest on: measured, published, traced."""
        return self._facts[0].artifact.provenance

    @property
    def workload(self) -> Workload:
        """What was asked for."""
        variant, given = self._facts[:2]
        if isinstance(given, Workload):
            return given
        fields: tuple[Any, ...] = (*given, *variant.key)
        return Workload(*fields)

    @property
    def stage_peaks(self) -> dict[str, float]:
        """The peak of allocated memory in each stage [bytes], resident weights included."""
        return dict(self._told()["peaks"])

    @property
    def stage(self) -> str:
        """The stage that sets the peak of allocated memory."""
        peaks: dict[str, float] = self._told()["peaks"]
        return max(peaks, key=peaks.__getitem__)

    @property
    def breakdown(self) -> dict[str, float]:
        """What this metric is made of [bytes]; adds up to it.

        The weights, each term of the stage that sets the peak of allocated memory and, for another metric, what lies
        beyond allocated memory: the allocator's segments, for ``device`` the CUDA context too.
        """
        variant, _, metric, _ = self._facts
        parts = variant.breakdown(self._told()["sizes"], self.stage)
        if metric != "allocated":
            parts[BEYOND] = self - sum(parts.values())
        return parts

    @property
    def replayed(self) -> bool:
        """Whether the run was simulated for this number (see `sdfit.predict.replayed`)."""
        return False

    @property
    def extrapolated(self) -> bool:
        """Whether the workload lies outside the swept domain; the interval is then wider, and a guess."""
        return bool(self._facts[0].stretch(self._told()["sizes"]) > 1)

    @property
    def of_its_kind(self) -> bool:
        """Whether its interval rests on held-out runs of its own kind, and it lies inside the swept domain.

        Otherwise it rests on runs that were taken to err alike, and some do not: slices of the VAE under model offload
        require a quarter more than the equation says.
        """
        variant, _, metric, _ = self._facts
        return not self.extrapolated and variant.knows(metric, self._standing()[0])

    @property
    def interval(self) -> Interval:
        """Two-sided prediction interval at ``level``."""
        each = (1 + self._facts[3]) / 2
        return Interval(max(self - self._margin(each, upper=False), 0.0), self + self._margin(each, upper=True))

    @property
    def upper(self) -> float:
        """One-sided upper bound at ``level``."""
        return self + self._margin(self.level, upper=True)

    @property
    def lower(self) -> float:
        """One-sided lower bound at ``level``."""
        return max(self - self._margin(self.level, upper=False), 0.0)

    def chance_within(self, memory_bytes: float) -> float:
        """The conformal chance that the run needs no more than some memory, from the scores that support ``level``."""
        variant, _, metric, level = self._facts
        told = self._told()
        packing = variant.packing(metric, self._standing()[0])
        if packing is not None:
            live, unit = self._packed()
            return packing.chance((memory_bytes - live) / unit)
        return variant.chance(told["peaks"], told["sizes"], metric, memory_bytes - self, level)

    @property
    def supported(self) -> float:
        """The level that its bounds hold at: the one asked for, or what its scores support where they are too few for that.

        The furthest of n runs bounds the next one with a probability of n / (n + 1), and not more.
        """
        return min(self.level, self.chance_within(math.inf))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, amounts in bytes; an infinite bound is None."""
        low, high = self.interval
        return {
            "workload": self.workload.to_dict(),
            "metric": self.metric,
            f"{self.metric}_bytes": round(self),
            "level": self.level,
            "interval_bytes": [round(low), _whole(high)],
            "upper_bytes": _whole(self.upper),
            "stage": self.stage,
            "stage_peaks_bytes": {k: round(v) for k, v in self.stage_peaks.items()},
            "breakdown_bytes": {k: round(v) for k, v in self.breakdown.items()},
            "extrapolated": self.extrapolated,
            "replayed": self.replayed,
            "provenance": self.provenance,
        }

    def _margin(self, level: float, *, upper: bool) -> float:
        variant, _, metric, _ = self._facts
        code, unit = self._standing()
        packing = variant.packing(metric, code)
        if packing is None:
            return variant.quantile(metric, code, level, upper=upper) * unit
        live, unit = self._packed()
        beyond = live + packing.end(level, upper=upper) * unit - self
        return max(beyond if upper else -beyond, 0.0)

    def _packed(self) -> tuple[float, float]:
        """The peak of allocated memory, and what packing adds is in units of [bytes]."""
        told = self._told()
        return max(told["peaks"].values()), self._facts[0].packed_unit(told["peaks"], told["sizes"])

    def _standing(self) -> tuple[int, float]:
        told = self._told()
        standing: tuple[int, float] | None = told.get("standing")
        if standing is None:
            standing = told["standing"] = self._facts[0].standing(told["peaks"], told["sizes"])
        return standing

    def _told(self) -> dict[str, Any]:
        """Sizes and stage peaks, worked out once."""
        try:
            return self._known
        except AttributeError:
            variant, given, _, _ = self._facts
            if isinstance(given, Workload):
                sizes = Sizes.of_workload(given)
            else:  # already found valid
                sizes = Sizes.of(*effective(*given), variant.slicing, variant.tiling)
            found = {"sizes": sizes, "peaks": variant.stage_peaks(sizes)}
            _put_known(self, found)
            return found


# the slots' own setters, which `__setattr__` keeps from everybody else
_put_facts = Prediction._facts.__set__  # type: ignore[attr-defined]
_put_known = Prediction._known.__set__  # type: ignore[attr-defined]
_new = float.__new__


def predicted(value: float, *facts: Any) -> Prediction:
    """A `Prediction` of the same arguments, in a third of the time: past the call of a class."""
    made = _new(Prediction, value)
    _put_facts(made, facts)
    return made


def _whole(value: float) -> int | None:
    return round(value) if math.isfinite(value) else None
