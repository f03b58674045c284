"""What a call comes to: for each kind, sdfit says what diffusers' own pipeline does with it, small and on the processor."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("diffusers")

import numpy as np
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image
from tiny import TINY

from sdfit.backends.pipeline import SCHEDULER, build_pipeline
from sdfit.errors import InvalidWorkload
from sdfit.predict.calls import TEXT_WIDTH, arguments, defaults_of, workload_of
from sdfit.predict.inputs import CHANNELS, look
from sdfit.predict.pipelines import Reading

SIGNATURE = inspect.signature(StableDiffusionImg2ImgPipeline.__call__)
OWN = SIGNATURE.replace(parameters=list(SIGNATURE.parameters.values())[1:])
TINY_WIDTH = TINY["unet"]["cross_attention_dim"]
SCHEDULERS = {"PNDMScheduler": PNDMScheduler, "DDIMScheduler": DDIMScheduler}


@pytest.fixture(scope="module")
def tiny() -> Any:
    """A pipeline of the same classes that really runs."""
    return build_pipeline(dtype="float32", settings=TINY, safety_checker=False)


def picture(mode: str = "RGB", width: int = 72, height: int = 64) -> Image.Image:
    return Image.new(mode, (width, height))


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, "float32")


def embeds(prompts: int, rows: int, width: int = 0) -> Callable[[int], torch.Tensor]:
    """Embeddings of a width that the pipeline says, unless another is given."""
    return lambda pipelines: torch.zeros(prompts, rows, width or pipelines)


RGB, TWO = picture(), ["a", "b"]
CALLS: dict[str, dict[str, Any]] = {
    **{f"mode {mode}": {"image": picture(mode, 24, 16)} for mode in CHANNELS if CHANNELS[mode] != 3},
    **{f"mode {mode}": {"image": picture(mode)} for mode in CHANNELS if CHANNELS[mode] == 3},
    **{f"mode {mode}": {"image": picture(mode)} for mode in ("L", "P", "1", "I", "F", "I;16")},
    "not a multiple of 8": {"image": picture("RGB", 79, 71)},
    "RGBA, not a multiple of 8": {"image": picture("RGBA", 17, 23)},
    "narrow": {"image": picture("RGB", 7, 72)},
    "array": {"image": zeros(71, 72, 3)},
    "array, 4 channels": {"image": zeros(17, 23, 4)},
    "array, 1 channel": {"image": zeros(64, 72, 1)},
    "array, no channels": {"image": zeros(64, 72)},
    "array, channels first": {"image": zeros(3, 64, 72)},
    "arrays stacked": {"image": zeros(2, 64, 72, 3), "prompt": TWO},
    "arrays of 4 channels stacked": {"image": zeros(2, 16, 24, 4), "prompt": TWO},
    "arrays in a list": {"image": [zeros(64, 72, 3)] * 2, "prompt": TWO},
    "stacks of arrays in a list": {"image": [zeros(1, 64, 72, 3), zeros(2, 64, 72, 3)], "prompt": ["a"] * 3},
    "arrays of two sizes": {"image": [zeros(64, 72, 3), zeros(72, 72, 3)], "prompt": TWO},
    "tensor": {"image": torch.zeros(3, 71, 79)},
    "tensor, 1 channel": {"image": torch.zeros(1, 64, 72)},
    "tensor, 9 channels": {"image": torch.zeros(1, 9, 64, 72)},
    "tensor, no channels": {"image": torch.zeros(64, 72)},
    "tensor, channels last": {"image": torch.zeros(64, 72, 3)},
    "tensor of five sides": {"image": torch.zeros(1, 1, 3, 64, 72)},
    "tensors stacked": {"image": torch.zeros(2, 3, 64, 72), "prompt": TWO},
    "tensors in a list": {"image": [torch.zeros(3, 64, 72)] * 2, "prompt": TWO},
    "latents": {"image": torch.zeros(1, 4, 9, 11)},
    "latents without a batch": {"image": torch.zeros(4, 9, 11)},
    "latents in a list": {"image": [torch.zeros(4, 9, 11)] * 2, "prompt": TWO},
    "pictures": {"image": [RGB] * 2, "prompt": TWO},
    "pictures of two sizes": {"image": [RGB, picture("RGB", 96, 80)], "prompt": TWO},
    "pictures of two sizes, the large one first": {"image": [picture("RGB", 96, 80), RGB], "prompt": TWO},
    "pictures of two modes": {"image": [RGB, picture("RGBA")], "prompt": TWO},
    "pictures in a tuple": {"image": (RGB,)},
    "a picture and an array": {"image": [RGB, zeros(64, 72, 3)], "prompt": TWO},
    "no picture": {"image": None},
    "no pictures": {"image": []},
    "a path": {"image": "photo.png"},
    "3 images, 1 prompt": {"image": [RGB] * 3},
    "3 images, 1 prompt, unguided": {"image": [RGB] * 3, "guidance_scale": 1.0},
    "3 latents, 1 prompt": {"image": torch.zeros(3, 4, 9, 9)},
    "2 images, 3 prompts": {"image": [RGB] * 2, "prompt": ["a"] * 3},
    "2 images, 4 prompts": {"image": [RGB] * 2, "prompt": ["a"] * 4},
    "2 images, 1 prompt, 2 each": {"image": [RGB] * 2, "num_images_per_prompt": 2},
    "2 prompts, 3 each": {"prompt": TWO, "num_images_per_prompt": 3},
    "0 each": {"num_images_per_prompt": 0},
    "None each": {"num_images_per_prompt": None},
    "no prompt": {"prompt": None},
    "no prompts": {"prompt": []},
    "prompts in a tuple": {"prompt": ("a",)},
    "negative prompts": {"prompt": TWO, "negative_prompt": TWO},
    "a negative prompt for two": {"prompt": TWO, "negative_prompt": "a"},
    "negative prompts for one": {"negative_prompt": TWO},
    "too few negative prompts": {"prompt": ["a"] * 3, "negative_prompt": TWO},
    "a wrong negative prompt, unguided": {"negative_prompt": TWO, "guidance_scale": 1.0},
    "embeddings": {"prompt": None, "prompt_embeds": embeds(2, 77)},
    "long embeddings": {"prompt": None, "prompt_embeds": embeds(1, 154), "negative_prompt_embeds": embeds(1, 154)},
    "long embeddings alone": {"prompt": None, "prompt_embeds": embeds(1, 154)},
    "long embeddings alone, unguided": {"prompt": None, "prompt_embeds": embeds(1, 154), "guidance_scale": 1.0},
    "embeddings of two lengths": {"prompt": None, "prompt_embeds": embeds(1, 154), "negative_prompt_embeds": embeds(1, 77)},
    "long negative embeddings alone": {"negative_prompt_embeds": embeds(1, 154)},
    "negative embeddings alone": {"negative_prompt_embeds": embeds(1, 77)},
    "short embeddings": {"prompt": None, "prompt_embeds": embeds(1, 50)},
    "embeddings of another width": {"prompt": None, "prompt_embeds": embeds(1, 77, 33)},
    "embeddings without a batch": {"prompt": None, "prompt_embeds": lambda width: torch.zeros(77, width)},
    "a prompt twice": {"prompt_embeds": embeds(1, 77)},
    "a negative prompt twice": {"negative_prompt": "a", "negative_prompt_embeds": embeds(1, 77)},
    "strength 1.5": {"strength": 1.5},
    "strength of a text": {"strength": "1"},
    "no steps": {"num_inference_steps": 0},
    "no step left": {"strength": 0.01, "num_inference_steps": 50, "scheduler": "DDIMScheduler"},
    "one step left": {"strength": 0.02, "num_inference_steps": 50, "scheduler": "DDIMScheduler"},
    "a step more": {"strength": 0.01, "num_inference_steps": 50, "scheduler": "PNDMScheduler"},
    "strength 0": {"strength": 0, "num_inference_steps": 4, "scheduler": "DDIMScheduler"},
    "no guidance": {"guidance_scale": None},
    "guidance below 0": {"guidance_scale": -1},
    "generators": {"generator": [torch.Generator()] * 3, "num_images_per_prompt": 3},
    "too many generators": {"generator": [torch.Generator()] * 2},
    "generators, more images than prompts": {"image": [RGB] * 3, "generator": [torch.Generator()] * 1},
    "a generator for latents": {"image": torch.zeros(1, 4, 9, 9), "generator": [torch.Generator()]},
    "a keyword that is passed over": {"height": 512},
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_what_diffusers_makes_of_it(tiny: Any, name: str) -> None:
    """Images of the size and number that come out; where diffusers fails, an InvalidWorkload and no number."""
    given = {"image": RGB, "prompt": "a", "strength": 1.0, "num_inference_steps": 1} | CALLS[name]
    scheduler = given.pop("scheduler", "PNDMScheduler")

    def call(width: int) -> dict[str, Any]:
        return {key: value(width) if inspect.isfunction(value) else value for key, value in given.items()}

    reading = Reading("float32", "sdpa", "kl", False, False, "none", False, scheduler=scheduler)
    tiny.scheduler = SCHEDULERS[scheduler](**{k: v for k, v in SCHEDULER.items() if k != "skip_prk_steps"})
    if scheduler == "PNDMScheduler":
        tiny.scheduler = PNDMScheduler(**SCHEDULER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            images = tiny(**call(TINY_WIDTH)).images
        except Exception as error:
            with pytest.raises(InvalidWorkload) as caught:
                workload_of(reading, arguments(OWN, (), call(TEXT_WIDTH)))
            assert str(caught.value) and str(error)
            return
    workload, unknown, _ = workload_of(reading, arguments(OWN, (), call(TEXT_WIDTH)))
    ran = (images[0].height, images[0].width, len(images))
    assert (workload.effective_height, workload.effective_width, workload.batch_size) == ran and not unknown


def test_a_call_by_keywords_alone_is_told_without_binding() -> None:
    """To the same arguments; not of a pipeline that needs some, or takes no others."""
    calls: list[dict[str, Any]] = [{}, {"image": RGB, "prompt": "a"}, {"strength": 0.3, "unheard_of": 1}]
    for call in calls:
        assert arguments(OWN, (), call, defaults_of(OWN)) == arguments(OWN, (), call)
    assert arguments(OWN, ("a",), {"image": RGB}, defaults_of(OWN)) == arguments(OWN, ("a",), {"image": RGB})
    for other in (lambda image, **kwargs: None, lambda image=None: None, lambda *args, **kwargs: None):
        assert defaults_of(inspect.signature(other)) is None


def test_four_channels_are_latents_and_the_caller_is_told() -> None:
    """An RGBA picture of 512x512 runs at 4096x4096; converted it is what it looks like."""
    found = look(picture("RGBA", 512, 512))
    assert (found.height, found.width, found.latents) == (4096, 4096, True)
    assert "takes a picture of mode 'RGBA' for latents" in found.remark and ".convert('RGB')" in found.remark
    plain = look(picture("RGBA", 512, 512), to_rgb=True)
    assert (plain.height, plain.width, plain.remark) == (512, 512, "")
    assert look(torch.zeros(1, 4, 64, 64)).remark == "", "latents that are meant"


def test_a_picture_too_large_as_latents_says_why() -> None:
    """The size that is refused is not the one that was given, so the reason is told with it."""
    reading = Reading("float32", "sdpa", "kl", False, False, "none", False)
    with pytest.raises(InvalidWorkload, match=r"height is 24000; .* takes a picture of mode 'RGBA' for latents"):
        workload_of(reading, arguments(OWN, (), {"image": picture("RGBA", 8, 3000), "prompt": "a"}))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (picture("L"), r"of mode 'L': it has 1 channel, and the VAE takes 3; give it as .convert\('RGB'\)"),
        (picture("LA"), "of mode 'LA': it has 2 channels"),
        (zeros(64, 72), r"an image array of shape \(64, 72\): it has 1 channel"),
        ((RGB,), "takes no tuple"),
        ([RGB, zeros(64, 72, 3)], "list of Image and ndarray"),
    ],
)
def test_a_picture_that_diffusers_fails_on_is_named(image: Any, words: str) -> None:
    """What it is, why that fails, and what to type."""
    with pytest.raises(InvalidWorkload, match=words):
        look(image)
