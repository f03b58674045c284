"""What a diffusers pipeline is, as far as its memory is concerned, and what of it is not known.

A pipeline is looked at, never changed. It is covered if it is diffusers' own `StableDiffusionImg2ImgPipeline` with the
components of Stable Diffusion v1.5: by exact class, parameter count and settings, not by name alone. All else that is
found is named in `Reading.unknown`. torch is not imported here: what is asked of it comes from the pipeline's own objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sdfit.predict.built import is_eager
from sdfit.predict.code import foreign, home, modules_of, rebound, replaced
from sdfit.predict.parts import CLASSES, is_int8, unlike
from sdfit.workload import CHUNK_TOKENS, DTYPE_BYTES, NOT_QUANTISED, QUANTISED, SLICES, VARIANT_FIELDS

PIPELINE = "StableDiffusionImg2ImgPipeline"
ATTENTION = {
    "AttnProcessor2_0": "sdpa",
    "AttnProcessor": "eager",
    "SlicedAttnProcessor": "sliced",
}
TURNS = ("text_encoder", "unet", "vae")
"""The components of which `enable_model_cpu_offload` keeps one at a time on the card, in their order."""
WITHOUT_MEMORY = ("progress_bar", "__call__")
"""Methods of a pipeline that people replace, or wrap, and that take no memory of the card themselves."""
TILES = {"tile_sample_min_size": 512, "tile_latent_min_size": 64, "tile_overlap_factor": 0.25}
"""Of `AutoencoderKL`; `AutoencoderTiny` overlaps its tiles by `TINY_OVERLAP`."""
TINY_OVERLAP = 0.125


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
    eager_checker : bool
        Whether its safety checker materialises attention scores, as one loaded by transformers before 5 does.
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
    eager_checker: bool = False

    @property
    def variant(self) -> dict[str, Any]:
        """The discrete fields, by name."""
        return {name: getattr(self, name) for name in VARIANT_FIELDS}


def components(pipe: Any) -> dict[str, Any]:
    """The components of a pipeline that have weights, by name, ControlNets and the like among them."""
    known = getattr(pipe, "components", None)
    parts = dict(known) if isinstance(known, dict) else {n: getattr(pipe, n, None) for n in CLASSES}
    return {name: part for name, part in parts.items() if hasattr(part, "parameters") and hasattr(part, "modules")}


def coded(pipe: Any) -> list[Any]:
    """What of a pipeline holds code that a run calls: itself, its components, their modules and attention processors."""
    modules = [module for part in components(pipe).values() for module in part.modules()]
    processors = [own["processor"] for module in modules if "processor" in (own := vars(module))]
    beside = (getattr(pipe, name, None) for name in ("scheduler", "image_processor", "tokenizer", "feature_extractor"))
    return [pipe, *(thing for thing in beside if thing is not None), *modules, *processors]


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
    methods = [*replaced(pipe, WITHOUT_MEMORY), *(m for m in foreign(type(pipe)) if m not in WITHOUT_MEMORY)]
    unknown += [f"a replaced {name}.{method}" for method in methods]
    parts = components(pipe)
    checker = getattr(pipe, "safety_checker", None)
    if checker is not None and "safety_checker" not in parts:
        unknown.append(f"a safety checker that is a {type(checker).__name__} (to go without, set it to None)")
    for part in parts:
        if part not in CLASSES:
            unknown.append(f"a component '{part}' ({type(parts[part]).__name__})")
    for part in ("unet", "vae", "text_encoder"):
        if part not in parts:
            unknown.append(f"no {part}")
    for part, module in parts.items():
        if part in CLASSES:
            unknown += unlike(part, module)
    unknown += _scheduler(getattr(pipe, "scheduler", None)) + _beside(pipe, "safety_checker" in parts)
    dtype, mixed = _dtype(parts)
    attention, odd = _attention(parts)
    offload, hooks = _offload(pipe, parts)
    to_rgb, processing = _image_processor(pipe)
    unknown += processing
    names = (name for name in rebound(modules_of(coded(pipe))) if name.rpartition(".")[2] not in WITHOUT_MEMORY)
    unknown += [f"a replaced {name}" for name in names if not any(k.startswith(f"a replaced {name}") for k in unknown)]
    vae = parts.get("vae")
    tiling = bool(getattr(vae, "use_tiling", False))
    tiny = type(vae).__name__ == "AutoencoderTiny"
    built = TILES | ({"tile_overlap_factor": TINY_OVERLAP} if tiny else {})
    tiles = [f"{k}={getattr(vae, k)}" for k, v in built.items() if tiling and getattr(vae, k, v) != v]
    return Reading(
        dtype=dtype,
        attention=attention,
        vae="tiny" if tiny else "kl",
        vae_slicing=bool(getattr(vae, "use_slicing", False)),
        vae_tiling=tiling,
        offload=offload,
        safety_checker="safety_checker" in parts,
        execution="int8" if "unet" in parts and is_int8(list(parts["unet"].modules())) else "default",
        unknown=(*unknown, *mixed, *odd, *hooks, *(f"VAE tiles of another size ({tile})" for tile in tiles)),
        to_rgb=to_rgb,
        scheduler=type(getattr(pipe, "scheduler", None)).__name__,
        eager_checker="safety_checker" in parts and is_eager(parts["safety_checker"]),
    )


def _scheduler(scheduler: Any) -> list[str]:
    """What of a scheduler is not diffusers' own: it runs between the UNet's passes, and may take anything."""
    cls = type(scheduler)
    if not cls.__module__.startswith("diffusers.schedulers."):
        return [f"a scheduler of class {cls.__module__}.{cls.__name__}"]
    methods = [*replaced(scheduler), *foreign(cls)]
    return [f"a replaced {cls.__name__}.{name}" for name in methods]


def _beside(pipe: Any, checked: bool) -> list[str]:
    """What of its tokenizer, and of what makes the safety checker's pictures, is not as transformers has it."""
    found = []
    for name in ("tokenizer", *["feature_extractor"] * checked):
        thing = getattr(pipe, name, None)  # without a tokenizer embeddings are given, or diffusers fails
        cls = type(thing)
        if thing is not None and not cls.__module__.startswith("transformers."):
            found.append(f"a {name} of class {cls.__module__}.{cls.__name__}")
        found += [f"a replaced {cls.__name__}.{method}" for method in replaced(thing)]
    longest = getattr(getattr(pipe, "tokenizer", None), "model_max_length", CHUNK_TOKENS)
    if longest != CHUNK_TOKENS:
        found.append(f"a tokenizer that pads and cuts to {longest:.5g} tokens, not {CHUNK_TOKENS}")
    device = getattr(getattr(pipe, "feature_extractor", None), "device", None)
    if checked and str(device or "cpu") != "cpu":
        found.append(f"a feature_extractor that works on '{device}'")
    return found


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
    odd += [f"a replaced VaeImageProcessor.{name}" for name in (*replaced(processor), *foreign(type(processor)))]
    return bool(config.get("do_convert_rgb", False)), odd


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
    why = "" if set(QUANTISED).isdisjoint(every) else f"; {NOT_QUANTISED}"
    return (main if main in DTYPE_BYTES else "float16"), [
        f"weights of other or of several dtypes ({words}){why}"
    ] if every else []


def _attention(parts: dict[str, Any]) -> tuple[str, list[str]]:
    unet, vae = (_processors(parts.get(name)) for name in ("unet", "vae"))
    names = {_processor_name(p) for p in unet}
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
    theirs = {ATTENTION.get(_processor_name(p), _processor_name(p)) for p in vae}
    if theirs - {expected}:
        unknown.append(f"attention in the VAE of another kind ({', '.join(sorted(theirs))}) than in the UNet ({kind})")
    return kind, unknown


def _processor_name(processor: Any) -> str:
    """The class of an attention processor, with its module where that, or its code, is not diffusers' own."""
    cls = type(processor)
    own = cls.__module__.startswith("diffusers.") and home(cls.__call__).startswith("diffusers.")
    return cls.__name__ if own else f"{home(cls.__call__)}.{cls.__name__}"


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
    if not (getattr(pipe, "_all_hooks", None) or "CpuOffload" in hooks):
        return "none", unknown
    return "model", unknown + _partial(pipe, parts) * (not unknown)


def _partial(pipe: Any, parts: dict[str, Any]) -> list[str]:
    """What of the offload is not as `enable_model_cpu_offload` makes it: all components in turns, the checker stays."""
    hooks = {name: hook for name, part in parts.items() if (hook := vars(part).get("_hf_hook")) is not None}
    turns = [name for name in TURNS if name in parts]
    if set(hooks) != set(turns):
        return [
            f"offload of {' and '.join(hooks) or 'no component'} alone (enable_model_cpu_offload takes them all in turns)"
        ]
    before = [getattr(getattr(hooks[name], "prev_module_hook", None), "model", None) for name in turns]
    if before != [None, *(parts[name] for name in turns[:-1])] or len(getattr(pipe, "_all_hooks", ())) != len(turns):
        return ["offload hooks that do not take turns as enable_model_cpu_offload's do"]
    return []


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
