"""`f`: from a workload to bytes, with the interval and the reasons.

Calling a `Predictor` gives a `Prediction`: a float of bytes that knows its interval, the stage that sets the peak and
what the peak is made of. Nothing but numpy is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdfit.equation.metrics import METRICS
from sdfit.errors import InvalidWorkload, listed
from sdfit.predict import conformal
from sdfit.predict.artifact import Artifact
from sdfit.predict.variant import Variant
from sdfit.workload import (
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
)

DEFAULT_LEVEL = 0.95


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
    _variant: Variant
    _workload: Workload | tuple[Any, ...]
    level: float
    metric: str

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
        self._variants: dict[VariantKey, Variant] = {}

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

    def variant(self, key: VariantKey) -> Variant:
        """The compiled variant.

        Raises
        ------
        UnknownVariant
            If it was never swept; names those that were.
        """
        found = self._variants.get(key)
        if found is None:
            key = tuple(one_of(n, v) for n, v in zip(VARIANT_FIELDS, key, strict=True))
            found = self._variants[key] = Variant(self.artifact, key)
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
        try:
            found = self._variants.get(key)
        except TypeError:  # a list or the like; the Workload says what is wrong with it
            found = None
        if (
            found is not None
            and type(vae_slicing) is type(vae_tiling) is type(safety_checker) is bool  # 0 and 1 would find it too
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
        value = float(found.metric(found.stage_peaks(workload), metric, found.sizes(workload)))
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
        from sdfit.predict.table import predict_table

        return predict_table(self, table, metric)[0]

    def predict_interval(self, table: Any, *, metric: str = "allocated", level: float = DEFAULT_LEVEL) -> Any:
        """Predict intervals for many workloads; ``table`` as in `predict`.

        Returns
        -------
        array of float64, shape (rows, 2)
            Lower and upper end [bytes]; infinite where the scores cannot support the level.
        """
        from sdfit.predict.table import predict_table

        conformal.check_level(level)
        value, half = predict_table(self, table, metric, level)
        return np.column_stack([np.maximum(value - half, 0.0), value + half])

    def fits(
        self, *args: Any, memory: str | float, metric: str | None = None, level: float | None = None, **kwargs: Any
    ) -> bool:
        """Whether a workload's upper bound stays within an amount of memory; see `sdfit.predict.advise.fits`."""
        from sdfit.predict.advise import fits

        return fits(self, Workload.from_dict(_named(args, kwargs)), memory=memory, metric=metric, level=level)

    def largest(self, **kwargs: Any) -> tuple[int, int]:
        """The largest size of an aspect ratio that fits; see `sdfit.predict.advise.largest`."""
        from sdfit.predict.advise import largest

        return largest(self, **kwargs)

    def max_batch_size(self, height: int, width: int, *args: Any, **kwargs: Any) -> int:
        """The largest batch that fits; see `sdfit.predict.advise.max_batch_size`."""
        from sdfit.predict.advise import max_batch_size

        return max_batch_size(self, height, width, *args, **kwargs)


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("height", "width", "prompt_length", "batch_size", "guidance_scale", *VARIANT_FIELDS)
    return dict(zip(names, args, strict=False)) | kwargs


def _prediction(value: float, found: Variant, workload: Any, metric: str, level: float) -> Prediction:
    made = Prediction(value)
    made._variant, made._workload, made.metric, made.level = found, workload, metric, level
    return made


def check_metric(metric: str) -> None:
    """Refuse a metric that sdfit does not know."""
    if metric not in METRICS:
        raise InvalidWorkload(f"metric is {metric!r}; it must be one of {listed(METRICS)}", given=metric)
