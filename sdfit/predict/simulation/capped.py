"""A replay under a cap that goes on from where an earlier one stood, pool by pool; and what runs of one kind begin with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from sdfit.predict.simulation.order import Order
from sdfit.predict.simulation.pools import Pool
from sdfit.predict.simulation.segments import segment_bytes
from sdfit.predict.simulation.streams import Streams

Pools = tuple[Pool, Pool]

MOST_KEPT = 8
"""Checkpoints of one replay."""


class Checkpoint(NamedTuple):
    """A replay before one of its events.

    Attributes
    ----------
    event : int
    pools : (Pool, Pool)
        The small and the large one.
    most_bytes : int
        What was reserved at most [bytes], or somewhat more.
    """

    event: int
    pools: Pools
    most_bytes: int


@dataclass(slots=True)
class Refusal:
    """A request that did not fit under a cap: where, what would have been reserved [bytes], and the replay before it, if it was kept."""

    wanted_bytes: int
    before: Checkpoint | None


@dataclass
class Replayed:
    """What a replay under a cap came to.

    Attributes
    ----------
    wanted_bytes : int or None
        What would have been reserved had the request that fails found it; None if none fails.
    most_bytes : int
        What was reserved at most, or somewhat more.
    refusals : list of Refusal
        In order, those of the replay before the checkpoint that it began with too.
    """

    wanted_bytes: int | None
    most_bytes: int
    refusals: list[Refusal] = field(default_factory=list)

    @property
    def least_refused_bytes(self) -> float:
        """Under any cap from ``most_bytes`` on and below this, all goes the same way."""
        return min((refusal.wanted_bytes for refusal in self.refusals), default=math.inf)


class Capped:
    """A replay under a cap, from a checkpoint on.

    Parameters
    ----------
    streams : Streams
    base : Checkpoint
    cap_bytes : float
    refusals : sequence of Refusal
        Those before the checkpoint: none of them fits under this cap either.
    """

    def __init__(self, streams: Streams, base: Checkpoint, cap_bytes: float, refusals: Sequence[Refusal] = ()) -> None:
        self._streams, self._base, self._cap = streams, base, cap_bytes
        self._pools = _copied(base.pools)
        self._most_bytes, self._refusals = base.most_bytes, list(refusals)
        self._small_before = base.event, self._pools[0]

    @property
    def pools(self) -> Pools:
        """As they are now."""
        return self._pools

    def replay(self) -> Replayed:
        """Serve all that is left, or up to a request that fails.

        A call that leaves the large pool as it found it, and needs no segment there, does so whenever it finds it so.
        """
        known: dict[int, tuple[int, ...]] = {}
        wanted = None
        for first, end, kind in self._streams.parts:
            if end <= self._base.event:
                continue
            if kind is None or first < self._base.event:
                wanted = self._serve(max(first, self._base.event), end)
            else:
                large = self._pools[1]
                found, reserved, refused = large.pieces, large.reserved_bytes, len(self._refusals)
                wanted = self._serve(first, end, small_alone=known.get(kind) == found)
                large = self._pools[1]
                if (large.pieces, large.reserved_bytes, len(self._refusals)) == (found, reserved, refused):
                    known[kind] = found
            if wanted is not None:
                break
        return Replayed(wanted, self._most_bytes, self._refusals)

    def _serve(self, first: int, end: int, *, small_alone: bool = False) -> int | None:
        """Serve a part of the run; what the request that fails would have needed, None if none does.

        The small pool goes ahead without a cap, the large one follows and stops where both together meet it. There the small one goes
        back, and on from its last checkpoint to the same event: it has few to serve.
        """
        while True:
            refused = self._both(first, end, small_alone=small_alone)
            if refused is None:
                return None
            at, small = self._small_before
            self._streams.pools[0].play(small, at, refused)
            self._pools = small, self._pools[1]
            wanted = self._refuse(refused)
            if wanted > self._cap:
                return wanted
            first, small_alone = refused + 1, False

    def _both(self, first: int, end: int, *, small_alone: bool) -> int | None:
        """Serve a part of the run up to the first event with which both pools have reserved more than the cap; None if there is none."""
        (small, large), (small_stream, large_stream) = self._pools, self._streams.pools
        reserved, served = small.reserved_bytes, first
        self._small_before = first, small.copy()
        small.steps.clear()
        small_stream.play(small, first, end)
        for step in (*small.steps, None):
            until = end if step is None else small_stream.number(step.place)
            refused = None
            if not small_alone:
                refused = large_stream.play(large, served, until, self._cap - reserved)
                served = until
            self._most_bytes = max(self._most_bytes, reserved + large.reserved_bytes)
            if refused is not None:
                return refused
            if step is not None:
                if step.grows and step.reserved_bytes + large.reserved_bytes > self._cap:
                    large_stream.play(large, served, until)
                    return until
                reserved = step.reserved_bytes
        return None

    def _refuse(self, event: int) -> int:
        """Give the cache back for a request, and serve it if that helps; what is reserved with it then."""
        segment = segment_bytes(self._streams.size_bytes(event))
        wanted = self._reserved_bytes + segment
        kept = Checkpoint(event, _copied(self._pools), self._most_bytes) if len(self._refusals) < MOST_KEPT else None
        for pool in self._pools:
            pool.release_cached()
        after = self._reserved_bytes + segment
        fails = after > self._cap
        self._refusals.append(Refusal(after if fails else wanted, kept))
        if not fails:
            for stream, pool in zip(self._streams.pools, self._pools, strict=True):
                stream.play(pool, event, event + 1)
            self._most_bytes = max(self._most_bytes, self._reserved_bytes)
        return after

    @property
    def _reserved_bytes(self) -> int:
        return sum(pool.reserved_bytes for pool in self._pools)


def _copied(pools: Pools) -> Pools:
    small, large = pools
    return small.copy(), large.copy()


class Beginning:
    """What runs of one kind begin with, whatever their size: the weights and the text encoder. Served once.

    Parameters
    ----------
    order : Order
        Of one of them.
    """

    def __init__(self, order: Order) -> None:
        first = slice(order.beginning)
        self._blocks, self._changes = order.blocks[first], order.changes[first]
        self._last, self._gone = int(self._blocks.max(initial=0)), _gone(order)
        replay = Capped(Streams(Order(self._blocks, self._changes), 0), Checkpoint(0, Pool.both(), 0), math.inf)
        most = replay.replay().most_bytes
        gone = set(self._gone.tolist())
        found = [pool.held_by_all_but(gone) for pool in replay.pools]
        self._held, self._room = sum(held for held, _ in found), max(room for _, room in found)
        for pool in replay.pools:
            pool.keep_only(gone)
        self.after = Checkpoint(order.beginning, replay.pools, most)

    def begins(self, order: Order) -> bool:
        """Whether a run begins so, and gives back later what this one does of it."""
        first = slice(order.beginning)
        return (
            np.array_equal(order.blocks[first], self._blocks)
            and np.array_equal(order.changes[first], self._changes)
            and np.array_equal(_gone(order), self._gone)
        )

    def meets(self, cap_bytes: float) -> bool:
        """Whether it needs more than a cap; what all other replays come to is ``after``."""
        return self.after.most_bytes > cap_bytes

    def least_bytes(self, order: Order) -> int:
        """What a run that begins so reserves at least, under any cap that it does not meet so early [bytes].

        The segments of the blocks that stay to its end, and what else is live at once and fits into none of their gaps.
        """
        blocks, changes = order.blocks[order.beginning :], order.changes[order.beginning :]
        beside = np.where((blocks > self._last) & (np.abs(changes) > self._room), changes, 0)
        return self._held + int(np.cumsum(beside).max(initial=0))


def _gone(order: Order) -> Any:
    """The blocks of a run's beginning that it gives back later, by number."""
    blocks, changes = order.blocks[order.beginning :], order.changes[order.beginning :]
    last = order.blocks[: order.beginning].max(initial=0)
    return np.sort(blocks[(changes < 0) & (blocks <= last)])
