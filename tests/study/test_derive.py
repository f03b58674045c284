"""The closed form: derived from a few traces, held against others."""

import json
import random
from math import prod

import pytest

from sdfit.backends.trace.tracer import Tracer
from sdfit.equation.sizes import Sizes, vae_passes
from sdfit.equation.terms import TERMS
from sdfit.errors import FitError
from sdfit.study.derivation.closed_form import BEYOND_TERMS, last_passes, letters, products_at
from sdfit.study.derivation.derive import derive
from sdfit.workload import Workload

VARIANTS = {
    "sdpa": {},
    "eager": {"attention": "eager"},
    "sliced": {"attention": "sliced"},
    "float32": {"dtype": "float32"},
    "slicing": {"vae_slicing": True},
    "tiling": {"vae_tiling": True},
}


@pytest.fixture(scope="module")
def tracer():
    return Tracer()


@pytest.fixture(scope="module")
def forms(tracer):
    made = {}

    def form(**variant):
        key = tuple(sorted(variant.items()))
        if key not in made:
            made[key] = derive(Workload(512, 512, **variant), tracer=tracer)
        return made[key]

    return form


def elsewhere(count, seed, **variant):
    """Random workloads, odd latents and long prompts among them."""
    rng = random.Random(seed)
    return [
        Workload(
            rng.randint(64, 3072),
            rng.randint(64, 3072),
            rng.choice([8, 77, 100, 154, 231, 500]),
            rng.choice([1, 1, 2, 3, 4, 5, 8, 16]),
            rng.choice([1.0, 5.0]),
            **variant,
        )
        for _ in range(count)
    ]


def worst_share(form, tracer, workloads):
    traced = {w: tracer.run(w).peak_bytes for w in workloads if w not in form.points}
    assert traced
    return max(abs(form.predict_bytes(w) / peak - 1) for w, peak in traced.items())


def test_the_decoder_holds_three_tensors_of_256_channels(forms):
    """SDPA in float16: 1536 bytes per pixel, at silu in the last up block, and nothing quadratic anywhere."""
    form = forms()
    binding = form.binding(Workload(1024, 1024))
    assert (binding.stage, binding.operation) == ("vae_decoder_blocks", "silu")
    assert binding.path.startswith("vae.decoder.up_blocks.3.")
    assert int(binding.coefficients["B·A"]) == 1536 == 3 * 256 * 2
    assert not any("A²" in product for p in form.polynomials for product in p.coefficients)
    assert [t["size_bytes"] for t in binding.tensors if t["size_bytes"] > 2**20] == [256 * 512 * 512 * 2] * 3


def test_eager_attention_gives_the_known_quadratic(forms):
    """Eager, with guidance, no checker: 0.015625 B per pixel squared; the known formula is met within 0.02 %."""
    form = forms(attention="eager", safety_checker=False)
    w = Workload(1024, 1024, attention="eager", safety_checker=False)
    c = form.binding(w).coefficients
    assert form.binding(w).path.startswith("unet.") and form.binding(w).path.endswith("attn1")
    assert 2 * c["n·A²"] == 0.015625
    # 220.75 where it was first found; the pipeline holds one more latent (0.125 B/px) once PNDM has a history
    assert 2 * c["n·A"] + c["B·A"] == 220.875
    for side in (512, 1024, 2048):
        known = 2132556947 + 220.75 * side**2 + 0.015625 * side**4
        assert form.predict_bytes(Workload(side, side, attention="eager", safety_checker=False)) == pytest.approx(
            known, rel=2e-4
        )


def test_it_agrees_with_traces_it_has_not_seen(forms, tracer):
    """A handful of random workloads outside its points, odd latents among them: within 0.001 %."""
    assert worst_share(forms(), tracer, elsewhere(6, 1)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_it_agrees_on_fifty(name, forms, tracer):
    """Every variant on fifty random workloads: within 0.1 %."""
    assert worst_share(forms(**VARIANTS[name]), tracer, elsewhere(50, 20240, **VARIANTS[name])) < 1e-3


def test_every_stage_agrees_not_only_the_peak(forms, tracer):
    """The stages below the peak are met too."""
    for w in elsewhere(3, 2):
        traced = tracer.run(w).stage_peaks
        found = forms().stage_peaks(w)
        assert found == pytest.approx(traced, rel=2e-4)


def test_it_prints_as_text_latex_and_json(forms):
    """All three forms name the coefficient, and the JSON is plain values in bytes."""
    form = forms()
    assert "1,536.375·B·A" in form.to_text()
    latex = form.to_latex()
    assert r"1{,}536.375\,B\,A" in latex and latex.count("{") == latex.count("}") + 1  # the brace of \left
    assert "·" not in latex
    told = json.loads(json.dumps(form.to_dict()))
    assert [p["coefficients_bytes"]["B·A"] for p in told["polynomials"] if p["stage"] == "vae_decoder_blocks"] == [
        1536.375
    ]
    assert told["polynomials"][0]["live_tensors"]


def test_terms_add_up_to_the_prediction(forms):
    """The terms of the binding polynomial are the prediction."""
    w = Workload(768, 640, batch_size=3)
    assert round(sum(forms().binding(w).terms_bytes(w).values())) == forms().predict_bytes(w)


def test_another_variant_is_refused(forms):
    """A closed form does not answer for a variant it is not of."""
    with pytest.raises(FitError, match="float32 sdpa"):
        forms().predict_bytes(Workload(512, 512, dtype="float32"))


@pytest.mark.slow
def test_what_is_no_polynomial_is_refused_and_named(tracer):
    """A workspace that grows as the root of the size makes the derivation stop, with the stage in the message."""

    def rooted(workload, func, args, out):
        return int(workload.pixels**0.5) * 1_000_000 if func.name() == "aten::silu" else 0

    odd = Tracer(rooted)
    odd._pipes, odd._weights = tracer._pipes, tracer._weights
    with pytest.raises(FitError, match="no polynomial"):
        derive(Workload(512, 512), tracer=odd)


def test_tiles_and_slices_are_counted_as_diffusers_runs_them():
    """Tiles of 512, 384 apart, cut at the edge; a slice waits as a whole image; the last of each size counts."""
    assert [p for _, p, _ in vae_passes(Workload(1024, 512, vae_tiling=True))] == [
        h * w for h in (512, 512, 256) for w in (512, 128)
    ]
    w = Workload(512, 512, batch_size=3, vae_slicing=True)
    assert [(s.P, s.D) for s in last_passes(w)] == [(512 * 512, 2 * 512 * 512)]


def test_each_product_is_what_its_name_says():
    """The products of the equation and those of the closed form alone: every name multiplied out is its value."""
    sizes = Sizes(2, 3, 5, 7, 11, 13, 17)
    values = sizes._asdict() | {"E": 19}
    found = products_at(sizes, 19)
    assert set(found) == {*TERMS, *BEYOND_TERMS} and len(found) == len(TERMS) + len(BEYOND_TERMS)
    assert found == {name: prod(values[letter] for letter in letters(name)) for name in found}
