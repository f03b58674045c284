"""A sweep killed a hundred times, at any moment: nothing recorded is lost, and what is left equals an uninterrupted sweep."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sdfit.backends.fake import FakeBackend
from sdfit.records import Record, read
from sdfit.sweep import grid

SEED, FEW, MANY = 20261125, 3, 100
GRID = f"""
[[block]]
shapes = [{", ".join(str(256 + 8 * i) for i in range(30))}]
batch_size = [1, 2, 3, 4]
"""
COMMAND = [sys.executable, "-m", "sdfit.cli", "sweep", "--backend", "fake", "--grid", "grid.toml", "--out", "r.jsonl"]


def rows_of(path: Path) -> int:
    """Whole lines of a records file, its environment not counted."""
    return max(path.read_bytes().count(b"\n") - 1, 0) if path.exists() else 0


def killed(folder: Path, kills: int) -> int:
    """Kill sweeps of one file; returns how many rows were kept by then."""
    (folder / "grid.toml").write_text(GRID)
    path, rng, rows = folder / "r.jsonl", random.Random(SEED), 0
    environment = os.environ | {
        "SDFIT_FAKE": json.dumps({"hang_after": 1})
    }  # a row each at most, so that none completes
    for turn in range(kills):
        process = subprocess.Popen(
            COMMAND, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )  # fmt: skip
        if turn % 2:  # at any moment of its life; in the other turns just after its row came, whenever that is
            time.sleep(rng.uniform(0, 1.5))
        else:
            end = time.monotonic() + 120
            while rows_of(path) == rows:
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        kept = rows_of(path)
        assert rows <= kept <= rows + 1
        rows = kept
    ran = subprocess.run(COMMAND, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    card, plan = FakeBackend(), grid.load(str(folder / "grid.toml"))
    assert read(path).records == [Record(i, w, **card.measure(w)) for i, w in enumerate(plan.workloads)]
    assert path.read_bytes().count(b"\n") == 121  # no workload was recorded twice
    return rows


def test_some_kills(tmp_path: Path) -> None:
    """A share of those of `test_a_hundred_kills`."""
    killed(tmp_path, FEW)


@pytest.mark.slow
def test_a_hundred_kills(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """With SIGKILL, from before the file is there to the middle of a row."""
    rows = killed(tmp_path, MANY)
    record_property("fuzz", f"{MANY} kills, seed {SEED}: {rows} rows were kept by then, and the rest followed")
