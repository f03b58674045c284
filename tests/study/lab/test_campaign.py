"""The plan for a card, rehearsed on the made-up one: resumable, within its time, each record kept, tables last."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from sdfit.errors import RecordsError, SdfitError
from sdfit.judging.evaluate import evaluate
from sdfit.records import Record, read
from sdfit.study.lab import capped, proofs
from sdfit.study.lab.campaign import BUDGETS_S, PARTS, Campaign, run
from sdfit.study.lab.commands import main
from sdfit.study.lab.tables import tables
from sdfit.sweep import grid
from sdfit.units import GIB
from sdfit.workload import Workload


def campaign(folder, *, budget_s=300.0, take=24, backend="fake"):
    return Campaign(backend, "h200", folder, budget_s, take)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One campaign on the made-up card, from the first grid to the capped runs."""
    done = campaign(tmp_path_factory.mktemp("campaign") / "h200", take=120)
    run(done, PARTS)
    assert not done.failed, done.notes
    return done


def test_every_part_leaves_its_records(finished):
    """Grids beside the model; proofs and capped runs in a folder of their own, where no fit looks."""
    grids = {p.name[11:] for p in finished.folder.glob("*.jsonl")}
    assert grids == {"history.jsonl", "default.jsonl", "holdout.jsonl", "required.jsonl"}
    assert finished.model.exists()
    side = sorted(p.name[11:17] for p in (finished.folder / "proofs").glob("*.jsonl"))
    assert side == ["capped", "proofs"]


def test_the_tables_say_that_a_rehearsal_is_simulated(finished):
    """Nothing made up is ever called measured."""
    text = tables(finished)
    assert text.startswith("SIMULATED (--backend fake)")
    assert "measured" not in text


def test_the_model_knows_the_made_up_cards_borders(finished):
    """Where the coefficients are known, what the model lets through runs, and what it refuses fails, in all 20 tries."""
    assert "20 of 20 tries came out as the model said" in tables(finished)


def test_the_holdout_is_judged_for_every_metric(finished):
    """What `sdfit evaluate` says of it stands in the tables: allocated, reserved, device and required."""
    f, held = finished.predictor(), finished.records("holdout")
    text = evaluate(f, held).table()
    assert text in tables(finished)
    for metric in ("allocated", "reserved", "device", "required"):
        assert f"\n{metric} " in text


def test_running_it_again_runs_nothing_again(finished):
    """All is there: the files do not change, except for the model, which is made again byte for byte."""
    before = {p: p.read_bytes() for p in finished.folder.rglob("*") if p.is_file()}
    again = campaign(finished.folder, take=120)
    run(again, PARTS)
    assert not again.runs
    assert {p: p.read_bytes() for p in finished.folder.rglob("*") if p.is_file()} == before


def test_a_campaign_without_time_left_says_so_and_keeps_what_it_has(tmp_path):
    """A call that has no time begins nothing; the tables still come."""
    late = campaign(tmp_path / "h200", budget_s=0.0)
    run(late, PARTS)
    assert not late.runs
    assert [n.split(":")[0] for n in late.notes] == list(PARTS)
    assert "default" in tables(late)


def test_a_part_that_fails_does_not_take_the_others_with_it(tmp_path, monkeypatch):
    """A fit that breaks costs the fit; the proofs, which come before, and the tables, which come after, are there."""

    def broken(_):
        raise RuntimeError("singular matrix")

    monkeypatch.setitem(sys.modules["sdfit.study.lab.campaign"]._OTHER, "fit", broken)
    one = campaign(tmp_path / "h200", take=4)
    run(one, ("default", "fit", "default-largest", "capped"))
    assert one.failed == ["fit", "capped"]
    assert "fit failed: RuntimeError: singular matrix" in tables(one)
    assert "capped failed: there is no model yet" in tables(one)
    assert len(read(one.file("default")).records) == 4


@pytest.mark.slow
def test_a_killed_campaign_goes_on_where_it_was(tmp_path):
    """kill -9 in the middle, the same command again: the records are those of one that was left alone."""
    command = [
        sys.executable,
        "-m",
        "sdfit.study.lab",
        "campaign",
        "--backend",
        "fake",
        "--gpu",
        "h200",
        "--take",
        "200",
    ]
    command += ["--parts", "default,holdout", "--folder", str(tmp_path / "h200")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = list((tmp_path / "h200").glob("*-default.jsonl"))
        if found and found[0].read_bytes().count(b"\n") > 20:
            break
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    alone = campaign(tmp_path / "alone", take=200)
    run(alone, ("default", "holdout"))
    for name in ("default", "holdout"):
        assert read(next((tmp_path / "h200").glob(f"*-{name}.jsonl"))).records == alone.records(name).records


def test_the_dry_run_prints_every_part_and_runs_nothing(tmp_path, capsys):
    """The plan, with the number of runs, and no file."""
    assert main(["campaign", "--backend", "fake", "--folder", str(tmp_path / "x"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    for words in ("default: at most", "holdout: at most", "required: 60 runs", "50 steps", "capped: 20 tries"):
        assert words in text
    assert not (tmp_path / "x").exists()


def test_an_unknown_part_is_named(tmp_path, capsys):
    """With those that there are."""
    assert main(["campaign", "--folder", str(tmp_path), "--parts", "defualt"]) == 1
    assert "no part 'defualt'; there are: history, default" in capsys.readouterr().err


def test_the_first_part_records_every_kind_of_run(tmp_path, monkeypatch):
    """The histories come first, of each workload of their grid, which has every kind that the card is wanted for."""
    asked = []
    module = sys.modules["sdfit.study.lab.campaign"]
    monkeypatch.setattr(module, "sweep", lambda plan, *_, **how: asked.append((plan.name, how["histories"])))
    run(campaign(tmp_path / "h200", take=None, backend="cuda"), PARTS[:2])
    plan = grid.load("history").workloads
    assert asked == [("history", plan), ("default", ())]
    assert len(plan) >= 12
    half = [w for w in plan if w.dtype == "float16" and w.attention == "sdpa"]
    assert {w.batch_size for w in half if w.pixels == 512 * 512} == {1, 2, 4}
    assert {("float32", "sdpa"), ("float16", "eager")} <= {(w.dtype, w.attention) for w in plan}
    assert any(w.vae_tiling for w in plan) and (1200, 1800) in {(w.height, w.width) for w in plan}
    assert any(w.batch_size * 256 * w.pixels >= 2**31 for w in plan)


def test_the_plan_meets_what_the_card_is_wanted_for():
    """At least 400 workloads and 40 shapes in depth, 25 of each other kind, 120 held out of other shapes, 60 required."""
    default, holdout, required = (grid.load(name) for name in ("default", "holdout", "required"))
    assert len(default.workloads) >= 400
    plain = [w for w in default.workloads if (w.dtype, w.attention, w.vae) == ("float16", "sdpa", "kl")]
    plain = [w for w in plain if not (w.vae_slicing or w.vae_tiling) and w.offload == "none" and w.safety_checker]
    shapes = {(w.effective_height, w.effective_width) for w in plain}
    odd = [s for s in shapes if s[0] % 64 or s[1] % 64]
    assert len(shapes) >= 40
    assert len(odd) >= len(shapes) / 3
    assert {w.batch_size for w in plain} >= {1, 2, 4, 8, 16}
    assert {w.prompt_length for w in plain} >= {8, 77, 154, 231}
    kinds = {
        "eager": lambda w: w.attention == "eager",
        "sliced": lambda w: w.attention == "sliced",
        "math": lambda w: w.attention == "math",
        "bfloat16": lambda w: w.dtype == "bfloat16",
        "float32": lambda w: w.dtype == "float32",
        "slicing": lambda w: w.vae_slicing,
        "tiling": lambda w: w.vae_tiling,
    }
    for name, test in kinds.items():
        assert sum(map(test, default.workloads)) >= 25, name
    assert len(holdout.workloads) >= 120
    all_shapes = {(w.height, w.width) for w in default.workloads}
    assert not all_shapes & {(w.height, w.width) for w in holdout.workloads}
    assert len(required.workloads) >= 60
    assert set(BUDGETS_S) == set(PARTS)


def test_required_never_meets_a_size_twice():
    """A process that tried a size under caps may keep other convolution plans for it."""
    sizes = [(w.dtype, w.effective_height, w.effective_width) for w in grid.load("required").workloads]
    assert len(set(sizes)) == len(sizes)


# -- proofs --


def test_differences_from_the_reference_are_found_to_the_byte():
    """A condition that adds 4096 B to one stage of one workload shows it; one that failed is no evidence."""
    row = {
        "index": 0,
        "workload": {},
        "outcome": "ok",
        "stage_peaks_bytes": {"unet": 10_000, "vae_decoder_blocks": 20_000},
    }
    row |= {"allocated_bytes": 20_000, "reserved_bytes": 30_000, "baseline_bytes": 5_000}
    other = {**row, "stage_peaks_bytes": {"unet": 14_096, "vae_decoder_blocks": 20_000}}
    rows = [
        {"condition": "reference", **row},
        {"condition": "50 steps", **other},
        {"condition": "second seed", **row, "outcome": "crash"},
    ]
    table = {entry["condition"]: entry for entry in proofs.compared(rows)}
    assert table["reference"]["stages"] == (0, 0)
    assert table["50 steps"] == {
        "condition": "50 steps", "runs": 1, "stages": (0, 4096), "allocated": (0, 0), "reserved": (0, 0), "baseline": (0, 0),
    }  # fmt: skip
    assert table["second seed"]["allocated"] is None


FRESH = [c for c in proofs.CONDITIONS if c.name in ("reference", "fresh process")]
TWO = [Workload(512, 512), Workload(512, 768)]


def test_proofs_go_on_after_a_torn_line(tmp_path, monkeypatch):
    """The torn row is run again, the others are not."""
    path = tmp_path / "p.jsonl"
    monkeypatch.setattr(proofs, "kernels_in_a_process", lambda backend: [])
    assert proofs.prove(path, TWO, "fake", {"gpu": "h200"}, conditions=FRESH)
    whole = path.read_text().splitlines(keepends=True)
    assert len(whole) == 1 + 2 + 2 + 1
    path.write_text("".join(whole[:-1]) + whole[-1][:40])
    assert proofs.prove(path, TWO, "fake", {"gpu": "h200"}, conditions=FRESH)
    assert path.read_text().splitlines(keepends=True) == whole


def test_proofs_of_another_card_are_not_gone_on_with(tmp_path):
    """Bytes of two cards are not set beside each other; nothing is written."""
    path = tmp_path / "p.jsonl"
    assert not proofs.prove(path, TWO, "fake", {"gpu": "a"}, conditions=FRESH, in_time=iter([True, False]).__next__)
    before = path.read_bytes()
    with pytest.raises(RecordsError, match="gpu: made-up card 'a' / made-up card 'b'"):
        proofs.prove(path, TWO, "fake", {"gpu": "b"}, conditions=FRESH)
    assert path.read_bytes() == before


def test_a_condition_reaches_its_process_and_leaves_nothing_behind(tmp_path):
    """Variables of the environment are set while the workers start, and gone afterwards."""
    before = dict(os.environ)
    with proofs._variables({"SDFIT_TEST_A": "1", "PATH": "/nowhere"}):
        assert (os.environ["SDFIT_TEST_A"], os.environ["PATH"]) == ("1", "/nowhere")
    assert dict(os.environ) == before


def test_each_head_size_has_its_kernel_named():
    """PyTorch's choice and the profiler's word for 40, 80, 160 and 512, in three dtypes."""
    found = proofs.attention_kernels("cpu")
    assert {k["head_dim"] for k in found} == {40, 80, 160, 512}
    assert all(k["choice"] and k["kernels"] for k in found)
    json.dumps(found)


# -- the card as a smaller one --


def test_failing_runs_come_last_under_each_cap():
    """Each of them costs its process, so that those which must run share one."""
    a, b = (capped.Try(cap * GIB, Workload(512, 512), Workload(576, 576)) for cap in (6, 8))
    jobs = capped.jobs_of([a, a, b])
    assert [i for i, _ in jobs[6 * GIB]] == [0, 2, 1, 3]
    assert [i for i, _ in jobs[8 * GIB]] == [4, 5]


def test_a_verdict_on_other_tries_is_refused():
    """Records of an earlier model's borders are not taken for this one's."""
    one = capped.Try(6 * GIB, Workload(512, 512), Workload(576, 576))
    ran = Record(0, one.must_run, "ok", {"unet": 7}, allocated_bytes=7)
    assert capped.verdict([one], [ran, Record(1, one.must_fail, "oom")]) == [(one, "ok", "oom")]
    assert capped.verdict([one], []) == [(one, "-", "-")]
    with pytest.raises(SdfitError, match="row 0 is not of these tries"):
        capped.verdict([one], [replace(ran, workload=Workload(768, 768))])
