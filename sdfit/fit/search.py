"""Tables of kernels tried on the runs of one group of dtypes: plain ones, then the best of them with ways in which kernels depart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from sdfit.equation.sizes import Array
from sdfit.equation.stages import stages_of
from sdfit.fit.live import skeleton
from sdfit.fit.shown import Mask, Shown
from sdfit.fit.tables import TENTHS, Odd, Table, copies_of_operands, known_table, tables
from sdfit.predict.simulation.workspaces import HALF, Architecture
from sdfit.records import Record
from sdfit.workload import Workload

MATCH_BYTES, MATCH = 4 << 20, 0.0005
"""So near is a match: what an allocator's remainders come to, and a share of the peak (the published runs' median is 0.02 %)."""
SAME, AS_LIKELY = 0.5, 3.0
"""Of tables whose misses differ by less the one nearest to the prior's is taken, and those up to the other are kept as likely. A
stage that is off by one match counts 0.7, by four 2.8, by a hundred 9.2."""
PARENTS, OF_A_KIND, DEPTH = 24, 4, 3
"""So many of the best tables are tried with further ways, so many at least of each kind, and so often."""
MOST_LIKELY = 400
"""Of each group; the nearest to the prior's."""
ENOUGH = 0.8
"""A table is the card's if it matches so large a share of all stages, and of those that kernels have a part in."""
MOST_NEARBY = 6
"""Copies of an operand by kernels of some sizes only; of 16 bits they may be widened."""
SCOPES = ("all", "one", "upsampled", "one upsampled")
COARSE = (11, 13, 16, 20, 25, 30)
"""Of `TENTHS`; those between are tried near the best of these."""
FURTHER = tuple(1.5**step for step in range(8))
"""Of the most memory in use that the runs show: up to where a plan may be taken that they show taken always."""
MOST_ROOMS = 24
"""So many amounts of memory are tried, up to which a larger plan may be taken."""
BEYOND = (1, 2, 4, 8)
"""Of the most pixels that the runs show a kernel's result to have: from where on others may be copied."""
MUCH = Table((2, 2, 2), "all", False, True)
"""By which most convolutions that could set a peak do."""
OTHERS = ((0, 0, 0), (1, 1, 1), (2, 2, 2))
"""What may be there, where the prior's own rules hold below."""
BETWEEN = (0.25, 0.5, 0.75)
"""Where between the least and the most that the runs allow such an amount is tried too, by ratio: the run that halves what is open is
then the one that tells most of them apart."""


class Fit(NamedTuple):
    """How a table does on the runs.

    Parameters
    ----------
    score : float
        The less the better.
    constant_bytes : float
        What the runs hold beside it all the time.
    off : array
        By how many matches each stage is off, what is held all the time aside.
    """

    score: float
    constant_bytes: float
    off: Array


@dataclass(frozen=True)
class Sought:
    """The table of one group that does best on the runs.

    Parameters
    ----------
    table : Table
    fit : Fit
    likely : list of Table
        Others that do as well.
    is_found : bool
        Whether it gives what the runs show.
    """

    table: Table
    fit: Fit
    likely: list[Table]
    is_found: bool

    @property
    def matched(self) -> float:
        """The share of stages that it matches."""
        return float(np.mean(np.abs(self.fit.off) <= 1))


@lru_cache(24)
def shown_of(workloads: tuple[Workload, ...], dtypes: tuple[str, ...], own: Architecture) -> Shown:
    """The stages of workloads that are simulated; kept, for the same are asked about under table after table."""
    runs = [skeleton(w, own.cublas_bytes) for w in workloads]
    return Shown([run for run in runs if run is not None], dtypes, own)


class Search:
    """Tables tried on the runs of one group of dtypes."""

    def __init__(self, own: Architecture, records: Sequence[Record], dtypes: tuple[str, ...]) -> None:
        self.own, self.dtypes = own, dtypes
        self.constant: float | None = None
        self.known = known_table(dtypes, own)
        both = [(r, run) for r in records if (run := skeleton(r.workload, own.cublas_bytes)) is not None]
        self.part: Mask = np.zeros(0, dtype=bool)
        if not both:
            return
        self.shown = shown_of(tuple(run.workload for _, run in both), dtypes, own)
        told = [(r, s) for r, run in both for s in stages_of(run.workload.variant)]
        seen = [r.stage_peaks_bytes.get(s, np.nan) - r.weights_bytes(s) for r, s in told]
        peaks = np.array([r.stage_peaks_bytes.get(s, 0) for r, s in told])
        self._seen, self._unit = np.array(seen) + self.shown.weights_bytes, MATCH_BYTES + MATCH * peaks
        self._told = np.isfinite(self._seen)
        most = self.shown.peaks(MUCH)
        self.part = (most > self.shown.bare_bytes)[self._told]

    def fit(self, table: Table) -> Fit:
        """How a table does."""
        miss = (self._seen - self.shown.peaks(table))[self._told]
        constants = [self.constant] if self.constant is not None else [float(np.median(miss))]
        if self.constant is None and not self.part.all():
            constants.append(float(np.median(miss[~self.part])))
        fits = []
        for constant in constants:
            off = (miss - constant) / self._unit[self._told]
            fits.append(Fit(float(np.log1p(np.square(off)).sum()), constant, off))
        return min(fits, key=lambda fit: fit.score)

    def best(self, constant: float | None, larger: tuple[Odd, ...], kept: Sequence[Table], is_more: bool) -> Sought:
        """Seek the table that does best.

        Parameters
        ----------
        constant : float, optional
            What the card holds all the time, where it is known [bytes].
        larger : tuple of Odd
            Larger plans that other dtypes take.
        kept : sequence of Table
            Tables that are tried first, and alone if one gives all.
        is_more : bool
            Whether fewer runs were looked at before.
        """
        self.constant = constant
        tried = {table: self.fit(table) for table in kept}
        if not tried or not self._matches(tried):
            tried = self._tried(larger, widely=not is_more)
        lowest = min(fit.score for fit in tried.values())
        for table in [table for table, fit in tried.items() if fit.score <= lowest + SAME]:
            tried |= {end: self.fit(end) for end in self._ends(table)}
        lowest = min(fit.score for fit in tried.values())
        near = sorted((t for t in tried if tried[t].score <= lowest + AS_LIKELY), key=self.known.changes)
        best = _middle([table for table in near if tried[table].score <= lowest + SAME])
        match = np.abs(tried[best].off) <= 1
        found = min(match.mean(), match[self.part].mean()) >= ENOUGH
        likely = [table for table in near if table != best][:MOST_LIKELY]
        likely += [t for t in self._beyond(best) if t not in near and self.fit(t).score <= lowest + SAME]
        return Sought(best, tried[best], likely, bool(found))

    def _tried(self, larger: tuple[Odd, ...], *, widely: bool) -> dict[Table, Fit]:
        plain = tables(self.dtypes, self.own)
        tried = {table: self.fit(table) for table in plain}
        tried |= {made: self.fit(made) for table in plain for odd in larger for made in [table._replace(odd=(odd,))]}
        every = [Odd("larger", None, tenths, None, scope) for tenths in TENTHS for scope in SCOPES]
        tried |= {made: self.fit(made) for odd in every for made in [self.known._replace(odd=(odd,))]}
        if not widely:
            return tried
        self._grow(tried)
        if not self._matches(tried) and not larger:  # a larger plan hides which operands are copied
            made = [table._replace(odd=(Odd("larger", None, tenths),)) for table in plain for tenths in COARSE]
            tried |= {table: self.fit(table) for table in made}
            self._grow(tried)
        return tried

    def _grow(self, tried: dict[Table, Fit]) -> None:
        """Try the best tables with one way more, again and again as long as it helps."""
        for _ in range(DEPTH):
            before = min(fit.score for fit in tried.values())
            for parent in self._parents(tried):
                for child in self._odder(parent, tried[parent]):
                    if child not in tried:
                        tried[child] = self.fit(child)
            if self._matches(tried) or min(fit.score for fit in tried.values()) > before - 1:
                return

    @staticmethod
    def _matches(tried: Mapping[Table, Fit]) -> bool:
        first = min(tried.values(), key=lambda fit: fit.score)
        return bool(np.all(np.abs(first.off) <= 1))

    def _parents(self, tried: Mapping[Table, Fit]) -> list[Table]:
        """The best tables, and the best of each kind; of those that do the same the first."""
        found: dict[tuple[object, ...], Table] = {}
        kinds: Counter[tuple[object, ...]] = Counter()
        for table in sorted(tried, key=lambda table: tried[table].score):
            kind = table.winograd, *(odd.kind for odd in table.odd)
            same = tried[table].score, kind
            if same not in found and (len(found) < PARENTS or kinds[kind] < OF_A_KIND):
                found[same] = table
                kinds[kind] += 1
        return list(found.values())

    def _odder(self, parent: Table, fit: Fit) -> Iterator[Table]:
        """A table with one way more in which kernels depart from it."""
        kinds = {odd.kind for odd in parent.odd}

        def with_(*odds: Odd) -> Iterator[Table]:
            for odd in odds:
                rest = tuple(o for o in parent.odd if o.kind != odd.kind)
                yield parent._replace(odd=tuple(sorted((*rest, odd))))

        if "single" not in kinds:
            every = parent.copies is None or kinds <= {"larger"}
            others = copies_of_operands(self.dtypes == HALF) if every else _neighbours(parent.copies or (0, 0, 0))
            yield from with_(*(Odd("single", copies) for copies in others if copies != parent.copies))
        if "small" not in kinds and parent.copies is not None:
            near = _neighbours(parent.copies)
            edges = self._edges(parent)
            yield from with_(*(Odd("small", copies, most) for most in edges for copies in near))
            small = [Odd("small", parent.copies, most) for most in edges]
            yield from (one._replace(copies=copies) for one in with_(*small) for copies in near)
        if "pad" not in kinds and any(parent.copies or (1,)):
            yield from with_(*(Odd("pad", None, amount) for amount in self._pads(fit)))
        if "unstrided" not in kinds and parent.copies is not None:
            yield from with_(Odd("unstrided"))
        larger = parent.having("larger")
        if larger is None:
            yield from with_(
                *(
                    Odd("larger", None, tenths, None, scope)
                    for tenths in (COARSE if kinds else TENTHS)
                    for scope in SCOPES
                )
            )
        elif larger.room_bytes is None:
            close = [larger._replace(amount=larger.amount + step) for step in (-2, -1, 1, 2)]
            yield from with_(*(one for one in close if one.amount in TENTHS))
            yield from with_(*(larger._replace(room_bytes=room) for room in self._rooms(parent, larger)))

    def _pads(self, fit: Fit) -> list[int]:
        """Amounts by which stages that kernels have a part in may lie above the others [bytes]."""
        miss = fit.off * self._unit[self._told] + fit.constant_bytes
        if self.part.all() or not self.part.any():
            return []
        more = np.quantile(miss[self.part], (0.25, 0.5, 0.75)) - np.median(miss[~self.part])
        return [int(amount) // 512 * 512 for amount in np.unique(more) if amount > MATCH_BYTES]

    def _edges(self, parent: Table) -> list[int]:
        """Pixels of a result between those of what sets the stages' peaks: the roundest number between each two."""
        seen = np.unique(self.shown.pixels[self.shown.highest(parent)])
        return [_roundest(int(low), int(high)) for low, high in pairwise(seen)]

    def _rooms(self, parent: Table, larger: Odd) -> list[int]:
        """Amounts of memory in use between those that a larger plan would lead to, and the most of them."""
        needed = self._needed(parent, larger)
        if len(needed) > MOST_ROOMS:
            needed = needed[np.linspace(0, len(needed) - 1, MOST_ROOMS).astype(int)]
        return [int(low + high) // 2 for low, high in pairwise(needed)] + [int(most) for most in needed[-1:]]

    def _needed(self, table: Table, larger: Odd) -> Array:
        found: Array = np.unique(
            self.shown.needed(table._replace(odd=tuple(odd for odd in table.odd if odd != larger)), larger)
        )
        return found[found > 0]

    def _ends(self, table: Table) -> Iterator[Table]:
        """The same with other ends of what it says, of pixels or of memory in use, that the runs allow: the least and the most, and of
        memory some between. A plan that is always taken may end anywhere above the most in use that they show."""
        for odd in table.odd:
            if odd.kind == "larger":
                seen, at = self._needed(table, odd), odd.room_bytes
            elif odd.kind in ("small", "large"):
                seen, at = np.unique(self.shown.pixels[self.shown.highest(table)]), odd.amount
            else:
                continue
            if at is None:
                ends = [int(seen[-1] * times) for times in FURTHER] if len(seen) else []
            else:
                ends = [*seen[seen <= at][-1:].tolist(), *(seen[seen > at][:1] - 1).tolist()]
                if odd.kind == "larger" and len(ends) == 2:
                    ends += [int(ends[0] * (ends[1] / ends[0]) ** share) for share in BETWEEN]
            yield from (_ending(table, odd, end) for end in ends)

    def _beyond(self, table: Table) -> Iterator[Table]:
        """The same with other kernels of results that are larger than any that the runs show: they do not speak of these."""
        if table.having("large") is not None:
            return
        highest = self.shown.highest(MUCH)
        for scope in ("one", "several") if table.having("single") else ("all",):
            most = int(np.max(self.shown.pixels[highest] * self.shown.images(scope)[highest]))
            for copies in OTHERS if table.copies is None else _neighbours(table.copies):
                for odd in (Odd("large", copies, most * times, None, scope) for times in BEYOND):
                    yield table._replace(odd=tuple(sorted((*table.odd, odd))))


def _middle(tables: Sequence[Table]) -> Table:
    """The first of some tables; of those that differ from it in nothing but up to where a larger plan is taken, the middle one."""
    larger = tables[0].having("larger")
    if larger is None or larger.room_bytes is None:
        return tables[0]
    rooms = [odd.room_bytes for table in tables if (odd := table.having("larger")) is not None and odd.room_bytes]
    alike = sorted({room for room in rooms if _ending(tables[0], larger, room) in tables})
    middle = math.sqrt(alike[0] * alike[-1])
    return _ending(tables[0], larger, min(alike, key=lambda room: abs(math.log(room / middle))))


def _ending(table: Table, odd: Odd, end: int) -> Table:
    """A table with another end of one of its ways."""
    moved = odd._replace(room_bytes=end) if odd.kind == "larger" else odd._replace(amount=end)
    return table._replace(odd=tuple(moved if one == odd else one for one in table.odd))


def _neighbours(copies: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Copies that differ in those of one operand by one, or by two where all are even, as where they are widened; and none."""
    found: set[tuple[int, ...]] = {(0, 0, 0)}
    for at in range(len(copies)):
        for step in (-1, 1) if any(often % 2 for often in copies) else (-2, -1, 1, 2):
            if 0 <= copies[at] + step <= MOST_NEARBY:
                found.add((*copies[:at], copies[at] + step, *copies[at + 1 :]))
    return sorted(found - {copies})


def _roundest(low: int, high: int) -> int:
    """A power of two from the first number on and below the second, if there is one; else the middle."""
    power = 1 << (high - 1).bit_length() - 1
    return power if low <= power < high else (low + high) // 2
