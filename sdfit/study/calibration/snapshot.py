"""What PyTorch's allocator recorded of itself: a memory snapshot, read from a file of anyone.

`torch.cuda.memory._record_memory_history` makes the allocator note what it does, `torch.cuda.memory._dump_snapshot` writes
it to a pickle: every allocation, free and segment in order, with the Python frames that asked for it, and the segments with
their blocks as they stand at the end. `read` takes such a file, plain or compressed (.gz, .xz), one that `sdfit sweep
--history` wrote or anyone else's, and builds nothing but numbers and text from it (`sdfit.study.calibration.pickles`).

The format is that of PyTorch 2.1 to 2.13 (torch/cuda/memory.py, `_snapshot`).
"""

from __future__ import annotations

import gzip
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from sdfit.backends.history import ABOUT
from sdfit.equation.weights import rounded
from sdfit.errors import SnapshotError, listed
from sdfit.files import open_regular
from sdfit.study.calibration.pickles import Row, Table, load

HOW = "record one with torch.cuda.memory._record_memory_history() and _dump_snapshot(), or: sdfit sweep --history"
LIVE = ("active_allocated", "active_awaiting_free", "active_pending_free")


class Frame(NamedTuple):
    """A line of code that was running."""

    name: str
    filename: str
    line: int


Stack = tuple[Frame, ...]
"""The innermost frame first, as PyTorch has them."""


class Event(NamedTuple):
    """One thing that the allocator did; ``size_bytes`` is as asked for (alloc, frees) or as taken (segments)."""

    action: str
    address: int
    size_bytes: int
    stream: int
    stack: Stack


class Held(NamedTuple):
    """A block that is handed out: ``size_bytes`` is what the allocator counts, a remainder that it did not split included."""

    address: int
    size_bytes: int
    requested_bytes: int
    stack: Stack


class Segment(NamedTuple):
    """Memory taken from the driver."""

    address: int
    size_bytes: int
    expandable: bool = False


class State(NamedTuple):
    """The allocator at one moment: its segments and the blocks handed out, by rising address."""

    segments: tuple[Segment, ...]
    held: tuple[Held, ...]

    @property
    def reserved_bytes(self) -> int:
        """What `memory_reserved` reads [bytes]."""
        return sum(segment.size_bytes for segment in self.segments)

    @property
    def allocated_bytes(self) -> int:
        """What `memory_allocated` reads [bytes]."""
        return sum(block.size_bytes for block in self.held)


@dataclass(frozen=True)
class Snapshot:
    """What one device's allocator did, and how it stood at the end.

    Attributes
    ----------
    events : tuple of Event
        In order. The beginning is missing where the history was limited to so many entries.
    end : State
    device : int
    about : dict
        What `sdfit sweep --history` wrote beside it (the workload, the environment); empty in a file of others.
    """

    events: tuple[Event, ...]
    end: State
    device: int = 0
    about: Mapping[str, Any] | None = None

    @cached_property
    def start(self) -> State:
        """The allocator before the first event, worked out backwards from the end.

        Raises
        ------
        SnapshotError
            If the events do not lead to the end.
        """
        held = {block.address: block for block in self.end.held}
        segments = {segment.address: segment for segment in self.end.segments}
        expandable = any(segment.expandable for segment in self.end.segments)
        try:
            for event in reversed(self.events):
                if event.action == "alloc":
                    del held[event.address]
                elif event.action == "free_completed":
                    size = event.size_bytes
                    held[event.address] = Held(event.address, rounded(size), size, ())
                elif event.action == "segment_alloc" and not expandable:
                    del segments[event.address]
                elif event.action == "segment_free" and not expandable:
                    segments[event.address] = Segment(event.address, event.size_bytes)
        except KeyError as error:
            raise SnapshotError(
                "the history does not lead to the segments at its end; record it whole, with all actions"
            ) from error
        return State(
            tuple(sorted(segments.values())) if not expandable else (), tuple(sorted(held.values(), key=lambda b: b[0]))
        )


_Blocks = list[Any]


def read(path: Path | str, *, device: int | None = None) -> Snapshot:
    """Read a memory snapshot; nothing in the file is executed.

    Parameters
    ----------
    path : Path or str
        A pickle as PyTorch writes it, or one compressed (.gz, .xz).
    device : int, optional
        Which card of the file; None: the one with the most events.

    Raises
    ------
    SnapshotError
        In one sentence, if it cannot be read, is torn, hostile or something else, or holds no history.
    """
    path = Path(path)
    kept = _Kept()
    try:
        with _opened(path) as stream:
            content = load(stream, table=kept.table, row=kept.row)
        return _snapshot(content, device)
    except SnapshotError as error:
        reason = str(error)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile):
        reason = "it is torn or damaged: it cannot be decompressed"
    except OSError as error:
        reason = error.strerror or str(error)
    raise SnapshotError(f"cannot read the memory snapshot '{path}': {reason}; {HOW}", path=str(path))


def _opened(path: Path) -> BinaryIO:
    file = os.fdopen(open_regular(path, os.O_RDONLY), "rb")
    head = file.read(6)
    file.seek(0)
    if head.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.open(file))
    if head.startswith(b"\xfd7zXZ\x00"):
        return cast(BinaryIO, lzma.open(file))
    return file


class _Kept:
    """Makes the many small tables of a snapshot into tuples while it is read, equal stacks into one."""

    def __init__(self) -> None:
        self._frames: dict[Frame, Frame] = {}
        self._stacks: dict[Stack, Stack] = {}

    def table(self, values: Table) -> Any:
        if "action" in values:
            return self._event(values)
        if "filename" in values and "name" in values:
            frame = Frame(_text(values, "name"), _text(values, "filename"), _whole(values, "line", 0))
            return self._frames.setdefault(frame, frame)
        return values

    def row(self, values: Row) -> Any:
        if type(values[0]) is Frame:
            return self.stack(values)
        return values

    def stack(self, values: Any) -> Stack:
        if type(values) is tuple:
            return values
        frames = tuple(v for v in values or () if type(v) is Frame)
        return self._stacks.setdefault(frames, frames)

    def _event(self, values: Table) -> Event:
        address = _whole(values, "addr", 0) if "addr" in values else _whole(values, "device_free", 0)
        return Event(
            _text(values, "action"),
            address,
            _whole(values, "size", 0),
            _whole(values, "stream", 0),
            self.stack(values.get("frames")),
        )


def _text(values: Mapping[Any, Any], key: str) -> str:
    found = values.get(key)
    if type(found) is not str:
        raise SnapshotError(f"it has an entry whose '{key}' is no text")
    return found


def _whole(values: Mapping[Any, Any], key: str, default: int | None = None) -> int:
    found = values.get(key, default)
    if type(found) is not int:
        raise SnapshotError(f"it has an entry whose '{key}' is no whole number")
    return found


def _rows(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise SnapshotError(f"it is a pickle, but no memory snapshot: it has no list of {what}")
    return value


def _snapshot(content: Any, device: int | None) -> Snapshot:
    if not isinstance(content, dict):
        raise SnapshotError("it is a pickle, but no memory snapshot")
    traces = [_rows(trace, "events") for trace in _rows(content.get("device_traces"), "device_traces")]
    segments = _rows(content.get("segments"), "segments")
    if any(type(event) is not Event for trace in traces for event in trace):
        raise SnapshotError("it has an event without an action")
    filled = [i for i, trace in enumerate(traces) if trace]
    if not filled:
        raise SnapshotError("it holds no history; recording was not on")
    if device is None:
        device = max(filled, key=lambda i: len(traces[i]))
    elif device not in filled:
        raise SnapshotError(f"it holds no history of device {device}; there is: {listed(filled)}")
    about = content.get(ABOUT)
    return Snapshot(tuple(traces[device]), _state(segments, device), device, about if isinstance(about, dict) else {})


def _state(segments: list[Any], device: int) -> State:
    found, held = [], []
    for segment in segments:
        if not isinstance(segment, dict):
            raise SnapshotError("it has a segment that is no table")
        if _whole(segment, "device", device) != device:
            continue
        start = _whole(segment, "address")
        found.append(Segment(start, _whole(segment, "total_size"), bool(segment.get("is_expandable"))))
        at = start
        for block in _rows(segment.get("blocks"), "blocks"):
            if not isinstance(block, dict):
                raise SnapshotError("it has a block that is no table")
            size = _whole(block, "size")
            if block.get("state") in LIVE:
                stack = block.get("frames")
                held.append(
                    Held(
                        _whole(block, "address", at),
                        size,
                        _whole(block, "requested_size", size),
                        stack if type(stack) is tuple else tuple(f for f in stack or () if type(f) is Frame),
                    )
                )
            at += size
    return State(tuple(sorted(found)), tuple(sorted(held, key=lambda b: b.address)))


def sizes_of(blocks: tuple[Held, ...]) -> Counter[int]:
    """How many blocks of each requested size there are."""
    return Counter(block.requested_bytes for block in blocks)
