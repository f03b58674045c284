"""The part of an artifact that one variant uses, put together: weights, coefficients and domain of its stages.

A variant's stages take their coefficients from whatever sweep shared the fields that reach them (see
`sdfit.equation.stages`), so a combination that was never swept as such still has a prediction, if each of its stages
was. The peaks of all stages are one product, a matrix of coefficients with the vector of `sdfit.equation.terms.products`,
for one workload as for a million.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sdfit.equation.metrics import (
    CONSTANT_BYTES,
    DECIDES,
    FEATURE_COLUMNS,
    LEAST,
    NEVER_BELOW_LIVE,
    extent,
    families,
    highest,
    metric_groups,
    metric_value,
    place_codes,
    place_of,
    scalar_code,
    unseen,
)
from sdfit.equation.regimes import edges, regime
from sdfit.equation.sizes import Sizes, domain_columns
from sdfit.equation.stages import beside, resident, stage_key, stages_of
from sdfit.equation.terms import COLUMN, TERMS, products, terms_of
from sdfit.equation.weights import baseline_label, weights_table, with_both_baselines
from sdfit.errors import NeverSwept, UnknownVariant, listed
from sdfit.predict import conformal
from sdfit.predict.artifact import Artifact
from sdfit.workload import SLICES, STREAMED, VARIANT_FIELDS, VariantKey, variant_name, why_it_fails

Array = np.ndarray[Any, np.dtype[np.float64]]

_WIDTH, _empty = len(TERMS), np.empty
_pack = struct.Struct(f"{_WIDTH}d").pack_into
MOST_BELOW = 2.0
"""How much wider an interval becomes below the swept domain, at most."""
SURE = 0.99
"""Level of the bounds that a number keeps to for a kind of run that was never seen, and beyond which none is simulated."""
MOST_NEAR = 3
"""Variants that a message names."""


class Variant:
    """What one variant takes from an artifact.

    Parameters
    ----------
    artifact : Artifact
    key : tuple
        Values of `sdfit.workload.VARIANT_FIELDS`.
    context_bytes : int
        Of the card's CUDA context, which device memory counts where the records hold none of it.

    Attributes
    ----------
    stages : tuple of str
        Those that it runs through, in their order.
    weights : dict
        Stage -> bytes that are resident in it.
    domain : dict
        Column of `domain_columns` -> least and most that every stage was swept at.
    strays : bool
        Whether the equation goes astray outside it, by a half and more: slices of attention, weights that come module by module.

    Raises
    ------
    UnknownVariant
        If diffusers fails on it, with its reason.
    NeverSwept
        If a stage was never swept; names what was.
    """

    def __init__(self, artifact: Artifact, key: VariantKey, context_bytes: int = 0) -> None:
        self.artifact, self.key, self.context_bytes = artifact, key, context_bytes
        fails = why_it_fails(key)
        if fails:
            raise UnknownVariant(fails, variant=key)
        values = dict(zip(VARIANT_FIELDS, key, strict=True))
        self.slicing, self.tiling, self.checked = (
            bool(values[n]) for n in ("vae_slicing", "vae_tiling", "safety_checker")
        )
        self.strays = values["attention"] in SLICES or values["offload"] in STREAMED
        self._one_pass = not (self.slicing or self.tiling)
        self.stages = stages_of(key)
        self.weights = {stage: self._resident(stage, values) for stage in self.stages}
        models = {stage: artifact.stages["|".join(stage_key(stage, key))] for stage in self.stages}
        others = {stage: "|".join(beside(stage_key(stage, key)) or ()) for stage in self.stages}
        self._beside = [stage for stage, other in others.items() if other in artifact.stages]
        lines = [*models.items(), *((stage, artifact.stages[others[stage]]) for stage in self._beside)]
        self._lines = [_Line(stage, model["regimes"], _aligned(model, self.weights[stage])) for stage, model in lines]
        self.domain = _common_domain([model["domain"] for model in models.values()])
        self._metrics = artifact.metrics
        self._edges = edges(self.stages)
        self._matrices: dict[tuple[int, ...], Array] = {}
        self._scores = {
            metric: {name: conformal.Scores.read(found["count"], found["values"]) for name, found in table.items()}
            for metric, table in artifact.scores.items()
        }
        self._quantiles: dict[Any, float] = {}
        self._packings: dict[int, conformal.Packing | None] = {}
        self._groups: dict[tuple[str, int], Mapping[str, Any]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (Variant, (self.artifact, self.key, self.context_bytes))

    def _resident(self, stage: str, values: Mapping[str, Any]) -> int:
        """Bytes of weights in a stage."""
        vae, checker, offload = str(values["vae"]), bool(values["safety_checker"]), str(values["offload"])
        weights = with_both_baselines(
            self.artifact.components.get(weights_table(str(values["dtype"]), str(values["execution"])), {})
        )
        parts = [c for c in resident(stage, offload) if c != "safety_checker" or checker]
        labels = [f"vae/{vae}" if c == "vae" else c for c in parts]
        if offload == "none" and baseline_label(vae, checker) in weights:
            labels = [baseline_label(vae, checker)]
        model = self.artifact.stages.get("|".join(stage_key(stage, self.key)))
        if model is None or any(label not in weights for label in labels):
            raise self._never_swept(f"has no coefficients for {variant_name(self.key)} (its {stage} was never swept)")
        if stage.startswith("vae"):
            # passes over slices alone make D the difference of B·A and m·P: told once these two are
            wanted = {"D"} if self.tiling else {"D", "B·A"} if self.slicing else set()
            if wanted and wanted <= set(model["unidentified"]):
                raise self._never_swept(f"never saw slicing or tiling of the '{vae}' VAE in {values['dtype']}")
        return sum(weights[label] for label in labels)

    def _never_swept(self, what: str) -> NeverSwept:
        name, swept = self.artifact.name, self.artifact.swept
        words = set(variant_name(self.key).split())
        near = sorted(swept, key=lambda other: len(words.symmetric_difference(other.split())))[:MOST_NEAR]
        return NeverSwept(
            f"'{name}' {what}; nearest of the {len(swept)} that were: {listed(near)}; to add it: sdfit sweep --gpu {name} "
            "--grid FILE, then sdfit fit",
            variant=self.key,
            near=near,
        )

    # -- the peaks of the stages --

    def peak(self, height: int, width: int, tokens: int, batch: int, samples: int) -> float:
        """The peak of allocated memory of one workload [bytes], from what it runs as (`sdfit.workload.effective`)."""
        letters: tuple[Any, ...]
        if self._one_pass:  # the common case without a Sizes, which takes a tenth of a call
            A = float(height * width)
            letters = batch, samples, A, tokens, batch, A, 0.0
        else:
            letters = Sizes.of(height, width, tokens, batch, samples, self.slicing, self.tiling)
        found: float = max(self._matrix(*letters).dot(_row(letters)).tolist())
        return found

    def stage_peaks(self, sizes: Sizes) -> dict[str, float]:
        """The peak of each stage of one workload [bytes], resident weights included."""
        values = self._matrix(*sizes).dot(_row(sizes)).tolist()
        found = dict(zip(self.stages, values, strict=False))
        for stage, value in zip(self._beside, values[len(self.stages) :], strict=True):
            found[stage] = max(found[stage], value)
        return found

    def _matrix(self, B: int, n: int, A: int, L: int, m: int, P: int, D: int) -> Array:
        """Coefficients, a row per line, a column per term, weights in the first: those of the sizes' regimes."""
        cell = B, n, m, bisect(self._edges, m * P)
        found = self._matrices.get(cell)
        if found is None:
            sizes = Sizes(B, n, A, L, m, P, D)
            found = self._matrices[cell] = np.array([line.at(sizes) for line in self._lines])
        return found

    def stage_arrays(self, sizes: Sizes) -> dict[str, Array]:
        """The peak of each stage [bytes] for sizes that are arrays."""
        columns = np.empty((len(TERMS), *np.shape(sizes.A)))
        for column, product in zip(columns, products(*sizes), strict=True):
            column[...] = product
        found: dict[str, Array] = {}
        for line in self._lines:
            values = line.along(columns, sizes)
            found[line.stage] = np.maximum(found[line.stage], values) if line.stage in found else values
        return found

    def breakdown(self, sizes: Sizes, stage: str) -> dict[str, float]:
        """The resident weights and each term of a stage [bytes]."""
        parts = [line.at(sizes) * _row(sizes) for line in self._lines if line.stage == stage]
        shares = dict(zip(TERMS, max(parts, key=np.sum).tolist(), strict=True))
        shares["1"] -= self.weights[stage]
        terms = {name: shares[name] for name in terms_of(stage_key(stage, self.key)) if shares[name] > 0}
        return {"weights": float(self.weights[stage])} | terms

    # -- what rests on the peaks --

    def metric(self, peaks: Mapping[str, Any], metric: str, sizes: Sizes) -> Any:
        """A metric from the stage peaks [bytes] of some sizes.

        Raises
        ------
        UnknownVariant
            If the model was fitted on records without that metric.
        """
        if metric == "allocated":
            return highest(peaks)
        if metric == "device" and self._basis(metric) == "reserved":
            return self.metric(peaks, "reserved", sizes) + self.context_bytes
        if metric not in self._metrics:
            raise UnknownVariant(
                f"'{self.artifact.name}' has no '{metric}'; it has: {listed(['allocated', *self._metrics])}",
                metric=metric,
            )
        if isinstance(sizes.A, int):
            return self._one_metric(peaks, metric, sizes)
        found = metric_value(self._metrics[metric], self.key, peaks, self.weights, sizes)
        if metric == DECIDES:
            found = self._within_packing(found, peaks, sizes)
        return np.maximum(found, highest(peaks)) if metric in NEVER_BELOW_LIVE else found

    def _within_packing(self, found: Array, peaks: Mapping[str, Any], sizes: Sizes) -> Array:
        """What a wider group of runs says of a kind that was never seen, within what packing added in any."""
        codes, unit, live = place_codes(peaks, sizes), self.packed_unit(peaks, sizes), highest(peaks)
        for code in np.unique(codes):
            packing = self.packing(DECIDES, int(code))
            if packing is not None:
                least, most = (live + packing.end(SURE, upper=upper) * unit for upper in (False, True))
                found = np.where(codes == code, np.minimum(np.maximum(found, least), most), found)
        return found

    def _one_metric(self, peaks: Mapping[str, float], metric: str, sizes: Sizes) -> float:
        """`metric_value` of one workload, its group looked up once per place."""
        values = list(peaks.values())
        peak = max(values)
        top = values.index(peak)
        code = scalar_code(top, self.stages, sizes)
        group = self._groups.get((metric, code))
        if group is None:
            groups = self._metrics[metric]
            group = next(groups[g] for g in metric_groups(place_of(self.key, code)) if g in groups)
            self._groups[metric, code] = group
        row = group["coef"][bisect(group["edges"], extent(sizes))]
        every, base = products(*sizes), self.weights[self.stages[top]]
        found: float = base + row[0] * CONSTANT_BYTES + row[1] * (peak - base)
        found += sum(c * every[column] for c, column in zip(row[2:], FEATURE_COLUMNS, strict=True) if c)
        packing = self.packing(metric, code)
        if packing is not None:
            unit = self.packed_unit(peaks, sizes)
            found = max(found, peak + packing.end(SURE, upper=False) * unit)
            found = min(found, peak + packing.end(SURE, upper=True) * unit)
        return max(found, peak) if metric in NEVER_BELOW_LIVE else found

    def _basis(self, metric: str) -> str:
        """The metric whose scores a metric takes: simulated records hold no device memory, but reserved memory."""
        return "reserved" if metric == "device" and metric not in self._metrics else metric

    def stretch(self, sizes: Sizes) -> Any:
        """How far outside the swept domain some sizes lie: 1 inside, otherwise the largest ratio to its edge.

        Below the smallest swept size at most `MOST_BELOW`: there activations shrink, and errors with them.
        """
        values = domain_columns(sizes.A, sizes.B, sizes.L)
        above, below = [], []
        for column, (low, high) in self.domain.items():
            value = values[column]
            above.append(value / high)
            below.append(low / value)
        if isinstance(sizes.A, int):
            return max(1.0, min(max(below), MOST_BELOW), *above)
        return np.maximum.reduce([np.ones_like(sizes.A), *(np.minimum(b, MOST_BELOW) for b in below), *above])

    # -- how sure it is --

    def scores(self, metric: str, code: int, level: float) -> conformal.Scores:
        """The conformal scores for a place of `place_codes`: of the narrowest family that supports the level."""
        return conformal.best(self._scores.get(self._basis(metric), {}), families(place_of(self.key, code)), level)

    def knows(self, metric: str, code: int) -> bool:
        """Whether runs at a place of `place_codes` have conformal scores of their own, not those of a wider family alone."""
        return families(place_of(self.key, code))[0] in self._scores.get(self._basis(metric), {})

    def packing(self, metric: str, code: int) -> conformal.Packing | None:
        """What may lie between live memory and a metric at a place, where no runs of its own kind tell it; otherwise None."""
        if metric != DECIDES:
            return None
        if code not in self._packings:
            table = self._scores.get(metric, {})
            place = place_of(self.key, code)
            name = next((n for n in unseen(place) if n in table and not self.knows(metric, code)), None)
            ends = None if name is None else (table[f"{name}|{LEAST}"], table[name])
            self._packings[code] = ends and conformal.Packing(*ends, place.rough)
        return self._packings[code]

    def margins(
        self,
        values: Array,
        peaks: Mapping[str, Array],
        sizes: Sizes,
        metric: str,
        level: float,
        *,
        upper: bool,
        own: bool,
    ) -> Array:
        """How far above predictions their one-sided bounds lie, or below them [bytes].

        ``own``: infinite where it does not `knows` the place, and outside the swept domain.
        """
        unit, live = self._unit(peaks, sizes), highest(peaks)
        packed = self.packed_unit(peaks, sizes) if metric == DECIDES else unit
        codes = place_codes(peaks, sizes)
        found = np.empty(np.shape(codes))
        for code in np.unique(codes):
            mine, packing = codes == code, self.packing(metric, int(code))
            if own and not self.knows(metric, int(code)):
                found[mine] = math.inf
            elif packing is None:
                found[mine] = self.quantile(metric, int(code), level, upper=upper) * unit[mine]
            else:
                beyond = live[mine] + packing.end(level, upper=upper) * packed[mine] - values[mine]
                found[mine] = np.maximum(beyond if upper else -beyond, 0.0)
        return np.where(self.stretch(sizes) > 1, math.inf, found) if own else found

    def chance(self, peaks: Mapping[str, Any], sizes: Sizes, metric: str, spare_bytes: float, level: float) -> float:
        """The chance that a run needs no more than ``spare_bytes`` above its prediction."""
        code, unit = self.standing(peaks, sizes)
        rough = place_of(self.key, code).rough[1]
        return self.scores(metric, code, level).share_below(spare_bytes / unit - rough)

    def _unit(self, peaks: Mapping[str, Any], sizes: Sizes) -> Any:
        """What a score is in units of [bytes]; outside the swept domain it grows with the distance."""
        return conformal.scale(peaks, self.weights, self.stretch(sizes))

    def packed_unit(self, peaks: Mapping[str, Any], sizes: Sizes) -> Any:
        """What `packing` is in units of [bytes]."""
        return conformal.scale(peaks, self.weights, self.stretch(sizes), conformal.PACKED_SHARE)

    def standing(self, peaks: Mapping[str, float], sizes: Sizes) -> tuple[int, float]:
        """Where one workload stands (see `place_codes`), and what its scores are in units of [bytes]."""
        values = list(peaks.values())
        return scalar_code(values.index(max(values)), self.stages, sizes), self._unit(peaks, sizes)

    def quantile(self, metric: str, code: int, level: float, *, upper: bool) -> float:
        """How far above a prediction its one-sided bound lies, or below it, in the units of `standing`."""
        wanted = metric, code, level, upper
        found = self._quantiles.get(wanted)
        if found is None:
            scores, rough = self.scores(metric, code, level), place_of(self.key, code).rough[upper]
            found = max(scores.quantile(level) if upper else -scores.lower_quantile(level), 0.0) + rough
            self._quantiles[wanted] = found
        return found


class _Line(NamedTuple):
    """Coefficients of a stage, or beside them: a row in the columns of `products` for each set, and the set of each regime."""

    stage: str
    regimes: list[int]
    sets: Array

    def at(self, sizes: Sizes) -> Any:
        """Those of one workload."""
        return self.sets[self.regimes[int(regime(self.stage, sizes))]]

    def along(self, columns: Array, sizes: Sizes) -> Any:
        """What they give of many [bytes]."""
        if len(self.sets) == 1:
            return self.sets[0] @ columns
        rows = np.asarray(self.regimes)[regime(self.stage, sizes)]
        used = np.flatnonzero(np.bincount(rows.ravel(), minlength=len(self.sets)))
        values = self.sets[used] @ columns
        found = values[0]
        for row, value in zip(used[1:], values[1:], strict=True):
            np.copyto(found, value, where=rows == row)
        return found


def _row(letters: tuple[Any, ...]) -> Array:
    """The `products` of one workload; `struct` fills an array in half the time that NumPy takes."""
    row = _empty(_WIDTH)
    _pack(row, 0, *products(*letters))  # type: ignore[arg-type]
    return row


def _aligned(model: Mapping[str, Any], weights_bytes: int) -> Array:
    """A stage's sets of coefficients in the columns of `products`, the weights added to the constant."""
    sets = np.zeros((len(model["coef"]), len(TERMS)))
    sets[:, [COLUMN[name] for name in model["terms"]]] = model["coef"]
    sets[:, COLUMN["1"]] += weights_bytes
    return sets


def _common_domain(domains: list[Mapping[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """The sizes at which every stage was swept."""
    return {column: (max(d[column][0] for d in domains), min(d[column][1] for d in domains)) for column in domains[0]}
