"""The metrics beside allocated memory, where few runs correct a prior: its regressions, moved with the peak and by the runs.

How an allocator packs blocks is the prior's. What kernels hold besides is the card's: where the corrected stages lie above
the prior's, so do reserved and required memory, byte for byte. `minimum` goes without workspaces and moves with the
constants alone. Then a metric that ran is moved by the median of what the runs lie beside it.

What it does not know: how blocks pack around workspaces of another size. On a traced card whose copies are twice as wide,
bounds at 0.95 of metrics that no run measured held less often than that, those at 0.99, which decide what fits, always.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdfit.equation.metrics import (
    CONSTANT_BYTES,
    METRIC_FEATURES,
    METRICS,
    group_fields,
    metric_value,
)
from sdfit.equation.sizes import Array, Sizes
from sdfit.equation.stages import stage_key
from sdfit.predict.artifact import Artifact
from sdfit.predict.conformal import Scores, scale
from sdfit.predict.predictor import Predictor
from sdfit.records import Record
from sdfit.workload import Workload

STAGE_OF = {
    "unet": "unet",
    "unet_deep": "unet_deep",
    "vae_decoder": "vae_decoder_blocks",
    "vae_encoder": "vae_encoder_blocks",
}
"""The stage that stands for a part of the pipeline; the others never set a peak that matters."""
USUAL = {"element_bytes": "2", "attention": "sdpa", "vae": "kl", "regime": "1", "piece": "vae_decoder"}
"""What most runs of a group have in common that does not tell."""
DTYPES = {"2": "float16", "4": "float32"}
WITHOUT_WORKSPACES = ("minimum",)


def correct_metrics(corrected: Artifact, ok: Sequence[Record]) -> tuple[dict[str, Any], dict[str, float]]:
    """Move a prior's regressions.

    Parameters
    ----------
    corrected : Artifact
        Its stages corrected, its metrics still the prior's.
    ok : sequence of Record
        The runs.

    Returns
    -------
    metrics : dict
        As in `sdfit.predict.artifact.Artifact`. Device memory, of which simulated priors know nothing, is reserved memory
        and what the runs show beside it.
    stretched : dict
        Metric -> how much wider its scores become: the runs' spread over that of the prior's scores, 1 at least.
    """
    predictor = Predictor(corrected)
    metrics = {
        metric: {name: _moved(corrected, metric, name, found) for name, found in groups.items()}
        for metric, groups in corrected.metrics.items()
        if groups
    }
    stretched = dict.fromkeys(metrics, 1.0)
    for metric in METRICS[1:]:
        rows = [r for r in ok if getattr(r, f"{metric}_bytes") is not None]
        basis = "reserved" if metric == "device" and metric not in metrics else metric
        if not rows or basis not in metrics:
            continue
        misses, units = np.empty(len(rows)), np.empty(len(rows))
        for i, r in enumerate(rows):
            variant, sizes = predictor.variant(r.workload.variant), Sizes.of_workload(r.workload)
            peaks = variant.stage_peaks(sizes)
            value = float(metric_value(metrics[basis], r.workload.variant, peaks, variant.weights, sizes))
            misses[i] = getattr(r, f"{metric}_bytes") - value
            units[i] = float(scale(peaks, variant.weights))
        move = float(np.median(misses))
        metrics[metric] = {
            name: found | {"coef": [[max(row[0] + move / CONSTANT_BYTES, 0.0), *row[1:]] for row in found["coef"]]}
            for name, found in metrics[basis].items()
        }
        expected = float(np.sqrt(np.mean(np.square(sample(corrected.scores.get(basis, {}).get(""))))))
        shown = float(np.sqrt(np.mean(np.square((misses - move) / units))))
        stretched[metric] = max(1.0, shown / expected) if expected > 0 else 1.0
    return metrics, stretched


def _moved(corrected: Artifact, metric: str, name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """A group's regression, moved as the stage that stands for it moved: by as much, whatever part it takes of the peak."""
    place = USUAL | group_fields(name)
    stage = STAGE_OF.get(place["piece"])
    if stage is None:
        return dict(found)
    attention, _, offload = place["attention"].partition("/")  # `sdfit.equation.metrics.packs_like`
    like = Workload(
        512, 512, dtype=DTYPES[place["element_bytes"]], attention=attention, vae=place["vae"], offload=offload or "none"
    )
    key = "|".join(stage_key(stage, like.variant))
    if key not in corrected.stages:
        return dict(found)
    model, told = corrected.stages[key], corrected.prior["stages"][key]
    row = model["regimes"][int(place["regime"])]
    constant, slope = (
        model["coef"][row][model["terms"].index(term)] - told["prior"][row][i] for i, term in enumerate(told["terms"])
    )
    at_slope = METRIC_FEATURES.index(told["terms"][1])
    wanted = 0.0 if metric in WITHOUT_WORKSPACES else 1.0
    moved = []
    for row in found["coef"]:
        values, through_peak = list(row), row[METRIC_FEATURES.index("peak")]
        values[0] = max(values[0] + (1 - through_peak) * constant / CONSTANT_BYTES, 0.0)
        values[at_slope] = max(values[at_slope] + (wanted - through_peak) * slope, 0.0)
        moved.append(values)
    return {"edges": found["edges"], "coef": moved}


def sample(found: Mapping[str, Any] | None, most: int = 1000) -> Array:
    """The scores that an artifact keeps as order statistics, each as often as it stands for others; without any, zero."""
    if found is None:
        return np.zeros(1)
    scores = Scores.read(found["count"], found["values"])
    ranks = np.linspace(1, scores.size, min(scores.size, most))
    at = np.searchsorted(np.array(scores.ranks), ranks - 1e-9)
    return np.array(scores.values, dtype=float)[at]
