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

A sweep runs in default settings. Expandable segments are here because three of the recorded lists have them.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence

from sdfit.equation.weights import GRANULE_BYTES, rounded
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

_TOP_ADDRESS = 1 << 47  # of a process on x86-64; segments lie below
_ADDRESS_SPACE_BYTES = 1 << 60  # an expandable segment reserves 1 1/8 of the card; no replay reaches either


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


class Block:
    """A piece of a segment: handed out, cached, or (in an expandable segment) address space without memory."""

    __slots__ = ("address", "free", "mapped", "next", "pool", "prev", "size_bytes")

    def __init__(self, pool: _Pool, address: int, size_bytes: int) -> None:
        self.pool, self.address, self.size_bytes = pool, address, size_bytes
        self.free, self.mapped = True, True
        self.prev: Block | None = None
        self.next: Block | None = None


class _Pool:
    """Cached blocks in the order of best fit; of an expandable segment also the address space not in use."""

    __slots__ = ("cached", "page_bytes", "split_bytes", "unmapped")

    def __init__(self, *, page_bytes: int, split_bytes: int) -> None:
        self.page_bytes, self.split_bytes = page_bytes, split_bytes
        # tuples, so that bisect compares without calling Python; an address occurs once, a Block is never compared
        self.cached: list[tuple[int, int, Block]] = []
        self.unmapped: list[tuple[int, Block]] = []


class CachingAllocator:
    """The allocator of one device and one stream.

    Parameters
    ----------
    cap_bytes : int, optional
        What `torch.cuda.set_per_process_memory_fraction` allows [bytes]; None: no cap.
    expandable : bool
        `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`: one segment per pool that grows by pages of 2 MiB (small
        pool) or 20 MiB (large pool), in which every remainder of 512 B or more is split off. PyTorch checks the cap
        against `segment_bytes` of the request, not against the pages it then maps, and so does this: reserved may
        exceed the cap by less than a page. Addresses count from the beginning of the pool's segment.
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
    at_limit : callable or None
        Called when a request does not fit under the cap, before anything is given back for it.

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

    def __init__(
        self,
        cap_bytes: int | None = None,
        *,
        expandable: bool = False,
        driver: Callable[[int], int] | None = None,
    ) -> None:
        self.cap_bytes, self.expandable = cap_bytes, expandable
        self.allocated_bytes = self.allocated_peak_bytes = 0
        self.reserved_bytes = self.reserved_peak_bytes = 0
        self.retries = 0
        self.least_refused_bytes = math.inf
        self._small = _Pool(page_bytes=SMALL_SEGMENT_BYTES, split_bytes=GRANULE_BYTES)
        self._large = _Pool(
            page_bytes=LARGE_SEGMENT_BYTES, split_bytes=GRANULE_BYTES if expandable else SMALL_BYTES + 1
        )
        self.at_limit: Callable[[], None] | None = None
        self._lowest_address = _TOP_ADDRESS
        self._driver = driver or self._below

    def adopt(self, address: int, size_bytes: int, live: Sequence[tuple[int, int]]) -> list[Block]:
        """Take over a segment as it stands: what others recorded seldom begins with an empty allocator.

        Parameters
        ----------
        address, size_bytes : int
            Of the segment [bytes].
        live : sequence of (int, int)
            Address and size of each block handed out [bytes], by rising address; what lies between them is cached.

        Returns
        -------
        list of Block
            One for each of ``live``, to be freed as if `malloc` had given it.

        Notes
        -----
        Not for expandable segments. A segment of 2 MiB belongs to the small pool: no request of the large one gets it.
        """
        pool = self._small if size_bytes == SMALL_SEGMENT_BYTES else self._large
        pieces: list[tuple[int, int, bool]] = []
        at = address
        for begin, size in live:
            pieces += ((at, begin - at, True), (begin, size, False))
            at = begin + size
        pieces.append((at, address + size_bytes - at, True))
        handed_out: list[Block] = []
        before: Block | None = None
        for begin, size, free in pieces:
            if not size:
                continue
            block = Block(pool, begin, size)
            _link(before, block)
            before = block
            if free:
                insort(pool.cached, (size, begin, block))
            else:
                block.free = False
                handed_out.append(block)
                self.allocated_bytes += size
        self.allocated_peak_bytes = max(self.allocated_peak_bytes, self.allocated_bytes)
        self._lowest_address = min(self._lowest_address, address)
        self._reserve(size_bytes)
        return handed_out

    def malloc(self, size_bytes: int) -> Block | None:
        """Hand out a block of at least ``size_bytes``, or None where PyTorch raises `torch.OutOfMemoryError`.

        Parameters
        ----------
        size_bytes : int
            The request [bytes], above 0.
        """
        size = rounded(size_bytes)
        pool = self._small if size <= SMALL_BYTES else self._large
        cached = pool.cached
        index = bisect_left(cached, (size,))
        if index < len(cached):
            if self.expandable:
                index = _less_expandable(cached, index)
            block = cached.pop(index)[2]
        else:
            grown = self._grow(pool, size)
            if grown is None:
                if self.at_limit is not None:
                    self.at_limit()
                self.release_cached()
                self.retries += 1
                grown = self._grow(pool, size)
                if grown is None:
                    return None
            block = grown
        if block.size_bytes - size >= pool.split_bytes:
            rest = block
            block = Block(pool, rest.address, size)
            _link(rest.prev, block)
            _link(block, rest)
            rest.address += size
            rest.size_bytes -= size
            insort(cached, (rest.size_bytes, rest.address, rest))
        block.free = False
        self.allocated_bytes += block.size_bytes
        self.allocated_peak_bytes = max(self.allocated_peak_bytes, self.allocated_bytes)
        return block

    def copy(self, live: Mapping[int, Block]) -> tuple[CachingAllocator, dict[int, Block]]:
        """Copy the allocator as it stands, and the blocks that are handed out.

        Parameters
        ----------
        live : dict of int to Block
            All that `malloc` gave and nobody freed.

        Notes
        -----
        Not for expandable segments.
        """
        twin = CachingAllocator(self.cap_bytes)
        twin.allocated_bytes, twin.allocated_peak_bytes = self.allocated_bytes, self.allocated_peak_bytes
        twin.reserved_bytes, twin.reserved_peak_bytes = self.reserved_bytes, self.reserved_peak_bytes
        twin.retries, twin._lowest_address = self.retries, self._lowest_address
        pools = {self._small: twin._small, self._large: twin._large}
        blocks = [*live.values(), *(entry[2] for pool in pools for entry in pool.cached)]
        copied = {block: Block(pools[block.pool], block.address, block.size_bytes) for block in blocks}
        for block, new in copied.items():
            new.free = block.free
            new.prev = None if block.prev is None else copied[block.prev]
            new.next = None if block.next is None else copied[block.next]
        for pool, new_pool in pools.items():
            new_pool.cached[:] = [(size, address, copied[block]) for size, address, block in pool.cached]
        return twin, {number: copied[block] for number, block in live.items()}

    def free(self, block: Block) -> None:
        """Take a block back into the cache, joined with its free neighbours."""
        self.allocated_bytes -= block.size_bytes
        block.free = True
        _merge_neighbours(block)
        insort(block.pool.cached, (block.size_bytes, block.address, block))

    def release_cached(self) -> None:
        """Give every wholly free segment (or page) back to the driver, as `torch.cuda.empty_cache` does."""
        for pool in (self._large, self._small):
            if self.expandable:
                for _, _, block in list(pool.cached):
                    self._unmap(block)
                continue
            kept = [entry for entry in pool.cached if entry[2].prev is not None or entry[2].next is not None]
            self.reserved_bytes -= sum(entry[0] for entry in pool.cached) - sum(entry[0] for entry in kept)
            pool.cached[:] = kept

    def _grow(self, pool: _Pool, size: int) -> Block | None:
        """`alloc_block`: a free block, no longer among the cached ones, of at least ``size``; None above the cap."""
        segment = segment_bytes(size)
        if self.cap_bytes is not None and self.reserved_bytes + segment > self.cap_bytes:
            self.least_refused_bytes = min(self.least_refused_bytes, self.reserved_bytes + segment)
            return None
        if self.expandable:
            return self._expand(pool, size)
        self._reserve(segment)
        return Block(pool, self._driver(segment), segment)

    def _below(self, size: int) -> int:
        self._lowest_address -= size
        return self._lowest_address

    def _reserve(self, size: int) -> None:
        self.reserved_bytes += size
        self.reserved_peak_bytes = max(self.reserved_peak_bytes, self.reserved_bytes)

    # -- expandable segments: `try_allocate_expandable_block`, `map_block`, `unmap_block` --

    def _expand(self, pool: _Pool, size: int) -> Block:
        block = _lowest_with_room(pool, size)
        if not block.mapped:
            self._map(block, min(size, block.size_bytes))
        while block.size_bytes < size:
            following = block.next
            assert following is not None  # `_lowest_with_room` saw enough address space
            self._map(following, min(size - block.size_bytes, following.size_bytes))
            block = following  # which has taken in the block before it
        _forget(block)
        return block

    def _map(self, block: Block, size: int) -> None:
        """Put memory under the first pages of unmapped address space, and cache them."""
        pool = block.pool
        pages = -(-size // pool.page_bytes) * pool.page_bytes
        _forget(block)
        if pages < block.size_bytes:
            rest = Block(pool, block.address + pages, block.size_bytes - pages)
            rest.mapped = False
            _link(rest, block.next)
            _link(block, rest)
            insort(pool.unmapped, (rest.address, rest))
            block.size_bytes = pages
        block.mapped = True
        _merge_neighbours(block)
        insort(pool.cached, (block.size_bytes, block.address, block))
        self._reserve(pages)

    def _unmap(self, block: Block) -> None:
        """Take the memory from under those pages that lie wholly in a cached block."""
        pool, page = block.pool, block.pool.page_bytes
        begin, end = block.address, block.address + block.size_bytes
        first, last = -(-begin // page) * page, end // page * page
        if first >= last:
            return
        _forget(block)
        for address, size in ((begin, first - begin), (last, end - last)):
            if size:
                piece = Block(pool, address, size)
                if address == begin:
                    _link(block.prev, piece)
                    _link(piece, block)
                else:
                    _link(piece, block.next)
                    _link(block, piece)
                insort(pool.cached, (size, address, piece))
        block.address, block.size_bytes, block.mapped = first, last - first, False
        _merge_neighbours(block)
        insort(pool.unmapped, (block.address, block))
        self.reserved_bytes -= last - first


def _link(before: Block | None, after: Block | None) -> None:
    if before is not None:
        before.next = after
    if after is not None:
        after.prev = before


def _forget(block: Block) -> None:
    """Take a free block out of the list that it is in."""
    if block.mapped:
        cached = block.pool.cached
        del cached[bisect_left(cached, (block.size_bytes, block.address))]
    else:
        unmapped = block.pool.unmapped
        del unmapped[bisect_left(unmapped, (block.address,))]


def _merge_neighbours(block: Block) -> None:
    """`try_merge_blocks`, both ways: the block, itself in no list, takes in free neighbours mapped as it is."""
    other = block.prev
    if other is not None and other.free and other.mapped == block.mapped:
        _forget(other)
        block.address = other.address
        block.size_bytes += other.size_bytes
        _link(other.prev, block)
        if other.prev is None:
            block.prev = None
    other = block.next
    if other is not None and other.free and other.mapped == block.mapped:
        _forget(other)
        block.size_bytes += other.size_bytes
        _link(block, other.next)


def _less_expandable(cached: list[tuple[int, int, Block]], index: int) -> int:
    """Best fit in an expandable segment: a block counts with the address space behind it that it can grow into."""

    def can_be(block: Block) -> int:
        return block.size_bytes + (block.next.size_bytes if block.next is not None and not block.next.mapped else 0)

    while index + 1 < len(cached) and can_be(cached[index + 1][2]) < can_be(cached[index][2]):
        index += 1
    return index


def _lowest_with_room(pool: _Pool, size: int) -> Block:
    """`find_expandable_block`: the lowest run of unmapped and free blocks with enough address space."""
    for _, start in pool.unmapped:
        first = start.prev if start.prev is not None and start.prev.free else start
        room, block = 0, first
        while room < size:
            room += block.size_bytes
            if block.next is None or not block.next.free:
                break
            block = block.next
        if room >= size:
            return first
    everything = Block(pool, 0, _ADDRESS_SPACE_BYTES // pool.page_bytes * pool.page_bytes)
    everything.mapped = False
    pool.unmapped.append((0, everything))
    return everything
