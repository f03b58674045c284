"""What a kernel is chosen by: an operation, and the shapes and dtype of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple


class Shapes(NamedTuple):
    """An aten operation, the dtype of its first tensor, the shapes of its tensors, and that of its first result."""

    operation: str
    dtype: str
    inputs: tuple[tuple[int, ...], ...]
    out: tuple[int, ...]


def shapes_of(func: Any, args: tuple[Any, ...], out: Any) -> Shapes:
    """Take them from a call of an operation; where it has no tensor, the dtype is that of its result."""
    tensors, results = list(_tensors(args)), list(_tensors((out,)))
    first = (tensors or results or [None])[0]
    return Shapes(
        func._schema.name.removeprefix("aten::"),
        "" if first is None else str(first.dtype).removeprefix("torch."),
        tuple(tuple(t.shape) for t in tensors),
        tuple(results[0].shape) if results else (),
    )


def _tensors(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _tensors(value)
        elif hasattr(value, "untyped_storage"):
            yield value
