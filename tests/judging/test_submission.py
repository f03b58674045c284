"""Records that somebody sends: what is wrong with them is named, what is right goes through."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from sdfit.cli import main
from sdfit.equation.weights import component_bytes
from sdfit.files import shipped
from sdfit.judging.submission import check_environment, check_submission
from sdfit.predict.loading import load_artifact
from sdfit.predict.predictor import Predictor
from sdfit.predict.simulation.workspaces import ARCHITECTURES
from sdfit.records import Record
from sdfit.sweep import grid

PLAN = grid.load("quick")
T4 = {
    "backend": "cuda", "gpu": "Tesla T4", "name": "t4", "compute_capability": "7.5", "total_memory_bytes": 15_828_320_256,
    "driver": "550.54.15", "cuda": "12.4", "cudnn": 90100, "torch": "2.6.0+cu124", "diffusers": "0.42.1",
    "transformers": "5.23.0", "allocator_settings": "", "cudnn_benchmark": False, "idle_bytes": 3 << 20,
    "grid": PLAN.name, "grid_sha256": PLAN.sha256, "seed": PLAN.seed, "num_inference_steps": 2,
}  # fmt: skip
"""The environment that a sweep of a T4 writes; its rows here are made up from the shipped model."""


@pytest.fixture(scope="module")
def rows() -> list[Record]:
    """What a T4 that is exactly like its model would have recorded of the quick grid."""
    f = Predictor(load_artifact(shipped("models") / "sm75.joblib"))
    found = []
    for i, w in enumerate(PLAN.workloads):
        peaks = {stage: round(peak) for stage, peak in f.predict_workload(w).stage_peaks.items()}
        top = max(peaks.values())
        found.append(
            Record(
                i, w, "ok", peaks, component_bytes(w), top, top + (100 << 20), top + (300 << 20),
                baseline_bytes=round(min(f.variant(w.variant).weights.values())),
            )
        )  # fmt: skip
    return found


@pytest.fixture
def send(tmp_path: Path, rows: list[Record]) -> Callable[..., Path]:
    """Write a records file, changed as wanted."""

    def write(changed: dict[int, dict[str, Any]] | None = None, more: list[Record] | None = None, **facts: Any) -> Path:
        path = tmp_path / "sent.jsonl"
        lines = [{"sdfit_records": 1, "environment": T4 | facts}]
        lines += [asdict(replace(r, **(changed or {}).get(r.index, {}))) for r in [*rows, *(more or [])]]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return path

    return write


def errors(path: Path) -> str:
    return "\n".join(f"{f.kind}: {f.message}" for f in check_submission(path).verdict if f.severity == "error")


def test_what_a_sweep_wrote_goes_through(send: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """No error, exit code 0, and a note on how far it is from the model of its kernels."""
    path = send()
    assert errors(path) == ""
    assert main(["records", "check", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "44 rows of Tesla T4, backend cuda, grid quick" in shown and shown.rstrip().endswith("can be sent")
    assert "beside the model 'sm75': 0.00% off in the median" in shown


def test_each_mistake_is_named(send: Callable[..., Path], rows: list[Record]) -> None:
    """Environment, order, duplicates, physics: each spoilt in turn, and said so, with the row where there is one."""
    peak = rows[5].allocated_bytes or 0
    big = {stage: 3 * value for stage, value in rows[7].stage_peaks_bytes.items()}
    assert "is a simulation" not in errors(send()) and "simulation" in errors(send(backend="trace"))
    assert "it does not say driver" in errors(send(driver=None))
    assert "the driver's name means 't4'" in errors(send(name="t40"))
    assert "compute capability 8.6, where a t4 has 7.5" in errors(send(compute_capability="8.6"))
    assert "cudnn.benchmark was on" in errors(send(cudnn_benchmark=True))
    swapped = {3: {"workload": rows[4].workload}}
    assert "order: row 3 " in errors(send(swapped)) and "is not what the grid 'quick' has" in errors(send(swapped))
    again = replace(rows[5], allocated_bytes=peak + (200 << 20), stage_peaks_bytes={"unet": peak + (200 << 20)})
    assert "duplicate: row 5 " in errors(send(more=[again])) and "ran twice" in errors(send(more=[again]))
    assert "physics: row 5 " in errors(send({5: {"allocated_bytes": peak // 2}}))
    assert "less than allocated" in errors(send({5: {"reserved_bytes": peak // 2}}))
    assert "less is live in unet than the weights" in errors(
        send({5: {"stage_peaks_bytes": rows[5].stage_peaks_bytes | {"unet": 1000}}})
    )
    assert "another model ran" in errors(send({5: {"component_bytes": rows[5].component_bytes | {"unet": 5 << 30}}}))
    far = {
        7: {
            "stage_peaks_bytes": big,
            "allocated_bytes": max(big.values()),
            "reserved_bytes": None,
            "device_bytes": None,
        }
    }
    assert "+200% beside the model 'sm75'" in errors(send(far))


def test_doubts_are_warnings(send: Callable[..., Path]) -> None:
    """Another program on the card, another version of the grid, an unknown card: it can be sent, and is said."""
    for facts, words in (
        ({"idle_bytes": 3 << 30}, "another program was on the card"),
        ({"grid_sha256": "0" * 16}, "another version of the grid"),
        ({"grid": "mine"}, "no shipped grid 'mine'"),
        ({"allocator_settings": "expandable_segments:True"}, "cannot pool"),
        ({"total_memory_bytes": 8 << 30}, "is sold with 16 GiB"),
        ({"gpu": "NVIDIA X1", "name": "x1"}, "add a row to sdfit/predict/cards.csv"),
    ):
        checked = check_submission(send(**facts))
        assert checked.accepted and any(words in f.message for f in checked.verdict), words


def test_a_simulation_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The shipped traces are no card's records: exit code 3, and --json says the same."""
    path = "data/sm90/2026-11-28-breadth-trace.jsonl.gz"
    assert main(["records", "check", path, "--json"]) == 3
    (told,) = json.loads(capsys.readouterr().out)
    assert told["accepted"] is False and told["findings"][0]["kind"] == "environment"
    assert check_environment({"backend": "fake"})[0].severity == "error"


def test_files_that_are_none_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing file and one without a run that succeeded."""
    assert main(["records", "check", str(tmp_path / "none.jsonl")]) == 1
    assert "cannot read records" in capsys.readouterr().err
    path = tmp_path / "empty.jsonl"
    path.write_text(json.dumps({"sdfit_records": 1, "environment": T4}) + "\n")
    assert "none of the 0 runs succeeded" in errors(path)


def test_every_architecture_that_can_be_sent_has_a_model() -> None:
    """So that each card's records can be set beside one."""
    from sdfit.fit.priors import model_of_kernels

    assert all(model_of_kernels({"name": name}) is not None for name in ARCHITECTURES)
