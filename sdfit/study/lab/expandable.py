"""PyTorch's allocator with expandable segments, for the recorded lists that have them; no sweep runs with them.

One segment per pool grows page by page: `try_allocate_expandable_block`, `map_block` and `unmap_block` of
`c10/cuda/CUDACachingAllocator.cpp`. All other rules are those of `sdfit.predict.simulation.segments`.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from sdfit.equation.weights import GRANULE_BYTES
from sdfit.predict.simulation.segments import (
    LARGE_SEGMENT_BYTES,
    PLACES,
    SMALL_BYTES,
    SMALL_SEGMENT_BYTES,
    WHERE,
    CachingAllocator,
)

SPACE_BYTES = 1 << 46
"""Address space of a pool: a segment reserves 1 1/8 of the card, which no replay reaches. The small pool's begins here, the large
pool's at 0."""


class ExpandableAllocator(CachingAllocator):
    """The allocator under `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`.

    Notes
    -----
    Pages are of 2 MiB (small pool) or 20 MiB (large pool), and every remainder of 512 B or more is split off. PyTorch checks the
    cap against `segment_bytes` of the request, not against the pages that it then maps, and so does this: reserved may exceed
    the cap by less than a page. It can neither be copied nor adopt a segment.

    Examples
    --------
    >>> allocator = ExpandableAllocator()
    >>> blocks = [allocator.malloc(size << 20) for size in (15, 25)]
    >>> [block.address >> 20 for block in blocks], allocator.reserved_bytes >> 20
    ([0, 15], 40)
    """

    expandable, large_split_bytes = True, GRANULE_BYTES

    def __init__(self, cap_bytes: int | None = None) -> None:
        super().__init__(cap_bytes)
        # address space without memory, by begin and end: what is not in use and not cached
        self._unmapped: list[tuple[int, int]] = [(0, SPACE_BYTES), (SPACE_BYTES, 2 * SPACE_BYTES)]

    def release_cached(self) -> None:
        """Take the memory from under the pages that lie wholly in cached pieces."""
        for cached, page in ((self._large, LARGE_SEGMENT_BYTES), (self._small, SMALL_SEGMENT_BYTES)):
            for begin, end in [(piece & WHERE, self._ends[piece & WHERE]) for piece in cached]:
                origin = begin - begin % SPACE_BYTES
                first, last = origin + -(-(begin - origin) // page) * page, origin + (end - origin) // page * page
                if first < last:
                    self._forget(cached, begin)
                    for piece in ((begin, first), (last, end)):
                        if piece[0] < piece[1]:
                            self._cache(cached, *piece)
                    self._unmap(first, last)

    def _new(self, size: int, segment: int) -> tuple[int, int]:
        """`find_expandable_block` and the pages that are missing in it."""
        cached, page = (self._small, SMALL_SEGMENT_BYTES) if size <= SMALL_BYTES else (self._large, LARGE_SEGMENT_BYTES)
        begin = self._lowest_with_room(size)
        have = self._ends.get(begin, begin) - begin
        if have:
            self._forget(cached, begin)
        while have < size:
            at = bisect_left(self._unmapped, (begin + have,))
            first, end = self._unmapped.pop(at)
            mapped = -(-min(size - have, end - first) // page) * page
            if first + mapped < end:
                self._unmapped.insert(at, (first + mapped, end))
            have += mapped
            self._reserve(mapped)
            beyond = self._ends.get(begin + have)
            if beyond is not None:
                self._forget(cached, begin + have)
                have = beyond - begin
        return begin, begin + have

    def _lowest_with_room(self, size: int) -> int:
        """The lowest run of unmapped and cached space that is long enough."""
        small = size <= SMALL_BYTES
        for first, last in self._unmapped:
            if (first >= SPACE_BYTES) != small:
                continue
            begin, end = self._begins.get(first, first), last
            while end - begin < size:
                at = bisect_left(self._unmapped, (end,))
                if end in self._ends:
                    end = self._ends[end]
                elif at < len(self._unmapped) and self._unmapped[at][0] == end:
                    end = self._unmapped[at][1]
                else:
                    break
            if end - begin >= size:
                return begin
        raise AssertionError("no replay fills the address space")

    def _less_expandable(self, cached: list[int], at: int) -> int:
        """A piece counts with the address space behind it that it can grow into."""

        def can_be(piece: int) -> int:
            begin = piece & WHERE
            end = self._ends[begin]
            after = bisect_left(self._unmapped, (end,))
            if after < len(self._unmapped) and self._unmapped[after][0] == end:
                end = self._unmapped[after][1]
            return end - begin

        while at + 1 < len(cached) and can_be(cached[at + 1]) < can_be(cached[at]):
            at += 1
        return at

    def _forget(self, cached: list[int], begin: int) -> None:
        """Take a piece out of the cached ones."""
        end = self._ends.pop(begin)
        del self._begins[end], cached[bisect_left(cached, (end - begin) << PLACES | begin)]

    def _unmap(self, begin: int, end: int) -> None:
        self.reserved_bytes -= end - begin
        at = bisect_left(self._unmapped, (begin,))
        if at < len(self._unmapped) and self._unmapped[at][0] == end != SPACE_BYTES:
            end = self._unmapped.pop(at)[1]
        if at and self._unmapped[at - 1][1] == begin != SPACE_BYTES:
            begin = self._unmapped.pop(at - 1)[0]
        insort(self._unmapped, (begin, end))
