"""The allocator's two pools, each served by itself: the rules of `sdfit.predict.simulation.segments`, for many replays of a run.

The small and the large pool share no segment, and neither sees more of the other than what both have reserved. So as long as no
request is refused for a cap, a stretch of a run may be served pool by pool. And within one pool much of a run comes to nothing: a
few events that take blocks and give all of them back leave the pool as it was, if no segment is needed on the way. None is where
the largest cached piece has room for all of those blocks side by side: whatever pieces they are cut from, its far end stays free.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Collection
from itertools import islice
from typing import Any, NamedTuple

from sdfit.equation.weights import GRANULE_BYTES
from sdfit.predict.simulation.segments import (
    PLACES,
    SMALL_BYTES,
    WHERE,
    segment_bytes,
)

_TOP_ADDRESS = 1 << 47


class Played(NamedTuple):
    """The events of one pool: of each a block, and by how many bytes it changes what is live; block 0: the cache is given back.

    A mark has ``(place in rooms, count)`` for a block and changes nothing: so many events behind it come to nothing if so much room
    is in one piece [bytes].
    """

    numbers: list[Any]
    changes: list[int]
    rooms: list[int]


class Step(NamedTuple):
    """Where a pool's segments change: at which event, counted in the pool, what it has reserved then [bytes], does it grow."""

    place: int
    reserved_bytes: int
    grows: bool


class Pool:
    """One pool of `sdfit.predict.simulation.segments.CachingAllocator`, which has all the room that it asks for.

    Parameters
    ----------
    least_rest : int
        The least remainder of a piece that is split off [bytes].

    Attributes
    ----------
    reserved_bytes : int
        What is taken of the driver now [bytes].
    steps : list of Step
        Those that it made; whoever looks at them clears them.
    """

    def __init__(self, least_rest: int) -> None:
        self._least_rest = least_rest
        self.reserved_bytes = 0
        self.steps: list[Step] = []
        self._pieces: list[int] = []
        self._ends: dict[int, int] = {}
        self._begins: dict[int, int] = {}
        self._segments: dict[int, int] = {}
        self._live: dict[int, tuple[int, int]] = {}
        self._lowest = _TOP_ADDRESS

    @classmethod
    def both(cls) -> tuple[Pool, Pool]:
        """A small and a large one, with nothing in them."""
        return cls(GRANULE_BYTES), cls(SMALL_BYTES + 1)

    def serve(self, events: Played, first: int, end: int, limit_bytes: float = math.inf) -> int | None:
        """Serve the events of this pool from one place to another; the place of the one for which it would have to reserve more than
        a limit, before which it stays, None if there is none.
        """
        pieces, live, ends, begins = self._pieces, self._live, self._ends, self._begins
        least_rest, rooms = self._least_rest, events.rooms
        left = zip(range(first, end), events.numbers[first:end], events.changes[first:end], strict=True)
        for place, number, change in left:
            if change > 0:
                at = bisect_left(pieces, change << PLACES)
                if at < len(pieces):
                    begin = pieces.pop(at) & WHERE
                    end = ends.pop(begin)
                else:
                    if self.reserved_bytes + segment_bytes(change) > limit_bytes:
                        return place
                    begin, end = self._grow(change, place)
                after = begin + change
                if end - after >= least_rest:
                    begins[end], ends[after] = after, end
                    insort(pieces, end - after << PLACES | after)
                    end = after
                else:
                    begins.pop(end, None)
                live[number] = begin, end
            elif change:
                begin, end = live.pop(number)
                if end in ends:
                    after = ends.pop(end)
                    del pieces[bisect_left(pieces, after - end << PLACES | end)]
                    end = after
                if begin in begins:
                    before = begins.pop(begin)
                    del pieces[bisect_left(pieces, begin - before << PLACES | before)]
                    begin = before
                ends[begin], begins[end] = end, begin
                insort(pieces, end - begin << PLACES | begin)
            elif number:  # a mark
                mark, count = number
                if pieces and pieces[-1] >> PLACES >= rooms[mark]:
                    deque(islice(left, count), maxlen=0)
            else:
                self.release_cached()
                self.steps.append(Step(place, self.reserved_bytes, grows=False))
        return None

    def _grow(self, size: int, place: int) -> tuple[int, int]:
        """A new segment below the one before it, which it does not touch; where it begins and ends."""
        segment = segment_bytes(size)
        self._lowest = begin = self._lowest - segment - GRANULE_BYTES
        self._segments[begin] = segment
        self.reserved_bytes += segment
        self.steps.append(Step(place, self.reserved_bytes, grows=True))
        return begin, begin + segment

    def release_cached(self) -> None:
        """Give every wholly free segment back to the driver."""
        pieces, segments, kept = self._pieces, self._segments, []
        for piece in pieces:
            begin, size = piece & WHERE, piece >> PLACES
            if segments.get(begin) == size:
                del segments[begin], self._ends[begin], self._begins[begin + size]
                self.reserved_bytes -= size
            else:
                kept.append(piece)
        pieces[:] = kept

    def copy(self) -> Pool:
        """The pool as it stands."""
        twin = object.__new__(Pool)
        twin.__dict__ |= self.__dict__
        twin._pieces, twin._live, twin._segments = self._pieces.copy(), self._live.copy(), self._segments.copy()
        twin._ends, twin._begins, twin.steps = self._ends.copy(), self._begins.copy(), []
        return twin

    def keep_only(self, numbers: Collection[int]) -> None:
        """Forget where blocks lie that nobody gives back: all that are live now but for some. They are many, and copied each time."""
        self._live = {number: block for number, block in self._live.items() if number in numbers}

    @property
    def pieces(self) -> tuple[int, ...]:
        """What is cached, see `sdfit.predict.simulation.segments.PLACES`: all that decides how requests are served."""
        return tuple(self._pieces)

    def held_by_all_but(self, numbers: Collection[int]) -> tuple[int, int]:
        """What is reserved as long as the blocks that are live now are, but for some; the most that one other block can have of it
        [bytes].
        """
        held = room = 0
        blocks = sorted(block for number, block in self._live.items() if number not in numbers)
        for address, size in self._segments.items():
            inside = blocks[bisect_left(blocks, (address,)) : bisect_left(blocks, (address + size,))]
            if inside:
                held += size
                ends = [address, *(end for _, end in inside)]
                begins = [*(begin for begin, _ in inside), address + size]
                room = max(room, *(begin - end for begin, end in zip(begins, ends, strict=True)))
        return held, room
