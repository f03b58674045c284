"""A fit that judges itself: what is wrong with the rows, or with the equation, that went into an artifact.

`judge` looks at records and the artifact that was fitted to them, `judge_table` at a plain table of sizes and peaks such
as others publish. Both name the row, say how far it is off, and say what else could explain it. The checks of a fitted
equation and of the runs that failed are in `sdfit.checks`.

Rows are named by least trimmed squares (`sdfit.robust`), because a plain fit bends towards its worst row and then blames
the others. Held-out errors are those of fits without the named rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sdfit.artifact import Artifact
from sdfit.basis import REGIMES, TERMS, Sizes, StageKey, evaluate, regime, stages_of
from sdfit.errors import FitError, listed
from sdfit.fit import observe, weights_of
from sdfit.records import Record
from sdfit.robust import MATERIAL, lacking_term, trimmed_fit
from sdfit.stage_model import StageModel, matrix, nonnegative
from sdfit.units import format_bytes
from sdfit.workload import VAE_SCALE, Workload, variant_name

Array = np.ndarray[Any, np.dtype[Any]]

SEVERITIES = ("error", "warning", "note")
KINDS = ("outlier", "term", "regime", "sign", "monotone", "duplicate", "censored", "held out", "too few")
GRAVE = 0.05
"""A row, or a held-out resolution, that is off by more than this share is an error; below it, a warning."""
DUPLICATES = 0.001
"""Two peaks of one workload disagree if they differ by more than this share; the counters are deterministic."""
MOST_NAMED = 0.25
"""If a larger share of a stage's rows is far off, the equation is wrong there and the rows are not."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the data or the equation has to answer for.

    Parameters
    ----------
    severity : {'error', 'warning', 'note'}
    kind : str
        One of `KINDS`.
    where : str
        The stage and its fields, a variant, or ``table``.
    row : str or None
        The row that it is about.
    off : float or None
        How far: what was measured over what the other rows say, minus one.
    message : str
    """

    severity: str
    kind: str
    where: str
    row: str | None
    off: float | None
    message: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A resolution, predicted by fits that never saw it.

    Parameters
    ----------
    resolution : str
    rows : int
    worst : float
        Signed relative error of the run's peak, the one largest in size.
    edge : bool
        Whether no other resolution is smaller, or none larger: then it was an extrapolation.
    """

    resolution: str
    rows: int
    worst: float
    edge: bool


@dataclass(frozen=True, slots=True)
class Verdict(Sequence[Finding]):
    """What `judge` found, gravest first; a sequence of its findings.

    Parameters
    ----------
    findings : tuple of Finding
    held_out : tuple of HeldOut
    coef : dict
        For a plain table: term -> coefficient [bytes per unit of the term], fitted without the rows that were named.
    """

    findings: tuple[Finding, ...]
    held_out: tuple[HeldOut, ...] = ()
    coef: Mapping[str, float] | None = None

    def __len__(self) -> int:
        return len(self.findings)

    def __getitem__(self, index: Any) -> Any:
        return self.findings[index]

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    @property
    def sound(self) -> bool:
        """Whether nothing graver than a note was found."""
        return all(finding.severity == "note" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; errors as fractions."""
        return {
            "sound": self.sound,
            "findings": [finding.to_dict() for finding in self.findings],
            "held_out": [asdict(line) for line in self.held_out],
            "coef": dict(self.coef) if self.coef is not None else None,
        }

    def table(self) -> str:
        """One line per finding."""
        lines = [f"{f.severity:<7}  {f.kind:<9}  {f.where}: {f.message}" for f in self.findings]
        return "\n".join(lines) or "nothing to report"


def verdict(findings: Sequence[Finding], **more: Any) -> Verdict:
    """Put findings in order: errors before warnings before notes, the furthest off first."""
    order = sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), KINDS.index(f.kind), -abs(f.off or 0.0)))
    return Verdict(tuple(order), **more)


def judge(records: Sequence[Record], artifact: Artifact | None = None) -> Verdict:
    """Judge records and, where it is given, the artifact fitted to them.

    Parameters
    ----------
    records : sequence of Record
        Of one environment; crashes are passed over.
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
    from sdfit.checks import check_censored, check_duplicates, check_equation

    if not any(r.outcome == "ok" for r in records):
        raise FitError(f"there is nothing to judge: none of the {len(records)} runs succeeded; sweep smaller sizes")
    stages = _stage_rows(records)
    findings, bad = [], {}
    for key, rows in stages.items():
        found, far = _check_stage(key, rows)
        findings += found
        bad[key] = far
    held_out = _held_out(records, stages, bad)
    findings += _held_out_findings(held_out)
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
        Of the equation: names from `sdfit.basis.TERMS`, and ``A`` for the pixels of one image.
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
    rows = _Rows(
        labels=tuple(labels),
        resolution=tuple(f"{a:.0f}x{b:.0f}" for a, b in zip(h, w, strict=True)),
        design=np.column_stack([_term(name, sizes) for name in terms]),
        activation=peak,
        weights=np.zeros(len(h)),
        scale=peak,
        pixels=h * w,
        candidates=_candidates(tuple(terms), sizes, h, w),
    )
    findings, far, fitted = _check_rows("table", rows)
    errors = _leave_out(rows, ~far)
    held_out = _by_resolution(rows.resolution, rows.pixels, errors / peak)
    return verdict([*findings, *_held_out_findings(held_out)], held_out=held_out, coef=dict(zip(terms, fitted, strict=True)))


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows that one set of coefficients has to describe."""

    labels: tuple[str, ...]
    resolution: tuple[str, ...]
    design: Array
    activation: Array
    weights: Array
    scale: Array
    pixels: Array
    candidates: dict[str, Array]

    def where(self, mask: Array) -> _Rows:
        at = np.flatnonzero(mask)
        return _Rows(
            tuple(self.labels[i] for i in at),
            tuple(self.resolution[i] for i in at),
            self.design[mask],
            self.activation[mask],
            self.weights[mask],
            self.scale[mask],
            self.pixels[mask],
            {name: column[mask] for name, column in self.candidates.items()},
        )


@dataclass(frozen=True, slots=True)
class _Stage:
    """A stage's rows, where they came from, and the regime of each."""

    rows: _Rows
    X: Array
    places: tuple[int, ...]
    regimes: Array


def label(record: Record) -> str:
    """Name a record's row: its index and its workload.

    Examples
    --------
    >>> label(Record(3, Workload(512, 768, batch_size=2), "ok"))
    'row 3 (512x768 x2 float16 sdpa)'
    """
    w = record.workload
    batch = f" x{w.batch_size}" if w.batch_size > 1 else ""
    more = [f" {w.tokens} tokens"] if w.prompt_length > 77 else []
    more += [" no guidance"] if not w.guided else []
    return f"row {record.index} ({w.height}x{w.width}{batch} {variant_name(w.variant)}{''.join(more)})"


def _stage_rows(records: Sequence[Record]) -> dict[StageKey, _Stage]:
    """Sort what was measured (lower bounds left out) by the coefficients that it is evidence for."""
    found: dict[StageKey, list[tuple[int, Workload, float, float, str]]] = {}
    for place, record in enumerate(records):
        for key, seen in observe([record]).items():
            if not seen.at_least[0]:
                one = (place, record.workload, seen.activation_bytes[0], seen.scale_bytes[0], key[0])
                found.setdefault(key, []).append(one)
    stages = {}
    for key, many in found.items():
        workloads = [w for _, w, _, _, _ in many]
        X, model = matrix(workloads), StageModel(key)
        sizes = model.sizes(X)
        rows = _Rows(
            labels=tuple(label(records[i]) for i, *_ in many),
            resolution=tuple(f"{w.effective_height}x{w.effective_width}" for w in workloads),
            design=model.design(sizes),
            activation=np.array([a for _, _, a, _, _ in many]),
            weights=np.array([float(weights_of(records[i], stage)) for i, *_, stage in many]),
            scale=np.array([s for *_, s, _ in many]),
            pixels=np.array([float(w.pixels) for w in workloads]),
            candidates=_candidates(_names(key), sizes, X[:, 0], X[:, 1]),
        )
        places = tuple(i for i, *_ in many)
        stages[key] = _Stage(rows, X, places, np.broadcast_to(regime(key, sizes), len(X)))
    return stages


def _names(key: StageKey) -> tuple[str, ...]:
    from sdfit.basis import terms_of

    return terms_of(key)


def _term(name: str, sizes: Sizes) -> Array:
    if name == "A":
        return np.asarray(sizes.A, dtype=float)
    if name not in TERMS:
        raise FitError(f"'{name}' is no term; there are: A, {listed(TERMS)}", given=name)
    column: Array = evaluate(name, sizes) * np.ones(len(sizes.A))
    return column


def _candidates(names: tuple[str, ...], sizes: Sizes, height: Array, width: Array) -> dict[str, Array]:
    """Columns that an equation may lack: the terms that it has not, and steps at the edges of known regimes."""
    pixels = np.asarray(sizes.A, dtype=float)
    known = {name: _term(name, sizes) for name in ("A", *TERMS) if name not in names}
    latent = height / VAE_SCALE, width / VAE_SCALE
    steps = {
        "where a latent side is not a multiple of 8": (latent[0] % 8 > 0) | (latent[1] % 8 > 0),
        "where a latent side is odd": (latent[0] % 2 > 0) | (latent[1] % 2 > 0),
        "from two images per call on": np.asarray(sizes.B) > 1,
        "with prompts beyond 77 tokens": np.asarray(sizes.L) > 77,
    }
    for words, there in steps.items():
        known |= {
            f"{n} {words}": there * c for n, c in (("1", np.ones_like(pixels)), ("A", pixels), ("A²", pixels * pixels))
        }
    return known


def _check_stage(key: StageKey, stage: _Stage) -> tuple[list[Finding], Array]:
    """Judge a stage, each regime that has coefficients of its own by itself."""
    rows, where = stage.rows, " ".join(key)
    model = StageModel(key).fit(stage.X, rows.activation, rows.scale)
    sets = np.asarray(model.regimes_)[stage.regimes]
    findings: list[Finding] = []
    far = np.zeros(len(sets), dtype=bool)
    for one in np.unique(sets):
        mine = sets == one
        keep = [i for i, name in enumerate(model.terms_) if name not in model.unidentified_]
        part = rows.where(mine)
        part = _Rows(**{f: getattr(part, f) for f in part.__slots__} | {"design": part.design[:, keep]})
        if mine.sum() < len(keep) + 2:
            continue
        found, out, _ = _check_rows(where, part, stage.regimes[mine])
        findings += found
        far[mine] = out
    return findings, far


def _check_rows(where: str, rows: _Rows, regimes: Array | None = None) -> tuple[list[Finding], Array, Array]:
    """Judge the rows of one set of coefficients; returns findings, the rows named, and the coefficients without them."""
    design, target = rows.design / rows.scale[:, None], rows.activation / rows.scale
    groups = np.unique(np.array(rows.resolution), return_inverse=True)[1]
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
                rows.labels[worst],
                float(actual[worst] / predicted[worst] - 1),
                f"{far.sum()} of {len(far)} rows do not agree with the others, {rows.labels[worst]} least "
                f"({format_bytes(actual[worst])} where they say {format_bytes(predicted[worst])}); no known term tells the "
                "two kinds apart: look at what differs between them, and fit them apart",
            )
        )
        return findings, np.zeros(len(far), dtype=bool), coef
    alone = _regime_alone(far, regimes)
    if alone is not None:
        findings.append(_regime_finding(where, rows, far, alone, actual, predicted))
        return findings, far, coef
    findings += [_outlier(where, rows, i, actual, predicted, far) for i in np.flatnonzero(far)]
    return findings, far, coef


def _outlier(where: str, rows: _Rows, i: int, actual: Array, predicted: Array, far: Array) -> Finding:
    off = float(actual[i] / max(predicted[i], 1.0) - 1)
    rest = rows.pixels[~far]
    edge = "" if rest.min() <= rows.pixels[i] <= rest.max() else "; no other row is as large or as small, so the equation may fail there"
    return Finding(
        "error" if abs(off) > GRAVE else "warning",
        "outlier",
        where,
        rows.labels[i],
        off,
        f"{rows.labels[i]} has {format_bytes(actual[i])} where the other rows say {format_bytes(predicted[i])} "
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


def _regime_finding(where: str, rows: _Rows, far: Array, which: int, actual: Array, predicted: Array) -> Finding:
    off = actual / np.maximum(predicted, 1.0) - 1
    worst = int(np.flatnonzero(far)[np.argmax(np.abs(off[far]))])
    return Finding(
        "error" if abs(off[worst]) > GRAVE else "warning",
        "regime",
        where,
        rows.labels[worst],
        float(off[worst]),
        f"its {far.sum()} row(s) with {REGIMES[which]} follow another equation ({rows.labels[worst]} by {off[worst]:+.1%}), "
        f"and are too few for coefficients of their own; sweep that regime at {max(4 - int(far.sum()), 1)} more sizes",
    )


def _negative(where: str, rows: _Rows, design: Array, target: Array) -> list[Finding]:
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
            rows.labels[worst],
            None,
            f"fitted without bounds it would need {format_bytes(low[worst] * rows.scale[worst])} at {rows.labels[worst]}; "
            "some row is wrong, or a term is lacking",
        )
    ]


def _leave_out(rows: _Rows, use: Array) -> Array:
    """Predicted less actual [bytes] of each row, by a fit to the rows in ``use`` of other resolutions."""
    design, target = rows.design / rows.scale[:, None], rows.activation / rows.scale
    names = np.array(rows.resolution)
    errors = np.full(len(names), np.nan)
    for name in np.unique(names):
        out = names == name
        train = use & ~out
        if len(np.unique(names[train])) >= 2:
            errors[out] = rows.design[out] @ nonnegative(design[train], target[train]) - rows.activation[out]
    return errors


def _held_out(
    records: Sequence[Record], stages: Mapping[StageKey, _Stage], bad: Mapping[StageKey, Array]
) -> tuple[HeldOut, ...]:
    """Leave out one resolution after the other; only runs whose every stage could be predicted count."""
    peaks: list[dict[str, float]] = [{} for _ in records]
    for key, stage in stages.items():
        rows, names = stage.rows, np.array(stage.rows.resolution)
        for name in np.unique(names):
            out = names == name
            train = ~out & ~bad[key]
            if len(np.unique(names[train])) < 2:
                continue
            model = StageModel(key).fit(stage.X[train], rows.activation[train], rows.scale[train])
            values = model.predict(stage.X[out]) + rows.weights[out]
            for i, value in zip(np.flatnonzero(out), values, strict=True):
                peaks[stage.places[i]][key[0]] = float(value)
    found = []
    for record, known in zip(records, peaks, strict=True):
        if record.outcome == "ok" and record.allocated_bytes and set(known) == set(stages_of(record.workload.variant)):
            w = record.workload
            error = max(known.values()) / record.allocated_bytes - 1
            found.append((f"{w.effective_height}x{w.effective_width}", float(w.pixels), error))
    if not found:
        return ()
    return _by_resolution([f[0] for f in found], np.array([f[1] for f in found]), np.array([f[2] for f in found]))


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


def _by_resolution(names: Sequence[str], pixels: Array, errors: Array) -> tuple[HeldOut, ...]:
    lines = []
    for name in dict.fromkeys(names[i] for i in np.argsort(pixels, kind="stable")):
        mine = np.array([n == name for n in names]) & np.isfinite(errors)
        if mine.any():
            size = pixels[mine][0]
            worst = errors[mine][np.argmax(np.abs(errors[mine]))]
            lines.append(HeldOut(name, int(mine.sum()), float(worst), bool(size in (pixels.min(), pixels.max()))))
    return tuple(lines)


def _held_out_findings(lines: Sequence[HeldOut]) -> list[Finding]:
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
