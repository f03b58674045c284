"""The part of an artifact that one variant uses, put together and compiled.

A variant's stages take their coefficients from whatever sweep shared the fields that matter to them (see
`sdfit.equation.terms.STAGE_FIELDS`), so a combination that was never swept as such still has a prediction, if each of its
stages was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sdfit.equation.metrics import METRIC_FEATURES
from sdfit.equation.stages import resident
from sdfit.equation.terms import Sizes, StageKey, evaluate, regime, stage_key, stages_of, terms_of
from sdfit.errors import UnknownVariant, listed
from sdfit.predict.artifact import Artifact
from sdfit.predict.conformal import LEAST_ACTIVATION_BYTES
from sdfit.predict.scalar import compile_peak
from sdfit.workload import CHOICES, VARIANT_FIELDS, VariantKey, Workload, variant_name


class Variant:
    """The part of an artifact that one variant uses, compiled."""

    def __init__(self, artifact: Artifact, key: VariantKey) -> None:
        self.artifact, self.key = artifact, key
        values = dict(zip(VARIANT_FIELDS, key, strict=True))
        self.offload = str(values["offload"])
        self.slicing, self.tiling = bool(values["vae_slicing"]), bool(values["vae_tiling"])
        weights = with_both_baselines(artifact.components.get(str(values["dtype"]), {}))
        names = {"vae": f"vae/{values['vae']}"}
        held = baseline_label(str(values["vae"]), bool(values["safety_checker"]))
        self.stages: dict[str, StageKey] = {}
        self.weights: dict[str, int] = {}
        for stage in stages_of(key):
            found = stage_key(stage, key)
            parts = [c for c in resident(stage, self.offload) if c != "safety_checker" or values["safety_checker"]]
            labels = [names.get(c, c) for c in parts]
            if self.offload == "none" and held in weights:
                labels = [held]
            if "|".join(found) not in artifact.stages or any(label not in weights for label in labels):
                raise UnknownVariant(
                    f"'{artifact.name}' has no coefficients for {variant_name(key)} (its {stage} was never swept); swept: "
                    f"{listed(artifact.swept)}; to add one: sdfit sweep --gpu {artifact.name} --grid FILE, then sdfit fit",
                    variant=key,
                )
            self.stages[stage] = found
            self.weights[stage] = sum(weights[label] for label in labels)
            missing = artifact.stages["|".join(found)]["unidentified"]
            if (self.slicing or self.tiling) and "D" in missing and stage.startswith("vae"):
                raise UnknownVariant(
                    f"'{artifact.name}' never saw slicing or tiling of the '{values['vae']}' VAE in {values['dtype']}; swept: {listed(artifact.swept)}; to "
                    f"add it: sdfit sweep --gpu {artifact.name} --grid FILE, then sdfit fit",
                    variant=key,
                )
        self.models = {stage: artifact.stages["|".join(found)] for stage, found in self.stages.items()}
        self.families = (family(key), "")
        self.domain: dict[str, tuple[float, float]] = {}
        for model in self.models.values():
            for column, (least, most) in model["domain"].items():
                low, high = self.domain.get(column, (0, np.inf))
                self.domain[column] = (max(low, least), min(high, most))
        self.peak: Callable[..., float] = compile_peak(
            self.models, self.stages, self.weights, self.slicing, self.tiling
        )

    def sizes(self, w: Workload) -> Sizes:
        """The sizes that the terms are products of."""
        return Sizes.of(
            w.effective_height, w.effective_width, w.tokens, w.batch_size, w.unet_batch, self.slicing, self.tiling
        )

    def terms(self, stage: str, sizes: Sizes) -> dict[str, Any]:
        """Each term of a stage in bytes."""
        model, key = self.models[stage], self.stages[stage]
        rows = np.asarray(model["coef"])[np.asarray(model["regimes"])[regime(key, sizes)]]
        return {
            name: rows[..., i] * evaluate(name, sizes)
            for i, name in enumerate(terms_of(key))
            if any(row[i] for row in model["coef"])
        }

    def stage_arrays(self, sizes: Sizes) -> dict[str, Any]:
        """The peak of each stage, for one workload or for arrays of sizes."""
        return {s: sum(self.terms(s, sizes).values(), start=float(self.weights[s])) for s in self.stages}

    def stage_peaks(self, w: Workload) -> dict[str, float]:
        """The peak of each stage [bytes], resident weights included."""
        return {stage: float(peak) for stage, peak in self.stage_arrays(self.sizes(w)).items()}

    def breakdown(self, w: Workload, stage: str) -> dict[str, float]:
        """The resident weights and each term of a stage [bytes]."""
        terms = self.terms(stage, self.sizes(w))
        return {"weights": float(self.weights[stage])} | {name: float(v) for name, v in terms.items() if v > 0}

    def stretch(self, w: Workload) -> float:
        """How far outside the swept domain a workload lies: 1 inside, otherwise the largest ratio to its edge."""
        values = {"A": w.pixels, "B": w.batch_size, "B·A": w.batch_size * w.pixels, "L": w.tokens}
        return max(1.0, *(max(values[c] / high, low / values[c]) for c, (low, high) in self.domain.items()))

    def metric(self, peaks: Mapping[str, Any], metric: str, sizes: Sizes) -> Any:
        """A metric from the stage peaks [bytes] of some sizes.

        Raises
        ------
        UnknownVariant
            If the model was fitted on records without that metric.
        """
        top = np.maximum.reduce([np.asarray(p, dtype=float) for p in peaks.values()])
        if metric == "allocated":
            return top
        models = self.artifact.metrics.get(metric)
        if not models:
            raise UnknownVariant(
                f"'{self.artifact.name}' has no '{metric}'; it has: "
                f"{listed(['allocated', *(m for m, found in self.artifact.metrics.items() if found)])}",
                metric=metric,
            )
        regimes = np.asarray(regime(DECODER, sizes))
        columns = metric_features(peaks, self.weights)
        value = np.zeros_like(top)
        for which in np.unique(regimes):
            coef = next(models[g] for g in metric_groups(self.families[0], int(which)) if g in models)["coef"]
            found = sum(c * x for c, x in zip(coef, columns, strict=True))
            value = np.where(regimes == which, max(self.weights.values()) + found, value)
        return np.maximum(value, top)  # no counter can be below what is live

    def width(self, w: Workload, metric: str, level: float, rule: Callable[[Any, float], float]) -> float:
        """The half-width of an interval, or the room above a prediction [bytes], by a rule of `sdfit.predict.conformal`."""
        scores = self.artifact.scores.get(metric, {})
        relative = np.inf
        for name in self.families:  # the variant's own scores where there are enough of them, else those of all
            relative = rule(scores.get(name, []), level)
            if np.isfinite(relative):
                break
        return float(relative * self.activation(self.stage_peaks(w)) * self.stretch(w))

    def activation(self, peaks: Mapping[str, Any]) -> Any:
        """The scale of the conformal scores: the peak above the weights, at least 1 MiB."""
        top = np.maximum.reduce([np.asarray(p, dtype=float) for p in peaks.values()])
        return np.maximum(top - min(self.weights.values()), float(LEAST_ACTIVATION_BYTES))


def with_both_baselines(weights: Mapping[str, int]) -> dict[str, int]:
    """Add what was allocated with or without the checker where only the other was swept: the checker's weights apart.

    What the allocator holds around the weights then differs from the truth by a few MB.

    Examples
    --------
    >>> with_both_baselines({"safety_checker": 10, "all/kl/checked": 105})["all/kl/unchecked"]
    95
    """
    found = dict(weights)
    if "safety_checker" not in weights:
        return found
    checker = weights["safety_checker"]
    for vae in CHOICES["vae"]:
        checked, unchecked = baseline_label(str(vae), True), baseline_label(str(vae), False)
        if checked in weights:
            found.setdefault(unchecked, weights[checked] - checker)
        if unchecked in weights:
            found.setdefault(checked, weights[unchecked] + checker)
    return found


def baseline_label(vae: str, safety_checker: bool) -> str:
    """Where an artifact's component table keeps what was allocated before a run of this pipeline.

    Examples
    --------
    >>> baseline_label("kl", True)
    'all/kl/checked'
    """
    return f"all/{vae}/{'checked' if safety_checker else 'unchecked'}"


DECODER: StageKey = ("vae_decoder_blocks", "", "")
"""Its regimes are those of the metrics: its convolutions are the largest."""


def metric_regime(workload: Workload) -> Any:
    """The regime of a workload's metrics, an index into `sdfit.equation.terms.REGIMES`."""
    return np.asarray(regime(DECODER, Sizes.of_workloads([workload]))).item()


def metric_groups(family_name: str, which: int) -> tuple[str, ...]:
    """The groups whose coefficients a metric may use, the narrowest first.

    Examples
    --------
    >>> metric_groups("float16|sdpa|kl|False|False", 1)
    ('float16|sdpa|kl|False|False#1', '#1', 'float16|sdpa|kl|False|False', '')
    """
    return (f"{family_name}#{which}", f"#{which}", family_name, "")


def metric_features(peaks: Mapping[str, Any], weights: Mapping[str, int]) -> list[Any]:
    """The columns of `METRIC_FEATURES` [bytes] from stage peaks and resident weights."""
    top = np.maximum.reduce([np.asarray(p, dtype=float) for p in peaks.values()])
    named = [peaks[s] - weights[s] if s in peaks else 0.0 * top for s in METRIC_FEATURES[2:]]
    return [np.ones_like(top), top - max(weights.values()), *named]


def family(key: VariantKey) -> str:
    """The variants that share conformal scores: those that differ only in offload and the safety checker.

    Examples
    --------
    >>> family(Workload(512, 512, safety_checker=False).variant)
    'float16|sdpa|kl|False|False'
    """
    return "|".join(str(v) for v in key[:5])
