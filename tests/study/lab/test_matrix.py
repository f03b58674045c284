"""Other software: what moved is told to the byte, what lacks is named; the wheel predicts away from the checkout."""

from __future__ import annotations

import re
import sys
import tomllib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from worlds import run

from sdfit.backends.fake import FakeBackend
from sdfit.errors import SdfitError
from sdfit.records import Record
from sdfit.study.lab import matrix
from sdfit.study.lab.matrix import Place
from sdfit.sweep import grid
from sdfit.workload import Workload

KINDS = [Workload(512, 512), Workload(512, 512, attention="math"), Workload(512, 512, offload="model")]


def test_a_release_that_moves_memory_is_told_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each amount that differs, by how much and in which variant; a workload that a release cannot run, with its reason."""
    reference = dict(enumerate(run(FakeBackend(), KINDS)))
    allocated = reference[1].allocated_bytes
    assert allocated is not None
    moved = {
        0: reference[0],
        1: replace(reference[1], allocated_bytes=allocated - 512),
        2: Record(2, KINDS[2], "crash", message="no hooks"),
    }
    monkeypatch.setattr(matrix, "_traced", lambda place: moved)
    peak, words = matrix._compared(Place(sys.executable, tmp_path, ()), reference)
    assert peak == f"{reference[0].allocated_bytes} B"
    assert (
        words
        == "1 of 3 the same to the byte; float16 math: allocated_bytes -512 B; float16 sdpa offload=model: no hooks"
    )

    def nothing(place: Place) -> dict[int, Record]:
        raise SdfitError("no trace: no import")

    monkeypatch.setattr(matrix, "_traced", nothing)
    assert matrix._compared(Place(sys.executable, tmp_path, ()), reference) == ("", "no trace: no import")


def test_the_grid_of_releases_holds_each_kind_once() -> None:
    """Every attention kernel that has a size of its own, every offload, both VAEs; the first row of the tables among them."""
    workloads = grid.load("releases").workloads
    assert Workload(512, 512) in workloads
    assert {w.offload for w in workloads} == {"none", "model", "sequential", "group_block", "group_leaf"}
    assert {w.vae for w in workloads} == {"kl", "tiny"} and {"eager", "math", "sliced"} <= {
        w.attention for w in workloads
    }


def test_the_oldest_is_what_the_project_declares() -> None:
    """Each dependency of the base and of fitting has a release to begin with, and is pinned to it."""
    project = tomllib.loads((matrix.CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = matrix.declared(project, ("fit", "plot"))
    assert {pin.split("==")[0] for pin in pins} >= {"numpy", "joblib", "click", "rich", "scipy", "matplotlib"}
    assert all(re.fullmatch(r"[a-z-]+==[0-9.]+", pin) for pin in pins)


def test_the_python_that_runs_this_is_found() -> None:
    """By its version, and it runs; its place does not see the checkout's path unless it is told."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if version not in matrix.PYTHONS:
        pytest.skip("another Python than those of the matrix")
    ran = Place(matrix.pythons()[version], Path("/"), ()).run("--version")
    assert ran.stdout.startswith(f"Python {version}.")


def test_a_wheel_that_lacks_or_changes_a_file_is_told(tmp_path: Path) -> None:
    """By name: one that is not there, one of other content; the list of contents may differ."""
    paths = []
    for name, files in {"one": {"a": "1", "b": "2", "x/RECORD": "3"}, "two": {"a": "0", "x/RECORD": "4"}}.items():
        paths.append(tmp_path / name)
        with zipfile.ZipFile(paths[-1], "w") as file:
            for inside, text in files.items():
                file.writestr(inside, text)
    assert matrix._complete(*paths) == "differ in a, b"
    assert matrix._complete(paths[0], paths[0]) == "built; the same 2 files as of the checkout"


@pytest.mark.slow
def test_the_wheel_predicts_away_from_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base install of the built wheel, in a fresh environment, says what the checkout says; the sdist builds too."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    monkeypatch.setattr(matrix, "PYTHONS", (version,))
    source, here = matrix.wheels(tmp_path)
    assert (
        source[-1].startswith("built; the same ") and here[0] == f"Python {version}" and here[-1] == "predicts the same"
    )
