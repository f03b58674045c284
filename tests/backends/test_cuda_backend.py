"""The logic of the backend ``cuda``, run on CPU tensors: stage boundaries, rows, out of memory, a worker that is tainted.

The same class runs on a card; only its counters are others (`sdfit.backends.counters`).
"""

import ast
import gc
import gzip
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cpu_counters import CpuCounters
from tiny import TINY

from sdfit.backends import counters, cuda, kernels
from sdfit.backends.capacity import STEP_BYTES
from sdfit.backends.counters import chosen, claimed
from sdfit.backends.cuda import CudaBackend
from sdfit.backends.history import worth_recording
from sdfit.backends.pipeline import build_pipeline
from sdfit.backends.run import is_out_of_memory, requested_bytes
from sdfit.backends.trace.tracer import Tracer
from sdfit.equation.stages import stages_of
from sdfit.equation.weights import rounded
from sdfit.errors import DeviceError, SdfitError
from sdfit.records import Record, read
from sdfit.study.calibration.read import calibrated, told
from sdfit.sweep.grid import Plan
from sdfit.sweep.run import sweep
from sdfit.sweep.workers import run_one
from sdfit.units import MIB
from sdfit.workload import Workload

MEASURED = ("boundaries", "capacity", "counters", "cuda", "environment", "history", "kernels", "pipeline", "run")
OPTIONS = {"settings": TINY, "counters": CpuCounters, "warm_up_side": 64}
no_card = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")


def job(height=128, width=128, **options):
    return Workload(height, width, **{"dtype": "float32", **options})


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads gain nothing on a pipeline this small."""
    torch.set_num_threads(1)
    yield
    gc.unfreeze()


@pytest.fixture
def backend():
    return CudaBackend(**OPTIONS)


def test_what_measures_does_not_import_what_simulates():
    """No module of the measured backend imports the trace, nor does one of them inside a function."""
    for name in MEASURED:
        tree = ast.parse(Path(cuda.__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))
        found = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        found |= {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        assert not [module for module in found if "trace" in module], name


# -- rows --


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention": "eager"},
        {"attention": "math", "prompt_length": 154},
        {"attention": "sliced", "guidance_scale": 1.0},
        {"vae_slicing": True, "batch_size": 2},
        {"vae_tiling": True},
        {"vae": "tiny"},
        {"safety_checker": False},
    ],
    ids=str,
)
def test_each_variant_becomes_a_row_with_every_stage_it_runs_through(backend, options):
    """A measured workload is a valid record, its stages are those of its variant, and its peak is their highest."""
    w = job(**options)
    fields = backend.measure(w)
    record = Record.from_dict({"index": 0, "workload": w.to_dict(), **fields})
    assert record.outcome == "ok"
    assert set(record.stage_peaks_bytes) == set(record.stage_s) == set(stages_of(w.variant))
    assert record.allocated_bytes == max(record.stage_peaks_bytes.values())
    assert record.baseline_bytes < min(record.stage_peaks_bytes.values())
    assert record.reserved_bytes >= record.allocated_bytes
    assert not backend.tainted


def test_the_same_workload_gives_the_same_bytes_however_long_the_worker_lives(backend):
    """Measured first, after others, and in a fresh backend: the same peaks and the same baseline to the byte."""
    first = backend.measure(job(192, 128))
    for other in (job(256, 256, attention="eager"), job(batch_size=3), job(64, 128, prompt_length=231)):
        backend.measure(other)
    names = ("stage_peaks_bytes", "baseline_bytes", "component_bytes", "reserved_bytes")
    again, fresh = backend.measure(job(192, 128)), CudaBackend(**OPTIONS).measure(job(192, 128))
    assert not backend.tainted
    for name in names:
        assert first[name] == again[name] == fresh[name]


def test_the_weights_are_counted_as_the_allocator_rounds_them(backend):
    """Each parameter and buffer rounded up to 512 B on its own; together they are the baseline of the run."""
    fields = backend.measure(job())
    unet = backend._pipe.unet
    tensors = [*unet.parameters(), *unet.buffers()]
    exact = sum(t.numel() * t.element_size() for t in tensors)
    assert fields["component_bytes"]["unet"] == sum(rounded(t.numel() * t.element_size()) for t in tensors) > exact
    assert set(fields["component_bytes"]) == {"unet", "vae", "text_encoder", "safety_checker"}
    left = fields["baseline_bytes"] - sum(fields["component_bytes"].values())
    assert 0 <= left <= 32 * 512  # non-persistent remains of the modules' own making, such as time-step tables


def test_a_stage_peak_is_of_that_stage_alone(backend):
    """The counters begin afresh at each boundary: a large decoder does not raise the text encoder's peak."""
    small, large = (backend.measure(job(side, side))["stage_peaks_bytes"] for side in (64, 256))
    grown = {stage: large[stage] - small[stage] for stage in small}
    assert grown["vae_decoder_blocks"] > 10 * grown["text_encoder"]


def test_materialised_attention_is_told_from_fused(backend):
    """The kernel is noted from the run itself: what PyTorch chose, or that the processor multiplied matrices."""
    found = {a: backend.measure(job(attention=a))["attention_kernel"] for a in ("sdpa", "math", "eager", "sliced")}
    assert found["math"] == "math"
    assert found["eager"] == "materialised"
    assert found["sliced"].startswith("materialised; vae: ")
    assert found["sdpa"] not in ("math", "materialised", None)


def test_noting_the_kernel_takes_no_memory(backend, monkeypatch):
    """The peaks are the same to the byte with and without it."""
    noted = backend.measure(job())["stage_peaks_bytes"]
    monkeypatch.setattr(kernels, "first_attentions", lambda pipe: {})
    assert backend.measure(job())["stage_peaks_bytes"] == noted


def test_more_steps_change_the_peak_by_the_latents_that_the_scheduler_keeps():
    """Two steps lack exactly the answers that PNDM still holds after five: two latents here, and no more after fifty."""
    rows = [CudaBackend(**OPTIONS, num_inference_steps=n).measure(job()) for n in (2, 5, 12)]
    two, five, twelve = (row["stage_peaks_bytes"]["vae_decoder_blocks"] for row in rows)
    latent_bytes = 4 * 16 * 16 * 4
    assert five - two == 2 * latent_bytes
    assert twelve == five


def test_offloaded_components_leave_no_hooks_behind():
    """Model offload is set up for its pipeline and undone with it; the next pipeline is measured as if it were first."""
    backend = CudaBackend(**OPTIONS)
    assert backend.measure(job(offload="model"))["outcome"] == "ok"
    assert hasattr(backend._pipe.unet, "_hf_hook")
    after = backend.measure(job())
    assert not hasattr(backend._pipe.unet, "_hf_hook")
    assert after["stage_peaks_bytes"] == CudaBackend(**OPTIONS).measure(job())["stage_peaks_bytes"]


def test_a_second_seed_gives_the_same_bytes():
    """Peak memory does not depend on the values of the weights."""
    one, two = (CudaBackend(**OPTIONS, seed=seed).measure(job()) for seed in (0, 1))
    assert one["stage_peaks_bytes"] == two["stage_peaks_bytes"]


# -- histories --


def test_a_history_is_what_happened_and_costs_the_record_nothing(tmp_path):
    """Recorded in a run of its own: its row is as without it, its blocks are the run's, and calibration finds them all."""
    w = job(128, 192, batch_size=2)
    plain = CudaBackend(**OPTIONS).measure(w)
    backend = CudaBackend(**OPTIONS, histories=[w.to_dict()])
    row = backend.measure(w)
    content = row.pop("history")
    names = ("stage_peaks_bytes", "baseline_bytes", "component_bytes", "reserved_bytes", "outcome")
    assert {n: row[n] for n in names} == {n: plain[n] for n in names}
    assert "history" not in backend.measure(job(64, 64))
    assert not backend.tainted
    path = tmp_path / "0000.pickle.gz"
    path.write_bytes(content)
    run = told(path)
    assert (run.workload, run.card, run.num_inference_steps) == (w, "cpu", 2)
    assert str(Path(torch.__file__).parents[1]).encode() not in gzip.decompress(content)  # the machine's own paths
    found, _ = calibrated(run, "cpu", Tracer(settings=TINY))
    assert found.frames and found.found > 0.97 * found.of
    assert found.card_peaks == row["stage_peaks_bytes"]
    assert found.placed[0] == found.placed[1] > 1000
    assert found.weights_bytes == sum(row["component_bytes"].values())
    kernels = [k for k in found.kernels if k.shapes.operation in ("convolution", "addmm", "mm")]
    assert len(kernels) > 50 and not any(k.held_bytes for k in kernels)  # a processor's kernels ask for nothing


def test_a_run_that_fails_has_no_history():
    """Out of memory is a row without one."""
    free = CudaBackend(**OPTIONS).measure(job(256, 256))
    capacity = free["allocated_bytes"] - 4096
    row = CudaBackend(**OPTIONS, capacity_bytes=capacity, histories=[job(256, 256).to_dict()]).measure(job(256, 256))
    assert row["outcome"] == "oom" and "history" not in row


@pytest.mark.slow
def test_a_sweep_writes_histories_beside_its_records(tmp_path):
    """Through a real worker process: one file for each workload asked for, in a folder of the records' name."""
    jobs = (job(64, 64), job(64, 64, batch_size=2), job(128, 64))
    plan = Plan("few", "", 0, 2, jobs, "0" * 16, ())
    outcome = sweep(plan, "cuda", OPTIONS, tmp_path / "few.jsonl", workers=1, histories=worth_recording(jobs))
    assert outcome.complete
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.gz"))
    assert files == ["few-history/0000.pickle.gz", "few-history/0001.pickle.gz"]
    assert [told(tmp_path / name).workload for name in files] == [jobs[0], jobs[1]]


# -- out of memory --


def capped(below_bytes):
    free = CudaBackend(**OPTIONS).measure(job(256, 256))
    backend = CudaBackend(**OPTIONS, capacity_bytes=free["allocated_bytes"] - below_bytes)
    return free, backend, backend.measure(job(256, 256))


def test_out_of_memory_is_a_row_with_its_stage_and_a_lower_bound():
    """Under a cap just below the peak the stage of the peak fails; stages before it keep their peaks; the bound holds."""
    free, backend, row = capped(4096)
    peak_stage = max(free["stage_peaks_bytes"], key=free["stage_peaks_bytes"].get)
    assert row["outcome"] == "oom"
    assert row["oom_stage"] == peak_stage
    assert backend.capacity_bytes < row["oom_bytes"] <= free["allocated_bytes"] + 8 * MIB
    assert row["cap_bytes"] == backend.capacity_bytes
    before = {s: p for s, p in row["stage_peaks_bytes"].items() if s != peak_stage}
    assert before == {s: free["stage_peaks_bytes"][s] for s in before}
    assert "Tried to allocate" in row["message"]
    Record.from_dict({"index": 0, "workload": job(256, 256).to_dict(), **row})


def test_a_worker_that_ran_out_of_memory_is_tainted_though_its_memory_came_back():
    """cuDNN may have kept other plans, so the next workload needs a fresh process, clean as this one looks."""
    _, backend, row = capped(4096)
    assert backend.tainted
    assert backend.counters.allocated() == row["baseline_bytes"]


def test_a_failure_that_the_run_survived_makes_the_worker_tainted_and_keeps_the_row(backend, monkeypatch):
    """A convolution whose best plan did not fit went on with another one: the row stands, the worker goes."""
    failures = iter([(0, 0), (0, 0), (0, 0), (2, 1)])  # warm-up before and after, the run before and after
    monkeypatch.setattr(backend.counters, "troubles", lambda: next(failures))
    row = backend.measure(job())
    assert (row["outcome"], row["retries"]) == ("ok", 2)
    assert backend.tainted


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...", 19.99 * MIB, 20 * MIB),
        ("CUDA out of memory. Tried to allocate 72.00 GiB. GPU 0 has ...", 71.99 * 1024 * MIB, 72 * 1024 * MIB),
        ("Tried to allocate 512 bytes.", 512, 512),
        ("no request in here", 0, 0),
    ],
)
def test_the_request_in_a_message_is_a_lower_bound(text, low, high):
    """The message rounds to two digits; what is taken from it never exceeds the request."""
    assert low <= requested_bytes(text) <= high


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), False),
        (RuntimeError("CUDA error: out of memory"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: out of memory"),
            False,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
    ids=lambda v: str(v)[:30],
)
def test_only_the_devices_memory_counts_as_out_of_memory(error, known):
    """A library's failed allocation is one; the host's memory, or another failure, is not."""
    assert is_out_of_memory(error) is known


def test_cudnn_without_a_plan_is_out_of_memory_only_if_requests_failed():
    """The same words stand for a shape that cuDNN cannot do and for plans that did not fit."""
    error = RuntimeError("GET was unable to find an engine to execute this computation")
    assert is_out_of_memory(error, failures=3)
    assert not is_out_of_memory(error, failures=0)


def test_another_failure_is_a_crash_row_and_the_worker_is_tainted(backend, monkeypatch):
    """What is not out of memory is not made one; nobody knows what it left behind."""
    backend.measure(job())

    def broken(*_, **__):
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(backend._pipe.unet, "forward", broken)
    fields = run_one(backend, job())
    assert fields == {"outcome": "crash", "message": "RuntimeError: device-side assert"}
    assert backend.tainted


# -- a worker that is tainted --


def test_memory_left_behind_makes_the_worker_tainted_and_keeps_the_row(backend):
    """The baseline after a workload differs by what stayed: that row was measured from a clean start, the next is not."""
    backend.measure(job())
    pipe, kept = backend._pipe, []
    handle = pipe.unet.register_forward_hook(lambda m, i, o: kept.append(o.sample if hasattr(o, "sample") else o[0]))
    row = backend.measure(job())
    handle.remove()
    assert row["outcome"] == "ok"
    assert backend.tainted
    assert backend.counters.allocated() > row["baseline_bytes"]


def test_memory_that_appears_between_two_workloads_is_refused(backend):
    """If the baseline is not what the workload before left, nothing is measured on it."""
    backend.measure(job())
    with backend.counters.watching():
        stray = torch.zeros(1000)
    with pytest.raises(SdfitError, match="allocated before the run"):
        backend.measure(job())
    assert backend.tainted
    assert stray.numel() == 1000


def test_a_scheduler_holds_nothing_over(backend):
    """PNDM keeps the UNet's last answers on the device; they would shift the next baseline by the size of this run."""
    baselines = {backend.measure(job(side, side, batch_size=2))["baseline_bytes"] for side in (64, 128, 192)}
    assert len(baselines) == 1
    assert not backend.tainted


def test_a_pipeline_is_rebuilt_from_an_empty_allocator(backend):
    """Changing what a pipeline is built from leaves nothing of the one before; returning to it gives the same bytes."""
    first = backend.measure(job())
    backend.measure(job(vae="tiny"))
    backend._drop()
    assert backend.counters.allocated() == 0
    again = backend.measure(job())
    assert again["stage_peaks_bytes"] == first["stage_peaks_bytes"]
    assert again["baseline_bytes"] == first["baseline_bytes"]


def test_int8_is_measured_as_it_is_traced_and_leaves_nothing():
    """A run stands above its trace by what a plain one does, to the byte in each stage; so does a plain one in that process after it.

    A weight of optimum-quanto says that it has the bytes of its dtype, and has those of its parts: it was counted with 0.87 MB.
    """
    pytest.importorskip("optimum.quanto")
    backend, tracer = CudaBackend(**OPTIONS), Tracer(settings=TINY)
    above = []
    for w in (job(), job(execution="int8"), job()):
        row, traced = backend.measure(w), tracer.run(w)
        assert row["component_bytes"] == traced.component_bytes and not backend.tainted
        above.append({stage: row["stage_peaks_bytes"][stage] - peak for stage, peak in traced.stage_peaks.items()})
    assert above[0] == above[1] == above[2]


@pytest.mark.slow
def test_a_sweep_replaces_tainted_workers_and_finishes(tmp_path):
    """Through real worker processes: out of memory in the middle, and every other row as if it had not happened."""
    jobs = (job(64, 64), job(256, 256), job(128, 64))
    plan = Plan("few", "", 0, 2, jobs, "0" * 16, ())
    free = CudaBackend(**OPTIONS).measure(job(256, 256))
    small = {**OPTIONS, "capacity_bytes": free["allocated_bytes"] - 4096}
    outcome = sweep(plan, "cuda", small, tmp_path / "few.jsonl", workers=1)
    assert (outcome.done, outcome.oom, outcome.crashed, outcome.complete) == (3, 1, 0, True)
    rows = read(tmp_path / "few.jsonl").records
    assert [r.outcome for r in rows] == ["ok", "oom", "ok"]
    for row in rows:
        if row.outcome == "ok":
            assert row.stage_peaks_bytes == CudaBackend(**OPTIONS).measure(row.workload)["stage_peaks_bytes"]


# -- required --


def test_required_is_bisected_and_lies_between_allocated_and_reserved(monkeypatch):
    """CPU tensors have no fragmentation: the smallest cap that works is the peak itself, to one step."""
    monkeypatch.setattr(cuda, "STEP_BYTES", 64 << 10)
    monkeypatch.setattr("sdfit.backends.capacity.SEGMENT_BYTES", 4 << 10)
    backend = CudaBackend(**OPTIONS, bisect=True)
    row = backend.measure(job())
    assert row["allocated_bytes"] <= row["required_bytes"] <= row["allocated_bytes"] + (64 << 10)
    assert not backend.tainted
    assert backend.counters.capacity_bytes is None
    other = backend.measure(job(192, 64))
    assert other["stage_peaks_bytes"] == CudaBackend(**OPTIONS).measure(job(192, 64))["stage_peaks_bytes"]


def test_a_size_that_was_tried_under_caps_is_not_measured_again_in_that_process():
    """Its convolutions may keep smaller plans; the row says so, is no result, and is run again on resume."""
    backend = CudaBackend(**OPTIONS, bisect=True)
    backend.measure(job())
    fields = run_one(backend, job(guidance_scale=1.0))
    assert fields["outcome"] == "crash"
    assert "under caps" in fields["message"]
    assert backend.tainted


def test_required_is_unknown_where_the_allocators_state_is_lost(monkeypatch):
    """A try that leaves memory behind ends the bisection: no number, and a tainted worker."""
    backend = CudaBackend(**OPTIONS, bisect=True)
    backend.measure(job(64, 64))
    kept = []
    run = backend._run

    def leaky(pipe, workload):
        found = run(pipe, workload)
        if backend.counters.capacity_bytes is not None:
            with backend.counters.watching():
                kept.append(torch.zeros(4096))
        return found

    monkeypatch.setattr(backend, "_run", leaky)
    row = backend.measure(job(128, 64))
    assert row["outcome"] == "ok"
    assert row["required_bytes"] is None
    assert backend.tainted
    assert STEP_BYTES == 16 * MIB


# -- which card --


@no_card
def test_without_a_card_both_ways_on_are_named():
    """The one thing to do is to go to a machine with a card, or to simulate."""
    with pytest.raises(DeviceError, match=r"machine with one.*--backend trace"):
        CudaBackend("t4")


def test_another_card_than_the_one_asked_for_is_refused_by_name():
    """--gpu t4 on an H200 stops and says what is there and what to type."""
    with pytest.raises(DeviceError, match=r"'t4'.*NVIDIA H200 \('h200'\).*--gpu h200"):
        chosen("t4", ["NVIDIA H200"])
    assert chosen("h200", ["Tesla T4", "NVIDIA H200"]) == [1]
    assert chosen("NVIDIA H200", ["NVIDIA H200"]) == [0]
    assert chosen("auto", ["Tesla T4", "NVIDIA H200"]) == [0, 1]


def test_two_workers_never_take_the_same_card(tmp_path, monkeypatch):
    """Each takes the next free one, and when none is left it says so; a card is free again when its worker ends."""
    pytest.importorskip("fcntl")
    monkeypatch.setattr(counters.tempfile, "gettempdir", lambda: str(tmp_path))
    uuids = ["GPU-a", "GPU-b"]
    first, second = claimed([0, 1], uuids), claimed([0, 1], uuids)
    assert (first[0], second[0]) == (0, 1)
    with pytest.raises(DeviceError, match="another sdfit process"):
        claimed([0, 1], uuids)
    first[1].close()
    assert claimed([0, 1], uuids)[0] == 0


def test_a_folder_of_weights_is_measured_like_the_settings(tmp_path):
    """--weights PATH goes the same way: an ok row with the same component bytes."""
    build_pipeline(dtype="float32", settings=TINY).save_pretrained(tmp_path)
    row = CudaBackend(weights=str(tmp_path), counters=CpuCounters, warm_up_side=64).measure(job())
    assert row["outcome"] == "ok"
    assert row["component_bytes"] == CudaBackend(**OPTIONS).measure(job())["component_bytes"]


class Nvml:
    """NVML of one made-up card: 500 MiB in use before the context, 900 after."""

    nvmlMemory_v2 = 2
    NVMLError = ValueError

    def __init__(self):
        self.answers = iter([500 * MIB])

    def nvmlSystemGetDriverVersion(self):
        return b"580.1"

    def nvmlDeviceGetCount(self):
        return 1

    def nvmlDeviceGetHandleByIndex(self, index):
        return "handle"

    def nvmlDeviceGetUUID(self, handle):
        return "GPU-1234"

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return []

    nvmlDeviceGetGraphicsRunningProcesses = nvmlDeviceGetComputeRunningProcesses

    def nvmlDeviceGetMemoryInfo(self, handle, version=None):
        if version is not None:
            raise ValueError("an old driver")
        return SimpleNamespace(used=next(self.answers, 900 * MIB))


def test_the_counters_of_a_card_ask_pytorch_and_nvml(monkeypatch, tmp_path):
    """Each counter reads the function it should, in bytes, of the card chosen: held against stand-ins for both."""
    library, caps = Nvml(), []
    monkeypatch.setattr("sdfit.predict.nvml._library", lambda: library)
    monkeypatch.setattr(counters.tempfile, "gettempdir", lambda: str(tmp_path))
    card = SimpleNamespace(uuid="1234", major=9, minor=0, total_memory=100 * 1024 * MIB)
    stand_ins = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda i: "NVIDIA H200",
        "get_device_properties": lambda i: card,
        "set_device": lambda i: None,
        "synchronize": lambda i: None,
        "empty_cache": lambda: None,
        "memory_reserved": lambda i: 2 * MIB,
        "memory_allocated": lambda i: 5,
        "max_memory_allocated": lambda i: 6,
        "max_memory_reserved": lambda i: 7,
        "reset_peak_memory_stats": lambda i: None,
        "memory_stats": lambda i: {"num_alloc_retries": 3, "num_ooms": 1},
        "set_per_process_memory_fraction": lambda share, i: caps.append(share),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    with monkeypatch.context() as inside:
        inside.setattr(torch, "empty", lambda *_, **__: None)
        made = counters.CudaCounters("h200")
    facts = made.facts()
    assert (facts["name"], facts["gpu"], facts["compute_capability"]) == ("h200", "NVIDIA H200", "9.0")
    assert (facts["driver"], facts["idle_bytes"], facts["context_bytes"]) == ("580.1", 500 * MIB, 398 * MIB)
    assert (made.allocated(), made.peaks(), made.used(), made.troubles()) == (5, (6, 7), 900 * MIB, (3, 1))
    assert made.others() == 898 * MIB  # a driver that lists no processes: what is in use and not reserved here
    made.cap(25 * 1024 * MIB)
    made.cap(None)
    assert caps == [0.25, 1.0]
    for act in (made.settle, made.forget, made.synchronise, made.reset_peaks):
        act()
    with made.watching():
        pass
    calls = []
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda *args, **how: calls.append((args, how)))
    monkeypatch.setattr(memory, "_snapshot", lambda index: {"segments": [], "device_traces": [[], []], "of": index})
    with made.recording() as snapshot:
        assert snapshot()["of"] == 0
    assert calls == [(("all",), {"context": "alloc", "stacks": "python"}), ((None,), {})]
    made._claim.close()


def test_a_scheduler_and_guidance_that_ends_early_run_on_the_card_too():
    """Each keeps its latents, and no peak rises where the UNet's batch halves after two of five steps."""
    w = job(batch_size=2)
    whole, ddim, cut = (
        CudaBackend(**OPTIONS, num_inference_steps=5, **extra)
        for extra in ({}, {"scheduler": "ddim"}, {"guidance_share": 0.4})
    )
    first, second = whole.measure(w), ddim.measure(w)
    latents = rounded(2 * 4 * 16 * 16 * 4)  # of both images, in float32
    kept = first["stage_peaks_bytes"]["vae_decoder_blocks"] - second["stage_peaks_bytes"]["vae_decoder_blocks"]
    assert kept == pytest.approx(3 * latents, abs=4096) and type(ddim._pipe.scheduler).__name__ == "DDIMScheduler"
    samples = []
    pipe = cut._prepared(w)
    hook = pipe.unet.register_forward_pre_hook(lambda module, given: samples.append(len(given[0])))
    third = cut.measure(w)
    hook.remove()
    assert samples[:3] == [4, 4, 4] and set(samples[3:]) == {2} and len(samples) == 6
    del first["stage_peaks_bytes"]["safety_checker"]  # the callback's locals hold the picture, which a card does not
    assert all(third["stage_peaks_bytes"][stage] <= peak for stage, peak in first["stage_peaks_bytes"].items())
