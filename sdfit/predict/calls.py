"""What a call of an img2img pipeline asks for: its size, batch and prompt; what of it is not covered; what diffusers refuses.

A run that diffusers itself fails on has no memory: it is an `InvalidWorkload` with diffusers' reason, not a number.
`tests/predict/test_calls.py` tries each on a real pipeline.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from sdfit.errors import InvalidWorkload
from sdfit.predict.inputs import Input, look
from sdfit.predict.pipelines import Reading
from sdfit.workload import CHUNK_TOKENS, Workload

TEXT_WIDTH = 768
"""Channels of the UNet's text embeddings."""
CHECKER_PIXELS = 256 * 256
"""Below so many an eager safety checker may set the peak: of 64 images of 64x64 it takes 10 % more than they do otherwise, of 256x256
nothing (traced)."""
ONE_STEP_MORE = ("PNDMScheduler",)
"""Schedulers that have a timestep more than steps: one is left where ``strength`` leaves none."""


def defaults_of(signature: inspect.Signature) -> dict[str, Any] | None:
    """What a call by keywords alone leaves to a pipeline that takes any and needs none, which diffusers' do; None: it is another."""
    parameters = signature.parameters.values()
    named = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty}
    return named if len(named) + 1 == len(parameters) and any(p.kind is p.VAR_KEYWORD for p in parameters) else None


def arguments(
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    defaults: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A call's arguments by name, defaults included; ``signature`` without ``self``, ``defaults`` as `defaults_of` it.

    Raises
    ------
    InvalidWorkload
        If the pipeline does not take them; with the reason.
    """
    if defaults is not None and not args:
        return defaults | dict(kwargs)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InvalidWorkload(f"the pipeline does not take this call: {error}") from None
    bound.apply_defaults()
    found: dict[str, Any] = dict(bound.arguments)
    rest: dict[str, Any] = found.pop("kwargs", {})
    return found | rest


def workload_of(reading: Reading, call: Mapping[str, Any]) -> tuple[Workload, tuple[str, ...], str]:
    """The workload of a call, what of it sdfit does not know, and what the caller should be told.

    Parameters
    ----------
    reading : Reading
        The pipeline's.
    call : mapping
        As `arguments` gives it.

    Raises
    ------
    InvalidWorkload
        If diffusers fails on it, or the size is beyond what sdfit takes.
    """
    unknown = _unknown(call)
    image = look(call.get("image"), to_rgb=reading.to_rgb)
    if image.unknown:
        unknown.append(image.unknown)
    guidance = _guidance(call)
    _denoises(call, reading.scheduler)
    prompts, tokens = _prompts(call, guidance > 1)
    try:
        workload = Workload(
            image.height, image.width, tokens, _batch(call, prompts, image), max(guidance, 0.0), **reading.variant
        )
    except InvalidWorkload as error:
        if not image.remark:
            raise
        raise InvalidWorkload(f"{error}; {image.remark}", **error.facts) from None
    if reading.eager_checker and workload.effective_height * workload.effective_width < CHECKER_PIXELS:
        unknown.append("eager attention in the safety checker, which sets the peak of pictures this small")
    return workload, tuple(unknown), "; ".join(filter(None, (image.remark, _calls_back(call))))


def _calls_back(call: Mapping[str, Any]) -> str:
    """What is to be said of code that a run calls after each step, but for diffusers' own, which only takes guidance away."""
    given = [name for name in ("callback_on_step_end", "callback") if call.get(name) is not None]
    theirs = [name for name in given if not type(call[name]).__module__.startswith("diffusers.callbacks")]
    return f"what {theirs[0]} itself takes is not in the number" if theirs else ""


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


def _guidance(call: Mapping[str, Any]) -> float:
    scale = call.get("guidance_scale", 7.5)
    try:
        return float(scale)
    except (TypeError, ValueError):
        raise InvalidWorkload(f"guidance_scale is {scale!r}; diffusers takes a number") from None


def _denoises(call: Mapping[str, Any], scheduler: str) -> None:
    """Refuse a call that leaves no step to run."""
    strength, steps = call.get("strength", 0.8), call.get("num_inference_steps", 50)
    for name in ("timesteps", "sigmas"):
        if call.get(name) is not None:
            steps = len(call[name])
    if not _between(strength, Real, 0, 1):
        raise InvalidWorkload(f"strength is {strength!r}; diffusers takes a number from 0 to 1")
    if not _between(steps, Integral, 1, math.inf):
        raise InvalidWorkload(f"num_inference_steps is {steps!r}; diffusers takes a whole number from 1")
    if int(steps * strength) == 0 and scheduler not in ONE_STEP_MORE:
        raise InvalidWorkload(
            f"strength {strength:g} of {steps} steps leaves no step to run, on which diffusers fails with a {scheduler}; "
            f"give a strength of at least {1 / steps:.2g}, or more steps"
        )


def _between(value: Any, kind: type, low: float, high: float) -> bool:
    """Whether a value is a number of a kind, NumPy's too, within limits."""
    return isinstance(value, kind) and low <= value <= high  # type: ignore[operator]


def _prompts(call: Mapping[str, Any], guided: bool) -> tuple[int, int]:
    """Prompts, and tokens of each: the tokenizer pads and cuts to 77, embeddings have as many rows as they have."""
    prompt, given = call.get("prompt"), call.get("prompt_embeds")
    negative, negatives = call.get("negative_prompt"), call.get("negative_prompt_embeds")
    for pair, names in (((prompt, given), "prompt"), ((negative, negatives), "negative_prompt")):
        if pair[0] is not None and pair[1] is not None:
            raise InvalidWorkload(f"diffusers takes {names} or {names}_embeds, not both; leave one out")
    if given is None:
        if not isinstance(prompt, str | list) or prompt == []:
            shown = "no prompt and no prompt_embeds" if prompt is None else f"a prompt of {type(prompt).__name__}"
            raise InvalidWorkload(f"the call has {shown}; diffusers takes a prompt that is a text or a list of texts")
        count, rows = (len(prompt) if isinstance(prompt, list) else 1), CHUNK_TOKENS
    else:
        shape = tuple(given.shape)
        if len(shape) != 3 or shape[2] != TEXT_WIDTH:
            raise InvalidWorkload(
                f"prompt_embeds has the shape {shape}; the UNet takes (prompts, tokens, {TEXT_WIDTH})"
            )
        count, rows = int(shape[0]), int(shape[1])
    if negatives is not None and (given is not None or guided):
        wanted = tuple(given.shape) if given is not None else (count, rows, TEXT_WIDTH)
        if tuple(negatives.shape) != wanted:
            raise InvalidWorkload(
                f"negative_prompt_embeds has the shape {tuple(negatives.shape)}; beside this prompt diffusers takes {wanted} only"
            )
    if guided and negatives is None:
        if rows > CHUNK_TOKENS:
            raise InvalidWorkload(
                f"prompt_embeds has {rows} tokens, and diffusers would pad the negative prompt to as many, of which the text "
                f"encoder takes {CHUNK_TOKENS} at most; give negative_prompt_embeds too"
            )
        if negative is not None and prompt is not None and type(negative) is not type(prompt):
            raise InvalidWorkload(
                f"negative_prompt is a {type(negative).__name__} and prompt a {type(prompt).__name__}; diffusers takes two alike"
            )
        if isinstance(negative, list) and len(negative) != count:
            raise InvalidWorkload(
                f"there are {len(negative)} negative prompts for {count} prompts; diffusers takes one each"
            )
    return count, rows


def _batch(call: Mapping[str, Any], prompts: int, image: Input) -> int:
    """Images that come out: those of the prompts, to which the images given are repeated where they go into them."""
    each = call.get("num_images_per_prompt", 1)
    if not _between(each, Integral, 1, math.inf):
        raise InvalidWorkload(f"num_images_per_prompt is {each!r}; diffusers takes a whole number from 1")
    batch = prompts * int(each)
    generators: Any = call.get("generator")
    one_by_one = isinstance(generators, list) and not image.latents
    if one_by_one and len(generators) != batch:
        raise InvalidWorkload(
            f"there are {len(generators)} generators for {batch} images; diffusers takes one for each"
        )
    if batch % image.count and not (one_by_one and image.count > batch):
        raise InvalidWorkload(
            f"{image.count} images cannot be spread over {prompts} prompt(s) x {each} image(s) each: diffusers takes as many "
            "images as come out, or a number that divides them"
        )
    return batch
