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
from sdfit.equation.stages import STAGES, StageKey
from sdfit.fit.folds import FOLDS, Indices, fold_of
from sdfit.fit.observations import Observations, Runs
from sdfit.fit.stage_model import MANY_ROWS, Equations, StageModel

Mask = np.ndarray[Any, np.dtype[np.bool_]]

MOST_ROUNDS = 20
"""Fits of one stage until the lower bounds that count are settled."""


def fit_stage(key: StageKey, rows: Observations, equations: Equations | None = None) -> StageModel:
    """Fit one set of coefficients; a lower bound counts only where the fit lies below it.

    Parameters
    ----------
    key : tuple of str
    rows : Observations
    equations : Equations, optional
        Of these rows, where they are known already.
    """
    equations = equations_of(key, rows) if equations is None else equations
    bound = rows.at_least
    if bound.all() or not bound.any():
        return StageModel(key).solve(equations)
    use = ~bound
    for _ in range(MOST_ROUNDS):
        model = StageModel(key).solve(equations.where(use))
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
    key: StageKey, seen: Observations, folds: Indices, whole: StageModel
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
    """
    count, equations = int(folds.max(initial=-1)) + 1, equations_of(key, seen)
    if len(seen) <= MANY_ROWS:
        for fold in range(count):
            stay = np.flatnonzero(folds != fold)
            if not seen.at_least[stay].all():
                yield fold, fit_stage(key, seen.where(stay), equations.where(stay))
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
    for key, (column, rows) in runs.stages.items():
        if key not in seen:
            continue
        which = np.broadcast_to(regime(key[0], Sizes.of(*runs.X.T)), len(runs))
        left_out = np.zeros((count + 1, len(REGIMES)), dtype=np.intp)
        np.add.at(left_out, (folds[seen[key].places], which[seen[key].places]), 1)
        for fold, model in fitted_without(key, seen[key], folds[seen[key].places], models[key]):
            left = rows[runs.ok[rows] & (folds[rows] == fold)]
            peaks[left, column] = model.predict(runs.X[left]) + runs.weights_bytes[left, column]
            untold[left, column] = (left_out.sum(axis=0) == left_out[fold])[which[left]]
    # a stage that no training fold saw makes the whole prediction unknown, not small
    peaks[(np.isnan(peaks) & runs.runs_through).any(axis=1)] = np.nan
    top = np.argmax(np.where(np.isnan(peaks), -np.inf, peaks), axis=1)
    borrowed = untold[np.arange(len(runs)), top] & ~np.isnan(peaks).all(axis=1)
    return peaks, borrowed, count
