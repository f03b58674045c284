"""What stays around the weights: remainders of cached blocks that the allocator does not split.

The caching allocator hands out a cached block whole when no more than 1 MiB of it is left over, and counts all of it as
allocated. Over the weights of the pipeline this adds 25 to 40 MB, which published measurements show (``tests/backends/test_workspaces.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdfit.equation.stages import COMPONENTS
from sdfit.equation.weights import rounded
from sdfit.predict.simulation.segments import CachingAllocator

LOAD_ORDER = COMPONENTS
"""Order in which the components reach the card, for `unsplit_bytes`. Which it is depends on the version of diffusers
(sorted names today, the order of a Python set before) and on who loads; this one, the pipeline's signature, gives the
median over all 24. The five levels at which the A10 rows HFB-018 to HFB-029 lie are five such orders."""


def unsplit_bytes(sizes: Mapping[str, Sequence[int]], order: Sequence[str] = LOAD_ORDER) -> int:
    """What the caching allocator counts beyond the weights after loading them: remainders it does not split.

    Parameters
    ----------
    sizes : dict of str to list of int
        Bytes of each weight, by component, in the order of the component's modules.
    order : sequence of str
        In which the components reach the card; those that it does not name come last.

    Notes
    -----
    Exact for an allocator that was empty and served nothing else. In another order of the components the full float16
    pipeline has between 24.8 and 40.3 MB of it, instead of 29.8 MB.

    Examples
    --------
    Sixteen weights of 1.125 MiB fill one segment of 20 MiB; the seventeenth gets its last 2 MiB, whole.

    >>> unsplit_bytes({"unet": [1_179_648] * 16}), unsplit_bytes({"unet": [1_179_648] * 17})
    (0, 917504)
    """
    names = sorted(sizes, key=lambda name: order.index(name) if name in order else len(order))
    requests = [rounded(size) for name in names for size in sizes[name]]
    allocator = CachingAllocator()
    allocator.serve(list(enumerate(requests, 1)))
    return allocator.allocated_bytes - sum(requests)
