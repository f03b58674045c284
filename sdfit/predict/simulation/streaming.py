"""Weights that come to the card module by module, woven into what a module's call does with memory.

Under `enable_sequential_cpu_offload` and `enable_group_offload` (`sdfit.workload.STREAMED`) a submodule, or a group of them,
brings its weights when it is called and sends them back when it is done. Which bring which is found once from the hooks
that accelerate and diffusers attach (`sdfit.backends.trace.streaming`), and when they are called is part of a program
(`sdfit.predict.simulation.programs`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdfit.predict.simulation.order import Events
from sdfit.predict.simulation.segments import CACHE_GIVEN_BACK

_CACHE, _ = CACHE_GIVEN_BACK


class Moves:
    """The weights of one component that come and go with its submodules.

    Parameters
    ----------
    brought : dict of int to sequence of int
        Sizes of the weights that a submodule brings, as the allocator rounds them [bytes], in the order in which they come and
        go; by its number among the component's modules, counted from 1.
    empties : bool
        Whether the allocator's cache is emptied after each weight that comes, as accelerate does
        (`set_module_tensor_to_device`).
    """

    def __init__(self, brought: Mapping[int, Sequence[int]], *, empties: bool) -> None:
        self._brought = {module: list(sizes) for module, sizes in brought.items()}
        self._after = (_CACHE,) if empties else ()

    def woven(self, events: Events, calls: Any, modules: Any, marks: Any) -> tuple[Any, Events]:
        """Put the weights' events between a call's own.

        Parameters
        ----------
        events : Events
        calls, modules : array
            As of a `sdfit.predict.simulation.programs.Program`.
        marks : array
            Before which event something begins, which begins when the weights before it are gone and none of the next is there.

        Returns
        -------
        marks : array
        events : Events
        """
        where: list[int] = []
        blocks: list[int] = []
        changes: list[int] = []
        there: dict[int, range] = {}
        last = int(events.blocks.max(initial=0))
        for at, module in zip(calls.tolist(), modules.tolist(), strict=True):
            sizes = self._brought.get(abs(module))
            if sizes is None:
                continue
            if module < 0:
                blocks += there.pop(-module)
                changes += [-size for size in sizes]
            else:
                there[module] = new = range(last + 1, last + 1 + len(sizes))
                last = new[-1]
                blocks += [block for comes in new for block in (comes, *self._after)]
                changes += [change for size in sizes for change in (size, *self._after)]
            where += [at] * (len(blocks) - len(where))
        gone = np.array(where)[np.array(changes) < 0]
        shifted = marks + np.searchsorted(where, marks, side="left")
        shifted += np.searchsorted(gone, marks, side="right") - np.searchsorted(gone, marks, side="left")
        return shifted, Events(
            np.insert(events.blocks, where, blocks),
            np.insert(events.changes, where, changes),
            np.insert(events.workspace, where, False),
        )
