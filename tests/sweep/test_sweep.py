"""Sweeps of the fake card: interrupted and resumed they equal uninterrupted ones, and a failure is a row."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdfit.backends.fake import FakeBackend
from sdfit.errors import DependencyError, DeviceError, InvalidWorkload, RecordsError, SdfitError, SweepWarning
from sdfit.files import fingerprint
from sdfit.records import RECORDS, Record, read, read_rows
from sdfit.sweep.grid import Plan
from sdfit.sweep.journal import Journal
from sdfit.sweep.run import Progress, default_path, record_of, sweep, workloads_left
from sdfit.sweep.workers import PARENTS, LocalPool, cards_named
from sdfit.workload import Workload


def planned(sides: tuple[int, ...] = (256, 384, 512, 640), batches: tuple[int, ...] = (1, 2, 3)) -> Plan:
    """A small plan."""
    workloads = tuple(Workload(s, s, batch_size=b) for s in sides for b in batches)
    return Plan("small", "", 0, 2, workloads, fingerprint([w.to_dict() for w in workloads]), ())


PLAN = planned()
GRID = f"""
[[block]]
shapes = [{", ".join(str(256 + 64 * i) for i in range(10))}]
batch_size = [1, 2, 3, 4]
"""


def swept(plan: Plan) -> dict[str, Any]:
    """The environment of a sweep of it."""
    facts = {"grid": plan.name, "grid_sha256": plan.sha256, "seed": 0, "num_inference_steps": 2}
    return FakeBackend().environment() | facts


def told(plan: Plan, **options: Any) -> list[Record]:
    """What an uninterrupted sweep records, computed here."""
    card = FakeBackend(**options)
    return [Record(i, w, **card.measure(w)) for i, w in enumerate(plan.workloads)]


def test_each_workload_is_recorded_once_in_plan_order(tmp_path: Path) -> None:
    """Rows, counts, environment and reports of a sweep are those of its plan."""
    seen: list[Progress] = []
    outcome = sweep(PLAN, "fake", {"gpu": "a"}, tmp_path / "r.jsonl", report=seen.append)
    file = read(outcome.path)
    assert file.records == told(PLAN)
    assert (outcome.done, outcome.total, outcome.oom, outcome.crashed, outcome.skipped, outcome.complete) == (
        12, 12, 0, 0, 0, True,
    )  # fmt: skip
    assert file.environment["grid_sha256"] == PLAN.sha256 and file.environment["name"] == "a"
    assert [p.done for p in seen] == list(range(1, 13)) and all(p.eta_s is not None and p.eta_s >= 0 for p in seen)


def test_two_workers_record_what_one_does(tmp_path: Path) -> None:
    """The order of lines may differ, the rows do not."""
    options = {"delay_s": 0.01}
    two = sweep(PLAN, "fake", options, tmp_path / "two.jsonl", workers=2)
    assert read(two.path).records == told(PLAN) and two.complete


def test_a_complete_sweep_runs_nothing_again(tmp_path: Path) -> None:
    """The same command on a complete file changes no byte."""
    path = sweep(PLAN, "fake", {}, tmp_path / "r.jsonl").path
    before = path.read_bytes()
    outcome = sweep(PLAN, "fake", {}, path)
    assert path.read_bytes() == before and outcome.skipped == 12 and outcome.complete


def test_a_budget_stops_between_workloads_and_the_rest_follows(tmp_path: Path) -> None:
    """After the budget nothing new starts; run again, the file is the uninterrupted one."""
    path = tmp_path / "r.jsonl"
    first = sweep(PLAN, "fake", {"delay_s": 0.05}, path, budget_s=0.3)
    assert not first.complete and 0 < first.done < 12
    again = sweep(PLAN, "fake", {}, path)
    assert again.complete and again.skipped == first.done and read(path).records == told(PLAN)
    assert len(path.read_text().splitlines()) == 13


def test_out_of_memory_is_a_row_and_is_not_tried_again(tmp_path: Path) -> None:
    """Its peaks so far, its bound and its stage are kept."""
    options = {"capacity_bytes": 3_500_000_000}
    outcome = sweep(PLAN, "fake", options, tmp_path / "r.jsonl")
    rows = read(outcome.path).records
    assert rows == told(PLAN, **options) and outcome.complete
    assert outcome.oom == sum(r.outcome == "oom" for r in rows) > 0
    assert all(r.oom_bytes and r.oom_stage and r.cap_bytes for r in rows if r.outcome == "oom")
    assert sweep(PLAN, "fake", options, outcome.path).skipped == 12


def test_a_worker_that_dies_is_a_crash_row_and_is_tried_again(tmp_path: Path) -> None:
    """The sweep goes on with a fresh worker; after three failures it is left at that, and nothing else suffers."""
    path = tmp_path / "r.jsonl"
    seen: list[Progress] = []
    outcome = sweep(PLAN, "fake", {"crash_batch_size": 2}, path, workers=2, report=seen.append)
    rows = read(path).records
    crashed = [r for r in rows if r.outcome == "crash"]
    assert [r.workload.batch_size for r in crashed] == [2] * 4 == [2] * outcome.crashed
    assert all(r.message == "the worker process died (exit code 9)" for r in crashed)
    assert [r for r in rows if r.outcome == "ok"] == [r for r in told(PLAN) if r.workload.batch_size != 2]
    every = read_rows(path, RECORDS)[1]
    assert sum(r.outcome == "crash" for r in every) == 4 * 3 and len(every) == 8 + 4 * 3
    assert outcome.complete and outcome.done == 8 and workloads_left(PLAN, every) == []
    assert seen[-1].left == 0 and all(p.left > 0 and (p.eta_s or 0) > 0 for p in seen[:-1])
    before = path.read_bytes()
    again = sweep(PLAN, "fake", {}, path)
    assert (again.complete, again.skipped, again.crashed) == (True, 12, 4) and path.read_bytes() == before


def test_what_crashed_is_tried_again_on_resume(tmp_path: Path) -> None:
    """A sweep that ended before it could try again, at the budget or by a signal: its tries count, the rest follows."""
    path = tmp_path / "r.jsonl"
    with Journal(path, swept(PLAN), RECORDS) as journal:
        for i in (0, 0, 1):
            journal.append(Record(i, PLAN.workloads[i], "crash", message="no"))
    assert workloads_left(PLAN, read_rows(path, RECORDS)[1]) == list(PLAN.workloads)
    outcome = sweep(PLAN, "fake", {}, path)
    assert outcome.complete and (outcome.skipped, outcome.crashed) == (0, 0) and read(path).records == told(PLAN)
    with Journal(tmp_path / "s.jsonl", swept(PLAN), RECORDS) as journal:
        for _ in range(2):
            journal.append(Record(1, PLAN.workloads[1], "crash", message="no"))
    sweep(PLAN, "fake", {"crash_batch_size": 2}, tmp_path / "s.jsonl")
    assert Counter(r.index for r in read_rows(tmp_path / "s.jsonl", RECORDS)[1] if r.outcome == "crash")[1] == 3


def test_a_worker_killed_from_outside_is_a_crash_row() -> None:
    """As the kernel's out-of-memory killer does it: the signal is named, the sweep goes on."""
    pool = LocalPool("fake", {"hang_after": 1}, 1)

    def kill() -> None:
        waited(lambda: bool(pool._live and pool._live[0].job and pool._live[0].job[0] == 1))
        pool._live[0].process.kill()  # it has been given the second, which it would never answer

    killer = threading.Thread(target=kill)
    try:
        pool.environment()
        killer.start()
        results = dict(pool.run(enumerate(PLAN.workloads[:3])))
    finally:
        killer.join()
        pool.close()
    assert results[1] == {"outcome": "crash", "message": "the worker process died (signal SIGKILL)"}
    assert results[0]["outcome"] == results[2]["outcome"] == "ok"


def test_workers_that_are_alike_start_together() -> None:
    """The second does not wait for the first, no more start than there are processors, and those with nothing to do end."""
    pool = LocalPool("fake", {}, 64)
    with contextlib.closing(pool):
        pool.environment()
        assert len(pool._live) == min(64, os.cpu_count() or 1)
        assert [index for index, _ in pool.run([(0, PLAN.workloads[0])])] == [0]
    assert not pool._live


def test_a_worker_that_died_idle_does_not_stop_the_sweep() -> None:
    """A worker that is gone before its first job costs that job, as a row."""
    pool = LocalPool("fake", {}, 1)
    try:
        pool.environment()
        pool._live[0].process.kill()
        pool._live[0].process.join()
        results = dict(pool.run(iter([(0, PLAN.workloads[0]), (1, PLAN.workloads[1])])))
    finally:
        pool.close()
    assert results[0]["outcome"] == "crash" and results[1]["outcome"] == "ok"


def test_an_exception_in_a_run_is_a_row() -> None:
    """Its kind and first line, nothing else; the sweep goes on."""
    from sdfit.sweep.workers import run_one

    class Broken:
        def measure(self, workload: Workload) -> dict[str, Any]:
            raise RuntimeError("first\nsecond")

    assert run_one(Broken(), PLAN.workloads[0]) == {"outcome": "crash", "message": "RuntimeError: first"}


def test_a_result_that_no_record_can_be_is_a_crash_row() -> None:
    """A backend that says nonsense spoils its own row, with the reason, and neither the file nor the sweep."""
    for fields, words in (
        ({"outcome": "ok", "allocated_bytes": -1, "stage_peaks_bytes": {"unet": 1}}, "allocated_bytes is -1"),
        ({"outcome": "ok"}, "an 'ok' row without peaks"),
        ({"outcome": "ok", "peak": 1}, "unexpected keyword argument 'peak'"),
    ):
        row = record_of(3, PLAN.workloads[3], fields)
        assert (row.index, row.outcome) == (3, "crash") and words in str(row.message)


def test_another_grid_or_card_does_not_write_into_the_file(tmp_path: Path) -> None:
    """Each is refused with what differs, and no byte changes."""
    path = sweep(PLAN, "fake", {}, tmp_path / "r.jsonl").path
    before = path.read_bytes()
    other = planned((256,), (1,))
    for plan, options, words in (
        (other, {}, "grid_sha256"),
        (replace(PLAN, num_inference_steps=3), {}, "num_inference_steps"),
        (PLAN, {"gpu": "b"}, "gpu: made-up card 'fake' / made-up card 'b'"),
    ):
        with pytest.raises(RecordsError, match=words):
            sweep(plan, "fake", options, path)
    with pytest.raises(SdfitError, match=r"row 0 .* is not of this grid"):
        sweep(replace(PLAN, workloads=PLAN.workloads[::-1]), "fake", {}, path)
    assert path.read_bytes() == before


def test_what_cannot_start_is_refused_before_a_file_is_made(tmp_path: Path) -> None:
    """An unknown backend, an engine that is not installed: no file is left behind."""
    with pytest.raises(InvalidWorkload, match="backend is 'tpu'; it must be one of cuda, trace, fake"):
        sweep(PLAN, "tpu", {}, tmp_path / "r.jsonl")
    if importlib.util.find_spec("ray") is None:
        with pytest.raises(DependencyError, match=r"needs ray.*pip install 'sdfit\[ray\]'"):
            sweep(PLAN, "fake", {}, tmp_path / "r.jsonl", engine="ray")
    assert not list(tmp_path.iterdir())


def test_a_process_for_each_card_and_a_file_for_each_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker sees one card; each kind of card runs the whole plan into its own file, which one --out cannot hold."""
    monkeypatch.chdir(tmp_path)
    options = {"gpu": "auto", "cards": ["a", "b", "a"]}
    outcome = sweep(PLAN, "fake", options, devices=["1", "2", "0"])
    assert outcome.complete and outcome.total == 24 and [p.parts[1] for p in outcome.paths] == ["b", "a"]
    for path in outcome.paths:
        file = read(path)
        assert file.environment["name"] == path.parts[1] and file.records == told(PLAN)
    with pytest.warns(SweepWarning, match="a worker is left out: it has made-up card 'b' and would write 'r.jsonl'"):
        one = sweep(PLAN, "fake", options, Path("r.jsonl"), devices=["0", "1"])
    assert one.complete and one.total == 12 and {read(one.path).environment["name"]} == {"a"}
    with pytest.warns(SweepWarning, match="the card asked for is 'b', and there is 'a'"):
        assert sweep(PLAN, "fake", {**options, "gpu": "b"}, Path("b.jsonl"), devices=["1", "0"]).complete


@pytest.mark.parametrize(
    ("text", "visible", "cards"),
    [("0,1", "", ["0", "1"]), ("1", "4,5", ["5"]), ("GPU-ab, 0", "", ["GPU-ab", "0"])],
)
def test_cards_are_counted_as_this_process_sees_them(
    text: str, visible: str, cards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers are places in CUDA_VISIBLE_DEVICES where it is set; UUIDs stand for themselves."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cards_named(text, 2) == cards
    for wrong in ("2", "0,0", "", "one", "-1"):
        with pytest.raises(DeviceError, match=f"the cards asked for are '{wrong}', and there are 2; .* as in 0,1"):
            cards_named(wrong, 2)
    with pytest.raises(DeviceError, match="there is no CUDA card here"):
        cards_named(text, 0)


def test_an_unfinished_file_of_any_date_is_resumed(tmp_path: Path) -> None:
    """A file with crashed rows is unfinished though it has all lines; a finished one is left alone."""
    home = tmp_path / "fake"
    assert default_path("fake", PLAN, tmp_path).parent == home
    path = home / "2020-01-01-small.jsonl"
    with Journal(path, swept(PLAN), RECORDS) as journal:
        for i, workload in enumerate(PLAN.workloads):
            journal.append(Record(i, workload, "crash"))
    assert len(path.read_text().splitlines()) == 13
    assert default_path("fake", PLAN, tmp_path) == path
    sweep(PLAN, "fake", {}, path)
    assert default_path("fake", PLAN, tmp_path) != path
    assert default_path("fake", replace(PLAN, name="other"), tmp_path).name.endswith("-other.jsonl")


# -- the real process, killed; the card stops answering after so many rows, so nothing hangs on the machine's speed --


def start(folder: Path, hang_after: int | None = None, *more: str) -> subprocess.Popen[str]:
    """`python -m sdfit.cli sweep` on a fake card, in a process group of its own."""
    (folder / "grid.toml").write_text(GRID)
    command = [sys.executable, "-m", "sdfit.cli", "sweep", "--backend", "fake", "--gpu", "slow", "--grid", "grid.toml"]
    environment = os.environ | {"SDFIT_FAKE": json.dumps({"hang_after": hang_after})}
    return subprocess.Popen(
        [*command, *more], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def waited(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def rows_of(folder: Path) -> int:
    """Whole lines of the records file, its environment not counted."""
    return sum(path.read_bytes().count(b"\n") - 1 for path in folder.glob("data/slow/*.jsonl"))


def hung(folder: Path, hang_after: int, rows: int) -> subprocess.Popen[str]:
    """A sweep that has written so many rows and is in the middle of the next workload."""
    process = start(folder, hang_after)
    waited(lambda: rows_of(folder) >= rows or process.poll() is not None)
    assert process.poll() is None and rows_of(folder) == rows
    return process


def test_a_killed_sweep_resumed_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """Killed with SIGKILL three times and torn once, resumed by the same command: the file is, byte for byte, what an
    uninterrupted sweep writes, and no more than the workload under way ran twice."""
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    for rows, done in ((5, 5), (9, 14), (8, 22)):
        process = hung(killed, rows, done)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL and rows_of(killed) == done
    path = next(killed.glob("data/slow/*.jsonl"))
    with path.open("ab") as file:
        file.write(path.read_bytes().splitlines()[1][:100])  # a line cut off as it was written
    process = start(killed)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "40 of 40 done, 0 out of memory, 0 crashed, 22 were there already" in err and "torn" in err
    assert out == f"{path.relative_to(killed)}\n"
    process = start(whole)
    assert process.communicate(timeout=120) and process.returncode == 0
    assert path.read_bytes() == next(whole.glob("data/slow/*.jsonl")).read_bytes()


def test_no_worker_outlives_a_killed_sweep(tmp_path: Path) -> None:
    """When the sweep is killed its worker ends, though it is in the middle of a workload that never ends."""
    process = hung(tmp_path, 2, 2)
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not listed.exists():
        process.kill()
        process.communicate()
        pytest.skip("this system does not list a process's children")
    children = [int(pid) for pid in listed.read_text().split()]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=120)
    assert children

    def gone(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:
            return True

    waited(lambda: all(gone(pid) for pid in children))


def test_ctrl_c_keeps_what_was_recorded_and_exits_130(tmp_path: Path) -> None:
    """SIGINT to the whole group, as a terminal sends it: one line, exit 130, whole rows, and the rest follows."""
    process = hung(tmp_path, 4, 4)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.strip().endswith("sdfit: interrupted; what was recorded is kept, run the same command to go on")
    assert "Traceback" not in err
    assert rows_of(tmp_path) == 4
    process = start(tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "4 were there already" in err and rows_of(tmp_path) == 40


def test_a_second_sweep_of_the_same_file_is_refused(tmp_path: Path) -> None:
    """While one writes, another process with the same command stops with one sentence and exit 1, and harms nothing."""
    first = hung(tmp_path, 2, 2)
    second = start(tmp_path)
    _, err = second.communicate(timeout=120)
    assert second.returncode == 1 and "another sweep is writing" in err and "Traceback" not in err
    assert first.poll() is None and rows_of(tmp_path) == 2
    os.killpg(first.pid, signal.SIGINT)
    first.communicate(timeout=120)
    third = start(tmp_path)
    third.communicate(timeout=120)
    assert third.returncode == 0 and rows_of(tmp_path) == 40


# -- what hangs, is gone, or lies in wait --


def test_a_workload_that_never_ends_is_given_up(tmp_path: Path) -> None:
    """After the limit its worker is killed, the row says so, and the sweep goes on with a fresh one to its end."""
    plan = planned((256, 384), (1, 2))
    outcome = sweep(plan, "fake", {"hang_after": 1}, tmp_path / "r.jsonl", limit_s=2.0)
    rows = read_rows(outcome.path, RECORDS)[1]
    assert outcome.done + outcome.crashed == 4 and outcome.done >= 1
    assert {r.message for r in rows if r.outcome == "crash"} == {"no answer within 2 s: the worker process was ended"}


def test_a_worker_that_was_stopped_is_given_up() -> None:
    """SIGSTOP, as a debugger or a full host sends it: the process cannot end by itself."""
    pool = LocalPool("fake", {"hang_after": 1}, 1, limit_s=2.0)

    def jobs() -> Iterator[tuple[int, Workload]]:
        yield 0, PLAN.workloads[0]
        os.kill(pool._live[0].process.pid or 0, signal.SIGSTOP)
        yield 1, PLAN.workloads[1]
        yield 2, PLAN.workloads[2]

    results = dict(pool.run(jobs()))
    assert str(results[1]["message"]).startswith("no answer within 2 s") and results[2]["outcome"] == "ok"


def test_a_file_with_nothing_left_to_try_is_finished(tmp_path: Path) -> None:
    """Three failures are an answer: a new sweep of the grid begins a new file."""
    path = tmp_path / "fake" / "2020-01-01-small.jsonl"
    assert sweep(PLAN, "fake", {"crash_batch_size": 2}, path).complete
    assert default_path("fake", PLAN, tmp_path) != path


@pytest.mark.parametrize("how", ["deleted", "truncated", "replaced"])
def test_a_file_that_is_taken_away_is_noticed_at_the_next_row(tmp_path: Path, how: str) -> None:
    """Not at the end, as "12 of 12 done" with no file."""
    path = tmp_path / "r.jsonl"

    def spoil(progress: Progress) -> None:
        if progress.done == 3:
            content = path.read_bytes()
            if how == "truncated":
                os.truncate(path, 100)
            else:
                path.unlink()
                if how == "replaced":
                    path.write_bytes(content)

    with pytest.raises(
        RecordsError, match=r"cannot write records to .*r\.jsonl': (No such file|the file was replaced)"
    ):
        sweep(PLAN, "fake", {}, path, report=spoil)


def test_no_more_workers_than_jobs_or_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--workers 60 for two jobs starts two interpreters at most."""
    started = []
    start = LocalPool._start
    monkeypatch.setattr(LocalPool, "_start", lambda self, *args: started.append(1) or start(self, *args))
    assert sweep(planned((256,), (1, 2)), "fake", {}, tmp_path / "r.jsonl", workers=60).complete
    assert len(started) <= min(2, os.cpu_count() or 1)


def test_the_children_import_nothing_from_the_current_folder(tmp_path: Path) -> None:
    """A `pickle.py` that lies there is not executed."""
    for name in ("pickle", "numpy", "multiprocessing", "socket"):
        (tmp_path / f"{name}.py").write_text("open('executed', 'w')")
    (tmp_path / "grid.toml").write_text("[[block]]\nshapes = [256]")
    program = (
        "import sys; from sdfit.cli import main; sys.exit(main(['sweep', '--backend', 'fake', '--grid', 'grid.toml']))"
    )
    ran = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )  # fmt: skip
    assert ran.returncode == 0 and not (tmp_path / "executed").exists(), ran.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_a_sweep_as_ctrl_c_does(tmp_path: Path, number: signal.Signals) -> None:
    """One line, exit 130, whole rows; the worker goes too."""
    process = hung(tmp_path, 4, 4)
    os.killpg(process.pid, number) if number == signal.SIGHUP else process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err and rows_of(tmp_path) == 4


def test_a_worker_never_hears_what_is_its_parents_to_handle(capfd: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C reaches every process of a terminal, also one that is still importing: that was its traceback on the screen."""
    pool = LocalPool("fake", {}, 1)
    with contextlib.closing(pool):
        worker = pool._start(None)
        for number in PARENTS:  # at once: it takes a tenth of a second to start
            os.kill(worker.process.pid or 0, number)
        assert worker.receive()["backend"] == "fake"
        for number in PARENTS:  # the test's own process still does
            assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert capfd.readouterr().err == ""
