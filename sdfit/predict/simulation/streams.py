"""A run as its two pools see it, and what of it comes to nothing in a pool (see `sdfit.predict.simulation.pools`)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from sdfit.predict.simulation.order import Call, Order
from sdfit.predict.simulation.pools import Played, Pool
from sdfit.predict.simulation.segments import CACHE_GIVEN_BACK, SMALL_BYTES

_CACHE, _ = CACHE_GIVEN_BACK
_PART = 256
"""Events that are served at once where no call is."""
_MANY = range(100, 600)
"""Events that come to nothing of which it is worth while to look at each."""
_ALONE = 4
"""Events of which it is worth while to mark them alone, within a row of such that may come to nothing."""
_MOST = 30_000
"""Events beyond which nothing is marked: of slices by the hundred, whose runs are hardly ever laid out like another."""
_SMALL, _LARGE, _BOTH = np.array([1, 2, 3], dtype=np.int8)
"""Whose an event is."""


class Layout(NamedTuple):
    """How the events of one pool lie in a run, whatever their sizes; a mark stands before those that may come to nothing.

    Attributes
    ----------
    where : list of int
        The number of each event in the run; of a mark, that of the event behind it.
    gather : array of int
        As ``where``; of a mark, the number behind the last event of the run.
    numbers : list
        The block of each; of a mark, as `sdfit.predict.simulation.pools.Played` has it.
    marks : list of int
        Places of the marks; of marks within another the outer one comes first.
    within : list of int
        By place, the innermost mark that it is behind, but not behind what is marked; -1: none.
    begins, ends : array of int
        Places at which something begins that comes to nothing, and ends.
    firsts : array of int
        The first of those that a mark stands for.
    """

    where: list[int]
    gather: Any
    numbers: list[Any]
    marks: list[int]
    within: list[int]
    begins: Any
    ends: Any
    firsts: Any

    @classmethod
    def of(cls, blocks: Any, born: Any, where: Any, count: int) -> Layout:
        """Of the events of a pool, ``where`` they are in a run of so many."""
        begins, ends, firsts = _coming_to_nothing(blocks, born)
        at, until = begins[firsts], np.append(ends[firsts[1:] - 1], ends[len(ends) - 1 :])
        events = np.arange(len(blocks))
        places = events + np.searchsorted(at, events, side="right")
        marks, behind = at + np.arange(len(at)), places[until - 1] + 1
        within = np.full(len(blocks) + len(at) + 1, -1)
        numbers: list[Any] = np.insert(blocks, at, _CACHE).tolist()
        for number, (mark, end) in enumerate(zip(marks.tolist(), behind.tolist(), strict=True)):
            within[mark + 1 : end] = number
            numbers[mark] = number, end - mark - 1
        return cls(
            np.insert(where, at, where[at]).tolist(),
            np.insert(where, at, count),
            numbers,
            marks.tolist(),
            within.tolist(),
            places[begins],
            places[ends - 1] + 1,
            firsts,
        )


def _coming_to_nothing(blocks: Any, born: Any) -> tuple[Any, Any, Any]:
    """Where events begin and end that give back all that they take, and nothing else, the fewest from each event on; and the first of
    each row of such that follow on one another."""
    count = len(blocks)
    if count > _MOST:
        return (np.zeros(0, dtype=np.int64),) * 3
    by_block = np.argsort(blocks, kind="stable")
    same = (blocks[by_block][1:] == blocks[by_block][:-1]) & born[by_block][:-1]
    birth, death = by_block[:-1][same], by_block[1:][same]
    partner = np.where(born, count, -1)
    partner[birth], partner[death] = death, birth
    # a sum over what is live tells when it is the same again; that it is, is looked up then
    drawn = np.random.default_rng(0).integers(1 << 62, size=count)
    drawn[death] = -drawn[birth]
    live = np.concatenate([[0], np.cumsum(drawn)])
    by_live = np.argsort(live, kind="stable")
    again = live[by_live][1:] == live[by_live][:-1]
    begin, end = by_live[:-1][again], by_live[1:][again]
    within = np.stack([begin, end], axis=1).ravel()
    partner = np.append(partner, count)
    if len(within):
        least, most = np.minimum.reduceat(partner, within)[::2], np.maximum.reduceat(partner, within)[::2]
        closed = (least >= begin) & (most < end)
        begin, end = begin[closed], end[closed]
    order = np.argsort(begin)
    return _in_rows(begin[order].tolist(), end[order].tolist())


def _in_rows(begins: list[int], ends: list[int]) -> tuple[Any, Any, Any]:
    """What comes to nothing in rows, in each of which one begins where the one before ends; the longer ones of a row also alone."""
    number = {begin: at for at, begin in enumerate(begins)}
    rows: list[list[int]] = []
    seen: set[int] = set()
    for head in range(len(begins)):
        row: list[int] = []
        one = None if head in seen else head
        while one is not None:
            row.append(one)
            one = number.get(ends[one])
        if row:
            seen.update(row)
            rows.append(row)
            rows += [[one] for one in row if len(row) > 1 and ends[one] - begins[one] >= _ALONE]
    rows.sort(key=lambda row: (begins[row[0]], -ends[row[-1]]))
    each = np.array([one for row in rows for one in row], dtype=np.int64)
    firsts = np.cumsum([0, *map(len, rows)])[:-1]
    return np.array(begins, dtype=np.int64)[each], np.array(ends, dtype=np.int64)[each], firsts


@lru_cache(maxsize=16)
def _layouts(blocks: bytes, pools: bytes) -> tuple[Layout, Layout]:
    """Of the small and the large pool: of runs of one kind they are mostly the same."""
    number, pool = np.frombuffer(blocks, dtype=np.int64), np.frombuffer(pools, dtype=np.int8)
    found = []
    for own in (_SMALL, _LARGE):
        (where,) = np.nonzero((np.abs(pool) == own) | (pool == _BOTH))
        found.append(Layout.of(number[where], pool[where] > 0, where, len(number)))
    return found[0], found[1]


class Stream:
    """The events of one pool in a run.

    Parameters
    ----------
    layout : Layout
    changes : array of int
        Of the run's events, sizes rounded; one of nothing behind the last.
    first : int
        The number in the run of the first of them.
    unsplit_bytes : int
        The most that a block can have beyond what was asked for.
    """

    def __init__(self, layout: Layout, changes: Any, first: int, unsplit_bytes: int) -> None:
        self._layout, self._first = layout, first
        own = changes[layout.gather]
        rooms: list[int] = []
        if layout.marks:
            room = _room(own, layout.begins, layout.ends, unsplit_bytes)
            rooms = np.maximum.reduceat(room, layout.firsts).tolist()
        self._events = Played(layout.numbers, own.tolist(), rooms)

    @property
    def marks(self) -> list[int]:
        """Places of what may come to nothing."""
        return self._layout.marks

    def number(self, place: int) -> int:
        """The number in the run of the event at some place."""
        return self._first + self._layout.where[place]

    def play(self, pool: Pool, first: int, end: int, limit_bytes: float = math.inf) -> int | None:
        """Serve a part of the run; the number of the first event for which the pool would have to reserve more than a limit."""
        layout = self._layout
        begin, behind = (bisect_left(layout.where, number - self._first) for number in (first, end))
        crossed = []  # what they mark is not over at the end of the part
        mark = layout.within[behind]
        while mark >= 0 and layout.marks[mark] >= begin:
            crossed.append(layout.marks[mark])
            mark = layout.within[layout.marks[mark]]
        for until in (*reversed(crossed), behind):
            refused = pool.serve(self._events, begin, until, limit_bytes)
            if refused is not None:
                return self.number(refused)
            begin = until + 1
        return None


def _room(changes: Any, begins: Any, ends: Any, unsplit_bytes: int) -> Any:
    """How large one cached piece has to be so that events find all that they ask for in it, whatever else is cached [bytes].

    Room for all of their blocks side by side. Where those are many: for each request, k blocks are live and leave k + 1 gaps at most,
    of which one is large enough if all together are.
    """
    taken = np.concatenate([[0], np.cumsum(np.maximum(changes, 0))])
    room = taken[ends] - taken[begins]
    count = ends - begins
    for number in np.flatnonzero((count >= _MANY.start) & (count < _MANY.stop)).tolist():
        inside = changes[begins[number] : ends[number]]
        before = np.cumsum(np.sign(inside)) - (inside > 0)
        live = np.cumsum(inside) - np.maximum(inside, 0)
        gaps = live + before * unsplit_bytes + (before + 1) * inside
        room[number] = min(room[number], int(gaps[inside > 0].max()))
    return room


class Streams:
    """A run from some event on, pool by pool.

    Parameters
    ----------
    order : Order
    first : int
        The event that they begin with.
    """

    def __init__(self, order: Order, first: int) -> None:
        self.first, self.end = first, len(order.blocks)
        blocks, changes = order.blocks[first:], order.rounded[first:]
        pools = np.sign(changes).astype(np.int8) * np.where(np.abs(changes) > SMALL_BYTES, _LARGE, _SMALL)
        pools[(changes == 0) & (blocks == _CACHE)] = _BOTH
        self._changes = changes = np.append(changes, 0)
        small, large = _layouts(blocks.tobytes(), pools.tobytes())
        self.pools = Stream(small, changes, first, 0), Stream(large, changes, first, SMALL_BYTES)
        self.parts = self._cut(order.calls)

    def size_bytes(self, event: int) -> int:
        """By how much an event changes what is live."""
        return int(self._changes[event - self.first])

    def _cut(self, calls: Sequence[Call]) -> list[tuple[int, int, int | None]]:
        """First and last event of each part that is served at once, and what kind of call it is: the calls, and short pieces between."""
        parts: list[tuple[int, int, int | None]] = []
        at = self.first
        for first, end, kind in (*calls, (self.end, self.end, None)):
            if first >= at:
                parts += [(begin, min(begin + _PART, first), None) for begin in range(at, first, _PART)]
                parts.append((first, end, kind))
                at = end
        return parts
