"""Read a pickle from anyone: a machine for those pickle instructions that make plain values, and for no others.

Python's own unpickler calls what a file names, and even with all names refused it asks for as much memory as a number in
the file says. This one knows dictionaries, lists, tuples, text, bytes, numbers, booleans and None; any other instruction
ends the reading before anything came of it. It reads in pieces, so that a file of any size, compressed or not, never lies
in memory as a whole, and lets the caller put something smaller in the place of a table or a list once it is complete.

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
MOST_OBJECTS = 12_000_000
"""Tables, lists and texts in one file; two for each event."""

_U16, _I32, _U32, _U64 = struct.Struct("<H"), struct.Struct("<i"), struct.Struct("<I"), struct.Struct("<Q")
_F64 = struct.Struct(">d")
_MARK = object()

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

    def more(self) -> None:
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
        stack, memo, take = self.stack, self.memo, self.take
        push = stack.append
        while True:
            if self.at == len(self.buffer):
                self.more()
            code = self.buffer[self.at]
            self.at += 1
            if code == 0x68:  # BINGET
                push(memo[take(1)[0]])
            elif code == 0x6A:  # LONG_BINGET
                push(memo[_U32.unpack(take(4))[0]])
            elif code == 0x4B:  # BININT1
                push(take(1)[0])
            elif code == 0x8A:  # LONG1
                push(int.from_bytes(take(take(1)[0]), "little", signed=True))
            elif code == 0x4A:  # BININT
                push(_I32.unpack(take(4))[0])
            elif code == 0x4D:  # BININT2
                push(_U16.unpack(take(2))[0])
            elif code == 0x94:  # MEMOIZE
                self._remember(len(memo))
            elif code == 0x75:  # SETITEMS
                self._set_items(self._since_mark())
            elif code == 0x65:  # APPENDS
                self._append(self._since_mark())
            elif code == 0x28:  # MARK
                self.marks.append(len(stack))
                self._count()
            elif code == 0x7D:  # EMPTY_DICT
                push(Table())
                self._count()
            elif code == 0x5D:  # EMPTY_LIST
                push(Row())
                self._count()
            elif code == 0x8C:  # SHORT_BINUNICODE
                self._text(take(take(1)[0]))
            elif code == 0x58:  # BINUNICODE
                self._text(take(_U32.unpack(take(4))[0]))
            elif code == 0x4E:  # NONE
                push(None)
            elif code == 0x88:  # NEWTRUE
                push(True)
            elif code == 0x89:  # NEWFALSE
                push(False)
            elif code == 0x47:  # BINFLOAT
                push(_F64.unpack(take(8))[0])
            elif code == 0x95:  # FRAME: a hint that this reader does not need
                take(8)
            elif code == 0x61:  # APPEND
                self._append([stack.pop()])
            elif code == 0x73:  # SETITEM
                value, key = stack.pop(), stack.pop()
                self._set_items([key, value])
            elif code == 0x71:  # BINPUT
                self._remember(take(1)[0])
            elif code == 0x72:  # LONG_BINPUT
                self._remember(_U32.unpack(take(4))[0])
            elif code in (0x85, 0x86, 0x87):  # TUPLE1, TUPLE2, TUPLE3
                self._tuple([stack.pop() for _ in range(code - 0x84)][::-1])
            elif code == 0x74:  # TUPLE
                self._tuple(self._since_mark())
            elif code == 0x29:  # EMPTY_TUPLE
                push(())
            elif code == 0x8D:  # BINUNICODE8
                self._text(take(_U64.unpack(take(8))[0]))
            elif code == 0x43:  # SHORT_BINBYTES
                self._bytes(take(take(1)[0]))
            elif code == 0x42:  # BINBYTES
                self._bytes(take(_U32.unpack(take(4))[0]))
            elif code == 0x80:  # PROTO
                take(1)
            elif code == 0x2E:  # STOP
                if len(stack) != 1 or self.marks:
                    raise SnapshotError("it is damaged: it stops in the middle")
                return stack[0]
            else:
                name = _NAMES.get(code)
                raise SnapshotError(
                    f"it holds the pickle instruction {name}, and plain values have none such"
                    if name
                    else "it is no pickle, or a damaged one"
                )
            if len(stack) > MOST_ON_THE_STACK:
                raise SnapshotError("it is nested more deeply than any snapshot")

    def _count(self) -> None:
        self.made += 1
        if self.made > MOST_OBJECTS:
            raise SnapshotError(
                f"it holds more than {MOST_OBJECTS:,} tables; record one run alone, or fewer events with max_entries"
            )

    def _text(self, content: bytes) -> None:
        self._count()
        try:
            self.stack.append(content.decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError as error:
            raise SnapshotError("it is damaged: it holds text that is none") from error

    def _bytes(self, content: bytes) -> None:
        self._count()
        self.stack.append(content)

    def _tuple(self, values: list[Any]) -> None:
        self._count()
        self.stack.append(tuple(values))

    def _since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def _remember(self, at: int) -> None:
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

    def _append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not Row:
            raise SnapshotError("it is damaged: it puts an item into what is no list")
        target.extend(values)
        if len(values) > 1:
            self._replaced(target, self.row(target))

    def _set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not Table or len(values) % 2:
            raise SnapshotError("it is damaged: it puts an item into what is no table")
        for i in range(0, len(values), 2):
            if type(values[i]) is not str and type(values[i]) is not int:
                raise SnapshotError("it has a table whose keys are no text, and a snapshot has none such")
            target[values[i]] = values[i + 1]
        if len(values) > 2:
            self._replaced(target, self.table(target))
