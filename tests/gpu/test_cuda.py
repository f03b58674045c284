"""What only a card can show: the real counters, the real kernels, the real pipeline. Skipped without one."""

import pytest
import torch

from sdfit.backends.capacity import STEP_BYTES
from sdfit.backends.cuda import CudaBackend
from sdfit.equation.stages import stages_of
from sdfit.errors import DeviceError
from sdfit.predict.cards import card_slug
from sdfit.records import Record
from sdfit.study.calibration.read import calibrated, told
from sdfit.units import GIB, MIB
from sdfit.workload import Workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card here"),
]


@pytest.fixture(scope="module")
def backend():
    made = CudaBackend()
    yield made
    made._drop()
    made.counters._claim.close()


def test_the_environment_has_every_fact_that_numbers_depend_on(backend):
    """Name, driver, versions and the size of the context are there, and the name is the driver's, shortened."""
    facts = backend.environment()
    assert facts["backend"] == "cuda"
    assert facts["name"] == card_slug(torch.cuda.get_device_name(0))
    for name in ("compute_capability", "total_memory_bytes", "driver", "cuda", "cudnn", "torch", "diffusers"):
        assert facts[name]
    assert facts["context_bytes"] > 50 * MIB


def test_another_card_is_refused(backend):
    """--gpu of a card that is not here names the one that is."""
    other = "t4" if backend.environment()["name"] != "t4" else "h200"
    with pytest.raises(DeviceError, match=backend.environment()["name"]):
        CudaBackend(other)


def test_a_workload_becomes_a_row_and_the_same_one_twice(backend):
    """All stages, counters in their order, a fused kernel; and again, after another workload, to the byte."""
    w = Workload(512, 512)
    row = backend.measure(w)
    record = Record.from_dict({"index": 0, "workload": w.to_dict(), **row})
    assert record.outcome == "ok"
    assert set(record.stage_peaks_bytes) == set(stages_of(w.variant))
    weights = sum(record.component_bytes.values())
    assert weights < record.baseline_bytes < record.allocated_bytes <= record.reserved_bytes < record.device_bytes
    assert record.attention_kernel.split(";")[0] in ("flash_attention", "efficient_attention", "cudnn_attention")
    backend.measure(Workload(520, 776, attention="eager"))
    assert not backend.tainted
    again = backend.measure(w)
    assert again["stage_peaks_bytes"] == row["stage_peaks_bytes"]
    assert again["reserved_bytes"] == row["reserved_bytes"]


def test_going_back_to_a_pipeline_gives_the_same_bytes(backend):
    """After another pipeline was there, the weights lie as they did in an empty allocator."""
    w = Workload(512, 512)
    row = backend.measure(w)
    backend.measure(Workload(512, 512, safety_checker=False))
    again = backend.measure(w)
    assert again["baseline_bytes"] == row["baseline_bytes"]
    assert again["stage_peaks_bytes"] == row["stage_peaks_bytes"]


def test_required_is_bisected_and_a_cap_below_it_is_an_oom_row(backend):
    """A run succeeds with its required capacity; one step under it, it is a row that says where it failed."""
    w = Workload(640, 576)
    backend.bisect = True
    try:
        row = backend.measure(w)
    finally:
        backend.bisect = False
    assert 0 < row["required_bytes"] <= row["reserved_bytes"]
    backend.capacity_bytes = row["required_bytes"] - 2 * STEP_BYTES
    backend._capped.clear()
    backend.counters.cap(backend.capacity_bytes)
    try:
        failed = backend.measure(w)
    finally:
        backend.capacity_bytes = None
        backend.counters.cap(None)
    assert failed["outcome"] == "oom"
    assert failed["oom_stage"] in stages_of(w.variant)
    assert failed["oom_bytes"] <= row["allocated_bytes"] + 64 * MIB
    assert backend.tainted
    assert row["reserved_bytes"] < 16 * GIB


def test_a_history_shows_every_kernel(backend, monkeypatch, tmp_path):
    """Recorded, read and set beside the trace: nearly all of its allocations are found, and the stages' peaks agree."""
    w = Workload(512, 512)
    monkeypatch.setattr(backend, "histories", frozenset({w}))
    row = backend.measure(w)
    path = tmp_path / "0000.pickle.gz"
    path.write_bytes(row["history"])
    run = told(path)
    found, _ = calibrated(run, str(run.card))
    assert (run.workload, run.source) == (w, "measured")
    assert found.frames and found.found > 0.9 * found.of
    assert found.placed[0] > 0.99 * found.placed[1]
    for stage, peak in row["stage_peaks_bytes"].items():
        assert found.card_peaks[stage] == pytest.approx(peak, rel=0.002)  # remainders that were not split are left out
