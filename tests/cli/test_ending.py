"""How a command ends: by a signal at any moment, in a folder that is gone, without memory, and what it leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdfit.cli import main
from sdfit.cli.demo import run_demo
from sdfit.cli.progress import Reporter
from sdfit.errors import INTERRUPTED, SdfitError

ROOT = Path(__file__).parents[2]


def python(code: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A program that has `sdfit`, in a folder."""
    return subprocess.run(
        [sys.executable, *options, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_while_something_is_imported_ends_the_command(tmp_path: Path, name: str) -> None:
    """Also where what is imported swallows exceptions, or has C++ between itself and Python, as PyTorch has."""
    (tmp_path / "swallows.py").write_text(
        f"import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.{name})\n    time.sleep(5)\nexcept BaseException:\n    pass\n"
    )
    code = "import sys; sys.path.insert(0, '.')\nfrom sdfit.cli import _signals\nwith _signals():\n    import swallows\nprint('on')"
    ran = python(code, tmp_path)
    assert (ran.returncode, ran.stdout, ran.stderr.strip()) == (130, "", f"sdfit: {INTERRUPTED}")


def test_a_bar_that_was_begun_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal in the midst of its first picture, by when the cursor is hidden."""
    from rich.progress import Progress

    ended: list[Progress] = []

    def start(bar: Progress) -> None:
        raise KeyboardInterrupt

    def stop(bar: Progress) -> None:
        ended.append(bar)

    monkeypatch.setattr(sys, "stderr", open(os.devnull, "w"))  # noqa: SIM115, PTH123
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(Progress, "start", start)
    monkeypatch.setattr(Progress, "stop", stop)
    with pytest.raises(KeyboardInterrupt), Reporter("t4", 3):
        pass
    assert len(ended) == 1


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        (MemoryError(), "there is not enough memory in this machine, or for this process, to do it"),
        (OSError(24, "Too many open files"), "the system refuses: Too many open files"),
        (PermissionError(13, "Permission denied", "/x"), "'/x': Permission denied"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_system_lacks_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], raised: BaseException, says: str
) -> None:
    """And it is not said of the answer where nothing was answered."""

    def names() -> Any:
        raise raised

    monkeypatch.setattr("sdfit.predict.library.available", names)
    assert main(["models"]) == 1 and capfd.readouterr().err == f"sdfit: {says}\n"


def test_warnings_that_are_errors_elsewhere_are_notes(tmp_path: Path) -> None:
    """``python -W error`` is of the libraries; what sdfit says of its own model stays a note."""
    code = "from sdfit.cli import main; raise SystemExit(main(['predict', '--gpu', 't4', '--height', '64', '--width', '64']))"
    ran = python(code, tmp_path, "-W", "error")
    assert ran.returncode == 0 and ran.stderr.startswith("note: t4: ")


def test_a_demonstration_takes_away_only_what_one_left(tmp_path: Path) -> None:
    """Somebody's records of the names that it writes are refused, before anything runs, and stay."""
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps({"sdfit_records": 1, "environment": {"grid": "quick"}}) + "\n")
    before = path.read_bytes()
    with pytest.raises(SdfitError, match="is there and is not of a demo; choose another folder with --out"):
        run_demo(tmp_path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["records.jsonl"]


def test_a_missing_snapshot_is_said_before_torch_is_loaded(tmp_path: Path) -> None:
    """At once, with and without a table of kernels."""
    code = (
        "import sys; from sdfit.cli import main\n"
        "for more in ([], ['--kernels', 'none.json'], ['--gpu', 't4']):\n"
        "    assert main(['calibrate', 'none.pickle', *more]) == 1 and 'torch' not in sys.modules"
    )
    ran = python(code, tmp_path)
    assert ran.returncode == 0 and ran.stderr.count("cannot read the memory snapshot 'none.pickle'") == 3


def test_a_level_that_is_none_is_said_though_no_picture_can_be_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It was said of each picture that could be read, and of none where none could."""
    pytest.importorskip("PIL")
    (tmp_path / "x.png").write_bytes(b"none")
    assert main(["check", "--gpu", "t4", "--memory", "8GiB", "--level", "5", str(tmp_path)]) == 2
    assert "level is 5.0; it must lie between 0 and 1" in capfd.readouterr().err


def test_a_maker_is_no_card(capfd: pytest.CaptureFixture[str]) -> None:
    """What is advised can be typed."""
    assert main(["predict", "--gpu", "nvidia", "--height", "64", "--width", "64"]) == 1
    told = capfd.readouterr().err
    assert "or auto for the card in this machine" in told and "unnamed" not in told
