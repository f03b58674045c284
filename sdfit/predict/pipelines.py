"""What a diffusers pipeline is, as far as its memory is concerned, and what of it is not known.

A pipeline is looked at, never changed. It is covered if it is diffusers' own `StableDiffusionImg2ImgPipeline` with the
components of Stable Diffusion v1.5: by exact class, parameter count and settings, not by name alone. All else that is
found is named in `Reading.unknown`. torch is not imported here: what is asked of it comes from the pipeline's own objects.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

from sdfit.equation.weights import PARAMETERS
from sdfit.predict import process
from sdfit.workload import DTYPE_BYTES, SLICES, VARIANT_FIELDS

PIPELINE = "StableDiffusionImg2ImgPipeline"
CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
    "safety_checker": ("StableDiffusionSafetyChecker",),
}
"""The components that have weights, and the classes that they may be of."""
SETTINGS: dict[str, dict[str, Any]] = {
    "unet": {
        "in_channels": 4, "out_channels": 4, "cross_attention_dim": 768, "attention_head_dim": 8, "layers_per_block": 2,
        "block_out_channels": (320, 640, 1280, 1280), "time_cond_proj_dim": None, "use_linear_projection": False,
        "upcast_attention": False, "only_cross_attention": False, "dual_cross_attention": False,
        "addition_embed_type": None, "class_embed_type": None, "encoder_hid_dim_type": None,
    },
    "AutoencoderKL": {
        "block_out_channels": (128, 256, 512, 512), "latent_channels": 4, "layers_per_block": 2, "in_channels": 3,
    },
    "AutoencoderTiny": {"latent_channels": 4, "in_channels": 3},
}  # fmt: skip
"""What Stable Diffusion v1.5's configuration says of those settings that memory depends on beside the parameter count."""
ATTENTION = {
    "AttnProcessor2_0": "sdpa",
    "AttnProcessor": "eager",
    "SlicedAttnProcessor": "sliced",
}
TILES = {"tile_sample_min_size": 512, "tile_latent_min_size": 64, "tile_overlap_factor": 0.25}
_WATCHED = ("_hf_hook", "_diffusers_hook", "_compiled_call_impl", "processor", "peft_config")
"""What is found on a module, of what was put there."""
LIBRARIES = ("torch.", "diffusers.", "transformers.")
"""Where the modules of an unchanged pipeline come from."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A pipeline's variant, and what of it sdfit does not know.

    Parameters
    ----------
    dtype, attention, vae, vae_slicing, vae_tiling, offload, safety_checker, execution
        As in `sdfit.workload.Workload`; where something is unknown, the nearest.
    unknown : tuple of str
        What was found and is not covered, each in words; empty if all is.
    to_rgb : bool
        Whether its image processor converts pictures to RGB, which it does not by default.
    scheduler : str
        Name of the scheduler's class.
    """

    dtype: str
    attention: str
    vae: str
    vae_slicing: bool
    vae_tiling: bool
    offload: str
    safety_checker: bool
    execution: str = "default"
    unknown: tuple[str, ...] = ()
    to_rgb: bool = False
    scheduler: str = ""

    @property
    def variant(self) -> dict[str, Any]:
        """The discrete fields, by name."""
        return {name: getattr(self, name) for name in VARIANT_FIELDS}


class Reader:
    """Reads one pipeline; what it found is kept until the pipeline changes.

    Parameters
    ----------
    pipe : diffusers pipeline

    Notes
    -----
    A change is seen in the pipeline's modules: their classes, children, parameters and dtypes, hooks and attention
    processors, and the VAE's flags. It does not see a forward function that was replaced in place on a module.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._state: Any = None
        self._reading: Reading | None = None
        self._modules: list[Any] = []
        self._convolutions: list[tuple[dict[str, Any], str]] = []
        self._lock = threading.Lock()

    def read(self) -> Reading:
        """The pipeline as it is now."""
        with self._lock:
            if self._reading is None or self._seen() != self._state:
                self._look()
                self._state = self._seen()
                self._reading = read(self.pipe)
            return self._with_kernels(self._reading)

    def _seen(self) -> list[Any]:
        """All that a reading depends on, quickly; modules and processors by identity."""
        pipe = vars(self.pipe)
        seen: list[Any] = [type(self.pipe), bool(pipe.get("_all_hooks")), *map(id, pipe.values())]
        take = seen.append
        for module in self._modules:
            own = vars(module)
            take(module.__class__)
            seen.extend(map(id, own["_modules"].values()))
            take(len(own["_parameters"]))
            for tensor in own["_parameters"].values():  # those of one module are of one dtype, or were changed apart
                if tensor is not None:
                    take(tensor.dtype)
                    break
            for name in _WATCHED:
                if name in own:
                    take(own[name])
        for own, name in self._convolutions:
            take(_is_channels_last(own["_parameters"].get(name)))
        vae = getattr(self.pipe, "vae", None)
        seen.extend(getattr(vae, name, None) for name in ("use_slicing", "use_tiling", *TILES))
        return seen

    def _look(self) -> None:
        """Go through the pipeline anew."""
        parts = components(self.pipe)
        self._modules = [m for part in parts.values() for m in part.modules()]
        self._convolutions = [first for part in parts.values() for first in _first_convolution(part)]

    @staticmethod
    def _with_kernels(reading: Reading) -> Reading:
        """The same, with what PyTorch is set to at this moment: attention kernels, cuDNN, the allocator."""
        odd = process.unknown(reading.dtype)
        attention = reading.attention
        if attention != "eager":  # which alone calls no fused kernel; with slices the VAE's attention does
            kind, why = process.fused(reading.vae)
            if attention == "sdpa":
                attention = kind
            elif kind != "sdpa" and reading.vae == "kl":
                why = why or "sliced attention in the UNet beside math attention in the VAE"
            odd += [why] * bool(why)
        if attention == reading.attention and not odd:
            return reading
        return replace(reading, attention=attention, unknown=(*reading.unknown, *odd))


def components(pipe: Any) -> dict[str, Any]:
    """The components of a pipeline that have weights, by name, ControlNets and the like among them."""
    known = getattr(pipe, "components", None)
    parts = dict(known) if isinstance(known, dict) else {n: getattr(pipe, n, None) for n in CLASSES}
    return {name: part for name, part in parts.items() if hasattr(part, "parameters") and hasattr(part, "modules")}


def read(pipe: Any) -> Reading:
    """Look at a pipeline; see `Reading`.

    Examples
    --------
    >>> class StableDiffusionXLPipeline: pass
    >>> read(StableDiffusionXLPipeline()).unknown[0]
    'a StableDiffusionXLPipeline where a StableDiffusionImg2ImgPipeline is covered'
    """
    unknown: list[str] = []
    name = type(pipe).__name__
    if name != PIPELINE or not type(pipe).__module__.startswith("diffusers."):
        unknown.append(f"a {name} where a {PIPELINE} is covered")
    parts = components(pipe)
    for part in parts:
        if part not in CLASSES:
            unknown.append(f"a component '{part}' ({type(parts[part]).__name__})")
    for part in ("unet", "vae", "text_encoder"):
        if part not in parts:
            unknown.append(f"no {part}")
    for part, module in parts.items():
        if part in CLASSES:
            unknown += _unlike(part, module)
    dtype, mixed = _dtype(parts)
    attention, odd = _attention(parts)
    offload, hooks = _offload(pipe, parts)
    to_rgb, processing = _image_processor(pipe)
    unknown += processing
    vae = parts.get("vae")
    tiling = bool(getattr(vae, "use_tiling", False))
    tiles = [f"{k}={getattr(vae, k)}" for k, v in TILES.items() if tiling and hasattr(vae, k) and getattr(vae, k) != v]
    if type(vae).__name__ == "AutoencoderTiny":
        tiles = []
    return Reading(
        dtype=dtype,
        attention=attention,
        vae="tiny" if type(vae).__name__ == "AutoencoderTiny" else "kl",
        vae_slicing=bool(getattr(vae, "use_slicing", False)),
        vae_tiling=tiling,
        offload=offload,
        safety_checker="safety_checker" in parts,
        unknown=(*unknown, *mixed, *odd, *hooks, *(f"VAE tiles of another size ({tile})" for tile in tiles)),
        to_rgb=to_rgb,
        scheduler=type(getattr(pipe, "scheduler", None)).__name__,
    )


def _image_processor(pipe: Any) -> tuple[bool, list[str]]:
    """Whether pictures are converted to RGB, and what else its settings do to their size or channels."""
    processor = getattr(pipe, "image_processor", None)
    if processor is None:
        return False, []
    if type(processor).__name__ != "VaeImageProcessor":
        return False, [f"an image processor of class {type(processor).__name__}"]
    config = processor.config
    expected = {"do_resize": True, "do_convert_grayscale": False, "vae_scale_factor": 8, "vae_latent_channels": 4}
    given = {name: config.get(name, value) for name, value in expected.items()}
    odd = [f"an image processor with {name}={given[name]}" for name, value in expected.items() if given[name] != value]
    return bool(config.get("do_convert_rgb", False)), odd


def _unlike(part: str, module: Any) -> list[str]:
    """How a component differs from Stable Diffusion v1.5's."""
    kind = type(module).__name__
    if kind == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
        return [f"a compiled {part} (torch.compile)"]
    if kind not in CLASSES[part]:
        return [f"a {part} of class {kind}"]
    found = []
    if getattr(module, "peft_config", None) or getattr(module, "_hf_peft_config_loaded", False):
        found.append(f"adapters (LoRA) in the {part}")
    strangers = sorted({type(m).__name__ for m in module.modules() if not type(m).__module__.startswith(LIBRARIES)})
    if strangers:
        found.append(f"modules in the {part} that are not diffusers' own ({', '.join(strangers[:3])})")
    expected = PARAMETERS["vae_tiny" if kind == "AutoencoderTiny" else part]
    count = sum(p.numel() for p in module.parameters())
    if count != expected and not found:
        found.append(f"a {part} of {count:,} parameters where Stable Diffusion v1.5 has {expected:,}")
    config = getattr(module, "config", {})
    for name, value in SETTINGS.get(kind if part == "vae" else part, {}).items():
        given = config.get(name, value) if hasattr(config, "get") else value
        if (tuple(given) if isinstance(given, list) else given) != value:
            found.append(f"a {part} with {name}={given}, not {value}")
    if getattr(module, "encoder_hid_proj", None) is not None:
        found.append("an IP-Adapter")
    if _channels_last(module):
        found.append(f"a {part} in channels-last memory format")
    return found


def _channels_last(module: Any) -> bool:
    """Whether convolutions keep their weights channels-last: other kernels run then."""
    return any(_is_channels_last(own["_parameters"].get(name)) for own, name in _first_convolution(module))


def _first_convolution(module: Any) -> list[tuple[dict[str, Any], str]]:
    """Where a component's first weight is that the two memory formats lay out differently; empty if it has none."""
    for one in module.modules():
        own = vars(one)
        for name, tensor in own["_parameters"].items():
            if tensor is not None and tensor.ndim == 4 and tensor.shape[1] > 1 and tensor.shape[-1] > 1:
                return [(own, name)]
    return []


def _is_channels_last(tensor: Any) -> bool:
    return tensor is not None and tensor.ndim == 4 and tensor.stride()[1] == 1 and not tensor.is_contiguous()


def _dtype(parts: dict[str, Any]) -> tuple[str, list[str]]:
    found = {
        part: {str(p.dtype).removeprefix("torch.") for p in module.parameters()}
        for part, module in parts.items()
        if part in CLASSES
    }
    every = sorted(set().union(*found.values())) if found else []
    main = next(iter(sorted(found.get("unet", set()))), "float16")
    if len(every) == 1 and main in DTYPE_BYTES:
        return main, []
    words = ", ".join(f"{part} {' and '.join(sorted(kinds))}" for part, kinds in found.items() if kinds)
    return (main if main in DTYPE_BYTES else "float16"), [
        f"weights of other or of several dtypes ({words})"
    ] if every else []


def _attention(parts: dict[str, Any]) -> tuple[str, list[str]]:
    unet, vae = (_processors(parts.get(name)) for name in ("unet", "vae"))
    names = {type(p).__name__ for p in unet}
    unknown = (
        [f"attention processors of the UNet: {', '.join(sorted(names - set(ATTENTION)))}"]
        if names - set(ATTENTION)
        else []
    )
    kinds = {ATTENTION[name] for name in names & set(ATTENTION)}
    if len(kinds) > 1:
        unknown.append(f"several kinds of attention in the UNet ({', '.join(sorted(kinds))})")
    kind = next(iter(sorted(kinds)), "sdpa")
    sizes: set[Any] = {getattr(p, "slice_size", None) for p in unet if type(p).__name__ == "SlicedAttnProcessor"}
    named: dict[Any, str] = {heads: name for name, heads in SLICES.items()}
    if len(sizes) > 1 or sizes - set(named):
        unknown.append(f"attention slices of {sorted(sizes, key=str)} heads where one of {sorted(named)} is covered")
    elif sizes:
        kind = named[sizes.pop()]
    expected = "eager" if kind == "eager" else "sdpa"
    theirs = {ATTENTION.get(type(p).__name__, type(p).__name__) for p in vae}
    if theirs - {expected}:
        unknown.append(f"attention in the VAE of another kind ({', '.join(sorted(theirs))}) than in the UNet ({kind})")
    return kind, unknown


def _processors(module: Any) -> list[Any]:
    found = getattr(module, "attn_processors", None)
    return list(found.values()) if isinstance(found, dict) else []


def _offload(pipe: Any, parts: dict[str, Any]) -> tuple[str, list[str]]:
    """Which offload the hooks make up; others are named."""
    streamed = _streamed(parts)
    if streamed:
        return streamed, []
    hooks: set[str] = set()
    for module in parts.values():
        for one in module.modules():
            hook = vars(one).get("_hf_hook")
            if hook is not None:
                hooks.add(type(hook).__name__)
            registry = vars(one).get("_diffusers_hook")
            if registry is not None:
                hooks |= {type(h).__name__ for h in getattr(registry, "hooks", {}).values()} or {
                    type(registry).__name__
                }
    unknown = []
    if hooks - {"CpuOffload"}:
        kinds = {
            "AlignDevicesHook": "sequential offload of a part of it, or layers placed by a device map",
            "SequentialHook": "chained hooks",
            "GroupOffloadingHook": "group offload with streams, of several blocks a group, or of a part of it",
        }
        words = sorted({kinds.get(name, name) for name in hooks - {"CpuOffload"}})
        unknown.append(f"hooks on its modules: {', '.join(words)}")
    return ("model" if getattr(pipe, "_all_hooks", None) or "CpuOffload" in hooks else "none"), unknown


def _streamed(parts: dict[str, Any]) -> str | None:
    """The kind of offload that brings weights module by module, if all of the pipeline is under the same one.

    Sequential offload leaves the safety checker on the card; group offload has streams and groups of one size only.
    """
    kinds = {
        name: {_kind_of(own) for m in module.modules() if (own := vars(m))["_parameters"]}
        for name, module in parts.items()
    }
    checker = kinds.pop("safety_checker", None)
    found = set().union(*kinds.values()) if kinds else set()
    if found == {"sequential"}:
        return "sequential" if checker in (None, {None}) else None
    hooks = [h for module in parts.values() for m in module.modules() for h in _group_hooks(vars(m))]
    if not hooks or not all(any(_group_hooks(vars(m)) for m in module.modules()) for module in parts.values()):
        return None
    types = {
        (str(getattr(h.config.offload_type, "value", "")), h.config.stream, h.config.num_blocks_per_group)
        for h in hooks
    }
    return {("block_level", None, 1): "group_block", ("leaf_level", None, None): "group_leaf"}.get(
        types.pop() if len(types) == 1 else ("", None, None)
    )


def _kind_of(own: dict[str, Any]) -> str | None:
    hook = own.get("_hf_hook")
    every: tuple[Any, ...] = getattr(hook, "hooks", (hook,))
    return "sequential" if any(type(h).__name__ == "AlignDevicesHook" and h.offload for h in every) else None


def _group_hooks(own: dict[str, Any]) -> list[Any]:
    registry = own.get("_diffusers_hook")
    return [h for h in getattr(registry, "hooks", {}).values() if type(h).__name__ == "GroupOffloadingHook"]
