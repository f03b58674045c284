"""Fit reserved, device, required and minimum memory: regressions on top of the predicted stage peaks.

See `sdfit.equation.metrics` for the groups that have coefficients of their own. How blocks pack is linear in the sizes
but for jumps, where a tensor comes to fit into what another one left. So the regressions are robust: they follow the
many and leave the jumps to the scores.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from sdfit.equation.metrics import (
    DECIDES,
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
from sdfit.equation.sizes import Array, Sizes
from sdfit.equation.stages import STAGES, stages_of
from sdfit.fit.folds import Indices, left_out
from sdfit.fit.observations import Runs
from sdfit.fit.scores import ENDS, EVERY_FAMILY, WIDEST, by_family, of_kinds
from sdfit.fit.solver import least
from sdfit.fit.stage_model import MANY_ROWS, lengths
from sdfit.predict.conformal import PACKED_SHARE, scale

COARSE = 3
"""The first of `metric_groups` that the metrics use which decide nothing: or an artifact would be twice as large."""
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
    """Some runs through predicted stage peaks, and what a metric's regression makes of them: arrays, a row each.

    Attributes
    ----------
    places : list of Place
        Where runs stand.
    at : array
        Which of them each run stands at.
    features : array, shape (rows, features)
        The columns of `METRIC_FEATURES`.
    extent : array
        Images times pixels.
    base_bytes, peak_bytes, scale_bytes, packed_bytes : array
        The weights in the stage that sets the peak, the peak, the unit of a score, that of what packing adds.
    """

    places: list[Place]
    at: Indices
    features: Array
    extent: Array
    base_bytes: Array
    peak_bytes: Array
    scale_bytes: Array
    packed_bytes: Array

    @classmethod
    def of(cls, runs: Runs, peaks_bytes: Array, rows: Indices) -> _Seen:
        """Look at runs through the stage peaks that a model predicts, a column for each of `STAGES`."""
        places: dict[Place, int] = {}
        count = len(runs)
        at, features = np.full(count, -1), np.full((count, len(METRIC_FEATURES)), np.nan)
        extents, base, peak, unit, packed = (np.full(count, np.nan) for _ in range(5))
        wanted = np.zeros(count, dtype=bool)
        wanted[rows] = True
        for variant, every in runs.variants.items():
            mine = every[wanted[every]]
            if not len(mine):
                continue
            columns = {stage: STAGES.index(stage) for stage in stages_of(variant)}
            peaks = {stage: peaks_bytes[mine, column] for stage, column in columns.items()}
            weights = {stage: runs.weights_bytes[mine, column] for stage, column in columns.items()}
            sizes = Sizes.of(*runs.X[mine].T)
            codes, which = np.unique(place_codes(peaks, sizes), return_inverse=True)
            of_code = [places.setdefault(place_of(variant, int(code)), len(places)) for code in codes]
            at[mine] = np.array(of_code)[which]
            features[mine] = np.column_stack(metric_features(peaks, weights, sizes))
            extents[mine] = extent(sizes)
            base[mine], peak[mine] = weights_at_peak(peaks, weights), highest(peaks)
            unit[mine], packed[mine] = scale(peaks, weights), scale(peaks, weights, share=PACKED_SHARE)
        arrays: tuple[Any, ...] = (at, features, extents, base, peak, unit, packed)
        return cls(list(places), *(array[rows] for array in arrays))

    def where(self, rows: Any) -> _Seen:
        """Some of the runs."""
        return _Seen(self.places, *(getattr(self, one.name)[rows] for one in fields(_Seen)[1:]))

    def by_place(self, rows: Indices) -> list[tuple[Place, Indices]]:
        """Those of some rows that stand at each place, in the order in which places first come."""
        at = self.at[rows]
        found, first = np.unique(at, return_index=True)
        return [(self.places[i], rows[at == i]) for i in found[np.argsort(first)]]


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
        seen: _Seen,
        values: Array,
        edges: dict[str, list[float]] | None = None,
        *,
        finest: int = 0,
    ) -> None:
        self.seen, self.values, self.finest = seen, values, finest
        parts: dict[str, list[Indices]] = defaultdict(list)
        for place, rows in seen.by_place(np.arange(len(values))):
            for name in metric_groups(place)[finest:]:
                parts[name].append(rows)
        self.members = {name: np.sort(np.concatenate(rows)) for name, rows in parts.items()}
        self._given, self._found = edges, dict[str, tuple[list[float], list[Array]]]()

    def group(self, place: Place) -> str:
        """The narrowest group that a place belongs to, that has rows enough and was worth keeping."""
        return next(g for g in metric_groups(place)[self.finest :] if not g or self._stands(g))

    def _stands(self, group: str) -> bool:
        return len(self.members.get(group, ())) >= FEWEST_ROWS and (self._given is None or group in self._given)

    def errors(self, group: str, mine: Indices) -> float:
        """The mean error of a group's coefficients on some runs, relative."""
        design, above = self._rows(mine)
        edges, coef = self.ranges(group)
        which = np.searchsorted(edges, self.seen.extent[mine], side="right")
        return float(np.mean(np.abs(np.sum(design * np.array(coef)[which], axis=1) - above)))

    def ranges(self, group: str) -> tuple[list[float], list[Array]]:
        """Where a group's ranges end, and the coefficients of each."""
        if group not in self._found:
            mine = _some(self.members[group])
            design, above = self._rows(mine)
            size = self.seen.extent[mine]
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

    def _rows(self, mine: Indices) -> tuple[Array, Array]:
        """Features and what the metric lies above the weights, both relative to the metric."""
        values = self.values[mine]
        design = self.seen.features[mine] / values[:, None]
        if not all(self.seen.places[i].attention in MATERIALISED for i in np.unique(self.seen.at[mine])):
            design[:, QUADRATIC_AT] = 0.0  # no scores are held: a small square would run away with the size
        return design, 1 - self.seen.base_bytes[mine] / values

    def predict(self, others: _Seen) -> Array:
        """The metric of runs [bytes]."""
        found = np.empty(len(others.at))
        for place, rows in others.by_place(np.arange(len(found))):
            edges, coef = self.ranges(self.group(place))
            of_range = np.array(coef)[np.searchsorted(edges, others.extent[rows], side="right")]
            above = others.features[rows][:, None, :] @ of_range[:, :, None]
            found[rows] = others.base_bytes[rows] + above[:, 0, 0]
        return found


def _some(rows: Indices) -> Indices:
    """The rows, or of many `MANY_ROWS` drawn from them: for eight coefficients more tell next to nothing more."""
    if len(rows) <= MANY_ROWS:
        return rows
    found: Indices = np.sort(np.random.default_rng(0).choice(rows, MANY_ROWS, replace=False))
    return found


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


def fit_metrics(runs: Runs, fitted: Array, held_out: Array) -> tuple[dict[str, Any], dict[str, Any], dict[str, Array]]:
    """Fit the metrics that the records have, and score all of them on unseen resolutions.

    Parameters
    ----------
    runs : Runs
        Those that succeeded are fitted.
    fitted, held_out : array, shape (runs, stages)
        Each run's stage peaks [bytes] as the stages give them, and as stages give them that never saw its resolution;
        NaN where unknown.

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
    for metric in METRICS:
        every = np.array([getattr(r, f"{metric}_bytes") for r in runs.records], dtype=float)
        rows = np.flatnonzero(runs.ok & ~np.isnan(every))
        if not len(rows):
            continue
        known = np.flatnonzero(~np.isnan(held_out[rows]).all(axis=1))
        unseen, actual = _Seen.of(runs, held_out, rows[known]), every[rows]
        if metric == "allocated":
            predicted = unseen.peak_bytes
        else:
            model = _Regression(_Seen.of(runs, fitted, rows), actual, finest=0 if metric == DECIDES else COARSE)
            metrics[metric] = _fitted(model)
            edges = {name: found["edges"] for name, found in metrics[metric].items()}
            predicted = _held_out(model, unseen, known, runs.groups[rows], edges)
        misses = (actual[known] - predicted) / unseen.scale_bytes
        added = (actual[known] - unseen.peak_bytes) / unseen.packed_bytes
        of_place = unseen.by_place(np.arange(len(known)))
        kinds = of_kinds((place, added[mine]) for place, mine in of_place) if metric == DECIDES else {}
        keep = ENDS if kinds else EVERY_FAMILY if metric in ("allocated", DECIDES) else WIDEST
        scores[metric] = by_family(((place, misses[mine]) for place, mine in of_place), keep) | kinds
        errors[metric] = (predicted - actual[known]) / actual[known]
    return metrics, scores, errors


def _fitted(model: _Regression) -> dict[str, dict[str, Any]]:
    """Ranges and coefficients of the groups with rows enough that tell more of their runs than the next wider one."""
    found: dict[str, dict[str, Any]] = {}
    for name in sorted((g for g, mine in model.members.items() if not g or len(mine) >= FEWEST_ROWS), key=_breadth):
        mine = model.members[name]
        if found:
            wider: dict[str, list[Indices]] = defaultdict(list)
            for place, rows in model.seen.by_place(mine):
                wider[next((g for g in metric_groups(place) if g in found), "")].append(rows)
            of_wider = {g: np.sort(np.concatenate(rows)) for g, rows in wider.items()}
            missed = sum(len(some) * model.errors(g, some) for g, some in of_wider.items()) / len(mine)
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
    model: _Regression, unseen: _Seen, known: Indices, groups: Indices, edges: dict[str, list[float]]
) -> Array:
    """Predict the ``known`` runs by regressions that never saw their resolution, on stage peaks that did not either.

    Only where the ranges of sizes end was found on all runs.
    """
    found = np.full(len(model.values), np.nan)
    row_of = np.full(len(model.values), -1)
    row_of[known] = np.arange(len(known))
    for stay, out in left_out(groups):
        without = _Regression(model.seen.where(stay), model.values[stay], edges, finest=model.finest)
        mine = out[row_of[out] >= 0]
        found[mine] = without.predict(unseen.where(row_of[mine]))
    return found[known]


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
        solved = least(columns * weight[:, None], target * weight, 100 * design.shape[1])
        error = np.abs(columns @ solved - target)
        weight = 1 / np.sqrt(np.maximum(error, CLOSE))
        if np.abs(columns @ (solved - before)).max(initial=0.0) < CLOSE / 100:
            break
    coefficients: Array = solved / length
    return coefficients
