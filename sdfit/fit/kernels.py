"""Which kernels a card has, as a few runs tell: the table of workspaces under which a simulation of them comes out as they did.

What kernels hold is discrete: operands of a convolution are copied or not, once or twice, in all layers or in some. So few
runs choose among tables (`sdfit.fit.tables`) instead of measuring slopes: each run's stages are worked out under each table, and what
comes out is held against what was seen, up to one constant that the card may hold all the time. Where no plain table gives it, the best are
tried with ways in which kernels depart from copies. Where a table gives nearly all of what the runs
show, the card has these kernels as far as they tell, and `sdfit.fit.remade` fits the prior's equation again to its grids,
simulated with them. Where none does, the prior's own stay, and what is left is for `sdfit.fit.correction`.

Dtypes of one size are taken to run the same plans. What this does not know: plans that go by more than a `Table` says, or that
differ where no run was. Tables that give the same for the runs may differ elsewhere:
`Kernels.likely` keeps them, and intervals allow for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sdfit.equation.sizes import Array
from sdfit.equation.stages import stages_of
from sdfit.errors import SdfitError
from sdfit.fit.live import skeleton
from sdfit.fit.search import Search, Sought, shown_of
from sdfit.fit.tables import GROUPS, Table, known_table, own_rules
from sdfit.predict.artifact import Artifact
from sdfit.predict.simulation.workspaces import Architecture, workspaces_for
from sdfit.records import Record
from sdfit.workload import Workload

EXPLAINED = 0.98
"""All that the runs show is given by a table that matches so many stages."""
MOST_ALTERNATIVES = 40
"""So many likely tables are asked what they say of other runs."""


@dataclass(frozen=True)
class Kernels:
    """What the runs tell of a card's kernels.

    Parameters
    ----------
    own : Architecture
        The prior's.
    found : dict
        Group of dtypes -> the table that the runs match.
    likely : dict
        Group of dtypes -> other tables that they match as well.
    matched : dict
        Group of dtypes -> the share of stages that the best table matches, found or not.
    constant_bytes : int
        What the card holds all the time beside what the prior says [bytes]; may be below 0.
    """

    own: Architecture
    found: Mapping[tuple[str, ...], Table]
    likely: Mapping[tuple[str, ...], Sequence[Table]]
    matched: Mapping[tuple[str, ...], float]
    constant_bytes: int

    @property
    def words(self) -> dict[str, str]:
        """Dtype -> its table in words, and what it leaves open."""
        said: dict[str, str] = {}
        for dtypes, table in self.found.items():
            share = self.matched.get(dtypes, 1.0)
            rest = (
                "" if share >= EXPLAINED else f"; that gives {share:.0%} of what the runs show, so intervals are wide"
            )
            said |= dict.fromkeys(dtypes, table.words + rest)
        return said

    @property
    def architecture(self) -> Architecture:
        """The prior's, with the tables found; larger plans are left out, which go by more than an operation's shapes."""
        rules = tuple(r for dtypes in GROUPS for r in self.table(dtypes).rules(dtypes, own_rules(dtypes, self.own)))
        return replace(self.own, rules=rules)

    def table(self, dtypes: tuple[str, ...]) -> Table:
        """That of a group: found, or the prior's."""
        return self.found.get(dtypes, known_table(dtypes, self.own))

    def is_explained(self, dtype: str) -> bool:
        """Whether a table gives all that the runs of a dtype show, or none of it was asked."""
        return all(share >= EXPLAINED for dtypes, share in self.matched.items() if dtype in dtypes)

    def alternatives(self, rng: np.random.Generator) -> dict[tuple[str, ...], list[Table]]:
        """Of each group some of the likely tables, as many of each kind as of others, the one found first."""
        chosen = {}
        for dtypes in self.matched:
            kinds: dict[tuple[object, ...], list[Table]] = {}
            for table in self.likely.get(dtypes, ()):
                kinds.setdefault(
                    (table.winograd, *((odd.kind, odd.room_bytes is None) for odd in table.odd)), []
                ).append(table)
            found = [self.table(dtypes)]
            for kind in kinds.values():
                at = rng.permutation(len(kind))[: max(MOST_ALTERNATIVES // len(kinds), 1)]
                found += [kind[i] for i in at.tolist()]
            chosen[dtypes] = found
        return chosen

    def is_simulated(self, workload: Workload) -> bool:
        """Whether a run is."""
        return skeleton(workload, self.own.cublas_bytes) is not None

    def peaks(self, workloads: tuple[Workload, ...], dtypes: tuple[str, ...], table: Table) -> Array:
        """The peak of each stage of runs of one group, all of which are simulated, under a table [bytes]."""
        return shown_of(workloads, dtypes, self.own).peaks(table) + self.constant_bytes

    def held_bytes(
        self, workloads: Sequence[Workload], others: Mapping[tuple[str, ...], Table] | None = None
    ) -> list[Array]:
        """What each stage of each run is to hold above its weights [bytes]; NaN where it is not simulated.

        Parameters
        ----------
        workloads : sequence of Workload
        others : dict, optional
            Group of dtypes -> a table to take for the one found.
        """
        chosen = {dtypes: self.table(dtypes) for dtypes in GROUPS} | dict(others or {})
        found = [np.full(len(stages_of(w.variant)), np.nan) for w in workloads]
        for dtypes, table in chosen.items():
            mine = [i for i, w in enumerate(workloads) if w.dtype in dtypes]
            mine = [i for i in mine if skeleton(workloads[i], self.own.cublas_bytes) is not None]
            if not mine:
                continue
            shown = shown_of(tuple(workloads[i] for i in mine), dtypes, self.own)
            held = shown.peaks(table) - shown.weights_bytes + self.constant_bytes
            ends = np.cumsum([len(found[i]) for i in mine])
            for i, part in zip(mine, np.split(held, ends[:-1]), strict=True):
                found[i] = part.astype(float)
        return found


def kernels_of_prior(artifact: Artifact) -> Architecture | None:
    """The kernels that a model was simulated with, if this sdfit knows them."""
    label = artifact.environment.get("workspaces")
    try:
        known = workspaces_for(artifact.name) if label else None
    except SdfitError:
        return None
    return known.architecture if known is not None and known.convolutions_only and known.label == label else None


def recognise(own: Architecture, records: Sequence[Record], before: Kernels | None = None) -> Kernels:
    """Find the tables that runs match.

    Parameters
    ----------
    own : Architecture
        The prior's kernels.
    records : sequence of Record
        Runs that succeeded.
    before : Kernels, optional
        What fewer of them showed: if one of those tables gives all of these runs too, no other is looked for; and where none
        does, plain ones alone.
    """
    searches = {d: Search(own, [r for r in records if r.workload.dtype in d], d) for d in GROUPS}
    searches = {dtypes: search for dtypes, search in searches.items() if search.part.any()}
    done: dict[tuple[str, ...], Sought] = {}
    for again in range(2):
        for dtypes, search in searches.items():
            if dtypes in done and (again == 0 or done[dtypes].is_found):
                continue
            known = [sought for sought in done.values() if sought.is_found]
            if again and not known:
                continue  # nothing is known of the card that was not tried
            larger = {odd for sought in known for odd in sought.table.odd if odd.kind == "larger"}
            kept = [before.found[dtypes], *before.likely[dtypes]] if before and dtypes in before.found else []
            tried = search.best(known[0].fit.constant_bytes if known else None, tuple(larger), kept, before is not None)
            if dtypes not in done or tried.fit.score < done[dtypes].fit.score:
                done[dtypes] = tried
    found = {dtypes: sought for dtypes, sought in done.items() if sought.is_found}
    constants = [sought.fit.constant_bytes for sought in found.values()]
    return Kernels(
        own,
        {dtypes: sought.table for dtypes, sought in found.items()},
        {dtypes: sought.likely for dtypes, sought in found.items()},
        {dtypes: sought.matched for dtypes, sought in done.items()},
        round(constants[0]) if constants else 0,
    )
