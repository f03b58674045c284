"""What a run does with memory, in order: events of blocks in arrays, and which calls among them are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from sdfit.equation.weights import GRANULE_BYTES
from sdfit.predict.simulation.segments import CACHE_GIVEN_BACK

_CACHE, _ = CACHE_GIVEN_BACK
"""The block, and the change, of the event that the cache is given back: 0."""


class Events(NamedTuple):
    """Events in order: the block of each, counted from 1, by how many bytes it changes what is live, is it a workspace."""

    blocks: Any
    changes: Any
    workspace: Any

    @classmethod
    def of(cls, events: Sequence[tuple[int, int]]) -> Events:
        """From pairs, none of them a workspace."""
        pairs = np.array(events, dtype=np.int64).reshape(-1, 2)
        return cls(pairs[:, 0], pairs[:, 1], np.zeros(len(pairs), dtype=bool))

    @property
    def born(self) -> int:
        """How many blocks are born."""
        return int(np.count_nonzero(self.changes > 0))

    def numbered(self, left: Sequence[int]) -> tuple[Events, tuple[int, ...]]:
        """With blocks numbered as they are born, and those that are left."""
        born = self.changes > 0
        numbers = np.zeros(int(self.blocks.max(initial=0)) + 1, dtype=np.int64)
        numbers[self.blocks[born]] = np.arange(1, np.count_nonzero(born) + 1)
        kept = (self.changes != 0) | (self.blocks == _CACHE)  # a workspace of nothing is no block
        found = Events(numbers[self.blocks[kept]], self.changes[kept], self.workspace[kept])
        return found, tuple(int(numbers[block]) for block in left)

    def after(self, blocks: int) -> Events:
        """With so many blocks born before."""
        numbers = self.blocks + blocks
        if not self.blocks.all():
            numbers[self.blocks == _CACHE] = _CACHE
        return self._replace(blocks=numbers)

    def repeated(self, before: int) -> Events:
        """Of a piece of a run before which so many blocks were born: those from before are left out, and what is still there goes."""
        own = (self.blocks > before) | (self.blocks == _CACHE)
        blocks, changes = self.blocks[own], self.changes[own]
        born = changes > 0
        there = np.zeros(int(blocks.max(initial=before)) - before, dtype=np.int64)
        there[blocks[born] - before - 1] = changes[born]
        there[blocks[changes < 0] - before - 1] = 0
        (left,) = np.nonzero(there)
        return Events(
            np.concatenate([blocks, left + before + 1]),
            np.concatenate([changes, -there[left]]),
            np.concatenate([self.workspace[own], np.zeros(len(left), dtype=bool)]),
        )

    def listed(self) -> list[tuple[int, int]]:
        """In pairs, as a `sdfit.predict.simulation.meter.Meter` writes them."""
        return list(zip(self.blocks.tolist(), self.changes.tolist(), strict=True))


class Call(NamedTuple):
    """A piece of a run: its first event, the one after its last, and a number; what calls of one number do is the same in the large
    pool."""

    first: int
    end: int
    kind: int


@dataclass(frozen=True, eq=False)
class Order:
    """The events of a run.

    Parameters
    ----------
    blocks, changes : array of int, shape (events,)
        As of `Events`.
    calls : tuple of Call
        Those of which there are several of a kind, in order.
    beginning : int
        How many events come before the image does: they are the same whatever its size.
    """

    blocks: Any
    changes: Any
    calls: tuple[Call, ...] = ()
    beginning: int = 0

    @classmethod
    def of(cls, events: Sequence[tuple[int, int]]) -> Order:
        """From pairs, none of which are known to be alike."""
        return cls(*Events.of(events)[:2])

    @cached_property
    def rounded(self) -> Any:
        """As ``changes``, each block rounded up to the 512 B that the allocator counts in."""
        whole = np.abs(self.changes) + (GRANULE_BYTES - 1) & -GRANULE_BYTES
        return np.where(self.changes < 0, -whole, whole)

    @cached_property
    def requested_bytes(self) -> int:
        """The most that is live at once [bytes]; no cap below it suffices."""
        return int(np.cumsum(self.rounded).max(initial=0))

    def listed(self, first: int = 0, end: int | None = None) -> list[tuple[int, int]]:
        """Some of the events, or all, in pairs."""
        return list(zip(self.blocks[first:end].tolist(), self.changes[first:end].tolist(), strict=True))
