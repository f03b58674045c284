"""Which kernels a card has, as a few runs tell: the table of workspaces under which a simulation of them comes out as they did.

What kernels hold is discrete: operands of a convolution are copied or not, once or twice, in all layers or in some. So few
runs choose among tables (`tables`) instead of measuring slopes: each run is simulated under each table, and what comes out is
held against its stages, up to one constant that the card may hold all the time. Where one table gives nearly all of what the
runs show, the card has these kernels as far as they tell, and `model_of` fits the prior's equation again to its grids,
simulated with them. Where none does, the prior's own stay, and what is left is for `sdfit.fit.correction`.

Dtypes of one size are taken to run the same plans. What this does not know: plans that depend on what memory is left, on more
of a layer than `Table` says, or that differ where no run was. Tables that give the same for the runs may differ elsewhere:
`Kernels.others` keeps them, and intervals allow for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from sdfit.equation.sizes import Array
from sdfit.equation.stages import stages_of
from sdfit.errors import SdfitError
from sdfit.fit.fit import stage_facts
from sdfit.fit.held_out import fit_stage
from sdfit.fit.observations import Runs, observe
from sdfit.predict.artifact import Artifact, canonical
from sdfit.predict.simulation.library import NotSimulated
from sdfit.predict.simulation.simulate import Simulator
from sdfit.predict.simulation.workspaces import HALF, Architecture, Rule, Workspaces, workspaces_for
from sdfit.records import Record
from sdfit.sweep import grid
from sdfit.workload import Workload

GROUPS: tuple[tuple[str, ...], ...] = (HALF, ("float32",))
"""Dtypes that run the same plans."""
OPERANDS = ("input", "output", "weight")
MOST_COPIES = 2
"""Of an operand; two of 16 bits are one of 32."""
UPSAMPLED = (256, 256)
"""Channels of the convolution after the last upsampling, of which known cards copy nothing from two images on."""
MATCH_BYTES, MATCH = 4 << 20, 0.0005
"""So near is a match: what an allocator's remainders come to, and a share of the peak (the published runs' median is 0.02 %)."""
SAME, AS_LIKELY = 0.5, 3.0
"""Of tables whose misses differ by less the one nearest to the prior's is taken, and those up to the other are kept as others. A
stage that is off by one match counts 0.7, by four 2.8, by a hundred 9.2."""
HOPELESS = 40.0
"""A table that misses so much more than another is tried on no further run."""
MOST_OTHERS = 2
"""Of each group; the nearest to the prior's."""
ENOUGH = 0.8
"""A table is the card's if it matches so large a share of all stages, and of those that kernels have a part in."""
GRIDS = ("default", "breadth", "strategies")
"""That a card is swept with."""


class Table(NamedTuple):
    """What convolutions of one group of dtypes hold.

    Parameters
    ----------
    copies : (int, int, int), optional
        How often input, output and filter are copied; None: by the prior's own rules.
    only : {'all', 'aligned'}
        Of which convolutions, as in `sdfit.predict.simulation.workspaces.Rule`.
    upsampled : bool
        Whether from two images on that after the last upsampling holds nothing.
    winograd : bool
        Whether heavy convolutions run in Winograd's domain.
    """

    copies: tuple[int, ...] | None
    only: str
    upsampled: bool
    winograd: bool

    def rules(self, dtypes: tuple[str, ...], own: Sequence[Rule]) -> tuple[Rule, ...]:
        """As an `Architecture` has them; ``own`` are the prior's."""
        found = [Rule(dtypes, ("winograd",), "", only="heavy")] if self.winograd else []
        if self.upsampled:
            found.append(Rule(dtypes, (), "", min_batch=2, channels=UPSAMPLED))
        if self.copies is None:
            return (*found, *own)
        copied = tuple(name for name, times in zip(OPERANDS, self.copies, strict=True) for _ in range(times))
        return (*found, Rule(dtypes, copied, "", only=self.only)) if copied else tuple(found)

    @property
    def words(self) -> str:
        """In words.

        Examples
        --------
        >>> Table((1, 0, 2), "all", False, True).words
        'every convolution copies its input and twice its filter; heavy ones run in the domain of Winograd'
        """
        if self.copies is None:
            said = ["convolutions copy as the prior has it"]
        elif not any(self.copies):
            said = ["no convolution copies anything"]
        else:
            named = zip(("input", "output", "filter"), self.copies, strict=True)
            parts = [f"{'twice ' * (times > 1)}its {name}" for name, times in named if times]
            which = "every convolution" if self.only == "all" else "every convolution of 3x3 with aligned channels"
            said = [f"{which} copies {' and '.join(parts)}"]
        if self.upsampled:
            said.append("the last upsampling's nothing from two images on")
        if self.winograd:
            said.append("heavy ones run in the domain of Winograd")
        return "; ".join(said)

    def changes(self, other: Table) -> int:
        """How many things differ."""
        if self.copies is None or other.copies is None:
            copies = 0 if self.copies is other.copies else 2
        else:
            copies = sum(abs(a - b) for a, b in zip(self.copies, other.copies, strict=True))
        return copies + sum(a != b for a, b in zip(self[1:], other[1:], strict=True))


@cache
def tables(dtypes: tuple[str, ...], own: Architecture) -> tuple[tuple[Table, tuple[Rule, ...]], ...]:
    """The tables that a group of dtypes may have, each with its rules: the prior's own first, then those nearest to it."""
    rules = tuple(replace(rule, dtypes=dtypes) for rule in own.rules if set(dtypes) & set(rule.dtypes))
    plain = Rule((), (), "")
    heavy = any(rule.copies == ("winograd",) for rule in rules)
    upsampled = any(not rule.copies and rule.channels == UPSAMPLED for rule in rules)
    main = [r for r in rules if r.copies != ("winograd",) and (r.copies or r.channels != UPSAMPLED)]
    known = Table(None, "", upsampled, heavy)
    if not main:
        known = Table((0, 0, 0), "all", False, heavy)
    elif (
        len(main) == 1 and replace(main[0], dtypes=(), copies=(), evidence="", only="all", element_bytes=None) == plain
    ):
        wide = 2 if main[0].element_bytes == 4 and dtypes == HALF else 1
        known = Table(tuple(wide * main[0].copies.count(name) for name in OPERANDS), main[0].only, upsampled, heavy)
    found = {one: one.rules(dtypes, main) for one in _family(known)} | {known: rules}
    return tuple(sorted(found.items(), key=lambda item: known.changes(item[0])))


def _family(known: Table) -> Iterator[Table]:
    for winograd in (False, True):
        yield Table((0, 0, 0), "all", False, winograd)
        for copies in product(range(MOST_COPIES + 1), repeat=len(OPERANDS)):
            if any(copies):
                yield from (Table(copies, *rest, winograd) for rest in product(("aligned", "all"), (False, True)))
        if known.copies is None:
            yield known._replace(winograd=winograd)


@cache
def _simulator(architecture: Architecture) -> Simulator:
    return Simulator(Workspaces(architecture))


def simulated(index: int, workload: Workload, architecture: Architecture) -> Record | None:
    """The record of a simulated run; None if it is not simulated."""
    try:
        run = _simulator(architecture).run(workload)
    except NotSimulated:
        return None
    peak, before = run.peak_bytes, run.weights_bytes + run.unsplit_bytes
    return Record(
        index, workload, "ok", run.stage_peaks, run.component_bytes, allocated_bytes=peak, baseline_bytes=before
    )


@lru_cache(1 << 16)
def held_bytes(workload: Workload, architecture: Architecture) -> tuple[float, ...]:
    """What each stage holds above its weights in a simulated run [bytes]; NaN where it is not simulated."""
    stages, record = stages_of(workload.variant), simulated(0, workload, architecture)
    if record is None:
        return (np.nan,) * len(stages)
    return tuple(record.stage_peaks_bytes[s] - record.weights_bytes(s) for s in stages)


@dataclass(frozen=True)
class Kernels:
    """What the runs tell of a card's kernels.

    Parameters
    ----------
    own : Architecture
        The prior's.
    found : dict
        Group of dtypes -> the table that the runs match, and its rules.
    others : dict
        Group of dtypes -> rules of other tables that they match as well.
    constant_bytes : int
        What the card holds all the time beside what the prior says [bytes]; may be below 0.
    """

    own: Architecture
    found: Mapping[tuple[str, ...], tuple[Table, tuple[Rule, ...]]]
    others: Mapping[tuple[str, ...], Sequence[tuple[Rule, ...]]]
    constant_bytes: int

    @property
    def words(self) -> dict[str, str]:
        """Dtype -> its table in words."""
        return {dtype: table.words for dtypes, (table, _) in self.found.items() for dtype in dtypes}

    @property
    def architecture(self) -> Architecture:
        """The prior's, with the rules found."""
        return self.having({dtypes: rules for dtypes, (_, rules) in self.found.items()})

    def having(self, rules: Mapping[tuple[str, ...], Sequence[Rule]]) -> Architecture:
        """The prior's, with other rules of some groups."""
        return _having(self.own, rules)

    def held_bytes(self, workload: Workload) -> Array:
        """What each stage of a run is to hold above its weights [bytes]; NaN where it is not simulated."""
        return np.array(held_bytes(workload, self.architecture)) + self.constant_bytes


def _having(own: Architecture, rules: Mapping[tuple[str, ...], Sequence[Rule]]) -> Architecture:
    kept = [rules.get(dtypes, tables(dtypes, own)[0][1]) for dtypes in GROUPS]
    return replace(own, rules=tuple(rule for some in kept for rule in some))


def kernels_of_prior(artifact: Artifact) -> Architecture | None:
    """The kernels that a model was simulated with, if this sdfit knows them."""
    label = artifact.environment.get("workspaces")
    try:
        known = workspaces_for(artifact.name) if label else None
    except SdfitError:
        return None
    return known.architecture if known is not None and known.convolutions_only and known.label == label else None


def recognise(own: Architecture, records: Sequence[Record]) -> Kernels:
    """Find the tables that runs match.

    Parameters
    ----------
    own : Architecture
        The prior's kernels.
    records : sequence of Record
        Runs that succeeded.
    """
    found: dict[tuple[str, ...], tuple[Table, tuple[Rule, ...]]] = {}
    others: dict[tuple[str, ...], list[tuple[Rule, ...]]] = {}
    misses: list[Array] = []
    for dtypes in GROUPS:
        runs = [r for r in records if r.workload.dtype in dtypes]
        known = tables(dtypes, own)
        alive = np.arange(len(known))
        none = next(i for i, (table, _) in enumerate(known) if table.copies == (0, 0, 0) and not table.winograd)
        miss, peaks, part = np.empty((len(known), 0)), np.empty(0), np.empty(0, dtype=bool)
        for run in runs:
            stages = stages_of(run.workload.variant)
            held = np.full((len(known), len(stages)), np.nan)
            for i in {none, *alive.tolist()}:
                held[i] = held_bytes(run.workload, _having(own, {dtypes: known[i][1]}))
            seen = np.array([_seen(run, stage) for stage in stages])
            told = np.isfinite(seen) & np.isfinite(held[none])
            miss = np.hstack([miss, (seen - held)[:, told]])
            part = np.append(part, np.any(held[alive] != held[none], axis=0)[told])
            peaks = np.append(peaks, np.array([run.stage_peaks_bytes.get(s, 0) for s in stages])[told])
            if miss.shape[1]:
                score = np.log1p(np.square(_off(miss[alive], peaks))).sum(axis=1)
                alive = alive[score <= score.min() + HOPELESS]
        if not part.any():
            continue
        score = np.log1p(np.square(_off(miss[alive], peaks))).sum(axis=1)
        likely = alive[score <= score.min() + AS_LIKELY]
        best = int(alive[score <= score.min() + SAME][0])
        match = np.abs(_off(miss[[best]], peaks))[0] <= 1
        if min(match.mean(), match[part].mean()) < ENOUGH:
            continue
        found[dtypes] = known[best]
        others[dtypes] = [known[i][1] for i in likely if i != best][:MOST_OTHERS]
        misses.append(miss[best])
    constant = round(float(np.median(np.concatenate(misses)))) if misses else 0
    return Kernels(own, found, others, constant)


def _off(miss: Array, peaks: Array) -> Array:
    """By how many matches stages are off, up to what each table misses all the time."""
    found: Array = (miss - np.median(miss, axis=1, keepdims=True)) / (MATCH_BYTES + MATCH * peaks)
    return found


def _seen(record: Record, stage: str) -> float:
    return record.stage_peaks_bytes.get(stage, np.nan) - record.weights_bytes(stage)


def _of_stages(workloads: Sequence[Workload], architecture: Architecture) -> Iterator[float]:
    for w in workloads:
        yield from held_bytes(w, architecture)


def simulations(kernels: Kernels, workloads: Sequence[Workload]) -> list[Array]:
    """What each stage of some workloads holds above its weights [bytes]: with the table found, then with each of the others."""
    found = [np.array([*_of_stages(workloads, kernels.architecture)])]
    for dtypes, some in kernels.others.items():
        mine = np.array([w.dtype in dtypes for w in workloads for _ in stages_of(w.variant)])
        asked = [w for w in workloads if w.dtype in dtypes]
        for rules in some:
            held = found[0].copy()
            held[mine] = [*_of_stages(asked, kernels.having({dtypes: rules}))]
            found.append(held)
    return [held + kernels.constant_bytes for held in found]


def model_of(prior: Artifact, kernels: Kernels, memory_bytes: float) -> Artifact:
    """The prior with the kernels that the runs tell, its stages fitted again to grids that are simulated with them.

    It is what a sweep of the default grid would give on a card of so much memory that has these kernels. What that grid leaves
    open is fitted to `GRIDS` together; stages that no run within the memory reaches stay the prior's, but for the constant.

    Parameters
    ----------
    prior : Artifact
    kernels : Kernels
    memory_bytes : float
        Of the card; infinite where it is not known.
    """
    stages = {name: _raised(stage, kernels.constant_bytes) for name, stage in prior.stages.items()}
    if not kernels.found:
        return replace(prior, stages=stages)
    dtypes = {dtype for some in kernels.found for dtype in some}
    by_default, by_all = _fitted(kernels.architecture, kernels.constant_bytes, memory_bytes)
    for name, stage in prior.stages.items():
        if name.split("|")[1] in dtypes:
            told = by_default.get(name)
            if told is None or not set(told["unidentified"]) <= set(stage["unidentified"]):
                told = by_all.get(name)
            stages[name] = stages[name] if told is None else told
    return replace(prior, stages=stages)


@lru_cache(64)
def _fitted(
    architecture: Architecture, constant_bytes: int, memory_bytes: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The stages of a card with these kernels: by the first of `GRIDS`, and by all."""
    first = grid.load(GRIDS[0]).for_the_trace().workloads
    every = list(dict.fromkeys(w for name in GRIDS for w in grid.load(name).for_the_trace().workloads))
    records = {}
    for i, w in enumerate(every):
        record = simulated(i, w, architecture)
        if record is None:
            continue
        peaks = {stage: max(peak + constant_bytes, 0) for stage, peak in record.stage_peaks_bytes.items()}
        if max(peaks.values()) <= memory_bytes:
            records[w] = replace(record, stage_peaks_bytes=peaks, allocated_bytes=max(peaks.values()))
    return _stages([records[w] for w in first if w in records]), _stages(list(records.values()))


def _stages(records: Sequence[Record]) -> dict[str, Any]:
    seen = observe(Runs(records)) if records else {}
    return canonical({"|".join(key): stage_facts(fit_stage(key, rows), rows) for key, rows in seen.items()})


def _raised(stage: Mapping[str, Any], more_bytes: int) -> dict[str, Any]:
    """A stage that holds so many bytes more, whatever the sizes."""
    at, moved = stage["terms"].index("1"), {}
    for part in ("coef", "low", "high"):
        moved[part] = [list(row) for row in stage[part]]
        for row in moved[part]:
            row[at] = None if row[at] is None else max(row[at] + more_bytes, 0)
    return dict(stage) | moved
