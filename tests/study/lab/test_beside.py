"""The trace beside a measurement: on records whose difference from the bare trace is known."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from sdfit.backends.trace.backend import TraceBackend  # noqa: E402
from sdfit.backends.trace.tracer import Tracer  # noqa: E402
from sdfit.predict.simulation.workspaces import workspaces_for  # noqa: E402
from sdfit.records import RECORDS, Record  # noqa: E402
from sdfit.study.lab.beside import beside, table  # noqa: E402
from sdfit.study.lab.commands import main  # noqa: E402
from sdfit.sweep.journal import Journal  # noqa: E402
from sdfit.workload import Workload  # noqa: E402

WORKLOAD = Workload(512, 512, safety_checker=False)


@pytest.fixture(scope="module")
def record() -> Record:
    """A workload as the T4's workspaces make it, standing for a measurement."""
    return Record(0, WORKLOAD, **TraceBackend("t4", workspaces=True).measure(WORKLOAD))


def test_nothing_is_left_over_where_the_trace_knows_the_kernels(record: Record) -> None:
    """With the workspaces that made the record, every stage's difference is zero to the byte."""
    assert [d.worst_bytes for d in beside([record], Tracer(workspaces_for("t4")))] == [0] * len(
        record.stage_peaks_bytes
    )


def test_the_bare_trace_leaves_the_copies_of_the_convolution_over(record: Record) -> None:
    """For one image the decoder's difference is 2,432 - 1,536 B per pixel, cuBLAS and the filter beside it."""
    found = {d.key[0]: d for d in beside([record], Tracer())}
    decoder = found["vae_decoder_blocks"]
    fixed = 8_519_680 + 256 * 256 * 9 * 2
    assert decoder.median_bytes == pytest.approx((2432 - 1536) * WORKLOAD.pixels + fixed, rel=1e-3)
    assert decoder.operation.startswith("silu in vae.decoder.up_blocks.3") and decoder.regime == "one image per pass"


def test_the_command_prints_the_table_and_says_what_is_simulated(
    record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A records file in, a table out; a file that is none is one sentence and exit code 1."""
    with Journal(tmp_path / "r.jsonl", {"backend": "trace", "gpu": "none"}, RECORDS) as journal:
        journal.append(record)
    assert main(["beside", str(tmp_path / "r.jsonl"), "--kernels", "t4"]) == 0
    out = capsys.readouterr().out
    assert "trace: simulated" in out and "vae_decoder_blocks float16 kl" in out
    assert main(["beside", str(tmp_path / "none.jsonl")]) == 1
    assert capsys.readouterr().err.startswith("sdfit: cannot read records")


def test_runs_that_failed_are_skipped(record: Record) -> None:
    """An out-of-memory row has no peaks to compare."""
    failed = Record(1, WORKLOAD, "oom", {"unet": 1}, oom_stage="unet")
    assert len(beside([failed, record], Tracer())) == len(record.stage_peaks_bytes) and not beside([failed], Tracer())
    assert table(beside([record], Tracer())).count("\n") == len(record.stage_peaks_bytes)
