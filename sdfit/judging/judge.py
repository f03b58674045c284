"""A fit that judges itself: what is wrong with the rows, or with the equation, that went into an artifact.

`judge` looks at records and the artifact that was fitted to them, `judge_table` at a plain table of sizes and peaks such
as others publish. Both name the row, say how far it is off, and say what else could explain it. The checks of a fitted
equation and of the runs that failed are in `sdfit.judging.checks`.

Rows are named by least trimmed squares (`sdfit.judging.robust`), because a plain fit bends towards its worst row and then blames
the others. Held-out errors are those of fits without the named rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sdfit.equation.regimes import REGIMES, regime
from sdfit.equation.sizes import Sizes
from sdfit.equation.stages import STAGES, StageKey
from sdfit.equation.terms import design_matrix, terms_of
from sdfit.errors import FitError, listed
from sdfit.fit.folds import Indices, fold_of
from sdfit.fit.held_out import fit_stage, fitted_without
from sdfit.fit.observations import Observations, Runs, observe
from sdfit.fit.stage_model import StageModel
from sdfit.judging.checks import check_censored, check_duplicates, check_equation
from sdfit.judging.findings import Finding, HeldOut, Verdict, label, verdict
from sdfit.judging.robust import MATERIAL, SCALES, trimmed_fit
from sdfit.judging.rowcheck import (
    REGIME_WORDS,
    Rows,
    by_resolution,
    candidate_columns,
    check_rows,
    held_out_findings,
    leave_out,
    term_column,
)
from sdfit.predict.artifact import Artifact
from sdfit.records import Record

__all__ = ["Finding", "HeldOut", "Verdict", "judge", "judge_table", "leave_one_resolution_out"]

Array = np.ndarray[Any, np.dtype[Any]]


def judge(records: Sequence[Record], artifact: Artifact | None = None) -> Verdict:
    """Judge records and, where it is given, the artifact fitted to them.

    Parameters
    ----------
    records : sequence of Record
        Of one environment; crashes are skipped.
    artifact : Artifact, optional
        None judges the rows alone.

    Returns
    -------
    Verdict

    Raises
    ------
    FitError
        If no run succeeded.

    Notes
    -----
    Rows that fail together because the card did (another process on it, another driver) agree with each other; only
    `sdfit.records.pool` can tell, by their environments.
    """
    if not any(r.outcome == "ok" for r in records):
        raise FitError(f"there is nothing to judge: none of the {len(records)} runs succeeded; sweep smaller sizes")
    runs = Runs(records)
    findings, good = [], {}
    for key, every in observe(runs).items():
        seen = every.where(~every.at_least)  # what was measured: lower bounds are left out
        if len(seen):
            found, far = _check_stage(key, seen)
            findings += found
            good[key] = seen.where(~far), fold_of(seen.groups, None)[~far]
    held_out = _held_out(runs, good)
    findings += held_out_findings(held_out)
    findings += check_duplicates(records)
    findings += check_censored(records, artifact)
    if artifact is not None:
        findings += check_equation(artifact)
    return verdict(findings, held_out=held_out)


def judge_table(
    height: Any,
    width: Any,
    peak_bytes: Any,
    *,
    batch_size: Any = 1,
    terms: Sequence[str] = ("1", "A", "A²"),
    labels: Sequence[str] | None = None,
) -> Verdict:
    """Judge a plain table of sizes and peaks, and fit it without its bad rows.

    Parameters
    ----------
    height, width : array, shape (rows,)
        [pixels]
    peak_bytes : array, shape (rows,)
        [bytes]
    batch_size : array, shape (rows,), or int
        Images per call.
    terms : sequence of str
        Of the equation: names from `sdfit.equation.terms.TERMS`, and ``A`` for the pixels of one image.
    labels : sequence of str, optional
        Names of the rows; None makes them from the sizes.

    Returns
    -------
    Verdict
        With ``coef``.

    Raises
    ------
    FitError
        If the columns differ in length, hold an amount that is not positive, or are fewer than two more than the terms.

    Examples
    --------
    >>> side = np.array([256, 512, 768, 1024, 1280, 1536])
    >>> peak = 1e7 + 160.0 * side**2
    >>> peak[3] *= 2
    >>> found = judge_table(side, side, peak, terms=("1", "A"))
    >>> found[0].row, round(found[0].off, 6), round(found.coef["A"], 6)
    ('row 4 (1024x1024)', 1.0, 160.0)
    """
    given = np.atleast_1d(np.asarray(height)), np.atleast_1d(np.asarray(width)), np.atleast_1d(np.asarray(peak_bytes))
    if len({len(column) for column in given}) != 1:
        raise FitError(f"the columns have {listed(len(c) for c in given)} rows; they must have equally many")
    h, w, peak = (column.astype(float) for column in given)
    batch = np.broadcast_to(np.asarray(batch_size, dtype=float), h.shape)
    for name, column in (("height", h), ("width", w), ("peak_bytes", peak), ("batch_size", batch)):
        if not (np.isfinite(column) & (column > 0)).all():
            row = int(np.argmin(np.isfinite(column) & (column > 0)))
            raise FitError(f"row {row + 1}: {name} is {column[row]}; it must be positive and finite", row=row + 1)
    if len(h) < len(terms) + 2:
        raise FitError(f"{len(h)} rows cannot be judged by {len(terms)} terms; it takes {len(terms) + 2} rows or more")
    sizes = Sizes.of(h, w, np.full_like(h, 77), batch, batch, False, False)
    if labels is None:
        labels = [
            f"row {i + 1} ({a:.0f}x{b:.0f}{f' x{c:.0f}' if c > 1 else ''})"
            for i, (a, b, c) in enumerate(zip(h, w, batch, strict=True))
        ]
    rows = Rows(
        name=labels.__getitem__,
        places=np.arange(len(h)),
        resolution=np.array([f"{a:.0f}x{b:.0f}" for a, b in zip(h, w, strict=True)]),
        design=np.column_stack([term_column(name, sizes) for name in terms]),
        activation=peak,
        weights=np.zeros(len(h)),
        scale=peak,
        pixels=h * w,
        candidates=candidate_columns(tuple(terms), sizes, h, w),
    )
    findings, far, fitted = check_rows("table", rows)
    errors = np.where(far, np.nan, leave_out(rows, ~far))
    held_out = by_resolution(rows.resolution, rows.pixels, errors / peak)
    return verdict(
        [*findings, *held_out_findings(held_out)],
        held_out=held_out,
        coef=dict(zip(terms, fitted.tolist(), strict=True)),
    )


def _rows(key: StageKey, seen: Observations, sizes: Sizes) -> Rows:
    """A stage's rows as the checks take them."""
    return Rows(
        name=lambda place: label(seen.runs.records[place]),
        places=seen.places,
        resolution=seen.groups,
        design=design_matrix(key, sizes),
        activation=seen.activation_bytes,
        weights=seen.weights_bytes,
        scale=seen.peak_bytes,
        pixels=seen.X[:, 0] * seen.X[:, 1],
        candidates=candidate_columns(terms_of(key), sizes, seen.X[:, 0], seen.X[:, 1]),
    )


def _check_stage(key: StageKey, seen: Observations) -> tuple[list[Finding], Array]:
    """Judge a stage: as a whole where that explains it, else each regime that has coefficients of its own by itself."""
    sizes, where = Sizes.of(*seen.X.T), " ".join(key)
    rows, regimes = _rows(key, seen, sizes), np.broadcast_to(regime(key[0], sizes), len(seen))
    model = fit_stage(key, seen)
    sets = np.asarray(model.regimes_)[regimes]
    rows = replace(rows, design=rows.design[:, [name not in model.unidentified_ for name in model.terms_]])
    far = np.zeros(len(sets), dtype=bool)
    fewest = rows.design.shape[1] + 2
    if len(model.coef_) == 1 and len(far) >= fewest:
        findings, far, _ = check_rows(where, rows, regimes)
        return findings, far
    if len(model.coef_) > 1:
        # a lacking term can look like two regimes; what tells the regimes themselves apart is no news here
        other = {name: c for name, c in rows.candidates.items() if REGIME_WORDS not in name}
        findings, found, _ = check_rows(where, replace(rows, candidates=other), regimes)
        if any(finding.kind == "term" for finding in findings):
            return findings, found
    findings = []
    for one in np.unique(sets):
        mine = sets == one
        names = listed(REGIMES[r].words for r in np.unique(regimes[mine]))
        if mine.sum() < fewest:
            findings += _unchecked(where, names, rows, mine, fewest)
        else:
            found_here, far[mine], _ = check_rows(f"{where}, {names}", rows.where(mine), regimes[mine])
            findings += found_here
    return findings, far


def _unchecked(where: str, names: str, rows: Rows, mine: Array, fewest: int) -> list[Finding]:
    """A regime with too few rows to check its coefficients: does it follow those of the others?"""
    design, target = rows.design / rows.scale[:, None], rows.activation / rows.scale
    if (~mine).sum() < fewest:
        return []
    others = trimmed_fit(design[~mine], target[~mine])
    miss = np.where(mine, target - design @ others.coef, 0.0)
    worst = int(np.argmax(np.abs(miss)))
    if abs(miss[worst]) <= max(MATERIAL, SCALES * others.scale):
        return []
    actual = rows.weights[worst] + rows.activation[worst]
    off = float(actual / max(actual - miss[worst] * rows.scale[worst], 1.0) - 1)
    text = (
        f"its {mine.sum()} row(s) with {names} do not follow the equation of the others ({rows.label(worst)} by "
        f"{off:+.1%}), and are too few to check one of their own; sweep {fewest - mine.sum()} more there"
    )
    return [Finding("warning", "regime", where, rows.label(worst), off, text)]


def _held_out(runs: Runs, good: Mapping[StageKey, tuple[Observations, Indices]]) -> tuple[HeldOut, ...]:
    """Leave out one resolution after the other; only runs whose every stage could be predicted count.

    Parameters
    ----------
    runs : Runs
    good : mapping
        What each set of coefficients was measured at, without the rows that were named; and the fold of each.
    """
    peaks = np.full(runs.peaks_bytes.shape, np.nan)
    for key, (seen, folds) in good.items():
        counts = np.bincount(np.unique(np.column_stack([folds, seen.groups]), axis=0)[:, 0] + 1)
        whole = fit_stage(key, seen) if len(seen) else StageModel(key)
        for fold, model in fitted_without(key, seen, folds, whole):
            out = folds == fold
            if counts.sum() - counts[fold + 1] >= 2:
                values = model.predict(seen.X[out]) + seen.weights_bytes[out]
                peaks[seen.places[out], STAGES.index(key[0])] = values
    actual = np.array([r.allocated_bytes or np.nan for r in runs.records], dtype=float)
    complete = (~np.isnan(peaks) == runs.runs_through).all(axis=1)
    known = np.flatnonzero(runs.ok & complete & ~np.isnan(actual))
    if not len(known):
        return ()
    names = [runs.names[group] for group in runs.groups[known]]
    pixels = runs.X[known, 0] * runs.X[known, 1]
    return by_resolution(
        names, pixels, np.max(peaks[known], axis=1, initial=0.0, where=runs.runs_through[known]) / actual[known] - 1
    )


def leave_one_resolution_out(records: Sequence[Record]) -> tuple[HeldOut, ...]:
    """Predict each resolution by fits that never saw it, nor the rows that `judge` names.

    Parameters
    ----------
    records : sequence of Record

    Returns
    -------
    tuple of HeldOut
        Smallest resolution first; empty if there are too few.
    """
    return judge(records).held_out
