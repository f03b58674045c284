"""What a module does with memory, as a function of the sizes that go in: found once, then evaluated.

One call of the UNet, or of the VAE's encoder or decoder, is thousands of operations, always the same ones in the same
order; only the sizes differ. A `Program` holds the order of births and deaths, and each size as a product of a few lengths:
batch, area at some resolution, tokens. `find` gets it from runs of the real module at three sizes that have nothing in
common, each number exactly or not at all; `Program.call` then gives the events of any size from arrays.

A module whose runs do not line up, or with a size that is no such product, has no program and is traced plainly. Kernel
workspaces are no part of a program: it knows the shapes of each convolution and asks the table for theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from sdfit.equation.weights import GRANULE_BYTES

Convolution = Callable[[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]], int]
"""``convolution(dtype, image, weight, out) -> bytes`` that its kernel holds, by the shapes of its operands."""
LEVELS = 4
"""Resolutions of the UNet and of the VAE, each half of the one before."""
UNET, ENCODER, DECODER = "unet", "encoder", "decoder"
_PROBES = {True: ((56, 88, 77), (104, 72, 154), (72, 136, 231)), False: ((59, 91, 77), (107, 75, 154), (77, 133, 231))}
"""Height and width of the latents, and tokens: what a program is found from, where the latents are multiples of 8 and not."""
_PROBE_BATCHES = (3, 5, 2)


class Lengths(NamedTuple):
    """What a call's sizes are made of: images or samples, sides of what goes in [latents or pixels], tokens."""

    batch: int
    height: int
    width: int
    tokens: int


class Taken(NamedTuple):
    """What one call took, beginning with nothing.

    ``events`` as those of a `Meter`, blocks counted from 1; ``peaks_bytes`` by stage; ``made`` the blocks that are there
    afterwards; ``workspaces`` the blocks that a kernel held. Without events wanted, the last three are empty.
    """

    peaks_bytes: dict[str, int]
    last_stage: str
    left_bytes: int
    events: list[tuple[int, int]]
    made: tuple[int, ...]
    workspaces: frozenset[int]


class Recorded(NamedTuple):
    """One run of the real module.

    ``events`` hold (block, bytes) not rounded, those of the n-th convolution (block, None) and (block, -None);
    """

    events: list[tuple[int, int]]
    convolutions: dict[int, tuple[tuple[int, ...], ...]]
    marks: list[tuple[int, str]]
    made: int
    shape: tuple[int, ...]


def probes(kind: str, batch: int, *, exact: bool, even: bool) -> list[Lengths]:
    """List the sizes that a program is found from.

    Parameters
    ----------
    kind : {'unet', 'encoder', 'decoder'}
    batch : int
        Of the call that a program is wanted for; one image runs other operations than several.
    exact : bool
        Only for that batch: its operations are repeated from image to image.
    even : bool
        Whether the latents are multiples of 8.

    Examples
    --------
    >>> probes("encoder", 4, exact=False, even=True)[0]
    Lengths(batch=3, height=448, width=704, tokens=77)
    """
    scale = 8 if kind == ENCODER else 1
    batches = (batch,) * 3 if exact or batch == 1 else _PROBE_BATCHES
    return [Lengths(b, h * scale, w * scale, t) for b, (h, w, t) in zip(batches, _PROBES[even], strict=True)]


def sides(side: int, kind: str) -> list[int]:
    """List the lengths that occur along one side, in a fixed order, after a 1 for what has no side.

    Examples
    --------
    >>> sides(75, "unet"), sides(64, "decoder"), sides(512, "encoder")
    ([1, 75, 38, 19, 10], [1, 64, 128, 256, 512], [1, 512, 513, 256, 257, 128, 129, 64])
    """
    found = [1]
    for level in range(LEVELS):
        found.append(side)
        if kind == ENCODER and level < LEVELS - 1:
            found.append(side + 1)  # padded at the far side before it is halved
        side = 2 * side if kind == DECODER else -(-side // 2)
    return found


class _Shape(NamedTuple):
    """The shape of a tensor (images, channels, height, width): ``batch`` 0 stands for the call's own."""

    batch: int
    channels: int
    level: int

    def at(self, lengths: Lengths, heights: Sequence[int], widths: Sequence[int]) -> tuple[int, ...]:
        return (self.batch or lengths.batch, self.channels, heights[self.level], widths[self.level])


@dataclass(frozen=True, slots=True)
class Program:
    """The events of a module's call, for any size. Found by `find`.

    Parameters
    ----------
    kind, dtype : str
    blocks, signs, amounts : array
        Of each event: the block from 1; 1 where it is allocated and -1 where it is freed; which amount it is.
    products : array
        A row per amount: factor [bytes], powers of batch, tokens and area, and which area of `sides`.
    convolutions : tuple
        Shapes of input, weight and output of each; their amounts come after those of ``products``.
    marks : tuple of (int, str)
        Before which event which stage begins.
    made : int
        The block that is there afterwards.
    shape : _Shape
        Of the tensor in it.
    """

    kind: str
    dtype: str
    blocks: Any
    signs: Any
    amounts: Any
    products: Any
    convolutions: tuple[tuple[_Shape, tuple[int, ...], _Shape], ...]
    marks: tuple[tuple[int, str], ...]
    made: int
    shape: _Shape

    def call(self, lengths: Lengths, convolution: Convolution | None, *, keep_events: bool) -> tuple[Taken, Any]:
        """What a call of these lengths takes, and the shape of what it gives."""
        heights, widths = sides(lengths.height, self.kind), sides(lengths.width, self.kind)
        areas = np.array(heights) * np.array(widths)
        factor, of_batch, of_tokens, of_area, level = self.products
        tensors = factor * lengths.batch**of_batch * lengths.tokens**of_tokens * areas[level] ** of_area
        tensors = -(-tensors // GRANULE_BYTES) * GRANULE_BYTES
        held = [
            convolution(self.dtype, image.at(lengths, heights, widths), weight, out.at(lengths, heights, widths))
            if convolution is not None
            else 0
            for image, weight, out in self.convolutions
        ]
        sizes = np.concatenate([tensors, np.array(held, dtype=np.int64)])[self.amounts]
        changes = sizes * self.signs
        live = np.cumsum(changes)
        peaks: dict[str, int] = {}
        ends = [*(first for first, _ in self.marks[1:]), len(live)]
        for (first, stage), end in zip(self.marks, ends, strict=True):
            before = int(live[first - 1]) if first else 0
            peaks[stage] = max(peaks.get(stage, 0), before, int(live[first:end].max(initial=0)))
        events: list[tuple[int, int]] = []
        made: tuple[int, ...] = ()
        workspaces: frozenset[int] = frozenset()
        if keep_events:
            there = sizes > 0
            new = np.zeros(int(self.blocks.max()) + 1, dtype=np.int64)
            born = self.blocks[there & (self.signs > 0)]
            new[born] = np.arange(1, len(born) + 1)
            events = list(zip(new[self.blocks[there]].tolist(), changes[there].tolist(), strict=True))
            made = (int(new[self.made]),)
            workspaces = frozenset(new[self.blocks[there & (self.amounts >= len(tensors))]].tolist())
        shape = self.shape.at(lengths, heights, widths)
        return Taken(peaks, self.marks[-1][1], int(live[-1]), events, made, workspaces), shape


def find(kind: str, dtype: str, runs: Sequence[tuple[Lengths, Recorded]]) -> Program | None:
    """Find a module's program from runs of it at several sizes.

    Returns
    -------
    Program or None
        None if the runs do not line up, or a size is no product of the lengths.
    """
    first = runs[0][1]
    orders = [[(block, size > 0) for block, size in run.events] for _, run in runs]
    if any(order != orders[0] for order in orders) or any(
        (run.marks, run.made, sorted(run.convolutions)) != (first.marks, first.made, sorted(first.convolutions))
        for _, run in runs
    ):
        return None
    amounts: dict[tuple[int, ...], int] = {}
    convolutions: dict[Any, int] = {}
    which: list[tuple[bool, int]] = []
    for position, (block, _) in enumerate(first.events):
        if block in first.convolutions:
            shapes = tuple(run.convolutions[block] for _, run in runs)
            which.append((True, convolutions.setdefault(shapes, len(convolutions))))
        else:
            sizes = tuple(abs(run.events[position][1]) for _, run in runs)
            which.append((False, amounts.setdefault(sizes, len(amounts))))
    lengths = [one for one, _ in runs]
    found = [_product(kind, lengths, sizes) for sizes in amounts]
    shapes_found = [
        (_shape(kind, lengths, [s[0] for s in many]), many[0][1], _shape(kind, lengths, [s[2] for s in many]))
        for many in convolutions
    ]
    shape = _shape(kind, lengths, [run.shape for _, run in runs])
    if None in found or shape is None or any(image is None or out is None for image, _, out in shapes_found):
        return None
    return Program(
        kind,
        dtype,
        np.array([block for block, _ in first.events]),
        np.array([1 if size > 0 else -1 for _, size in first.events]),
        np.array([number + len(amounts) * is_convolution for is_convolution, number in which]),
        np.array(found, dtype=np.int64).T,
        tuple(shapes_found),  # type: ignore[arg-type]
        tuple(first.marks),
        first.made,
        shape,
    )


def _product(kind: str, lengths: Sequence[Lengths], sizes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Factor, powers of batch, tokens and area, and which area: the first product that gives all sizes [bytes]."""
    areas = [[h * w for h, w in zip(sides(one.height, kind), sides(one.width, kind), strict=True)] for one in lengths]
    for of_batch, of_tokens, of_area in product((1, 0), (0, 1), (1, 2, 0)):
        for level in range(1, len(areas[0])) if of_area else (0,):
            units = [
                one.batch**of_batch * one.tokens**of_tokens * area[level] ** of_area
                for one, area in zip(lengths, areas, strict=True)
            ]
            factor, rest = divmod(sizes[0], units[0])
            if not rest and all(size == factor * unit for size, unit in zip(sizes, units, strict=True)):
                return factor, of_batch, of_tokens, of_area, level
    return None


def _shape(kind: str, lengths: Sequence[Lengths], shapes: Sequence[tuple[int, ...]]) -> _Shape | None:
    """The shape of a tensor that was this one at these lengths."""
    channels = {shape[1] for shape in shapes}
    along = [list(zip(sides(one.height, kind), sides(one.width, kind), strict=True)) for one in lengths]
    levels = [
        level
        for level in range(len(along[0]))
        if all(pair[level] == shape[2:] for pair, shape in zip(along, shapes, strict=True))
    ]
    batches = {shape[0] for shape in shapes}
    if all(shape[0] == one.batch for shape, one in zip(shapes, lengths, strict=True)):
        batches = {0}
    if len(channels) != 1 or len(batches) != 1 or not levels:
        return None
    return _Shape(batches.pop(), channels.pop(), levels[0])
