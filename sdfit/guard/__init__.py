"""Ask before running: a diffusers img2img pipeline, guarded.

    guarded = sdfit.guard(pipe, "t4", on_exceed="skip")
    result = guarded(prompt="a cat", image=picture)      # None where it would not fit

``sdfit.guard(...)`` returns a callable that takes what the pipeline takes. Before each run it reads what the pipeline is and
what the call asks, and refuses what sdfit does not know by name (`NotCovered`). torch is only asked for free memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any

from sdfit.errors import InvalidWorkload, listed
from sdfit.guard.guarded import ExceedsWarning, Guard, NotCovered, WillNotFit
from sdfit.guard.memory import Free, free_memory
from sdfit.predict.library import load
from sdfit.predict.predictor import Predictor
from sdfit.units import parse_bytes

__all__ = ["ExceedsWarning", "Free", "Guard", "NotCovered", "WillNotFit", "free_memory", "guard"]

ON_EXCEED = ("raise", "warn", "skip", "adapt")
ON_UNKNOWN = ("raise", "warn")
ADAPTS = ("attention", "vae_slicing", "vae_tiling")
"""What ``adapt`` may switch: it is switched back, and changes neither size nor precision."""


def guard(
    pipe: Any,
    gpu: str | Predictor | None = None,
    *,
    on_exceed: str = "raise",
    on_unknown: str = "raise",
    level: float | None = None,
    memory: str | float = "free",
    allow: Collection[str] = ADAPTS,
    ask: Callable[[Any], Free] = free_memory,
) -> Guard:
    """Guard a pipeline: what it returns is called as the pipeline is, and asks before it runs.

    Parameters
    ----------
    pipe : StableDiffusionImg2ImgPipeline
        Looked at before each run, never changed but by ``adapt``.
    gpu : str or Predictor, optional
        A card as `sdfit.load` takes it; None: the card that the pipeline is on, looked up at its first call.
    on_exceed : {'raise', 'warn', 'skip', 'adapt'}
        What to do with a run whose upper bound is above the memory that is there. ``raise``: `WillNotFit`. ``warn``: run it
        with a warning. ``skip``: return None. ``adapt``: switch on the cheapest sufficient change of ``allow`` for this
        run, with a warning; raise where none suffices.
    on_unknown : {'raise', 'warn'}
        What to do with a pipeline or call that sdfit does not know: `NotCovered`, or a warning, and run it unchecked.
    level : float, optional
        Of the bound; None: 0.99, or the highest that the model supports.
    memory : str or float
        ``"free"``: what is free on the pipeline's device, its own weights included; or an amount that this pipeline may
        take in all, its weights included, whatever others take.
    allow : collection of str
        What ``adapt`` may change, of attention, vae_slicing and vae_tiling. Size and precision it never changes: the first
        is the caller's picture, and weights that were rounded do not come back.
    ask : callable
        ``ask(pipe) -> Free``, for devices that `free_memory` cannot ask.

    Returns
    -------
    Guard

    Notes
    -----
    Acts on the bound, so a run that may fit counts as one that does not. Guards of one process promise memory to one
    another's runs (`Guard.reserve`); other processes, and code of this one that no guard sees, only count once they hold it.
    What was changed on a pipeline since its last run shows, but for what `sdfit.guard.reader` names: other code in modules of a
    library in which no part of the pipeline is written.
    A run that was adapted runs alone: it waits for the pipeline's other guarded runs, and they wait for it.
    """
    for name, value, known in (("on_exceed", on_exceed, ON_EXCEED), ("on_unknown", on_unknown, ON_UNKNOWN)):
        if value not in known:
            raise InvalidWorkload(f"{name} is {value!r}; it must be one of {listed(known)}", given=value)
    if set(allow) - set(ADAPTS):
        raise InvalidWorkload(
            f"allow holds {listed(set(allow) - set(ADAPTS))}; it may hold {listed(ADAPTS)}", given=allow
        )
    if memory != "free":
        parse_bytes(memory)
    model = load(gpu) if isinstance(gpu, str) else gpu
    return Guard(
        pipe, model, on_exceed=on_exceed, on_unknown=on_unknown, level=level, memory=memory, allow=allow, ask=ask
    )


class _Callable(ModuleType):
    """A module that is called as its function: ``sdfit.guard(pipe)`` beside ``sdfit.guard.WillNotFit``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Guard:
        return guard(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
