"""The regression of one stage: non-negative coefficients of its terms, by bounded least squares.

`sdfit.fit.estimator` makes a scikit-learn estimator of it. Residuals are relative to the run's whole peak, so that an error counts as the
share of the answer that it spoils. Columns that the data cannot tell from earlier ones are left out and named. Where
one set of coefficients does not describe all regimes (batch of one, several, past 2^31 elements), each regime gets its
own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from sdfit.equation.regimes import REGIMES, regime
from sdfit.equation.sizes import Array, Sizes
from sdfit.equation.stages import StageKey
from sdfit.equation.terms import design_matrix, terms_of
from sdfit.fit.folds import fold_of
from sdfit.fit.solver import least

COLLINEAR = 1e-5
"""A column is identified if at least this share of its length is not in the span of the earlier ones."""
POOLED_MISFIT = 2e-4
"""Weighted misfit, relative to the run's peak, up to which regimes share one set of coefficients."""
SPLIT_GAIN, SPLIT_QUANTILE = 2.0, 0.75
"""Sets of their own must divide a regime's misfit by at least this much; its misfit is this quantile of its rows', so
that no single row decides."""
FAR = 12.0
"""So many times the median misfit is far: such rows have no say in whether regimes are split."""
ANCHOR = 1e-3
"""How strongly a regime's coefficients hold to its neighbour's where its own rows leave them open, beside the rows."""
OPEN = 1e-6
"""A direction of which the remaining rows hold no more than this share is open without the group that was left out."""
LEVEL = 0.95
"""Of the coefficients' bounds."""
MANY_ROWS = 5000
"""Of more rows than that, those that stay or go together are summed up in few before they are fitted again and again."""
MOST_LEFT_OUT = 2000
"""Of more resolutions than that, several are left out at a time for the coefficients' bounds."""

Folds = np.ndarray[Any, np.dtype[np.intp]]


@dataclass(frozen=True, slots=True)
class Equations:
    """Rows of a stage as what they say of its coefficients, as shares of the run's peak.

    Attributes
    ----------
    design, target : array, shape (rows, terms), and (rows,)
    regimes, counts : array, shape (rows,)
        An index into `sdfit.equation.regimes.REGIMES`; how many observations a row stands for.
    """

    design: Array
    target: Array
    regimes: Any
    counts: Array

    @classmethod
    def of(cls, key: StageKey, X: Array, y: Array, peak_bytes: Any = None, weight: Any = None) -> Equations:
        """The equations of observations; see `StageModel.fit`."""
        per_byte, sizes = _per_byte(y if peak_bytes is None else peak_bytes, weight), Sizes.of(*X.T)
        regimes = np.broadcast_to(regime(key[0], sizes), len(X))
        return cls(design_matrix(key, sizes) * per_byte[:, None], y * per_byte, regimes, np.ones(len(X)))

    def where(self, use: Any) -> Equations:
        """Some of the rows."""
        return Equations(self.design[use], self.target[use], self.regimes[use], self.counts[use])

    def summed_up(self, folds: Folds) -> tuple[Equations, Folds]:
        """Few rows that say the same: for those of a regime that are in one fold, their triangle. And the fold of each.

        Least squares see no difference: of the rows Q·R they take R and the target in Q's directions, to rounding.
        """
        cells, first, which = np.unique(folds * len(REGIMES) + self.regimes, return_index=True, return_inverse=True)
        columns = np.column_stack([self.design, self.target])
        order, ends = np.argsort(which, kind="stable"), np.cumsum(np.bincount(which))
        parts = [
            np.linalg.qr(columns[rows], mode="r") if len(rows) > columns.shape[1] else columns[rows]
            for rows in np.split(order, ends[:-1])
        ]
        of = np.repeat(np.arange(len(cells)), [len(part) for part in parts])
        rows, counts = np.vstack(parts), np.bincount(which) / np.bincount(of)
        whole = Equations(rows[:, :-1], rows[:, -1], self.regimes[first][of], counts[of])
        return whole, folds[first][of]


class StageModel:
    """Peak activations of one stage as a non-negative combination of its terms.

    Parameters
    ----------
    key : tuple of str
        The stage and the fields that reach it, as `sdfit.equation.stages.stage_key` gives it.

    Attributes
    ----------
    coef_ : array, shape (sets, terms)
        In the units of `sdfit.equation.terms.TERMS`.
    regimes_ : list of int
        Which row of ``coef_`` each of `sdfit.equation.regimes.REGIMES` uses.
    unidentified_ : dict
        Terms that the data cannot tell from others, and what to sweep to tell them.
    beside_ : StageModel or None
        The coefficients that stand beside these (`sdfit.equation.stages.beside`): whichever gives more counts.

    Examples
    --------
    >>> X = np.array([[h, h, 77, n, n, 0, 0] for h in (256, 512, 768, 1024) for n in (1, 2)], dtype=float)
    >>> A, n = X[:, 0] ** 2, X[:, 4]
    >>> model = StageModel(("unet", "float16", "eager")).fit(X, 1e6 + 110 * n * A + 0.0078125 * n * A**2)
    >>> dict(zip(model.terms_, model.coef_[0].round(7).tolist()))["n·A²"]
    0.0078125
    """

    def __init__(self, key: StageKey = ("unet", "float16", "sdpa")) -> None:
        self.key = key
        self.beside_: StageModel | None = None

    def fit(self, X: Any, y: Any, peak_bytes: Any = None, weight: Any = None) -> StageModel:
        """Fit the coefficients.

        Parameters
        ----------
        X : array, shape (rows, 7)
            `sdfit.equation.sizes.SIZE_COLUMNS`: pixels, pixels, tokens, images, samples, 0 or 1, 0 or 1.
        y : array, shape (rows,)
            Peak activations [bytes]: the stage's peak less the resident weights.
        peak_bytes : array, shape (rows,), optional
            The run's peak, to which residuals are relative [bytes]. None: ``y``.
        weight : array, shape (rows,), optional
            How much each relative residual counts; None: 1.
        """
        X, y = np.asarray(X, dtype=float), np.asarray(y, dtype=float)
        self.n_features_in_ = X.shape[1]
        return self.solve(Equations.of(self.key, X, y, peak_bytes, weight))

    def solve(self, equations: Equations, *, apart: bool | None = None) -> StageModel:
        """Fit the coefficients to equations; whether regimes stand ``apart``, None finds out."""
        self.terms_, self._equations = terms_of(self.key), equations
        design, target = equations.design, equations.target
        self.unidentified_ = self._unidentified(design)
        pooled = self._solve(design, target)
        self.coef_, self.regimes_ = pooled[None, :], [0] * len(REGIMES)
        missed = self._missed(equations, pooled) if apart is None else {}
        own = self._own(equations) if apart or missed else {}
        if own and (apart or self._split_explains(equations, missed, own)):
            self._split(own)
        return self

    @property
    def condition_(self) -> float:
        """Condition number of the scaled design matrix of the identified terms."""
        kept = [i for i, name in enumerate(self.terms_) if name not in self.unidentified_]
        design = self._equations.design
        return float(np.linalg.cond(design[:, kept] / lengths(design)[kept])) if kept else 0.0

    def predict(self, X: Any) -> Array:
        """Peak activations [bytes] for rows of `SIZE_COLUMNS`."""
        sizes = Sizes.of(*np.asarray(X, dtype=float).T)
        total: Array = np.sum(self.coef_[self.sets(sizes)] * design_matrix(self.key, sizes), axis=1)
        return total if self.beside_ is None else np.maximum(total, self.beside_.predict(X))

    def sets(self, sizes: Sizes) -> Any:
        """The row of ``coef_`` that each of some sizes uses."""
        return np.asarray(self.regimes_)[np.broadcast_to(regime(self.key[0], sizes), len(sizes.A))]

    def bounds(self, X: Any, y: Any, peak_bytes: Any = None, weight: Any = None, *, groups: Any) -> tuple[Array, Array]:
        """95 % bounds of the coefficients, by leaving out whole resolutions.

        Parameters
        ----------
        X, y, peak_bytes, weight
            As in `fit`.
        groups : array, shape (rows,)
            The resolution of each row; rows of one resolution stay together.

        Returns
        -------
        low, high : arrays of the shape of ``coef_``
            ``high`` is infinite, and ``low`` zero, where some resolution alone tells the coefficient, or none does: the
            estimate then rests on that one, or on a neighbouring regime.

        Notes
        -----
        The counters are deterministic, so the bounds show misfit and the choice of sizes, not noise. They are the
        grouped jackknife's: with g groups, the spread of the g estimates that each lack one group, times Student's
        quantile for g less the number of terms.

        The estimates have no bound at zero; the bounds do. A coefficient whose neighbour is held at zero takes over what
        that one would have been below it, and leaving out repeats this bias instead of showing it.
        """
        X, y = np.asarray(X, dtype=float), np.asarray(y, dtype=float)
        per_byte = _per_byte(y if peak_bytes is None else peak_bytes, weight)
        sizes = Sizes.of(*X.T)
        sets, design = self.sets(sizes), design_matrix(self.key, sizes) * per_byte[:, None]
        low, high = self.coef_.copy(), self.coef_.copy()
        keep = [i for i, name in enumerate(self.terms_) if name not in self.unidentified_]
        for row in range(len(self.coef_)):
            mine = sets == row
            if not mine.any():
                continue
            middle, half = _jackknife(design[mine][:, keep], (y * per_byte)[mine], np.asarray(groups)[mine])
            # a bound never excludes the estimate itself, and no coefficient is negative
            low[row, keep] = np.clip(middle - half, 0.0, self.coef_[row, keep])
            high[row, keep] = np.maximum(middle + half, self.coef_[row, keep])
        return low, high

    def _unidentified(self, design: Array) -> dict[str, str]:
        """Walk through the terms in order and leave out what the earlier ones span already."""
        length = lengths(design)
        directions, found = np.empty(design.shape[::-1]), 0
        missing: dict[str, str] = {}
        for i, name in enumerate(self.terms_):
            rest, basis = design[:, i] / (length[i] or 1.0), directions[:found]
            for _ in range(2):  # twice, for orthogonality in floating point
                rest = rest - (basis @ rest) @ basis
            norm = float(np.sqrt(rest @ rest))
            if norm < COLLINEAR:
                missing[name] = _WHAT_IDENTIFIES[name]
            else:
                directions[found] = rest / norm
                found += 1
        return missing

    def _solve(self, design: Array, target: Array, anchor: Array | None = None) -> Array:
        """Non-negative least squares; what the rows leave open stays near the anchor."""
        keep = [i for i, name in enumerate(self.terms_) if name not in self.unidentified_]
        columns = design[:, keep]
        if anchor is not None:
            pull = np.diag(ANCHOR * lengths(columns))
            columns, target = np.vstack([columns, pull]), np.concatenate([target, pull @ anchor[keep]])
        coef = np.zeros(len(self.terms_))
        coef[keep] = nonnegative(columns, target)
        return coef

    def _own(self, equations: Equations) -> dict[int, Array]:
        """Coefficients of each regime by itself, starting from the one with most rows."""
        counts = np.bincount(equations.regimes, weights=equations.counts, minlength=len(REGIMES))
        present, first = np.flatnonzero(counts), int(np.argmax(counts))
        if len(present) < 2:
            return {}
        mine = equations.where(equations.regimes == first)
        own = {first: self._solve(mine.design, mine.target)}
        for r in (int(r) for r in present if r != first):
            mine = equations.where(equations.regimes == r)
            anchor = own[next(o for o in REGIMES[r].neighbours if o in own)]
            own[r] = self._solve(mine.design, mine.target, anchor)
        return own

    def _missed(self, equations: Equations, pooled: Array) -> dict[int, float]:
        """By how much common coefficients miss the regimes for which they do not do; none where there is one regime."""
        present = np.unique(equations.regimes)
        if len(present) < 2:
            return {}
        common = self._without_far(equations.design, equations.target, pooled)
        missed = np.abs(equations.target - equations.design @ common)
        misfits = {int(r): _misfit(missed[equations.regimes == r]) for r in present}
        return {r: misfit for r, misfit in misfits.items() if misfit > POOLED_MISFIT}

    def _split_explains(self, equations: Equations, missed: dict[int, float], own: dict[int, Array]) -> bool:
        """Whether sets of their own explain what the common one misses, in most rows of some regime."""
        for r, before in missed.items():
            mine = equations.where(equations.regimes == r)
            apart = self._without_far(mine.design, mine.target, own[r])
            if before > SPLIT_GAIN * _misfit(np.abs(mine.target - mine.design @ apart)):
                return True
        return False

    def _without_far(self, design: Array, target: Array, coef: Array) -> Array:
        """The coefficients without the rows that they miss by far, which bend them towards themselves."""
        misfit = np.abs(target - design @ coef)
        near = misfit <= max(POOLED_MISFIT, FAR * median(misfit))
        return coef if near.all() else self._solve(design[near], target[near])

    def _split(self, own: dict[int, Array]) -> None:
        """Give each regime coefficients of its own."""
        index = {r: i for i, r in enumerate(sorted(own))}
        self.coef_ = np.array([own[r] for r in sorted(own)])
        self.regimes_ = [
            index[r] if r in index else next(index[o] for o in REGIMES[r].neighbours if o in index)
            for r in range(len(REGIMES))
        ]


_WHAT_IDENTIFIES = {
    "1": "more than one size",
    "m": "batch sizes at one resolution",
    "B": "batch sizes at one resolution",
    "n": "batch sizes at one resolution",
    "m·P": "more resolutions",
    "n·A": "more resolutions",
    "B·A": "more resolutions",
    "m·P²": "more resolutions",
    "n·A²": "more resolutions",
    "A²": "more resolutions",
    "n·L·A": "prompt_length above 77 at several resolutions",
    "n·L": "prompt_length above 77",
    "D": "vae_slicing or vae_tiling",
}
"""What to sweep so that a term can be told from those before it."""


def lengths(design: Array) -> Array:
    """The length of each column: `numpy.linalg.norm` to the bit, in a third of the time."""
    found: Array = np.sqrt(np.add.reduce(design * design, axis=0))
    return found


def median(values: Array) -> float:
    """`numpy.median` to the bit, in a tenth of the time for few numbers."""
    half, odd = divmod(len(values), 2)
    if not half:
        return float(values[0]) if odd else math.nan
    found = np.partition(values, half if odd else (half - 1, half))
    return float(found[half] if odd else (found[half - 1] + found[half]) / 2)


def _misfit(missed: Array) -> float:
    """What a regime's rows are missed by: the lower of two neighbours, for of two rows or more one alone never decides."""
    at = int((len(missed) - 1) * SPLIT_QUANTILE)
    return float(np.partition(missed, at)[at])


def nonnegative(design: Array, target: Array) -> Array:
    """Least squares with coefficients >= 0 (`scipy.optimize.nnls`), columns scaled to length one first."""
    length = lengths(design)
    length[length == 0] = 1.0
    return least(design / length, target, 50 * max(design.shape[1], 1)) / length


def _per_byte(peak_bytes: Any, weight: Any) -> Array:
    """What a residual in bytes is multiplied by."""
    found: Array = (1.0 if weight is None else np.asarray(weight, dtype=float)) / np.maximum(
        np.asarray(peak_bytes, dtype=float), 1.0
    )
    return found


def _jackknife(design: Array, target: Array, groups: Any) -> tuple[Array, Array]:
    """Estimates and half-widths of least squares without bounds; infinite half-widths where a coefficient is open.

    The rows are first turned into orthonormal directions, in which leaving a group out is a small, well-conditioned
    problem: what the others still hold of each direction is 1 less the share of the group.
    """
    length = np.linalg.norm(design, axis=0)
    length[length == 0] = 1.0
    u, s, vt = np.linalg.svd(design / length, full_matrices=False)
    rank = int(np.sum(s > COLLINEAR * s[0])) if len(s) and s[0] else 0
    u, back = u[:, :rank], vt[:rank].T / s[:rank]  # coefficients (scaled) = back @ coordinates
    reach = np.linalg.norm(back, axis=1)
    open_ = np.abs(vt[rank:]).max(axis=0, initial=0.0) > OPEN
    codes = np.unique(groups, return_inverse=True)[1]
    if len(codes) and codes.max() >= MOST_LEFT_OUT:
        codes = fold_of(codes, MOST_LEFT_OUT)
    coordinates = u.T @ target
    order, ends = np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))
    parts = [(u[mine], target[mine]) for mine in np.split(order, ends[:-1])]
    held_out_, directions = np.linalg.eigh(np.array([np.eye(rank) - mine.T @ mine for mine, _ in parts]))
    without = []
    for (mine, aim), held, vectors in zip(parts, held_out_, directions, strict=True):
        told = held > OPEN
        # without this group the open directions are unknown, and with them every coefficient that they enter
        if not told.all():
            open_ |= np.abs(back @ vectors[:, ~told]).max(axis=1, initial=0.0) > OPEN * reach
        solved = vectors[:, told].T @ (coordinates - mine.T @ aim) / held[told]
        without.append(back @ (vectors[:, told] @ solved))
    estimate = back @ coordinates
    count = len(parts)
    spread = np.sqrt((count - 1) / count * np.sum((np.array(without) - np.mean(without, axis=0)) ** 2, axis=0))
    half = float(stdtrit(max(count - rank, 1), (1 + LEVEL) / 2)) * spread  # Student's quantile
    return estimate / length, np.where(open_, np.inf, half) / length
