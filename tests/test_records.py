"""Records files: what is written can be read, what is damaged is named, what is recorded is never lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import measured
from hypothesis import given
from hypothesis import strategies as st
from test_workload import WORKLOADS

from sdfit import records
from sdfit.backends.fake import FakeBackend
from sdfit.errors import RecordsError
from sdfit.records import MATTERS, Record, RecordsFile, Writer, pool, read, to_frame
from sdfit.workload import Workload

WORKLOADS_SMALL = (Workload(256, 256), Workload(512, 520, batch_size=2), Workload(768, 512, attention="eager"))


def written(path: Path) -> list[Record]:
    """Write a few records and return them."""
    rows = measured(WORKLOADS_SMALL)
    with Writer(path, rows.environment) as writer:
        for row in rows.records:
            writer.append(row)
    return rows.records


@given(WORKLOADS, st.integers(0, 2**40))
def test_one_record_survives_its_line(w: Workload, capacity_bytes: int) -> None:
    """A success or an out-of-memory row of any workload comes back equal from its line."""
    record = Record(3, w, **FakeBackend(capacity_bytes=capacity_bytes).measure(w))
    assert Record.from_dict(json.loads(record.to_json())) == record


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """Rows and environment survive the file, and a read notes nothing."""
    path = tmp_path / "a" / "b.jsonl"
    rows = written(path)
    file = read(path)
    assert file.records == rows and file.environment == FakeBackend().environment() and not file.notes
    assert path.read_bytes().endswith(b"\n")


def test_a_torn_last_line_is_dropped_with_a_note_and_cut_off_by_the_writer(tmp_path: Path) -> None:
    """Whatever the place it is torn at, the rows before it stay and the file can be written on."""
    path = tmp_path / "r.jsonl"
    rows = written(path)
    content = path.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    for end in (last + 1, last + 30, len(content) - 1):
        path.write_bytes(content[:end])
        file = read(path)
        assert file.records == rows[:-1] and "torn" in file.notes[0]
        with Writer(path, file.environment) as writer:
            assert writer.done == rows[:-1] and "torn" in writer.notes[0]
            writer.append(rows[-1])
        assert path.read_bytes() == content


def test_a_torn_first_line_is_written_again(tmp_path: Path) -> None:
    """A sweep killed while it wrote its environment leaves a file that the next one takes up."""
    path = tmp_path / "r.jsonl"
    written(path)
    content = path.read_bytes()
    for end in (0, 1, 5, 20, 60):
        path.write_bytes(content[:end])
        with pytest.raises(RecordsError, match=r"holds no records; type: sdfit sweep"):
            read(path)
        written(path)
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    "content", [b"my notes", b"first\nsecond", b"a,b\n1,2\n3", b"\x80\x04pickle", b'{"a": 1}\n{"torn']
)
def test_a_foreign_file_is_not_touched(tmp_path: Path, content: bytes) -> None:
    """--out on a file that is no records file is refused, and the file stays as it was to the byte."""
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    for _ in range(2):  # and the refused writer holds no lock
        with pytest.raises(RecordsError, match=r"no records file|not the environment|not text"):
            Writer(path, FakeBackend().environment())
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "line 3"),
        ("{", "line 3"),
        ("[]", "not a table"),
        ("5", "not a table"),
        ('"text"', "not a table"),
        ("null", "not a table"),
        ("[" * 100_000, "line 3"),
        ({"surplus": 1}, "unknown key 'surplus'"),
        ({"index": None}, "index is None"),
        ({"index": "1"}, "index is '1'"),
        ({"index": -1}, "index is -1"),
        ({"outcome": "fine"}, "outcome is 'fine'; it must be one of ok, oom, crash"),
        ({"workload": None}, "a workload is a table"),
        ({"workload": {"height": 512}}, "it has no width"),
        ({"workload": {"height": 8, "width": 512}}, "height is 8"),
        ({"workload": {"height": 512, "width": 512, "batch": 1}}, "did you mean 'batch_size'"),
        ({"allocated_bytes": -1}, "allocated_bytes is -1"),
        ({"allocated_bytes": 1.5}, "allocated_bytes is 1.5"),
        ({"allocated_bytes": float("nan")}, "allocated_bytes is nan"),
        ({"allocated_bytes": "1"}, "allocated_bytes is '1'"),
        ({"allocated_bytes": None}, "an 'ok' row without peaks"),
        ({"stage_peaks_bytes": None}, "stage_peaks_bytes must be a table of text_encoder"),
        ({"stage_peaks_bytes": [1]}, "stage_peaks_bytes must be a table of text_encoder"),
        ({"stage_peaks_bytes": {"unett": 1}}, "stage_peaks_bytes must be a table of text_encoder"),
        ({"stage_peaks_bytes": {"unet": None}}, "stage_peaks_bytes of unet"),
        ({"stage_peaks_bytes": {"unet": {}}}, "stage_peaks_bytes of unet"),
        ({"component_bytes": {"unet": -5}}, "component_bytes of unet is -5"),
        ({"oom_stage": "lunch"}, "oom_stage is 'lunch'"),
    ],
)
def test_a_broken_middle_line_is_refused_by_number(tmp_path: Path, line: Any, words: str) -> None:
    """A line that is no record is refused with its number and what is wrong, for reading and writing on; no byte changes."""
    path = tmp_path / "r.jsonl"
    written(path)
    lines = path.read_text().split("\n")
    lines[2] = json.dumps(json.loads(lines[2]) | line) if isinstance(line, dict) else line
    path.write_text("\n".join(lines))
    before = path.read_bytes()
    with pytest.raises(RecordsError, match="line 3 is no record") as caught:
        read(path)
    assert words in str(caught.value) and caught.value.facts["line"] == 3
    with pytest.raises(RecordsError, match="line 3"):
        Writer(path, FakeBackend().environment())
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "head", ["", "5", "null", "{}", '{"sdfit_records": 1}', '{"sdfit_records": 1, "environment": []}']
)
def test_a_first_line_that_is_no_environment_is_refused(tmp_path: Path, head: str) -> None:
    """Whatever it holds instead."""
    path = tmp_path / "r.jsonl"
    path.write_text(head + "\n")
    with pytest.raises(RecordsError, match="line 1 is not the environment of an sdfit records file"):
        read(path)


def test_another_format_is_refused_with_both_numbers(tmp_path: Path) -> None:
    """A file of a later format says which one it is and which one is read."""
    path = tmp_path / "r.jsonl"
    path.write_text('{"sdfit_records": 9, "environment": {}}\n')
    with pytest.raises(RecordsError, match="records of format 9; this sdfit reads format 1"):
        read(path)


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    """No file, a folder, bytes that are no text."""
    with pytest.raises(RecordsError, match="No such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(RecordsError, match="directory"):
        read(tmp_path)
    (tmp_path / "x").write_bytes(b"\xff\xfe\n")
    with pytest.raises(RecordsError, match="not text"):
        read(tmp_path / "x")
    with pytest.raises(RecordsError, match="cannot write records"):
        Writer(tmp_path / "x" / "y.jsonl", {})


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    """While one writes, another is refused; afterwards it is let in."""
    path = tmp_path / "r.jsonl"
    environment = FakeBackend().environment()
    with Writer(path, environment), pytest.raises(RecordsError, match="another sweep is writing"):
        Writer(path, environment)
    Writer(path, environment).close()


@pytest.mark.parametrize("name", ["gpu", "torch", "workspaces", "grid_sha256", "num_inference_steps"])
def test_writing_on_under_other_conditions_is_refused(tmp_path: Path, name: str) -> None:
    """A fact that numbers depend on, or the plan, differs: refused with both values, nothing changed."""
    path = tmp_path / "r.jsonl"
    written(path)
    before = path.read_bytes()
    with pytest.raises(RecordsError, match=rf"other conditions \({name}: .* / other\).*--out"):
        Writer(path, FakeBackend().environment() | {name: "other"})
    assert path.read_bytes() == before


def test_a_repeated_workload_replaces_its_earlier_row(tmp_path: Path) -> None:
    """A crash that was tried again counts once, as what it became."""
    path = tmp_path / "r.jsonl"
    rows = written(path)
    with Writer(path, read(path).environment) as writer:
        writer.append(replace(rows[0], outcome="crash", message="tried again"))
    again = read(path).records
    assert [r.index for r in again] == [0, 1, 2] and again[0].outcome == "crash"


@pytest.mark.parametrize("name", MATTERS)
def test_mixed_environments_do_not_pool(name: str) -> None:
    """Two files that differ in one fact that matters are refused, and the error names that fact and no other."""
    one = measured(WORKLOADS_SMALL)
    other = RecordsFile(one.environment | {name: "something else"}, one.records, [])
    with pytest.raises(RecordsError, match="cannot be pooled") as caught:
        pool([one, other])
    assert len(caught.value.facts["differ"]) == 1 and caught.value.facts["differ"][0].startswith(f"{name}: ")


def test_pooling_keeps_all_rows_and_names_the_grids() -> None:
    """Files that agree pool; the facts that do not matter may differ; none at all is refused."""
    one = measured(WORKLOADS_SMALL)
    other = RecordsFile(one.environment | {"grid": "b", "seed": 5}, one.records, ["a note"])
    both = pool([RecordsFile(one.environment | {"grid": "a"}, one.records, []), other])
    assert len(both.records) == 6 and both.environment["grid"] == "a, b" and both.notes == ["a note"]
    with pytest.raises(RecordsError, match="no records"):
        pool([])


def test_a_frame_has_one_row_per_record() -> None:
    """Columns are the fields, the peaks and the derived sizes; what is missing is NaN."""
    pytest.importorskip("pandas")
    rows = measured(WORKLOADS_SMALL, capacity_bytes=4 << 30).records
    frame = to_frame(rows)
    assert list(frame["height"]) == [256, 512, 768] and list(frame["unet_batch"]) == [2, 4, 2]
    assert list(frame["allocated_bytes"]) == [r.allocated_bytes for r in rows]
    assert list(frame["peak_unet_bytes"]) == [r.stage_peaks_bytes["unet"] for r in rows]
    assert list(frame["outcome"]) == ["ok", "ok", "oom"]
    assert list(frame["oom_bytes"].isna()) == [True, True, False]


def test_fingerprints_differ_with_the_value() -> None:
    """Order of keys does not matter, values do."""
    assert records.fingerprint({"a": 1, "b": 2}) == records.fingerprint({"b": 2, "a": 1})
    assert records.fingerprint({"a": 1}) != records.fingerprint({"a": 2})
