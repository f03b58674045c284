"""The journal, for each kind of row that is kept in one: what is on the disk is never lost, what is foreign never touched."""

from __future__ import annotations

import gzip
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sdfit.backends.fake import FakeBackend
from sdfit.errors import RecordsError
from sdfit.records import RECORDS, Kind, Record, read_rows
from sdfit.study.lab.operators import OPERATORS, Held, Operator
from sdfit.study.lab.proofs import PROOFS
from sdfit.sweep.journal import Journal
from sdfit.workload import Workload

ENVIRONMENT = FakeBackend().environment()


def records() -> list[Record]:
    workloads = (Workload(256, 256), Workload(512, 520, batch_size=2), Workload(768, 512, attention="eager"))
    return [Record(i, w, **FakeBackend().measure(w)) for i, w in enumerate(workloads)]


def proofs() -> list[dict[str, Any]]:
    return [{"condition": "reference", "index": i, "outcome": "ok"} for i in range(3)]


def operators() -> list[Held]:
    shapes = ((1, 8, 32, 32), (16, 8, 3, 3))
    return [Held(Operator("convolution", "float16", shapes, 1, i), 512 * i, None) for i in range(3)]


KINDS = pytest.mark.parametrize(
    ("kind", "rows"),
    [(RECORDS, records), (PROOFS, proofs), (OPERATORS, operators)],
    ids=["records", "proofs", "operators"],
)
Rows = Callable[[], list[Any]]


def written(path: Path, kind: Kind[Any], rows: list[Any]) -> bytes:
    """Write rows and return the file's content."""
    with Journal(path, ENVIRONMENT, kind) as journal:
        for row in rows:
            journal.append(row)
        assert journal.rows == rows
    return path.read_bytes()


@KINDS
def test_rows_come_back_as_they_were_written(tmp_path: Path, kind: Kind[Any], rows: Rows) -> None:
    """Environment and rows, without a note, from a folder that was not there."""
    path = tmp_path / "a" / "r.jsonl"
    content = written(path, kind, rows())
    assert read_rows(path, kind) == (ENVIRONMENT, rows(), []) and content.endswith(b"\n")


@KINDS
def test_a_torn_last_line_is_dropped_with_a_note_and_cut_off(tmp_path: Path, kind: Kind[Any], rows: Rows) -> None:
    """Whatever the place it is torn at, the rows before it stay and the file can be written on."""
    path = tmp_path / "r.jsonl"
    content = written(path, kind, rows())
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    for end in (last + 1, last + 30, len(content) - 1):
        path.write_bytes(content[:end])
        _, found, notes = read_rows(path, kind)
        assert found == rows()[:-1] and "torn" in notes[0]
        with Journal(path, ENVIRONMENT, kind) as journal:
            assert journal.rows == rows()[:-1] and "torn" in journal.notes[0]
            journal.append(rows()[-1])
        assert path.read_bytes() == content


@contextmanager
def full_disk(most_bytes: int) -> Iterator[None]:
    """No file can grow beyond this size: what is written anew is as lost as after a kill between two writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@KINDS
def test_resuming_never_writes_the_file_again(tmp_path: Path, kind: Kind[Any], rows: Rows) -> None:
    """Where nothing can be written at all, opening a torn file and failing to append leaves every whole row."""
    path = tmp_path / "r.jsonl"
    content = written(path, kind, rows())
    path.write_bytes(content + content[-40:-1])
    with full_disk(10):
        journal = Journal(path, ENVIRONMENT, kind)
        with pytest.raises(RecordsError, match=rf"cannot write {kind.noun}s to .*: File too large"):
            journal.append(rows()[0])
    assert path.read_bytes() == content
    with Journal(path, ENVIRONMENT, kind) as journal:
        assert journal.rows == rows()


@KINDS
def test_a_row_that_was_half_written_is_followed_by_no_other(tmp_path: Path, kind: Kind[Any], rows: Rows) -> None:
    """The disk fills in the middle of a line: the writer stops, and the next one cuts the half line off."""
    path = tmp_path / "r.jsonl"
    content = written(path, kind, rows()[:2])
    journal = Journal(path, ENVIRONMENT, kind)
    with full_disk(len(content) + 20), pytest.raises(RecordsError, match=r"cannot write .*: File too large"):
        journal.append(rows()[2])
    with pytest.raises(ValueError, match="closed file"):
        journal.append(rows()[2])
    assert path.read_bytes().startswith(content) and len(path.read_bytes()) == len(content) + 20
    with Journal(path, ENVIRONMENT, kind) as again:
        assert again.rows == rows()[:2]
        again.append(rows()[2])
    assert read_rows(path, kind)[1] == rows()


@KINDS
def test_a_torn_first_line_is_written_again(tmp_path: Path, kind: Kind[Any], rows: Rows) -> None:
    """A sweep killed while it wrote its environment leaves a file that the next one resumes."""
    path = tmp_path / "r.jsonl"
    content = written(path, kind, rows())
    for end in (0, 1, 5, 20, 60):
        path.write_bytes(content[:end])
        with pytest.raises(RecordsError, match=rf"holds no {kind.noun}s; type: "):
            read_rows(path, kind)
        assert written(path, kind, rows()) == content


@KINDS
@pytest.mark.parametrize(
    "content",
    [
        b"my notes",
        b"first\nsecond",
        b"a,b\n1,2\n3",
        b"\x80\x04pickle",
        gzip.compress(b"first\nsecond", mtime=0),
        b'{"a": 1}\n{"torn',
    ],
)
def test_a_foreign_file_is_not_touched(tmp_path: Path, kind: Kind[Any], rows: Rows, content: bytes) -> None:
    """A file that is of no kind is refused, and stays as it was to the byte."""
    path = tmp_path / "notes.jsonl"
    path.write_bytes(content)
    for _ in range(2):  # and the refused writer holds no lock
        with pytest.raises(RecordsError, match=rf"no {kind.noun}s file|not the environment|not text"):
            Journal(path, ENVIRONMENT, kind)
    assert path.read_bytes() == content


def test_a_file_of_another_kind_is_not_touched(tmp_path: Path) -> None:
    """Proofs do not go into a records file, nor the other way round."""
    path = tmp_path / "r.jsonl"
    content = written(path, RECORDS, records())
    with pytest.raises(RecordsError, match="not the environment of an sdfit proofs file"):
        Journal(path, ENVIRONMENT, PROOFS)
    assert path.read_bytes() == content


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    """While one writes, another is refused; afterwards it is let in."""
    path = tmp_path / "r.jsonl"
    with Journal(path, ENVIRONMENT, RECORDS), pytest.raises(RecordsError, match="another sweep is writing"):
        Journal(path, ENVIRONMENT, RECORDS)
    Journal(path, ENVIRONMENT, RECORDS).close()


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    """A folder of that name is a file."""
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(RecordsError, match="cannot write records"):
        Journal(tmp_path / "x" / "y.jsonl", {}, RECORDS)


@pytest.mark.parametrize("name", ["gpu", "torch", "workspaces", "grid_sha256", "num_inference_steps"])
def test_resuming_under_other_conditions_is_refused(tmp_path: Path, name: str) -> None:
    """A fact that numbers depend on, or the plan, differs: refused with both values, nothing changed."""
    path = tmp_path / "r.jsonl"
    before = written(path, RECORDS, records())
    with pytest.raises(RecordsError, match=rf"other conditions \({name}: .* / other\).*--out"):
        Journal(path, ENVIRONMENT | {name: "other"}, RECORDS)
    assert path.read_bytes() == before


@KINDS
def test_a_disk_that_fills_at_any_byte_loses_nothing(tmp_path: Path, kind: Kind[Any], rows: Rows) -> None:
    """Whole rows stay, the next writer goes on behind them, and the file comes out as if nothing had happened."""
    path = tmp_path / "r.jsonl"
    content = written(path, kind, rows())
    for most_bytes in range(0, len(content), len(content) // 50):
        path.unlink()
        with full_disk(most_bytes), pytest.raises(RecordsError, match="cannot write"):
            written(path, kind, rows())
        with Journal(path, ENVIRONMENT, kind) as journal:
            kept = len(journal.rows)
            assert journal.rows == rows()[:kept] and kept == max(content[:most_bytes].count(b"\n") - 1, 0)
            for row in rows()[kept:]:
                journal.append(row)
        assert path.read_bytes() == content
