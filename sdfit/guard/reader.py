"""A pipeline read once, and again when it has changed: what makes a guarded call cheap.

What a reading depends on is looked at in each call, in about half a millisecond: that of 1,400 modules. A change that only
shows in the code of a method, or in an attribute that neither diffusers nor PyTorch switches, is not seen.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import replace
from operator import attrgetter
from typing import Any

from sdfit.predict import process
from sdfit.predict.parts import CHANGED, home, is_channels_last
from sdfit.predict.pipelines import TILES, Reading, components, read

_HOOKS = ("_hf_hook", "_diffusers_hook", "forward", "_old_forward")
_WATCHED = {*CHANGED, *_HOOKS, "_internal_dict", "processor", "peft_config"}
"""What is found on a module, of what was put there."""
_FLAGS = ("use_slicing", "use_tiling", *TILES)
_METHODS = ("forward", "encode", "decode", "_encode", "_decode", "tiled_encode", "tiled_decode")
_DTYPE = attrgetter("dtype")


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
        self._marked: list[tuple[int, list[str]]] = []
        self._convolutions: list[tuple[int, str]] = []
        self._classes: list[type] = []

    def read(self) -> Reading:
        """The pipeline as it is now, with what PyTorch is set to at this moment."""
        with self._lock:
            if self._reading is None or self._seen() != self._state:
                self._look()
                self._state = self._seen()
                self._reading = read(self.pipe)
            return _with_settings(self._reading)

    def _seen(self) -> list[Any]:
        """All that a reading depends on, quickly: of the pipeline, then of its modules in bulk, then of those that stand out."""
        pipe = vars(self.pipe)
        whole = [ref() is pipe.get(name) for name, ref in self._parts.items()]
        modules = [ref() for ref in self._modules]
        if not all(whole) or None in modules:
            return [None]
        owns: list[dict[str, Any]] = list(map(vars, modules))
        weights = [p for own in owns if (some := own["_parameters"]) for p in some.values() if p is not None]
        vae = pipe.get("vae")
        return [
            type(self.pipe), len(pipe), bool(pipe.get("_all_hooks")), *(getattr(vae, name, None) for name in _FLAGS),
            list(map(type, modules)),
            list(map(len, owns)),
            [id(child) for own in owns if (some := own["_modules"]) for child in some.values()],
            [len(own["_buffers"]) for own in owns],
            [True for own in owns if own["_forward_hooks"] or own["_forward_pre_hooks"]],
            list(map(id, weights)),
            list(map(_DTYPE, weights)),
            [is_channels_last(owns[at]["_parameters"][name]) for at, name in self._convolutions],
            [_mark(name, owns[at].get(name)) for at, names in self._marked for name in names],
            [getattr(cls, name, None) for cls in self._classes for name in _METHODS],
        ]  # fmt: skip

    def _look(self) -> None:
        """Go through the pipeline anew."""
        parts = components(self.pipe)
        self._parts = {name: ref for name, value in vars(self.pipe).items() if (ref := _reference(value)) is not None}
        modules = [m for part in parts.values() for m in part.modules()]
        owns = list(map(vars, modules))
        self._modules = list(map(weakref.ref, modules))
        self._marked = [(at, names) for at, own in enumerate(owns) if (names := sorted(own.keys() & _WATCHED))]
        self._convolutions = [
            (at, name)
            for at, own in enumerate(owns)
            for name, p in own["_parameters"].items()
            if p is not None and p.ndim == 4 and p.shape[-1] > 1
        ]
        self._classes = list(dict.fromkeys(map(type, modules)))


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
