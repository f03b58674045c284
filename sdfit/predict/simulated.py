"""A run that was simulated, and what is predicted from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdfit.equation.metrics import REPLAYED_FAMILY
from sdfit.equation.sizes import Sizes
from sdfit.predict import conformal
from sdfit.predict.artifact import Artifact
from sdfit.predict.prediction import Prediction
from sdfit.predict.variant import Variant
from sdfit.workload import VariantKey, Workload

CAPS = ("required", "minimum")
"""Those under which PyTorch does without an optional workspace."""
ACTIVATIONS = "activations"
"""What a breakdown calls all that is no resident weight, where no equation tells it apart."""


class Run:
    """A run that was simulated: what its prediction has in place of a `Variant`.

    Its interval rests on what published whole runs lay beside their traces alone, the furthest of them where there are too
    few for the level.

    Parameters
    ----------
    artifact : Artifact
    key : tuple
        Of the variant.
    peaks : mapping
        Stage -> its peak [bytes].
    weights : mapping
        Stage -> the weights that are on the card in it [bytes].
    parts : mapping, optional
        What the highest stage is made of [bytes]; None: its weights and all else.
    """

    def __init__(
        self,
        artifact: Artifact,
        key: VariantKey,
        peaks: Mapping[str, float],
        weights: Mapping[str, int],
        parts: Mapping[str, float] | None = None,
    ) -> None:
        self.artifact, self.key, self._peaks, self._parts = artifact, key, dict(peaks), parts
        _, _, _, self.slicing, self.tiling, *_ = key
        self._weights = weights

    @classmethod
    def of(cls, variant: Variant, workload: Workload) -> Run:
        """A run of which the equation knows the stages."""
        sizes = Sizes.of_workload(workload)
        peaks = variant.stage_peaks(sizes)
        parts = variant.breakdown(sizes, max(peaks, key=peaks.__getitem__))
        return cls(variant.artifact, variant.key, peaks, variant.weights, parts)

    def stage_peaks(self, sizes: Sizes) -> dict[str, float]:
        """The peak of each stage [bytes]."""
        return dict(self._peaks)

    def breakdown(self, sizes: Sizes, stage: str) -> dict[str, float]:
        """What a stage is made of [bytes]."""
        if self._parts is not None:
            return dict(self._parts)
        weights = float(self._weights[stage])
        return {"weights": weights, ACTIVATIONS: self._peaks[stage] - weights}

    def stretch(self, sizes: Sizes) -> float:
        """A simulation knows no swept domain."""
        return 1.0

    def standing(self, peaks: Mapping[str, float], sizes: Sizes) -> tuple[int, float]:
        """No place of its own; bounds are in bytes."""
        return 0, 1.0

    def knows(self, metric: str, code: int) -> bool:
        """A simulation knows no kinds."""
        return True

    def packing(self, metric: str, code: int) -> None:
        """A simulation knows how its blocks pack."""

    def packed_unit(self, peaks: Mapping[str, Any], sizes: Sizes) -> Any:
        """Of nothing."""

    def quantile(self, metric: str, code: int, level: float, *, upper: bool) -> float:
        """How far above the simulated number its one-sided bound lies, or below it [bytes]."""
        scores = self._scores(metric)
        level = min(level, conformal.supported_level(scores))
        return max(scores.quantile(level) if upper else -scores.lower_quantile(level), 0.0) * self._unit(metric)

    def chance(self, peaks: Mapping[str, Any], sizes: Sizes, metric: str, spare_bytes: float, level: float) -> float:
        """The chance that the run needs no more than ``spare_bytes`` above the simulated number."""
        return self._scores(metric).share_below(spare_bytes / self._unit(metric))

    def _unit(self, metric: str) -> float:
        """What scores are in units of [bytes]."""
        if metric not in CAPS:
            return float(conformal.scale(self._peaks, self._weights))
        above = max(peak - self._weights[stage] for stage, peak in self._peaks.items())
        return float(conformal.scale_beside_trace(above))

    def _scores(self, metric: str) -> conformal.Scores:
        """Of published runs: all of them, and of caps those that no optional workspace is in."""
        every = self.artifact.scores
        found = every[metric][REPLAYED_FAMILY] if metric in CAPS else every["allocated"][""]
        return conformal.Scores.read(found["count"], found["values"])


class ReplayedPrediction(Prediction):
    """A prediction whose value is a simulated run's (see `Run`)."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return (ReplayedPrediction, (float(self), *self._facts))

    @property
    def replayed(self) -> bool:
        """Yes."""
        return True
