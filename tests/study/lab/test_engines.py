"""What the engines cost: counted from the first row to the last, and no sweep is left behind."""

from __future__ import annotations

import re

import pytest

from sdfit.study.lab import engines


def test_the_pace_of_a_made_up_card_is_its_delay_and_what_is_beside_it() -> None:
    """A sweep of a card of known speed takes at least its own time, and nothing is lost."""
    first, pace, load = engines._timed(engines._made_up(4), "fake", {"delay_s": 0.1}, "local", 1)
    assert first > 0.1 and pace <= 1 / 0.1 and " of " in load
    later, pace, _ = engines._timed(engines._made_up(4), "fake", {"delay_s": 0.1}, "local", 1, since=2)
    assert later > 0.2 and pace <= 1 / 0.1


def test_the_driver_holds_and_writes_a_few_kilobytes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes in memory and on the disk, for each row, of a few rows."""
    pytest.importorskip("ray")
    monkeypatch.setattr(engines, "ROWS", 50)
    monkeypatch.setattr(engines, "MANY", 20)
    rows = dict(re.findall(r"^(\w.*?)  .*?(\d+) B$", engines.driver(), re.MULTILINE))
    assert set(rows) == {"written and on the disk", "held in memory"}
    assert all(500 < int(amount) < 10_000 for amount in rows.values())
