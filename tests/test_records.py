"""Records and their files: valid from birth, what is damaged is named, and what may be pooled."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import drawn, file_of, run

from sdfit import records
from sdfit.backends.fake import FakeBackend
from sdfit.errors import RecordsError
from sdfit.records import MATTERS, RECORDS, Record, RecordsFile, pool, read, to_frame
from sdfit.sweep.journal import Journal
from sdfit.workload import Workload

WORKLOADS = (Workload(256, 256), Workload(512, 520, batch_size=2), Workload(768, 512, attention="eager"))


def measured(**options: Any) -> RecordsFile:
    """Records of the fake card, without a file."""
    card = FakeBackend(**options)
    return file_of(card, run(card, WORKLOADS))


def written(path: Path) -> list[Record]:
    """Write a few records and return them."""
    rows = measured()
    with Journal(path, rows.environment, RECORDS) as journal:
        for row in rows.records:
            journal.append(row)
    return rows.records


@given(st.integers(0, 2**32), st.integers(0, 2**40))
def test_one_record_survives_its_line(seed: int, capacity_bytes: int) -> None:
    """A success or an out-of-memory row of any workload comes back equal from its line."""
    (w,) = drawn(random.Random(seed), 1)
    record = Record(3, w, **FakeBackend(capacity_bytes=capacity_bytes).measure(w))
    assert Record.from_dict(json.loads(json.dumps(asdict(record)))) == record


PEAKS: dict[str, Any] = {"stage_peaks_bytes": {"unet": 7}, "allocated_bytes": 7}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"index": -1}, "index is -1; it must be a whole number >= 0"),
        ({"index": True}, "index is True"),
        ({"workload": {"height": 512, "width": 512}}, "it must be a Workload"),
        ({"outcome": "fine"}, "outcome is 'fine'; it must be one of ok, oom, crash"),
        ({"stage_peaks_bytes": {}}, "an 'ok' row without peaks"),
        ({"allocated_bytes": None}, "an 'ok' row without peaks"),
        ({"allocated_bytes": -7}, "allocated_bytes is -7; it must be a whole number of bytes"),
        ({"allocated_bytes": 7.0}, "allocated_bytes is 7.0"),
        ({"allocated_bytes": np.int64(7)}, "allocated_bytes is "),
        ({"oom_bytes": False}, "oom_bytes is False"),
        ({"retries": 1, "stage_peaks_bytes": {"lunch": 7}}, "stage_peaks_bytes must be a table of text_encoder"),
        ({"component_bytes": {"unet": 1.5}}, "component_bytes of unet is 1.5"),
        ({"stage_s": {"unet": float("nan")}}, "stage_s of unet is nan; it must be a number of seconds"),
        ({"stage_s": {"unet": "fast"}}, "stage_s of unet is 'fast'"),
        ({"oom_stage": "lunch"}, "oom_stage is 'lunch'; it must be one of text_encoder"),
        ({"message": 3}, "message is 3; it must be text"),
        ({"retries": -1}, "retries is -1; it must be a whole number"),
    ],
)
def test_a_bad_record_cannot_be_made(fields: dict[str, Any], words: str) -> None:
    """Whoever makes it, from a line or by hand, so that none can be written and spoil its file."""
    good = Record(0, WORKLOADS[0], "ok", **PEAKS)
    with pytest.raises(RecordsError) as caught:
        replace(good, **fields)
    assert words in str(caught.value)


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """Rows and environment survive the file, and a read notes nothing."""
    path = tmp_path / "a" / "b.jsonl"
    rows = written(path)
    file = read(path)
    assert file.records == rows and file.environment == FakeBackend().environment() and not file.notes
    assert path.read_bytes().endswith(b"\n")


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
        Journal(path, FakeBackend().environment(), RECORDS)
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


def test_a_repeated_workload_replaces_its_earlier_row(tmp_path: Path) -> None:
    """It counts once, as the last that says as much: no failure replaces what was measured."""
    path = tmp_path / "r.jsonl"
    rows = written(path)
    with Journal(path, read(path).environment, RECORDS) as journal:
        journal.append(replace(rows[0], allocated_bytes=9 << 30))
        journal.append(replace(rows[0], outcome="crash", message="tried again"))
    again = read(path).records
    assert [r.index for r in again] == [0, 1, 2] and (again[0].outcome, again[0].allocated_bytes) == ("ok", 9 << 30)


@pytest.mark.parametrize("name", MATTERS)
def test_mixed_environments_do_not_pool(name: str) -> None:
    """Two files that differ in one fact that matters are refused, and the error names that fact and no other."""
    one = measured()
    other = RecordsFile(one.environment | {name: "something else"}, one.records, [])
    with pytest.raises(RecordsError, match="cannot be pooled") as caught:
        pool([one, other])
    assert len(caught.value.facts["differ"]) == 1 and caught.value.facts["differ"][0].startswith(f"{name}: ")


def test_pooling_keeps_all_rows_and_names_the_grids() -> None:
    """Files that agree pool; the facts that do not matter may differ; none at all is refused."""
    one = measured()
    other = RecordsFile(one.environment | {"grid": "b", "seed": 5}, one.records[1:], ["a note"])
    both = pool([RecordsFile(one.environment | {"grid": "a"}, one.records, []), other])
    assert len(both.records) == 5 and both.environment["grid"] == "a, b" and both.notes == ["a note"]
    with pytest.raises(RecordsError, match="no records"):
        pool([])
    with pytest.raises(RecordsError, match="the same records, which would count twice; give each once"):
        pool([one, other, one])


def test_a_frame_has_one_row_per_record() -> None:
    """Columns are the fields, the peaks and the derived sizes; what is missing is NaN."""
    pytest.importorskip("pandas")
    rows = measured(capacity_bytes=4 << 30).records
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
