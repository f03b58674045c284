"""Reading memory snapshots of anyone: what is in them comes out, and what should not be in them does nothing."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import Recorder, write

from sdfit.errors import SnapshotError
from sdfit.study.calibration.pickles import MOST_ON_THE_STACK, load
from sdfit.study.calibration.snapshot import Frame, read
from sdfit.units import MIB

MARK = "it-ran"
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner) | st.tuples(inner, inner, inner, inner)
    ),
)


@given(PLAIN, st.integers(2, 5))
def test_plain_values_come_out_as_they_went_in(value: Any, protocol: int) -> None:
    """What Python's own unpickler makes of it, in each protocol that PyTorch may have written."""
    try:
        content = pickle.dumps(value, protocol)
        read_back = load(io.BytesIO(content))
    except SnapshotError as error:  # protocol 2 writes bytes as a call, and long integers as text
        assert "instruction" in str(error) or "no pickle" in str(error)
        assert protocol == 2 or any(abs(n) >= 2**2032 for n in _numbers(value))
    else:
        assert read_back == value


def _numbers(value: Any) -> list[int]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [n for part in value for n in _numbers(part)]
    return [value] if type(value) is int else []


def recorded() -> dict[str, Any]:
    """A small history: two blocks, of which one is there from before."""
    card = Recorder()
    card.on = False
    card.alloc(3 * MIB)
    card.on = True
    frames = [{"name": "forward", "filename": "/x/diffusers/models/resnet.py", "line": 3}]
    freed = card.alloc(1000, frames)
    card.alloc(5 * MIB, frames)
    card.free(freed)
    return card.snapshot()


def test_events_segments_and_frames_are_read(tmp_path: Path) -> None:
    """Amounts as recorded, and the state before the first event worked out from the one at the end."""
    found = read(write(tmp_path / "s.pickle", recorded()))
    assert [(e.action, e.size_bytes) for e in found.events] == [
        ("segment_alloc", 2 * MIB), ("alloc", 1000), ("alloc", 5 * MIB), ("free_requested", 1000), ("free_completed", 1000),
    ]  # fmt: skip
    assert found.events[1].stack == (Frame("forward", "/x/diffusers/models/resnet.py", 3),)
    assert [b.requested_bytes for b in found.end.held] == [3 * MIB, 5 * MIB]
    assert [b.requested_bytes for b in found.start.held] == [3 * MIB]
    assert (found.start.reserved_bytes, found.end.reserved_bytes) == (20 * MIB, 22 * MIB)


@pytest.mark.parametrize(("name", "pack"), [("s.pickle.gz", gzip.compress), ("s.xz", lzma.compress)])
def test_compressed_files_are_read(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    """By what is in them, whatever their name; torn ones say so."""
    content = pack(pickle.dumps(recorded()))
    (tmp_path / name).write_bytes(content)
    assert len(read(tmp_path / name).events) == 5
    (tmp_path / name).write_bytes(content[:-20])
    with pytest.raises(SnapshotError, match="torn"):
        read(tmp_path / name)


def test_a_file_torn_anywhere_is_one_sentence(tmp_path: Path) -> None:
    """At every byte of it."""
    content = pickle.dumps(recorded())
    path = tmp_path / "s.pickle"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(SnapshotError, match="torn: it ends in the middle"):
            read(path)


def test_a_file_damaged_anywhere_is_read_or_refused(tmp_path: Path) -> None:
    """One byte changed, at every place: it is a snapshot still, or one sentence says why not; nothing else is raised."""
    content = pickle.dumps(recorded())
    path = tmp_path / "s.pickle"
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        try:
            assert read(path).start
        except SnapshotError as error:
            assert "\n" not in str(error)


class Bomb:
    """Runs a command when it is unpickled by Python."""

    def __reduce__(self) -> Any:
        return os.mkdir, (MARK,)


def pushed(*instructions: bytes) -> bytes:
    return b"\x80\x04" + b"".join(instructions) + b"."


HOSTILE = {
    "a call": (pickle.dumps({"segments": [Bomb()], "device_traces": [[]]}), "STACK_GLOBAL"),
    "a call, protocol 2": (pickle.dumps(Bomb(), 2), "GLOBAL"),
    "a call as text": (b"cos\nmkdir\n(S'it-ran'\ntR.", "GLOBAL"),
    "an instance": (b"(S'it-ran'\nios\nmkdir\n.", "damaged"),
    "an instance, binary": (pushed(b"(cos\nmkdir\no"), "GLOBAL"),
    "an extension": (pushed(b"\x82\x01"), "EXT1"),
    "something outside": (pushed(b"\x8c\x01aQ"), "BINPERSID"),
    "a buffer of 2^60 bytes": (pushed(b"\x96" + struct.pack("<Q", 1 << 60)), "BYTEARRAY8"),
    "a text of 2^60 bytes": (pushed(b"\x8d" + struct.pack("<Q", 1 << 60)), "a text of 1152921504606846976 bytes"),
    "a text longer than the file": (pushed(b"X" + struct.pack("<I", 1 << 20)), "torn"),
    "a memo of 2^32 places": (pushed(b"}r" + b"\xff" * 4), "no list of device_traces"),
    "a memo without end": (pushed(b"}" + b"\x94" * 100_000), "remembers more than it has made"),
    "a stack without end": (pushed(b"]" * 10 * MOST_ON_THE_STACK), "nested more deeply"),
    "lists in lists": (pushed(b"]" * 60_000, b"a" * 59_999), "no memory snapshot"),
    "tuples in tuples as a key": (pushed(b"})", b"\x85" * 200_000, b"Ns"), "whose keys are no text"),
    "marks without end": (pushed(b"(" * 20_000_000), "nested more deeply"),
    "a list in itself": (pushed(b"]\x94h\x00a"), "no memory snapshot"),
    "an item for a number": (pushed(b"K\x01K\x02a"), "into what is no list"),
    "nothing on the stack": (pushed(b"s"), "do not fit together"),
    "an unknown place": (pushed(b"h\x07"), "do not fit together"),
    "an unknown instruction": (pushed(b"\xff"), "no pickle"),
    "another pickle": (pickle.dumps([1, 2]), "no memory snapshot"),
    "a table": (pickle.dumps({"segments": []}), "no list of device_traces"),
    "no history": (pickle.dumps({"segments": [], "device_traces": [[]]}), "recording was not on"),
    "a strange event": (pickle.dumps({"segments": [], "device_traces": [[{"action": 1, "addr": 2}]]}), "'action' is no text"),
    "a strange size": (
        pickle.dumps({"segments": [], "device_traces": [[{"action": "alloc", "addr": 2, "size": "x"}]]}),
        "'size' is no whole number",
    ),
    "text": (b"height,width\n1,2\n", "damaged"),
    "nothing": (b"", "torn"),
    "zeros, compressed": (gzip.compress(bytes(64 << 20)), "no pickle"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_one_sentence_and_do_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is called, no memory is taken for a number in the file, and the sentence names the file."""
    content, words = HOSTILE[kind]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "s.pickle"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(SnapshotError, match=words) as error:
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not (tmp_path / MARK).exists()
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert peak < 200 * MIB


def test_more_tables_than_any_run_makes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file can make many objects; beyond a measure it says how to record less."""
    monkeypatch.setattr("sdfit.study.calibration.pickles.MOST_OBJECTS", 1000)
    path = tmp_path / "s.pickle"
    path.write_bytes(pushed(b"]", b"(" + b"}" * 900 + b"e", b"(" + b"}" * 900 + b"e"))
    with pytest.raises(SnapshotError, match="record one run alone"):
        read(path)


def test_the_bomb_would_run_in_pythons_own_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above is worth something."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / MARK).exists()


@pytest.mark.parametrize("name", ["missing.pickle", "."])
def test_what_is_no_file_is_one_sentence(tmp_path: Path, name: str) -> None:
    """With what to type to have one."""
    with pytest.raises(SnapshotError, match="sdfit sweep --history"):
        read(tmp_path / name)


def test_a_device_of_the_file_is_chosen(tmp_path: Path) -> None:
    """The one with the most events unless one is named; one without a history is refused."""
    content = recorded()
    content["device_traces"] = [[], *content["device_traces"], []]
    for segment in content["segments"]:
        segment["device"] = 1
    path = write(tmp_path / "s.pickle", content)
    assert read(path).device == read(path, device=1).device == 1
    with pytest.raises(SnapshotError, match="device 2; there is: 1"):
        read(path, device=2)


def test_a_large_file_is_read_in_little_memory(tmp_path: Path) -> None:
    """Events become short tuples while they are read: a history takes less than four times its file."""
    frames = [{"name": f"f{i}", "filename": f"/x/diffusers/{i % 9}.py", "line": i} for i in range(300)]
    events = []
    for i in range(10_000):
        entry = {"action": "alloc", "addr": (1 << 46) + i * 512, "size": 512, "stream": 0, "time_us": (1 << 50) + i}
        events.append(entry | {"frames": [frames[(i * 7 % 290 + k) % 300] for k in range(60)]})
    content = {"segments": [], "device_traces": [events]}
    path = write(tmp_path / "s.pickle", content)
    size = path.stat().st_size
    assert size > 2.5e6
    del content, events, entry
    tracemalloc.start()
    found = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.events) == 10_000
    assert peak < 4 * size
