"""Reserved memory, and the smallest cap that suffices, from a list of allocations and frees.

A trace gives the bytes that are live. What `torch.cuda.max_memory_reserved` reads, and the smallest cap under which
the run succeeds, also depend on how the caching allocator packs blocks into segments. `replay` sends the events of a
trace through a model of it (`sdfit.predict.simulation.segments`), and `smallest_cap` finds the cap. Both need the standard
library only.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from sdfit.equation.weights import GRANULE_BYTES, rounded
from sdfit.errors import SdfitError
from sdfit.predict.simulation.segments import ROUND_LARGE_BYTES, CachingAllocator, segment_bytes


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


def smallest_cap(events: Sequence[tuple[int, int]], *, limit_bytes: int | None = None) -> int:
    """Find the smallest cap under which the events still succeed: the metric ``required`` of a trace.

    Parameters
    ----------
    events : sequence of (int, int)
        As for `replay`.
    limit_bytes : int, optional
        If the events fail under this cap, only that is of interest [bytes].

    Returns
    -------
    int
        A cap [bytes] under which `replay` succeeds, a whole number of 2 MiB as all segments are; 2 MiB less fails. Where the
        events fail under the limit, one byte more than that.

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
    step = ROUND_LARGE_BYTES
    replays = _Replays(events)
    fails, works = -step, -(-max(_live(events), default=0) // step) * step
    limit = math.inf if limit_bytes is None else limit_bytes
    if works > limit:
        return int(limit) + 1
    while (wanted := replays.wanted(works)) is not None:
        if wanted > limit:
            if replays.wanted(int(limit)) is not None:
                return int(limit) + 1
            limit = math.inf
        fails, works = works, wanted
    if limit < math.inf and replays.wanted(int(limit)) is not None:
        return int(limit) + 1
    middle = works - step
    while fails < middle:
        if replays.wanted(middle) is None:
            works = middle
        else:
            fails = middle
        middle = (fails + works) // (2 * step) * step
    return works


class _Checkpoint(NamedTuple):
    """A replay before one of its events: what all replays with at least its cap have in common."""

    event: int
    allocator: CachingAllocator


class _Tried(NamedTuple):
    """What a replay came to: what it would have needed to go on, None if it did not fail; and its twins' caps [bytes]."""

    wanted: int | None
    least: int
    most: float


class _Replays:
    """Replays of the same events under rising caps and falling ones; what an earlier one tells is not tried again."""

    def __init__(self, events: Sequence[tuple[int, int]]) -> None:
        self._events = events
        self._tried: list[_Tried] = []
        self._base = _Checkpoint(0, CachingAllocator())

    def wanted(self, cap_bytes: int) -> int | None:
        """What would have been reserved under a cap had the request that fails found it [bytes]; None if none fails.

        Later caps must be above those that failed.
        """
        for tried in self._tried:
            if tried.least <= cap_bytes < tried.most:
                return tried.wanted
        wanted, allocator, met = _capped(self._events, self._base, cap_bytes)
        self._tried.append(_Tried(wanted, allocator.reserved_peak_bytes, allocator.least_refused_bytes))
        if wanted is not None:
            self._base = met
        return wanted


def _capped(
    events: Sequence[tuple[int, int]], base: _Checkpoint, cap_bytes: int
) -> tuple[int | None, CachingAllocator, _Checkpoint]:
    """Replay under a cap from a checkpoint on.

    Returns what would have been reserved had the failing request found it [bytes], None if none fails; the allocator as it then
    stands; and the checkpoint at which the cap was first met.
    """
    allocator, met = base.allocator.copy(), base
    allocator.cap_bytes = cap_bytes

    def meet(index: int) -> None:
        nonlocal met
        met = _Checkpoint(index, allocator.copy())
        allocator.at_limit = None

    allocator.at_limit = meet
    failed = allocator.serve(events, base.event)
    if failed is None:
        return None, allocator, met
    return allocator.reserved_bytes + segment_bytes(rounded(events[failed][1])), allocator, met


def without(events: Sequence[tuple[int, int]], blocks: Collection[int]) -> list[tuple[int, int]]:
    """Leave some blocks out: the events of a run in which the kernels take plans without a workspace.

    Examples
    --------
    >>> without([(1, 512), (2, 1024), (2, -1024)], {2})
    [(1, 512)]
    """
    return [event for event in events if event[0] not in blocks]
