"""Stages fitted and predicted: by all rows that share their coefficients, and by those that never saw a resolution.

Of many rows those of one fold are summed up first (`sdfit.fit.stage_model.Equations.summed_up`), so that leaving out one
fold after the other costs next to nothing. Whether regimes have coefficients of their own is then found once, on all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sdfit.equation.regimes import REGIMES, regime
from sdfit.equation.sizes import Array, Sizes
from sdfit.equation.stages import STAGES, StageKey, beside, told_by
from sdfit.fit.folds import FOLDS, Indices, fold_of
from sdfit.fit.observations import Observations, Runs
from sdfit.fit.stage_model import MANY_ROWS, Equations, StageModel

Mask = np.ndarray[Any, np.dtype[np.bool_]]

MOST_ROUNDS = 20
"""Fits of one stage until the lower bounds that count are settled, or which rows are whose of two lines."""
BESIDE_MISFIT, BESIDE_GAIN, BESIDE_QUANTILE = 5e-3, 2.0, 0.95
"""A stage gets coefficients beside its own where this quantile of its rows' misfit, relative to the run's peak, is larger
than the first, and they divide it by the second."""
BESIDE_STARTS = (0.15, 0.3, 0.6)
"""Shares of the rows, those of the fewest pixels, that the other coefficients are first fitted on."""
FEWEST_BESIDE = 4
"""Rows of which each of the two must give more: a constant and a slope, twice."""


def fit_stages(seen: Mapping[StageKey, Observations]) -> dict[StageKey, StageModel]:
    """Fit every set of coefficients; what stands beside several is told by one of them."""
    models: dict[StageKey, StageModel] = {}
    for key in sorted(seen, key=lambda key: key != told_by(key)):
        models[key] = fit_stage(key, seen[key], line=line_of(key, models))
    return {key: models[key] for key in seen}


def line_of(key: StageKey, models: Mapping[StageKey, StageModel]) -> StageModel | None:
    """What stands beside a key's coefficients, if other fitted models tell it."""
    model = models.get(told_by(key)) if beside(key) else None
    return None if model is None else model.beside_


def fit_stage(
    key: StageKey, rows: Observations, equations: Equations | None = None, line: StageModel | None = None
) -> StageModel:
    """Fit a stage's coefficients, and others beside them where two lines explain what one does not.

    Parameters
    ----------
    key : tuple of str
    rows : Observations
    equations : Equations, optional
        Of these rows, where they are known already.
    line : StageModel, optional
        What stands beside them, where other rows told it: then it counts, whatever these say.
    """
    equations = equations_of(key, rows) if equations is None else equations
    one = _fit_one(key, rows, equations)
    if beside(key) is None:
        return one
    if line:
        one.beside_ = line
        return _fit_two(key, rows, equations, own_rows(one, rows)[line], line) or one
    usual = _misfit(one, rows)
    if key != told_by(key) or usual < BESIDE_MISFIT:
        return one
    pixels = np.prod(rows.X[:, [0, 1, 4]], axis=1)
    starts = [pixels <= np.quantile(pixels, share) for share in BESIDE_STARTS]
    found = [_fit_two(key, rows, equations, deep) for deep in starts]
    best = min((two for two in found if two), key=lambda two: _misfit(two, rows), default=one)
    return best if _misfit(best, rows) * BESIDE_GAIN <= usual else one


def _fit_two(
    key: StageKey, rows: Observations, equations: Equations, deep: Mask, line: StageModel | None = None
) -> StageModel | None:
    """Fit two sets of coefficients, each to the rows of which it gives more than the other; None where one would get too few.

    Parameters
    ----------
    deep : array of bool, shape (rows,)
        To begin with, the rows of what stands beside.
    line : StageModel, optional
        What stands beside, if it is known already.
    """
    other = beside(key) or key
    others = equations if line else equations_of(other, rows)
    for _ in range(MOST_ROUNDS):
        if (~deep).sum() < FEWEST_BESIDE or (line is None and deep.sum() < FEWEST_BESIDE):
            return None
        # regimes would take what is left of the other line for a difference of their own
        model = _fit_one(key, rows.where(~deep), equations.where(~deep), apart=False)
        model.beside_ = line or _fit_one(other, rows.where(deep), others.where(deep), apart=False)
        now = own_rows(model, rows)[model.beside_]
        if (now == deep).all():
            break
        deep = now
    return model


def _misfit(model: StageModel, rows: Observations) -> float:
    """How far the rows that most are nearer than lie from a fit, relative to the run's peak."""
    known = ~rows.at_least
    off = np.abs(model.predict(rows.X[known]) - rows.activation_bytes[known]) / rows.peak_bytes[known]
    return float(np.quantile(off * rows.weight[known], BESIDE_QUANTILE)) if known.any() else 0.0


def own_rows(model: StageModel, rows: Observations) -> dict[StageModel, Any]:
    """Of a model and what stands beside it, which rows each gives more of than the other."""
    if model.beside_ is None:
        return {model: np.ones(len(rows), dtype=bool)}
    deep = model.beside_.predict(rows.X) >= model.predict(rows.X)  # it gives the higher of the two
    return {model: ~deep, model.beside_: deep}


def _fit_one(key: StageKey, rows: Observations, equations: Equations, *, apart: bool | None = None) -> StageModel:
    """Fit one set of coefficients; a lower bound counts only where the fit lies below it."""
    bound = rows.at_least
    if bound.all() or not bound.any():
        return StageModel(key).solve(equations, apart=apart)
    use = ~bound
    for _ in range(MOST_ROUNDS):
        model = StageModel(key).solve(equations.where(use), apart=apart)
        # a bound that the fit has come to exceed must leave again, or it would pull the fit down
        wanted = counted(model, rows)
        if (wanted == use).all():
            break
        use = wanted
    return model


def equations_of(key: StageKey, rows: Observations) -> Equations:
    """What the rows say of the coefficients."""
    return Equations.of(key, rows.X, rows.activation_bytes, rows.peak_bytes, rows.weight)


def counted(model: StageModel, rows: Observations) -> Any:
    """Which rows say something of the peak: a lower bound that the fit exceeds does not, unless there is nothing else."""
    bound = rows.at_least
    if bound.all() or not bound.any():
        return np.ones(len(rows), dtype=bool)
    return ~bound | (model.predict(rows.X) < rows.activation_bytes)


def fitted_without(
    key: StageKey, seen: Observations, folds: Indices, whole: StageModel, lines: Mapping[int, StageModel | None] = {}
) -> Iterator[tuple[int, StageModel]]:
    """Fit a stage without each of its folds in turn.

    Parameters
    ----------
    key : tuple of str
    seen : Observations
    folds : array, shape (rows,)
        The fold of each row; those of none, -1, are never left out.
    whole : StageModel
        Fitted to all of them.
    lines : mapping, optional
        What other rows tell of what stands beside, without each fold.
    """
    count, equations = int(folds.max(initial=-1)) + 1, equations_of(key, seen)
    if len(seen) <= MANY_ROWS or whole.beside_ is not None:
        for fold in range(count):
            stay = np.flatnonzero(folds != fold)
            if not seen.at_least[stay].all():
                yield fold, fit_stage(key, seen.where(stay), equations.where(stay), lines.get(fold))
        return
    use = counted(whole, seen)
    few, of = equations.where(use).summed_up(folds[use])
    for fold in range(count):
        stays = of != fold
        if stays.any():
            yield fold, StageModel(key).solve(few.where(stays), apart=len(whole.coef_) > 1)


def predict_stages(models: Mapping[StageKey, StageModel], runs: Runs, some: Any = None) -> Array:
    """The stage peaks of all runs, or some: a column of bytes for each of `STAGES`, weights included.

    NaN where a variant has no such stage, or the stage no model.
    """
    wanted = np.ones(len(runs), dtype=bool)
    if some is not None:
        wanted[:] = False
        wanted[some] = True
    peaks = np.full((len(runs), len(STAGES)), np.nan)
    for key, (column, rows) in runs.stages.items():
        mine = rows[wanted[rows]]
        if key in models and len(mine):
            peaks[mine, column] = models[key].predict(runs.X[mine]) + runs.weights_bytes[mine, column]
    return peaks if some is None else peaks[some]


def cross_validate(
    runs: Runs, seen: Mapping[StageKey, Observations], models: Mapping[StageKey, StageModel]
) -> tuple[Array, Mask, int]:
    """Predict each run that succeeded by models that never saw its resolution.

    Runs out of memory help to fit, as in `sdfit.fit.fit.fit`, and are not predicted.

    Parameters
    ----------
    runs : Runs
    seen, models : mapping
        What `sdfit.fit.observations.observe` finds in them, and the models that all of them give.

    Returns
    -------
    peaks : array, shape (runs, stages)
        As `predict_stages` gives them; NaN for a whole run of which some stage was seen in no other fold.
    borrowed : array of bool, shape (runs,)
        Whether the stage that sets its peak has coefficients that no other row of its regime told: all of them were left out
        with it, and a neighbouring regime's stood in.
    folds : int
    """
    of_resolution = np.full(len(runs.names), -1)
    of_resolution[runs.groups[runs.ok]] = fold_of(runs.groups[runs.ok], FOLDS)
    folds = of_resolution[runs.groups]
    count = int(folds.max(initial=-1)) + 1
    peaks = np.full((len(runs), len(STAGES)), np.nan)
    untold = np.zeros((len(runs), len(STAGES)), dtype=bool)
    lines: dict[StageKey, dict[int, StageModel | None]] = {}
    for key, (column, rows) in sorted(runs.stages.items(), key=lambda one: one[0] != told_by(one[0])):
        if key not in seen:
            continue
        which = np.broadcast_to(regime(key[0], Sizes.of(*runs.X.T)), len(runs))
        left_out = np.zeros((count + 1, len(REGIMES)), dtype=np.intp)
        np.add.at(left_out, (folds[seen[key].places], which[seen[key].places]), 1)
        told = lines.get(told_by(key), {})
        for fold, model in fitted_without(key, seen[key], folds[seen[key].places], models[key], told):
            lines.setdefault(key, {})[fold] = model.beside_
            left = rows[runs.ok[rows] & (folds[rows] == fold)]
            peaks[left, column] = model.predict(runs.X[left]) + runs.weights_bytes[left, column]
            untold[left, column] = (left_out.sum(axis=0) == left_out[fold])[which[left]]
    # a stage that no training fold saw makes the whole prediction unknown, not small
    peaks[(np.isnan(peaks) & runs.runs_through).any(axis=1)] = np.nan
    top = np.argmax(np.where(np.isnan(peaks), -np.inf, peaks), axis=1)
    borrowed = untold[np.arange(len(runs)), top] & ~np.isnan(peaks).all(axis=1)
    return peaks, borrowed, count
