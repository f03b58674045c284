"""Leaving resolutions out: the grouped cross-validation, and how errors are summed up. Once, for fits and judgements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heapreplace
from typing import Any, NamedTuple

import numpy as np

Indices = np.ndarray[Any, np.dtype[np.intp]]

FOLDS = 10
"""Of the cross-validation by resolution."""
MOST_FOLDS = 60
"""So many fits show what a single resolution does to the others; a fit of each would take minutes."""


def left_out(groups: Sequence[str] | Any, folds: int | None = FOLDS) -> Iterator[tuple[Indices, Indices]]:
    """Split rows by whole groups: those that stay and those that are left out, a pair per fold.

    Parameters
    ----------
    groups : sequence, shape (rows,)
        The resolution of each row.
    folds : int, optional
        None leaves out one group at a time, or, of more than `MOST_FOLDS`, a few at a time. Of fewer than two groups
        nothing can be left out: no pair.

    Examples
    --------
    >>> [(stay.tolist(), out.tolist()) for stay, out in left_out(["a", "b", "a"], None)]
    [([1], [0, 2]), ([0, 2], [1])]
    """
    of_row = fold_of(groups, folds)
    for fold in range(int(of_row.max(initial=-1)) + 1):
        yield np.flatnonzero(of_row != fold), np.flatnonzero(of_row == fold)


def fold_of(groups: Sequence[str] | Any, folds: int | None = FOLDS) -> Indices:
    """The fold that each row is left out in, as `left_out` says; of fewer than two groups none, -1.

    Examples
    --------
    >>> fold_of(["a", "b", "a", "c"], 2).tolist()
    [0, 1, 0, 1]
    """
    codes = np.unique(np.asarray(groups), return_inverse=True)[1]
    count = int(codes.max(initial=-1)) + 1
    if count < 2:
        return np.full(len(codes), -1)
    if folds is None and count <= MOST_FOLDS:
        return codes
    return _folds(np.bincount(codes), min(folds or MOST_FOLDS, count))[codes]


def _folds(rows: Indices, folds: int) -> Indices:
    """The fold of each group, by their rows: the largest first, each to the fold that has fewest rows so far.

    The folds of scikit-learn's `GroupKFold`, which takes longer to import than a fit takes.
    """
    found = np.zeros(len(rows), dtype=np.intp)
    filled = [(0, fold) for fold in range(folds)]
    for group in np.argsort(rows, kind="stable")[::-1].tolist():
        count, found[group] = filled[0]
        heapreplace(filled, (count + int(rows[group]), int(found[group])))
    return found


class ErrorSummary(NamedTuple):
    """Relative errors in short: ``median``, ``p95`` and ``worst`` of their size, ``bias`` (their signed median), and the
    place of the worst."""

    median: float
    p95: float
    worst: float
    bias: float
    worst_at: int

    def to_dict(self) -> dict[str, float]:
        """What an artifact keeps."""
        return {"median": self.median, "p95": self.p95, "worst": self.worst}


def error_summary(relative: Any) -> ErrorSummary:
    """Sum up relative errors.

    Examples
    --------
    >>> error_summary([0.01, -0.03, 0.02]).to_dict()["median"]
    0.02
    """
    signed = np.asarray(relative, dtype=float)
    size = np.abs(signed)
    at = int(np.argmax(size))
    return ErrorSummary(
        float(np.median(size)), float(np.quantile(size, 0.95)), float(size[at]), float(np.median(signed)), at
    )
