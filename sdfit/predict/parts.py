"""How the components of a pipeline differ from Stable Diffusion v1.5's: classes, settings, weights, and what was done to them.

Every setting of a component is compared, but those of `FREE`: with Stable Diffusion v1.5's where it is no default, and
with the default of the component's own class otherwise, so that a setting which a later diffusers adds counts too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from sdfit.equation.weights import PARAMETERS
from sdfit.predict.built import QUANTO, altered, in_int8
from sdfit.predict.code import LIBRARIES, foreign, replaced
from sdfit.workload import NOT_QUANTISED

CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
    "safety_checker": ("StableDiffusionSafetyChecker",),
}
"""The components that have weights, and the classes that they may be of."""
_CLIP = {
    "attention_dropout": 0.0,
    "hidden_act": "quick_gelu",
    "output_attentions": False,
    "output_hidden_states": False,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": {"cross_attention_dim": 768},
    "AutoencoderKL": {
        "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2,
    },
    "AutoencoderTiny": {},
    "CLIPTextModel": _CLIP | {
        "use_attention_mask": False,
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "max_position_embeddings": 77,
    },
    "StableDiffusionSafetyChecker": _CLIP | {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 14,
    },
}  # fmt: skip
"""Stable Diffusion v1.5's settings that are not the defaults of diffusers' classes; of CLIP all that size depends on.

Source: the configuration files of stable-diffusion-v1-5/stable-diffusion-v1-5.
"""
FREE = (
    "sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "latent_magnitude", "latent_shift",
    "force_upcast", "flip_sin_to_cos", "freq_shift", "norm_eps",
)  # fmt: skip
"""Settings that change values and not amounts. The VAE's sample size sets its tiles, which are compared by themselves."""
QUANTISERS = (QUANTO, "bitsandbytes.", "torchao.")
"""Libraries whose modules hold weights of fewer bits."""
MOST_BUFFERS = 4096
"""Elements of buffers that a component may have: CLIP's position numbers."""


def unlike(part: str, module: Any) -> list[str]:
    """How a component differs from Stable Diffusion v1.5's, each in words.

    Parameters
    ----------
    part : str
        A key of `CLASSES`.
    module : torch.nn.Module
    """
    kind = type(module).__name__
    if kind == "OptimizedModule" or vars(module).get("_compiled_call_impl") is not None:
        return [f"a compiled {part} (torch.compile)"]
    if kind not in CLASSES[part]:
        return [f"a {part} of class {kind}"]
    found = []
    if getattr(module, "peft_config", None) or getattr(module, "_hf_peft_config_loaded", False):
        found.append(f"adapters (LoRA) in the {part}")
    modules = list(module.modules())
    int8 = part == "unet" and is_int8(modules)
    others = [m for m in modules if not (int8 and in_int8(m))]
    strangers = sorted({type(m).__name__ for m in others if not type(m).__module__.startswith(LIBRARIES)})
    if strangers:
        quantised = f"; {NOT_QUANTISED}" if any(type(m).__module__.startswith(QUANTISERS) for m in others) else ""
        found.append(f"modules in the {part} that are not diffusers' own ({', '.join(strangers[:3])}){quantised}")
    found += [f"{what} in the {part}" for what in dict.fromkeys(_done_to(modules))]
    found += _weights(part, kind, module, bool(found), int8)
    settings = [f"a {part} with {name}={given}, not {value}" for name, given, value in _settings(kind, module)]
    found += settings or altered(part, module, explained=bool(found))
    if getattr(module, "encoder_hid_proj", None) is not None:
        found.append("an IP-Adapter")
    if any(is_channels_last(p) for p in module.parameters()):
        found.append(f"a {part} in channels-last memory format")
    elif not all(p.is_contiguous() for p in module.parameters()):
        found.append(f"weights of the {part} that do not lie in one piece: kernels copy them")
    return found


def is_int8(modules: Sequence[Any]) -> bool:
    """Whether all linear layers of a component are in 8 bits as ``execution="int8"`` has them."""
    linear = [m for m in modules if type(m).__name__ in ("Linear", "QLinear")]
    return bool(linear) and all(map(in_int8, linear))


def _weights(part: str, kind: str, module: Any, explained: bool, int8: bool) -> Iterator[str]:
    parameters = list(module.parameters())
    expected = PARAMETERS["vae_tiny" if kind == "AutoencoderTiny" else part]
    count = sum(p.numel() for p in parameters)
    if count != expected and not explained:
        yield f"a {part} of {count:,} parameters where Stable Diffusion v1.5 has {expected:,}"
    kinds = sorted({type(p).__name__ for p in parameters} - {"Parameter"} - ({"WeightQBytesTensor"} if int8 else set()))
    if kinds and not explained:
        yield f"weights of the {part} that are no plain tensors ({', '.join(kinds)}); {NOT_QUANTISED}"
    extra = sum(b.numel() for b in module.buffers())
    if extra > MOST_BUFFERS:
        yield f"buffers of {extra:,} elements in the {part}"


def _settings(kind: str, module: Any) -> Iterator[tuple[str, Any, Any]]:
    """Settings of a component that are not Stable Diffusion v1.5's: name, what it has, what is expected."""
    config, expected = getattr(module, "config", {}), SETTINGS[kind]
    if isinstance(config, dict):  # diffusers'
        expected = {name: value for name, value in (_defaults(module.__class__) | expected).items() if name not in FREE}
        given = dict(config)
    else:  # transformers'
        config = getattr(config, "vision_config", config)
        given = {name: getattr(config, name, value) for name, value in expected.items()}
    for name, value in expected.items():
        got = given.get(name, value)
        got = tuple(got) if isinstance(got, list) else got
        if got != value and (got or value):  # None, False and 0 all say "without"
            yield name, got, value


@lru_cache(maxsize=16)
def _defaults(cls: Any) -> dict[str, Any]:
    """The settings that a component's class takes, and their defaults."""
    parameters = inspect.signature(cls).parameters.values()
    return {
        p.name: tuple(p.default) if isinstance(p.default, list) else p.default
        for p in parameters
        if p.default is not inspect.Parameter.empty
    }


def _done_to(modules: list[Any]) -> Iterator[str]:
    """What was done to modules after they were built but for attributes: hooks, methods that were replaced."""
    for module in modules:
        own = vars(module)
        if type(module).__name__ == "OptimizedModule":
            yield "torch.compile"
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            yield "forward hooks"
        yield from (f"a replaced {type(module).__name__}.{name}" for name in replaced(module))
    for cls in dict.fromkeys(map(type, modules)):
        yield from (f"a replaced {cls.__name__}.{name}" for name in foreign(cls))


def is_channels_last(tensor: Any) -> bool:
    """Whether a convolution's weight is laid out channels-last: other kernels run then."""
    return tensor.ndim == 4 and tensor.stride()[1] == 1 and not tensor.is_contiguous()
