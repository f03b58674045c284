"""Whose code runs: methods and functions of torch, diffusers and transformers that were replaced by code from elsewhere.

People put other attention, other steps or compiled code in their place, on an object, on its class, or in the module that calls
them. By where a function was written it is told what is the libraries' own; nothing is compared with what they are known to have.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

LIBRARIES = (
    "torch.nn.modules.",
    "diffusers.image_processor",
    "diffusers.models.",
    "diffusers.pipelines.",
    "diffusers.schedulers.",
    "transformers.",
)
"""Where the modules of an unchanged pipeline come from."""
_CODE = ("torch.", "diffusers.", "transformers.")
_SUPPORT = sys.stdlib_module_names | {
    "torch", "diffusers", "transformers", "accelerate", "flash_attn", "ftfy", "huggingface_hub", "numpy", "packaging", "peft",
    "PIL", "regex", "safetensors", "scipy", "tokenizers", "torch_npu", "torch_xla", "torchsde", "torchvision", "tqdm",
    "typing_extensions", "xformers",
}  # fmt: skip
"""Packages whose functions and classes the libraries' modules take in for themselves."""
_HOOKS = ("accelerate.hooks", "diffusers.hooks.")
"""Whose replaced ``forward`` is a hook, which is looked at by itself."""


def home(function: Any) -> str:
    """The module in which a function's code was written, whatever it says of itself; '' if it has none."""
    function = getattr(function, "func", function)  # of a functools.partial
    function = getattr(function, "__func__", function)
    return str(getattr(function, "__globals__", {}).get("__name__", ""))


def replaced(thing: Any, passed: tuple[str, ...] = ()) -> list[str]:
    """Methods of an object that were replaced on it, but for hooks, which still call the class's own."""
    own, cls = getattr(thing, "__dict__", {}), type(thing)
    names = [name for name in own if name not in passed and callable(getattr(cls, name, None))]
    return [name for name in names if not (name == "forward" and _is_hook(own, cls))]


def foreign(cls: type) -> list[str]:
    """Methods that were replaced on a class of diffusers, transformers or torch by code from elsewhere, or compiled."""
    return [name for base in cls.__mro__ if base.__module__.startswith(LIBRARIES) for name in _foreign_in(base)]


def rebound(modules: Iterable[str]) -> list[str]:
    """What was replaced in modules of these libraries: functions and classes that they name, methods of classes they define.

    Of layers and attention processors a pipeline runs those that it has: they are told by `foreign`.
    """
    found = []
    for module in modules:
        space = vars(sys.modules[module])
        found += [f"{cls.__name__}.{method}" for cls in _used_by_name(space) for method in _foreign_in(cls)]
        found += [f"{module}.{n}" for n, value in list(space.items()) if not n.startswith("__") and _is_foreign(value)]
    return found


def modules_of(things: Iterable[Any]) -> list[str]:
    """The libraries' modules in which the classes of some objects are written."""
    found = dict.fromkeys(type(thing).__module__ for thing in things)
    return [name for name in found if name.startswith(LIBRARIES) and name in sys.modules]


def namespaces(things: Iterable[Any]) -> list[dict[str, Any]]:
    """What holds the code of some objects: their classes, `modules_of` them, and what else these use of what is written there."""
    things = list(things)
    spaces = [vars(sys.modules[name]) for name in modules_of(things)]
    classes = [cls for space in spaces for cls in _used_by_name(space)]
    classes += [base for cls in dict.fromkeys(map(type, things)) for base in cls.__mro__ if base is not object]
    return [*spaces, *(space for cls in dict.fromkeys(classes) for space in gc.get_referents(vars(cls)))]


def _used_by_name(space: dict[str, Any]) -> list[type]:
    """The classes that are written in a module but for those whose objects are called: layers and attention processors."""
    own = [v for v in list(space.values()) if isinstance(v, type) and v.__module__ == space["__name__"]]
    return [cls for cls in own if not any({"forward", "__call__"} & vars(base).keys() for base in cls.__mro__)]


def _foreign_in(cls: type) -> Iterator[str]:
    for name, value in list(vars(cls).items()):
        inner = (value.fget, value.fset) if isinstance(value, property) else (_within(value),)
        if not isinstance(value, type) and any(map(_is_foreign, inner)):
            yield name


def _within(value: Any) -> Any:
    """The function of a static or class method, of a cached property, of a method with arguments given."""
    return getattr(value, "__func__", None) or (getattr(value, "func", value) if not callable(value) else value)


def _is_foreign(value: Any) -> bool:
    """Whether something that can be called is neither a library's nor of what they rest on, or is compiled; its wrappers count."""
    if not callable(value):
        return False
    if isinstance(value, type):
        return value.__module__.partition(".")[0] not in _SUPPORT
    written = home(value)
    if (written or type(value).__module__).partition(".")[0] not in _SUPPORT:
        return True
    compiled = written.startswith("torch._dynamo.eval_frame") and not getattr(value, "_torchdynamo_disable", False)
    inner = value.func if isinstance(value, partial) else getattr(value, "__wrapped__", None)
    return compiled or (inner is not None and _is_foreign(inner))


def _is_hook(own: dict[str, Any], cls: type) -> bool:
    """Whether a ``forward`` was put there by accelerate's or diffusers' hooks, or back by them, around the class's own."""
    forward = own["forward"]
    if getattr(forward, "__func__", None) is cls.forward:  # type: ignore[attr-defined]
        return True
    before = own.get("_old_forward", forward)
    return home(forward).startswith(_HOOKS) and (before is forward or getattr(before, "__func__", None) is cls.forward)  # type: ignore[attr-defined]
