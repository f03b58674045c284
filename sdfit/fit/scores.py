"""Conformal scores: how far held-out runs lay from their predictions, in units of the predicted activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from sdfit.equation.metrics import family
from sdfit.equation.stages import stages_of
from sdfit.predict.conformal import scale
from sdfit.records import Record

MOST_SCORES, MOST_FAMILY_SCORES = 600, 100
"""Scores kept of all variants and of one family; of more, evenly spaced ones in rank order, with both ends."""
FEWEST_SCORES = 20
"""A family with fewer scores uses those of all variants."""


class PublishedRow(Protocol):
    """What a fit asks of a published measurement beside its trace (`sdfit.study.comparison.residuals.Residual`)."""

    @property
    def id(self) -> str:
        """Of the row."""

    @property
    def card(self) -> str:
        """Whose measurement it is."""

    @property
    def pipeline(self) -> str:
        """What ran: img2img, txt2img, or the VAE alone."""

    @property
    def height(self) -> int:
        """[pixels]"""

    @property
    def width(self) -> int:
        """[pixels]"""

    @property
    def error(self) -> float:
        """The trace's error relative to the published number."""

    @property
    def score(self) -> float:
        """The conformal score: how far the published number lies above the trace, in units of the activations."""

    @property
    def optional(self) -> bool:
        """Whether what the trace misses is memory that PyTorch does without where it does not fit."""

    @property
    def reason(self) -> str:
        """Why the trace misses it, as far as anybody knows."""


def score(record: Record, actual_bytes: float, predicted_bytes: float, peaks: Mapping[str, float]) -> tuple[str, float]:
    """The family of a run and its score; ``peaks`` are the predicted stage peaks [bytes]."""
    weights = {stage: record.weights_bytes(stage) for stage in stages_of(record.workload.variant)}
    size = float(scale(peaks, weights))
    return family(record.workload.variant), (actual_bytes - predicted_bytes) / size


def by_family(pairs: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    """Sort scores by family; ``""`` holds all of them, and families with too few are left to it."""
    table: dict[str, list[float]] = {"": []}
    for name, value in pairs:
        table[""].append(value)
        table.setdefault(name, []).append(value)
    return {
        name: thinned(values, MOST_FAMILY_SCORES if name else MOST_SCORES)
        for name, values in table.items()
        if not name or len(values) >= FEWEST_SCORES
    }


def thinned(scores: Any, most: int = MOST_SCORES) -> list[float]:
    """Scores in ascending order, of too many evenly spaced ones with both ends, to six digits.

    Examples
    --------
    >>> thinned([0.25, -1.0])
    [-1.0, 0.25]
    """
    ranked = np.sort(np.asarray(scores, dtype=float))
    if len(ranked) > most:
        ranked = ranked[np.linspace(0, len(ranked) - 1, most).round().astype(int)]
    return [float(f"{s:.6g}") for s in ranked]


def published_scores(
    traced: Mapping[str, Mapping[str, Sequence[float]]], published: Sequence[PublishedRow]
) -> dict[str, dict[str, list[float]]]:
    """Replace scores against the trace by scores against what was published.

    Allocated memory has published numbers. The other metrics of a whole run have none: their scores are every sum of
    one published score and one of the metric's own scores against the trace, which takes the model of the allocator
    to be right. What a run takes only where there is room (an optional workspace) widens what is allocated and reserved,
    not what is required.
    """
    every_row = np.array(sorted(row.score for row in published))
    needed = np.array(sorted(row.score for row in published if not row.optional))
    found = {"allocated": {"": thinned(every_row)}}
    for metric, families in traced.items():
        if metric == "allocated":
            continue
        for name, own in families.items():
            if own:
                known = needed if metric == "required" else every_row
                every = np.add.outer(known, own).ravel()
                found.setdefault(metric, {})[name] = thinned(every, MOST_FAMILY_SCORES if name else MOST_SCORES)
    return found
