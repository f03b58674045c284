"""The command line: exit codes, what goes to stdout and what to stderr, and that --json is JSON."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sdfit.cli import cli, main
from sdfit.equation.metrics import METRICS
from sdfit.predict import library
from sdfit.predict.prediction import BEYOND
from sdfit.predict.predictor import Predictor
from sdfit.predict.simulation.library import shipped_library
from sdfit.records import read
from sdfit.units import format_bytes

pytestmark = pytest.mark.filterwarnings("default::sdfit.errors.SimulatedModelWarning")


class Ran(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]
SIZE = ("--height", "768", "--width", "512")


@pytest.fixture
def run(tmp_path: Path, fake_model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in an empty folder where the fake card's model can be found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDFIT_MODELS", str(fake_model.parent))
    monkeypatch.setattr(library, "_warned", set())
    monkeypatch.setattr("warnings.showwarning", None)  # `main` sets it; put back afterwards

    def run(*arguments: str) -> Ran:
        capfd.readouterr()
        code = main(list(arguments))
        out, err = capfd.readouterr()
        return Ran(code, out, err)

    return run


def test_help_and_version(run: Run) -> None:
    """Every command explains itself on stdout and exits 0."""
    assert run("--version").out.startswith("sdfit, version ")
    for name in (None, *cli.commands):
        ran = run(*([name] if name else []), "--help")
        assert ran.code == 0 and ran.out.startswith("Usage:") and not ran.err


def test_no_command_and_an_unknown_one_are_usage(run: Run) -> None:
    """Exit 2, and nothing on stdout."""
    for arguments in ((), ("swep",), ("predict", "--wide", "5")):
        ran = run(*arguments)
        assert ran.code == 2 and not ran.out and "Usage:" in ran.err


@pytest.mark.parametrize("command", ["predict", "fits", "largest", "advise", "strategies"])
def test_a_card_that_computes_half_precision_wrongly_is_asked_about_float32(
    command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where no dtype was chosen: the same answer as of float32, which says so, and offers no float16."""
    size = ("--memory", "12GiB") if command == "largest" else ("--height", "512", "--width", "512")
    said = []
    for chosen in ((), ("--dtype", "float32")):
        main([command, "--gpu", "gtx1660", *chosen, *size])
        said.append(capfd.readouterr().out.splitlines())
    assert said[0].pop() == "in float32, since this card computes float16 wrongly (black images)"
    assert said[0] == said[1] and not any("would fit with dtype" in line for line in said[0])


@pytest.mark.parametrize("command", ["predict", "fits", "largest", "advise"])
def test_a_card_that_computes_half_precision_wrongly_says_so_in_its_answer(
    command: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stdout, where no silenced note can hide it; nothing of it for float32, or of another card."""
    monkeypatch.setenv("SDFIT_QUIET", "1")
    size = () if command == "largest" else ("--height", "256", "--width", "256")
    for gpu, dtype, said in (("gtx1660", "float16", True), ("gtx1660", "float32", False), ("t4", "float16", False)):
        main([command, "--gpu", gpu, "--dtype", dtype, "--no-replay", *size])
        assert ("computes float16 wrongly" in capfd.readouterr().out) == said


def test_predict_answers_on_stdout(run: Run, f: Predictor) -> None:
    """Bytes, interval, stage and breakdown on stdout; that the model is not measured on stderr, once."""
    ran = run("predict", "--gpu", "fake", *SIZE, "--batch-size", "2", "--attention", "eager")
    assert ran.code == 0 and "set by the unet stage" in ran.out and "n·A²" in ran.out
    assert ran.err.startswith("note: fake: not measured") and "made-up card" in ran.err and ran.err.count("\n") == 1
    assert not run("predict", "--gpu", "fake", *SIZE).err
    first = [line.split()[2] for line in ran.out.splitlines()[:5]]
    assert first == ["required", "allocated", "reserved", "device", "minimum"]  # what decides comes first
    shown = json.loads(run("predict", "--gpu", "fake", *SIZE, "--json", "--metric", "required", "--level", "0.9").out)
    peak = f(768, 512, metric="required", level=0.9)
    told = json.loads(json.dumps(peak.to_dict()))
    assert shown == told | {"metrics": {"required": told}} and shown["required_bytes"] == round(peak)
    every = json.loads(run("predict", "--gpu", "fake", *SIZE, "--json").out)
    assert every["metric"] == "required" and set(every["metrics"]) == set(METRICS)
    assert "outside the swept domain" in run("predict", "--gpu", "fake", "--height", "6000", "--width", "6000").out


@pytest.mark.parametrize("metric", METRICS)
def test_the_parts_that_predict_prints_add_up_to_its_total(run: Run, metric: str) -> None:
    """The breakdown belongs to the metric that was asked for: as JSON to the byte, as text a line for each part."""
    asked = ("predict", "--gpu", "fake", *SIZE, "--batch-size", "2", "--metric", metric)
    shown = json.loads(run(*asked, "--json").out)
    parts = shown["breakdown_bytes"]
    assert sum(parts.values()) == pytest.approx(shown[f"{metric}_bytes"], abs=len(parts))  # each is rounded
    assert (BEYOND in parts) == (metric != "allocated")
    first, *rest = run(*asked).out.splitlines()
    assert first.strip().startswith(f"{format_bytes(shown[f'{metric}_bytes'])} {metric} ")
    lines = [line.strip() for line in rest if line.startswith("  ")]
    for line, (name, part) in zip(lines, parts.items(), strict=True):
        assert line.startswith(f"{format_bytes(part)}  {name} ")


def test_predict_takes_the_size_of_a_picture(run: Run, tmp_path: Path, f: Predictor) -> None:
    """--image stands for height and width; a file that is no picture is a known failure."""
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (512, 768)).save(tmp_path / "photo.png")
    shown = json.loads(run("predict", "--gpu", "fake", "--image", "photo.png", "--json", "--metric", "allocated").out)
    assert shown["allocated_bytes"] == round(f(768, 512))
    (tmp_path / "x.png").write_text("no picture")
    for name in ("x.png", "none.png"):
        ran = run("predict", "--gpu", "fake", "--image", name)
        assert ran.code == 1 and f"cannot read a picture from '{name}'" in ran.err and not ran.out


def test_what_was_never_swept_is_told_in_parts_too(run: Run) -> None:
    """`sdfit predict` of a combination that the model has no coefficients for: weights, activations, the allocator's part."""
    ran = run("predict", *SIZE, "--gpu", "t4", "--dtype", "float32", "--attention", "sliced_2")
    assert ran.code == 0 and re.search(r"activations +what that stage holds above them, simulated", ran.out)


def test_required_memory_is_simulated_where_it_can_be(run: Run) -> None:
    """Eager attention packs in jumps: alone the equation says "may fit", a replay says which; each says what it is."""
    size = ("--gpu", "t4", "--height", "880", "--width", "880", "--attention", "eager")
    asked = (*size, "--memory", "12GiB")
    alone, settled = run("fits", *asked, "--no-replay"), run("fits", *asked)
    assert alone.out.startswith("may fit") and "simulated" not in alone.out
    assert (
        settled.out.startswith("fits: required ")
        and "(level 0.974, the most that 38 runs support, simulated)" in settled.out
    )
    answer = json.loads(run("fits", *asked, "--json").out)
    assert answer["answer"] == "fits" and answer["replayed"] and answer["upper_bytes"] < 12 * 2**30
    predicted = json.loads(run("predict", *size, "--json").out)["metrics"]
    assert (
        predicted["required"]["required_bytes"] == answer["required_bytes"] and not predicted["allocated"]["replayed"]
    )
    fake = run("predict", "--gpu", "fake", *SIZE)
    assert fake.code == 0 and "simulated" not in fake.out  # a made-up card's model does not rest on traces


def test_fits_says_no_with_exit_code_3(run: Run) -> None:
    """0 if it fits, 3 if not, with the options that would make it fit; both as JSON too."""
    yes = run("fits", "--gpu", "fake", *SIZE, "--memory", "16GiB")
    assert yes.code == 0 and yes.out.startswith("fits: required ") and "16.000 GiB as given" in yes.out
    eager = ("--height", "1024", "--width", "1024", "--attention", "eager", "--memory", "8GB")
    no = run("fits", "--gpu", "fake", *eager)
    assert no.code == 3 and no.out.startswith("does not fit") and "would fit with attention=sdpa" in no.out
    shown = json.loads(run("fits", "--gpu", "fake", *eager, "--json").out)
    assert shown["fits"] is False and shown["memory_bytes"] == 8 * 10**9
    assert shown["options"][0]["change"] == {"attention": "sdpa"}
    assert json.loads(run("fits", "--gpu", "fake", *SIZE, "--memory", "16GiB", "--json").out)["options"] == []


def test_may_fit_is_a_no_only_where_that_is_asked_for(run: Run, noisy: Predictor, tmp_path: Path) -> None:
    """Between the bounds the answer is may fit, with its chance in per cent: exit 0, and 3 with --strict."""
    noisy.artifact.save(tmp_path / "noisy.joblib")
    peak = noisy(768, 512, metric="required", level=0.9)
    asked = ("fits", "--gpu", "noisy.joblib", *SIZE, "--memory", f"{round(peak + 1)}B", "--level", "0.9")
    ran = run(*asked)
    assert ran.code == 0 and re.match(r"may fit, with a chance of \d\d %: required ", ran.out)
    assert run(*asked, "--strict").code == 3
    shown = json.loads(run(*asked, "--json").out)
    assert shown["answer"] == "may fit" and 0.2 < shown["chance"] < 0.8 and shown["margin_bytes"] < 0


def test_notes_are_silenced_by_an_option_and_a_variable(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """--quiet, or SDFIT_QUIET=1: the answer alone."""
    monkeypatch.delenv("SDFIT_QUIET", raising=False)
    asked = ("predict", "--gpu", "fake", *SIZE)
    monkeypatch.setattr("sdfit.predict.library._warned", set())
    assert run(*asked, "--quiet").err == ""
    monkeypatch.setenv("SDFIT_QUIET", "1")
    monkeypatch.setattr("sdfit.predict.library._warned", set())
    assert run(*asked).err == ""


EXAMPLES = [
    pytest.param(line.strip(), marks=[pytest.mark.slow] if line.split()[1] in ("demo", "derive", "identify") else [])
    for command in cli.commands.values()
    for line in (command.epilog or "").splitlines()
    if line.strip().startswith("sdfit ")
]


def test_every_command_has_an_example() -> None:
    """At the end of its help."""
    assert not [name for name, command in cli.commands.items() if f"sdfit {name}" not in (command.epilog or "")]


def run_of_a_card(path: Path) -> None:
    """A made-up card's memory snapshot of 512x512 in two steps."""
    pytest.importorskip("diffusers")
    from recorded import Recorder, run_on, write

    from sdfit.backends.trace.tracer import Tracer
    from sdfit.study.calibration.operations import operations_of
    from sdfit.workload import Workload

    card = Recorder()
    run_on(card, operations_of(Tracer(num_inference_steps=2), Workload(512, 512)), cublas_bytes=8_519_680)
    write(path, card.snapshot())


@pytest.mark.parametrize("line", EXAMPLES)
def test_the_examples_of_the_help_run(
    run: Run, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake_records: Path
) -> None:
    """As they stand: yes, no, or done, never a failure."""
    _, name, *words = shlex.split(line)
    monkeypatch.delenv("SDFIT_MODELS", raising=False)
    if name in ("check", "validate"):
        (tmp_path / "photos").mkdir()
        for picture in ("photo.jpg", "photos/one.png"):
            pytest.importorskip("PIL.Image").new("RGB", (96, 64)).save(tmp_path / picture)
    elif name == "calibrate":
        run_of_a_card(tmp_path / "run.pickle")
    elif name in ("fit", "sweep", "demo"):
        shutil.copytree(fake_records.parent, tmp_path / "data" / "fake")
    else:
        monkeypatch.chdir(Path(__file__).parents[2])
    if "--image" in words:
        pytest.importorskip("PIL.Image").new("RGB", (640, 512)).save(tmp_path / "photo.jpg")
        words[words.index("photo.jpg")] = str(tmp_path / "photo.jpg")
    ran = run(name, *words)
    assert ran.code in (0, 3) and ran.out, ran.err


def test_report_prints_a_card_or_writes_a_page(run: Run, f: Predictor, fake_records: Path) -> None:
    """The card on stdout, all coefficients as JSON, a page with given records judged in it, a folder for every model."""
    assert run("report", "--gpu", "fake").out.startswith("# fake\n")
    shown = json.loads(run("report", "--gpu", "fake", "--json").out)
    stages = f.artifact.stages.values()
    assert len(shown["coefficients"]) == sum(len(stage["coef"]) * len(stage["terms"]) for stage in stages)
    wrote = run("report", "--gpu", "fake", "--out", "fake.html", str(fake_records))
    assert wrote.code == 0 and wrote.out == "fake.html\n"
    page = Path("fake.html").read_text(encoding="utf-8")
    assert "Coverage on made-up runs" in page and '<svg class="figure"' in page
    assert "fake.html" in run("report", "--all", "--out", "site").out and Path("site", "index.html").exists()
    for wrong in (("--all",), ("--all", "--out", "s", "--json"), ("--json", "--out", "f.html"), (str(fake_records),)):
        ran = run("report", "--gpu", "fake", *wrong)
        assert ran.code == 2 and not ran.out, wrong


def test_largest_and_advise(run: Run, f: Predictor) -> None:
    """The same answers as in Python; nothing that fits is exit 3, on stderr."""
    shown = json.loads(run("largest", "--gpu", "fake", "--memory", "8GiB", "--aspect", "3:2", "--json").out)
    assert (shown["height"], shown["width"]) == f.largest(memory="8GiB", aspect=(3, 2))
    text = run("largest", "--gpu", "fake", "--memory", "8GiB", "--aspect", "3:2").out
    assert text.startswith(f"{shown['height']}x{shown['width']} (height x width) is sure to fit, ")
    none = run("largest", "--gpu", "fake", "--memory", "1GiB")
    assert none.code == 3 and not none.out and "no size of 1:1 is sure to fit" in none.err
    advice = json.loads(run("advise", "--gpu", "fake", *SIZE, "--memory", "8GiB", "--json").out)
    assert advice["max_batch_size"] == f.max_batch_size(768, 512, memory="8GiB") and advice["fits"] is True
    text = run("advise", "--gpu", "fake", *SIZE, "--memory", "1GiB")
    assert text.code == 0 and "does not fit" in text.out and "no batch of this size is sure to fit as it is" in text.out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("predict", *SIZE), 1, "there is no card in this machine"),
        (("predict", "--gpu", "fake"), 2, "give --height, or --image"),
        (("predict", "--gpu", "fake", "--height", "512"), 2, "give --width, or --image"),
        (("predict", "--gpu", "fake", "--height", "512.5", "--width", "512"), 2, "not a valid integer"),
        (("predict", "--gpu", "fake", "--height", "nan", "--width", "512"), 2, "not a valid integer"),
        (("predict", "--gpu", "fake", "--height", "0", "--width", "512"), 2, "height is 0; it must be from 64 to 16384"),
        (("predict", "--gpu", "fake", "--height", "-8", "--width", "512"), 2, "height is -8"),
        (("predict", "--gpu", "fake", "--height", "9" * 20, "--width", "512"), 2, "it must be from 64 to 16384"),
        (("predict", "--gpu", "fake", *SIZE, "--batch-size", "0"), 2, "batch_size is 0"),
        (("predict", "--gpu", "fake", *SIZE, "--prompt-length", "0"), 2, "prompt_length is 0"),
        (("predict", "--gpu", "fake", *SIZE, "--guidance-scale", "nan"), 2, "guidance_scale must be a finite number"),
        (("predict", "--gpu", "fake", *SIZE, "--dtype", "fp16"), 2, "'fp16' is not one of"),
        (("predict", "--gpu", "fake", *SIZE, "--metric", "peak"), 2, "metric is 'peak'"),
        (("predict", "--gpu", "fake", *SIZE, "--level", "95"), 2, "level is 95"),
        (("predict", "--gpu", "v9000", *SIZE), 1, "no model for 'v9000'; there are: "),
        (("predict", "--gpu", "none.joblib", *SIZE), 1, "cannot load 'none.joblib': No such file"),
        (("predict", "--gpu", "fake", *SIZE, "--dtype", "float32", "--vae", "tiny"), 1, "never swept"),
        (("fits", "--gpu", "fake", *SIZE), 2, "give --memory, as in 8GiB"),
        (("fits", "--gpu", "fake", *SIZE, "--memory", "free"), 2, "no card here whose free memory"),
        (("fits", "--gpu", "fake", *SIZE, "--memory", "12"), 2, "'12' has no unit; write 12GiB"),
        (("cards", "voodoo2"), 3, "no card matches 'voodoo2'"),
        (("fits", "--gpu", "fake", *SIZE, "--memory", "much"), 2, "'much' is not an amount of memory"),
        (("fits", "--gpu", "fake", *SIZE, "--memory", "8GiB", "--level", "0.99999"), 2, "too few scores for level"),
        (("largest", "--gpu", "fake", "--memory", "8GiB", "--height", "5"), 2, "--height is what this command finds"),
        (("largest", "--gpu", "fake", "--memory", "8GiB", "--aspect", "wide"), 2, "--aspect is 'wide'"),
        (("largest", "--gpu", "fake", "--memory", "8GiB", "--step", "7"), 2, "step is 7"),
        (("report", "--gpu", "v9000"), 1, "no model for 'v9000'"),
        (("fit",), 1, "there are no records to fit under ./data; type: sdfit sweep --gpu auto"),
        (("fit", "--gpu", "t4"), 1, "under ./data/t4; type: sdfit sweep --gpu t4"),
        (("fit", "none.jsonl"), 1, "cannot read records from 'none.jsonl': No such file"),
        (("sweep", "--grid", "fast", "--dry-run"), 1, "no grid 'fast'; there are: breadth, decisions, default, "),
        (("sweep", "--backend", "tpu"), 2, "'tpu' is not one of"),
        (("sweep", "--backend", "fake", "--grid", "quick", "--budget", "soon"), 2, "'soon' is not a time span"),
        (("sweep", "--backend", "fake", "--workers", "0"), 2, "0 is not in the range"),
        (("sweep", "--backend", "trace", "--weights", "some/folder"), 2, "--weights is 'some/folder'"),
        (("sweep", "--backend", "trace", "--devices", "0"), 2, "--devices is '0', a process for each card"),
        (("sweep", "--backend", "fake", "--devices", "0,5"), 1, "the cards asked for are '0,5', and there are 1"),
        (("sweep", "--backend", "fake", "--address", "auto"), 2, "--address is 'auto', of a Ray cluster; add --engine ray"),
        (("derive", "--height", "0"), 2, "height is 0"),
        (("compare", "none.jsonl"), 1, "none.jsonl"),
    ],
)  # fmt: skip
def test_failures_are_one_sentence_on_stderr(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    """A known failure exits 1, a wrong value or usage 2; stdout stays empty, nothing is written, no traceback."""
    ran = run(*arguments)
    assert (ran.code, ran.out) == (code, "") and words in ran.err and "Traceback" not in ran.err
    assert not list(tmp_path.iterdir())


def test_dry_run_prints_the_plan_and_runs_nothing(run: Run, tmp_path: Path) -> None:
    """How many runs, of what, on stdout; no file, no backend."""
    ran = run("sweep", "--gpu", "t4", "--dry-run")
    assert ran.code == 0 and re.match(r"default: \d{3} runs of 2 steps", ran.out) and not ran.err
    assert "float16 eager" in ran.out and not list(tmp_path.iterdir())


def test_the_two_commands_need_no_other_argument(run: Run, tmp_path: Path, f: Predictor) -> None:
    """Sweep, fit, predict by name: the records, the model and its card are where the next command looks for them."""
    swept = run("sweep", "--backend", "fake", "--gpu", "mine", "--grid", "quick")
    path = Path(swept.out.strip())
    assert swept.code == 0 and path.parent == Path("data/mine") and path.name.endswith("-quick.jsonl")
    assert "44 of 44 done, 0 out of memory, 0 crashed, 0 were there already" in swept.err
    fitted = run("fit")
    assert fitted.code == 0 and "wrote models/mine.joblib and mine.md" in fitted.err
    assert len(fitted.out.splitlines()) <= 25 and "on unseen resolutions" in fitted.out
    assert "0.0078125" in run("fit", "--json").out
    shown = json.loads(run("predict", "--gpu", "mine", *SIZE, "--json", "--metric", "allocated").out)
    assert shown["allocated_bytes"] == pytest.approx(f(768, 512), rel=1e-6) and shown["provenance"] == "fake"
    listed = json.loads(run("models", "--json").out)
    assert listed["mine"]["path"] == "models/mine.joblib" and "fake" in listed
    assert "mine" in run("models").out and "made-up card" in run("report", "--gpu", "mine").out


def test_out_of_memory_and_crashes_are_counted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep with failed runs says how many of which kind, and exits 0: the rows are there; the budget may leave some."""
    monkeypatch.setenv("SDFIT_FAKE", json.dumps({"capacity_bytes": 4 << 30, "crash_batch_size": 4}))
    ran = run("sweep", "--backend", "fake", "--grid", "quick", "--gpu", "small")
    rows = read(Path(ran.out.strip())).records
    oom, crashed = (sum(r.outcome == kind for r in rows) for kind in ("oom", "crash"))
    assert oom > 5 and crashed > 2 and ran.code == 0
    assert f"{44 - crashed} of 44 done, {oom} out of memory, {crashed} crashed" in ran.err
    assert f"note: {crashed} gave no answer however often they were tried" in ran.err
    ran = run(
        "sweep", "--backend", "fake", "--grid", "quick", "--gpu", "brief", "--budget", "0.001s", "--prior", "none"
    )
    assert ran.code == 0 and "not complete: run the same command to go on" in ran.err


def test_an_empty_name_is_no_file_and_no_model(run: Run, fake_records: Path) -> None:
    """As of a variable of the shell that was never set: one sentence, and no answer about something else."""
    for command in (["fit", str(fake_records), "--out", ""], ["compare", "--gpu", ""], ["explain", *SIZE, "--gpu", ""]):
        ran = run(*command)
        assert ran.code == 1 and not ran.out and ran.err.startswith("sdfit: ") and ran.err.count("\n") == 1


def test_cards_are_listed_with_what_answers_for_them(run: Run) -> None:
    """By a part of the name or by architecture, in words and as data; each line can be typed back."""
    from sdfit.predict.cards import find_card

    rows = json.loads(run("cards", "3060", "--json").out)
    assert {row["typed"] for row in rows} == {"rtx3060-8gb", "rtx3060-12gb", "rtx3060ti", "rtx3060laptop"}
    for row in rows:
        found = find_card(row["typed"])
        assert found is not None and found.memory_bytes == row["memory_bytes"] and row["architecture"] == "sm86"
        assert {"model", "rests_on", "half", "drives_screen", "context_bytes"} <= set(row)
    shown = run("cards", "sm90").out
    assert "NVIDIA H100 PCIe" in shown and "a100" not in shown and len(shown.splitlines()) > 5


def test_one_out_for_two_cards_is_refused(run: Run, tmp_path: Path, fake_records: Path) -> None:
    """The second model would overwrite the first; nothing is written."""
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "1.jsonl").write_bytes(fake_records.read_bytes())
    ran = run("fit", "--out", "one.joblib")
    assert ran.code == 2 and "--out is one file and there are records of a, b" in ran.err
    assert not (tmp_path / "one.joblib").exists()


def test_a_damaged_model_does_not_hide_the_others(run: Run, tmp_path: Path) -> None:
    """`models` lists what can be loaded and names what cannot."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "broken.joblib").write_bytes(b"cos\nsystem\n(Vtouch marker\ntR.")
    ran = run("models", "--json")
    assert ran.code == 0 and "fake" in json.loads(ran.out) and "cannot load 'models/broken.joblib'" in ran.err
    assert run("predict", "--gpu", "broken", *SIZE).code == 1
    assert not (tmp_path / "marker").exists()


def test_a_trace_under_other_releases_says_why_it_takes_long(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """One note that names each release that differs and the one that runs are simulated for; none where all are these."""
    environment, library = pytest.importorskip("sdfit.backends.environment"), shipped_library()
    sweep = ("sweep", "--backend", "trace", "--limit", "soon")  # it ends before a worker starts
    monkeypatch.setattr(environment, "releases", lambda: library.found_in)
    assert "runs are simulated for" not in run(*sweep).err
    here = {**library.found_in, "diffusers": "0.33.0", "accelerate": None}
    monkeypatch.setattr(environment, "releases", lambda: here)
    notes = [line for line in run(*sweep).err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and f"diffusers 0.33.0 ({library.found_in['diffusers']}), accelerate None" in notes[0]


def test_a_sweep_without_a_card_names_both_ways_on(run: Run, tmp_path: Path) -> None:
    """Another machine, or a trace; exit 1, and no records file."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("sdfit.backends.cuda")
    if torch.cuda.is_available():
        pytest.skip("there is a card here")
    ran = run("sweep", "--gpu", "t4")
    assert ran.code == 1 and not ran.out and "Traceback" not in ran.err
    assert "--backend trace" in ran.err and "machine" in ran.err
    assert not list(tmp_path.iterdir())


def test_ctrl_c_is_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted anywhere: one line on stderr and exit 130."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sdfit.predict.library.load", interrupted)
    ran = run("predict", "--gpu", "fake", *SIZE)
    assert ran.code == 130 and not ran.out and "interrupted" in ran.err


def test_a_reader_that_goes_away_is_no_failure(fake_model: Path) -> None:
    """`sdfit report | head -1` ends quietly."""
    environment = os.environ | {"SDFIT_MODELS": str(fake_model.parent)}
    command = f"{sys.executable} -m sdfit.cli report --gpu fake | head -1"
    ran = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and len(ran.stdout.splitlines()) == 1 and "Traceback" not in ran.stderr
    assert "BrokenPipe" not in ran.stderr


@pytest.mark.parametrize("how", ["closed", "full", "nobody reads"])
@pytest.mark.parametrize("number", [1, 2])
def test_streams_that_take_nothing(tmp_path: Path, number: int, how: str) -> None:
    """What cannot be said on stderr is lost, and the answer and its exit code are what they are; one that nobody can get is
    a failure, and one that nobody wants is none."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no device that is always full")
    words = ["sweep", "--backend", "fake", "--gpu", "x", "--grid", "quick", "--out", "r.jsonl"]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    reader, writer = os.pipe() if how == "nobody reads" else (None, os.open("/dev/full", os.O_WRONLY))
    if reader is not None:
        os.close(reader)
    if how == "closed":
        streams["preexec_fn"] = lambda: os.close(number)
    else:
        streams[("stdout", "stderr")[number - 1]] = writer
    ran = subprocess.run([sys.executable, "-m", "sdfit.cli", *words], cwd=tmp_path, text=True, check=False, **streams)
    os.close(writer)
    out, err = ran.stdout or "", ran.stderr or ""
    expected = {"closed": 1, "full": 1, "nobody reads": 0}[how] if number == 1 else 0
    assert ran.returncode == expected and "Traceback" not in err and len(err.splitlines()) <= 5
    assert out == ("r.jsonl\n" if number == 2 else "")
    assert (tmp_path / "r.jsonl").exists() == ((number, how) != (1, "closed"))
