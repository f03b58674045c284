"""A pipeline read once, and again when it has changed: what makes a guarded call cheap.

Each call looks at what a reading depends on, in about half a millisecond: of 1,400 modules the class, how many attributes there are,
every plain one that may matter (`sdfit.predict.built`), the hooks and methods that were put there, the modules and weights in them,
dtypes and layouts; and the pipeline's own settings, its processors and configurations. Not seen between two calls, but by the next
guard: other code in a function of a library that is no module's ``forward``, ``encode`` or ``decode``, and another ``__dict__``.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

from sdfit.predict import process
from sdfit.predict.built import plain
from sdfit.predict.parts import home
from sdfit.predict.pipelines import TILES, Reading, components, read

_HOOKS = ("_hf_hook", "_diffusers_hook", "forward", "_old_forward")
"""What is found on a module, of what was put there."""
_TABLES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
"""What PyTorch keeps of a module's own; most are empty."""
_FLAGS = ("use_slicing", "use_tiling", *TILES)
_STEPS = ("step", "scale_model_input", "add_noise", "set_timesteps")
"""Methods of a scheduler that may be replaced on it."""
_METHODS = ("forward", "encode", "decode", "_encode", "_decode", "tiled_encode", "tiled_decode")
_DTYPE = attrgetter("dtype")
_PROCESSOR, _CONFIG, _BUFFERS = map(itemgetter, ("processor", "_internal_dict", "_buffers"))


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
        self._seen: _Seen | None = None
        self._reading: Reading | None = None
        self._lock = threading.Lock()

    def read(self) -> Reading:
        """The pipeline as it is now, with what PyTorch is set to at this moment."""
        with self._lock:
            if self._reading is None or self._seen is None or not self._seen.still():
                self._seen = _Seen(self.pipe)
                self._reading = read(self.pipe)
            return _with_settings(self._reading)


class _Seen:
    """All that a reading depends on, as it was at one moment.

    Loops are those of `map` and `itertools`, for there are 1,400 modules.

    Notes
    -----
    Components are held weakly, and what is in them only as long as they are there.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._parts = {name: ref for name, value in vars(pipe).items() if (ref := _reference(value)) is not None}
        held: dict[str, Any] = {}

        def gone(_: Any) -> None:
            held.clear()

        roots = list(components(pipe).values())
        self._held, self._roots = held, [weakref.ref(root, gone) for root in roots]
        within = [m for root in roots for m in root.modules() if m is not root]
        modules: list[Any] = [*roots, *within]
        owns: list[dict[str, Any]] = [vars(module) for module in modules]
        held["modules"], held["owns"] = within, owns[len(roots) :]
        self._kinds, self._sizes = list(map(type, modules)), list(map(len, owns))
        groups: dict[tuple[str, ...], list[int]] = {}
        for at, own in enumerate(owns):
            groups.setdefault(tuple(plain(own)), []).append(at)
        self._attributes = [(itemgetter(*names, names[0]), _those(at)) for names, at in groups.items() if names]
        self._plain = [list(map(_copied, map(names, places(owns)))) for names, places in self._attributes]
        tables = {name: list(map(itemgetter(name), owns)) for name in _TABLES}
        self._filled = {name: _those([at for at, table in enumerate(of) if table]) for name, of in tables.items()}
        self._empty = {name: _those([at for at, table in enumerate(of) if not table]) for name, of in tables.items()}
        for name in ("_parameters", "_modules"):
            held[name] = list(map(dict.copy, map(itemgetter(name), self._filled[name](owns))))
        tensors = chain.from_iterable(map(dict.values, held["_parameters"]))
        held["weights"] = weights = [weight for weight in tensors if weight is not None]
        self._wide = _those([at for at, w in enumerate(weights) if w.ndim == 4 and w.shape[-1] > 1])
        self._marked = [(at, name) for at, own in enumerate(owns) for name in _HOOKS if name in own]
        self._attending = _those([at for at, own in enumerate(owns) if "processor" in own])
        self._configured = _those([at for at, own in enumerate(owns) if "_internal_dict" in own])
        self._configs = {id(own["config"]): own["config"] for own in owns if hasattr(own.get("config"), "__dict__")}
        self._methods = [(cls, name) for cls in dict.fromkeys(self._kinds) for name in _METHODS if hasattr(cls, name)]
        self._rest = self._now(owns)

    def still(self) -> bool:
        """Whether all of it is as it was."""
        pipe, held = vars(self._pipe), self._held
        try:
            if not all(ref() is pipe.get(name) for name, ref in self._parts.items()):
                return False
            roots: list[Any] = [ref() for ref in self._roots]
            modules, owns = [*roots, *held["modules"]], [*map(vars, roots), *held["owns"]]
            if list(map(type, modules)) != self._kinds or list(map(len, owns)) != self._sizes:
                return False
            for (names, places), before in zip(self._attributes, self._plain, strict=True):
                if list(map(names, places(owns))) != before:
                    return False
            for name in _TABLES:
                table = itemgetter(name)
                if any(map(table, self._empty[name](owns))):
                    return False
                if name in held and list(map(table, self._filled[name](owns))) != held[name]:
                    return False
            return self._now(owns) == self._rest
        except (KeyError, RuntimeError, TypeError, ValueError):  # something is gone, or is a tensor now
            return False

    def _now(self, owns: list[dict[str, Any]]) -> list[Any]:
        """What is compared by value, but for attributes."""
        pipe, weights = vars(self._pipe), self._held["weights"]
        vae, steps = pipe.get("vae"), getattr(pipe.get("scheduler"), "__dict__", {})
        processors = list(map(_PROCESSOR, self._attending(owns)))
        buffers = chain.from_iterable(map(dict.values, map(_BUFFERS, self._filled["_buffers"](owns))))
        return [
            type(self._pipe), len(pipe), bool(pipe.get("_all_hooks")), *(getattr(vae, name, None) for name in _FLAGS),
            *map(steps.get, _STEPS),
            *map(_settings, (pipe.get("image_processor"), *self._configs.values())),
            processors, list(map(_settings, processors)), list(map(_CONFIG, self._configured(owns))),
            [b is not None and b.numel() for b in buffers],  # moving a module makes others
            list(map(_DTYPE, weights)),
            [w.stride() for w in self._wide(weights)],
            [_mark(name, owns[at].get(name)) for at, name in self._marked],
            [getattr(cls, name) for cls, name in self._methods],
        ]  # fmt: skip


def _those(places: Sequence[Any]) -> Callable[[Any], Sequence[Any]]:
    """What takes the elements at some places of a list, or of a dict."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda every: [every[at] for at in places]


def _copied(values: Sequence[Any]) -> tuple[Any, ...]:
    """The same values, of which those that can be written into are copies."""
    return tuple(value.copy() if isinstance(value, list | dict) else value for value in values)


def _settings(thing: Any) -> dict[str, Any]:
    """What an object holds, at this moment."""
    return dict(getattr(thing, "__dict__", {}))


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
    return [(key, id(hook)) for key, hook in getattr(value, "hooks", {}).items()]


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
