"""The pipeline: built from its settings with the published parameter counts, or loaded from a folder."""

import pytest
import torch
from tiny import TINY

from sdfit.backends.pipeline import build_components, build_pipeline, call_arguments, offline_tokenizer
from sdfit.equation.weights import PARAMETERS
from sdfit.errors import SdfitError
from sdfit.workload import CHUNK_TOKENS, Workload


def count(module):
    return sum(p.numel() for p in module.parameters())


# -- from its settings --


def test_every_component_has_exactly_the_parameters_of_stable_diffusion_15():
    """Built on the meta device, so nothing is allocated; the counts are those of the published checkpoint."""
    parts = build_components("float16", "meta")
    names = ("unet", "vae", "text_encoder", "safety_checker")
    assert {name: count(parts[name]) for name in names} == {
        "unet": 859_520_964,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "safety_checker": 303_981_588,
    }
    assert all(PARAMETERS[name] == count(parts[name]) for name in names)


def test_the_tiny_vae_and_the_missing_checker():
    """The tiny VAE has its own count, and without the checker there is none in the pipeline."""
    pipe = build_pipeline(device="meta", vae="tiny", safety_checker=False)
    assert count(pipe.vae) == PARAMETERS["vae_tiny"] == 2_445_063
    assert pipe.safety_checker is None


def test_half_precision_weights_take_the_known_bytes():
    """2,132,470,614 B of float16 parameters without the checker, 607,963,176 B with it on top."""
    parts = build_components("float16", "meta")
    sizes = {
        n: sum(p.numel() * p.element_size() for p in parts[n].parameters())
        for n in parts
        if hasattr(parts[n], "parameters")
    }
    checker = sizes.pop("safety_checker")
    assert sum(sizes.values()) == 2_132_470_614
    assert checker == 607_963_176


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_weight_is_of_the_dtype_asked_for(dtype):
    """None is left in float32 by a module that sets its own."""
    parts = build_components(dtype, "meta", settings=TINY)
    for name in ("unet", "vae", "text_encoder", "safety_checker"):
        assert {p.dtype for p in parts[name].parameters()} == {getattr(torch, dtype)}


# -- from a folder --


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny pipeline, saved as diffusers saves one."""
    home = tmp_path_factory.mktemp("pipeline")
    build_pipeline(dtype="float32", settings=TINY, seed=3).save_pretrained(home)
    return home


def test_a_saved_pipeline_is_loaded_with_its_own_values(folder):
    """What comes back are the weights that were saved, not fresh random ones, in the class that runs."""
    saved = build_pipeline(dtype="float32", settings=TINY, seed=3)
    loaded = build_pipeline(str(folder), dtype="float32")
    assert type(loaded).__name__ == "StableDiffusionImg2ImgPipeline"
    for name in ("unet", "vae", "text_encoder", "safety_checker"):
        before, after = getattr(saved, name).state_dict(), getattr(loaded, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_loaded_pipeline_takes_dtype_and_checker_from_the_workload(folder):
    """A folder without an fp16 variant is loaded all the same, cast, and without the checker where none is wanted."""
    pipe = build_pipeline(str(folder), dtype="bfloat16", safety_checker=False)
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}
    assert pipe.safety_checker is None


def test_a_loaded_pipeline_runs(folder):
    """From the folder to a picture of the floored size."""
    pipe = build_pipeline(str(folder), dtype="float32")
    w = Workload(70, 65, dtype="float32")
    images = pipe(**call_arguments(w, num_inference_steps=2, device="cpu", width=32)).images
    assert [i.size for i in images] == [(64, 64)]


def test_a_folder_that_is_no_pipeline_is_one_clear_sentence(tmp_path):
    """The message has the folder and what can be given instead."""
    with pytest.raises(
        SdfitError, match=r"cannot load the pipeline '.*give a diffusers folder, a Hub id, or --weights"
    ):
        build_pipeline(str(tmp_path))


# -- the tokenizer --


@pytest.mark.parametrize("prompt_length", [1, 2, 8, 40, 77])
def test_prompts_of_up_to_77_tokens_are_padded_to_77(prompt_length):
    """A prompt made for a workload has exactly its tokens, and the same shape on the device as any other."""
    tokenizer = offline_tokenizer()
    prompt = call_arguments(Workload(64, 64, prompt_length), num_inference_steps=1, device="cpu")["prompt"][0]
    assert len(tokenizer(prompt).input_ids) == max(prompt_length, 2)
    padded = tokenizer(prompt, padding="max_length", max_length=CHUNK_TOKENS, truncation=True).input_ids
    assert len(padded) == CHUNK_TOKENS


def test_prompts_of_more_than_77_tokens_are_cut():
    """100 words, and 77 tokens, the last of which ends the text."""
    tokenizer = offline_tokenizer()
    cut = tokenizer(" ".join("a" * 100), padding="max_length", max_length=CHUNK_TOKENS, truncation=True).input_ids
    assert len(cut) == CHUNK_TOKENS
    assert (cut[0], cut[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_longer_conditioning_comes_as_embeddings_and_guidance_doubles_it():
    """Past 77 there is no prompt, but prompt_embeds of that many rows, with a negative one where CFG is on."""
    guided = call_arguments(Workload(64, 64, 154, 2, dtype="float32"), num_inference_steps=1, device="cpu")
    plain = call_arguments(Workload(64, 64, 154, 2, 1.0), num_inference_steps=1, device="cpu")
    assert "prompt" not in guided
    assert guided["prompt_embeds"].shape == guided["negative_prompt_embeds"].shape == (2, 154, 768)
    assert guided["prompt_embeds"].dtype == torch.float32
    assert "negative_prompt_embeds" not in plain
