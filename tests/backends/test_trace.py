"""The trace: exact, the same each time, whatever is skipped, and the numbers that were known before."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

# ruff: noqa: E402
from tiny import TINY

from sdfit.backends import open_backend
from sdfit.backends.trace.tracer import Tracer
from sdfit.equation.stages import stage_key, stages_of
from sdfit.equation.weights import rounded
from sdfit.fit.held_out import fit_stage
from sdfit.fit.observations import observe
from sdfit.predict.simulation.card import Traced
from sdfit.records import Record
from sdfit.workload import Workload

VARIANTS: tuple[dict[str, Any], ...] = (
    {}, {"attention": "eager"}, {"attention": "math"}, {"attention": "sliced"}, {"dtype": "bfloat16"},
    {"dtype": "float32"}, {"vae_slicing": True}, {"vae_tiling": True}, {"vae_slicing": True, "vae_tiling": True},
    {"vae": "tiny"}, {"offload": "model"}, {"safety_checker": False}, {"guidance_scale": 1.0}, {"prompt_length": 154},
)  # fmt: skip


@pytest.fixture(scope="module")
def tracer() -> Tracer:
    """Stable Diffusion v1.5 on meta tensors."""
    torch.set_num_threads(1)
    return Tracer()


@pytest.fixture(scope="module")
def small() -> Tracer:
    """The tiny pipeline on meta tensors: the same code, sooner done."""
    return Tracer(settings=TINY)


def same(one: Traced, two: Traced) -> bool:
    """Whether two traces agree in everything but the time they took."""
    return replace(one, stage_seconds={}) == replace(two, stage_seconds={})


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_skipping_repeats_changes_no_byte(small: Tracer, options: dict[str, Any]) -> None:
    """With steps, slices and tiles skipped the peaks, and the events as sizes in order, are those of the full run."""
    w = Workload(136, 200, **({"batch_size": 2} | options))
    short, full = (small.run(w, keep_events=True, full=full) for full in (False, True))
    assert short.stage_peaks == full.stage_peaks and short.component_bytes == full.component_bytes
    assert tuple(short.stage_peaks) == stages_of(w.variant)
    assert peak_of(short) == peak_of(full) == short.peak_bytes


def peak_of(traced: Traced) -> int:
    """The highest sum of the events."""
    live = top = 0
    for _, size in traced.events or ():
        live += size
        top = max(top, live)
    return top


def test_skipping_repeats_changes_no_byte_of_the_real_architecture(tracer: Tracer) -> None:
    """As above on Stable Diffusion v1.5 with tiles of four shapes."""
    w = Workload(520, 648, vae_tiling=True)
    assert tracer.run(w).stage_peaks == tracer.run(w, full=True).stage_peaks


@pytest.mark.parametrize("options", [{}, {"vae_slicing": True, "batch_size": 3}, {"vae_tiling": True}], ids=str)
def test_the_same_workload_gives_the_same_bytes(small: Tracer, options: dict[str, Any]) -> None:
    """Twice in one tracer, after other workloads, and in a fresh tracer: equal, events included."""
    w = Workload(200, 264, **options)
    first = small.run(w, keep_events=True)
    small.run(Workload(136, 136, attention="eager"))
    assert same(first, small.run(w, keep_events=True))
    assert same(first, Tracer(settings=TINY).run(w, keep_events=True))


@pytest.mark.parametrize("enabled", [False, True])
def test_the_garbage_collector_changes_nothing(small: Tracer, enabled: bool) -> None:
    """Switched off, or made to run all the time: the same bytes, and the switch is as it was."""
    w = Workload(136, 200)
    expected = small.run(w, keep_events=True)
    before, threshold = gc.isenabled(), gc.get_threshold()
    try:
        (gc.enable if enabled else gc.disable)()
        gc.set_threshold(1)
        assert same(expected, small.run(w, keep_events=True))
        assert gc.isenabled() is enabled
    finally:
        gc.set_threshold(*threshold)
        (gc.enable if before else gc.disable)()


def test_two_steps_reach_the_peak_of_more_but_for_two_latents() -> None:
    """PNDM keeps up to four earlier outputs, after two steps two fewer: six and twelve steps take two latents more, and
    nothing else grows."""
    w = Workload(136, 200)
    two, six, twelve = (Tracer(settings=TINY, num_inference_steps=n).run(w, full=True) for n in (2, 6, 12))
    latent = rounded(w.pixels // 64 * 4 * 2)
    assert six.stage_peaks == twelve.stage_peaks
    for stage, peak in two.stage_peaks.items():
        later = stage in ("unet", "vae_decoder_mid", "vae_decoder_blocks", "safety_checker")
        assert six.stage_peaks[stage] - peak == 2 * latent * later, stage


def test_weights_are_those_of_the_checkpoint(tracer: Tracer) -> None:
    """Component by component within a thousandth of FACTS' 2,132,470,614 B, above it by rounding and buffers."""
    w = Workload(256, 256, safety_checker=False)
    traced = tracer.run(w)
    assert traced.weights_bytes == sum(traced.component_bytes.values())
    assert 0 < traced.weights_bytes - 2_132_470_614 < 200_000
    checked = tracer.run(replace(w, safety_checker=True))
    assert 607_963_176 <= checked.weights_bytes - traced.weights_bytes < 607_963_176 + 200_000


def test_the_fused_decoder_takes_1536_bytes_per_pixel(tracer: Tracer) -> None:
    """Before any kernel workspace, float16 and fused attention: three full-resolution tensors of 256 channels."""
    one, two = (tracer.run(Workload(side, side)) for side in (512, 1024))
    assert max(two.stage_peaks, key=two.stage_peaks.__getitem__) == "vae_decoder_blocks"
    slope = (two.peak_bytes - one.peak_bytes) / (1024**2 - 512**2)
    assert slope == pytest.approx(1536, rel=0.01)
    decoder = (two.stage_peaks["vae_decoder_blocks"] - one.stage_peaks["vae_decoder_blocks"]) / (1024**2 - 512**2)
    assert decoder == slope


EAGER = [
    Workload(h, w, batch_size=b, guidance_scale=g, attention="eager", safety_checker=False)
    for h, w, b, g in (
        (512, 512, 1, 7.5),
        (512, 768, 1, 1.0),
        (768, 768, 2, 7.5),
        (1024, 1024, 1, 7.5),
        (1024, 1024, 2, 1.0),
        (1280, 1024, 1, 7.5),
        (1536, 1536, 1, 7.5),
        (640, 640, 4, 7.5),
        (2048, 2048, 1, 7.5),
        (896, 1152, 1, 1.0),
    )
]


def test_the_eager_equation_comes_out_of_trace_and_fit(tracer: Tracer) -> None:
    """0.0078125 B per sample and px² (to 1e-4), 110.375 B per sample and px (to 1e-3), as found before by hand.

    The closed form found then for one guided image, 2132556947 + 220.75 A + 0.015625 A², gives the traced peak to 2e-4. Here
    one latent more is held, 0.125 B per px, and the prompt's embeddings, 0.4 MB.
    """
    records = [
        Record(i, w, "ok", dict(t.stage_peaks), dict(t.component_bytes), t.peak_bytes, baseline_bytes=t.weights_bytes)
        for i, w in enumerate(EAGER)
        for t in [tracer.run(w)]
    ]
    for record in records:
        assert max(record.stage_peaks_bytes, key=record.stage_peaks_bytes.__getitem__) == "unet"
        w = record.workload
        if w.guided and w.batch_size == 1:
            formula = 2_132_556_947 + 220.75 * w.pixels + 0.015625 * w.pixels**2
            assert record.allocated_bytes == pytest.approx(formula, rel=2e-4)
    key = stage_key("unet", EAGER[0].variant)
    model = fit_stage(key, observe(records)[key])
    found = dict(zip(model.terms_, model.coef_[0], strict=True))
    assert len(model.coef_) == 1
    assert found["n·A²"] == pytest.approx(0.0078125, rel=1e-4)
    assert found["n·A"] + 77 * found.get("n·L·A", 0.0) == pytest.approx(110.375, rel=1e-3)


@pytest.mark.parametrize("options", [v for v in VARIANTS if v.get("dtype") != "bfloat16"][:9], ids=str)
def test_every_variant_is_traced(tracer: Tracer, options: dict[str, Any]) -> None:
    """Stable Diffusion v1.5 runs through the variant's own stages, its peak above its weights."""
    w = Workload(264, 328, **options)
    traced = tracer.run(w)
    assert tuple(traced.stage_peaks) == stages_of(w.variant)
    held = 0 if w.offload == "model" else traced.weights_bytes
    assert all(peak > held for peak in traced.stage_peaks.values())
    assert ("safety_checker" in traced.component_bytes) is w.safety_checker


def test_options_do_what_they_are_for(small: Tracer) -> None:
    """Slicing, tiling, offload and no checker lower the peak; eager attention, guidance and float32 raise the UNet's."""
    base = Workload(264, 264, batch_size=2)
    plain = small.run(base)
    for change in ({"vae_slicing": True}, {"vae_tiling": True}, {"offload": "model"}, {"safety_checker": False}):
        assert small.run(replace(base, **change)).peak_bytes < plain.peak_bytes, change
    without = small.run(replace(base, guidance_scale=1.0))
    for dear, cheap in ((small.run(replace(base, attention="eager")), plain), (plain, without)):
        assert dear.stage_peaks["unet"] > cheap.stage_peaks["unet"]
        assert dear.stage_peaks["vae_encoder_blocks"] <= cheap.stage_peaks["vae_encoder_blocks"] + 100_000
    assert small.run(replace(base, dtype="float32")).weights_bytes == pytest.approx(2 * plain.weights_bytes, rel=0.03)


def test_prompts_of_8_and_77_cost_the_same_and_154_more(small: Tracer) -> None:
    """The tokenizer pads to 77; longer embeddings cost more in the UNet."""
    short, padded, long = (small.run(Workload(200, 264, n), keep_events=True) for n in (8, 77, 154))
    assert same(short, padded)
    assert long.stage_peaks["unet"] > padded.stage_peaks["unet"]


def test_pixels_beyond_a_multiple_of_8_cost_nothing(small: Tracer) -> None:
    """380x396 runs as 376x392."""
    assert same(small.run(Workload(143, 207)), small.run(Workload(136, 200)))


def test_the_backend_gives_a_whole_record() -> None:
    """Fields of a Record, simulated and named so; without workspaces no allocator is claimed."""
    backend = open_backend("trace", {"gpu": "auto"})
    environment = backend.environment()
    w = Workload(256, 256)
    record = Record(0, w, **backend.measure(w))
    assert Record.from_dict(json.loads(json.dumps(asdict(record)))) == record
    assert record.outcome == "ok" and record.allocated_bytes == max(record.stage_peaks_bytes.values())
    assert environment["backend"] == "trace" and environment["workspaces"] is None and environment["name"] == "none"
    assert record.reserved_bytes is record.required_bytes is record.device_bytes is None


@pytest.mark.parametrize(
    ("gpu", "name"), [("t4", "sm75"), ("RTX 3060", "sm86"), ("sm120", "sm120"), ("voodoo2", "voodoo2")]
)
def test_a_trace_is_named_after_the_architecture(gpu: str, name: str) -> None:
    """Any card of the table can be traced; what the records hold is true of its architecture, so they bear its name."""
    environment = open_backend("trace", {"gpu": gpu, "workspaces": True}).environment()
    assert environment["name"] == name and (environment["workspaces"] is None) == (gpu == "voodoo2")


PROGRAM = """
import resource, sys, torch
torch.set_num_threads(1)
from sdfit.backends.trace.tracer import Tracer
from sdfit.workload import Workload
tracer = Tracer()
tracer.run(Workload(2048, 2048, batch_size=4, attention="eager"), keep_events=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


def test_a_trace_needs_little_memory_itself() -> None:
    """A fresh process that traces a run of a terabyte stays under 1.5 GiB of resident memory."""
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(ran.stdout.split()[-1]) < 1.5 * (1 << 30)
