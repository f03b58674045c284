"""The rows that one set of coefficients has to describe, and what is wrong with them.

One core for a stage of records and for a plain table: rows are named by least trimmed squares (`sdfit.judging.robust`), and
before a row is blamed a term is looked for that would explain it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from sdfit.equation.regimes import REGIMES
from sdfit.equation.sizes import Sizes
from sdfit.equation.terms import COLUMN, TERMS, products
from sdfit.errors import FitError, listed
from sdfit.fit.folds import left_out
from sdfit.fit.stage_model import nonnegative
from sdfit.judging.findings import GRAVE, MOST_NAMED, Finding, HeldOut
from sdfit.judging.robust import MATERIAL, lacking_term, trimmed_fit
from sdfit.units import format_bytes
from sdfit.workload import VAE_SCALE

Array = np.ndarray[Any, np.dtype[Any]]
REGIME_WORDS = "from two images per call on"


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows that one set of coefficients has to describe.

    Attributes
    ----------
    name : callable
        ``name(place)`` names a row.
    places : array
        Of each row, for ``name``.
    resolution : array
        What is the same for rows of one resolution.
    """

    name: Callable[[int], str]
    places: Array
    resolution: Array
    design: Array
    activation: Array
    weights: Array
    scale: Array
    pixels: Array
    candidates: dict[str, Array]

    def label(self, row: int | np.intp) -> str:
        """Name a row."""
        return self.name(int(self.places[row]))

    def where(self, mask: Array) -> Rows:
        """The rows of a mask."""
        arrays = {one.name: getattr(self, one.name)[mask] for one in fields(Rows)[1:-1]}
        return replace(self, **arrays, candidates={name: column[mask] for name, column in self.candidates.items()})


def term_column(name: str, sizes: Sizes) -> Array:
    """Evaluate one term; ``A`` is the pixels of one image."""
    if name == "A":
        return np.asarray(sizes.A, dtype=float)
    if name not in TERMS:
        raise FitError(f"'{name}' is no term; there are: A, {listed(TERMS)}", given=name)
    column: Array = products(*sizes)[COLUMN[name]] * np.ones(len(sizes.A))
    return column


def candidate_columns(names: tuple[str, ...], sizes: Sizes, height: Array, width: Array) -> dict[str, Array]:
    """Columns that an equation may lack: the terms that it has not, and steps at the edges of known regimes."""
    pixels = np.asarray(sizes.A, dtype=float)
    known = {name: term_column(name, sizes) for name in ("A", *TERMS) if name not in names}
    latent = height / VAE_SCALE, width / VAE_SCALE
    steps = {
        "where a latent side is not a multiple of 8": (latent[0] % 8 > 0) | (latent[1] % 8 > 0),
        "where a latent side is odd": (latent[0] % 2 > 0) | (latent[1] % 2 > 0),
        REGIME_WORDS: np.asarray(sizes.B) > 1,
        "with prompts beyond 77 tokens": np.asarray(sizes.L) > 77,
    }
    for words, there in steps.items():
        known |= {
            f"{n} {words}": there * c for n, c in (("1", np.ones_like(pixels)), ("A", pixels), ("A²", pixels * pixels))
        }
    return known


def check_rows(where: str, rows: Rows, regimes: Array | None = None) -> tuple[list[Finding], Array, Array]:
    """Judge the rows of one set of coefficients; returns findings, the rows named, and the coefficients without them."""
    design, target = rows.design / rows.scale[:, None], rows.activation / rows.scale
    groups = np.unique(rows.resolution, return_inverse=True)[1]
    candidates = {name: column / rows.scale for name, column in rows.candidates.items()}
    findings = _negative(where, rows, design, target)
    found = trimmed_fit(design, target)
    lacking = lacking_term(design, target, groups, candidates)
    if lacking is None and found.far.any():  # a bad row may hide it
        stay = ~found.far
        lacking = lacking_term(design[stay], target[stay], groups[stay], {n: c[stay] for n, c in candidates.items()})
    if lacking is not None:
        findings.append(
            Finding(
                "error" if lacking.before > GRAVE else "warning",
                "term",
                where,
                None,
                lacking.before,
                f"it lacks the term {lacking.name}: with {lacking.coef:.6g} B per unit of it, resolutions that the fit did "
                f"not see miss by {lacking.after:.2%} of the peak instead of {lacking.before:.2%}",
            )
        )
        column = candidates[lacking.name] * np.sign(lacking.coef)
        found = trimmed_fit(np.column_stack([design, column]), target)
    far = found.far
    coef = found.coef[: design.shape[1]]
    predicted = rows.weights + rows.activation - found.residual * rows.scale
    actual = rows.weights + rows.activation
    if far.sum() > max(1, MOST_NAMED * len(far)):
        worst = int(np.argmax(np.abs(found.residual)))
        findings.append(
            Finding(
                "error",
                "regime",
                where,
                rows.label(worst),
                float(actual[worst] / predicted[worst] - 1),
                f"{far.sum()} of {len(far)} rows do not agree with the others, {rows.label(worst)} least "
                f"({format_bytes(actual[worst])} where they say {format_bytes(predicted[worst])}); no known term tells the "
                "two kinds apart: look at what differs between them, and fit them apart",
            )
        )
        return findings, np.zeros(len(far), dtype=bool), coef
    alone = _regime_alone(far, regimes)
    if alone is not None:
        findings.append(_regime_finding(where, rows, far, alone, actual, predicted))
        return findings, far, coef
    findings += [_outlier(where, rows, int(i), actual, predicted, far) for i in np.flatnonzero(far)]
    return findings, far, coef


def _outlier(where: str, rows: Rows, i: int, actual: Array, predicted: Array, far: Array) -> Finding:
    off = float(actual[i] / max(predicted[i], 1.0) - 1)
    rest = rows.pixels[~far]
    edge = (
        ""
        if rest.min() <= rows.pixels[i] <= rest.max()
        else "; no other row is as large or as small, so the equation may fail there"
    )
    return Finding(
        "error" if abs(off) > GRAVE else "warning",
        "outlier",
        where,
        rows.label(i),
        off,
        f"{rows.label(i)} has {format_bytes(actual[i])} where the other rows say {format_bytes(predicted[i])} "
        f"({off:+.1%}){edge}; measure it again, or leave it out",
    )


def _regime_alone(far: Array, regimes: Array | None) -> int | None:
    """The regime whose rows are the ones that are far off, if there is one and other regimes are not."""
    if regimes is None or not far.any():
        return None
    found = np.unique(regimes[far])
    if len(found) == 1 and far[regimes == found[0]].all() and not (regimes == found[0]).all():
        return int(found[0])
    return None


def _regime_finding(where: str, rows: Rows, far: Array, which: int, actual: Array, predicted: Array) -> Finding:
    off = actual / np.maximum(predicted, 1.0) - 1
    worst = int(np.flatnonzero(far)[np.argmax(np.abs(off[far]))])
    return Finding(
        "error" if abs(off[worst]) > GRAVE else "warning",
        "regime",
        where,
        rows.label(worst),
        float(off[worst]),
        f"its {far.sum()} row(s) with {REGIMES[which].words} follow another equation ({rows.label(worst)} by {off[worst]:+.1%}), "
        f"and are too few for coefficients of their own; sweep that regime at {max(4 - int(far.sum()), 1)} more sizes",
    )


def _negative(where: str, rows: Rows, design: Array, target: Array) -> list[Finding]:
    """What least squares without bounds would answer: negative bytes betray a bad row or a lacking term."""
    length = np.linalg.norm(design, axis=0)
    length[length == 0] = 1.0
    absolute = design * rows.scale[:, None]  # unweighted, as most people fit
    ends = [np.linalg.lstsq(absolute / length, rows.activation, rcond=None)[0] / length]
    ends.append(np.linalg.lstsq(design / length, target, rcond=None)[0] / length)
    low = np.min([design @ c for c in ends], axis=0)
    if low.min() > -MATERIAL:
        return []
    worst = int(np.argmin(low))
    return [
        Finding(
            "warning",
            "sign",
            where,
            rows.label(worst),
            None,
            f"fitted without bounds it would need {format_bytes(low[worst] * rows.scale[worst])} at {rows.label(worst)}; "
            "some row is wrong, or a term is lacking",
        )
    ]


def leave_out(rows: Rows, use: Array) -> Array:
    """Predicted less actual [bytes] of each row, by a fit to the rows in ``use`` of other resolutions."""
    design, target = rows.design / rows.scale[:, None], rows.activation / rows.scale
    names = rows.resolution
    errors = np.full(len(names), np.nan)
    for stay, out in left_out(names, None):
        train = stay[use[stay]]
        if len(np.unique(names[train])) >= 2:
            errors[out] = rows.design[out] @ nonnegative(design[train], target[train]) - rows.activation[out]
    return errors


def by_resolution(names: Sequence[str] | Array, pixels: Array, errors: Array) -> tuple[HeldOut, ...]:
    """Put relative errors together by resolution, smallest first; rows without an error (NaN) are left out."""
    lines, ends = [], (pixels.min(), pixels.max())
    rows: dict[str, list[int]] = {names[i]: [] for i in np.argsort(pixels, kind="stable")}
    for i in np.flatnonzero(np.isfinite(errors)).tolist():
        rows[names[i]].append(i)
    for name, mine in rows.items():
        if mine:
            worst = errors[mine][np.argmax(np.abs(errors[mine]))]
            lines.append(HeldOut(name, len(mine), float(worst), bool(pixels[mine[0]] in ends)))
    return tuple(lines)


def held_out_findings(lines: Sequence[HeldOut]) -> list[Finding]:
    """Warn of resolutions that the others do not predict; note the worst."""
    findings = []
    for line in lines:
        if abs(line.worst) > GRAVE:
            edge = ", which is the outermost: fits should not be used beyond their sizes" if line.edge else ""
            text = f"left out, {line.resolution} is predicted {line.worst:+.1%} off{edge}"
            findings.append(Finding("warning", "held out", line.resolution, None, line.worst, text))
    if lines:
        worst = max(lines, key=lambda line: abs(line.worst))
        findings.append(
            Finding(
                "note",
                "held out",
                f"{len(lines)} resolutions",
                None,
                worst.worst,
                f"each left out in turn, the worst error is {worst.worst:+.2%}, at {worst.resolution}",
            )
        )
    return findings
