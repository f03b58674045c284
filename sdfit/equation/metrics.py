"""The metrics beside allocated memory: regressions on the stage peaks, per family of variants and regime.

How a caching allocator packs blocks depends on which convolution plans run, so `reserved`, `device` and `required` have
coefficients per family and per regime of the VAE decoder, where there were rows enough; otherwise by regime, by
family, or over all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdfit.equation.regimes import regime
from sdfit.equation.sizes import Numbers, Sizes
from sdfit.workload import VariantKey

METRICS = ("allocated", "reserved", "device", "required")
"""What the README's glossary explains; each a peak over one run [bytes]."""
METRIC_FEATURES = ("1", "peak", "vae_encoder_blocks", "unet", "vae_decoder_blocks")
"""What reserved, device and required are linear in, above the weights [bytes]: a constant, the peak, three stages."""


def family(key: VariantKey) -> str:
    """The variants that share conformal scores: those that differ only in offload and the safety checker.

    Examples
    --------
    >>> from sdfit.workload import Workload
    >>> family(Workload(512, 512, safety_checker=False).variant)
    'float16|sdpa|kl|False|False'
    """
    return "|".join(str(v) for v in key[:5])


def metric_groups(family_name: str, which: int) -> tuple[str, ...]:
    """The groups whose coefficients a metric may use, the narrowest first.

    Examples
    --------
    >>> metric_groups("float16|sdpa|kl|False|False", 1)
    ('float16|sdpa|kl|False|False#1', '#1', 'float16|sdpa|kl|False|False', '')
    """
    return (f"{family_name}#{which}", f"#{which}", family_name, "")


def metric_regime(sizes: Sizes) -> Numbers:
    """The regime of the metrics: that of the decoder's blocks, whose convolutions are the largest."""
    return regime("vae_decoder_blocks", sizes)


def highest(peaks: Mapping[str, Numbers]) -> Any:
    """The largest of the stage peaks [bytes]: the peak of allocated memory."""
    return np.maximum.reduce([np.asarray(p, dtype=float) for p in peaks.values()])


def metric_features(peaks: Mapping[str, Numbers], weights: Mapping[str, int]) -> list[Any]:
    """The columns of `METRIC_FEATURES` [bytes] from stage peaks and resident weights."""
    top = highest(peaks)
    named = [peaks[s] - weights[s] if s in peaks else 0.0 * top for s in METRIC_FEATURES[2:]]
    return [np.ones_like(top), top - max(weights.values()), *named]


def metric_value(
    coefficients: Mapping[str, Sequence[float]],
    family_name: str,
    peaks: Mapping[str, Numbers],
    weights: Mapping[str, int],
    sizes: Sizes,
) -> Any:
    """A metric from stage peaks [bytes]; ``coefficients`` by the names of `metric_groups`."""
    top, regimes = highest(peaks), np.asarray(metric_regime(sizes))
    columns = metric_features(peaks, weights)
    value = np.zeros_like(top)
    for which in np.unique(regimes):
        coef = next(coefficients[g] for g in metric_groups(family_name, int(which)) if g in coefficients)
        found = sum(c * x for c, x in zip(coef, columns, strict=True))
        value = np.where(regimes == which, max(weights.values()) + found, value)
    return np.maximum(value, top)  # no counter can be below what is live
