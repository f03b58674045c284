"""Read a pickle from anyone: a machine for those pickle instructions that make plain values, and for no others.

Python's own unpickler calls what a file names, and even with all names refused it asks for as much memory as a number in
the file says. This one knows dictionaries, lists, tuples, text, bytes, numbers, booleans and None; any other instruction
ends the reading before anything came of it. It reads in pieces, so that a file of any size, compressed or not, never lies
in memory as a whole, and lets the caller put something smaller in the place of a table or a list once it is complete.

`sdfit.predict.loading` reads artifacts the same way, but those are small trees in which nothing may stand twice; a snapshot is
large, and shares its frames among all its events.

What it does not know: pickles of protocols 0 and 1, which are text; PyTorch has never written them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, BinaryIO

from sdfit.errors import SnapshotError

PIECE_BYTES = 1 << 20
LONGEST_TEXT_BYTES = 16 << 20
MOST_ON_THE_STACK = 1 << 16
"""Lists are pickled a thousand items at a time, and snapshots are four tables deep."""
MOST_MARKS = 1000
MOST_OBJECTS = 12_000_000
"""Tables, lists and texts in one file; two for each event."""

_U8, _U16, _I32, _U32, _U64 = (struct.Struct(kind) for kind in ("<B", "<H", "<i", "<I", "<Q"))
_F64 = struct.Struct(">d")
_STOP, _LONG_BINGET = 0x2E, 0x6A

_NAMES = {
    b"c"[0]: "GLOBAL", b"R"[0]: "REDUCE", b"b"[0]: "BUILD", b"i"[0]: "INST", b"o"[0]: "OBJ", 0x81: "NEWOBJ",
    0x92: "NEWOBJ_EX", 0x93: "STACK_GLOBAL", b"P"[0]: "PERSID", b"Q"[0]: "BINPERSID", 0x82: "EXT1", 0x83: "EXT2",
    0x84: "EXT4", 0x96: "BYTEARRAY8", 0x97: "NEXT_BUFFER", 0x98: "READONLY_BUFFER",
}  # fmt: skip
"""Instructions that import, call, or reach outside, by the names of `pickletools`, for the message."""


class Table(dict[Any, Any]):
    """A dictionary under way; ``at`` is its place in the memo, None where it has none."""

    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at: int | None = None


class Row(list[Any]):
    """A list under way; ``at`` as in `Table`."""

    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at: int | None = None


def _same(value: Any) -> Any:
    return value


def load(stream: BinaryIO, *, table: Callable[[Table], Any] = _same, row: Callable[[Row], Any] = _same) -> Any:
    """Read one pickle of plain values.

    Parameters
    ----------
    stream : binary file
        Open for reading.
    table : callable
        ``table(values)`` is called with each dictionary of two items or more as it is filled; what it returns takes its
        place, everywhere in the file.
    row : callable
        The same for each list that gets two items or more.

    Returns
    -------
    object
        Dictionaries are `Table`, lists are `Row`; text, bytes, numbers, booleans, None and tuples are Python's.

    Raises
    ------
    SnapshotError
        With what is wrong, as the end of a sentence that begins with "it": an instruction that makes anything else, a torn
        end, text or tables beyond any measure.

    Examples
    --------
    >>> import io, pickle
    >>> load(io.BytesIO(pickle.dumps({"sizes": [512, 1 << 40], "on": True})))
    {'sizes': [512, 1099511627776], 'on': True}
    >>> load(io.BytesIO(pickle.dumps(print)))
    Traceback (most recent call last):
    sdfit.errors.SnapshotError: it holds the pickle instruction STACK_GLOBAL, and plain values have none such
    """
    return _Machine(stream, table, row).run()


class _Machine:
    def __init__(self, stream: BinaryIO, table: Callable[[Table], Any], row: Callable[[Row], Any]) -> None:
        self.stream, self.table, self.row = stream, table, row
        self.buffer, self.at = b"", 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.made = 0

    def take(self, count: int) -> bytes:
        """The next bytes; no more memory than the file has bytes is ever asked for."""
        if count > LONGEST_TEXT_BYTES:
            raise SnapshotError(f"it holds a text of {count} bytes, and a snapshot has none such")
        while len(self.buffer) - self.at < count:
            self.more()
        piece = self.buffer[self.at : self.at + count]
        self.at += count
        return piece

    def skip(self, count: int) -> None:
        """Pass over some bytes."""
        self.take(count)

    def more(self) -> None:
        """Read on."""
        piece = self.stream.read(PIECE_BYTES)
        if not piece:
            raise SnapshotError("it is torn: it ends in the middle")
        self.buffer, self.at = self.buffer[self.at :] + piece, 0

    def run(self) -> Any:
        try:
            return self._run()
        except (IndexError, KeyError) as error:  # an empty stack, an unknown place in the memo
            raise SnapshotError("it is damaged: its instructions do not fit together") from error

    def _run(self) -> Any:
        stack, memo, actions = self.stack, self.memo, _ACTIONS
        while True:
            if self.at == len(self.buffer):
                self.more()
            code = self.buffer[self.at]
            self.at += 1
            if code == _LONG_BINGET:  # nine of ten instructions: the frames of the stacks
                stack.append(memo[self.number(_U32)])
            elif code in actions:
                actions[code](self)
            elif code == _STOP:
                break
            else:
                raise SnapshotError(
                    f"it holds the pickle instruction {_NAMES[code]}, and plain values have none such"
                    if code in _NAMES
                    else "it is no pickle, or a damaged one"
                )
            if len(stack) > MOST_ON_THE_STACK:
                raise SnapshotError("it is nested more deeply than any snapshot")
        if len(stack) != 1 or self.marks:
            raise SnapshotError("it is damaged: it stops in the middle")
        return stack[0]

    def number(self, of: struct.Struct) -> int:
        """The next number of the file."""
        while len(self.buffer) - self.at < of.size:
            self.more()
        found: int = of.unpack_from(self.buffer, self.at)[0]
        self.at += of.size
        return found

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def container(self, value: Any) -> None:
        """Put a table or a list on the stack."""
        self._count()
        self.stack.append(value)

    def mark(self) -> None:
        """Remember where the items of what comes next begin."""
        self._count()
        self.marks.append(len(self.stack))
        if len(self.marks) > MOST_MARKS:
            raise SnapshotError("it is nested more deeply than any snapshot")

    def last(self, count: int) -> list[Any]:
        """Take the last values off the stack."""
        values = self.stack[-count:]
        if len(values) < count:
            raise IndexError
        del self.stack[-count:]
        return values

    def _count(self) -> None:
        self.made += 1
        if self.made > MOST_OBJECTS:
            raise SnapshotError(
                f"it holds more than {MOST_OBJECTS:,} tables; record one run alone, or fewer events with max_entries"
            )

    def text(self, content: bytes) -> None:
        """Put a text on the stack."""
        self._count()
        try:
            self.stack.append(content.decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError as error:
            raise SnapshotError("it is damaged: it holds text that is none") from error

    def bytes(self, content: bytes) -> None:
        """Put bytes on the stack."""
        self._count()
        self.stack.append(content)

    def tuple(self, values: list[Any]) -> None:
        """Put a tuple on the stack."""
        self._count()
        self.stack.append(tuple(values))

    def since_mark(self) -> list[Any]:
        """Take the items since the last mark off the stack."""
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def remember(self, at: int) -> None:
        """Keep the top of the stack in the memo."""
        value = self.stack[-1]
        if len(self.memo) > self.made:
            raise SnapshotError("it is damaged: it remembers more than it has made")
        self.memo[at] = value
        if isinstance(value, Table | Row):
            value.at = at

    def _replaced(self, value: Any, new: Any) -> None:
        if new is not value:
            self.stack[-1] = new
            if value.at is not None:
                self.memo[value.at] = new

    def append(self, values: list[Any]) -> None:
        """Put items into the list on top of the stack."""
        target = self.stack[-1]
        if type(target) is not Row:
            raise SnapshotError("it is damaged: it puts an item into what is no list")
        target.extend(values)
        if len(values) > 1:
            self._replaced(target, self.row(target))

    def set_items(self, values: list[Any]) -> None:
        """Put keys and values, in turn, into the table on top of the stack."""
        target = self.stack[-1]
        if type(target) is not Table or len(values) % 2:
            raise SnapshotError("it is damaged: it puts an item into what is no table")
        for i in range(0, len(values), 2):
            if type(values[i]) is not str and type(values[i]) is not int:
                raise SnapshotError("it has a table whose keys are no text, and a snapshot has none such")
            target[values[i]] = values[i + 1]
        if len(values) > 2:
            self._replaced(target, self.table(target))


_ACTIONS: dict[int, Callable[[_Machine], None]] = {
    0x28: lambda m: m.mark(),
    0x29: lambda m: m.push(()),  # EMPTY_TUPLE
    0x42: lambda m: m.bytes(m.take(m.number(_U32))),  # BINBYTES
    0x43: lambda m: m.bytes(m.take(m.number(_U8))),  # SHORT_BINBYTES
    0x47: lambda m: m.push(_F64.unpack(m.take(8))[0]),  # BINFLOAT
    0x4A: lambda m: m.push(m.number(_I32)),  # BININT
    0x4B: lambda m: m.push(m.number(_U8)),  # BININT1
    0x4D: lambda m: m.push(m.number(_U16)),  # BININT2
    0x4E: lambda m: m.push(None),  # NONE
    0x58: lambda m: m.text(m.take(m.number(_U32))),  # BINUNICODE
    0x5D: lambda m: m.container(Row()),  # EMPTY_LIST
    0x61: lambda m: m.append(m.last(1)),  # APPEND
    0x65: lambda m: m.append(m.since_mark()),  # APPENDS
    0x68: lambda m: m.push(m.memo[m.number(_U8)]),  # BINGET
    0x71: lambda m: m.remember(m.number(_U8)),  # BINPUT
    0x72: lambda m: m.remember(m.number(_U32)),  # LONG_BINPUT
    0x73: lambda m: m.set_items(m.last(2)),  # SETITEM
    0x74: lambda m: m.tuple(m.since_mark()),  # TUPLE
    0x75: lambda m: m.set_items(m.since_mark()),  # SETITEMS
    0x7D: lambda m: m.container(Table()),  # EMPTY_DICT
    0x80: lambda m: m.skip(1),  # PROTO
    0x85: lambda m: m.tuple(m.last(1)),  # TUPLE1
    0x86: lambda m: m.tuple(m.last(2)),  # TUPLE2
    0x87: lambda m: m.tuple(m.last(3)),  # TUPLE3
    0x88: lambda m: m.push(True),  # NEWTRUE
    0x89: lambda m: m.push(False),  # NEWFALSE
    0x8A: lambda m: m.push(int.from_bytes(m.take(m.number(_U8)), "little", signed=True)),  # LONG1
    0x8C: lambda m: m.text(m.take(m.number(_U8))),  # SHORT_BINUNICODE
    0x8D: lambda m: m.text(m.take(m.number(_U64))),  # BINUNICODE8
    0x94: lambda m: m.remember(len(m.memo)),  # MEMOIZE
    0x95: lambda m: m.skip(8),  # FRAME: a hint that this reader does not need
}
"""What is let through, by the opcodes of `pickletools`."""
