"""What a call of an img2img pipeline asks for: its size, batch and prompt, and what of it is not covered."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from sdfit.errors import InvalidWorkload
from sdfit.predict.pipelines import Reading
from sdfit.workload import CHUNK_TOKENS, VAE_SCALE, Workload

LATENT_CHANNELS = 4


def arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, defaults included; ``signature`` without ``self``.

    Raises
    ------
    InvalidWorkload
        If the pipeline does not take them; with the reason.
    """
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InvalidWorkload(f"the pipeline does not take this call: {error}") from None
    bound.apply_defaults()
    found: dict[str, Any] = dict(bound.arguments)
    rest: dict[str, Any] = found.pop("kwargs", {})
    return found | rest


def workload_of(reading: Reading, call: Mapping[str, Any]) -> tuple[Workload, tuple[str, ...]]:
    """The workload of a call, and what of it sdfit does not know.

    Parameters
    ----------
    reading : Reading
        The pipeline's.
    call : mapping
        As `arguments` gives it.

    Raises
    ------
    InvalidWorkload
        If no image is there whose size can be read.
    """
    unknown = list(_unknown(call))
    image = call.get("image")
    pictures = list(image) if isinstance(image, list | tuple) else [image]
    if not pictures or pictures[0] is None:
        raise InvalidWorkload("the call has no image; give image=, a PIL image, an array, a tensor or a list of them")
    sizes = [_size(picture) for picture in pictures]
    if len({size[:2] for size in sizes}) > 1:
        unknown.append("images of several sizes in one call")
    height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
    prompts, tokens = _prompts(call)
    each = call.get("num_images_per_prompt") or 1
    workload = Workload(
        height,
        width,
        tokens,
        max(prompts * each, sum(size[2] for size in sizes)),
        float(call.get("guidance_scale", 7.5)),
        **reading.variant,
    )
    return workload, tuple(unknown)


def _unknown(call: Mapping[str, Any]) -> list[str]:
    found = []
    if call.get("ip_adapter_image") is not None or call.get("ip_adapter_image_embeds") is not None:
        found.append("an IP-Adapter's image")
    extra = set(call.get("cross_attention_kwargs") or ()) - {"scale"}
    if extra:
        found.append(f"cross_attention_kwargs {sorted(extra)}")
    if call.get("output_type") == "latent":
        found.append("output_type='latent': nothing is decoded, which takes less")
    torch = sys.modules.get("torch")
    if torch is not None and (torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu")):
        found.append("autocast")
    return found


def _prompts(call: Mapping[str, Any]) -> tuple[int, int]:
    """Prompts, and tokens of each: the tokenizer pads and cuts to 77, embeddings have as many rows as they have."""
    embeddings = call.get("prompt_embeds")
    if embeddings is not None:
        negative = call.get("negative_prompt_embeds")
        rows = max(int(embeddings.shape[1]), int(negative.shape[1]) if negative is not None else 0)
        return int(embeddings.shape[0]), rows
    prompt = call.get("prompt")
    return (len(prompt) if isinstance(prompt, list | tuple) else 1), CHUNK_TOKENS


def _size(image: Any) -> tuple[int, int, int]:
    """Height and width [pixels] of an image and how many it holds; of latents, which are eight times smaller, too."""
    if hasattr(image, "height") and hasattr(image, "width") and not hasattr(image, "shape"):
        return int(image.height), int(image.width), 1
    shape = tuple(int(side) for side in getattr(image, "shape", ()))
    if not 2 <= len(shape) <= 4:
        raise InvalidWorkload(
            f"cannot read the size of a {type(image).__name__}; give a PIL image, an array or a tensor"
        )
    count = shape[0] if len(shape) == 4 else 1
    if type(image).__module__.startswith("numpy"):  # channels last, as pictures are
        sides = shape[-3:-1] if len(shape) > 2 else shape
        return sides[0], sides[1], count
    scale = VAE_SCALE if len(shape) > 2 and shape[-3] == LATENT_CHANNELS else 1
    return shape[-2] * scale, shape[-1] * scale, count
