"""Sweeps on a Ray cluster of made-up machines: rows as a sequential run has them, whatever dies."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from worlds import run as measured

from sdfit.backends.fake import FakeBackend
from sdfit.errors import DeviceError, SweepWarning
from sdfit.files import fingerprint
from sdfit.records import RECORDS, Record, read, read_rows
from sdfit.sweep import ray as engine
from sdfit.sweep.grid import Plan
from sdfit.sweep.ray import RayPool
from sdfit.sweep.run import Progress, sweep
from sdfit.workload import Workload

pytest.importorskip("ray")
STORE = {"object_store_memory": 80 << 20}
QUICKLY = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 3,
}
"""How soon the cluster sees that a machine is gone; Ray's own takes about fifteen seconds."""


def planned(count: int = 6, batches: tuple[int, ...] = (1, 2)) -> Plan:
    """A small plan."""
    workloads = tuple(Workload(256 + 64 * i, 256, batch_size=b) for i in range(count) for b in batches)
    return Plan("small", "", 0, 2, workloads, fingerprint([w.to_dict() for w in workloads]), ())


PLAN = planned()


def told(plan: Plan = PLAN, **options: Any) -> list[Record]:
    """What a sequential run records, computed here."""
    return measured(FakeBackend(**options), plan.workloads)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster of one machine with one processor and no card; tests add machines and take them away."""
    import ray
    from ray.cluster_utils import Cluster

    for last in (False, True):
        try:
            made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": QUICKLY, **STORE})
        except Exception:  # Ray gives its own processes 30 s to start, whatever else the machine does
            if last:
                raise
        else:
            break
    ray.init(address=made.address, log_to_driver=False, logging_level=logging.ERROR)
    yield made
    ray.shutdown()
    made.shutdown()


def holding(cards: int) -> Any:
    """An actor that has so many cards as soon as they are free, the first ones first."""
    import ray

    class Holder:
        def held(self) -> list[int]:
            return [int(card) for card in ray.get_gpu_ids()]

    waited = time.monotonic() + 30
    while ray.available_resources().get("GPU", 0) < ray.cluster_resources()["GPU"] and time.monotonic() < waited:
        time.sleep(0.05)
    actor = ray.remote(num_gpus=cards, num_cpus=0)(Holder).remote()
    assert sorted(ray.get(actor.held.remote())) == list(range(cards))
    return actor


def test_actors_record_what_local_workers_do(cluster: Any, tmp_path: Path) -> None:
    """The same rows, a fresh actor where one died of its workload; more workers than processors is said, and no hang."""
    short = planned(2)
    with pytest.warns(SweepWarning, match="1 workers, not 4: no more CPUs are free in this Ray cluster"):
        outcome = sweep(short, "fake", {"crash_batch_size": 2}, tmp_path / "r.jsonl", engine="ray", workers=4)
    rows = read(outcome.path).records
    assert [r for r in rows if r.outcome == "ok"] == [r for r in told(short) if r.workload.batch_size != 2]
    assert [r.message for r in rows if r.outcome == "crash"] == ["the actor died (ActorDiedError)"] * 2
    tries = Counter(r.index for r in read_rows(outcome.path, RECORDS)[1])
    assert outcome.complete and outcome.crashed == 2 and tries == {0: 1, 1: 3, 2: 1, 3: 3}
    local = sweep(PLAN, "fake", {}, tmp_path / "local.jsonl")
    alone = sweep(PLAN, "fake", {}, tmp_path / "ray.jsonl", engine="ray")
    assert alone.path.read_bytes() == local.path.read_bytes()


@pytest.mark.parametrize("address", [None, "10.0.0.1"])
def test_a_cluster_that_does_not_start_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    """Ray raises errors of any kind, a bare Exception too; which cluster it was is said if there was one to join."""
    import ray

    def failing(**_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray puts one of its own there, which ends in a dump
        raise Exception("The node timed out.\nmore")

    monkeypatch.setattr(ray, "init", failing)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    what = r"cannot join the Ray cluster '10\.0\.0\.1'" if address else "Ray does not start on this machine"
    with pytest.raises(DeviceError, match=rf"^{what} \(The node timed out\); [^\n]*$"):
        RayPool("fake", {}, address=address)
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_while_ray_starts_is_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own handler, which is there by then, exits with 15 and no word."""
    import ray

    monkeypatch.setattr(ray, "init", lambda **_: sys.exit(15))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(KeyboardInterrupt):
        RayPool("fake", {})


def test_without_a_card_it_is_refused_at_once(cluster: Any, tmp_path: Path) -> None:
    """No actor waits for a card that no machine has, or for a processor that another holds; the cluster stays."""
    import ray

    with pytest.raises(DeviceError, match=r"this Ray cluster has no GPU; .*--engine local"):
        sweep(PLAN, "cuda", {}, tmp_path / "r.jsonl", engine="ray")
    holder = RayPool("fake", {})
    holder.environment()
    with pytest.raises(DeviceError, match=r"this Ray cluster has none of its 1 CPUs free"):
        sweep(PLAN, "fake", {}, tmp_path / "r.jsonl", engine="ray")
    holder.close()
    assert not list(tmp_path.iterdir()) and ray.is_initialized()


def test_a_workload_that_never_ends_is_a_row(cluster: Any, tmp_path: Path) -> None:
    """After the limit its actor is ended and another goes on, and tries it again after the others."""
    short = planned(3, (1,))
    outcome = sweep(short, "fake", {"hang_after": 1}, tmp_path / "r.jsonl", engine="ray", limit_s=2.0)
    failed = [r for r in read_rows(outcome.path, RECORDS)[1] if r.outcome == "crash"]
    assert outcome.complete and {r.message for r in failed} == {"no answer within 2 s: the actor was ended"}
    assert outcome.crashed == 0 and read(outcome.path).records == told(short)


def test_the_work_of_a_lost_machine_is_done_again(cluster: Any, tmp_path: Path) -> None:
    """A machine killed with workloads on it costs time and no row; a machine that comes later takes part."""
    lost = cluster.add_node(num_cpus=2, **STORE)
    cluster.wait_for_nodes()
    later: list[Any] = []

    def report(progress: Progress) -> None:
        if progress.record and progress.record.index == 6:
            cluster.remove_node(lost, allow_graceful=False)
            later.append(cluster.add_node(num_cpus=1, **STORE))

    plan = planned(10)
    outcome = sweep(plan, "fake", {"delay_s": 0.2}, tmp_path / "r.jsonl", engine="ray", report=report)
    assert outcome.complete and outcome.crashed == 0 and read(outcome.path).records == told(plan)
    assert len(outcome.path.read_text().splitlines()) == 1 + len(plan.workloads)
    cluster.remove_node(later[0])


def test_a_workload_that_takes_machines_down_is_a_row_in_the_end(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not done again for ever; and a cluster without any machine left to work on is given up in one sentence."""
    monkeypatch.setattr(engine, "MOST_LOSSES", 1)
    lost = cluster.add_node(num_gpus=1, num_cpus=0, **STORE)
    cluster.wait_for_nodes()

    def report(progress: Progress) -> None:
        if progress.record and progress.record.index == 1:  # from here on: the first worker may take its time to start
            monkeypatch.setattr(engine, "START_S", 3.0)
            cluster.remove_node(lost, allow_graceful=False)

    options = {"hang_after": 2, "cards": ["a"]}
    path = tmp_path / "r.jsonl"
    with pytest.raises(DeviceError, match=r"started no worker within 3 s.*the same command to go on"):
        sweep(PLAN, "fake", options, path, engine="ray", report=report)
    rows = read(path).records
    assert [r.outcome for r in rows] == ["ok", "ok", "crash"] and rows[-1].message == "its machine was lost, 1 times"


def test_rows_of_different_cards_go_to_the_files_of_their_own_cards(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of card runs the whole plan; one that is not asked for is left out and its place given to another.

    That is so for places, too, that were still taken when the sweep began.
    """
    import ray

    monkeypatch.chdir(tmp_path)
    cards = cluster.add_node(num_gpus=3, num_cpus=0, **STORE)
    cluster.wait_for_nodes()
    options = {"cards": ["a", "b", "a"]}
    outcome = sweep(PLAN, "fake", options, engine="ray")
    assert outcome.complete and outcome.total == 2 * len(PLAN.workloads)
    assert sorted(p.parts[1] for p in outcome.paths) == ["a", "b"]
    for path in outcome.paths:
        file = read(path)
        assert file.environment["name"] == path.parts[1] and file.records == told()
    holder = holding(2)  # as a sweep does that has just ended: the third card is not the one asked for
    threading.Timer(1.0, ray.kill, (holder,)).start()
    with pytest.warns(SweepWarning, match=r"a worker is left out: the card asked for is 'b', and there is 'a'"):
        only = sweep(PLAN, "fake", {**options, "gpu": "b"}, tmp_path / "b.jsonl", engine="ray", workers=1)
    assert only.complete and read(only.path).environment["name"] == "b"
    with (
        pytest.warns(SweepWarning),
        pytest.raises(DeviceError, match=r"the card asked for is 'c', and there is '[ab]'"),
    ):
        sweep(PLAN, "fake", {**options, "gpu": "c"}, tmp_path / "c.jsonl", engine="ray")
    cluster.remove_node(cards)


def test_the_command_joins_a_cluster(cluster: Any, tmp_path: Path) -> None:
    """`--address`: the rows of a sequential run; what cannot be joined is one sentence, at once.

    Its actors import nothing from the folder that the command runs in.
    """

    def command(backend: str, address: str) -> subprocess.CompletedProcess[str]:
        words = ["sweep", "--backend", backend, "--gpu", "t4", "--grid", str(tmp_path / "g.toml"), "--out", "r.jsonl"]
        return subprocess.run(
            [sys.executable, "-P", "-m", "sdfit.cli", *words, "--engine", "ray", "--address", address],
            cwd=tmp_path, text=True, capture_output=True, check=False,
        )  # fmt: skip

    (tmp_path / "g.toml").write_text("[[block]]\nshapes = [256]\n")
    (tmp_path / "numpy.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
    for address in ("127.0.0.1:1", "nonsense"):
        ran = command("fake", address)
        assert ran.returncode == 1 and ran.stderr.startswith(f"sdfit: cannot join the Ray cluster '{address}' (")
        assert ran.stderr.count("\n") == 1
    ran = command("trace", cluster.address)
    assert ran.returncode == 0 and "1 of 1 done, 0 out of memory, 0 crashed" in ran.stderr, ran.stderr
    assert not (tmp_path / "imported").exists()
    from sdfit.sweep import grid

    local = sweep(grid.load(str(tmp_path / "g.toml")), "trace", {"gpu": "t4", "workspaces": True}, tmp_path / "l.jsonl", workers=1)  # fmt: skip
    assert read(tmp_path / "r.jsonl").records == read(local.path).records
