"""The report's tables: theory beside fit, errors and coverage, published rows beside ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from sdfit.errors import SdfitError, UnknownVariant
from sdfit.fit.card import Rows
from sdfit.judging.evaluation import UPPER_LEVEL, Evaluation
from sdfit.predict.artifact import Artifact
from sdfit.predict.cards import kernels_of
from sdfit.predict.predictor import Predictor
from sdfit.study.comparison import published, residuals
from sdfit.study.comparison.published import PublishedRow
from sdfit.study.report.words import rows_of, section
from sdfit.units import format_bytes, percent
from sdfit.workload import variant_name

WHOSE_THEORY = ("sm75", "sm90")
"""Models whose convolutions run the plans that the theory of the VAE's coefficients is of."""


def theory_rows(artifact: Artifact) -> Rows:
    """The coefficients that the notes have a theory for, those of this model beside it."""
    head, *known = rows_of(section("Theory, fit, published"))
    at = {name: i for i, name in enumerate(head)}
    rows: Rows = [("what", "term", "this model", "95 % bounds", "theory", "published by others")]
    for row in known:
        key, term = (row[at[name]].strip("`") for name in ("coefficients", "term"))
        stage = artifact.stages.get(key.replace("/", "|"))
        if stage is None or term not in stage["terms"]:
            continue
        which, i = stage["regimes"][int(row[at["regime"]])], stage["terms"].index(term)
        low, high = (
            "open" if stage[end][which][i] is None else _short(stage[end][which][i]) for end in ("low", "high")
        )
        fitted = "not identified" if term in stage["unidentified"] else _short(stage["coef"][which][i])
        rows.append((row[at["what"]], term, fitted, f"{low} to {high}", row[at["theory"]], row[at["published"]]))
    return rows


def theory_note(artifact: Artifact) -> str:
    """What to know of the theory where it is that of other kernels; empty where it is of these."""
    if artifact.name in WHOSE_THEORY:
        return ""
    found = {name.strip("`"): (cards, what) for name, cards, what in rows_of(section("One model for many cards"))[1:]}
    cards, what = found.get(artifact.name, ("", ""))
    theirs = f"On {cards}: {what}. " if what else ""
    return (
        f"The theory of the VAE's blocks is that of the plans of {' and '.join(WHOSE_THEORY)}, which copy input and output. "
        f"{theirs}Their numbers differ by these copies."
    )


def _short(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 1 else f"{value:.5g}"


def symbol_rows() -> Rows:
    """The letters of the equation, as the notes explain them."""
    return [tuple(row) for row in rows_of(section("The equation"))]


@dataclass(frozen=True, slots=True)
class Beside:
    """A published whole run beside the prediction of it.

    Parameters
    ----------
    row : PublishedRow
    predicted_bytes, low_bytes, high_bytes : float
        Of allocated memory, its interval at the default level [bytes].
    """

    row: PublishedRow
    predicted_bytes: float
    low_bytes: float
    high_bytes: float

    @property
    def error(self) -> float:
        """Signed relative error: predicted / published - 1."""
        return self.predicted_bytes / self.row.peak_bytes - 1

    @property
    def inside(self) -> bool:
        """Whether the interval holds the published peak."""
        return self.low_bytes <= self.row.peak_bytes <= self.high_bytes


@cache
def every_published() -> tuple[PublishedRow, ...]:
    """All published rows that ship."""
    return published.rows() + published.read(published.path().with_name("other.csv"))


def beside(predictor: Predictor) -> list[Beside]:
    """Published whole runs, allocated memory, on cards that this model answers for."""
    found = []
    for row in every_published():
        if row.whole_pipeline and (row.metric, row.scope) == ("allocated", "total") and _answers(predictor, row):
            try:
                peak = predictor.predict_workload(row.workload())
            except UnknownVariant:
                continue
            found.append(Beside(row, float(peak), *peak.interval))
    return found


def _answers(predictor: Predictor, row: PublishedRow) -> bool:
    return predictor.artifact.name in (row.card, kernels_of(row.card))


def left_out(predictor: Predictor) -> int:
    """How many published whole runs on its cards a model has no coefficients for."""
    rows = [r for r in every_published() if r.whole_pipeline and (r.metric, r.scope) == ("allocated", "total")]
    return sum(_answers(predictor, row) for row in rows) - len(beside(predictor))


def beside_rows(found: Sequence[Beside]) -> Rows:
    """Published whole runs beside ours; the first column is a link's text, its address comes from `address`."""
    rows: Rows = [("row", "card", "size, images", "variant", "published", "ours", "error", "in the interval")]
    for one in found:
        row = one.row
        shown = variant_name(row.workload().variant)
        rows.append(
            (
                row.id,
                row.card,
                f"{row.height}x{row.width}, {row.batch_size}",
                shown + ("" if row.workload().guided else ", not guided"),
                format_bytes(row.peak_bytes),
                format_bytes(one.predicted_bytes),
                percent(one.error, 2),
                "yes" if one.inside else "no",
            )
        )
    return rows


def alone_rows(predictor: Predictor) -> tuple[Rows, list[PublishedRow]]:
    """Published rows of the VAE alone, beside their trace; and the rows themselves, for their links."""
    traced = {found.id: found for found in residuals.read()}
    rows: Rows = [("row", "card", "what", "size, images", "published", "traced", "error")]
    shown = []
    for row in every_published():
        found = traced.get(row.id)
        if found is None or row.whole_pipeline or not _answers(predictor, row):
            continue
        what = f"{row.pipeline.replace('vae_', 'VAE ')}, {row.dtype}" + (", tiled" if row.vae_tiling else "")
        size = f"{row.height}x{row.width}, {row.batch_size}"
        amounts = format_bytes(found.published_bytes), format_bytes(found.traced_bytes), percent(found.error, 2)
        rows.append((row.id, row.card, what, size, *amounts))
        shown.append(row)
    return rows, shown


def address(row: PublishedRow) -> str:
    """Where a published row can be looked up: the file at its commit where the source names one.

    Examples
    --------
    >>> address(published.row("COL-001"))[:83]
    'https://github.com/dheepakshakthi/vRam_estimation_for_diffusion_model/blob/4ad2e344'
    """
    found = re.match(r"(https://github\.com/\S+) ([^\s{]+) @ ([0-9a-f]{7,40})", row.source)
    if found:
        return f"{found[1]}/blob/{found[3]}/{found[2]}"
    first = re.match(r"https://\S+", row.source)
    if first is None:
        raise SdfitError(f"published row {row.id} names no address", row=row.id)
    return first[0]


def coverage_rows(found: Evaluation) -> Rows:
    """Errors and coverage on runs that the fit did not see, by metric, then of required memory by variant."""
    level = f"{100 * found.level:g} %"
    rows: Rows = [
        (
            "runs", "rows", "median error", "worst", f"inside {level}", f"above the {100 * UPPER_LEVEL:g} % bound", "bound above truth",
        )
    ]  # fmt: skip
    for line in found.lines:
        if line.group == "all" or (line.metric, line.group) == ("required", "variant"):
            rows.append(
                (
                    line.metric if line.group == "all" else f"required, {line.name}",
                    str(line.rows),
                    percent(line.median_error, 3),
                    percent(line.worst_error, 2),
                    _share(line.coverage),
                    _share(line.above_upper),
                    _share(line.over_reserved),
                )
            )
    return rows


def _share(value: float | None) -> str:
    return "" if value is None else percent(value, 1)
