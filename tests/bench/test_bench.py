"""The figures of the README, by pytest-benchmark; they are printed, and nothing is asserted about time.

Run them with `make bench`.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdfit
from sdfit.backends.fake import FakeBackend
from sdfit.errors import SimulatedModelWarning
from sdfit.fit import fit as fitting
from sdfit.predict.replayed import Replayed
from sdfit.predict.simulation.needed import Needed
from sdfit.records import RECORDS, Record, RecordsFile
from sdfit.sweep.grid import load as load_grid
from sdfit.workload import Workload

pytestmark = pytest.mark.bench


@pytest.fixture(scope="module")
def f() -> sdfit.Predictor:
    """The shipped T4 model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SimulatedModelWarning)
        return sdfit.load("t4")


def test_scalar_prediction_1000_calls(benchmark: Any, f: sdfit.Predictor) -> None:
    """1,000 calls of f on different workloads that are the equation's; a call takes a thousandth."""
    cases = [case for case in _cases(2000) if not f(*case).replayed][:1000]

    def call() -> float:
        total = 0.0
        for case in cases:
            total += f(*case)
        return total

    assert len(cases) == 1000 and benchmark(call) > 0


def test_calls_that_are_simulated(benchmark: Any, f: sdfit.Predictor) -> None:
    """100 calls of f on three images or more past 2^31 elements, which are not the equation's, each for the first time."""
    cases = [case for case in _cases(2000) if f(*case).replayed][:100]

    def fresh() -> tuple[tuple[sdfit.Predictor], dict[str, Any]]:
        return (Replayed(f.equation, Needed("sm75")),), {}

    assert len(cases) == 100
    assert benchmark.pedantic(lambda g: sum(g(*case) for case in cases), setup=fresh, rounds=3) > 0


def _cases(count: int) -> list[tuple[int, int, int, int, float]]:
    rng = random.Random(0)
    return [
        (rng.randrange(256, 2048), rng.randrange(256, 2048), 77, rng.randrange(1, 9), rng.choice((1.0, 7.5)))
        for _ in range(count)
    ]


def test_reading_an_interval_1000_times(benchmark: Any, f: sdfit.Predictor) -> None:
    """A call of f and the reading of its interval, 1,000 times; a reading takes a thousandth, less a call."""

    def read() -> float:
        return sum(f(512, side).interval.high for side in range(512, 1512))

    assert benchmark(read) > 0


def test_to_dict_100_times(benchmark: Any, f: sdfit.Predictor) -> None:
    """A call of f and everything that it knows as plain values, 100 times."""
    assert benchmark(lambda: [f(512, side).to_dict() for side in range(512, 612)])


def test_table_of_a_million_rows(benchmark: Any, f: sdfit.Predictor) -> None:
    """f.predict on 1,000,000 rows."""
    rng = np.random.default_rng(0)
    table = {
        "height": rng.integers(256, 2048, 1_000_000),
        "width": rng.integers(256, 2048, 1_000_000),
        "batch_size": rng.integers(1, 9, 1_000_000),
    }
    assert len(benchmark.pedantic(f.predict, args=(table,), rounds=7)) == 1_000_000


@pytest.mark.parametrize("statement", ["pass", "import sdfit", "import sdfit; sdfit.load('t4')"])
def test_import(benchmark: Any, statement: str) -> None:
    """A process that imports sdfit, beside a bare one (which imports numpy in neither)."""
    command = [sys.executable, "-W", "ignore", "-c", statement]
    benchmark.pedantic(lambda: subprocess.run(command, check=True), rounds=11, warmup_rounds=1)


def made_up(rows: int) -> RecordsFile:
    """Records of the default and holdout grids, and of their variants at other heights, on the made-up card."""
    fake = FakeBackend("bench", noise=0.002, capacity_bytes=1 << 50)
    workloads = [*load_grid("default").workloads, *load_grid("holdout").workloads]
    rng, known = random.Random(1), len(workloads)
    while len(workloads) < rows:
        base = workloads[rng.randrange(known)]
        workloads.append(type(base).from_dict(base.to_dict() | {"height": rng.randrange(256, 1024)}))
    records = [Record(i, w, **fake.measure(w)) for i, w in enumerate(workloads[:rows])]
    return RecordsFile(fake.environment() | {"grid": "bench"}, records, [])


def test_fit_of_1000_records(benchmark: Any) -> None:
    """sdfit.fit.fit.fit on 1,000 records on the made-up card."""
    artifact = benchmark.pedantic(fitting.fit, args=(made_up(1000),), rounds=3)
    assert artifact.evaluation["rows"] == 1000


def test_fit_of_the_default_grid(benchmark: Any, tmp_path: Path) -> None:
    """`sdfit fit` of the traced default grid of sm75, a whole process: read, fitted, judged, written."""
    (records,) = (Path(__file__).parents[2] / "data" / "sm75").glob("*-default-trace.jsonl.gz")
    out = tmp_path / "t4.joblib"
    command = [sys.executable, "-m", "sdfit.cli", "fit", str(records), "--out", str(out)]
    benchmark.pedantic(lambda: subprocess.run(command, check=True, capture_output=True), rounds=3, warmup_rounds=1)
    assert out.exists()


@pytest.mark.slow
def test_fit_of_100000_records(benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`sdfit fit` of 100,000 records on the made-up card, a whole process, and its peak memory.

    Making them takes minutes, so `make bench` leaves it out: pytest -m "bench and slow" tests/bench.
    """
    data, path = made_up(100_000), tmp_path / "records.jsonl"
    lines = [{RECORDS.key: 1, "environment": data.environment}, *map(RECORDS.dump, data.records)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "sdfit.cli", "fit", str(path), "--out", str(tmp_path / "made-up.joblib")]
    benchmark.pedantic(lambda: subprocess.run(command, check=True, capture_output=True), rounds=1)
    with capsys.disabled():
        print(f"\npeak memory: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20:.2f} GiB")


def test_derive_of_one_variant(benchmark: Any) -> None:
    """`sdfit derive` of the default variant, a whole process."""
    command = [sys.executable, "-m", "sdfit.cli", "derive"]
    benchmark.pedantic(lambda: subprocess.run(command, check=True, capture_output=True), rounds=3)


def test_sweep_of_allocated_memory_by_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`sdfit sweep` of the default grid by a bare trace, which tells allocated memory alone, on all processors: workloads a second,
    as long as rows come."""
    out = tmp_path / "bare.jsonl"
    options = ["--gpu", "none", "--backend", "trace", "--no-workspaces", "--out", str(out)]
    with subprocess.Popen([sys.executable, "-m", "sdfit.cli", "sweep", *options], stderr=subprocess.DEVNULL) as process:
        begins, rows = 0.0, 0
        while process.poll() is None:
            time.sleep(0.05)
            if not begins and out.exists() and out.read_bytes().count(b"\n") > 1:
                begins, rows = time.perf_counter(), out.read_bytes().count(b"\n")
        ends = time.perf_counter()
    done = out.read_bytes().count(b"\n") - rows
    with capsys.disabled():
        print(f"\nallocated alone by trace: {done / (ends - begins):.1f} workloads a second")


def test_trace_of_one_workload(benchmark: Any) -> None:
    """One workload traced with its events, the pipeline built already."""
    from sdfit.backends.trace.backend import TraceBackend

    backend = TraceBackend("t4", workspaces=True)
    workload = sdfit.Workload(1024, 1024, batch_size=2)
    assert benchmark.pedantic(backend.measure, args=(workload,), rounds=7, warmup_rounds=1)["outcome"] == "ok"


def test_artifact_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    """The size of every shipped model file [bytes]."""
    with capsys.disabled():
        for name, path in sdfit.available().items():
            print(f"\nartifact {name}: {Path(path).stat().st_size} bytes", end="")


def test_accuracy_on_unseen_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Errors of the shipped T4 model on the traced holdout, none of whose shapes it was fitted on."""
    from sdfit.judging.evaluate import evaluate
    from sdfit.predict.library import load
    from sdfit.records import read

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SimulatedModelWarning)
        predictor = load("t4")
    holdouts = sorted((Path(__file__).parents[2] / "data" / "sm75").glob("*-holdout-trace.jsonl*"))
    assert holdouts, "there is no traced holdout to judge the model on"
    for path in holdouts:
        with capsys.disabled():
            print(f"\n{path} (simulated)\n{evaluate(predictor, read(path)).table()}")


def test_explain_of_one_workload(benchmark: Any) -> None:
    """`sdfit explain` of 768x512 once its libraries are imported, with a pipeline of its own."""
    from sdfit.backends.trace.tracer import Tracer
    from sdfit.study.derivation.explain import explain

    workload = sdfit.Workload(768, 512)
    explain(workload, tracer=Tracer())
    told = benchmark.pedantic(lambda: explain(workload, tracer=Tracer()), rounds=3)
    assert told.accounted_bytes == told.peak_bytes


def test_verdict_and_advice(benchmark: Any, f: sdfit.Predictor) -> None:
    """The search of all changes for a run that does not fit."""
    from sdfit.predict.options import options_that_fit

    w = Workload(2048, 2048, batch_size=8)
    assert benchmark(options_that_fit, f, w, memory="7.5 GiB")


def test_a_guarded_call(benchmark: Any, f: sdfit.Predictor) -> None:
    """What the guard adds to a call of a pipeline that it knows: reading it again, the workload, the bound."""
    pytest.importorskip("diffusers")
    from sdfit.backends.pipeline import build_pipeline

    guarded = sdfit.guard(build_pipeline(dtype="float16", device="meta"), f, memory="80 GiB")
    picture = pytest.importorskip("PIL.Image").new("RGB", (512, 768))
    guarded.predict(image=picture, prompt="a cat")
    assert benchmark(lambda: guarded.predict(image=picture, prompt="a cat").upper) > 0


@pytest.mark.usefixtures("f")
def test_check_of_1000_pictures(benchmark: Any, tmp_path: Path) -> None:
    """Headers read, a verdict each, and the largest size of those that do not fit, by a model that knows no run yet."""
    image = pytest.importorskip("PIL.Image")
    from sdfit.predict import pictures

    rng = random.Random(0)
    for i in range(1000):
        image.new("RGB", (rng.randrange(300, 2400, 20), rng.randrange(300, 2400, 20))).save(
            tmp_path / f"{i}.jpg", quality=5
        )

    def check() -> int:
        f = sdfit.load("t4")
        return len(pictures.check(f, map(pictures.look, pictures.find([tmp_path])), memory=8 << 30))

    assert benchmark.pedantic(check, rounds=3) == 1000
