"""What the engines cost: counted from the first row to the last, and no sweep is left behind."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdfit.study.lab import engines


def test_the_pace_of_a_made_up_card_is_its_delay_and_what_is_beside_it() -> None:
    """A sweep of a card of known speed takes at least its own time, and nothing is lost."""
    found = engines._timed(engines._made_up(4), "fake", {"delay_s": 0.1}, "local", 1)
    assert found.before_s > 0.1 and found.pace <= 1 / 0.1 and " of " in found.load
    later = engines._timed(engines._made_up(4), "fake", {"delay_s": 0.1}, "local", 1, since=2)
    assert later.before_s > 0.2 and later.pace <= 1 / 0.1


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="no /proc here")
def test_the_processor_time_of_a_worker_is_counted_and_its_waiting_is_not() -> None:
    """A process of this one that works takes as long as it says itself; one that sleeps takes nothing."""
    before = engines._processor_s()
    work = "import time\nwhile time.process_time() < 0.6: pass\nprint(1, flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as busy:
        assert busy.stdout is not None and busy.stdin is not None
        busy.stdout.readline()
        taken = engines._processor_s() - before
        assert 0.55 <= taken < 2.0
        time.sleep(0.3)
        assert engines._processor_s() - before - taken <= 0.05
        busy.stdin.close()


def test_the_driver_holds_and_writes_a_few_kilobytes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes in memory and on the disk, for each row, of a few rows."""
    pytest.importorskip("ray")
    monkeypatch.setattr(engines, "ROWS", 50)
    monkeypatch.setattr(engines, "MANY", 20)
    rows = dict(re.findall(r"^(\w.*?)  .*?(\d+) B$", engines.driver(), re.MULTILINE))
    assert set(rows) == {"written and on the disk", "held in memory"}
    assert all(500 < int(amount) < 10_000 for amount in rows.values())
