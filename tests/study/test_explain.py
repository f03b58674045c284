"""What is on the card at the peak, to the byte."""

import json

import pytest

from sdfit.backends.trace.observe import observed
from sdfit.backends.trace.tracer import Tracer
from sdfit.cli import main
from sdfit.study.derivation.closed_form import Derivation, Polynomial
from sdfit.study.derivation.explain import explain
from sdfit.study.derivation.timeline import timeline
from sdfit.workload import Workload

WORKLOADS = [
    Workload(512, 512),
    Workload(264, 392, batch_size=2, attention="eager"),
    Workload(512, 512, attention="math", guidance_scale=1.0),
    Workload(640, 768, vae_tiling=True),
    Workload(256, 256, batch_size=3, vae_slicing=True, prompt_length=154),
    Workload(512, 512, offload="model"),
    Workload(256, 256, offload="sequential"),
    Workload(512, 512, offload="group_block", batch_size=2),
]


@pytest.fixture(scope="module")
def tracer():
    return Tracer()


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_the_parts_add_up_to_the_byte(workload, tracer):
    """Weights on the card and live tensors together are the traced peak."""
    told = explain(workload, tracer=tracer)
    assert told.accounted_bytes == told.peak_bytes == tracer.run(workload).peak_bytes
    assert told.history[told.peak_index] == (told.stage, told.peak_bytes)


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_skipped_passes_are_known_by_the_one_they_repeat(workload, tracer):
    """Watching with repeats skipped finds the same stage peaks as watching every pass."""
    quick, seen = observed(tracer, workload)
    full, watched = observed(tracer, workload, full=True)
    assert seen.stage_peaks == quick.stage_peaks == full.stage_peaks == watched.stage_peaks


def test_watching_changes_nothing(tracer):
    """A watched run takes what an unwatched one takes, and leaves no hooks behind."""
    w = WORKLOADS[0]
    assert observed(tracer, w, tensors=True)[0].stage_peaks == tracer.run(w).stage_peaks
    pipe = tracer.pipeline(w)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in pipe.unet.modules())


def test_a_workspace_is_a_part_of_its_own(tracer):
    """What a kernel holds at the peak is listed apart from the tensors."""

    def scratch(workload, func, args, out):
        return 10_000_000_000 if func.name() == "aten::silu" else 0

    told = explain(WORKLOADS[0], tracer=Tracer(scratch))
    assert told.workspace_bytes == 10_000_000_000
    assert told.accounted_bytes == told.peak_bytes == max(told.stage_peaks.values())
    assert "workspace of the kernel" in told.to_text()


def test_the_terms_come_from_the_equation_given(tracer):
    """A closed form gives its terms at this workload; terms worked out already are taken as they are."""
    w = WORKLOADS[0]
    polynomial = Polynomial("unet", "unet", "mul", 0, "", {"1": 110.0, "n·A": 2.0}, 100)
    equation = Derivation(w.variant, (polynomial,), w, ())
    told = explain(w, tracer=tracer, equation=equation)
    assert told.terms_bytes == {"weights": 100.0, "1": 10.0, "n·A": 2.0 * 2 * 512 * 512}
    other = explain(w, tracer=tracer, equation={"H·W": 5.0}, terms_of="the model 't4'")
    assert other.terms_bytes == {"H·W": 5.0} and "terms of the model 't4'" in other.to_text()


def test_it_prints_and_serialises(tracer):
    """The text names the operation and says that it is simulated; JSON keeps every tensor."""
    told = explain(WORKLOADS[0], tracer=tracer)
    assert (
        "silu in vae.decoder.up_blocks.3" in told.to_text()
        and "(simulated without kernel workspaces)" in told.to_text()
    )
    plain = json.loads(json.dumps(told.to_dict()))
    peak = plain["peak"]
    assert sum(t["size_bytes"] for t in peak["tensors"]) + peak["weights_bytes"] == peak["peak_bytes"]
    assert {c["name"]: c["parameters"] for c in plain["components"]}["unet"] == 859_520_964


def test_the_timeline_is_a_picture(tracer, tmp_path):
    """A PNG is written, also where weights come and go."""
    for name, w in (("a.png", WORKLOADS[0]), ("b.png", WORKLOADS[5])):
        assert timeline(w, tmp_path / name, tracer=tracer).read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore::sdfit.errors.SimulatedModelWarning")
def test_beside_a_model_the_kernels_are_its_own(capsys):
    """`sdfit explain --gpu t4` explains the peak that `sdfit predict --gpu t4` gives, at the operation that sets it there."""
    assert main(["explain", "--height", "512", "--width", "512", "--gpu", "t4", "--quiet", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kernels"] == "sm75" and told["peak"]["operation"] == "convolution"
    assert told["peak"]["workspace_bytes"] == 269_615_616
    assert sum(told["terms_bytes"].values()) == pytest.approx(told["peak"]["peak_bytes"], rel=2e-4)
