"""Judge the decisions: the largest size by a model beside the largest by the truth.

A person asks which size fits a card. So for many capacities, shapes, batches and kinds of run the largest size that the
model's bound allows is set beside the largest that really fits, on the sizes that records hold: how much of the attainable
area is kept, how often the answer would have failed, and how many runs are refused though they fit. What is true is what
the records say, measured or simulated. The answer is what `sdfit.predict.advise.largest` finds among the same sizes;
by simulation those are the ones that it searches when it is told no step.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from sdfit.errors import RecordsError
from sdfit.predict.advise import Search, sizes_of_aspect
from sdfit.predict.predictor import Predictor
from sdfit.predict.replayed import Replayed
from sdfit.predict.simulation.library import NotSimulated
from sdfit.predict.simulation.needed import Needed
from sdfit.predict.verdict import SAFE_LEVEL, best_metric, supported_in_words
from sdfit.records import Record
from sdfit.units import GIB, aligned, percent
from sdfit.workload import MIN_SIDE, Workload, variant_name

CAPACITIES = tuple(gib * GIB for gib in (4, 6, 8, 12, 16, 24, 48, 80))
"""What PyTorch may take [bytes]: those of common cards."""
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"attention": "eager"},
    {"attention": "sliced"},
    {"vae_tiling": True},
    {"offload": "model"},
    {"dtype": "float32"},
)
"""Of runs that are simulated."""
SHAPES, BATCHES = ((1, 1), (3, 2), (2, 3), (16, 9)), (1, 2, 4, 8)
"""Width to height; images per call."""
LIVE = 1.01
"""Times a capacity: runs whose live bytes are more than that by the equation, which is right to a thousandth, do not fit it."""
ALL = "all"


@dataclass(frozen=True, slots=True)
class Line:
    """The decisions of one kind of run.

    Parameters
    ----------
    variant : str
        In words; ``all`` for all of them.
    decisions : int
        Capacities times ladders for which some size fits and some does not.
    kept_median, kept_worst : float
        The area that the model allows, as a share of the largest that fits; 0 where the model allows none.
    failed : float
        Share of decisions whose answer would have run out of memory.
    refused : float
        Share of the runs that fit that the model does not call sure.
    above_truth : float
        Mean of the bound above what is required, relative to that: over all runs; by simulation over those of the answers.
    """

    variant: str
    decisions: int
    kept_median: float
    kept_worst: float
    failed: float
    refused: float
    above_truth: float


@dataclass(frozen=True, slots=True)
class Decisions:
    """What `decide` found.

    Parameters
    ----------
    artifact : str
        The model's name.
    level : float
        That its bounds were asked for at.
    supported : float
        That they hold at, the least of them: ``level``, or what their scores support where those are too few for it.
    source : str
        What the truth is: ``measured``, ``simulated`` or ``recorded``.
    lines : tuple of Line
        One per variant, all of them last.
    skipped : int
        Decisions outside a ladder: every size fits, or none.
    untold : int
        By simulation, those that hang on runs of too many tiles for it.
    replayed : bool
        Whether the bounds are those of replayed runs (`sdfit.predict.replayed`). Where the records are traces, that is the
        same simulation as the truth: it shows what the bound costs, not how right a trace is.
    """

    artifact: str
    level: float
    supported: float
    source: str
    lines: tuple[Line, ...]
    skipped: int
    replayed: bool = False
    untold: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values; shares as fractions."""
        return asdict(self)

    def table(self) -> str:
        """The lines, aligned."""
        head = (
            "variant",
            "decisions",
            "area kept: median",
            "worst",
            "would fail",
            "refused though it fits",
            "bound above truth",
        )
        rows = [
            (
                line.variant,
                str(line.decisions),
                percent(line.kept_median, 1),
                percent(line.kept_worst, 1),
                percent(line.failed, 1),
                percent(line.refused, 1),
                percent(line.above_truth, 2),
            )
            for line in self.lines
        ]
        how = ", every run replayed," if self.replayed else ""
        asked = f" (asked for: {self.level:g})" if self.supported < self.level else ""
        at = supported_in_words(self.supported, self.level) + asked
        title = f"largest sizes by '{self.artifact}'{how} at {at}, beside those by {self.source} runs"
        untold = f"; {self.untold} hang on runs of more tiles than are simulated" if self.untold else ""
        return f"{title}\n{aligned([head, *rows])}\n{self.skipped} decisions lie outside the ladders of sizes{untold}"


class _Rung(NamedTuple):
    """A size of a ladder: its run, what that needs by the records, and at most by the model [bytes], at what level."""

    workload: Workload
    needed: float
    upper: float
    supported: float


@dataclass(slots=True)
class _Tally:
    """Counts of one kind of run."""

    kept: list[float]
    failed: int = 0
    fitting: int = 0
    refused: int = 0
    above: list[float] = field(default_factory=list)
    supported: list[float] = field(default_factory=list)


def decide(
    predictor: Predictor,
    records: Sequence[Record],
    *,
    level: float = SAFE_LEVEL,
    capacities: Iterable[int] = CAPACITIES,
    source: str = "recorded",
) -> Decisions:
    """Set the largest sizes by a model beside the largest by records.

    Parameters
    ----------
    predictor : Predictor
    records : sequence of Record
        Ladders of sizes: runs that agree in all but their size, and in the shape of it. Their ``required_bytes`` is the
        truth; a run out of memory under a cap is one that needs more than the cap.
    level : float
    capacities : iterable of int
        [bytes]

    Raises
    ------
    RecordsError
        If no ladder has two sizes, or the records hold no required memory.
    """
    known = [(record.workload, needed) for record in records if (needed := _needed(record)) is not None]
    return _judged(predictor, known, level, capacities, source)


def decide_by_simulation(
    predictor: Predictor,
    truth: Predictor,
    *,
    level: float = SAFE_LEVEL,
    capacities: Sequence[int] = CAPACITIES,
    variants: Sequence[Mapping[str, Any]] = VARIANTS,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    batches: Sequence[int] = BATCHES,
) -> Decisions:
    """Set the largest sizes by a model beside the largest by simulation, on the sizes that `largest` searches.

    Parameters
    ----------
    predictor : Predictor
    truth : Predictor
        A model whose runs are simulated (`sdfit.predict.replayed.Replayed`).
    level, capacities
        As in `decide`.
    variants : sequence of mapping
        Options of the runs.
    shapes : sequence of (int, int)
        Width to height.
    batches : sequence of int

    Raises
    ------
    RecordsError
        If the model that is to tell the truth simulates nothing.

    Notes
    -----
    Where the bounds are those of replayed runs too, this shows what the bound costs, not how right a simulation is. Simulated are the
    sizes from those whose tensors alone fill the capacity down to the answer; smaller ones are taken to fit.
    """
    if not isinstance(truth, Replayed):
        raise RecordsError(f"the model '{truth.name}' simulates no runs; give records: sdfit sweep --grid decisions")
    metric = best_metric(predictor)
    tallies: dict[str, _Tally] = defaultdict(lambda: _Tally([]))
    skipped = untold = 0
    for options, shape, batch in product(variants, shapes, batches):
        sizes = [size for size in sizes_of_aspect(shape) if max(size) > MIN_SIDE]  # 64x64 is not simulated
        runs = [Workload(*size, batch_size=batch, **options) for size in sizes]
        live = truth.equation.predict(_table(runs))
        needs = Needed(truth.artifact.name)
        mine = (tallies[variant_name(runs[0].variant)], tallies[ALL])
        for capacity in capacities:
            answer = _answer(predictor, runs, capacity, metric, level)
            above = [k for k, bytes_ in enumerate(live) if k > (answer or 0) and bytes_ <= LIVE * capacity]
            try:
                fitting = [k for k in above if needs.suffices(runs[k], "required", capacity)]
                needed = math.inf if answer is None else needs(runs[answer], "required")
            except NotSimulated:  # tiles by the hundred: the truth is not known
                untold += 1
                continue
            best = max(fitting, default=answer)
            if best is None:
                skipped += 1
                continue
            for tally in mine:
                tally.kept.append(0.0 if answer is None else runs[answer].pixels / runs[best].pixels)
                tally.failed += answer is not None and needed > capacity
                tally.fitting += len(fitting) + (0 if answer is None else answer + 1)
                tally.refused += len(fitting)
            if answer is not None:
                found = predictor.predict_workload(runs[answer], metric=metric, level=level)
                for tally in mine:
                    tally.above.append((found.upper - needed) / needed)
                    tally.supported.append(found.supported)
    return replace(_decisions(predictor, tallies, level, "simulated", skipped), untold=untold)


def _judged(
    predictor: Predictor,
    known: Sequence[tuple[Workload, float]],
    level: float,
    capacities: Iterable[int],
    source: str,
) -> Decisions:
    metric = best_metric(predictor)
    ladders: dict[tuple[Any, ...], list[_Rung]] = defaultdict(list)
    for w, needed in known:
        bound = predictor.predict_workload(w, metric=metric, level=level)
        shape = round(4 * math.log2(w.effective_width / w.effective_height))
        ladders[variant_name(w.variant), shape, w.batch_size, w.guided, w.tokens].append(
            _Rung(w, needed, bound.upper, bound.supported)
        )
    ladders = {key: sorted(sizes, key=lambda r: r.workload.pixels) for key, sizes in ladders.items() if len(sizes) > 1}
    if not ladders:
        raise RecordsError("these records hold no ladders of sizes with required memory; sweep the grid 'decisions'")
    tallies: dict[str, _Tally] = defaultdict(lambda: _Tally([]))
    skipped = 0
    for (variant, *_), rungs in ladders.items():
        mine = (tallies[variant], tallies[ALL])
        for tally in mine:
            tally.supported += [rung.supported for rung in rungs]
            tally.above += [(rung.upper - rung.needed) / rung.needed for rung in rungs if math.isfinite(rung.needed)]
        for capacity in capacities:
            fitting = [rung for rung in rungs if rung.needed <= capacity]
            if not fitting or len(fitting) == len(rungs):
                skipped += 1
                continue
            found = _answer(predictor, [rung.workload for rung in rungs], capacity, metric, level)
            answer = None if found is None else rungs[found]
            for tally in mine:
                tally.kept.append(min(answer.workload.pixels / fitting[-1].workload.pixels, 1.0) if answer else 0.0)
                tally.failed += answer is not None and answer.needed > capacity
                tally.fitting += len(fitting)
                tally.refused += sum(rung.upper > capacity for rung in fitting)
    return _decisions(predictor, tallies, level, source, skipped)


def _decisions(
    predictor: Predictor, tallies: Mapping[str, _Tally], level: float, source: str, skipped: int
) -> Decisions:
    names = [*sorted(name for name in tallies if name != ALL), ALL]
    lines = tuple(_line(n, tallies[n]) for n in names if tallies[n].kept)
    supported = min(tallies[ALL].supported, default=level)
    return Decisions(predictor.name, level, supported, source, lines, skipped, isinstance(predictor, Replayed))


def _answer(predictor: Predictor, runs: Sequence[Workload], capacity: int, metric: str, level: float) -> int | None:
    """Which one `sdfit.predict.advise.largest` gives, were these all there are."""
    search = Search(predictor, capacity, metric, level, lambda k: runs[k], _table(runs))
    return search.largest(level)


def _table(runs: Sequence[Workload]) -> dict[str, Any]:
    """Runs that differ in their size alone, in columns."""
    sides = np.array([(run.height, run.width) for run in runs])
    return runs[0].to_dict() | {"height": sides[:, 0], "width": sides[:, 1]}


def _needed(record: Record) -> float | None:
    """What a run requires [bytes]; infinite where it failed under the largest capacity of all; None if unknown."""
    if record.outcome == "ok":
        return None if record.required_bytes is None else float(record.required_bytes)
    return math.inf if record.outcome == "oom" and record.cap_bytes is None else None


def _line(name: str, tally: _Tally) -> Line:
    return Line(
        name,
        len(tally.kept),
        float(np.median(tally.kept)),
        float(min(tally.kept)),
        tally.failed / len(tally.kept),
        tally.refused / tally.fitting,
        float(np.mean(tally.above or [math.nan])),
    )
