"""Non-negative least squares, ten thousands of small ones: `scipy.optimize.nnls` to the bit, without what takes longer than they do.

Of a problem of thirty rows scipy's own checks take more than half of the time, so its compiled solver is called as scipy calls it. It is
no public name: where it is not there, or does not give what the public function gives, that one is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import nnls

Array = np.ndarray[Any, np.dtype[np.float64]]
_ROWS, _AIM = np.array([[2.0, 1.0], [1.0, 3.0], [0.5, 2.0]]), np.array([1.0, -2.0, 0.25])
_MOST_STEPS = 3
"""What the compiled solver answers when it has not finished in as many steps as were allowed."""


def least(columns: Array, target: Array, most: int) -> Array:
    """Coefficients >= 0 of the least sum of squares.

    Parameters
    ----------
    columns : array, shape (rows, terms)
    target : array, shape (rows,)
        Finite numbers both, as public `scipy.optimize.nnls` would make sure.
    most : int
        Steps that it may take.

    Raises
    ------
    RuntimeError
        If it has not finished by then.

    Examples
    --------
    >>> least(np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([2.0, 1.0]), 6)
    array([1.5, 0. ])
    """
    return _solver(columns, target, most)


def _public(columns: Array, target: Array, most: int) -> Array:
    found: Array = nnls(columns, target, maxiter=most)[0]
    return found


def _compiled() -> Callable[[Array, Array, int], Array] | None:
    """scipy's compiled solver, called as scipy calls it; None if it is not as known."""
    try:
        from scipy.optimize._slsqplib import nnls as solve
    except ImportError:
        return None

    def least(columns: Array, target: Array, most: int) -> Array:
        found, _, how = solve(np.ascontiguousarray(columns, float), np.ascontiguousarray(target, float), most)
        if how == _MOST_STEPS:
            raise RuntimeError("non-negative least squares did not finish in as many steps as it may take")
        coefficients: Array = found
        return coefficients

    try:
        alike = np.array_equal(least(_ROWS, _AIM, 6), _public(_ROWS, _AIM, 6))
    except (TypeError, ValueError):
        return None
    return least if alike else None


_solver = _compiled() or _public
