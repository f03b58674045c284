"""`f`: from a workload to bytes, with the interval and the reasons.

`load` finds an artifact by name or path and gives a `Predictor`. Calling it gives a `Prediction`: a float of bytes
that knows its interval, the stage that sets the peak and what the peak is made of. Nothing but numpy is imported.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdfit import conformal
from sdfit.artifact import Artifact, load_artifact
from sdfit.basis import Sizes, StageKey, evaluate, regime, stage_key, stages_of, terms_of
from sdfit.errors import InvalidWorkload, SimulatedModelWarning, UnknownModel, UnknownVariant, listed
from sdfit.paths import shipped
from sdfit.scalar import compile_peak
from sdfit.stages import resident
from sdfit.workload import (
    CHOICES,
    CHUNK_TOKENS,
    MAX_BATCH_SIZE,
    MAX_PROMPT_LENGTH,
    MAX_SIDE,
    MIN_SIDE,
    VAE_SCALE,
    VARIANT_FIELDS,
    VariantKey,
    Workload,
    check_keywords,
    one_of,
    variant_name,
)

METRICS = ("allocated", "reserved", "device", "required")
METRIC_FEATURES = ("1", "peak", "vae_encoder_blocks", "unet", "vae_decoder_blocks")
"""What reserved, device and required are linear in: a constant, the peak and three stages, above the weights [bytes]."""
DEFAULT_LEVEL = 0.95
_DEFAULTS: VariantKey = tuple(options[0] for options in CHOICES.values())  # type: ignore[assignment]
_warned: set[str] = set()


class Interval(NamedTuple):
    """A two-sided prediction interval [bytes]."""

    low: float
    high: float


class Prediction(float):
    """Bytes of one metric at its peak, with what it rests on.

    Attributes
    ----------
    workload : Workload
    metric : str
    level : float
        Of ``interval`` and ``upper``.
    """

    __slots__ = ("_variant", "_workload", "level", "metric")

    @property
    def workload(self) -> Workload:
        """What was asked for."""
        return self._workload if isinstance(self._workload, Workload) else Workload(*self._workload)

    @property
    def stage(self) -> str:
        """The stage that sets the peak of allocated memory."""
        peaks = self._variant.stage_peaks(self.workload)
        return max(peaks, key=peaks.__getitem__)

    @property
    def stage_peaks(self) -> dict[str, float]:
        """The peak of each stage [bytes], resident weights included."""
        return self._variant.stage_peaks(self.workload)

    @property
    def breakdown(self) -> dict[str, float]:
        """What the peak of allocated memory is made of [bytes]: the weights, and each term of the binding stage."""
        return self._variant.breakdown(self.workload, self.stage)

    @property
    def extrapolated(self) -> bool:
        """Whether the workload lies outside the swept domain; the interval is then wider, and a guess."""
        return self._variant.stretch(self.workload) > 1

    @property
    def interval(self) -> Interval:
        """Two-sided prediction interval at ``level``."""
        half = self._variant.width(self.workload, self.metric, self.level, conformal.half_width)
        return Interval(max(self - half, 0.0), self + half)

    @property
    def upper(self) -> float:
        """One-sided upper bound at ``level``."""
        return self + self._variant.width(self.workload, self.metric, self.level, conformal.upper_width)

    @property
    def provenance(self) -> str:
        """What the numbers rest on: measured, published, traced."""
        return self._variant.artifact.provenance

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
            "provenance": self.provenance,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return (float, (float(self),))


def _whole(value: float) -> int | None:
    return round(value) if np.isfinite(value) else None


class _Variant:
    """The part of an artifact that one variant uses, compiled."""

    def __init__(self, artifact: Artifact, key: VariantKey) -> None:
        self.artifact, self.key = artifact, key
        values = dict(zip(VARIANT_FIELDS, key, strict=True))
        self.offload = str(values["offload"])
        self.slicing, self.tiling = bool(values["vae_slicing"]), bool(values["vae_tiling"])
        weights = artifact.components.get(str(values["dtype"]), {})
        names = {"vae": f"vae/{values['vae']}"}
        self.stages: dict[str, StageKey] = {}
        self.weights: dict[str, int] = {}
        for stage in stages_of(key):
            found = stage_key(stage, key)
            parts = [c for c in resident(stage, self.offload) if c != "safety_checker" or values["safety_checker"]]
            if "|".join(found) not in artifact.stages or any(names.get(c, c) not in weights for c in parts):
                raise UnknownVariant(
                    f"'{artifact.name}' has no coefficients for {variant_name(key)} (its {stage} was never swept); swept: "
                    f"{listed(artifact.swept)}; to add one: sdfit sweep --gpu {artifact.name} --grid FILE, then sdfit fit",
                    variant=key,
                )
            self.stages[stage] = found
            self.weights[stage] = sum(weights[names.get(c, c)] for c in parts)
        self.models = {stage: artifact.stages["|".join(found)] for stage, found in self.stages.items()}
        self.families = (family(key), "")
        self.domain: dict[str, tuple[float, float]] = {}
        for model in self.models.values():
            for column, (least, most) in model["domain"].items():
                low, high = self.domain.get(column, (0, np.inf))
                self.domain[column] = (max(low, least), min(high, most))
        self.peak: Callable[..., float] = compile_peak(self.models, self.stages, self.weights, self.slicing, self.tiling)

    def sizes(self, w: Workload) -> Sizes:
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
        return {stage: float(peak) for stage, peak in self.stage_arrays(self.sizes(w)).items()}

    def breakdown(self, w: Workload, stage: str) -> dict[str, float]:
        terms = self.terms(stage, self.sizes(w))
        return {"weights": float(self.weights[stage])} | {name: float(v) for name, v in terms.items()}

    def stretch(self, w: Workload) -> float:
        """How far outside the swept domain a workload lies: 1 inside, otherwise the largest ratio to its edge."""
        values = {"A": w.pixels, "B": w.batch_size, "B·A": w.batch_size * w.pixels, "L": w.tokens}
        return max(1.0, *(max(values[c] / high, low / values[c]) for c, (low, high) in self.domain.items()))

    def features(self, peaks: Mapping[str, Any]) -> list[Any]:
        """The columns of `METRIC_FEATURES` for some stage peaks [bytes]."""
        return metric_features(peaks, self.weights)

    def metric(self, peaks: Mapping[str, Any], metric: str) -> Any:
        """A metric from the stage peaks [bytes]."""
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
        coef = next(models[f] for f in self.families if f in models)["coef"]
        columns = metric_features(peaks, self.weights)
        value = max(self.weights.values()) + sum(c * x for c, x in zip(coef, columns, strict=True))
        return np.maximum(value, top)  # no counter can be below what is live

    def width(self, w: Workload, metric: str, level: float, rule: Callable[[Any, float], float]) -> float:
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
        return np.maximum(top - min(self.weights.values()), float(1 << 20))


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


class Predictor:
    """A calibrated model of one card: ``f(height, width, prompt_length, **options)`` in bytes.

    Parameters
    ----------
    artifact : Artifact
    path : Path, optional
        Where it was loaded from.

    Examples
    --------
    >>> import sdfit, warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     f = sdfit.load("t4")
    >>> f(512, 512) < f(1024, 1024)
    True
    """

    def __init__(self, artifact: Artifact, path: Path | None = None) -> None:
        self.artifact, self.path = artifact, path
        self._variants: dict[VariantKey, _Variant] = {}

    @property
    def name(self) -> str:
        """The card."""
        return self.artifact.name

    @property
    def provenance(self) -> str:
        """What the numbers rest on: ``measured``, ``published``, ``traced`` or ``fake``."""
        return self.artifact.provenance

    def __repr__(self) -> str:
        return f"<sdfit model '{self.name}', {self.provenance}, {len(self.artifact.swept)} variants>"

    def variant(self, key: VariantKey) -> _Variant:
        """The compiled variant.

        Raises
        ------
        UnknownVariant
            If it was never swept; names those that were.
        """
        found = self._variants.get(key)
        if found is None:
            key = tuple(one_of(n, v) for n, v in zip(VARIANT_FIELDS, key, strict=True))  # type: ignore[assignment]
            found = self._variants[key] = _Variant(self.artifact, key)
        return found

    def __call__(
        self,
        height: int,
        width: int,
        prompt_length: int = CHUNK_TOKENS,
        batch_size: int = 1,
        guidance_scale: float = 7.5,
        dtype: str = "float16",
        attention: str = "sdpa",
        vae: str = "kl",
        vae_slicing: bool = False,
        vae_tiling: bool = False,
        offload: str = "none",
        safety_checker: bool = True,
        metric: str = "allocated",
        level: float = DEFAULT_LEVEL,
        **unknown: Any,
    ) -> Prediction:
        """Predict the peak memory of one workload.

        Parameters
        ----------
        height, width, prompt_length, batch_size, guidance_scale, dtype, attention, vae, vae_slicing, vae_tiling, \
offload, safety_checker
            As in `Workload`.
        metric : {'allocated', 'reserved', 'device', 'required'}
        level : float
            Of the prediction's ``interval`` and ``upper``.

        Returns
        -------
        Prediction
            A float [bytes].

        Raises
        ------
        InvalidWorkload, UnknownKeyword, UnknownVariant
        """
        if unknown:
            check_keywords(unknown, ("metric", "level"))
        key = (dtype, attention, vae, vae_slicing, vae_tiling, offload, safety_checker)
        # the common case without a Workload: plain numbers inside the limits, a variant that was used before
        found = self._variants.get(key)
        if (
            found is not None
            and type(height) is int
            and type(width) is int
            and type(prompt_length) is int
            and type(batch_size) is int
            and MIN_SIDE <= height <= MAX_SIDE
            and MIN_SIDE <= width <= MAX_SIDE
            and 0 < prompt_length <= MAX_PROMPT_LENGTH
            and 0 < batch_size <= MAX_BATCH_SIZE
            and type(guidance_scale) is float
            and 0 <= guidance_scale < np.inf
            and metric == "allocated"
            and level == DEFAULT_LEVEL
        ):
            fields = (height, width, prompt_length, batch_size, guidance_scale, *key)
            unet_batch = 2 * batch_size if guidance_scale > 1 else batch_size
            tokens = prompt_length if prompt_length > CHUNK_TOKENS else CHUNK_TOKENS
            value = found.peak(height & -VAE_SCALE, width & -VAE_SCALE, tokens, batch_size, unet_batch)
            return _prediction(value, found, fields, metric, level)
        workload = Workload(height, width, prompt_length, batch_size, guidance_scale, *key)
        return self.predict_workload(workload, metric=metric, level=level)

    def predict_workload(
        self, workload: Workload, *, metric: str = "allocated", level: float = DEFAULT_LEVEL
    ) -> Prediction:
        """Predict for a `Workload`; otherwise as calling."""
        check_metric(metric)
        conformal.check_level(level)
        found = self.variant(workload.variant)
        value = float(found.metric(found.stage_peaks(workload), metric))
        return _prediction(value, found, workload, metric, level)

    def predict(self, table: Any, *, metric: str = "allocated") -> Any:
        """Predict many workloads at once.

        Parameters
        ----------
        table : mapping of columns, or DataFrame
            Columns named as `Workload`'s fields; ``height`` and ``width`` must be there, the others take their
            defaults. A column is an array or one value for all rows.

        Returns
        -------
        array of float64, shape (rows,)
            Bytes.
        """
        from sdfit.table import predict_table

        return predict_table(self, table, metric)[0]

    def predict_interval(self, table: Any, *, metric: str = "allocated", level: float = DEFAULT_LEVEL) -> Any:
        """Predict intervals for many workloads; ``table`` as in `predict`.

        Returns
        -------
        array of float64, shape (rows, 2)
            Lower and upper end [bytes]; infinite where the scores cannot support the level.
        """
        from sdfit.table import predict_table

        conformal.check_level(level)
        value, half = predict_table(self, table, metric, level)
        return np.column_stack([np.maximum(value - half, 0.0), value + half])

    def fits(self, *args: Any, memory: str | float, metric: str = "required", level: float = 0.99, **kwargs: Any) -> bool:
        """Whether a workload's upper bound stays within an amount of memory; see `sdfit.advise.fits`."""
        from sdfit.advise import fits

        return fits(self, Workload.from_dict(_named(args, kwargs)), memory=memory, metric=metric, level=level)

    def largest(self, **kwargs: Any) -> tuple[int, int]:
        """The largest size of an aspect ratio that fits; see `sdfit.advise.largest`."""
        from sdfit.advise import largest

        return largest(self, **kwargs)

    def max_batch_size(self, height: int, width: int, *args: Any, **kwargs: Any) -> int:
        """The largest batch that fits; see `sdfit.advise.max_batch_size`."""
        from sdfit.advise import max_batch_size

        return max_batch_size(self, height, width, *args, **kwargs)


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("height", "width", "prompt_length", "batch_size", "guidance_scale", *VARIANT_FIELDS)
    return dict(zip(names, args, strict=False)) | kwargs


def _prediction(value: float, found: _Variant, workload: Any, metric: str, level: float) -> Prediction:
    made = Prediction(value)
    made._variant, made._workload, made.metric, made.level = found, workload, metric, level
    return made


def check_metric(metric: str) -> None:
    """Refuse a metric that sdfit does not know."""
    if metric not in METRICS:
        raise InvalidWorkload(f"metric is {metric!r}; it must be one of {listed(METRICS)}", given=metric)


def model_folders() -> list[Path]:
    """Where artifacts are looked for by name: ``SDFIT_MODELS``, ``./models``, the shipped ones."""
    chosen = os.environ.get("SDFIT_MODELS")
    return [*([Path(chosen)] if chosen else []), Path("models"), shipped("models")]


def available() -> dict[str, Path]:
    """The models that `load` finds by name, and the file that each name gives."""
    found: dict[str, Path] = {}
    for folder in model_folders():
        for path in sorted(folder.glob("*.joblib")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def find_model(name: str | Path) -> Path:
    """Find an artifact by path or name.

    Raises
    ------
    UnknownModel
        Naming those that exist and the command that measures the one asked for.
    """
    text = str(name)
    if text.endswith(".joblib") or "/" in text or os.sep in text:
        return Path(name)
    known = available()
    if text not in known:
        raise UnknownModel(
            f"no model for '{text}'; there are: {listed(known)}. Measure one: sdfit sweep --gpu {text}, then sdfit fit",
            given=text,
            known=list(known),
        )
    return known[text]


def load(name: str | Path) -> Predictor:
    """Load a model by the name of its card or by path.

    A name is looked for in ``SDFIT_MODELS``, ``./models`` and the models that ship with sdfit, in this order;
    ``f.path`` says which file it was.

    Raises
    ------
    UnknownModel, ArtifactError

    Warns
    -----
    SimulatedModelWarning
        Once per file, if the model does not rest on a sweep of that card.
    """
    path = find_model(name)
    predictor = Predictor(load_artifact(path), path)
    if predictor.provenance != "measured" and str(path.absolute()) not in _warned:
        _warned.add(str(path.absolute()))
        warnings.warn(
            f"the model '{predictor.name}' ({path}) is not measured: {RESTS_ON[predictor.provenance]}",
            SimulatedModelWarning,
            stacklevel=2,
        )
    return predictor


RESTS_ON = {
    "measured": "a sweep of that card",
    "published": "it is a simulated trace, its kernel workspaces calibrated on published measurements",
    "traced": "it is a simulated trace without any kernel workspace, and predicts too little",
    "fake": "it was made with a made-up card, for tests",
}
"""A provenance in words."""
