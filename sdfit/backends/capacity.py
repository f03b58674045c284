"""The smallest capacity under which a run still succeeds: what "does it fit" means, and what nobody publishes.

A run is repeated under caps between what it had allocated and what it had reserved, until the smallest cap that it
survives is known to one step. Each try must start from the same allocator state; that is the caller's part.
"""

from __future__ import annotations

from collections.abc import Callable

from sdfit.units import MIB

STEP_BYTES = 16 * MIB
SEGMENT_BYTES = 2 * MIB
"""The caching allocator takes memory from the driver in multiples of this, so finer caps tell nothing new."""


def smallest_capacity(
    fits: Callable[[int], bool], allocated_bytes: int, reserved_bytes: int, *, step_bytes: int = STEP_BYTES
) -> int:
    """Bisect for the smallest capacity at which a run succeeds.

    Parameters
    ----------
    fits : callable
        ``fits(capacity_bytes) -> bool``: run once under that cap.
    allocated_bytes, reserved_bytes : int
        Peaks of the run without a cap. It is known to succeed with ``reserved_bytes``; it is tried with
        ``allocated_bytes``, and below, since cuDNN takes a plan with less workspace where the better one does not fit.
    step_bytes : int
        How close to come.

    Returns
    -------
    int
        A capacity [bytes] that succeeded; ``step_bytes`` less (or, if that is nearer, a capacity that was tried) failed.

    Notes
    -----
    It takes success for monotone in the capacity, and does not know whether it is.

    Examples
    --------
    >>> smallest_capacity(lambda cap: cap >= 700 * MIB, 600 * MIB, 900 * MIB) // MIB
    702
    """
    high = reserved_bytes
    low = min(allocated_bytes, high - SEGMENT_BYTES)
    width = step_bytes
    while low > 0 and fits(low):
        high, low, width = low, low - width, 2 * width
    low = max(low, 0)
    while high - low > step_bytes:
        middle = (low + high) // 2 // SEGMENT_BYTES * SEGMENT_BYTES
        if not low < middle < high:
            break
        if fits(middle):
            high = middle
        else:
            low = middle
    return high
