"""Conformal scores of a fit: how far held-out runs lay from their predictions, in units of `sdfit.predict.conformal.scale`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from sdfit.equation.metrics import FAMILIES, LEAST, REPLAYED_FAMILY, UNSEEN, Place, families, unseen
from sdfit.equation.sizes import Array
from sdfit.predict.conformal import Scores

FEWEST_SCORES = 50
"""A family with fewer scores uses those of a wider one."""
FEWEST_KINDS = 19
"""So many kinds support a bound at level 0.95 of one that was never seen."""


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
        """The conformal score: how far the published number lies above the trace, in units of the scale."""

    @property
    def simulated_score(self) -> float:
        """The conformal score of a run that is simulated, in the units of `sdfit.predict.conformal.scale_beside_trace`."""

    @property
    def optional(self) -> bool:
        """Whether what the trace misses is memory that PyTorch does without where it does not fit."""

    @property
    def reason(self) -> str:
        """Why the trace misses it, as far as anybody knows."""


EVERY_FAMILY, WIDEST, ENDS = slice(None), slice(-2, None), slice(None, None, len(FAMILIES) - 1)
"""Which of `families` are kept: of metrics that decide nothing the two widest; where runs of a kind that was never seen have
scores of their own, the narrowest and the widest."""


def by_family(scored: Iterable[tuple[Place, float | Array]], keep: slice = EVERY_FAMILY) -> dict[str, Array]:
    """Sort scores, one or more a place, by the families of the places; ``""`` holds all, families with too few are left out."""
    table: dict[str, list[Array]] = {"": [np.empty(0)]}
    for place, value in scored:
        found = np.atleast_1d(np.asarray(value, dtype=float))
        for name in families(place)[keep]:
            table.setdefault(name, []).append(found)
    sorted_ = {name: np.sort(np.concatenate(values)) for name, values in table.items()}
    return {name: values for name, values in sorted_.items() if not name or len(values) >= FEWEST_SCORES}


def of_kinds(added: Iterable[tuple[Place, Array]]) -> dict[str, Array]:
    """What packing added to allocated memory in each kind of run, at most and at least (`sdfit.equation.metrics.unseen`).

    Empty of fewer than `FEWEST_KINDS` kinds.
    """
    kinds: dict[tuple[str, str], list[Array]] = {}
    for place, values in added:
        for name in unseen(place):
            kinds.setdefault((name, families(place)[0]), []).append(values)
    ends: dict[str, list[float]] = {}
    for (name, _), parts in kinds.items():
        ends.setdefault(name, []).append(max(part.max() for part in parts))
        ends.setdefault(f"{name}|{LEAST}", []).append(min(part.min() for part in parts))
    return {name: np.sort(values) for name, values in ends.items() if len(values) >= FEWEST_KINDS}


def published_scores(
    traced: Mapping[str, Mapping[str, Array]], published: Sequence[PublishedRow]
) -> dict[str, dict[str, Array]]:
    """Replace scores against the trace by scores against what was published.

    Allocated memory has published numbers. The other metrics of a whole run have none: their scores are every sum of
    one published score and one of the metric's own scores against the trace, which takes the model of the allocator
    to be right. What a run takes only where there is room (an optional workspace) widens what is allocated and reserved,
    not what is required.
    A run that is replayed has no score of its own: its family holds the published ones, in units of their own.
    """
    every_row = np.array(sorted(row.score for row in published))
    needed = np.array(sorted(row.score for row in published if not row.optional))
    found: dict[str, dict[str, Array]] = {}
    for metric, table in traced.items():
        known = needed if metric in ("required", "minimum") else every_row
        if metric == "allocated":
            found[metric] = {"": known}
            continue
        found[metric] = {
            # of kinds the furthest published error, and not every one: a kind still counts once
            name: own + known[0 if name.endswith(LEAST) else -1]
            if name.startswith(UNSEEN)
            else np.add.outer(known, own).ravel()
            for name, own in table.items()
            if len(own)
        }
        if metric in ("required", "minimum"):
            simulated = sorted(row.simulated_score for row in published if not row.optional)
            found[metric][REPLAYED_FAMILY] = np.array(simulated)
    return found


def kept(scores: Mapping[str, Mapping[str, Array]]) -> dict[str, dict[str, dict[str, Any]]]:
    """What an artifact keeps of scores, by metric and family: how many, and some of their order statistics."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for metric, table in scores.items():
        samples = {name: Scores.of(values) for name, values in table.items() if len(values)}
        if samples:
            found[metric] = {name: {"count": s.size, "values": list(s.values)} for name, s in samples.items()}
    return found
