"""Reserved memory, and the smallest cap that suffices, from a list of allocations and frees.

A trace gives the bytes that are live. What `torch.cuda.max_memory_reserved` reads, and the smallest cap under which
the run succeeds, also depend on how the caching allocator packs blocks into segments. `replay` sends the events of a
trace through a model of it (`sdfit.predict.simulation.segments`), `smallest_cap` finds the cap, and `between` tells
on which side of another it is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from sdfit.equation.weights import GRANULE_BYTES
from sdfit.errors import SdfitError
from sdfit.predict.simulation.capped import Beginning, Capped, Checkpoint, Replayed
from sdfit.predict.simulation.order import Order
from sdfit.predict.simulation.pools import Pool
from sdfit.predict.simulation.segments import ROUND_LARGE_BYTES, CachingAllocator
from sdfit.predict.simulation.streams import Streams


@dataclass(frozen=True, slots=True)
class Replay:
    """What the allocator made of a list of events. Simulated, whatever the events come from.

    Attributes
    ----------
    outcome : {'ok', 'oom'}
    live_bytes : int
        Peak of the requests live at once, each rounded up to 512 B: what a trace reports [bytes].
    allocated_bytes : int
        Peak of the blocks handed out, remainders too small to split included: `max_memory_allocated` [bytes].
    reserved_bytes : int
        `max_memory_reserved` [bytes].
    retries : int
        `num_alloc_retries`: how often all cached segments were given back for a request.
    oom_at : int or None
        Index of the event that found no memory.
    """

    outcome: str
    live_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    retries: int
    oom_at: int | None


def replay(events: Sequence[tuple[int, int]], *, cap_bytes: int | None = None) -> Replay:
    """Replay allocations and frees of blocks through the caching allocator, from an empty one.

    Parameters
    ----------
    events : sequence of (int, int)
        ``(block, +size_bytes)`` where a block is allocated, ``(block, -size_bytes)`` where it is freed, as
        `Meter.events` of a trace has them: the weights first. A size of 0 is no allocation;
        `CACHE_GIVEN_BACK` empties the cache.
    cap_bytes : int, optional
        The cap on reserved memory [bytes]; None: none.

    Returns
    -------
    Replay
        Up to the failing event if the cap was too small.

    Raises
    ------
    SdfitError
        If a block is allocated twice, freed before it was allocated, or freed with another size.

    Notes
    -----
    cuDNN goes on to a plan with less workspace where one does not fit; this counts that as out of memory. Nor does it
    know allocations that the events lack (the load of the weights, cuBLAS workspaces).

    Examples
    --------
    Two blocks of 12 MiB, of which the first is freed before a third of 13 MiB is allocated:

    >>> from sdfit.units import MIB
    >>> events = [(1, 12 * MIB), (2, 12 * MIB), (1, -12 * MIB), (3, 13 * MIB)]
    >>> free_run = replay(events)
    >>> free_run.live_bytes // MIB, free_run.allocated_bytes // MIB, free_run.reserved_bytes // MIB
    (25, 26, 38)
    >>> capped = replay(events, cap_bytes=26 * MIB)
    >>> capped.outcome, capped.retries, capped.reserved_bytes // MIB
    ('ok', 1, 26)
    >>> replay(events, cap_bytes=25 * MIB).oom_at
    3
    """
    live = _checked(events)
    allocator = CachingAllocator(cap_bytes)
    oom_at = allocator.serve(events)
    return Replay(
        outcome="ok" if oom_at is None else "oom",
        live_bytes=max(live[:oom_at], default=0),
        allocated_bytes=allocator.allocated_peak_bytes,
        reserved_bytes=allocator.reserved_peak_bytes,
        retries=allocator.retries,
        oom_at=oom_at,
    )


def _checked(events: Sequence[tuple[int, int]]) -> list[int]:
    """The bytes that are live after each event, if the events can be."""
    sizes: dict[int, int] = {}
    for index, (number, size) in enumerate(events):
        if size > 0:
            if number in sizes:
                raise SdfitError(
                    f"event {index}: block {number} is allocated while it is live; trace the workload again",
                    index=index,
                )
            sizes[number] = size
        elif size < 0:
            known = sizes.pop(number, 0)
            if known != -size:
                raise SdfitError(
                    f"event {index}: block {number} of {known} bytes is freed with {-size}; trace the workload again",
                    index=index,
                )
    return list(_live(events))


def _live(events: Iterable[tuple[int, int]]) -> Iterator[int]:
    """The bytes that are live after each event, block by block as the allocator rounds them."""
    more, whole = GRANULE_BYTES - 1, -GRANULE_BYTES
    return accumulate([size + more & whole if size > 0 else size & whole for _, size in events])


def smallest_cap(events: Sequence[tuple[int, int]] | Order, *, beginning: Beginning | None = None) -> int:
    """Find the smallest cap under which the events still succeed: the metric ``required`` of a trace.

    Parameters
    ----------
    events : sequence of (int, int), or Order
        As for `replay`.
    beginning : Beginning, optional
        What the events begin with.

    Returns
    -------
    int
        A cap [bytes] under which `replay` succeeds, a whole number of 2 MiB as all segments are; 2 MiB less fails.

    Notes
    -----
    It begins with the live bytes that must be there at once, and takes from each replay that fails the cap that the
    failing request would have needed. The cap that succeeds is then tried 2 MiB lower, and only if that succeeds too is
    there something to bisect. Each replay goes on from where the last one that failed first met its cap, as up to there they
    are the same; and one that reserved R and refused no less than S stands for all caps from R to below S.

    Both take it that a larger cap never fails where a smaller one succeeds. Giving cached segments back changes where
    later blocks go, so this can be violated; the result is then the upper edge of one of several ranges that fail, and a
    smaller cap may also do. The same is true of a bisection on a card.

    Examples
    --------
    >>> from sdfit.units import MIB
    >>> smallest_cap([(1, 12 * MIB), (2, 12 * MIB), (1, -12 * MIB), (3, 13 * MIB)]) // MIB
    26
    """
    return int(between(_in_order(events), None, beginning=beginning)[1])


def between(order: Order, cap_bytes: float | None, *, beginning: Beginning | None = None) -> tuple[int, float]:
    """What `smallest_cap` is more than, and the most that it is [bytes]: so far that a cap is not between them. None: to the end.

    It is the search for the smallest one, left where it is known on which side of the cap it ends. A replay under that cap alone
    would not tell: one that meets it and succeeds by giving cached segments back says nothing of larger caps, under which the run
    may fail.
    """
    replays, step = _Replays(order, beginning), ROUND_LARGE_BYTES
    fails, works = -step, -(-order.requested_bytes // step) * step
    while (wanted := replays.wanted(works)) is not None:
        fails, works = works, wanted
        if cap_bytes is not None and cap_bytes <= fails:
            return fails, math.inf
    middle = works - step
    while fails < middle and (cap_bytes is None or fails < cap_bytes < works):
        if replays.wanted(middle) is None:
            works = middle
        else:
            fails = middle
        middle = (fails + works) // (2 * step) * step
    return fails, works


def _in_order(events: Sequence[tuple[int, int]] | Order) -> Order:
    return events if isinstance(events, Order) else Order.of(events)


class _Replays:
    """Replays of the same events under rising caps and falling ones; what an earlier one tells is not tried again."""

    def __init__(self, order: Order, beginning: Beginning | None = None) -> None:
        self._order, self._beginning = order, beginning
        self._tried: list[Replayed] = []
        self._failed: Replayed | None = None
        self._first = Checkpoint(0, Pool.both(), 0)
        self._streams: Streams | None = None

    def wanted(self, cap_bytes: int) -> int | None:
        """What would have been reserved under a cap had the request that fails found it [bytes]; None if none fails.

        Later caps must be above those that failed.
        """
        for tried in self._tried:
            if tried.most_bytes <= cap_bytes < tried.least_refused_bytes:
                return tried.wanted_bytes
        replayed = self._from(cap_bytes).replay()
        self._tried.append(replayed)
        if replayed.wanted_bytes is not None:
            self._failed = replayed
        return replayed.wanted_bytes

    def _from(self, cap_bytes: int) -> Capped:
        """From before the first request that the last replay that failed was refused and this one is not: up to there they are the
        same.
        """
        if self._streams is None:
            if self._beginning is not None and not self._beginning.meets(cap_bytes):
                self._first = self._beginning.after
            self._streams = Streams(self._order, self._first.event)
        refusals = self._failed.refusals if self._failed is not None else []
        at = next((k for k, refusal in enumerate(refusals) if refusal.wanted_bytes <= cap_bytes), 0)
        for before in range(at, -1, -1):
            kept = refusals[before].before if refusals else None
            if kept is not None:
                return Capped(self._streams, kept, cap_bytes, refusals[:before])
        return Capped(self._streams, self._first, cap_bytes)


def without(events: Sequence[tuple[int, int]], blocks: Collection[int]) -> list[tuple[int, int]]:
    """Leave some blocks out: the events of a run in which the kernels take plans without a workspace.

    Examples
    --------
    >>> without([(1, 512), (2, 1024), (2, -1024)], {2})
    [(1, 512)]
    """
    return [event for event in events if event[0] not in blocks]
