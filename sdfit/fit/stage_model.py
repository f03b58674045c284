"""The regression of one stage: non-negative coefficients of its terms, by bounded least squares.

`StageModel` is a scikit-learn estimator. Residuals are weighted by one over the run's whole peak, so that an error
counts as the share of the answer that it spoils. Columns that the data cannot tell from earlier ones are left out and
named. Where one set of coefficients does not describe all regimes (batch of one, several, past 2^31 elements), each
regime gets its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import nnls
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted

from sdfit.equation.terms import REGIMES, SIZE_COLUMNS, Sizes, StageKey, evaluate, regime, terms_of

Array = np.ndarray[Any, np.dtype[np.float64]]

COLLINEAR = 1e-5
"""A column is told apart from earlier ones if at least this share of its length is not in their span."""
POOLED_MISFIT = 2e-4
"""Largest error, as a share of the run's peak, for which the regimes share one set of coefficients."""
ANCHOR = 1e-3
"""How strongly a regime's coefficients hold to its neighbour's where its own rows leave them open, beside the rows."""
RESAMPLES = 200
_NEIGHBOURS = {
    0: (1, 2, 3, 4, 5),
    1: (0, 2, 3, 4, 5),
    2: (1, 3, 0, 4, 5),
    3: (2, 1, 5, 4, 0),
    4: (2, 5, 3, 1, 0),
    5: (3, 4, 2, 1, 0),
}
"""Where a regime without rows takes its coefficients from: the nearest that needs more rather than less."""


class StageModel(RegressorMixin, BaseEstimator):
    """Peak activations of one stage as a non-negative combination of its terms.

    Parameters
    ----------
    key : tuple of str
        The stage and the fields that matter to it, as `sdfit.equation.terms.stage_key` gives it.

    Attributes
    ----------
    coef_ : array, shape (sets, terms)
        In the units of `sdfit.equation.terms.TERMS`.
    regimes_ : list of int
        Which row of ``coef_`` each of `sdfit.equation.terms.REGIMES` uses.
    unidentified_ : dict
        Terms that the data cannot tell apart from others, and what to sweep to tell them.
    condition_ : float
        Condition number of the scaled design matrix of the terms that are told apart.

    Examples
    --------
    >>> X = np.array([[h, h, 77, 1, n] for h in (256, 512, 768, 1024) for n in (1, 2)], dtype=float)
    >>> A, n = X[:, 0] ** 2, X[:, 4]
    >>> model = StageModel(("unet", "float16", "eager")).fit(X, 1e6 + 110 * n * A + 0.0078125 * n * A**2)
    >>> dict(zip(model.terms_, model.coef_[0].round(7).tolist()))["n·A²"]
    0.0078125
    """

    def __init__(self, key: StageKey = ("unet", "float16", "sdpa")) -> None:
        self.key = key

    def fit(self, X: Any, y: Any, scale_bytes: Any = None) -> StageModel:
        """Fit the coefficients.

        Parameters
        ----------
        X : array, shape (rows, 7)
            `SIZE_COLUMNS`: pixels, pixels, tokens, images, samples, 0 or 1, 0 or 1; the last two may be left out.
        y : array, shape (rows,)
            Peak activations [bytes]: the stage's peak less the resident weights.
        scale_bytes : array, shape (rows,), optional
            What an error is relative to [bytes]; the run's peak. None: ``y``.
        """
        X, y = np.asarray(X, dtype=float), np.asarray(y, dtype=float)
        scale = np.maximum(y if scale_bytes is None else np.asarray(scale_bytes, dtype=float), 1.0)
        self.terms_ = terms_of(self.key)
        self.n_features_in_ = X.shape[1]
        sizes = self.sizes(X)
        design, weight = self.design(sizes), 1.0 / scale
        found = np.broadcast_to(regime(self.key, sizes), len(X))
        self.unidentified_, self.condition_ = self._unidentified(design * weight[:, None])
        pooled = self._solve(design, y, weight)
        self.coef_, self.regimes_ = pooled[None, :], [0] * len(REGIMES)
        misfit = np.abs(design @ pooled - y) * weight
        if misfit.max(initial=0.0) > POOLED_MISFIT and len(set(found.tolist())) > 1:
            self._split(design, y, weight, found)
        return self

    def predict(self, X: Any) -> Array:
        """Peak activations [bytes] for rows of `SIZE_COLUMNS`."""
        check_is_fitted(self, "coef_")
        sizes = self.sizes(np.asarray(X, dtype=float))
        rows = self.coef_[np.asarray(self.regimes_)[regime(self.key, sizes)]]
        total: Array = np.sum(rows * self.design(sizes), axis=1)
        return total

    def bounds(self, X: Any, y: Any, scale_bytes: Any, groups: Any, *, seed: int = 0) -> tuple[Array, Array]:
        """95 % bounds of the coefficients, by resampling whole resolutions.

        Parameters
        ----------
        groups : array, shape (rows,)
            The resolution of each row; rows of one resolution stay together.

        Returns
        -------
        low, high : arrays of the shape of ``coef_``

        Notes
        -----
        The counters are deterministic, so the bounds show misfit and the choice of sizes, not noise.

        The resampled fits have no bound at zero; the percentiles do. A coefficient whose neighbour is held at zero takes
        over what that one would have been below it, and resampling bounded fits repeats this bias instead of showing it.
        The spread is widened by the square root of groups / (groups - terms), for the terms that each draw has to fit.
        """
        check_is_fitted(self, "coef_")
        X, y = np.asarray(X, dtype=float), np.asarray(y, dtype=float)
        sizes = self.sizes(X)
        weight = 1.0 / np.maximum(np.asarray(scale_bytes, dtype=float), 1.0)
        sets = np.asarray(self.regimes_)[np.broadcast_to(regime(self.key, sizes), len(X))]
        design = self.design(sizes) * weight[:, None]
        low, high = self.coef_.copy(), self.coef_.copy()
        rng = np.random.default_rng(seed)
        names = np.unique(np.asarray(groups), return_inverse=True)[1]
        keep = [i for i, name in enumerate(self.terms_) if name not in self.unidentified_]
        for row in range(len(self.coef_)):
            mine = sets == row
            if not mine.any():
                continue
            drawn = _resampled(design[mine][:, keep], (y * weight)[mine], names[mine], rng)
            # a bound never excludes the estimate itself, and no coefficient is negative
            low[row, keep] = np.clip(np.quantile(drawn, 0.025, axis=0), 0.0, self.coef_[row, keep])
            high[row, keep] = np.maximum(np.quantile(drawn, 0.975, axis=0), self.coef_[row, keep])
        return low, high

    def sizes(self, X: Array) -> Sizes:
        """The sizes that the terms are products of, from rows of `SIZE_COLUMNS`."""
        off = np.zeros(len(X))
        return Sizes.of(*X.T, *([off, off] if X.shape[1] == len(SIZE_COLUMNS) - 2 else []))

    def design(self, sizes: Sizes) -> Array:
        """The columns of the terms."""
        ones = np.ones(len(sizes.A))
        return np.column_stack([evaluate(name, sizes) * ones for name in terms_of(self.key)])

    def _unidentified(self, design: Array) -> tuple[dict[str, str], float]:
        """Walk through the terms in order and leave out what the earlier ones span already."""
        length = np.linalg.norm(design, axis=0)
        basis: list[Array] = []
        kept: list[int] = []
        missing: dict[str, str] = {}
        for i, name in enumerate(self.terms_):
            rest = design[:, i] / (length[i] or 1.0)
            for _ in range(2):  # twice, for orthogonality in floating point
                for direction in basis:
                    rest = rest - direction * (direction @ rest)
            norm = float(np.linalg.norm(rest))
            if norm < COLLINEAR:
                missing[name] = _WHAT_TELLS_APART[name]
            else:
                basis.append(rest / norm)
                kept.append(i)
        scaled = design[:, kept] / length[kept]
        return missing, float(np.linalg.cond(scaled)) if kept else 0.0

    def _solve(self, design: Array, y: Array, weight: Array, anchor: Array | None = None) -> Array:
        """Non-negative least squares; what the rows leave open stays near the anchor."""
        keep = [i for i, name in enumerate(self.terms_) if name not in self.unidentified_]
        columns, target = design[:, keep] * weight[:, None], y * weight
        if anchor is not None:
            pull = np.diag(ANCHOR * np.linalg.norm(columns, axis=0))
            columns, target = np.vstack([columns, pull]), np.concatenate([target, pull @ anchor[keep]])
        coef = np.zeros(len(self.terms_))
        coef[keep] = nonnegative(columns, target)
        return coef

    def _split(self, design: Array, y: Array, weight: Array, found: Array) -> None:
        """Give each regime coefficients of its own, starting from the one with most rows."""
        present, counts = np.unique(found, return_counts=True)
        first = int(present[np.argmax(counts)])
        own = {first: self._solve(design[found == first], y[found == first], weight[found == first])}
        for r in (int(r) for r in present if r != first):
            mine = found == r
            anchor = own[next(o for o in _NEIGHBOURS[r] if o in own)]
            own[r] = self._solve(design[mine], y[mine], weight[mine], anchor)
        index = {r: i for i, r in enumerate(sorted(own))}
        self.coef_ = np.array([own[r] for r in sorted(own)])
        self.regimes_ = [
            index[r] if r in index else next(index[o] for o in _NEIGHBOURS[r] if o in index)
            for r in range(len(REGIMES))
        ]


_WHAT_TELLS_APART = {
    "1": "more than one size",
    "m": "batch sizes at one resolution",
    "B": "batch sizes at one resolution",
    "n": "batch sizes at one resolution",
    "m·A": "more resolutions",
    "n·A": "more resolutions",
    "B·A": "more resolutions",
    "m·A²": "more resolutions",
    "n·A²": "more resolutions",
    "A²": "more resolutions",
    "n·L·A": "prompt_length above 77 at several resolutions",
    "n·L": "prompt_length above 77",
    "D": "vae_slicing or vae_tiling",
}
"""What to sweep so that a term can be told apart from those before it."""


def nonnegative(design: Array, target: Array) -> Array:
    """Least squares with coefficients >= 0 (`scipy.optimize.nnls`), columns scaled to length one first."""
    length = np.linalg.norm(design, axis=0)
    length[length == 0] = 1.0
    solved: Array = nnls(design / length, target, maxiter=50 * max(design.shape[1], 1))[0] / length
    return solved


def _resampled(design: Array, target: Array, groups: Array, rng: np.random.Generator) -> Array:
    """Coefficients of `RESAMPLES` draws of whole groups, through each group's normal equations; they may be negative."""
    length = np.linalg.norm(design, axis=0)
    length[length == 0] = 1.0
    design = design / length
    names = np.unique(groups)
    grams = np.array([design[groups == g].T @ design[groups == g] for g in names])
    sides = np.array([design[groups == g].T @ target[groups == g] for g in names])
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    drawn = np.empty((RESAMPLES, design.shape[1]))
    jitter = 1e-13 * np.eye(design.shape[1])
    for i, count in enumerate(counts):
        gram = np.tensordot(count, grams, axes=1)
        drawn[i] = np.linalg.solve(gram + jitter * np.trace(gram), count @ sides)
    free = max(len(names) - design.shape[1], 1)
    middle = np.median(drawn, axis=0)
    widened: Array = (middle + (drawn - middle) * np.sqrt(len(names) / free)) / length
    return widened
