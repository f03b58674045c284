"""sdfit calibrate as its user types it: answers, files, and what it says where it cannot."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from recorded import Recorder, run_on, write

from sdfit.backends.trace.tables import read_table
from sdfit.backends.trace.tracer import Tracer
from sdfit.cli import main
from sdfit.predict.simulation.workspaces import ARCHITECTURES
from sdfit.study.calibration.operations import operations_of
from sdfit.study.calibration.rules import predicted
from sdfit.workload import Workload

SIZE = ("--height", "256", "--width", "256", "--num-inference-steps", "2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The snapshot of a made-up V100, as anybody would record it."""
    card, architecture = Recorder(), ARCHITECTURES["sm70"]
    traced = operations_of(Tracer(), Workload(256, 256))
    run_on(
        card,
        traced,
        holds=lambda ran: (h,) if (h := predicted(architecture, ran.shapes)) else (),
        cublas_bytes=8_519_680,
    )
    return write(tmp_path_factory.mktemp("run") / "run.pickle", card.snapshot())


def test_a_run_of_anybody_becomes_a_table_and_a_figure(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The workload from the options, plain values on stdout, files where they were asked for, and a trace that takes them."""
    table, figure = tmp_path / "mine.json", tmp_path / "mine.png"
    words = ["calibrate", str(run), *SIZE, "--gpu", "V100", "--json", "--out", str(table), "--figure", str(figure)]
    assert main(words) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert found["card"] == "v100" and found["source"] == "recorded"
    (one,) = found["runs"]
    assert one["allocations_found"] == one["allocations_traced"] > 4000
    assert one["stage_peaks_bytes"]["trace_after"] == one["stage_peaks_bytes"]["card"]
    assert {k["held_bytes"] for k in one["kernels"]} - {0}
    assert read_table(table).cublas_bytes == 8_519_680
    assert figure.stat().st_size > 20_000
    assert f"wrote {table}" in err and f"wrote {figure}" in err
    assert main(["explain", "--height", "256", "--width", "256", "--kernels", str(table)]) == 0
    assert "workspace of the kernel" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--height", "512", "--width", "512"], 1, "this is no run of 512x512"),
        ([*SIZE, "--attention", "eager", "--dtype", "float32"], 1, "this is no run of 256x256"),
        ([], 2, "give --height"),
        ([*SIZE, "--kernels", "nothing.json"], 1, "cannot read the workspace table 'nothing.json'"),
        ([*SIZE, "--device", "7"], 1, "no history of device 7"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_is_said(
    run: Path, words: list[str], code: int, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line, with the exit code of its kind, and nothing on stdout."""
    assert main(["calibrate", str(run), *words]) == code
    out, err = capfd.readouterr()
    assert says in err and not out
    assert code == 2 or sum(line.startswith("sdfit:") for line in err.splitlines()) == 1


def test_the_snapshot_is_never_written_over(run: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """--out on the file that was read, whatever its name, is refused."""
    same = tmp_path / "run.json"
    content = run.read_bytes()
    same.write_bytes(content)
    assert main(["calibrate", str(same), *SIZE, "--gpu", "v100", "--out", str(same)]) == 1
    assert "it is what this is made of" in capfd.readouterr().err
    assert same.read_bytes() == content


def test_a_file_that_says_what_cannot_be_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], run: Path
) -> None:
    """What ran stands in the files of sdfit sweep; a workload that is none is one line."""
    content = pickle.loads(run.read_bytes())
    path = write(tmp_path / "s.pickle", content | {"sdfit": {"workload": {"height": -1}, "environment": {}}})
    assert main(["calibrate", str(path)]) == 1
    assert "says of its run what cannot be" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--history", "--backend", "trace"], "--history records what a card's allocator does"),
        (["--kernels", "t4"], "--kernels is for --backend trace"),
    ],
)
def test_sweep_refuses_what_makes_no_sense(words: list[str], says: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A trace has no history, and a card brings its own kernels."""
    assert main(["sweep", "--gpu", "t4", "--grid", "quick", *words]) == 2
    assert says in " ".join(capfd.readouterr().err.split())
