"""What a module does with memory, as a function of the sizes that go in: found once, then evaluated.

One call of the UNet, or of the VAE's encoder or decoder, is thousands of operations, always the same ones in the same
order; only the sizes differ. A `Program` holds the order of births and deaths, and each size as a product of a few lengths:
batch, area at some resolution, tokens. `sdfit.backends.trace.finding` gets it from runs of the real module at three sizes
that have nothing in common, each number exactly or not at all; `Program.call` then gives the events of any size.

Kernel workspaces are no part of a program: it knows the shapes of each convolution and asks the table for theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from sdfit.equation.weights import GRANULE_BYTES
from sdfit.predict.simulation.order import Events
from sdfit.predict.simulation.streaming import Moves

Convolution = Callable[[tuple[int, ...], tuple[int, ...], tuple[int, ...]], int]
"""``convolution(image, weight, out) -> bytes`` that its kernel holds, by the shapes of its operands."""
LEVELS = 4
"""Resolutions of the UNet and of the VAE, each half of the one before."""
UNET, ENCODER, DECODER, TEXT, CHECKER = KINDS = ("unet", "encoder", "decoder", "text", "checker")
"""The pipeline's modules."""
WITHOUT_STREAMS = {"unet_deep": "unet"}
"""Stages that are told apart only where weights come module by module."""

FEWEST_SLICES, ALL_SLICES = 3, 1 << 20
"""Of an attention: the first, the last, and one that stands for all between them; and as many as any call has."""
HEADS = 8
"""Of each attention of the UNet."""
PICTURE, PATCH = 224, 14
"""Side of the pictures that the safety checker looks at, and of the patches that it cuts them into [pixels]."""


class Lengths(NamedTuple):
    """What a call's sizes are made of: images or samples, sides of what goes in [latents or pixels], tokens."""

    batch: int
    height: int = 1
    width: int = 1
    tokens: int = 1


class Taken(NamedTuple):
    """What one call took, beginning with nothing.

    ``events`` number blocks as they are born, from 1; ``made`` are the blocks that are there afterwards. Both are empty without
    events wanted.
    """

    peaks_bytes: dict[str, int]
    last_stage: str
    left_bytes: int
    events: Events
    made: tuple[int, ...]


@lru_cache(maxsize=4096)
def sides(side: int, kind: str) -> tuple[int, ...]:
    """List the lengths that occur along one side, in a fixed order, after a 1 for what has no side.

    Examples
    --------
    >>> sides(75, "unet"), sides(64, "decoder"), sides(512, "encoder")
    ((1, 75, 38, 19, 10), (1, 64, 128, 256, 512), (1, 512, 513, 256, 257, 128, 129, 64))
    """
    if kind == CHECKER:
        return (1, side, side // PATCH)
    found = [1]
    for level in range(LEVELS):
        found.append(side)
        if kind == ENCODER and level < LEVELS - 1:
            found.append(side + 1)  # padded at the far side before it is halved
        side = 2 * side if kind == DECODER else -(-side // 2)
    return tuple(found)


class Shape(NamedTuple):
    """The shape of a tensor (images, channels, height, width): ``batch`` 0 stands for the call's own."""

    batch: int
    channels: int
    level: int

    def at(self, lengths: Lengths, heights: Sequence[int], widths: Sequence[int]) -> tuple[int, ...]:
        """The shape in a call of these lengths; ``heights`` and ``widths`` are its `sides`."""
        return (self.batch or lengths.batch, self.channels, heights[self.level], widths[self.level])


class Layer(NamedTuple):
    """A convolution by the shapes of its input, weight and output."""

    image: Shape
    weight: tuple[int, ...]
    out: Shape


class _Order(NamedTuple):
    """Of each event the block, whether it is born, and which amount it is; the blocks that are made; where stages and calls lie."""

    blocks: Any
    born: Any
    amounts: Any
    made: tuple[int, ...]
    firsts: Any
    calls: Any


@dataclass(frozen=True)
class Program:
    """The events of a module's call, for any size.

    Parameters
    ----------
    kind : str
        Of `KINDS`.
    steps : array
        Of each event: which amount a block that is born takes, or, below 0, how many births ago the one that dies was born
        (-1: the last one).
    products : array
        A row per amount: factor [bytes], powers of batch, tokens and area, and which area of `sides`.
    layers : tuple of Layer
        Its convolutions; their amounts come after those of ``products``.
    marks : tuple of (int, str)
        Before which event which stage begins, the first one before the first event.
    made : tuple of int
        The blocks that are there afterwards, counted from 1, in the order of the results.
    calls, modules : array
        Of each submodule that has weights before which event it is called, and before which it is done; and which one it is, by
        its number among the component's modules, counted from 1, below 0 where it is done.
    loops : tuple of (int, int, int)
        Where attention is computed in slices: the events at which the first, the second and the last of three slices begin. There
        may be more than three, all of them as the second, or only two.
    heads_at_once : int
        Heads in a slice.
    """

    kind: str
    steps: Any
    products: Any
    layers: tuple[Layer, ...]
    marks: tuple[tuple[int, str], ...]
    made: tuple[int, ...]
    calls: Any
    modules: Any
    loops: tuple[tuple[int, int, int], ...] = ()
    heads_at_once: int = 0

    @cached_property
    def _order(self) -> _Order:
        """The events as they are written down."""
        born = self.steps >= 0
        count = np.cumsum(born)
        blocks = np.where(born, count, count + 1 + self.steps)
        firsts = np.array([first for first, _ in self.marks])
        return _Order(blocks, born, self.steps[born][blocks - 1], self.made, firsts, self.calls)

    @cached_property
    def _unrolled(self) -> dict[int, _Order]:
        """By how many slices there are."""
        return {}

    def count(self, batch: int, most_slices: int) -> int:
        """How many events a call of so many images or samples has, if no more slices of an attention are played."""
        slices = self._slices(batch, most_slices)
        return len(self.steps) + sum(last - second for _, second, last in self.loops) * (slices - 3)

    def _slices(self, batch: int, most: int) -> int:
        return min(-(-batch * HEADS // self.heads_at_once), most) if self.loops else 3

    def _ordered(self, batch: int, most_slices: int) -> _Order:
        if not self.loops:
            return self._order
        slices = self._slices(batch, most_slices)
        if slices not in self._unrolled:
            self._unrolled[slices] = self._unroll(slices)
        return self._unrolled[slices]

    def _unroll(self, slices: int) -> _Order:
        """As many slices as there are: what one of them leaves, the next one takes for what the first one left."""
        order = self._order
        born, blocks = order.born.tolist(), order.blocks.tolist()
        numbers: dict[int, int] = {}
        events: list[int] = []
        unrolled: list[int] = []
        count = 0

        def play(first: int, end: int) -> None:
            nonlocal count
            events.extend(range(first, end))
            for event in range(first, end):
                if born[event]:
                    count += 1
                    numbers[blocks[event]] = count
                unrolled.append(numbers[blocks[event]])

        def births(first: int, end: int) -> list[int]:
            return [blocks[event] for event in range(first, end) if born[event]]

        position = 0
        for first, second, last in self.loops:
            play(position, second)
            pairs = list(zip(births(first, second), births(second, last), strict=True))
            for number in range(slices - 2):
                if number:
                    numbers.update({before: numbers[after] for before, after in pairs})
                play(second, last)
            if slices == 2:
                numbers.update({after: numbers[before] for before, after in pairs})
            position = last
        play(position, len(blocks))
        made = tuple(numbers[block] for block in self.made)

        def moved(positions: Any) -> Any:
            more = [(positions >= last) * (slices - 3) * (last - second) for _, second, last in self.loops]
            return positions + np.sum(more, axis=0)

        parts = order.born[events], order.amounts[events], made, moved(order.firsts), moved(order.calls)
        return _Order(np.array(unrolled), *parts)

    def call(
        self,
        lengths: Lengths,
        convolution: Convolution | None,
        *,
        keep_events: bool,
        moves: Moves | None = None,
        most_slices: int = ALL_SLICES,
    ) -> Taken:
        """What a call of these lengths takes; with ``moves`` its weights come and go with its submodules.

        Of attention in slices no more than ``most_slices`` are played: `FEWEST_SLICES` at least, which have the peak.
        """
        most_slices = most_slices if keep_events else FEWEST_SLICES
        blocks, born, amounts, left, firsts, calls = self._ordered(lengths.batch, most_slices)
        heights, widths = sides(lengths.height, self.kind), sides(lengths.width, self.kind)
        areas = np.array(heights) * np.array(widths)
        factor, of_batch, of_tokens, of_area, level = self.products.T
        tensors = factor * lengths.batch**of_batch * lengths.tokens**of_tokens * areas[level] ** of_area
        tensors = -(-tensors // GRANULE_BYTES) * GRANULE_BYTES
        held = [
            0
            if convolution is None
            else convolution(image.at(lengths, heights, widths), weight, out.at(lengths, heights, widths))
            for image, weight, out in self.layers
        ]
        each = np.concatenate([tensors, np.array(held, dtype=np.int64)])
        sizes = each[amounts]
        events = Events(blocks, np.where(born, sizes, -sizes), amounts >= len(tensors))
        if moves is not None:
            firsts, events = moves.woven(events, calls, self.modules, firsts)
        live = np.cumsum(events.changes)
        peaks: dict[str, int] = {}
        begins = firsts.tolist()
        for (_, stage), first, end in zip(self.marks, begins, [*begins[1:], len(live)], strict=True):
            before = int(live[first - 1]) if first else 0
            name = stage if moves is not None else WITHOUT_STREAMS.get(stage, stage)
            peaks[name] = max(peaks.get(name, 0), before, int(live[first:end].max(initial=0)))
        written: tuple[Events, tuple[int, ...]] = Events.of([]), ()
        if keep_events:
            kind = self._slices(lengths.batch, most_slices), (each > 0).tobytes()
            written = self._numbered(events, left, kind) if moves is None else events.numbered(left)
        return Taken(peaks, self.marks[-1][1], int(live[-1]), *written)

    def _numbered(
        self, events: Events, left: tuple[int, ...], kind: tuple[int, bytes]
    ) -> tuple[Events, tuple[int, ...]]:
        """As `Events.numbered`; events of a kind, by slices and by which amounts are nothing, are numbered alike."""
        if kind not in self._numbers:
            self._numbers[kind] = (np.flatnonzero(events.changes), *events.numbered(left))
        kept, alike, made = self._numbers[kind]
        return alike._replace(changes=events.changes[kept]), made

    @cached_property
    def _numbers(self) -> dict[tuple[int, bytes], tuple[Any, Events, tuple[int, ...]]]:
        """By kind."""
        return {}
