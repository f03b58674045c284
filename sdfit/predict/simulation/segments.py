"""PyTorch's CUDA caching allocator, rule by rule, in plain Python: how requests become blocks of segments.

The rules, from `c10/cuda/CUDACachingAllocator.cpp` of PyTorch in its default settings (read at commit 001074d2 and
in its successor, which shares the code between devices; the constants are those of 2.13's headers):

=============================  ==============================================================================
`round_size`                   every request is rounded up to 512 B
`get_pool`                     up to 1 MiB: the small pool; above: the large pool; they never share a segment
`get_allocation_size`          a new segment is 2 MiB (small pool), 20 MiB (request below 10 MiB), or the request
                               rounded up to 2 MiB
`get_free_block`               best fit: the smallest cached block of the pool that is large enough, then the lowest
                               address
`should_split`                 the remainder becomes a cached block if it is at least 512 B (small pool) or more than
                               1 MiB (large pool); otherwise all of the block is handed out, **and counted as
                               allocated**
`try_merge_blocks`             a freed block joins its free neighbours of the same segment
`alloc_block`                  fails when reserved + the new segment would exceed the cap of
                               `set_per_process_memory_fraction`
`release_cached_blocks`        then every segment that is wholly free goes back, and one more try is made
=============================  ==============================================================================

These rules give the address of each of 11,836 allocations that others recorded on real cards, when they are told where
the driver put each new segment (``python -m sdfit.study.lab snapshots``).

Where `cudaMalloc` puts a segment is the driver's own affair; it decides between cached blocks of equal size. Here each
new segment lies below the one before it, as most of the recorded ones do: the driver fills its address space from the
top, but it also fills holes (one of 300 MiB from its beginning) and uses freed ranges again, which depends on what else
the process did. With falling addresses the reserved peak of every recorded list comes out equal; with rising ones that
of one, MercuryB1, was 7 % too high.

Not modelled: other streams, CUDA graphs, `max_split_size_mb`, `garbage_collection_threshold`,
`roundup_power2_divisions`, and a driver that fails before the cap.

A sweep runs in default settings; expandable segments, which three of the recorded lists have, stand in
`sdfit.study.lab.expandable`.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from typing import NamedTuple

from sdfit.equation.weights import GRANULE_BYTES
from sdfit.units import MIB

SMALL_BYTES = 1 * MIB
"""`kSmallSize`: the largest request of the small pool, and the largest remainder that the large pool does not split."""
SMALL_SEGMENT_BYTES = 2 * MIB
"""`kSmallBuffer`."""
MIN_LARGE_BYTES = 10 * MIB
"""`kMinLargeAlloc`: requests from here on get a segment of their own size."""
LARGE_SEGMENT_BYTES = 20 * MIB
"""`kLargeBuffer`, `large_segment_size`."""
ROUND_LARGE_BYTES = 2 * MIB
"""`kRoundLarge`."""

CACHE_GIVEN_BACK = (0, 0)
"""The event of a list of ``(block, size)`` at which the program itself calls `torch.cuda.empty_cache`."""

PLACES, WHERE = 48, (1 << 48) - 1
"""A cached piece is one number, its size shifted by so many bits and where it begins: they sort as best fit takes them, and are
compared in a fifth less time than pairs."""
_TOP_ADDRESS = 1 << 47  # of a process on x86-64; segments lie below


def segment_bytes(size_bytes: int) -> int:
    """Bytes of the segment that the allocator asks the driver for, when a request finds no cached block.

    Parameters
    ----------
    size_bytes : int
        The request, a multiple of 512 [bytes].

    Examples
    --------
    >>> [segment_bytes(size) // MIB for size in (512, MIB, MIB + 512, 10 * MIB - 512, 10 * MIB, 11 * MIB)]
    [2, 2, 20, 20, 10, 12]
    """
    if size_bytes <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size_bytes < MIN_LARGE_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-size_bytes // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES


class Block(NamedTuple):
    """A piece of a segment that is handed out: its number, where it lies and what it takes [bytes]."""

    number: int
    address: int
    size_bytes: int


class CachingAllocator:
    """The allocator of one device and one stream.

    Parameters
    ----------
    cap_bytes : int, optional
        What `torch.cuda.set_per_process_memory_fraction` allows [bytes]; None: no cap.
    driver : callable, optional
        ``driver(size_bytes)`` gives the address of a new segment, or lists them as they were recorded. None: each lies
        below the one before it.

    Attributes
    ----------
    allocated_bytes, reserved_bytes : int
        What `memory_allocated` and `memory_reserved` read now [bytes].
    allocated_peak_bytes, reserved_peak_bytes : int
        What `max_memory_allocated` and `max_memory_reserved` read [bytes].
    retries : int
        `num_alloc_retries` of `memory_stats`: how often all cached segments were given back.
    least_refused_bytes : float
        The least that would have been reserved, of the requests that did not fit under the cap; infinite if all did [bytes]. Under
        any cap from the reserved peak on and below this, all would have gone the same way.

    Examples
    --------
    >>> allocator = CachingAllocator()
    >>> block = allocator.malloc(3 * MIB)
    >>> allocator.allocated_bytes // MIB, allocator.reserved_bytes // MIB
    (3, 20)
    >>> allocator.free(block)
    >>> allocator.release_cached()
    >>> allocator.reserved_bytes
    0
    """

    expandable, large_split_bytes = False, SMALL_BYTES + 1
    """Whether segments can grow; the least remainder that is split off in the large pool."""

    def __init__(self, cap_bytes: int | None = None, *, driver: Callable[[int], int] | None = None) -> None:
        self.cap_bytes = cap_bytes
        self.allocated_bytes = self.allocated_peak_bytes = 0
        self.reserved_bytes = self.reserved_peak_bytes = 0
        self.retries = 0
        self.least_refused_bytes = math.inf
        # cached pieces, see `PLACES`
        self._small: list[int] = []
        self._large: list[int] = []
        # where those end that begin somewhere, and the reverse, so that a freed block finds its neighbours
        self._ends: dict[int, int] = {}
        self._begins: dict[int, int] = {}
        self._segments: dict[int, int] = {}
        self._live: dict[int, tuple[int, int]] = {}  # by number: begin and end
        self._lowest_address = _TOP_ADDRESS
        self._driver = driver or self._below
        self._count = 0

    def serve(self, events: Iterable[tuple[int, int]], first: int = 0) -> int | None:  # noqa: PLR0915 (a call an event is slow)
        """Serve allocations and frees; the index of the event that finds no memory, None if all do.

        Parameters
        ----------
        events : iterable of (int, int)
            ``(number, +size_bytes)`` for a request, ``(number, -size_bytes)`` where its block is freed, `CACHE_GIVEN_BACK`. Numbers
            are above 0, and each is live once at most.
        first : int
            What the first of them counts as.
        """
        small, large, live = self._small, self._large, self._live
        ends, begins, segments = self._ends, self._begins, self._segments
        expandable, large_split = self.expandable, self.large_split_bytes
        more, whole, most_small = GRANULE_BYTES - 1, -GRANULE_BYTES, SMALL_BYTES
        allocated, peak = self.allocated_bytes, self.allocated_peak_bytes
        failed = None
        for index, (number, change) in enumerate(events, first):
            if change > 0:
                size = (change + more) & whole
                cached = small if size <= most_small else large
                at = bisect_left(cached, size << PLACES)
                if at < len(cached):
                    if expandable:
                        at = self._less_expandable(cached, at)
                    begin = cached.pop(at) & WHERE
                    end = ends.pop(begin)
                else:
                    self.allocated_bytes, self.allocated_peak_bytes = allocated, peak
                    grown = self._room(size)
                    if grown is None:
                        failed = index
                        break
                    begin, end = grown
                after = begin + size
                rest = end - after
                if rest >= large_split or (rest and cached is small):
                    begins[end] = after
                    ends[after] = end
                    insort(cached, rest << PLACES | after)
                    live[number] = begin, after
                    allocated += size
                else:
                    begins.pop(end, None)
                    live[number] = begin, end
                    allocated += end - begin
                if allocated > peak:  # noqa: PLR1730 (max takes three times as long)
                    peak = allocated
            elif change < 0:
                begin, end = live.pop(number)
                allocated -= end - begin
                cached = small if end - begin <= most_small else large
                if end in ends and end not in segments:
                    after = ends.pop(end)
                    del cached[bisect_left(cached, (after - end) << PLACES | end)]
                    end = after
                if begin in begins and begin not in segments:
                    before = begins.pop(begin)
                    del cached[bisect_left(cached, (begin - before) << PLACES | before)]
                    begin = before
                ends[begin], begins[end] = end, begin
                insort(cached, (end - begin) << PLACES | begin)
            elif not number:
                self.release_cached()
        self.allocated_bytes, self.allocated_peak_bytes = allocated, peak
        return failed

    def malloc(self, size_bytes: int) -> Block | None:
        """Hand out a block of at least ``size_bytes``, or None where PyTorch raises `torch.OutOfMemoryError`.

        Parameters
        ----------
        size_bytes : int
            The request [bytes], above 0.
        """
        self._count += 1
        number = -self._count  # those of events are above 0
        if self.serve([(number, size_bytes)]) is not None:
            return None
        begin, end = self._live[number]
        return Block(number, begin, end - begin)

    def free(self, block: Block) -> None:
        """Take a block back into the cache, joined with its free neighbours."""
        self.serve([(block.number, -block.size_bytes)])

    def release_cached(self) -> None:
        """Give every wholly free segment back to the driver, as `torch.cuda.empty_cache` does."""
        segments = self._segments
        for cached in (self._large, self._small):
            for piece in cached:
                begin, size = piece & WHERE, piece >> PLACES
                if segments.get(begin) == size:
                    del segments[begin], self._ends[begin], self._begins[begin + size]
                    self.reserved_bytes -= size
            cached[:] = [piece for piece in cached if piece & WHERE in self._ends]

    def adopt(self, address: int, size_bytes: int, live: Iterable[tuple[int, int]]) -> list[Block]:
        """Take over a segment as it stands: what others recorded seldom begins with an empty allocator.

        Parameters
        ----------
        address, size_bytes : int
            Of the segment [bytes].
        live : iterable of (int, int)
            Address and size of each block handed out [bytes], by rising address; what lies between them is cached.

        Returns
        -------
        list of Block
            One for each of ``live``, to be freed as if `malloc` had given it.

        Notes
        -----
        A segment of 2 MiB belongs to the small pool: no request of the large one gets it.
        """
        cached = self._small if size_bytes == SMALL_SEGMENT_BYTES else self._large
        handed_out: list[Block] = []
        at = address
        for begin, size in (*live, (address + size_bytes, 0)):
            if begin > at:
                self._cache(cached, at, begin)
            at = begin + size
            if size:
                self._count += 1
                handed_out.append(Block(-self._count, begin, size))
                self._live[-self._count] = begin, at
                self.allocated_bytes += size
        self.allocated_peak_bytes = max(self.allocated_peak_bytes, self.allocated_bytes)
        self._lowest_address = min(self._lowest_address, address)
        self._segments[address] = size_bytes
        self._reserve(size_bytes)
        return handed_out

    def _room(self, size: int) -> tuple[int, int] | None:
        """`alloc_block`, and once more after giving the cache back; where it fails both times, None."""
        grown = self._grow(size)
        if grown is None:
            self.release_cached()
            self.retries += 1
            grown = self._grow(size)
        return grown

    def _grow(self, size: int) -> tuple[int, int] | None:
        """Begin and end of a free piece, no longer among the cached ones, of at least ``size``; None above the cap."""
        segment = segment_bytes(size)
        if self.cap_bytes is not None and self.reserved_bytes + segment > self.cap_bytes:
            self.least_refused_bytes = min(self.least_refused_bytes, self.reserved_bytes + segment)
            return None
        return self._new(size, segment)

    def _new(self, size: int, segment: int) -> tuple[int, int]:
        address = self._driver(segment)
        self._segments[address] = segment
        self._reserve(segment)
        return address, address + segment

    def _below(self, size: int) -> int:
        self._lowest_address -= size
        return self._lowest_address

    def _reserve(self, size: int) -> None:
        self.reserved_bytes += size
        self.reserved_peak_bytes = max(self.reserved_peak_bytes, self.reserved_bytes)

    def _cache(self, cached: list[int], begin: int, end: int) -> None:
        """Put a free piece among the cached ones."""
        insort(cached, (end - begin) << PLACES | begin)
        self._ends[begin], self._begins[end] = end, begin

    def _less_expandable(self, cached: list[int], at: int) -> int:
        """The piece to take where some can grow; ``at`` is the closest fit."""
        return at
