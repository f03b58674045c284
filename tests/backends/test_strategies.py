"""Ways to run that save memory, traced: weights that come module by module, slices, schedulers, a late guidance cut-off."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from tiny import TINY

from sdfit.backends.pipeline import build_pipeline, call_arguments, place
from sdfit.backends.quantised import in_int8
from sdfit.backends.schedulers import SCHEDULERS, guidance_until
from sdfit.backends.trace.backend import TraceBackend
from sdfit.backends.trace.tracer import Tracer
from sdfit.equation.stages import UNET_STAGES, resident, stages_of
from sdfit.equation.weights import component_bytes
from sdfit.errors import InvalidWorkload, SdfitError
from sdfit.predict.pipelines import read
from sdfit.predict.simulation.library import NotSimulated
from sdfit.predict.simulation.replay import replay
from sdfit.predict.simulation.segments import CACHE_GIVEN_BACK
from sdfit.predict.simulation.simulate import Simulator
from sdfit.predict.simulation.workspaces import workspaces_for
from sdfit.study.comparison import published
from sdfit.study.lab.published import others, trace_published
from sdfit.workload import SLICES, STREAMED, Workload

LATENT_BYTES = 4 * 64 * 64 * 2
"""Of one image of 512x512 in float16."""


@pytest.fixture(scope="module")
def tracer() -> Tracer:
    """Stable Diffusion v1.5 on meta tensors, as a T4 runs it."""
    torch.set_num_threads(1)
    return Tracer(workspaces_for("t4"))


@pytest.fixture(scope="module")
def bare() -> Tracer:
    """The same without kernel workspaces."""
    torch.set_num_threads(1)
    return Tracer()


@pytest.fixture(scope="module")
def small() -> Tracer:
    """The tiny pipeline, bare."""
    return Tracer(settings=TINY)


# -- offload, module by module --


@pytest.mark.parametrize("id", ["GP-001", "GP-002", "GP-003", "GP-004", "GP-005", "GP-006"])
def test_published_peaks_with_and_without_offload_are_hit(id: str) -> None:
    """GTX 1070 and P100 at 512x512: none 3519.1, model 2707.8, sequential 1463.6 MiB, within 0.8 %."""
    (row,) = (r for r in (*published.rows(), *others()) if r.id == id)
    expected, _ = trace_published(row, Tracer())
    assert abs(expected / row.peak_bytes - 1) < 0.008


@pytest.mark.parametrize("offload", STREAMED)
def test_of_a_component_only_what_runs_is_there(bare: Tracer, offload: str) -> None:
    """The UNet's peak holds less than a tenth of its weights module by module, and of blocks less than half of them."""
    none, streamed = (bare.run(Workload(512, 512, offload=o)) for o in ("none", offload))
    unet = none.component_bytes["unet"]
    checker = none.component_bytes["safety_checker"] if offload == "sequential" else 0
    activations = none.stage_peaks["unet"] - none.weights_bytes
    there = max(streamed.stage_peaks[stage] for stage in UNET_STAGES) - checker - activations
    assert set(resident("unet", offload)) == ({"safety_checker"} if checker else set())
    assert 0 <= there < unet * (0.5 if offload == "group_block" else 0.1)
    assert streamed.component_bytes == none.component_bytes


@pytest.mark.parametrize("offload", STREAMED)
def test_deep_blocks_set_the_unets_peak_in_small_images_and_the_others_in_large_ones(
    tracer: Tracer, offload: str
) -> None:
    """Which is why they are two stages; without such an offload there is one, and the largest feature maps set it."""
    small, large = (tracer.run(Workload(side, side, offload=offload)).stage_peaks for side in (256, 2048))
    assert small["unet_deep"] > 1.05 * small["unet"] and large["unet"] > 1.4 * large["unet_deep"]
    assert "unet_deep" not in tracer.run(Workload(256, 256, offload="model")).stage_peaks


def test_leaves_come_alike_whichever_hooks_bring_them(tracer: Tracer) -> None:
    """accelerate's and diffusers' differ by the checker, which sequential offload leaves on the card, and by a buffer: so
    both share their coefficients."""
    one, other = (
        tracer.run(Workload(384, 512, safety_checker=False, offload=offload)).stage_peaks
        for offload in ("sequential", "group_leaf")
    )
    assert one.keys() == other.keys() and all(0 <= peak - other[stage] <= 1024 for stage, peak in one.items())


@pytest.mark.parametrize("offload", STREAMED)
def test_what_came_is_gone_after_the_run(small: Tracer, offload: str) -> None:
    """Every block that is allocated is freed but the checker's under sequential offload; the next run is as before."""
    w = Workload(128, 128, offload=offload, batch_size=2)
    first = small.run(w, keep_events=True)
    plain = small.run(Workload(128, 128, batch_size=2))
    again = small.run(w, keep_events=True)
    live: dict[int, int] = {}
    for block, size in first.events or ():
        live[block] = live.get(block, 0) + size
    kept = sum(live.values())
    stays = sum(first.component_bytes[c] for c in resident("unet", offload))
    assert kept < stays + 40_000  # the last image, and a buffer
    assert first.stage_peaks == again.stage_peaks and tuple(first.stage_peaks) == stages_of(w.variant)
    assert plain.stage_peaks == small.run(Workload(128, 128, batch_size=2)).stage_peaks


def test_sequential_offload_empties_the_cache_after_each_weight(small: Tracer) -> None:
    """As accelerate does on a card, so that segments go back at once and reserved memory stays near what is live."""
    traced = small.run(Workload(128, 128, offload="sequential"), keep_events=True)
    pipe = small.pipeline(Workload(128, 128))
    weights = len(list(pipe.text_encoder.parameters()))
    assert (traced.events or []).count(CACHE_GIVEN_BACK) > 2 * weights


@pytest.mark.parametrize("offload", STREAMED)
def test_skipped_steps_change_no_byte(small: Tracer, offload: str) -> None:
    """Weights that come again in each step are counted as often: peaks, events and reserved memory are the full run's."""
    w = Workload(128, 192, offload=offload, vae_slicing=True, batch_size=2)
    short, full = (small.run(w, keep_events=True, full=full) for full in (False, True))
    assert short.stage_peaks == full.stage_peaks
    assert replay(short.events or []).reserved_bytes == replay(full.events or []).reserved_bytes


def test_the_order_in_which_weights_come_is_that_of_the_modules_that_run() -> None:
    """accelerate on a processor, watched by its own hooks, brings the same modules in the same order as the trace."""

    def modules_run(pipe: Any, run: Any) -> list[str]:
        seen: list[str] = []
        hooks = [
            m.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
            for part in ("text_encoder", "unet", "vae")
            for name, m in getattr(pipe, part).named_modules(prefix=part)
            if m._parameters
        ]
        run()
        for hook in hooks:
            hook.remove()
        return seen

    w = Workload(64, 64, dtype="float32", offload="sequential", safety_checker=False)
    real = build_pipeline(dtype="float32", device="cpu", safety_checker=False, settings=TINY)
    for part in (real.text_encoder, real.unet, real.vae):
        cpu_offload(part, torch.device("cpu"))  # as enable_sequential_cpu_offload, which takes an accelerator only
    with torch.no_grad():
        ran = modules_run(
            real,
            lambda: real(**call_arguments(w, num_inference_steps=2, device="cpu", width=TINY["text"]["hidden_size"])),
        )
    small = Tracer(settings=TINY)
    traced = modules_run(small.pipeline(w), lambda: small.run(w, full=True))
    assert ran == traced


def test_a_weight_left_in_host_memory_is_an_error_not_a_number(small: Tracer) -> None:
    """Group offload of blocks does not know the tiny VAE, whose weights would stay on the host: refused, with what to do."""
    with pytest.raises(InvalidWorkload, match="left in host memory; take another offload"):
        small.run(Workload(64, 64, vae="tiny", offload="group_block"))
    small.run(Workload(64, 64, vae="tiny", offload="group_leaf"))


@pytest.mark.parametrize("offload", ["model", *STREAMED])
def test_an_offload_that_is_switched_on_is_read_off_the_pipeline(offload: str) -> None:
    """`enable_sequential_cpu_offload` and `enable_group_offload` are told by their hooks; with streams they are not known."""
    pipe = build_pipeline(dtype="float32", device="cpu", settings=TINY)
    place(pipe, Workload(64, 64, offload=offload), "cpu")
    found = read(pipe)
    assert found.offload == offload and not [words for words in found.unknown if "hooks" in words]


# -- slices, executions --


def test_slices_hold_as_many_scores_as_heads_at_once(bare: Tracer) -> None:
    """The UNet's peak above that of one head grows by two score matrices for each further head."""
    peaks = {a: bare.run(Workload(768, 768, attention=a)).stage_peaks["unet"] for a in SLICES}
    scores = 96 * 96 * 96 * 96 * 2
    steps = {a: (peak - peaks["sliced_max"]) / (2 * scores) for a, peak in peaks.items()}
    assert steps["sliced"] == pytest.approx(3, abs=0.3) and steps["sliced_8"] == pytest.approx(7, abs=0.3)
    assert peaks["sliced_max"] < peaks["sliced_2"] < peaks["sliced"] < peaks["sliced_8"]


@pytest.mark.parametrize("execution", ["channels_last", "tf32", "compiled"])
def test_a_trace_has_no_number_for_what_a_card_alone_can_tell(execution: str) -> None:
    """It says so instead."""
    with pytest.raises(InvalidWorkload, match="a card alone can tell"):
        TraceBackend("t4").measure(Workload(512, 512, execution=execution))


@pytest.mark.parametrize("options", [{}, {"attention": "eager", "offload": "model", "batch_size": 2}])
def test_linear_layers_in_int8_save_what_they_weigh_less(tracer: Tracer, options: dict[str, Any]) -> None:
    """In every stage that the UNet is on the card in: a widened weight never stands at a peak. Simulated, event by event alike."""
    w = Workload(520, 392, execution="int8", **options)
    plain, traced = tracer.run(replace(w, execution="default")), tracer.run(w, keep_events=True)
    saved = plain.component_bytes["unet"] - traced.component_bytes["unet"]
    assert saved == pytest.approx(270_049_280, rel=0.003)
    assert traced.component_bytes["unet"] == pytest.approx(component_bytes(w)["unet"], rel=0.001)
    assert plain.stage_peaks["unet"] - traced.stage_peaks["unet"] == pytest.approx(saved, rel=0.005)  # and remainders
    simulator = Simulator(workspaces_for("t4"))
    simulated = simulator.run(w, keep_events=True)
    assert simulated.events == traced.events and simulated.stage_peaks == traced.stage_peaks
    assert simulator.run(replace(w, execution="default")).stage_peaks == plain.stage_peaks


def test_a_card_without_optimum_quanto_says_what_int8_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run whose weights come module by module is not simulated."""
    monkeypatch.setitem(sys.modules, "optimum.quanto", None)
    with pytest.raises(SdfitError, match="pip install optimum-quanto"):
        in_int8(torch.nn.Sequential(torch.nn.Linear(2, 3)))
    with pytest.raises(NotSimulated, match="module by module"):
        Simulator().run(Workload(512, 512, execution="int8", offload="sequential"))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_trace_of_int8_does_what_optimum_quanto_does_on_a_card(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own layers, frozen, with what it runs on CUDA in the place of its operation, which a trace cannot look into."""
    quanto = pytest.importorskip("optimum.quanto")
    on_cuda = import_module("optimum.quanto.library.qbytes_mm").qbytes_mm
    monkeypatch.setattr(torch.ops.quanto, "qbytes_mm", on_cuda)

    def theirs(linear: torch.nn.Linear) -> torch.nn.Module:
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        made = quanto.QLinear.from_module(torch.nn.Linear(*sizes, dtype=linear.weight.dtype), weights=quanto.qint8)
        made.freeze()
        return made.to("meta")  # type: ignore[no-any-return]

    w = Workload(128, 192, execution="int8", batch_size=2, dtype=dtype)
    ours = Tracer(settings=TINY).run(w, keep_events=True)
    monkeypatch.setattr("sdfit.backends.quantised.WidenedLinear", theirs)
    real = Tracer(settings=TINY).run(w, keep_events=True)
    assert ours.events == real.events and ours.component_bytes == real.component_bytes


# -- what changes nothing, or latents only --


def test_gradient_checkpointing_changes_nothing_at_inference(tracer: Tracer) -> None:
    """It trades time for memory in a backward pass; without one the peak of every stage is the same to the byte."""
    w = Workload(512, 512)
    before = tracer.run(w)
    pipe = tracer.pipeline(w)
    pipe.unet.enable_gradient_checkpointing()
    pipe.vae.enable_gradient_checkpointing()
    try:
        assert pipe.unet.is_gradient_checkpointing
        assert tracer.run(w).stage_peaks == before.stage_peaks
    finally:
        pipe.unet.disable_gradient_checkpointing()
        pipe.vae.disable_gradient_checkpointing()


HISTORY = {"pndm": 3, "ddim": 0, "euler_ancestral": 0, "dpmpp_2m": 2, "unipc": 3, "lcm": 0}
"""Latents that each scheduler still holds while the VAE decodes, after five steps or more."""
TABLE_BYTES = 4096
"""Of the thousand float32 that PNDM, DDIM and LCM keep on the card."""


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_differ_by_the_latents_that_they_keep(bare: Tracer, scheduler: str) -> None:
    """The peak, in the VAE's decoder, moves by whole latents of 32 KiB: no coefficients are needed, and none differ."""
    w = Workload(512, 512)
    peaks = {n: bare.run(w, scheduler=scheduler, num_inference_steps=n).peak_bytes for n in (5, 8)}
    euler = bare.run(w, scheduler="euler_ancestral", num_inference_steps=5).peak_bytes
    assert peaks[5] == peaks[8]
    assert divmod(peaks[5] - euler, LATENT_BYTES) in ((HISTORY[scheduler], 0), (HISTORY[scheduler], TABLE_BYTES))


def test_steps_and_strength_change_nothing_from_five_steps_on(bare: Tracer) -> None:
    """Five steps, fifty, and fifty at a strength of 0.5 peak to the byte alike."""
    w = Workload(512, 512)
    five, fifty = (bare.run(w, num_inference_steps=n).stage_peaks for n in (5, 50))
    assert five == fifty == bare.run(w, num_inference_steps=50, call={"strength": 0.5}).stage_peaks


def test_guidance_that_is_cut_off_after_two_steps_raises_no_peak(tracer: Tracer) -> None:
    """After two of five steps the UNet's batch halves; live and reserved memory stay where they were, or below."""

    batches: list[int] = []
    w = Workload(512, 512, batch_size=2)
    call = guidance_until(0.4)
    cut = call["callback_on_step_end"]

    def noted(pipe: Any, *args: Any) -> dict[str, Any]:
        found: dict[str, Any] = cut(pipe, *args)
        batches.append(found["latents"].shape[0] * (1 + pipe.do_classifier_free_guidance))
        return found

    call["callback_on_step_end"] = noted
    whole = tracer.run(w, num_inference_steps=5, keep_events=True)
    halved = tracer.run(w, num_inference_steps=5, keep_events=True, call=call)
    assert batches[:2] == [4, 4] and set(batches[2:]) == {2}
    assert all(halved.stage_peaks[stage] <= peak for stage, peak in whole.stage_peaks.items())
    assert replay(halved.events or []).reserved_bytes <= replay(whole.events or []).reserved_bytes


def test_all_that_a_late_cut_off_adds_is_what_the_callback_holds(small: Tracer) -> None:
    """Two latents in the UNet's peak from the third step on, and a segment or two of reserved memory."""
    w = Workload(128, 128, attention="eager")
    whole, cut = (
        small.run(w, num_inference_steps=8, keep_events=True, full=True, call=call)
        for call in ({}, guidance_until(0.8))
    )
    latent = 4 * 16 * 16 * 2
    assert {cut.stage_peaks[stage] - peak for stage, peak in whole.stage_peaks.items()} == {0, 2 * latent, -latent}
    assert 0 <= replay(cut.events or []).reserved_bytes - replay(whole.events or []).reserved_bytes <= 4 * 2**20
