"""Reserved memory, and the smallest cap that suffices, from the births and deaths of blocks.

A trace gives the bytes that are live. What `torch.cuda.max_memory_reserved` reads, and the smallest cap under which
the run succeeds, also depend on how the caching allocator packs blocks into segments. `replay` sends the events of a
trace through a model of it (`sdfit.backends.trace.segments`), and `required` bisects the cap. Both need the standard library only;
the 10,000 events of a run take about 10 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdfit.backends.trace.segments import LARGE_SEGMENT_BYTES, Block, CachingAllocator, rounded
from sdfit.errors import SdfitError
from sdfit.units import MIB


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
    ample_bytes : int
        Of an uncapped replay: under any cap from here on nothing changes [bytes]. The reserved peak itself, except
        with expandable segments (see `CachingAllocator`).
    retries : int
        `num_alloc_retries`: how often all cached segments were given back for a request.
    skipped : int
        Transient blocks that were done without (``optional_transients``).
    oom_at : int or None
        Index of the event that found no memory.
    """

    outcome: str
    live_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    ample_bytes: int
    retries: int
    skipped: int
    oom_at: int | None


def replay(
    events: Sequence[tuple[int, int]],
    *,
    cap_bytes: int | None = None,
    expandable: bool = False,
    optional_transients: bool = False,
) -> Replay:
    """Replay births and deaths of blocks through the caching allocator, from an empty one.

    Parameters
    ----------
    events : sequence of (int, int)
        ``(block, +size_bytes)`` where a block is born, ``(block, -size_bytes)`` where it dies, as `Meter.events` of a
        trace has them: the weights first. A size of 0 is no allocation.
    cap_bytes : int, optional
        The cap on reserved memory [bytes]; None: none.
    expandable : bool
        See `CachingAllocator`.
    optional_transients : bool
        Whether a block that dies in the very next event may be done without when there is no room for it. Kernel
        workspaces are such blocks, and cuDNN's heuristics go on to a plan that needs less when one does not fit.

    Returns
    -------
    Replay
        Up to the failing event if the cap was too small.

    Raises
    ------
    SdfitError
        If a block is born twice, dies unborn, or dies with another size than it was born with.

    Notes
    -----
    It does not know what a smaller plan of cuDNN's would need instead, nor allocations that the events lack (the
    load of the weights, cuBLAS workspaces).

    Examples
    --------
    Two blocks of 12 MiB, of which the first dies before a third of 13 MiB is born:

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
    allocator = CachingAllocator(cap_bytes, expandable=expandable)
    malloc, free = allocator.malloc, allocator.free
    blocks: dict[int, tuple[Block | None, int]] = {}
    live = peak = skipped = 0
    oom_at: int | None = None
    for index, (number, size) in enumerate(events):
        if size > 0:
            if number in blocks:
                raise SdfitError(
                    f"event {index}: block {number} is born while it lives; trace the workload again", index=index
                )
            block = malloc(size)
            if block is None:
                if not (optional_transients and _passes(events, index, number, size)):
                    oom_at = index
                    break
                skipped += 1
            else:
                live += rounded(size)
                peak = max(peak, live)
            blocks[number] = (block, size)
        elif size < 0:
            block, born = blocks.pop(number, (None, 0))
            if born != -size:
                raise SdfitError(
                    f"event {index}: block {number} of {born} bytes dies with {-size}; trace the workload again",
                    index=index,
                )
            if block is not None:
                live -= rounded(born)
                free(block)
    return Replay(
        outcome="ok" if oom_at is None else "oom",
        live_bytes=peak,
        allocated_bytes=allocator.allocated_peak_bytes,
        reserved_bytes=allocator.reserved_peak_bytes,
        ample_bytes=allocator.ample_bytes,
        retries=allocator.retries,
        skipped=skipped,
        oom_at=oom_at,
    )


def required(
    events: Sequence[tuple[int, int]],
    *,
    step_bytes: int = 16 * MIB,
    expandable: bool = False,
    optional_transients: bool = False,
) -> int:
    """Find the smallest cap under which the events still succeed, to ``step_bytes``.

    Parameters
    ----------
    events, expandable, optional_transients
        As for `replay`.
    step_bytes : int
        How close the bisection goes [bytes], at least 1.

    Returns
    -------
    int
        A cap [bytes] under which `replay` succeeds, at most ``step_bytes`` above one under which it fails.

    Raises
    ------
    SdfitError
        If ``step_bytes`` is below 1.

    Notes
    -----
    It bisects between the live bytes that must be there at once (no smaller cap can hold them; the allocated counter
    is no such bound, since its unsplit remainders depend on the cap) and the uncapped reserved peak. Bisection assumes
    that a larger cap never fails where a smaller one succeeds. Giving cached segments back changes where later blocks
    go, so this can be violated; the result is then the upper edge of one of several ranges that fail, and a smaller
    cap may also do. The same is true of a bisection on a card.

    Examples
    --------
    >>> required([(1, 12 * MIB), (2, 12 * MIB), (1, -12 * MIB), (3, 13 * MIB)], step_bytes=1) // MIB
    26
    """
    if step_bytes < 1:
        raise SdfitError(f"step_bytes is {step_bytes}; it must be at least 1, for example 16777216", given=step_bytes)

    def fits(cap_bytes: int) -> bool:
        run = replay(events, cap_bytes=cap_bytes, expandable=expandable, optional_transients=optional_transients)
        return run.outcome == "ok"

    free_run = replay(events, expandable=expandable)
    must = _lasting_peak(events) if optional_transients else free_run.live_bytes
    if expandable:
        must = max(must - LARGE_SEGMENT_BYTES, 0)  # reserved may exceed the cap by less than a page
    fails, works = must - 1, free_run.ample_bytes
    while works - fails > step_bytes:
        middle = (fails + works) // 2
        if fits(middle):
            works = middle
        else:
            fails = middle
    return works


def _lasting_peak(events: Sequence[tuple[int, int]]) -> int:
    """Peak of the live bytes without the blocks that die in the event after their birth."""
    live = peak = 0
    for index, (number, size) in enumerate(events):
        if size < 0:
            live -= rounded(-size)
            continue
        live += rounded(size)
        if live > peak and not _passes(events, index, number, size):
            peak = live
    return peak


def _passes(events: Sequence[tuple[int, int]], index: int, number: int, size: int) -> bool:
    """Whether the block born at this event dies in the next one."""
    return index + 1 < len(events) and events[index + 1] == (number, -size)
