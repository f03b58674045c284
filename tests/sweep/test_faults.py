"""What goes wrong on a machine while a sweep runs: each is a row or one sentence, is tried again, and loses nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from worlds import run as measured

from sdfit.backends.fake import FakeBackend
from sdfit.errors import DeviceError, SdfitError, SweepWarning
from sdfit.files import fingerprint
from sdfit.records import RECORDS, Record, latest, read, read_rows
from sdfit.sweep import workers
from sdfit.sweep.grid import Plan
from sdfit.sweep.run import Progress, default_path, sweep
from sdfit.workload import Workload


def planned(sides: tuple[int, ...] = (256, 384, 512, 640), batches: tuple[int, ...] = (1, 2, 3)) -> Plan:
    """A small plan."""
    workloads = tuple(Workload(s, s, batch_size=b) for s in sides for b in batches)
    return Plan("small", "", 0, 2, workloads, fingerprint([w.to_dict() for w in workloads]), ())


PLAN = planned()


def told(**options: str) -> list[Record]:
    """What a sweep without faults records, computed here."""
    return measured(FakeBackend(**options), PLAN.workloads)


def crashes(path: Path) -> list[Record]:
    """Every row of a file that is a crash, also those that were tried again."""
    return [r for r in read_rows(path, RECORDS)[1] if r.outcome == "crash"]


# -- a card that is gone --


def vanishing(gone: Path, after: int, starts: int) -> Callable[[Progress], None]:
    """A report that takes the card away after so many rows, for so many starts of a worker."""

    def report(progress: Progress) -> None:
        if progress.record and progress.record.index == after:
            gone.write_bytes(b"x" * starts)

    return report


def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PAUSES_S", (0.0, 0.0, 0.0))


def test_a_card_that_vanishes_and_comes_back_costs_one_row_which_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that had it is replaced, as often as it takes, and the file has every answer."""
    quickly(monkeypatch)
    gone, path = tmp_path / "gone", tmp_path / "r.jsonl"
    outcome = sweep(PLAN, "fake", {"gone": str(gone)}, path, report=vanishing(gone, 4, 2))
    assert outcome.complete and outcome.crashed == 0 and read(path).records == told()
    (crash,) = crashes(path)
    assert crash.message == "RuntimeError: CUDA error: device is busy or unavailable"


def test_a_card_that_stays_away_ends_the_sweep_in_one_sentence_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workloads that never ran do not count as tried; the same command goes on where it stopped."""
    quickly(monkeypatch)
    gone, path = tmp_path / "gone", tmp_path / "r.jsonl"
    with pytest.raises(DeviceError) as caught:
        sweep(PLAN, "fake", {"gone": str(gone)}, path, report=vanishing(gone, 4, 1000))
    assert str(caught.value) == (
        "no worker starts any more: the backend 'fake' does not start (RuntimeError: CUDA error: no CUDA-capable device is "
        "detected); what was recorded is kept, run the same command to go on"
    )
    assert len(crashes(path)) == 1 and len(read(path).records) == 6
    gone.unlink()
    outcome = sweep(PLAN, "fake", {"gone": str(gone)}, path)
    assert outcome.complete and outcome.skipped == 5 and read(path).records == told()


def test_a_card_that_is_gone_from_the_start_is_one_sentence(tmp_path: Path) -> None:
    """No file is made."""
    (tmp_path / "gone").write_bytes(b"x" * 1000)
    with pytest.raises(
        SdfitError, match=r"the backend 'fake' does not start \(RuntimeError: CUDA error: no CUDA"
    ) as caught:
        sweep(PLAN, "fake", {"gone": str(tmp_path / "gone")}, tmp_path / "r.jsonl")
    assert "\n" not in str(caught.value) and not (tmp_path / "r.jsonl").exists()


def test_the_other_cards_do_the_work_of_one_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two cards fails for good: it is left out, and the other runs what is left, the failed workload too."""
    quickly(monkeypatch)
    path = tmp_path / "r.jsonl"
    options = {"cards": ["a", "a"], "gpu": "auto", "gone": str(tmp_path / "gone-{card}"), "delay_s": 0.2}
    report = vanishing(tmp_path / "gone-1", 2, 1000)
    with pytest.warns(SweepWarning, match="a worker is left out: .*no CUDA-capable device"):
        outcome = sweep(PLAN, "fake", options, path, devices=["0", "1"], report=report)
    assert outcome.complete and outcome.crashed == 0 and read(path).records == told(gpu="a")


# -- another program --


def test_a_disturbed_row_is_marked_and_measured_again(tmp_path: Path) -> None:
    """After all the others, by when the other program may have settled."""
    path = tmp_path / "r.jsonl"
    outcome = sweep(PLAN, "fake", {"disturbed_runs": 3}, path)
    every = read_rows(path, RECORDS)[1]
    assert [r.index for r in every] == [*range(12), 0, 1, 2]
    assert [r.disturbed for r in every] == [True] * 3 + [False] * 12
    assert (outcome.complete, outcome.done, outcome.disturbed) == (True, 12, 0) and read(path).records == told()


def test_a_program_that_never_rests_costs_three_tries(tmp_path: Path) -> None:
    """Then the marked row stands, the outcome says how many, and a new sweep does not try for ever."""
    path = tmp_path / "r.jsonl"
    plan = planned((256, 384), (1,))
    outcome = sweep(plan, "fake", {"disturbed_runs": 1000}, path)
    assert (outcome.complete, outcome.done, outcome.disturbed) == (True, 2, 2)
    assert [r.index for r in read_rows(path, RECORDS)[1]] == [0, 1] * 3
    assert sweep(plan, "fake", {}, path).skipped == 2


def test_a_failure_does_not_hide_what_was_measured_before(tmp_path: Path) -> None:
    """Of several rows of a workload that counts which says most: an answer, a disturbed one, a crash."""
    good, crash = told()[0], Record(0, PLAN.workloads[0], "crash")
    marked = replace(good, others_bytes=1 << 30, others_change_bytes=1 << 30)
    for rows, wanted in (
        ((marked, crash), marked), ((crash, marked, crash), marked), ((good, crash, marked), good), ((crash, crash), crash),
    ):  # fmt: skip
        assert latest(rows)[0] is wanted


# -- the clock --


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets, limits and the time left are of a clock that only goes forward; a file dated tomorrow is resumed."""
    jumps = iter(range(10**9, 0, -86_400))
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    seen: list[Progress] = []
    path = tmp_path / "fake" / "2099-01-01-small.jsonl"
    first = sweep(PLAN, "fake", {"hang_after": 5}, path, budget_s=3600, limit_s=2, report=seen.append)
    assert first.done + first.crashed == 12 and all(p.elapsed_s >= 0 and (p.eta_s or 0) >= 0 for p in seen)
    again = tmp_path / "fake" / "2099-01-02-small.jsonl"
    assert not sweep(PLAN, "fake", {"delay_s": 0.2}, again, budget_s=0.3).complete
    assert default_path("fake", PLAN, tmp_path) == again


# -- the backend of a card, in processes of its own --

STAGE_ENTRIES = {
    "text_encoder": 0, "vae_encoder_blocks": 1, "vae_encoder_mid": 2, "unet": 4, "vae_decoder_mid": 7, "vae_decoder_blocks": 8,
    "safety_checker": 9,
}  # fmt: skip
"""Which entry of a run is the first of a stage: the encoder's blocks are entered twice, the UNet three times for two steps."""


FAULTS: tuple[tuple[int, str] | None, ...] = (
    *((entry, "oom") for entry in STAGE_ENTRIES.values()),
    (4, "cublas"), (5, "sticky"), (8, "oom, then lost"), (4, "driver lost"), (4, "others"), None,
)  # fmt: skip
WORKLOADS = tuple(Workload(64, 64 + 8 * i, dtype="float32") for i in range(len(FAULTS)))
STAGES_OF_OOM = (*STAGE_ENTRIES, "unet")
FAILURES = (
    "RuntimeError: CUDA error: unspecified launch failure",
    "RuntimeError: CUDA error: unspecified launch failure",
    "NVMLError_GpuIsLost: GPU is lost",
)


def armed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Options of the backend ``cuda`` on a device that fails in each of its runs but the last."""
    pytest.importorskip("diffusers")
    import torch
    from faulty_counters import FOLDER, FaultyCounters
    from tiny import TINY

    torch.set_num_threads(1)  # two gain nothing on a pipeline this small
    monkeypatch.setenv(FOLDER, str(folder))
    (folder / "faults.json").write_text(json.dumps({str(i): fault for i, fault in enumerate(FAULTS) if fault}))
    return {"settings": TINY, "counters": FaultyCounters, "warm_up_side": 0}


def test_each_fault_of_a_card_is_a_row_and_ends_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in each stage is a row of that stage; a context that is lost, or a driver, a crash; none is trusted after."""
    from sdfit.backends.cuda import CudaBackend

    options = armed(tmp_path, monkeypatch)
    rows = []
    for i, workload in enumerate(WORKLOADS):
        backend = CudaBackend(**options)  # type: ignore[arg-type]
        rows.append(Record(i, workload, **workers.run_one(backend, workload)))
        assert backend.tainted or rows[-1].outcome == "ok"
    assert [r.oom_stage for r in rows if r.outcome == "oom"] == [*STAGES_OF_OOM]
    assert all(r.message and (r.oom_bytes or 0) >= r.stage_peaks_bytes[r.oom_stage or ""] > 0 for r in rows[:8])
    assert tuple(r.message for r in rows if r.outcome == "crash") == FAILURES
    assert [r.index for r in rows if r.disturbed] == [11]
    assert (rows[11].others_bytes, rows[11].others_change_bytes) == (2 << 30, 1 << 30) and rows[12].is_answer


@pytest.mark.slow
def test_faults_of_a_card_in_the_middle_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in processes of their own: what failed is tried again by a fresh one, and every row is as without the faults."""
    from sdfit.backends.cuda import CudaBackend

    options = armed(tmp_path, monkeypatch)
    plan = Plan("few", "", 0, 2, WORKLOADS, "0" * 16, ())
    outcome = sweep(plan, "cuda", options, tmp_path / "r.jsonl", workers=1)
    assert (outcome.complete, outcome.oom, outcome.crashed, outcome.disturbed) == (True, 8, 0, 0)
    rows, every = read(outcome.path).records, read_rows(outcome.path, RECORDS)[1]
    assert [r.oom_stage for r in rows[:8]] == [*STAGES_OF_OOM]
    assert tuple(r.message for r in crashes(outcome.path)) == FAILURES
    assert [r.index for r in every] == [*range(len(FAULTS)), 8, 9, 10, 11]
    assert [r.index for r in every if r.disturbed] == [11]
    (tmp_path / "faults.json").write_text("{}")
    alone = CudaBackend(**options)  # type: ignore[arg-type]
    for row in rows[8:]:
        found = alone.measure(row.workload)
        assert (row.outcome, row.stage_peaks_bytes) == ("ok", found["stage_peaks_bytes"])
        assert row.baseline_bytes == found["baseline_bytes"]
