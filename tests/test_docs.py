"""The documents say what the code does: every block of the READMEs is run, and every registered file is what it was."""

from __future__ import annotations

import doctest
import hashlib
import re
import shlex
import warnings
from pathlib import Path

import pytest

from sdfit.cli import main
from sdfit.errors import SimulatedModelWarning
from sdfit.predict.library import load
from sdfit.sweep import grid

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *(ROOT / part / "README.md" for part in ("sweeps", "data", "models"))]
HOUSE = ROOT / "sdfit" / "README.md"
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(kind: str) -> list[object]:
    """Every fenced block of a kind in the READMEs, unless it says that it is not run."""
    return [
        pytest.param(match[3], id=f"{path.relative_to(ROOT)}:{path.read_text()[: match.start()].count(chr(10)) + 1}")
        for path in DOCUMENTS
        for match in BLOCK.finditer(path.read_text(encoding="utf-8"))
        if match[1] == kind and "not-run" not in match[2]
    ]


@pytest.mark.parametrize("text", blocks("python"))
def test_python_blocks_give_the_output_they_show(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python block is a session that can be run."""
    monkeypatch.chdir(ROOT)
    example = doctest.DocTestParser().get_doctest(text, {}, "README", None, None)
    assert example.examples, "a python block without a prompt shows nothing"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SimulatedModelWarning)
        failed, _ = doctest.DocTestRunner(optionflags=FLAGS).run(example)
    assert not failed


@pytest.mark.parametrize("text", blocks("console"))
def test_console_blocks_give_the_output_they_show(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A console block holds commands, each with the output that follows it; ``...`` stands for any."""
    monkeypatch.chdir(ROOT)
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, wanted = part.partition("\n")
        words = shlex.split(command, comments=True)
        assert words[0] == "sdfit", f"only sdfit's own commands can be shown as run, not '{command}'"
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SimulatedModelWarning)
            main(words[1:])
        got = capsys.readouterr().out
        assert doctest.OutputChecker().check_output(wanted, got, FLAGS), (
            f"{command}\n--- shown\n{wanted}\n--- got\n{got}"
        )


@pytest.mark.parametrize("text", blocks("toml"))
def test_grid_blocks_are_grids(text: str, tmp_path: Path) -> None:
    """A TOML block is a grid that can be planned."""
    path = tmp_path / "shown.toml"
    path.write_text(text, encoding="utf-8")
    assert len(grid.load(str(path)).workloads) > 1


def test_every_command_is_in_the_readme() -> None:
    """No command exists that the README does not name."""
    from sdfit.cli import cli

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in cli.commands if f"sdfit {name}" not in text]
    assert not missing


@pytest.mark.parametrize("path", [*DOCUMENTS, HOUSE], ids=lambda path: str(path.relative_to(ROOT)))
def test_options_that_are_named_exist(path: Path) -> None:
    """Whatever a README shows or mentions as ``sdfit <command> --option``, run or not, the command takes."""
    from sdfit.cli import cli
    from sdfit.study.lab.commands import lab

    text = path.read_text(encoding="utf-8")
    unknown = []
    for program, group in (("sdfit", cli), ("python -m sdfit.study.lab", lab)):
        for name, rest in re.findall(rf"(?:^\$ |`){re.escape(program)} ([a-z]+)([^`\n#]*)", text, re.MULTILINE):
            command = group.commands.get(name)
            known = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)} if command else set()
            unknown += [f"{program} {name} {flag}" for flag in re.findall(r"--[a-z][a-z-]*", rest) if flag not in known]
            unknown += [] if command else [f"{program} {name}"]
    assert not unknown


def test_the_plan_of_the_house_names_what_is_there() -> None:
    """Every path in sdfit/README.md exists, every folder of sdfit/ has its line, and so has every module at the top."""
    text = HOUSE.read_text(encoding="utf-8")
    named = re.findall(r"`([\w./-]+(?:\.py|\.toml|/))`", text)
    homes = (HOUSE.parent, HOUSE.parent / "study", HOUSE.parent / "backends", ROOT)
    assert not [name for name in named if not any((home / name).exists() for home in homes)]
    package = [p for p in HOUSE.parent.iterdir() if not p.name.startswith("_")]
    rooms = [f"{p.name}/" for p in package if (p / "__init__.py").is_file()] + [
        p.name for p in package if p.suffix == ".py"
    ]
    assert len(rooms) == len(set(rooms)) >= 14 and not set(rooms) - set(named)
    assert not [name for name in re.findall(r"`(_[A-Z]+|[A-Z]{5,})`", text) if not _defined(name)]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert not set(re.findall(r"`make ([a-z-]+)`", text)) - set(targets)


def _defined(name: str) -> bool:
    """Whether a table of that name is defined in a module that the plan sends the reader to."""
    modules = ("workload.py", "equation/terms.py", "equation/stages.py")
    return any(re.search(rf"^{name}\b", (HOUSE.parent / m).read_text(encoding="utf-8"), re.MULTILINE) for m in modules)


@pytest.mark.parametrize("folder", ["data", "models"])
def test_registered_files_are_what_they_were(folder: str) -> None:
    """Every file under data/ and models/ has the sha256 that the registry names, and none is missing from it."""
    home = ROOT / folder
    lines = (home / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    registered = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    present = {
        str(path.relative_to(home)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in home.rglob("*")
        if path.is_file() and path.name != "SHA256SUMS"
    }
    assert registered == present


def test_the_grids_of_the_table_hold_as_many_runs_as_it_says() -> None:
    """The table in sweeps/README.md names every shipped grid with its number of runs."""
    text = (ROOT / "sweeps" / "README.md").read_text(encoding="utf-8")
    shown = {name: int(runs) for name, runs in re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", text, re.MULTILINE)}
    assert shown == {p.stem: len(grid.load(str(p)).workloads) for p in (ROOT / "sweeps").glob("*.toml")}


def test_the_coefficients_of_the_notes_are_those_of_the_model() -> None:
    """The column 'fitted' in models/README.md repeats the shipped T4 model."""
    text = (ROOT / "models" / "README.md").read_text(encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SimulatedModelWarning)
        stages = load("sm75").artifact.stages
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \| (\d) \| [^|]+\| ([0-9.,e-]+) \|", text, re.MULTILINE)
    assert len(rows) >= 6
    for key, term, regime, shown in rows:
        stage = stages[key.replace("/", "|")]
        value = stage["coef"][stage["regimes"][int(regime)]][stage["terms"].index(term)]
        assert float(shown.replace(",", "")) == pytest.approx(value, rel=5e-4), (key, term)
