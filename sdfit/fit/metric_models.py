"""Fit reserved, device and required memory: regressions on top of the predicted stage peaks.

See `sdfit.equation.metrics` for the groups that have coefficients of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdfit.equation.metrics import METRICS, family, metric_features, metric_groups, metric_regime, metric_value
from sdfit.equation.sizes import Array, Sizes, resolution
from sdfit.equation.stages import stages_of
from sdfit.fit.folds import left_out
from sdfit.fit.scores import by_family, score
from sdfit.fit.stage_model import nonnegative
from sdfit.records import Record

Peaks = Mapping[str, float]
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
            rows = [_Row(ok[i], values[i], fitted[i], held_out[i]) for i in values if fitted[i]]
            metrics[metric] = {
                name: {"coef": coef, "rows": len(_groups(rows)[name])} for name, coef in _coefficients(rows).items()
            }
            scores[metric] = by_family(_held_out_scores(rows))
    return metrics, scores


class _Row:
    """A run, one of its metrics [bytes], and its stage peaks as fitted and as predicted unseen."""

    def __init__(self, record: Record, value: float, fitted: Peaks, held_out: Peaks) -> None:
        self.record, self.value, self.fitted, self.held_out = record, value, fitted, held_out
        w = record.workload
        self.weights = {stage: record.weights_bytes(stage) for stage in stages_of(w.variant)}
        self.sizes, self.family = Sizes.of_workload(w), family(w.variant)
        self.groups = metric_groups(self.family, int(metric_regime(self.sizes)))


def _groups(rows: Sequence[_Row]) -> dict[str, list[_Row]]:
    """Rows by group, from the narrowest to all; narrow groups with few rows are left out."""
    found: dict[str, list[_Row]] = {}
    for row in rows:
        for name in row.groups:
            found.setdefault(name, []).append(row)
    return {name: mine for name, mine in found.items() if not name or len(mine) >= FEWEST_ROWS}


def _coefficients(rows: Sequence[_Row]) -> dict[str, list[float]]:
    """Coefficients on `sdfit.equation.metrics.METRIC_FEATURES`, by group."""
    return {name: _solve(mine).tolist() for name, mine in _groups(rows).items()}


def _solve(rows: Sequence[_Row]) -> Array:
    values = np.array([row.value for row in rows])
    design = np.array([[float(x) for x in metric_features(row.fitted, row.weights)] for row in rows])
    above = values - np.array([float(max(row.weights.values())) for row in rows])
    return nonnegative(design / values[:, None], above / values)


def _held_out_scores(rows: Sequence[_Row]) -> list[tuple[str, float]]:
    """Scores on resolutions that neither the metric's model nor the stages saw."""
    pairs: list[tuple[str, float]] = []
    for stay, out in left_out([resolution(row.record.workload) for row in rows]):
        coefficients = _coefficients([rows[j] for j in stay])
        for row in (rows[j] for j in out):
            if row.held_out:
                predicted = metric_value(coefficients, row.family, row.held_out, row.weights, row.sizes)
                pairs.append(score(row.record, row.value, float(predicted), row.held_out))
    return pairs
