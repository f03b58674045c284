"""A pipeline read once, and again when it has changed: what makes a guarded call cheap.

Each call looks at what a reading depends on, in about half a millisecond: of 1,400 modules the class and all that they hold
(attributes, hooks, methods that were put there, modules, weights), dtypes and layouts; the pipeline's own settings, its
processors, tokenizer and configurations; the code of the classes and functions that a run calls (`sdfit.predict.code`). Not seen:
other code in a function that those call of modules in which no part of the pipeline is written (``torch.nn.functional`` is asked
for by `sdfit.predict.process`).
"""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace
from itertools import chain
from operator import attrgetter
from typing import Any

from sdfit.predict import process
from sdfit.predict.code import home, namespaces, replaced
from sdfit.predict.pipelines import Reading, coded, components, read

_HOOKS = ("_hf_hook", "_diffusers_hook", "forward", "_old_forward")
"""What is found on a module, of what was put there."""
_TABLES = ("_parameters", "_modules", "_forward_hooks", "_forward_pre_hooks")
"""What PyTorch keeps of a module's own beside its buffers; most are empty."""
_BESIDE = ("image_processor", "tokenizer", "feature_extractor")
"""What of a pipeline has no weights and no state of a run; a scheduler has one, of which its methods count."""
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

    What 1,400 modules hold is one list that the garbage collector makes: their classes, attributes and tables, whatever they are for.

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
        owns = [*map(vars, roots), *map(vars, within)]
        tables = [own[name] for own in owns for name in _TABLES]
        tables += [value for own in owns for value in own.values() if isinstance(value, list)]
        tables += [registry.hooks for own in owns if (registry := own.get("_diffusers_hook")) is not None]
        buffers = [own["_buffers"] for own in owns]
        tables += [own for own in buffers if not own]  # moving a module makes others, but none where there were none
        told = [own[name] for own in owns for name in ("config", "processor") if hasattr(own.get(name), "__dict__")]
        told = list({id(thing): thing for thing in told}.values())
        objects = [*zip(within, owns[len(roots) :], strict=True), *zip(told, map(vars, told), strict=True)]
        held["holders"] = [*chain.from_iterable(objects), *tables, *namespaces(coded(pipe))]
        held["values"] = values = gc.get_referents(*held["holders"])
        self._whole = len(values) >= sum(len(own) for _, own in objects)
        weights = [weight for own in owns for weight in own["_parameters"].values() if weight is not None]
        held["weights"] = weights
        held["buffers"] = list(filter(None, buffers))
        held["wide"] = [weight for weight in weights if weight.ndim == 4 and weight.shape[-1] > 1]
        held["rest"] = self._now(roots)

    def still(self) -> bool:
        """Whether all of it is as it was."""
        pipe, held = vars(self._pipe), self._held
        try:
            return (
                self._whole
                and all(ref() is pipe.get(name) for name, ref in self._parts.items())
                and gc.get_referents(*held["holders"]) == held["values"]
                and self._now([ref() for ref in self._roots]) == held["rest"]
            )
        except (KeyError, RuntimeError, TypeError, ValueError):  # something is gone, or is a tensor now
            return False

    def _now(self, roots: list[Any]) -> list[Any]:
        """What is not in that list: what changes without a change to the pipeline, or within what is looked at."""
        pipe, held = vars(self._pipe), self._held
        scheduler = pipe.get("scheduler")
        buffers = chain.from_iterable(map(dict.values, held["buffers"]))
        return [
            type(self._pipe), len(pipe), bool(pipe.get("_all_hooks")),
            type(scheduler), [vars(scheduler)[name] for name in replaced(scheduler)],
            *map(_settings, map(pipe.get, _BESIDE)),
            [b is not None and b.numel() for b in buffers],
            list(map(_DTYPE, held["weights"])),
            [w.is_contiguous() for w in held["wide"]],
            [(type(root), _marked(vars(root))) for root in roots],
        ]  # fmt: skip


def _settings(thing: Any) -> dict[str, Any]:
    """What an object holds, at this moment."""
    return dict(getattr(thing, "__dict__", {}))


def _marked(own: dict[str, Any]) -> dict[str, Any]:
    """What a component holds itself, with what tells its hooks in their place: diffusers puts them there anew after each run."""
    return own | {name: _mark(name, own[name]) for name in _HOOKS if name in own}


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
