"""Which coefficients the data identify, and what to sweep next for the others.

Two columns of the design matrix that grow together share their coefficients' credit: the sum is known, the parts are not.
L·H·W above all: the tokenizer pads every prompt to 77 tokens, so without longer ``prompt_embeds`` that term is the
H·W term times a constant, whatever the number of runs.

What it does not know: misfit. A coefficient can be well identified and wrong, if its equation lacks a term (`sdfit.judging.judge`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sdfit.equation.sizes import Sizes, size_columns
from sdfit.equation.stages import StageKey
from sdfit.equation.terms import TERMS, design_matrix
from sdfit.errors import FitError
from sdfit.fit.held_out import fit_stage
from sdfit.fit.observations import Observations, observe
from sdfit.fit.stage_model import StageModel
from sdfit.predict.artifact import Artifact
from sdfit.records import Record
from sdfit.units import aligned, format_bytes
from sdfit.workload import CHUNK_TOKENS, Workload

Array = np.ndarray[Any, np.dtype[Any]]

WEAK = 100.0
"""A term whose variance inflation exceeds this is identified weakly: its coefficient rests on 1 % of its column."""
SIDES, BATCHES, PROMPTS = (256, 384, 512, 768, 1024, 1536), (1, 2, 4, 8), (77, 154, 231, 308)
MOST_PIXELS = 4 << 20
"""Of all images of a workload that is proposed."""


@dataclass(frozen=True, slots=True)
class TermReport:
    """How well one coefficient is determined.

    Parameters
    ----------
    term : str
    unit : str
        Of the coefficient.
    status : {'identified', 'weakly', 'not identified', 'no effect seen'}
        ``no effect seen``: identified, and its 95 % bounds hold zero.
    coef, low, high : float or None
        Coefficients and 95 % bounds, of the regime with the most rows.
    vif : float or None
        Variance inflation: 1 / (1 - R²) of its column given the other terms' columns. 1 is perfect.
    closest : str or None
        The term that its column resembles most, and
    correlation : float or None
        the cosine of the angle between the two columns.
    most_bytes : int or None
        What the term is worth where it is worth most, among the rows [bytes].
    next : str or None
        What to sweep to tell it apart.
    gain : float or None
        By how much that one run would divide the coefficient's variance; None where it is infinite now.
    """

    term: str
    unit: str
    status: str
    coef: float | None = None
    low: float | None = None
    high: float | None = None
    vif: float | None = None
    closest: str | None = None
    correlation: float | None = None
    most_bytes: int | None = None
    next: str | None = None
    gain: float | None = None


@dataclass(frozen=True, slots=True)
class StageReport:
    """How well a stage's coefficients are determined; condition number of the scaled design matrix of its kept terms."""

    stage: str
    rows: int
    resolutions: int
    prompt_lengths: tuple[int, ...]
    condition: float
    terms: tuple[TermReport, ...]


@dataclass(frozen=True, slots=True)
class Identifiability:
    """What `identifiability` found, a report per stage."""

    stages: tuple[StageReport, ...]

    def stage(self, name: str) -> StageReport:
        """The report of a stage by its words, for example ``unet float16 eager``.

        Raises
        ------
        KeyError
            If there is none.
        """
        return next((s for s in self.stages if s.stage == name), None) or _missing(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"stages": [asdict(stage) for stage in self.stages]}

    def prompts(self) -> list[str]:
        """What can be said of L·H·W, a sentence per UNet."""
        return [_prompt_sentence(stage) for stage in self.stages if stage.stage.startswith("unet")]

    def table(self) -> str:
        """L·H·W first; then each stage's condition number and terms, and what to sweep next."""
        parts = ["\n".join(self.prompts())]
        head = ("", "term", "status", "coefficient", "95 % bounds", "VIF", "closest", "at most")
        for stage in self.stages:
            lines = [head, *(_cells(term) for term in stage.terms)]
            title = (
                f"{stage.stage}: {stage.rows} rows, {stage.resolutions} resolutions, condition {stage.condition:.3g}"
            )
            wanted = dict.fromkeys(f"  to identify {t.term}: sweep {t.next}" for t in stage.terms if t.next)
            parts.append("\n".join([title, aligned(lines, left=3), *wanted]))
        return "\n\n".join(part for part in parts if part)


def identifiability(records: Sequence[Record], artifact: Artifact | None = None) -> Identifiability:
    """Report how well each stage's coefficients are determined by some records.

    Parameters
    ----------
    records : sequence of Record
    artifact : Artifact, optional
        Fitted to them: gives the coefficients and their bounds. None fits, and draws the bounds anew.

    Returns
    -------
    Identifiability

    Raises
    ------
    FitError
        If no run succeeded.
    """
    if not any(r.outcome == "ok" for r in records):
        raise FitError(f"none of the {len(records)} runs succeeded: no term can be identified; sweep smaller sizes")
    stages = []
    for key, seen in sorted(observe(records).items()):
        if not all(seen.at_least):
            stages.append(_stage(key, seen, (artifact.stages if artifact else {}).get("|".join(key))))
    return Identifiability(tuple(stages))


def variance_inflation(design: Array) -> Array:
    """Variance inflation of each column of a design matrix given the others, without a mean.

    Examples
    --------
    >>> variance_inflation(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])).tolist()
    [1.0, 1.0]
    >>> bool(variance_inflation(np.array([[1.0, 1.0], [1.0, 1.01], [1.0, 0.99]]))[0] > 1000)
    True
    """
    length = np.linalg.norm(design, axis=0)
    _, r = np.linalg.qr(design / np.where(length > 0, length, 1.0))
    inverse = np.linalg.pinv(r)
    inflation: Array = np.maximum((inverse**2).sum(axis=1), 1.0)
    return inflation


def _stage(key: StageKey, seen: Observations, fitted: Mapping[str, Any] | None) -> StageReport:
    rows, model = seen.where(~seen.at_least), fit_stage(key, seen)
    workloads = rows.workloads
    sizes = Sizes.of(*rows.X.T)
    columns = design_matrix(key, sizes)
    design = columns / rows.peak_bytes[:, None]
    names = [name for name in model.terms_ if name not in model.unidentified_]
    kept = [model.terms_.index(name) for name in names]
    if fitted is None:
        low, high = model.bounds(rows.X, rows.activation_bytes, rows.peak_bytes, rows.weight, groups=rows.groups)
        coef = model.coef_
    else:
        coef, low, high = (np.array(fitted[name], dtype=float) for name in ("coef", "low", "high"))
        high = np.where(np.isnan(high), np.inf, high)
    row = int(np.bincount(model.sets(sizes)).argmax()) if len(coef) > 1 else 0
    inflation = dict(zip(names, variance_inflation(design[:, kept]), strict=True))
    worth = columns.max(axis=0)
    proposals = _proposals(key, workloads[0], model, seen)
    terms = []
    for i, name in enumerate(model.terms_):
        close, cosine = _closest(design, i, kept, model.terms_)
        if name in model.unidentified_:
            text = _proposed(design, kept, i, proposals)[0] or model.unidentified_[name]
            terms.append(
                TermReport(name, TERMS[name].unit, "not identified", closest=close, correlation=cosine, next=text)
            )
            continue
        weak = bool(inflation[name] > WEAK)
        advice, gain = _proposed(design, kept, i, proposals) if weak else (None, None)
        zero = float(low[row, i]) <= 0
        terms.append(
            TermReport(
                name,
                TERMS[name].unit,
                "weakly" if weak else "no effect seen" if zero else "identified",
                coef=float(coef[row, i]),
                low=float(low[row, i]),
                high=float(high[row, i]),
                vif=float(inflation[name]),
                closest=close,
                correlation=cosine,
                most_bytes=round(float(coef[row, i] * worth[i])),
                next=advice,
                gain=gain,
            )
        )
    return StageReport(
        stage=" ".join(key),
        rows=len(rows),
        resolutions=len(set(rows.groups.tolist())),
        prompt_lengths=tuple(sorted({w.tokens for w in workloads})),
        condition=float(model.condition_),
        terms=tuple(terms),
    )


def _closest(design: Array, i: int, kept: Sequence[int], terms: Sequence[str]) -> tuple[str | None, float | None]:
    length = np.linalg.norm(design, axis=0)
    others = [j for j in kept if j != i and length[j] > 0]
    if not others or not length[i]:
        return None, None
    cosine = design[:, i] @ design[:, others] / (length[i] * length[others])
    best = int(np.argmax(cosine))
    return terms[others[best]], float(cosine[best])


def _proposals(key: StageKey, like: Workload, model: StageModel, seen: Observations) -> tuple[list[Workload], Array]:
    """Workloads that could be swept next, of the variant at hand, and their rows of the design matrix."""
    least = float(np.min(seen.peak_bytes - seen.activation_bytes))
    options = like.to_dict()
    found = []
    for side, batch, prompt, guidance in itertools.product(SIDES, BATCHES, PROMPTS, (1.0, 7.5)):
        if side * side * batch <= MOST_PIXELS:
            sizes = {
                "height": side,
                "width": side,
                "batch_size": batch,
                "prompt_length": prompt,
                "guidance_scale": guidance,
            }
            found.append(Workload.from_dict(options | sizes))
    X = size_columns(found)
    scale = np.maximum(model.predict(X), 0) + max(least, 1.0)
    return found, design_matrix(key, Sizes.of(*X.T)) / scale[:, None]


def _proposed(
    design: Array, kept: Sequence[int], i: int, proposals: tuple[list[Workload], Array]
) -> tuple[str | None, float | None]:
    """The one workload that would shrink the variance of a coefficient most, and by how much."""
    workloads, rows = proposals
    columns = [*(j for j in kept if j != i), i]
    length = np.linalg.norm(design[:, columns], axis=0)
    length[length == 0] = 1.0
    scaled = design[:, columns] / length
    known = scaled.T @ scaled
    # a little of everything, so that what nothing is known of has a large but finite variance
    ridge = 1e-12 * np.eye(len(columns))
    before = float(np.linalg.inv(known + ridge)[-1, -1])
    after = []
    for row in rows[:, columns] / length:
        after.append(float(np.linalg.inv(known + np.outer(row, row) + ridge)[-1, -1]))
    best = int(np.argmin(after))
    if after[best] > before / 2:
        return None, None
    w = workloads[best]
    words = f"{w.height}x{w.width}, batch_size {w.batch_size}, prompt_length {w.prompt_length}"
    words += "" if w.guided else ", no guidance"
    return words, before / after[best] if i in kept else None


def _prompt_sentence(stage: StageReport) -> str:
    term = next(t for t in stage.terms if t.term == "n·L·A")
    lengths = ", ".join(map(str, stage.prompt_lengths))
    seen = f"L·H·W in {stage.stage}: prompts of {lengths} tokens; "
    if term.status == "not identified":
        return seen + f"it cannot be told from H·W; sweep prompt_length above {CHUNK_TOKENS} ({term.next})"
    bounds = f"{term.coef:.4g} {term.unit}, 95 % bounds {term.low:.4g} to {term.high:.4g}"
    worth = f"worth at most {format_bytes(term.most_bytes or 0)}"
    if term.status == "no effect seen":
        return seen + f"identified, and no effect seen ({bounds}; {worth})"
    return seen + f"{term.status} ({bounds}; {worth})"


def _cells(term: TermReport) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    return (
        "",
        term.term,
        term.status,
        f"{number(term.coef)} {term.unit}",
        "-" if term.low is None else f"{number(term.low)} .. {number(term.high)}",
        "-" if term.vif is None else f"{term.vif:.1f}",
        "-" if term.closest is None else f"{term.closest} {term.correlation:.3f}",
        "-" if term.most_bytes is None else format_bytes(term.most_bytes),
    )


def _missing(name: str) -> StageReport:
    raise KeyError(name)
