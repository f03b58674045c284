"""Pictures run beside their predictions: on a made-up card whose answer is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdfit.backends.fake import FakeBackend
from sdfit.errors import RecordsError
from sdfit.judging.validate import validate
from sdfit.predict.pictures import Picture
from sdfit.predict.predictor import Predictor
from sdfit.records import read
from sdfit.units import GIB

PICTURES = [
    Picture(Path("a"), 512, 512),
    Picture(Path("b"), 3000, 3000),
    Picture(Path("c"), problem="torn"),
    Picture(Path("d"), 768, 512),
]


def test_each_run_is_a_pair_and_a_record(f: Predictor, tmp_path: Path) -> None:
    """Estimated and actual agree on the card that the model was fitted on; what does not fit, or is no picture, is skipped."""
    path = tmp_path / "pairs.jsonl"
    pairs = list(validate(f, FakeBackend("fake"), PICTURES, path, memory=8 * GIB, level=0.95))
    assert [pair.outcome for pair in pairs] == ["ok", "skipped", "skipped", "ok"]
    assert pairs[1].reason.startswith("does not fit") and pairs[2].reason == "torn"
    for pair in (pairs[0], pairs[3]):
        assert pair.error is not None and abs(pair.error) < 1e-3 and pair.actual_bytes and pair.device_bytes
    records = read(path).records
    assert [r.workload.height for r in records] == [512, 768]
    assert records[0].allocated_bytes == pairs[0].actual_bytes


def test_a_second_time_goes_on_in_the_same_file(f: Predictor, tmp_path: Path) -> None:
    """Rows are appended; a file of other runs is refused and not touched."""
    path = tmp_path / "pairs.jsonl"
    for count in (1, 2):
        list(validate(f, FakeBackend("fake"), PICTURES[:1], path, memory=8 * GIB, level=0.95))
        assert len(read(path).records) == count
    other = tmp_path / "other.jsonl"
    other.write_text("mine")
    with pytest.raises(RecordsError, match="is no records file"):
        list(validate(f, FakeBackend("fake"), PICTURES[:1], other, memory=8 * GIB, level=0.95))
    assert other.read_text() == "mine"


def test_a_run_that_fails_is_a_pair_too(f: Predictor, tmp_path: Path) -> None:
    """Out of memory on a card with less than was said: the outcome, and the record of it."""
    card = FakeBackend("fake", capacity_bytes=3 * GIB)
    (pair,) = validate(f, card, PICTURES[:1], tmp_path / "pairs.jsonl", memory=8 * GIB, level=0.95)
    assert pair.outcome == "oom" and pair.error is None and read(tmp_path / "pairs.jsonl").records[0].outcome == "oom"
