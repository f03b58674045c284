"""Asking before running: what a pipeline and a call say about the run."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdfit.errors import InvalidWorkload
from sdfit.guard import WillNotFit, check, workload_of
from sdfit.predict.predictor import Predictor
from sdfit.workload import Workload


class Tokenizer:
    """One token per letter, and two special ones."""

    model_max_length = 77

    def __call__(self, text: str, truncation: bool, max_length: int) -> Any:
        return SimpleNamespace(input_ids=list(range(min(len(text) + 2, max_length))))


class AutoencoderTiny:
    """Known by its name alone."""


def pipeline(processor: str = "AttnProcessor2_0", dtype: str = "float16", **parts: Any) -> Any:
    """What of a pipeline is looked at."""
    unet = SimpleNamespace(dtype=f"torch.{dtype}", attn_processors={"a": type(processor, (), {})()})
    vae = SimpleNamespace(use_slicing=False, use_tiling=False)
    pipe = {"unet": unet, "vae": vae, "tokenizer": Tokenizer(), "safety_checker": object()} | parts
    return SimpleNamespace(**pipe)


PICTURE = SimpleNamespace(height=520, width=776)


@pytest.mark.parametrize("words", ["sdfit.guard.check", "sdfit.errors.SdfitError", "sdfit.guard.WillNotFit"])
def test_the_guard_is_there_once_sdfit_is_imported(words: str) -> None:
    """In a fresh process ``import sdfit`` is enough to reach the guard and the errors, as the README shows it."""
    ran = subprocess.run(
        [sys.executable, "-c", f"import sdfit; print(callable({words}))"], capture_output=True, text=True, check=False
    )
    assert (ran.stdout, ran.stderr) == ("True\n", "")


def test_a_plain_call_is_read_off() -> None:
    """The picture gives the size, the prompt its tokens, the pipeline the variant."""
    assert workload_of(pipeline(), PICTURE, "cat") == Workload(520, 776, 5)
    assert workload_of(pipeline(), PICTURE) == Workload(520, 776, 2)
    assert workload_of(pipeline(), PICTURE, "x" * 500) == Workload(520, 776, 77)


def test_batches_come_from_prompts_embeddings_and_images_per_prompt() -> None:
    """Three prompts, two images of each, the longest prompt counts; embeddings say both numbers themselves."""
    got = workload_of(pipeline(), [PICTURE], ["a", "cat", ""], num_images_per_prompt=2, guidance_scale=1)
    assert got == Workload(520, 776, 5, 6, 1.0)
    embeds = np.zeros((4, 154, 768))
    assert workload_of(pipeline(), PICTURE, prompt_embeds=embeds) == Workload(520, 776, 154, 4)


@pytest.mark.parametrize(
    "shape",
    [(3, 520, 776), (1, 3, 520, 776), (520, 776, 3), (2, 520, 776, 3), (520, 776), (520, 776, 1), (520, 776, 4)],
)
def test_arrays_of_either_order_have_a_size(shape: tuple[int, ...]) -> None:
    """Channels first or last, with or without a batch."""
    assert workload_of(pipeline(), np.zeros(shape), "a").height == 520
    assert workload_of(pipeline(), np.zeros(shape), "a").width == 776


@pytest.mark.parametrize(
    ("pipe", "fields"),
    [
        (pipeline("AttnProcessor"), {"attention": "eager"}),
        (pipeline("SlicedAttnProcessor"), {"attention": "sliced"}),
        (pipeline("XFormersAttnProcessor"), {"attention": "sdpa"}),
        (pipeline(dtype="bfloat16"), {"dtype": "bfloat16"}),
        (pipeline(safety_checker=None), {"safety_checker": False}),
        (pipeline(vae=AutoencoderTiny()), {"vae": "tiny"}),
        (pipeline(vae=SimpleNamespace(use_slicing=True, use_tiling=True)), {"vae_slicing": True, "vae_tiling": True}),
        (pipeline(_all_hooks=[1]), {"offload": "model"}),
        (pipeline(_all_hooks=[]), {"offload": "none"}),
    ],
)
def test_the_variant_is_read_off(pipe: Any, fields: dict[str, Any]) -> None:
    """Attention, dtype, checker, VAE and its options, offload."""
    assert workload_of(pipe, PICTURE, "cat") == Workload(520, 776, 5, **fields)


@pytest.mark.parametrize("image", [5, None, "photo.jpg", np.zeros(4), object()])
def test_what_has_no_size_is_refused(image: Any) -> None:
    """By its type."""
    with pytest.raises(InvalidWorkload, match=f"cannot read the size of a {type(image).__name__}"):
        workload_of(pipeline(), image, "cat")


def test_what_cannot_run_or_was_never_swept_is_refused() -> None:
    """A processor that nobody swept, a dtype that sdfit does not know, a picture that is too small."""
    with pytest.raises(InvalidWorkload, match=r"\['CustomProcessor'\] were never swept"):
        workload_of(pipeline("CustomProcessor"), PICTURE, "cat")
    with pytest.raises(InvalidWorkload, match="dtype must be one of"):
        workload_of(pipeline(dtype="float64"), PICTURE, "cat")
    with pytest.raises(InvalidWorkload, match="height is 32"):
        workload_of(pipeline(), SimpleNamespace(height=32, width=512), "cat")


def test_check_lets_through_or_raises(f: Predictor) -> None:
    """What fits is predicted; what does not raises with both amounts and exit code 3."""
    peak = check(pipeline(), f, memory="16 GiB", image=PICTURE, prompt="cat")
    assert peak.workload == Workload(520, 776, 5) and peak.metric == "required" and peak.level == 0.99
    with pytest.raises(WillNotFit, match=r"needs up to .* \(required, level 0.99\) and 2\.000 GiB is there") as caught:
        check(pipeline(), f, memory="2 GiB", image=PICTURE, prompt="cat")
    assert caught.value.facts == {"needed": peak.upper, "available": 2 << 30} and caught.value.exit_code == 3


def test_without_a_card_the_memory_must_be_given(f: Predictor) -> None:
    """There is nobody to ask; the sentence says what to give."""
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a card to ask")
    with pytest.raises(InvalidWorkload, match="no CUDA card to ask for its free memory; give memory='15 GiB'"):
        check(pipeline(), f, image=PICTURE, prompt="cat")


def test_a_real_pipeline_is_read_off_as_it_was_set() -> None:
    """diffusers' own pipeline, on meta tensors, switched to each variant, is read back as that variant."""
    pytest.importorskip("diffusers")
    from PIL import Image

    from sdfit.backends.pipeline import build_pipeline, variant_applied

    picture = Image.new("RGB", (776, 520))
    pipe = build_pipeline(device="meta", dtype="bfloat16", safety_checker=False)
    for fields in ({}, {"attention": "eager"}, {"attention": "sliced"}, {"vae_slicing": True}, {"vae_tiling": True}):
        w = Workload(520, 776, 7, 2, dtype="bfloat16", safety_checker=False, **fields)
        with variant_applied(pipe, w):
            assert workload_of(pipe, picture, ["a a a a a"] * 2) == w
