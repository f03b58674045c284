"""A pipeline read once, and again when it has changed: what makes a guarded call cheap.

What a reading depends on is looked at in each call, in about half a millisecond: that of 1,400 modules. A change that only
shows in the code of a method, or in an attribute that neither diffusers nor PyTorch switches, is not seen; nor is a hook
that is written straight into a module's table of hooks, where no module had one: what is looked at is PyTorch's own count of
the hooks that it has registered.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from operator import attrgetter, call, itemgetter
from typing import Any

from sdfit.predict import process
from sdfit.predict.parts import CHANGED, home, is_channels_last
from sdfit.predict.pipelines import TILES, Reading, components, read

_HOOKS = ("_hf_hook", "_diffusers_hook", "forward", "_old_forward")
_OF_CONVOLUTIONS = ("padding_mode", "dilation")
_WATCHED = {*CHANGED, *_HOOKS, "_internal_dict", "processor", "peft_config"} - {*_OF_CONVOLUTIONS}
"""What is found on a module, of what was put there."""
_FLAGS = ("use_slicing", "use_tiling", *TILES)
_STEPS = ("step", "scale_model_input", "add_noise", "set_timesteps")
"""Methods of a scheduler that may be replaced on it."""
_METHODS = ("forward", "encode", "decode", "_encode", "_decode", "tiled_encode", "tiled_decode")
_DTYPE = attrgetter("dtype")
_WEIGHTS, _CHILDREN, _BUFFERS = map(itemgetter, ("_parameters", "_modules", "_buffers"))


class Reader:
    """Reads one pipeline; what it found is kept until the pipeline changes.

    Parameters
    ----------
    pipe : diffusers pipeline

    Notes
    -----
    Holds no component: one that is dropped from the pipeline is freed.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._state: list[Any] = []
        self._reading: Reading | None = None
        self._lock = threading.Lock()
        self._parts: dict[str, Any] = {}
        self._modules: list[Any] = []
        self._weighted = self._parents = self._convolving = _those([])
        self._hooked = False
        self._hooks_made: Any = None
        self._marked: list[tuple[int, str]] = []
        self._plain: list[tuple[int, str]] = []
        self._convolutions: list[tuple[int, str]] = []
        self._methods: list[tuple[type, str]] = []

    def read(self) -> Reading:
        """The pipeline as it is now, with what PyTorch is set to at this moment."""
        with self._lock:
            if self._reading is None or self._seen() != self._state:
                self._look()
                self._state = self._seen()
                self._reading = read(self.pipe)
            return _with_settings(self._reading)

    def _seen(self) -> list[Any]:
        """All that a reading depends on, quickly: of the pipeline, then of its modules in bulk, then of those that stand out.

        Loops are those of `map` and `itertools`: there are 1,400 modules.
        """
        pipe = vars(self.pipe)
        whole = [ref() is pipe.get(name) for name, ref in self._parts.items()]
        modules = list(map(call, self._modules))
        try:
            owns: list[dict[str, Any]] = list(map(vars, modules))
        except TypeError:  # None, for one that is gone
            return [None]
        if not all(whole):
            return [None]
        weights = list(chain.from_iterable(map(dict.values, map(_WEIGHTS, self._weighted(owns)))))
        vae, steps = pipe.get("vae"), getattr(pipe.get("scheduler"), "__dict__", {})
        return [
            type(self.pipe), len(pipe), bool(pipe.get("_all_hooks")), *(getattr(vae, name, None) for name in _FLAGS),
            *map(steps.get, _STEPS),
            list(map(type, modules)),
            list(map(len, owns)),
            list(map(id, chain.from_iterable(map(dict.values, map(_CHILDREN, self._parents(owns)))))),
            list(map(len, map(_BUFFERS, owns))),
            self._hooks(owns),
            list(map(id, weights)),
            [_DTYPE(p) for p in weights if p is not None],
            [is_channels_last(owns[at]["_parameters"][name]) for at, name in self._convolutions],
            list(map(itemgetter(*_OF_CONVOLUTIONS), self._convolving(owns))),
            [owns[at].get(name) for at, name in self._plain],
            [_mark(name, owns[at].get(name)) for at, name in self._marked],
            [getattr(cls, name) for cls, name in self._methods],
        ]  # fmt: skip

    def _hooks(self, owns: list[dict[str, Any]]) -> list[int]:
        """The modules with hooks; not looked for where there were none and PyTorch has made none since, for any module."""
        made = getattr(sys.modules.get("torch.utils.hooks"), "RemovableHandle", None)
        number = getattr(made, "next_id", None)
        if number is None or number != self._hooks_made or self._hooked:
            found = [at for at, own in enumerate(owns) if own["_forward_hooks"] or own["_forward_pre_hooks"]]
            self._hooks_made, self._hooked = number, bool(found)
            return found
        return []

    def _look(self) -> None:
        """Go through the pipeline anew."""
        parts = components(self.pipe)
        self._parts = {name: ref for name, value in vars(self.pipe).items() if (ref := _reference(value)) is not None}
        modules = [m for part in parts.values() for m in part.modules()]
        owns = list(map(vars, modules))
        self._modules = list(map(weakref.ref, modules))
        found = [(at, name) for at, own in enumerate(owns) for name in sorted(own.keys() & _WATCHED)]
        self._plain = [(at, name) for at, name in found if name not in _HOOKS]
        self._marked = [(at, name) for at, name in found if name in _HOOKS]
        self._weighted = _those([at for at, own in enumerate(owns) if own["_parameters"]])
        self._parents = _those([at for at, own in enumerate(owns) if own["_modules"]])
        self._convolving = _those([at for at, own in enumerate(owns) if own.keys() >= {*_OF_CONVOLUTIONS}])
        self._convolutions = [
            (at, name)
            for at, own in enumerate(owns)
            for name, p in own["_parameters"].items()
            if p is not None and p.ndim == 4 and p.shape[-1] > 1
        ]
        classes = dict.fromkeys(map(type, modules))
        self._methods = [(cls, name) for cls in classes for name in _METHODS if hasattr(cls, name)]


def _those(places: list[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """What takes the elements at some places of a list."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda every: [every[at] for at in places]


def _reference(value: Any) -> Any:
    """A weak reference; None to what takes none: numbers, texts, devices."""
    try:
        return weakref.ref(value)
    except TypeError:
        return None


def _mark(name: str, value: Any) -> Any:
    """What of something found on a module a reading depends on; diffusers puts hooks there anew after each run."""
    if name == "_hf_hook":
        return type(value), id(getattr(getattr(value, "prev_module_hook", None), "model", None))
    if name in ("forward", "_old_forward"):
        return home(value), getattr(value, "__func__", None)
    return value


def _with_settings(reading: Reading) -> Reading:
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
