"""Fit reserved, device, required and minimum memory: regressions on top of the predicted stage peaks.

See `sdfit.equation.metrics` for the groups that have coefficients of their own. How blocks pack is linear in the sizes
but for jumps, where a tensor comes to fit into what another one left. So the regressions are robust: they follow the
many and leave the jumps to the scores.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

from sdfit.equation.metrics import (
    MATERIALISED,
    METRIC_FEATURES,
    METRICS,
    QUADRATIC,
    Place,
    extent,
    group_fields,
    highest,
    metric_features,
    metric_groups,
    place_codes,
    place_of,
    weights_at_peak,
)
from sdfit.equation.sizes import Array, Sizes, resolution
from sdfit.equation.stages import stages_of
from sdfit.fit.folds import left_out
from sdfit.fit.scores import by_family
from sdfit.fit.stage_model import lengths
from sdfit.predict.conformal import scale
from sdfit.records import Record

Peaks = Mapping[str, float]
DECIDES = "required"
"""The metric behind every answer to "does it fit"; the others are told less finely, or an artifact would be twice as large."""
COARSE = 3
"""The first of `metric_groups` that those others use."""
FEWEST_ROWS = 8
"""A group with fewer rows leaves its workloads to a wider one."""
FEWEST_IN_RANGE = 5
"""A range with fewer rows, once some are left out, takes the coefficients of the whole group."""
WORTH_KEEPING = 1.1
"""A group is kept where the next wider one misses its runs by so many times more, and by more than `CLOSE`."""
MOST_SPLITS = 2
"""How often a group is split in two by size: into four ranges at most."""
SPLIT_GAIN = 2.0
"""What a split must divide a group's errors by, at least."""
CANDIDATES = 14
"""Sizes at which a split is tried."""
ROUNDS = 12
"""Of reweighting; the errors that a round changes are then far below `CLOSE`."""
CLOSE = 3e-4
"""Relative errors below this count by their squares, larger ones by their size."""
QUADRATIC_AT = [METRIC_FEATURES.index(name) for name in QUADRATIC]


@dataclass(frozen=True, slots=True)
class _Seen:
    """Some predicted stage peaks of a run, and what a metric's regression makes of them.

    Attributes
    ----------
    place : Place
    features : array
        The columns of `METRIC_FEATURES`.
    base_bytes, peak_bytes, scale_bytes : float
        The weights in the stage that sets the peak, the peak, the unit of a score.
    extent : float
        Images times pixels.
    """

    place: Place
    features: Array
    extent: float
    base_bytes: float
    peak_bytes: float
    scale_bytes: float

    @classmethod
    def of(cls, record: Record, peaks: Peaks) -> _Seen:
        """Look at a run through the stage peaks [bytes] that a model predicts."""
        w = record.workload
        weights = {stage: record.weights_bytes(stage) for stage in stages_of(w.variant)}
        sizes = Sizes.of_workload(w)
        return cls(
            place_of(w.variant, int(place_codes(peaks, sizes))),
            np.array([float(x) for x in metric_features(peaks, weights, sizes)]),
            float(extent(sizes)),
            float(weights_at_peak(peaks, weights)),
            float(highest(peaks)),
            float(scale(peaks, weights)),
        )


class _Regression:
    """A metric of some runs: coefficients by group and range of sizes, found when a run first needs them.

    Parameters
    ----------
    seen, values
        The runs, and the metric of each [bytes].
    edges : dict, optional
        Where each group's ranges end, as found on more runs; None: to be found on these.
    finest : int
        The first of `metric_groups` that is used: 0 tells most apart.
    """

    def __init__(
        self,
        seen: Sequence[_Seen],
        values: Array,
        edges: dict[str, list[float]] | None = None,
        *,
        finest: int = 0,
    ) -> None:
        self.seen, self.values, self.finest = seen, values, finest
        self.members: dict[str, list[int]] = defaultdict(list)
        for i, one in enumerate(seen):
            for name in metric_groups(one.place)[finest:]:
                self.members[name].append(i)
        self._given, self._found = edges, dict[str, tuple[list[float], list[Array]]]()

    def group(self, place: Place) -> str:
        """The narrowest group that a place belongs to, that has rows enough and was worth keeping."""
        return next(g for g in metric_groups(place)[self.finest :] if not g or self._stands(g))

    def _stands(self, group: str) -> bool:
        return len(self.members.get(group, ())) >= FEWEST_ROWS and (self._given is None or group in self._given)

    def errors(self, group: str, runs: Sequence[int]) -> float:
        """The mean error of a group's coefficients on some runs, relative."""
        mine = np.array(runs)
        design, above = self._rows(mine)
        edges, coef = self.ranges(group)
        which = np.searchsorted(edges, [self.seen[i].extent for i in mine], side="right")
        return float(np.mean(np.abs(np.sum(design * np.array(coef)[which], axis=1) - above)))

    def ranges(self, group: str) -> tuple[list[float], list[Array]]:
        """Where a group's ranges end, and the coefficients of each."""
        if group not in self._found:
            mine = np.array(self.members[group])
            design, above = self._rows(mine)
            size = np.array([self.seen[i].extent for i in mine])
            edges = self._given.get(group, []) if self._given is not None else _edges(design, above, size)
            whole = robust_nonnegative(design, above)
            which = np.searchsorted(edges, size, side="right")
            coef = [
                robust_nonnegative(design[which == r], above[which == r])
                if np.sum(which == r) >= FEWEST_IN_RANGE
                else whole
                for r in range(len(edges) + 1)
            ]
            self._found[group] = list(edges), coef
        return self._found[group]

    def _rows(self, mine: Any) -> tuple[Array, Array]:
        """Features and what the metric lies above the weights, both relative to the metric."""
        values = self.values[mine]
        design = np.array([self.seen[i].features for i in mine]) / values[:, None]
        if not all(self.seen[i].place.attention in MATERIALISED for i in mine):
            design[:, QUADRATIC_AT] = 0.0  # no scores are held: a small square would run away with the size
        return design, 1 - np.array([self.seen[i].base_bytes for i in mine]) / values

    def predict(self, one: _Seen) -> float:
        """The metric of a run [bytes]."""
        edges, coef = self.ranges(self.group(one.place))
        return one.base_bytes + float(coef[bisect_right(edges, one.extent)] @ one.features)


def _edges(design: Array, above: Array, size: Array, depth: int = MOST_SPLITS) -> list[float]:
    """Where a group jumps: sizes at which coefficients of their own on either side divide its errors by `SPLIT_GAIN`."""

    def loss(rows: Any) -> float:
        misfit = design[rows] @ robust_nonnegative(design[rows], above[rows], rounds=3) - above[rows]
        return float(np.sum(np.maximum(np.abs(misfit) - CLOSE, 0.0)))

    order = np.sort(np.unique(size))
    everywhere = loss(slice(None))
    if depth == 0 or len(size) < 2 * FEWEST_ROWS or everywhere / len(size) < CLOSE:
        return []
    candidates = np.unique(np.quantile(order, np.linspace(0, 1, CANDIDATES + 2)[1:-1], method="nearest"))
    best, at = everywhere / SPLIT_GAIN, None
    for edge in candidates:
        low = size < edge
        if min(low.sum(), (~low).sum()) >= FEWEST_ROWS:
            apart = loss(low) + loss(~low)
            if apart < best:
                best, at = apart, float(edge)
    if at is None:
        return []
    low = size < at
    below = _edges(design[low], above[low], size[low], depth - 1)
    return [*below, at, *_edges(design[~low], above[~low], size[~low], depth - 1)]


def fit_metrics(
    ok: Sequence[Record], fitted: Sequence[Peaks], held_out: Sequence[Peaks]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Array]]:
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
    metrics : dict
        As in `sdfit.predict.artifact.Artifact`.
    scores : dict
        metric -> family -> scores, all of them.
    errors : dict
        metric -> relative errors on unseen resolutions.
    """
    metrics: dict[str, Any] = {}
    scores: dict[str, Any] = {}
    errors: dict[str, Array] = {}
    unseen = [_Seen.of(record, peaks) if peaks else None for record, peaks in zip(ok, held_out, strict=True)]
    seen = [_Seen.of(record, peaks) for record, peaks in zip(ok, fitted, strict=True)]
    for metric in METRICS:
        values = {i: float(v) for i, r in enumerate(ok) if (v := getattr(r, f"{metric}_bytes")) is not None}
        if not values:
            continue
        rows = list(values)
        actual = np.array([values[i] for i in rows])
        if metric == "allocated":
            predicted = [one.peak_bytes if (one := unseen[i]) is not None else None for i in rows]
        else:
            mine = [seen[i] for i in rows]
            model = _Regression(mine, actual, finest=0 if metric == DECIDES else COARSE)
            metrics[metric] = _fitted(model)
            groups = [resolution(ok[i].workload) for i in rows]
            edges = {name: found["edges"] for name, found in metrics[metric].items()}
            predicted = _held_out(mine, [unseen[i] for i in rows], actual, groups, edges, model.finest)
        known = [(unseen[i], a, p) for i, a, p in zip(rows, actual, predicted, strict=True) if p is not None]
        scored = ((one.place, (a - p) / one.scale_bytes) for one, a, p in known if one is not None)
        scores[metric] = by_family(scored, narrow=metric in ("allocated", DECIDES))
        errors[metric] = np.array([(p - a) / a for _, a, p in known])
    return metrics, scores, errors


def _fitted(model: _Regression) -> dict[str, dict[str, Any]]:
    """Ranges and coefficients of the groups with rows enough that tell more of their runs than the next wider one."""
    found: dict[str, dict[str, Any]] = {}
    for name in sorted((g for g, mine in model.members.items() if not g or len(mine) >= FEWEST_ROWS), key=_breadth):
        mine = model.members[name]
        wider: dict[str, list[int]] = defaultdict(list)
        for i in mine:
            wider[next((g for g in metric_groups(model.seen[i].place) if g in found), "")].append(i)
        if found:
            missed = sum(len(some) * model.errors(g, some) for g, some in wider.items()) / len(mine)
            if missed < CLOSE or missed < WORTH_KEEPING * model.errors(name, mine):
                continue
        edges, coef = model.ranges(name)
        found[name] = {"edges": edges, "coef": [_short(row) for row in coef]}
    return found


def _breadth(group: str) -> tuple[int, str]:
    """The widest first."""
    return len(group_fields(group)) if group else 0, group


def _short(coef: Iterable[float]) -> list[float]:
    """To nine digits: a byte of a gigabyte. A zero is a whole number, which takes a quarter of the room in the file."""
    return [float(f"{c:.9g}") or 0 for c in coef]


def _held_out(
    seen: Sequence[_Seen],
    unseen: Sequence[_Seen | None],
    values: Array,
    groups: Sequence[str],
    edges: dict[str, list[float]],
    finest: int,
) -> list[float | None]:
    """Predict each run by a regression that never saw its resolution, on stage peaks that did not either.

    Only where the ranges of sizes end was found on all runs.
    """
    found: list[float | None] = [None] * len(seen)
    for stay, out in left_out(groups):
        model = _Regression([seen[j] for j in stay], values[stay], edges, finest=finest)
        for j in out:
            one = unseen[j]
            if one is not None:
                found[j] = model.predict(one)
    return found


def robust_nonnegative(design: Array, target: Array, rounds: int = ROUNDS) -> Array:
    """Coefficients >= 0 with the least sum of errors, large ones counted by their size and not by their squares.

    Iteratively reweighted `scipy.optimize.nnls`, columns scaled to length one first.

    Examples
    --------
    >>> line = np.column_stack([np.ones(9), np.arange(9.0)])
    >>> y = line @ [1.0, 2.0]
    >>> y[4] += 5  # one jump among nine
    >>> robust_nonnegative(line, y).round(3).tolist()
    [1.0, 2.0]
    """
    length = lengths(design)
    length[length == 0] = 1.0
    columns, weight = design / length, np.ones(len(target))
    solved: Array = np.zeros(design.shape[1])
    for _ in range(rounds):
        before = solved
        solved = nnls(columns * weight[:, None], target * weight, maxiter=100 * design.shape[1])[0]
        error = np.abs(columns @ solved - target)
        weight = 1 / np.sqrt(np.maximum(error, CLOSE))
        if np.abs(columns @ (solved - before)).max(initial=0.0) < CLOSE / 100:
            break
    coefficients: Array = solved / length
    return coefficients
