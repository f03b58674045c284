"""A fit that judges itself: what is wrong with the rows, or with the equation, that went into an artifact.

`judge` looks at records and the artifact that was fitted to them, `judge_table` at a plain table of sizes and peaks such
as others publish. Both name the row, say how far it is off, and say what else could explain it. The checks of a fitted
equation and of the runs that failed are in `sdfit.judging.checks`.

Rows are named by least trimmed squares (`sdfit.judging.robust`), because a plain fit bends towards its worst row and then blames
the others. Held-out errors are those of fits without the named rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sdfit.equation.regimes import REGIMES, regime
from sdfit.equation.sizes import Sizes, resolution
from sdfit.equation.stages import StageKey, stages_of
from sdfit.equation.terms import design_matrix, terms_of
from sdfit.errors import FitError, listed
from sdfit.fit.folds import left_out
from sdfit.fit.observations import Rows as FitRows
from sdfit.fit.observations import observe
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
    stages = _stage_rows(records)
    findings, bad = [], {}
    for key, rows in stages.items():
        found, far = _check_stage(key, rows)
        findings += found
        bad[key] = far
    held_out = _held_out(records, stages, bad)
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
        labels=tuple(labels),
        resolution=tuple(f"{a:.0f}x{b:.0f}" for a, b in zip(h, w, strict=True)),
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


@dataclass(frozen=True, slots=True)
class _Stage:
    """A stage's rows, where they came from, how much each counts in a fit, and the regime of each."""

    rows: Rows
    seen: FitRows
    places: tuple[int, ...]
    regimes: Array

    def fitted(self, key: StageKey, use: Any = slice(None)) -> StageModel:
        """The stage's model, of some of its rows."""
        s = self.seen
        return StageModel(key).fit(s.X[use], s.activation_bytes[use], s.peak_bytes[use], s.weight[use])


def _stage_rows(records: Sequence[Record]) -> dict[StageKey, _Stage]:
    """Sort what was measured (lower bounds left out) by the coefficients that it is evidence for."""
    stages = {}
    for key, every in observe(records).items():
        use = [i for i, bound in enumerate(every.at_least) if not bound]
        if not use:
            continue
        seen, workloads = every.rows(use), [every.workloads[i] for i in use]
        places = tuple(every.places[i] for i in use)
        sizes = Sizes.of(*seen.X.T)
        rows = Rows(
            labels=tuple(label(records[i]) for i in places),
            resolution=tuple(resolution(w) for w in workloads),
            design=design_matrix(key, sizes),
            activation=seen.activation_bytes,
            weights=np.array([float(every.weights_bytes[i]) for i in use]),
            scale=seen.peak_bytes,
            pixels=np.array([float(w.pixels) for w in workloads]),
            candidates=candidate_columns(terms_of(key), sizes, seen.X[:, 0], seen.X[:, 1]),
        )
        stages[key] = _Stage(rows, seen, places, np.broadcast_to(regime(key[0], sizes), len(use)))
    return stages


def _check_stage(key: StageKey, stage: _Stage) -> tuple[list[Finding], Array]:
    """Judge a stage: as a whole where that explains it, else each regime that has coefficients of its own by itself."""
    rows, where = stage.rows, " ".join(key)
    model = stage.fitted(key)
    sets = np.asarray(model.regimes_)[stage.regimes]
    rows = replace(rows, design=rows.design[:, [name not in model.unidentified_ for name in model.terms_]])
    far = np.zeros(len(sets), dtype=bool)
    fewest = rows.design.shape[1] + 2
    if len(model.coef_) == 1 and len(far) >= fewest:
        findings, far, _ = check_rows(where, rows, stage.regimes)
        return findings, far
    if len(model.coef_) > 1:
        # a lacking term can look like two regimes; what tells the regimes themselves apart is no news here
        other = {name: c for name, c in rows.candidates.items() if REGIME_WORDS not in name}
        findings, found, _ = check_rows(where, replace(rows, candidates=other), stage.regimes)
        if any(finding.kind == "term" for finding in findings):
            return findings, found
    findings = []
    for one in np.unique(sets):
        mine = sets == one
        names = listed(REGIMES[r].words for r in np.unique(stage.regimes[mine]))
        if mine.sum() < fewest:
            findings += _unchecked(where, names, rows, mine, fewest)
        else:
            found_here, far[mine], _ = check_rows(f"{where}, {names}", rows.where(mine), stage.regimes[mine])
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
        f"its {mine.sum()} row(s) with {names} do not follow the equation of the others ({rows.labels[worst]} by "
        f"{off:+.1%}), and are too few to check one of their own; sweep {fewest - mine.sum()} more there"
    )
    return [Finding("warning", "regime", where, rows.labels[worst], off, text)]


def _held_out(
    records: Sequence[Record], stages: Mapping[StageKey, _Stage], bad: Mapping[StageKey, Array]
) -> tuple[HeldOut, ...]:
    """Leave out one resolution after the other; only runs whose every stage could be predicted count."""
    peaks: list[dict[str, float]] = [{} for _ in records]
    for key, stage in stages.items():
        for stay, out in left_out(stage.rows.resolution, None):
            train, rest = stay[~bad[key][stay]], out[~bad[key][out]]
            if not len(rest) or len(np.unique(np.array(stage.rows.resolution)[train])) < 2:
                continue
            values = stage.fitted(key, train).predict(stage.seen.X[rest]) + stage.rows.weights[rest]
            for i, value in zip(rest, values, strict=True):
                peaks[stage.places[i]][key[0]] = float(value)
    found = []
    for record, known in zip(records, peaks, strict=True):
        if record.outcome == "ok" and record.allocated_bytes and set(known) == set(stages_of(record.workload.variant)):
            w = record.workload
            error = max(known.values()) / record.allocated_bytes - 1
            found.append((resolution(w), float(w.pixels), error))
    if not found:
        return ()
    return by_resolution([f[0] for f in found], np.array([f[1] for f in found]), np.array([f[2] for f in found]))


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
