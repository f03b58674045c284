"""The notebook that calibrates a lent card: whole, clean, and executed with a simulated one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sdfit.cli import cli

PATH = Path(__file__).parent.parent / "sweeps" / "colab.ipynb"
nbformat = pytest.importorskip("nbformat")


def cells(kind: str) -> list[Any]:
    return [cell for cell in nbformat.read(PATH, as_version=4).cells if cell.cell_type == kind]


def test_it_is_valid_and_holds_no_output() -> None:
    """It is a notebook of the current format, each code cell compiles, and nothing of a run was left in it."""
    nbformat.validate(nbformat.read(PATH, as_version=4))
    for cell in cells("code"):
        compile(cell.source, "cell", "exec")
        assert not cell.outputs and cell.execution_count is None


def test_it_goes_from_nothing_to_a_pull_request() -> None:
    """Install, sweep, fit, evaluate, figure, check, download and how to send, in this order; each command and option exists."""
    source = "\n".join(cell.source for cell in cells("code"))
    steps = ['"pip", "install"', '"sweep"', '"fit"', '"evaluate"', "Image(", '"records", "check"', "colab.download"]
    places = [source.index(step) for step in steps]
    assert places == sorted(places)
    assert "pull request" in cells("markdown")[-1].source and "--budget 3m" in source
    known = {name: {o for p in command.params for o in p.opts} for name, command in cli.commands.items()}
    for name, rest in re.findall(r'sdfit\("(\w+)"([^\n]*)\)', source):
        assert set(re.findall(r'"(--[a-z-]+)"', rest)) <= known[name], name
    assert {"--budget"} <= known["sweep"]


def test_it_says_where_sdfit_is_to_come_from(tmp_path: Path) -> None:
    """It is in no index: an upload is found, an address or a folder is taken, and with none of them one sentence says so."""
    (cell,) = (cell.source for cell in cells("code") if '"pip", "install"' in cell.source)
    room: dict[str, Any] = {}
    exec(cell, room)  # sdfit is there, so nothing is installed
    assert room["SOURCE"] == ""
    with pytest.raises(SystemExit, match=r"upload sdfit-\*.whl, or fill in SOURCE"):
        room["requirement"]("", [tmp_path])
    assert (
        room["requirement"]("git+https://example.org/a/b", []) == "sdfit[sweep,fit,plot] @ git+https://example.org/a/b"
    )
    assert room["requirement"]("/content/sdfit", []) == "/content/sdfit[sweep,fit,plot]"
    wheel = tmp_path / "upload" / "sdfit-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    assert room["requirement"]("", [tmp_path]) == f"{wheel}[sweep,fit,plot]"


@pytest.mark.slow
def test_it_runs_with_a_simulated_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell runs, in a folder of its own, on a traced T4: a model is written, shown, and its records refused as no card's."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for name, value in {"GPU": "t4", "BACKEND": "trace", "SWEEP": "--runs 3", "HOLDOUT": "--runs 2"}.items():
        monkeypatch.setenv(f"SDFIT_NOTEBOOK_{name}", value)
    monkeypatch.setenv("PYTHONPATH", str(PATH.parent.parent))
    book = nbformat.read(PATH, as_version=4)
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "\n".join(o.get("text", "") for cell in book.cells for o in cell.get("outputs", []))
    assert "3 runs correct the prior 'sm75'" in said and "768x768, two images:" in said
    assert "a simulation, which is no record of a card" in said
    assert any("image/png" in o.get("data", {}) for cell in book.cells for o in cell.get("outputs", []))
    assert (tmp_path / "models" / "sm75.joblib").is_file() and list(tmp_path.glob("data/sm75/*-default-trace.jsonl"))
