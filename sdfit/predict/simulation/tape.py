"""Tensors that have a size and nothing else: what is born when it is made, and dies when the last name for it goes.

Code written with them reads like the PyTorch code that it stands for, and takes and gives back memory in the same order,
because Python lets go of values in the same order in both. Only what takes memory of its own is counted: a view shares the
block of what it looks at, and a tensor in host memory has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from sdfit.equation.weights import rounded
from sdfit.predict.simulation.meter import Meter

Number = int | float


class Block:
    """A block on the card, given back when nobody holds it any more."""

    __slots__ = ("_meter", "_number", "_size_bytes")

    def __init__(self, meter: Meter, number: int, size_bytes: int) -> None:
        self._meter, self._number, self._size_bytes = meter, number, size_bytes

    def __del__(self) -> None:
        self._meter.free(self._number, self._size_bytes)


class Tensor:
    """A tensor by its shape and the bytes of an element; without a block it is in host memory.

    Arithmetic gives a new tensor, of the wider shape and, among tensors that have one, the larger element, as PyTorch does.
    """

    __slots__ = ("_block", "_meter", "each_bytes", "shape")

    def __init__(self, meter: Meter, shape: tuple[int, ...], each_bytes: int, block: Block | None) -> None:
        self._meter, self.shape, self.each_bytes, self._block = meter, shape, each_bytes, block

    def new(self, shape: tuple[int, ...], each_bytes: int | None = None) -> Tensor:
        """Another tensor beside this one."""
        each = self.each_bytes if each_bytes is None else each_bytes
        return self if self._block is None else empty(self._meter, shape, each)

    def view(self, *shape: int) -> Tensor:
        """Look at the same block in another shape, or at a piece of it."""
        return Tensor(self._meter, shape, self.each_bytes, self._block)

    def to(self, each_bytes: int) -> Tensor:
        """The tensor in another precision: itself, if it is the same one."""
        return self if each_bytes == self.each_bytes else self.new(self.shape, each_bytes)

    def like(self) -> Tensor:
        """What an operation on each element gives."""
        return self.new(self.shape)

    def _with(self, other: Tensor | Number) -> Tensor:
        if not isinstance(other, Tensor):
            return self.like()
        on_card = other if self._block is None else self
        if bool(self.shape) == bool(other.shape):  # a tensor of no dimensions leaves the other's precision alone
            each = max(self.each_bytes, other.each_bytes)
        else:
            each = (self if self.shape else other).each_bytes
        return on_card.new(self.shape if prod(self.shape) >= prod(other.shape) else other.shape, each)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _with

    def __pow__(self, power: float) -> Tensor:
        return self.like()


def empty(meter: Meter, shape: tuple[int, ...], each_bytes: int) -> Tensor:
    """A new tensor on the card."""
    size = rounded(prod(shape) * each_bytes)
    return Tensor(meter, shape, each_bytes, Block(meter, meter.allocate(size), size))


def given(meter: Meter, shape: tuple[int, ...], each_bytes: int, number: int) -> Tensor:
    """The tensor in a block that is counted already."""
    return Tensor(meter, shape, each_bytes, Block(meter, number, rounded(prod(shape) * each_bytes)))


def concatenated(tensors: Sequence[Tensor], along: int) -> Tensor:
    """`torch.cat`."""
    shape = list(tensors[0].shape)
    shape[along] = sum(tensor.shape[along] for tensor in tensors)
    return tensors[0].new(tuple(shape))
