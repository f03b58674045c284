"""The regression of one stage: non-negative coefficients of its terms, by bounded least squares.

`StageModel` is a scikit-learn estimator. Residuals are weighted by one over the run's whole peak, so that an error
counts as the share of the answer that it spoils. Columns that the data cannot tell from earlier ones are left out and
named. Where one set of coefficients does not describe all regimes (batch of one, several, past 2^31 elements), each
regime gets its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted

from sdfit.basis import REGIMES, STAGE_FIELDS, Sizes, StageKey, evaluate, regime, terms_of

Array = np.ndarray[Any, np.dtype[np.float64]]

COLUMNS = ("effective_height", "effective_width", "tokens", "batch_size", "unet_batch")
"""The columns of ``X``."""
COLLINEAR = 1e-5
"""A column is told apart from earlier ones if at least this share of its length is not in their span."""
POOLED_MISFIT = 2e-4
"""Largest error, as a share of the run's peak, for which the regimes share one set of coefficients."""
RESAMPLES = 200
_NEIGHBOURS = {0: (1, 2, 3), 1: (0, 3, 2), 2: (0, 3, 1), 3: (1, 2, 0)}


class StageModel(RegressorMixin, BaseEstimator):
    """Peak activations of one stage as a non-negative combination of its terms.

    Parameters
    ----------
    key : tuple of str
        The stage and the fields that matter to it, as `sdfit.basis.stage_key` gives it.

    Attributes
    ----------
    coef_ : array, shape (sets, terms)
        In the units of `sdfit.basis.TERMS`.
    regimes_ : list of int
        Which row of ``coef_`` each of `sdfit.basis.REGIMES` uses.
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
        X : array, shape (rows, 5)
            `COLUMNS`: pixels, pixels, tokens, images, samples.
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
        """Peak activations [bytes] for rows of `COLUMNS`."""
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
            # a bound never excludes the estimate itself
            low[row, keep] = np.minimum(np.quantile(drawn, 0.025, axis=0), self.coef_[row, keep])
            high[row, keep] = np.maximum(np.quantile(drawn, 0.975, axis=0), self.coef_[row, keep])
        return low, high

    def sizes(self, X: Array) -> Sizes:
        """The sizes that the terms are products of, from rows of `COLUMNS`."""
        flags = dict(zip(STAGE_FIELDS[self.key[0]], self.key[1:], strict=True))
        height, width, tokens, batch, unet_batch = X.T
        slicing, tiling = flags.get("vae_slicing") == "True", flags.get("vae_tiling") == "True"
        return Sizes.of(height, width, tokens, batch, unet_batch, slicing, tiling)

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

    def _solve(self, design: Array, y: Array, weight: Array) -> Array:
        keep = [i for i, name in enumerate(self.terms_) if name not in self.unidentified_]
        coef = np.zeros(len(self.terms_))
        coef[keep] = nonnegative(design[:, keep] * weight[:, None], y * weight)
        return coef

    def _split(self, design: Array, y: Array, weight: Array, found: Array) -> None:
        sets: list[Array] = []
        index: dict[int, int] = {}
        for r in range(len(REGIMES)):
            mine = found == r
            if len(np.unique(design[mine], axis=0)) >= min(4, len(self.terms_)):
                index[r] = len(sets)
                sets.append(self._solve(design[mine], y[mine], weight[mine]))
        if sets:
            self.coef_ = np.array(sets)
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
    "B·T": "more resolutions and batch sizes",
}
"""What to sweep so that a term can be told apart from those before it."""


def nonnegative(design: Array, target: Array) -> Array:
    """Least squares with coefficients >= 0 (`scipy.optimize.nnls`), columns scaled to length one first."""
    length = np.linalg.norm(design, axis=0)
    length[length == 0] = 1.0
    solved: Array = nnls(design / length, target, maxiter=50 * max(design.shape[1], 1))[0] / length
    return solved


def _resampled(design: Array, target: Array, groups: Array, rng: np.random.Generator) -> Array:
    """Coefficients of `RESAMPLES` draws of whole groups, through each group's normal equations."""
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
        root = np.linalg.cholesky(gram + jitter * np.trace(gram)).T
        drawn[i] = nnls(root, np.linalg.solve(root.T, count @ sides))[0]
    return drawn / length


def matrix(workloads: Sequence[Any]) -> Array:
    """Rows of `COLUMNS` for some workloads."""
    return np.array(
        [(w.effective_height, w.effective_width, w.tokens, w.batch_size, w.unet_batch) for w in workloads], dtype=float
    ).reshape(-1, len(COLUMNS))
