"""What a command line is expected to do: help, completion, colour, progress, quiet, plain values."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from sdfit.cli import cli
from sdfit.cli.demo import UNSEEN
from sdfit.predict.library import available, load
from sdfit.study.lab.commands import lab
from sdfit.sweep import grid

PROGRAM = "import sys; from sdfit.cli import main; sys.argv[0] = 'sdfit'; sys.exit(main())"
SWEEP = ("sweep", "--backend", "fake", "--gpu", "slow", "--grid", "quick")


def environment(**more: str) -> dict[str, str]:
    """The environment without what the tests set."""
    left = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "SDFIT_QUIET", "COLUMNS")}
    return left | {"PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm-256color"} | more


def completed(words: str) -> set[str]:
    """What the shell would offer for the last word."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True,
        env=environment(_SDFIT_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(len(words.split(" ")) - 1)),
    )  # fmt: skip
    return {line.partition(",")[2] for line in ran.stdout.splitlines()}


def test_the_shell_completes_commands_options_cards_models_and_grids() -> None:
    """Each of them by what was begun of it."""
    assert completed("sdfit pre") == {"predict"}
    assert "--guidance-scale" in completed("sdfit predict --g")
    assert {"rtx3060", "rtx3060ti"} <= completed("sdfit fits --gpu rtx30") and "t4" in completed("sdfit sweep --gpu t")
    assert completed("sdfit predict --gpu sm7") == {name for name in available() if name.startswith("sm7")} != set()
    assert completed("sdfit sweep --grid qui") == {"quick"}
    assert completed("sdfit predict --attention sliced_m") == {"sliced_max"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_that_the_help_names_is_there(shell: str) -> None:
    """`_SDFIT_COMPLETE=<shell>_source sdfit` prints what the shell is to read."""
    if shell == "bash" and not Path("/bin/bash").exists():
        pytest.skip("no bash here")
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True,
        env=environment(_SDFIT_COMPLETE=f"{shell}_source"),
    )  # fmt: skip
    assert "_SDFIT_COMPLETE" in ran.stdout and f"{shell}_source" in str(cli.epilog)


@pytest.mark.parametrize("group", [cli, lab], ids=["sdfit", "lab"])
def test_every_option_and_command_says_what_it_is(group: click.Group) -> None:
    """No option without a sentence, no command without one, and the list of commands cuts none short."""
    silent = [
        f"{name} {option.opts[0]}"
        for name, command in group.commands.items()
        for option in command.params
        if isinstance(option, click.Option) and not option.help
    ]
    assert not silent
    assert all(command.help for command in group.commands.values())
    if group is cli:
        told = " ".join(group.get_help(click.Context(group, info_name="sdfit")).split())
        firsts = [" ".join((c.help or "").split("\n\n")[0].split()) for c in group.commands.values()]
        assert all(first in told for first in firsts) and all(len(first) < 170 for first in firsts)


def test_every_command_that_answers_has_json() -> None:
    """`--json`, all of them."""
    every = {n: c for name, group in cli.commands.items() for n, c in getattr(group, "commands", {name: group}).items()}
    assert all(any("--json" in p.opts for p in command.params) for command in every.values())


def test_a_plan_of_few_runs_is_json_too(tmp_path: Path) -> None:
    """The runs in their order, each as a workload of the grid, and how sure the model would be after it."""
    few = ("sweep", "--gpu", "t4", "--backend", "trace", "--grid", "quick", "--runs", "3", "--dry-run", "--json")
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *few], cwd=tmp_path, env=environment(), text=True, capture_output=True, check=True,
    )  # fmt: skip
    told, plan = json.loads(ran.stdout), grid.load("quick")
    assert told["prior"] == "sm75" and told["runs"] == len(plan.workloads) and len(told["planned"]) == 3
    for step in told["planned"]:
        assert step["workload"] == plan.workloads[step["index"]].to_dict() and 0 < step["interval_then"] < 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_demonstration_is_json_too(tmp_path: Path) -> None:
    """Every run that it did not fit, what was estimated, what came of it, and the error between the two."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, "demo", "--json"], cwd=tmp_path, env=environment(), text=True, capture_output=True, check=True,
    )  # fmt: skip
    told = json.loads(ran.stdout)
    assert told["provenance"] == "published" and len(told["unseen"]) == len(UNSEEN)
    for row in told["unseen"]:
        assert row["error"] == pytest.approx(row["estimated_bytes"] / row["actual_bytes"] - 1, abs=1e-8)
        low, high = row["interval_bytes"]
        assert low <= row["estimated_bytes"] <= high and isinstance(row["fits"], bool)
    assert (tmp_path / told["folder"] / "model.joblib").is_file()


def test_a_sweep_tells_what_it_did_as_json(tmp_path: Path) -> None:
    """Files and counts on stdout; the plan too."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *SWEEP, "--json"], cwd=tmp_path, env=environment(), text=True, capture_output=True, check=True,
    )  # fmt: skip
    told = json.loads(ran.stdout)
    assert told == {"paths": told["paths"], "done": 44, "total": 44, "oom": 0, "crashed": 0, "disturbed": 0, "skipped": 0, "complete": True}  # fmt: skip
    assert all((tmp_path / path).is_file() for path in told["paths"])
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *SWEEP, "--json", "--dry-run"], cwd=tmp_path, env=environment(), text=True, capture_output=True, check=True,
    )  # fmt: skip
    assert json.loads(ran.stdout)["runs"] == 44


def test_progress_in_a_pipe_is_plain_lines(tmp_path: Path) -> None:
    """Counts and the time left, no control characters."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *SWEEP], cwd=tmp_path, text=True, capture_output=True, check=True,
        env=environment(SDFIT_FAKE=json.dumps({"delay_s": 0.01})),
    )  # fmt: skip
    first = ran.stderr.splitlines()[0]
    assert re.fullmatch(r"slow quick: \d+/44 done, 0 out of memory, 0 crashed, about \d+ s left", first)
    assert "\x1b" not in ran.stderr + ran.stdout and "\r" not in ran.stderr


@pytest.mark.parametrize("colour", [True, False], ids=["colour", "NO_COLOR"])
def test_progress_on_a_terminal_is_a_bar_with_the_time_left(tmp_path: Path, colour: bool) -> None:
    """A bar, counts and an ETA; with NO_COLOR not one colour."""
    ours, theirs = pty.openpty()
    more = {"SDFIT_FAKE": json.dumps({"delay_s": 0.03}), "COLUMNS": "120"} | ({} if colour else {"NO_COLOR": "1"})
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *SWEEP], cwd=tmp_path, env=environment(**more),
        stdin=theirs, stderr=theirs, stdout=subprocess.PIPE,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the terminal is closed
            break
        if not part:
            break
        shown += part
    assert process.wait() == 0
    os.close(ours)
    text = shown.decode()
    assert "44/44" in text and "0 out of memory, 0 crashed" in text and re.search(r"\d:\d\d:\d\d", text) and "━" in text
    assert bool(re.search(r"\x1b\[[0-9;]*[34]\d", text)) == colour


@pytest.mark.filterwarnings("default::sdfit.errors.SimulatedModelWarning")
def test_notes_are_short() -> None:
    """What a shipped model says of itself when it is loaded fits on two lines of a terminal."""
    for name in ("t4", "rtx3060", "h100"):
        with pytest.warns(UserWarning) as caught:
            from sdfit.predict import library

            library._warned.clear()
            load(name)
        assert all(len(f"note: {warning.message}") <= 170 for warning in caught), [str(w.message) for w in caught]
