"""Reserved, device and required memory: regressions on top of the predicted stage peaks.

How a caching allocator packs blocks depends on which convolution plans run, so these models are fitted per family of
variants and per regime of the VAE decoder, where there are rows enough; otherwise by regime, by family, or over all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.model_selection import GroupKFold

from sdfit.equation.metrics import METRICS
from sdfit.equation.terms import stages_of
from sdfit.fit.scores import by_family, score
from sdfit.fit.stage_model import nonnegative
from sdfit.predict.variant import family, metric_features, metric_groups, metric_regime
from sdfit.records import Record

Array = np.ndarray[Any, np.dtype[np.float64]]
Peaks = Mapping[str, float]
FOLDS = 10
"""Of the cross-validation by resolution, the stages' (`sdfit.fit.fit`) as well as the metrics'."""
FEWEST_ROWS = 12
"""A group with fewer rows leaves its workloads to a wider one."""


def fit_metrics(
    ok: Sequence[Record], fitted: Sequence[Peaks], held_out: Sequence[Peaks]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fit the metrics that the records have, and score all of them on unseen resolutions.

    Parameters
    ----------
    ok : sequence of Record
        Runs that succeeded.
    fitted, held_out : sequences of mapping
        Each run's stage peaks [bytes] as the stages give them, and as stages give them that never saw its resolution;
        empty where unknown.

    Returns
    -------
    metrics, scores : dict
        As in `sdfit.predict.artifact.Artifact`.
    """
    metrics: dict[str, Any] = {}
    scores: dict[str, Any] = {}
    for metric in METRICS:
        values = {i: float(v) for i, r in enumerate(ok) if (v := getattr(r, f"{metric}_bytes")) is not None}
        if metric == "allocated":
            pairs = [score(ok[i], values[i], max(p.values()), p) for i, p in enumerate(held_out) if p]
            scores[metric] = by_family(pairs)
        elif values:
            rows = [i for i in values if fitted[i]]
            metrics[metric] = {
                name: {"coef": _solve(ok, fitted, values, mine).tolist(), "rows": len(mine)}
                for name, mine in _groups(ok, rows).items()
            }
            scores[metric] = by_family(_held_out_scores(ok, fitted, held_out, values, rows))
    return metrics, scores


def _groups(ok: Sequence[Record], rows: Sequence[int]) -> dict[str, list[int]]:
    """Rows by group, from the narrowest to all; narrow groups with few rows are left out."""
    found: dict[str, list[int]] = {}
    for i in rows:
        w = ok[i].workload
        for name in metric_groups(family(w.variant), int(metric_regime(w))):
            found.setdefault(name, []).append(i)
    return {name: mine for name, mine in found.items() if not name or len(mine) >= FEWEST_ROWS}


def _features(record: Record, peaks: Peaks) -> tuple[list[float], float]:
    weights = {stage: record.weights_bytes(stage) for stage in stages_of(record.workload.variant)}
    return [float(x) for x in metric_features(peaks, weights)], float(max(weights.values()))


def _solve(ok: Sequence[Record], peaks: Sequence[Peaks], values: Mapping[int, float], rows: Sequence[int]) -> Array:
    columns, target = [], []
    for i in rows:
        features, weights = _features(ok[i], peaks[i])
        columns.append([x / values[i] for x in features])
        target.append((values[i] - weights) / values[i])
    return nonnegative(np.array(columns), np.array(target))


def _held_out_scores(
    ok: Sequence[Record],
    fitted: Sequence[Peaks],
    held_out: Sequence[Peaks],
    values: Mapping[int, float],
    rows: Sequence[int],
) -> list[tuple[str, float]]:
    """Scores on resolutions that neither the metric's model nor the stages saw."""
    sizes = [f"{ok[i].workload.effective_height}x{ok[i].workload.effective_width}" for i in rows]
    groups = np.unique(np.array(sizes), return_inverse=True)[1]
    folds = min(FOLDS, int(groups.max()) + 1)
    pairs: list[tuple[str, float]] = []
    if folds < 2:
        return pairs
    for train, test in GroupKFold(folds).split(groups, groups=groups):
        coefs = {name: _solve(ok, fitted, values, mine) for name, mine in _groups(ok, [rows[j] for j in train]).items()}
        for j in test:
            i = rows[j]
            if not held_out[i]:
                continue
            w = ok[i].workload
            coef = next(coefs[g] for g in metric_groups(family(w.variant), int(metric_regime(w))) if g in coefs)
            features, weights = _features(ok[i], held_out[i])
            predicted = max(weights + float(np.dot(coef, features)), *held_out[i].values())
            pairs.append(score(ok[i], values[i], predicted, held_out[i]))
    return pairs
