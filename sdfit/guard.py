"""Ask before running: a diffusers img2img pipeline and its inputs to a Workload.

>>> import sdfit.guard

``sdfit.guard.check(pipe, f, image=picture, prompt="a cat")`` raises `WillNotFit` before the run that would fail. The
pipeline is only looked at, never changed, and torch is imported only to ask a card for its free memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdfit.errors import InvalidWorkload, SdfitError
from sdfit.predict.verdict import bound
from sdfit.units import format_bytes, parse_bytes
from sdfit.workload import Workload

if TYPE_CHECKING:
    from sdfit.predict.prediction import Prediction
    from sdfit.predict.predictor import Predictor


class WillNotFit(SdfitError):
    """The run's upper bound is above the memory that is free."""

    exit_code = 3


def workload_of(
    pipe: Any,
    image: Any,
    prompt: str | list[str] | None = None,
    *,
    prompt_embeds: Any = None,
    num_images_per_prompt: int = 1,
    guidance_scale: float = 7.5,
) -> Workload:
    """Read off a pipeline and the arguments of a call what the memory depends on.

    Parameters
    ----------
    pipe : StableDiffusionImg2ImgPipeline
    image : PIL image, array or tensor, or a list of them
        Its size is the run's; a tensor or array is channels-first or channels-last as diffusers takes it.
    prompt, prompt_embeds, num_images_per_prompt, guidance_scale
        As in the call.

    Raises
    ------
    InvalidWorkload
        If the image has no size that can be read.
    """
    height, width = _size(image[0] if isinstance(image, list | tuple) else image)
    if prompt_embeds is not None:
        prompts, length = int(prompt_embeds.shape[0]), int(prompt_embeds.shape[1])
    else:
        texts = [prompt] if isinstance(prompt, str) or prompt is None else list(prompt)
        limit = pipe.tokenizer.model_max_length
        counted = [len(pipe.tokenizer(text or "", truncation=True, max_length=limit).input_ids) for text in texts]
        prompts, length = len(texts), max(counted)
    vae = pipe.vae
    return Workload(
        height,
        width,
        length,
        prompts * num_images_per_prompt,
        float(guidance_scale),
        dtype=str(pipe.unet.dtype).removeprefix("torch."),
        attention=_attention(pipe.unet),
        vae="tiny" if type(vae).__name__ == "AutoencoderTiny" else "kl",
        vae_slicing=bool(getattr(vae, "use_slicing", False)),
        vae_tiling=bool(getattr(vae, "use_tiling", False)),
        offload="model" if getattr(pipe, "_all_hooks", None) else "none",
        safety_checker=pipe.safety_checker is not None,
    )


def check(
    pipe: Any, predictor: Predictor, *, memory: str | float | None = None, level: float | None = None, **call: Any
) -> Prediction:
    """Predict a call of the pipeline, and raise if it will not fit.

    Parameters
    ----------
    memory : str or float, optional
        What PyTorch may take in all. None: what is free on the current card plus what PyTorch holds already.
    **call
        The arguments of the call, see `workload_of`.

    Raises
    ------
    WillNotFit
    """
    prediction = bound(predictor, workload_of(pipe, **call), None, level)
    limit = _available_bytes() if memory is None else parse_bytes(memory)
    if prediction.upper > limit:
        raise WillNotFit(
            f"this run needs up to {format_bytes(prediction.upper)} ({prediction.metric}, level {prediction.level:.3g}) and "
            f"{format_bytes(limit)} is there; see what fits: sdfit advise --gpu {predictor.name}",
            needed=prediction.upper,
            available=limit,
        )
    return prediction


def _available_bytes() -> int:
    import torch

    if not torch.cuda.is_available():
        raise InvalidWorkload("there is no CUDA card to ask for its free memory; give memory='15 GiB'")
    free, _ = torch.cuda.mem_get_info()
    return int(free) + int(torch.cuda.memory_reserved())


def _size(image: Any) -> tuple[int, int]:
    if hasattr(image, "height") and hasattr(image, "width"):
        return int(image.height), int(image.width)
    shape = tuple(getattr(image, "shape", ()))
    if len(shape) >= 3 and shape[-1] in (1, 3, 4):  # channels last: a NumPy picture
        return int(shape[-3]), int(shape[-2])
    if len(shape) >= 2:
        return int(shape[-2]), int(shape[-1])
    raise InvalidWorkload(f"cannot read the size of a {type(image).__name__}; give a PIL image, an array or a tensor")


def _attention(unet: Any) -> str:
    names = {type(p).__name__ for p in unet.attn_processors.values()}
    if names == {"AttnProcessor"}:
        return "eager"
    if names == {"SlicedAttnProcessor"}:
        return "sliced"
    if names <= {"AttnProcessor2_0", "XFormersAttnProcessor"}:
        return "sdpa"
    raise InvalidWorkload(f"the UNet's attention processors {sorted(names)} were never swept")
