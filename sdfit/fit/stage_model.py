"""The regression of one stage: non-negative coefficients of its terms, by bounded least squares.

`sdfit.fit.estimator` makes a scikit-learn estimator of it. Residuals are relative to the run's whole peak, so that an error counts as the
share of the answer that it spoils. Columns that the data cannot tell from earlier ones are left out and named. Where
one set of coefficients does not describe all regimes (batch of one, several, past 2^31 elements), each regime gets its
own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import nnls
from scipy.special import stdtrit

from sdfit.equation.regimes import REGIMES, regime
from sdfit.equation.sizes import Array, Sizes
from sdfit.equation.stages import StageKey
from sdfit.equation.terms import design_matrix, terms_of

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
    condition_ : float
        Condition number of the scaled design matrix of the identified terms.

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
        per_byte = _per_byte(y if peak_bytes is None else peak_bytes, weight)
        self.terms_ = terms_of(self.key)
        self.n_features_in_ = X.shape[1]
        sizes = Sizes.of(*X.T)
        design, target = design_matrix(self.key, sizes) * per_byte[:, None], y * per_byte
        self.unidentified_, self.condition_ = self._unidentified(design)
        pooled = self._solve(design, target)
        self.coef_, self.regimes_ = pooled[None, :], [0] * len(REGIMES)
        found = np.broadcast_to(regime(self.key[0], sizes), len(X))
        own = self._own(design, target, found)
        if own and self._split_explains(design, target, found, pooled, own):
            self._split(own)
        return self

    def predict(self, X: Any) -> Array:
        """Peak activations [bytes] for rows of `SIZE_COLUMNS`."""
        sizes = Sizes.of(*np.asarray(X, dtype=float).T)
        total: Array = np.sum(self.coef_[self.sets(sizes)] * design_matrix(self.key, sizes), axis=1)
        return total

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

    def _unidentified(self, design: Array) -> tuple[dict[str, str], float]:
        """Walk through the terms in order and leave out what the earlier ones span already."""
        length = lengths(design)
        basis = np.empty((0, len(design)))
        kept: list[int] = []
        missing: dict[str, str] = {}
        for i, name in enumerate(self.terms_):
            rest = design[:, i] / (length[i] or 1.0)
            for _ in range(2):  # twice, for orthogonality in floating point
                rest = rest - (basis @ rest) @ basis
            norm = float(np.sqrt(rest @ rest))
            if norm < COLLINEAR:
                missing[name] = _WHAT_IDENTIFIES[name]
            else:
                basis = np.vstack([basis, rest / norm])
                kept.append(i)
        scaled = design[:, kept] / length[kept]
        return missing, float(np.linalg.cond(scaled)) if kept else 0.0

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

    def _own(self, design: Array, target: Array, found: Array) -> dict[int, Array]:
        """Coefficients of each regime by itself, starting from the one with most rows."""
        present, counts = np.unique(found, return_counts=True)
        if len(present) < 2:
            return {}
        first = int(present[np.argmax(counts)])
        own = {first: self._solve(design[found == first], target[found == first])}
        for r in (int(r) for r in present if r != first):
            mine = found == r
            anchor = own[next(o for o in REGIMES[r].neighbours if o in own)]
            own[r] = self._solve(design[mine], target[mine], anchor)
        return own

    def _split_explains(self, design: Array, target: Array, found: Array, pooled: Array, own: dict[int, Array]) -> bool:
        """Whether sets of their own explain what the common one misses, in most rows of some regime."""
        common = self._without_far(design, target, pooled)
        for r, coef in own.items():
            mine = found == r
            apart = self._without_far(design[mine], target[mine], coef)
            # the lower of two neighbours: of two rows or more one alone never decides
            before, after = (
                np.quantile(np.abs(target[mine] - design[mine] @ c), SPLIT_QUANTILE, method="lower")
                for c in (common, apart)
            )
            if before > POOLED_MISFIT and before > SPLIT_GAIN * after:
                return True
        return False

    def _without_far(self, design: Array, target: Array, coef: Array) -> Array:
        """The coefficients without the rows that they miss by far, which bend them towards themselves."""
        misfit = np.abs(target - design @ coef)
        near = misfit <= max(POOLED_MISFIT, FAR * float(np.median(misfit)))
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


def nonnegative(design: Array, target: Array) -> Array:
    """Least squares with coefficients >= 0 (`scipy.optimize.nnls`), columns scaled to length one first."""
    length = lengths(design)
    length[length == 0] = 1.0
    solved: Array = nnls(design / length, target, maxiter=50 * max(design.shape[1], 1))[0] / length
    return solved


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
    names, codes = np.unique(groups, return_inverse=True)
    coordinates = u.T @ target
    without = []
    for code in range(len(names)):
        mine = codes == code
        held, vectors = np.linalg.eigh(np.eye(rank) - u[mine].T @ u[mine])
        told = held > OPEN
        # without this group the open directions are unknown, and with them every coefficient that they enter
        open_ |= np.abs(back @ vectors[:, ~told]).max(axis=1, initial=0.0) > OPEN * reach
        solved = vectors[:, told].T @ (coordinates - u[mine].T @ target[mine]) / held[told]
        without.append(back @ (vectors[:, told] @ solved))
    estimate = back @ coordinates
    count = len(names)
    spread = np.sqrt((count - 1) / count * np.sum((np.array(without) - np.mean(without, axis=0)) ** 2, axis=0))
    half = float(stdtrit(max(count - rank, 1), (1 + LEVEL) / 2)) * spread  # Student's quantile
    return estimate / length, np.where(open_, np.inf, half) / length
