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
    """What was replaced in modules of these libraries: functions and classes they name, and methods of classes they define."""
    found = []
    for module in modules:
        for name, value in list(vars(sys.modules[module]).items()):
            if isinstance(value, type) and value.__module__ == module:
                found += [f"{value.__name__}.{method}" for method in _foreign_in(value)]
            elif not name.startswith("__") and _is_foreign(value):
                found.append(f"{module}.{name}")
    return found


def modules_of(things: Iterable[Any]) -> list[str]:
    """The libraries' modules in which the classes of some objects are written."""
    found = dict.fromkeys(type(thing).__module__ for thing in things)
    return [name for name in found if name.startswith(LIBRARIES) and name in sys.modules]


def namespaces(things: Iterable[Any]) -> list[dict[str, Any]]:
    """What holds the code of some objects: `modules_of` them, the classes written there, and those that theirs derive from."""
    things = list(things)
    spaces = [vars(sys.modules[name]) for name in modules_of(things)]
    classes = [
        value for space in spaces for value in list(space.values())
        if isinstance(value, type) and value.__module__ == space["__name__"]
    ]  # fmt: skip
    classes += [base for cls in dict.fromkeys(map(type, things)) for base in cls.__mro__ if base is not object]
    return [*spaces, *(space for cls in dict.fromkeys(classes) for space in gc.get_referents(vars(cls)))]


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
