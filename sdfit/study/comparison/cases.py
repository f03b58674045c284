"""Runs whose peaks are known, to hold systems against: published ones, and records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sdfit.errors import RecordsError, UnknownVariant, listed
from sdfit.records import Record
from sdfit.study.comparison import published
from sdfit.workload import Workload, whole_number

if TYPE_CHECKING:
    from sdfit.predict.predictor import Predictor

MAX_BYTES = 1 << 50


@dataclass(frozen=True, slots=True)
class Case:
    """One run whose peak is known.

    Parameters
    ----------
    label : str
        Names the run in tables.
    workload : Workload
    actual_bytes : int
        The peak of the run [bytes].
    predicted_bytes, upper_bytes : int, optional
        sdfit's estimate and its upper bound, of the same metric as ``actual_bytes`` [bytes].

    Raises
    ------
    InvalidWorkload
        If an amount is not a positive whole number of bytes.

    Examples
    --------
    >>> Case("one", Workload(512, 512), 3 * 10**9).actual_bytes
    3000000000
    """

    label: str
    workload: Workload
    actual_bytes: int
    predicted_bytes: int | None = None
    upper_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("actual_bytes", "predicted_bytes", "upper_bytes"):
            value = getattr(self, name)
            if value is not None or name == "actual_bytes":
                object.__setattr__(self, name, whole_number(name, value, 1, MAX_BYTES))


def published_cases(
    metric: str = "allocated", models: Mapping[str, Predictor] | None = None, *, level: float = 0.95
) -> tuple[Case, ...]:
    """Make a case of every published whole run of one metric that img2img is comparable with.

    Text to image peaks like img2img, but for offload: img2img leaves the VAE, which encoded the image, beside the UNet. Those
    rows are compared with a trace of text to image alone (``data/published/residuals.csv``).

    Parameters
    ----------
    metric : str
    models : mapping of card to Predictor, optional
        Set beside the rows of their card.
    level : float
        Of the models' upper bounds.

    Raises
    ------
    RecordsError
        If no whole run was published with that metric.

    Examples
    --------
    >>> len(published_cases()), published_cases()[-1].label
    (35, 'GP-004 p100 512x512')
    """
    whole = [row for row in published.rows() if row.whole_pipeline and row.scope == "total"]
    whole = [row for row in whole if row.pipeline == "img2img" or row.offload == "none"]
    chosen = [row for row in whole if row.metric == metric]
    if not chosen:
        known = listed(sorted({row.metric for row in whole}))
        raise RecordsError(f"no whole run was published with the metric '{metric}'; there are: {known}", given=metric)
    models = models or {}
    return tuple(
        _predicted(Case(_label(row), row.workload(), row.peak_bytes), models.get(row.card), metric, level)
        for row in chosen
    )


def published_cards() -> tuple[str, ...]:
    """The cards whose whole runs were published."""
    return tuple(sorted({row.card for row in published.rows() if row.whole_pipeline}))


def record_cases(
    records: Iterable[Record], predictor: Predictor | None = None, *, level: float = 0.95
) -> tuple[Case, ...]:
    """Make a case of every record that succeeded, with what a model says of it.

    Parameters
    ----------
    records : iterable of Record
    predictor : Predictor, optional
    level : float
        Of the predictor's upper bounds.
    """
    ok = [r for r in records if r.outcome == "ok" and r.allocated_bytes]
    return tuple(
        _predicted(
            Case(f"{i} {r.workload.height}x{r.workload.width}", r.workload, r.allocated_bytes or 0),
            predictor,
            "allocated",
            level,
        )
        for i, r in enumerate(ok)
    )


def _predicted(case: Case, predictor: Predictor | None, metric: str, level: float) -> Case:
    """The case with a model's prediction; as it was where the model never saw the variant."""
    if predictor is None:
        return case
    try:
        peak = predictor.predict_workload(case.workload, metric=metric, level=level)
    except UnknownVariant:
        return case
    upper = round(peak.upper) if math.isfinite(peak.upper) else None
    return replace(case, predicted_bytes=round(peak), upper_bytes=upper)


def _label(row: published.PublishedRow) -> str:
    batch = f" x{row.batch_size}" if row.batch_size > 1 else ""
    return f"{row.id} {row.card} {row.height}x{row.width}{batch}"
