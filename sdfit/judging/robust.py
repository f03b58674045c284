"""Regression that one bad row cannot spoil, and the search for a term that an equation lacks.

`trimmed_fit` is least trimmed squares: of all subsets of about half of the rows, the one that the equation describes
best, then every row that agrees with it. It is used to name bad rows, because a plain fit hides them: least squares
spreads the error of one row over the others (masking), and leaving out one row at a time fails as soon as there are
two. Both stay non-negative, as the coefficients are.

What it does not know: where more than half of the rows are wrong, the wrong ones look right.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdfit.fit.folds import fold_of
from sdfit.fit.stage_model import MANY_ROWS, Equations, median, nonnegative

Array = np.ndarray[Any, np.dtype[np.float64]]

MATERIAL = 0.005
"""A row is far off only if it misses by at least this share of the run's peak: smaller misfit spoils no answer."""
SCALES = 8.0
"""... and by this many times what the other rows miss by (1.4826 times their median absolute residual)."""
MOST_SUBSETS = 200
STARTS, STEPS, FINALISTS = 120, 2, 6
SAMPLE = 1500
"""Rows that the subsets are drawn and concentrated in, where there are `MANY_ROWS`: nested, as Rousseeuw and Van Driessen do."""
TERM_MISFIT = 0.002
"""Held-out misfit (root mean square, share of the run's peak) above which a lacking term is looked for."""
TERM_GAIN = 3.0
"""A term is lacking if it divides that misfit by at least this."""
ROWS_PER_TERM = 3


@dataclass(frozen=True, slots=True)
class Trimmed:
    """What `trimmed_fit` found.

    Parameters
    ----------
    coef : array, shape (terms,)
        From the rows that are not ``far``.
    residual : array, shape (rows,)
        target - design @ coef; a far row had no part in the coefficients it is judged by.
    scale : float
        Robust size of the residuals of the other rows.
    far : array of bool, shape (rows,)
    """

    coef: Array
    residual: Array
    scale: float
    far: np.ndarray[Any, np.dtype[np.bool_]]


def trimmed_fit(design: Array, target: Array, *, seed: int = 0) -> Trimmed:
    """Fit non-negative coefficients to the rows that agree, and mark those that do not.

    Parameters
    ----------
    design : array, shape (rows, terms)
        Each row divided by the run's peak, so that residuals are shares of it.
    target : array, shape (rows,)
        Likewise.
    seed : int
        Of the random subsets that are tried where there are too many to try all.

    Notes
    -----
    Least trimmed squares by concentration steps (Rousseeuw and Van Driessen 2006) with h = (rows + terms + 1) // 2,
    then reweighting: rows beyond ``max(MATERIAL, SCALES * scale)`` are far, if they are beyond ``SCALES`` times the usual
    share of their activations too; the rest is fitted again.

    Examples
    --------
    >>> x = np.arange(1.0, 9.0)
    >>> found = trimmed_fit(np.column_stack([np.ones(8), x]), np.where(x == 3, 40.0, 1 + 2 * x))
    >>> found.far.nonzero()[0].tolist(), found.coef.round(6).tolist()
    ([2], [1.0, 2.0])
    """
    rows, terms = design.shape
    keep = min((rows + terms + 1) // 2, rows)
    coef = _trimmed(design, target, keep, np.random.default_rng(seed))
    far = np.zeros(rows, dtype=bool)
    scale = 0.0
    for _ in range(10):
        predicted = design @ coef
        residual = np.abs(target - predicted)
        # the rows that stay: the half that the first coefficients come from fits itself too well to say
        scale = 1.4826 * median(residual[~far])
        share = residual / np.maximum(predicted, MATERIAL)
        # misfit grows with the activations: a row is not far for being the one that is mostly activations
        found = (residual > max(MATERIAL, SCALES * scale)) & (share > SCALES * 1.4826 * median(share[~far]))
        if rows - found.sum() < terms + 1:  # nothing would be left to agree
            break
        settled, far = bool((found == far).all()), found
        coef = nonnegative(design[~far], target[~far])
        if settled:
            break
    residual = target - design @ coef
    return Trimmed(coef, residual, scale, far)


def _trimmed(design: Array, target: Array, keep: int, rng: np.random.Generator) -> Array:
    rows, terms = design.shape
    if rows > MANY_ROWS:  # a sample finds what the finalists then settle on all rows
        some = rng.choice(rows, size=SAMPLE, replace=False)
        coef = _trimmed(design[some], target[some], (SAMPLE + terms + 1) // 2, rng)
        return _concentrate(design, target, coef, keep, STEPS)
    if math.comb(rows, keep) <= MOST_SUBSETS:
        subsets = [np.array(s) for s in itertools.combinations(range(rows), keep)]
        return min((nonnegative(design[s], target[s]) for s in subsets), key=lambda c: _loss(design, target, c, keep))
    starts = [nonnegative(design, target)]
    for _ in range(STARTS):
        chosen = rng.choice(rows, size=min(terms + 1, rows), replace=False)
        starts.append(nonnegative(design[chosen], target[chosen]))
    known: dict[bytes, Array] = {}
    first = [_concentrate(design, target, c, keep, STEPS, known) for c in starts]
    first.sort(key=lambda c: _loss(design, target, c, keep))
    last = [_concentrate(design, target, c, keep, 20, known) for c in first[:FINALISTS]]
    return min(last, key=lambda c: _loss(design, target, c, keep))


def _concentrate(
    design: Array, target: Array, coef: Array, keep: int, steps: int, known: dict[bytes, Array] | None = None
) -> Array:
    """So many steps, or until one changes nothing; ``known``: the coefficients of sets of rows, for others that come there."""
    known = {} if known is None else known
    for _ in range(steps):
        before, nearest = coef, np.abs(target - design @ coef).argpartition(keep - 1)[:keep]
        nearest.sort()
        rows = nearest.tobytes()
        if rows not in known:
            known[rows] = nonnegative(design[nearest], target[nearest])
        coef = known[rows]
        if coef is before:
            break
    return coef


def _loss(design: Array, target: Array, coef: Array, keep: int) -> float:
    return float(np.sort((target - design @ coef) ** 2)[:keep].sum())


@dataclass(frozen=True, slots=True)
class LackingTerm:
    """A term that an equation lacks: its name, its coefficient, and the held-out misfit without and with it."""

    name: str
    coef: float
    before: float
    after: float


def held_out_misfit(design: Array, target: Array, groups: Any) -> float:
    """Root mean square residual of each group's rows, predicted by a fit to the other groups.

    Examples
    --------
    >>> x = np.arange(1.0, 7.0)
    >>> round(held_out_misfit(x[:, None], 2 * x, x), 9)
    0.0
    """
    residual = np.zeros(len(target))
    folds = fold_of(groups, None)
    few, many = Equations(design, target, np.zeros(len(target), dtype=np.intp), np.ones(len(target))), folds
    if len(target) > MANY_ROWS:
        few, many = few.summed_up(folds)
    for fold in range(int(folds.max(initial=-1)) + 1):
        out, stay = folds == fold, many != fold
        residual[out] = target[out] - design[out] @ nonnegative(few.design[stay], few.target[stay])
    return float(np.sqrt(np.mean(residual**2)))


def lacking_term(design: Array, target: Array, groups: Any, candidates: Mapping[str, Array]) -> LackingTerm | None:
    """Find the one candidate column that explains what the equation leaves over, if any does.

    Parameters
    ----------
    design, target
        As in `trimmed_fit`.
    groups : array, shape (rows,)
        The resolution of each row; candidates are judged on resolutions that the fit did not see.
    candidates : mapping of str to array, shape (rows,)
        Scaled like the columns of ``design``. Its coefficient may have either sign. One that is not zero in fewer
        than three rows or two groups is skipped: it could absorb a bad row.

        With fewer than `ROWS_PER_TERM` rows per term nothing is looked for: some candidate always fits a few rows.

    Returns
    -------
    LackingTerm or None

    Examples
    --------
    >>> x = np.arange(1.0, 9.0)
    >>> found = lacking_term(np.column_stack([np.ones(8), x]), 1 + x + x * x, x, {"A²": x * x})
    >>> found.name, round(found.coef, 6)
    ('A²', 1.0)
    """
    if len(np.unique(groups)) < 3 or len(target) < ROWS_PER_TERM * design.shape[1]:
        return None
    before = held_out_misfit(design, target, groups)
    if before < TERM_MISFIT:
        return None
    best: LackingTerm | None = None
    for name, column in candidates.items():
        there = column != 0
        if there.sum() < 3 or len(np.unique(groups[there])) < 2:
            continue
        wider = np.column_stack([design, column, -column])
        after = held_out_misfit(wider, target, groups)
        if best is None or after < best.after:
            coef = nonnegative(wider, target)
            best = LackingTerm(name, float(coef[-2] - coef[-1]), before, after)
    return best if best and best.after * TERM_GAIN <= best.before else None
