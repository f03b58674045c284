"""Which workloads of a grid tell most of a card, in which order: optimal design on the equation's own terms.

What runs tell follows from the design matrix and the prior alone (`sdfit.fit.correction`), so it is known before they
run. Each step takes the workload that shrinks the uncertainty of the whole grid's predictions most for its time: I-optimal,
with squared variances, so that what is least known weighs most. A regime that nothing has seen is what is least known, so
each is visited. The gain is divided by the root of the seconds: by the seconds themselves small images would always win,
and they say little of slopes. Seconds are estimates to order by, and are printed nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sdfit.equation.sizes import Array, Sizes
from sdfit.equation.stages import stages_of
from sdfit.errors import FitError
from sdfit.fit.correction import Posterior, Prior, Rows, correct
from sdfit.fit.folds import Indices
from sdfit.fit.kernels import Kernels
from sdfit.fit.search import MATCH, MATCH_BYTES
from sdfit.records import Record
from sdfit.workload import Workload

MOST_RUNS = 48
"""A plan is no longer: from so many runs on a fit of every coefficient is the better one."""
FIRST = 8
"""After so many runs those that follow are chosen by what the first have shown."""
AGAIN = 4
"""After so many more all tables are tried again, which takes seconds; in between those that did."""
SAFE = 0.95
"""Of a card's memory: what tells tables apart is to need no more by the one found."""
NARROW = 0.02
"""What is enough: intervals of ±2 %."""
MOST_TARGETS = 450
"""Stages of workloads whose uncertainty is followed, spread over the grid."""
RUN_S, BUILD_S = 1.0, 10.0
"""What a run and what building a pipeline take beside the kernels [s], on a card of the T4's speed."""
UNET_S, VAE_S, SCORES_S = 0.3e-6, 1.2e-6, 0.2e-12
"""Per pixel of a UNet sample in three calls, of an image through the VAE, per pixel² of materialised scores [s]."""
FLOAT32 = 4.0
"""So much slower."""


@dataclass(frozen=True, slots=True)
class Step:
    """A workload to run.

    Parameters
    ----------
    index : int
        Its place among the grid's workloads.
    width : float
        What `Few.width` will be once it has run, if the card departs from the prior as assumed.
    """

    index: int
    width: float


class _Apart(NamedTuple):
    """What tables that runs match alike say of workloads of one group of dtypes.

    Parameters
    ----------
    places : array of int, shape (workloads,)
    wrong : array, shape (tables, workloads)
        How far from the peak by the table found that by each other lies, relative.
    differs : array of bool, shape (tables, workloads)
        Whether a run would tell them apart.
    peak_bytes : array, shape (workloads,)
        The peak by the table found.
    """

    places: Indices
    wrong: Array
    differs: Array
    peak_bytes: Array


class Few:
    """A few workloads of a grid, to be run in this order until they tell enough.

    Parameters
    ----------
    prior : Prior
    workloads : sequence of Workload
        The grid's.
    runs : int
        How many at most; never more than `MOST_RUNS`.
    memory_bytes : float, optional
        Only workloads that need no more by the prior's bound are run, and only those are asked about [bytes]. None: all.
    narrow : float
        Enough is told once `width` is no more than this.

    Attributes
    ----------
    steps : list of Step
        As planned before any has run; once `FIRST` have, one that tells apart which tables of kernels they match comes before them.
    words : str
        Why it ended, once it has.

    Raises
    ------
    FitError
        If the prior knows none of the workloads, or none fits.
    """

    def __init__(
        self,
        prior: Prior,
        workloads: Sequence[Workload],
        runs: int = MOST_RUNS,
        memory_bytes: float | None = None,
        narrow: float = NARROW,
    ) -> None:
        self.prior, self.workloads, self.narrow, self.words = prior, workloads, narrow, ""
        self.runs, self._memory_bytes = min(runs, MOST_RUNS), math.inf if memory_bytes is None else memory_bytes
        self._last: tuple[list[Any], Posterior] | None = None
        self._apart: list[_Apart] = []
        self._nothing = Kernels(prior.kernels, {}, {}, {}, 0) if prior.kernels is not None else None
        able = self._able = [i for i, w in enumerate(workloads) if prior.knows(w) and _fits(prior, w, memory_bytes)]
        if not able:
            raise FitError(f"no workload of the grid is known to the prior '{prior.artifact.name}' and fits the card")
        rows = prior.rows([workloads[i] for i in able])
        rows = rows._replace(X=rows.X * prior.sd)  # effects in units of their standard deviations
        self._targets = _targets(rows, len(able))
        self.steps = self._ordered(able, rows, self.runs)

    def __call__(self, records: Sequence[Record]) -> Iterator[int]:
        """Give the places of the workloads to run; ``records`` grows meanwhile, and says what to run next and when to end."""
        given: set[int] = set()
        places = {w: i for i, w in enumerate(self.workloads)}
        planned = iter([step.index for step in self.steps])
        while True:
            width = self.width(records)
            ran = {places[r.workload] for r in records if r.workload in places}
            if width <= self.narrow:
                self.words = (
                    f"enough after {sum(r.outcome == 'ok' for r in records)} runs: 95 % intervals of allocated memory are "
                    f"±{width:.1%} or narrower for 95 % of the grid; --narrow asks for less"
                )
                return
            told = self._telling(records, given | ran) if len(given | ran) >= FIRST else None
            index = next((i for i in planned if i not in given), None) if told is None else told
            if index is None or len({*given, *ran, index}) > self.runs:
                break
            given.add(index)
            yield index
        self.words = f"95 % intervals of allocated memory are now ±{width:.1%} or narrower for 95 % of the grid"

    def width(self, records: Sequence[Record]) -> float:
        """Half-width of the 95 % interval that 95 % of the grid's workloads do not exceed, relative, after some runs."""
        if not any(r.outcome == "ok" for r in records):
            return math.inf
        posterior = self._known(records)
        width = _width(self._targets, posterior.covariance, posterior.scale, posterior.degrees)
        apart = [float(np.quantile(np.abs(some.wrong).max(axis=0), 0.95)) for some in self._apart]
        return max(width, *apart) if apart else width

    def _known(self, records: Sequence[Record]) -> Posterior:
        """What some runs tell, kept until there are more."""
        facts = [(r.workload, r.outcome, r.allocated_bytes) for r in records]
        if self._last is None or self._last[0] != facts:
            before = self._last[1].found if self._last is not None and facts[:1] == self._last[0][:1] else self._nothing
            if len(facts) >= FIRST and (len(facts) - FIRST) % AGAIN == 0:
                before = None
            self._last = facts, correct(self.prior, records, before)
            self._apart = self._told_apart(self._last[1].found)
        return self._last[1]

    def _telling(self, records: Sequence[Record], ran: set[int]) -> int | None:
        """The workload that tells tables apart which the runs match alike, and whose answers differ most; None: planned ones tell more."""
        if not any(r.outcome == "ok" for r in records):
            return None
        gain = np.zeros(len(self.workloads))
        self._known(records)
        for some in self._apart:
            safe = some.peak_bytes <= SAFE * self._memory_bytes
            damage = np.minimum(np.abs(some.wrong).max(axis=1), 1.0)
            damage[damage < self.narrow / 2] = 0.0
            gain[some.places] = (damage @ some.differs) * safe / len(damage)
        seconds = np.array([_seconds(w) for w in self.workloads])
        worth = gain / np.sqrt(seconds)
        worth[list(ran)] = 0.0
        best = int(np.argmax(worth))
        return best if gain[best] > 0 else None

    def _told_apart(self, found: Kernels | None) -> list[_Apart]:
        """Of each group of dtypes what the tables that runs match alike say of the grid."""
        every = []
        if found is None:
            return []
        for dtypes, tables in found.alternatives(np.random.default_rng(0)).items():
            able = [
                i for i in self._able if self.workloads[i].dtype in dtypes and found.is_simulated(self.workloads[i])
            ]
            if len(tables) < 2 or not able:
                continue
            some = tuple(self.workloads[i] for i in able)
            stages = np.array([found.peaks(some, dtypes, table) for table in tables])
            starts = np.cumsum([0, *(len(stages_of(w.variant)) for w in some[:-1])])
            peaks = np.maximum.reduceat(stages, starts, axis=1)
            unit = 2 * (MATCH_BYTES + MATCH * stages[0])
            other = np.maximum.reduceat(np.abs(stages[1:] - stages[0]) > unit, starts, axis=1)
            every.append(_Apart(np.array(able), peaks[1:] / peaks[0] - 1, other, peaks[0]))
        return every

    def _ordered(self, able: list[int], rows: Rows, runs: int) -> list[Step]:
        """Take the workload that tells most for its seconds, again and again."""
        used = rows.X.any(axis=0)
        target, rows = self._targets[:, used], rows._replace(X=rows.X[:, used])
        covariance, blocks = np.eye(int(used.sum())), _blocks(rows, len(able))
        seconds = np.array([_seconds(self.workloads[i]) for i in able])
        apart = _spread(rows, blocks, seconds)
        able, blocks, seconds = [able[i] for i in apart], blocks[apart], seconds[apart]
        pipelines = [_pipeline(self.workloads[i]) for i in able]
        steps: list[Step] = []
        left, built = np.ones(len(able), dtype=bool), set[tuple[object, ...]]()
        while left.any() and len(steps) < runs:
            known = target @ covariance
            variance = np.maximum(np.einsum("ij,ij->i", known, target), 0.0)
            gain = _gains(known, variance, covariance, rows, blocks)
            extra = np.array([0.0 if pipeline in built else BUILD_S for pipeline in pipelines])
            best = int(np.argmax(np.where(left, gain / np.sqrt(seconds + extra), -np.inf)))
            left[best] = False
            built.add(pipelines[best])
            mine = blocks[best][blocks[best] >= 0]
            half = covariance @ rows.X[mine].T
            inner = rows.X[mine] @ half + np.diag(rows.misfit_bytes[mine] ** 2)
            covariance = covariance - half @ np.linalg.solve(inner, half.T)
            steps.append(Step(able[best], _width(target, covariance)))
        return steps


def _width(target: Array, covariance: Array, scale: float = 1.0, degrees: float = math.inf) -> float:
    variance = np.maximum(np.einsum("ij,ij->i", target @ covariance, target), 0.0)
    tails = (
        math.sqrt(degrees / (degrees - 2)) if math.isfinite(degrees) else 1.0
    )  # Student's spread over the normal one
    return float(1.96 * scale * tails * np.sqrt(np.quantile(variance, 0.95)))


def _spread(rows: Rows, blocks: Indices, seconds: Array) -> Indices:
    """The workloads to choose from: of those that the same effects reach the cheapest, the dearest and the middle one."""
    cells: dict[bytes, list[int]] = {}
    there = rows.X != 0
    for i in np.argsort(seconds, kind="stable"):
        cells.setdefault(there[blocks[i][blocks[i] >= 0]].tobytes(), []).append(int(i))
    return np.array(sorted({mine[at] for mine in cells.values() for at in (0, len(mine) // 2, -1)}))


def _targets(rows: Rows, count: int) -> Array:
    """The stages that may set a workload's peak, relative to it: a row each."""
    sd = np.sqrt(np.sum(np.square(rows.X), axis=1))
    found = []
    for i in range(count):
        mine = np.flatnonzero(rows.place == i)
        peaks = rows.prior_bytes[mine]
        top = int(np.argmax(peaks))
        reach = peaks + sd[mine] >= peaks[top] - sd[mine][top]
        found += [(j, peaks[top]) for j in mine[reach]]
    step = math.ceil(len(found) / MOST_TARGETS)
    kept = found[::step]
    relative: Array = rows.X[[j for j, _ in kept]] / np.array([peak for _, peak in kept])[:, None]
    return relative


def _blocks(rows: Rows, count: int) -> Indices:
    """The rows of each workload, padded with -1."""
    each = [np.flatnonzero(rows.place == i) for i in range(count)]
    table = np.full((count, max(map(len, each))), -1)
    for i, mine in enumerate(each):
        table[i, : len(mine)] = mine
    return table


def _gains(known: Array, variance: Array, covariance: Array, rows: Rows, blocks: Indices) -> Array:
    """By how much each workload would shrink the sum of squared variances."""
    X = np.vstack([rows.X, np.zeros(rows.X.shape[1])])  # the row that pads: it tells nothing
    noise = np.append(rows.misfit_bytes, 1.0) ** 2
    told = X @ covariance
    shared = (known @ X.T).T  # rows of candidates, columns of targets
    gains = np.empty(len(blocks))
    for i, mine in enumerate(blocks):
        inner = told[mine] @ X[mine].T + np.diag(noise[mine])
        half = np.linalg.solve(np.linalg.cholesky(inner), shared[mine])
        fall = np.minimum(np.einsum("ij,ij->j", half, half), variance)
        gains[i] = float(np.sum(fall * (2 * variance - fall)))
    return gains


def _fits(prior: Prior, w: Workload, memory_bytes: float | None) -> bool:
    if memory_bytes is None:
        return True
    metric = "required" if prior.artifact.metrics.get("required") else "allocated"
    return bool(prior.predictor.predict_workload(w, metric=metric).upper <= memory_bytes)


def _pipeline(w: Workload) -> tuple[object, ...]:
    """What has to be built anew where it changes."""
    return w.dtype, w.vae, w.safety_checker, w.offload


def _seconds(w: Workload) -> float:
    """About what a run takes [s]."""
    sizes = Sizes.of_workload(w)
    scores = 0.0 if w.attention == "sdpa" else SCORES_S * sizes.n * sizes.A**2
    kernels = UNET_S * sizes.n * sizes.A + VAE_S * sizes.B * sizes.A + scores
    return float(RUN_S + kernels * (FLOAT32 if w.dtype == "float32" else 1.0))
