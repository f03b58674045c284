"""How a component differs, module by module, from one that its own class builds anew from its own configuration.

The other one is built on meta tensors, in some hundredths of a second and once for each configuration; what is kept of it are its
modules' names, classes, sizes of weights and plain attributes: numbers, texts, switches. So what diffusers, transformers and PyTorch
come to have is compared too, and nothing about them is written down here but what cannot matter.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

IGNORED = frozenset((
    # values that are added or multiplied with, whatever they are
    "eps", "scale", "output_scale_factor", "rescale_output_factor", "downscale_freq_shift", "latent_magnitude", "latent_shift",
    # of training: a pipeline computes no gradients, and the probabilities of dropping out are compared
    "training", "gradient_checkpointing", "scale_grad_by_freq", "sparse", "_is_full_backward_hook",
    # of a linear layer, which goes by its weight; where a component is from, what it was trained on
    "in_features", "out_features", "name_or_path", "loss_type", "sample_size",
    # read by themselves
    "use_slicing", "use_tiling", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor",
))  # fmt: skip
"""Attributes whose value changes no amount of memory. `tests/predict/test_built.py` traces a run with another value of each."""
WORDS = {
    "s1": "FreeU", "s2": "FreeU", "b1": "FreeU", "b2": "FreeU",
    "_chunk_size": "feed-forward layers in chunks",
    "fused_projections": "fused projections",
    "upcast_attention": "attention in float32", "upcast_softmax": "attention in float32",
    "_compiled_call_impl": "torch.compile",
    "padding_mode": "convolutions that pad in circles or otherwise than with zeros (seamless pictures)",
    "dilation": "dilated convolutions",
}  # fmt: skip
"""What changes are called that diffusers' and PyTorch's own switches, or well-known recipes, make."""
_ADDED = ("s1", "s2", "b1", "b2", "_compiled_call_impl")
"""Attributes that modules look for and are not built with."""
QUANTO = "optimum.quanto."
"""Where the layers are from that optimum-quanto puts in the place of linear ones."""
_PLAIN = (bool, int, float, str, type(None))
EAGER_CHECKER = ("attention by 'eager' (built with 'sdpa')", "a CLIPAttention, built as a CLIPSdpaAttention")
"""Not differences of a safety checker: transformers before 5 loads it so. `is_eager` says it."""
_KERNELS = "_attn_implementation"
"""Of transformers' configurations: which attention the modules call."""


class _Module(NamedTuple):
    kind: type
    plain: dict[str, Any]
    weights: dict[str, tuple[int, ...]]


def is_plain(value: Any) -> bool:
    """Whether an attribute is a number, a text, a switch, None, or some of them in a row."""
    return isinstance(value, _PLAIN) or (isinstance(value, tuple | list) and all(isinstance(v, _PLAIN) for v in value))


def plain(own: Mapping[str, Any]) -> dict[str, Any]:
    """The plain attributes of a module that may matter, by name, of all that it has.

    Examples
    --------
    >>> plain({"heads": 8, "eps": 1e-5, "stride": [2, 2], "processor": object()})
    {'heads': 8, 'stride': (2, 2)}
    """
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in own.items()
        if name not in IGNORED and is_plain(value)
    }


def in_int8(module: Any, kind: type | None = None) -> bool:
    """Whether a module is what optimum-quanto makes of a linear layer with ``qint8`` weights, frozen, and nothing else quantised."""
    cls = type(module)
    if not (cls.__module__.startswith(QUANTO) and cls.__name__ == "QLinear") or (kind and kind.__name__ != "Linear"):
        return False
    whole, other = getattr(module.weight, "_data", None), (module.activation_qtype, module.weight_group_size)
    return str(getattr(whole, "dtype", "")) == "torch.int8" and other == (None, None)


def altered(part: str, module: Any, *, explained: bool) -> Iterator[str]:
    """Differences between a component and one that is built from its configuration, each in words.

    Parameters
    ----------
    part : str
        What the component is called.
    module : torch.nn.Module
        Of one of diffusers' or transformers' own classes.
    explained : bool
        Whether it is known already why modules or weights are others: then only attributes are compared.
    """
    try:
        built = _as_built(module)
    except Exception as error:
        yield f"a {part} that {type(module).__name__} does not build from its configuration ({error})"
        return
    found: Counter[str] = Counter()
    first: dict[str, str] = {}
    for path, text in _differences(module, built, explained):
        if part == "safety_checker" and text in EAGER_CHECKER:
            continue
        found[text] += 1
        first.setdefault(text, path)
    for text, count in found.items():
        if text in WORDS.values():
            yield f"{text} in the {part}"
        else:
            more = f" and {count - 1} more" if count > 1 else ""
            yield f"{text} in {'.'.join(filter(None, (part, first[text])))}{more}"


def is_eager(module: Any) -> bool:
    """Whether attention layers of a component of transformers materialise their scores."""
    return any(_kernels(vars(m)) == "eager" for m in module.modules() if "Attention" in type(m).__name__)


def _differences(module: Any, built: Mapping[str, _Module], explained: bool) -> Iterator[tuple[str, str]]:
    """Where, and what."""
    there = dict(module.named_modules())
    if not explained:
        yield from ((path, f"no {built[path].kind.__name__}") for path in built.keys() - there.keys())
    for path, one in there.items():
        as_built = built.get(path)
        if as_built is not None and in_int8(one, as_built.kind):
            continue
        if as_built is None or type(one) is not as_built.kind:
            if not explained:
                wanted = f", built as a {as_built.kind.__name__}" if as_built else ", which is built without one"
                yield path, f"a {type(one).__name__}{wanted}"
            continue
        own = vars(one)
        for name in _unlike(own, as_built):
            got, value = own.get(name), as_built.plain.get(name)
            shown = got if is_plain(got) else f"a {type(got).__name__}"
            yield path, WORDS.get(name, f"{name}={shown} (built with {value})")
        if not explained and (shapes := _shapes(own)) != as_built.weights:
            yield path, f"weights of sizes {shapes} (built with {as_built.weights})"
        kernels, wanted = _kernels(own), as_built.plain[_KERNELS]
        if kernels != wanted:
            yield path, f"attention by '{kernels}' (built with '{wanted}')"


def _unlike(own: Mapping[str, Any], as_built: _Module) -> Iterator[str]:
    """Names of attributes that are not as built, or were not built at all and are looked for."""
    mine = plain(own)
    for name, value in as_built.plain.items():
        if name != _KERNELS and mine.get(name, ...) != value and name not in own.get("_modules", ()):
            yield name
    yield from (name for name in _ADDED if own.get(name) is not None)
    for name in mine.keys() - as_built.plain.keys() - {*_ADDED}:
        if mine[name] is not None and mine[name] != getattr(as_built.kind, name, mine[name]):
            yield name


_known: dict[tuple[type, str], dict[str, _Module]] = {}


def _as_built(module: Any) -> dict[str, _Module]:
    """The modules of a component as its class builds them from its configuration, by path; built once for each configuration."""
    cls, config = type(module), module.config
    given = dict(config) if isinstance(config, dict) else _public(config.to_dict())
    key = cls, repr(sorted(given.items(), key=lambda item: item[0]))
    if key not in _known:
        with sys.modules["torch"].device("meta"):
            made = cls(**_taken(cls, given)) if isinstance(config, dict) else cls(type(config)(**given))
        _known[key] = {
            path: _Module(type(one), plain(vars(one)) | {_KERNELS: _kernels(vars(one))}, _shapes(vars(one)))
            for path, one in made.named_modules()
        }
    return _known[key]


def _taken(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a class takes; others that its configuration has too are notes."""
    return {name: given[name] for name in inspect.signature(cls).parameters if name in given}


def _public(given: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of transformers without its private notes: among them is which attention was chosen."""
    return {
        name: _public(value) if isinstance(value, dict) else value
        for name, value in given.items()
        if not str(name).startswith("_")
    }


def _kernels(own: Mapping[str, Any]) -> Any:
    return getattr(own.get("config"), _KERNELS, None)


def _shapes(own: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in own["_parameters"].items() if weight is not None}
