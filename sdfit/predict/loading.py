"""Read an artifact without executing anything in it.

The file is a pickle, as joblib writes it, of plain values. It is read by an interpreter of its own that knows only the
instructions which make those, so there is nothing in it that could import, call, share a table, or ask for more memory
than the file has. What it makes is checked by `sdfit.predict.schema`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdfit.errors import ArtifactError
from sdfit.files import read_bytes
from sdfit.predict import schema
from sdfit.predict.artifact import LARGEST_BYTES, Artifact

LONGEST_INTEGER_BYTES = 8
_READ_DOUBLE = struct.Struct(">d").unpack_from


def load_artifact(path: Path | str) -> Artifact:
    """Read an artifact without executing anything in it.

    Raises
    ------
    ArtifactError
        If the file cannot be read, is truncated, foreign or hostile, is of another format, or has a field that is
        missing or of the wrong kind.
    """
    path = Path(path)
    try:
        value = read_plain(read_bytes(path, LARGEST_BYTES))
        schema.check(value)
        return Artifact(**value)
    except ArtifactError as error:
        reason = str(error)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero in it
        reason = getattr(error, "strerror", None) or str(error)
    raise ArtifactError(f"cannot load {_shown(path)}: {reason}; make it again: sdfit fit", path=str(path))


def _shown(path: Path) -> str:
    text = str(path)
    return f"'{text}'" if text.isprintable() else ascii(text)


def read_plain(content: bytes) -> Any:
    """Make the plain value that a pickle describes: dict with text for keys, list, str, int, float, bool, None.

    Raises
    ------
    ArtifactError
        At the first instruction that is none of those which make plain values, or is damaged.
    """
    try:
        return _Reader(content).value()
    except (IndexError, TypeError, UnicodeDecodeError, struct.error):
        raise ArtifactError("it is no sdfit artifact, or a damaged one") from None


class _Reader:
    """What the instructions of a pickle work on."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0
        self.stack: list[Any] = []  # what waits to go into the innermost list or table under way
        self.outer: list[list[Any]] = []  # the same of those around it
        self.memo: list[Any] = []

    def value(self) -> Any:
        """Follow the instructions to their end."""
        content = self.content
        while (code := content[self.at]) != _STOP:
            self.at += 1
            step = _STEPS.get(code)
            if step is None:
                raise _foreign(code)
            step(self)
        self.at += 1
        if self.outer or len(self.stack) != 1 or self.at != len(self.content):
            raise IndexError
        return self.stack[0]

    def take(self, count: int) -> bytes:
        start, self.at = self.at, self.at + count
        if self.at > len(self.content):
            raise IndexError
        return self.content[start : self.at]

    def size(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_byte(self) -> None:
        self.stack.append(self.content[self.at])
        self.at += 1

    def push_double(self) -> None:
        self.stack.append(_READ_DOUBLE(self.content, self.at)[0])
        self.at += 8

    def push_integer(self, count: int) -> None:
        if count > LONGEST_INTEGER_BYTES:
            raise ArtifactError(
                f"it holds an integer of {count} bytes; an artifact has {LONGEST_INTEGER_BYTES} at most"
            )
        self.stack.append(int.from_bytes(self.take(count), "little", signed=True))

    def remember(self) -> None:
        self.memo.append(self.stack[-1])

    def recall(self, place: int) -> None:
        found = self.memo[place]
        if type(found) is not str:
            raise ArtifactError("it holds a table twice; an artifact holds plain values only")
        self.stack.append(found)

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def marked(self) -> list[Any]:
        """What came since the mark."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    def last(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        """Put names and values, which take turns, into a table."""
        table, names = self.stack[-1], items[::2]
        if type(table) is not dict or len(items) % 2 or not all(type(name) is str for name in names):
            raise TypeError
        table.update(zip(names, items[1::2], strict=True))


_STOP = ord(".")
_STEPS: dict[int, Callable[[_Reader], Any]] = {
    0x80: lambda r: r.take(1),  # PROTO and its version
    0x95: lambda r: r.take(8),  # FRAME and its length
    ord("G"): _Reader.push_double,
    ord("K"): _Reader.push_byte,
    ord("M"): lambda r: r.push(r.size(2)),
    ord("J"): lambda r: r.push_integer(4),
    0x8A: lambda r: r.push_integer(r.size(1)),
    ord("N"): lambda r: r.push(None),
    0x88: lambda r: r.push(True),
    0x89: lambda r: r.push(False),
    0x8C: lambda r: r.push(r.take(r.size(1)).decode()),
    ord("X"): lambda r: r.push(r.take(r.size(4)).decode()),
    ord("]"): lambda r: r.push([]),
    ord("}"): lambda r: r.push({}),
    0x94: _Reader.remember,
    ord("h"): lambda r: r.recall(r.size(1)),
    ord("j"): lambda r: r.recall(r.size(4)),
    ord("("): _Reader.mark,
    ord("a"): lambda r: r.extend(r.last(1)),
    ord("e"): lambda r: r.extend(r.marked()),
    ord("s"): lambda r: r.update(r.last(2)),
    ord("u"): lambda r: r.update(r.marked()),
}
"""The pickle instructions that make plain values, as joblib writes them; no others are known here."""


def _foreign(code: int) -> ArtifactError:
    import pickletools  # for the message only

    known = next((one.name for one in pickletools.opcodes if one.code == chr(code)), None)
    what = f"the pickle instruction {known}" if known else "what is no pickle"
    return ArtifactError(f"it holds {what}; an artifact holds plain values only")
