"""Ask before running: a diffusers img2img pipeline, guarded.

    guarded = sdfit.guard(pipe, "t4", on_exceed="skip")
    result = guarded(prompt="a cat", image=picture)      # None where it would not fit

``sdfit.guard(...)`` returns a callable that takes what the pipeline takes. Before each run it reads what the pipeline is and
what the call asks, and refuses what sdfit does not know by name (`NotCovered`). torch is only asked for free memory.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from sdfit.errors import InvalidWorkload, SdfitError, listed
from sdfit.guard.reader import Reader
from sdfit.predict.calls import arguments, workload_of
from sdfit.predict.library import AUTO, load
from sdfit.predict.options import Option, options_that_fit
from sdfit.predict.pipelines import components
from sdfit.predict.prediction import Prediction
from sdfit.predict.predictor import Predictor
from sdfit.predict.verdict import bound
from sdfit.units import format_bytes, parse_bytes
from sdfit.workload import Workload

ON_EXCEED = ("raise", "warn", "skip", "adapt")
ON_UNKNOWN = ("raise", "warn")
ADAPTS = ("attention", "vae_slicing", "vae_tiling")
"""What ``adapt`` may switch: it is switched back, and changes neither size nor precision."""


class WillNotFit(SdfitError):
    """The run's upper bound is above the memory that is free.

    ``prediction`` is what it needs, ``options`` the cheapest changes with which it would fit.
    """

    exit_code = 3

    @property
    def prediction(self) -> Prediction:
        """What the run needs."""
        found: Prediction = self.facts["prediction"]
        return found

    @property
    def options(self) -> list[Option]:
        """What would make it fit, the cheapest first."""
        found: list[Option] = self.facts["options"]
        return found


class NotCovered(SdfitError):
    """The pipeline, or the call, is of a kind that sdfit does not know; ``facts["unknown"]`` lists what."""


class ExceedsWarning(UserWarning):
    """A run goes on although it may not fit, or was adapted so that it does."""


@dataclass(frozen=True, slots=True)
class Free:
    """Memory of a device at one moment [bytes].

    Parameters
    ----------
    spare_bytes : int
        What a run may take beside what is there: free, and what PyTorch's cache holds unused.
    own_bytes : int
        The pipeline's weights that are on the device already.
    """

    spare_bytes: int
    own_bytes: int

    @property
    def total_bytes(self) -> int:
        """What this pipeline may take in all: its own bytes are its own; another model's are not free."""
        return self.spare_bytes + self.own_bytes


def free_memory(pipe: Any) -> Free:
    """Ask the pipeline's device: free + reserved - allocated, and the pipeline's own bytes.

    Raises
    ------
    InvalidWorkload
        If the pipeline is on no CUDA card.
    """
    import torch

    device = torch.device(getattr(pipe, "_execution_device", None) or pipe.device)
    if device.type != "cuda":
        raise InvalidWorkload(f"the pipeline is on '{device}', which has no memory to ask; give memory='15 GiB'")
    free, _ = torch.cuda.mem_get_info(device)
    spare = int(free) + int(torch.cuda.memory_reserved(device)) - int(torch.cuda.memory_allocated(device))
    tensors = {id(t): t for part in components(pipe).values() for t in (*part.parameters(), *part.buffers())}
    own = sum(t.numel() * t.element_size() for t in tensors.values() if t.device.type == "cuda")
    return Free(spare, own)


class _Ledger:
    """What runs in progress were promised, by device; shared by all guards of the process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.promised: dict[str, float] = {}

    def take(self, device: str, amount: float, spare: float) -> bool:
        """Promise an amount if it is there beside what is promised already."""
        with self.lock:
            if amount > spare - self.promised.get(device, 0.0):
                return False
            self.promised[device] = self.promised.get(device, 0.0) + amount
            return True

    def give_back(self, device: str, amount: float) -> None:
        """A run is over."""
        with self.lock:
            self.promised[device] = max(self.promised.get(device, 0.0) - amount, 0.0)


_ledger = _Ledger()


class Guard:
    """A pipeline that asks before it runs; call it as the pipeline. Made by `guard`."""

    def __init__(
        self,
        pipe: Any,
        model: Predictor,
        *,
        on_exceed: str,
        on_unknown: str,
        level: float | None,
        memory: str | float,
        allow: Collection[str],
        ask: Callable[[Any], Free],
    ) -> None:
        self.pipe, self.model = pipe, model
        self.on_exceed, self.on_unknown, self.level, self.memory = on_exceed, on_unknown, level, memory
        self.allow, self._ask, self._reader = tuple(allow), ask, Reader(pipe)
        self.__signature__ = _signature(pipe)
        functools.update_wrapper(self, type(pipe).__call__, assigned=("__doc__",), updated=())

    def workload(self, *args: Any, **kwargs: Any) -> Workload:
        """What a call comes to.

        Raises
        ------
        NotCovered
            If the pipeline or the call is of a kind that sdfit does not know.
        """
        reading = self._reader.read()
        found, odd, _ = workload_of(reading, arguments(self.__signature__, args, kwargs))
        unknown = [*reading.unknown, *odd]
        if unknown:
            raise NotCovered(
                f"sdfit does not know {listed(unknown)}: its number would be that of another pipeline; run the pipeline "
                "itself, or guard it with on_unknown='warn'",
                unknown=unknown,
            )
        return found

    def predict(self, *args: Any, **kwargs: Any) -> Prediction:
        """What a call requires, with the bound that is acted on as ``.upper``."""
        return bound(self.model, self.workload(*args, **kwargs), None, self.level)

    @contextmanager
    def reserve(self, *args: Any, **kwargs: Any) -> Iterator[Prediction]:
        """Promise a call its memory for the time of a ``with`` block, so that no other call is promised the same.

        Raises
        ------
        WillNotFit
            If it is not there beside what others were promised.
        """
        prediction = self.predict(*args, **kwargs)
        with self._promise(prediction) as kept:
            if not kept:
                raise self._refusal(prediction)
            yield prediction

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the pipeline, if it fits; otherwise do what ``on_exceed`` says."""
        try:
            prediction = self.predict(*args, **kwargs)
        except NotCovered as error:
            if self.on_unknown == "raise":
                raise
            warnings.warn(f"not checked: {error}", ExceedsWarning, stacklevel=2)
            return self.pipe(*args, **kwargs)
        with self._promise(prediction) as kept:
            if kept:
                return self.pipe(*args, **kwargs)
        if self.on_exceed == "skip":
            return None
        refusal = self._refusal(prediction)
        if self.on_exceed == "warn":
            warnings.warn(str(refusal), ExceedsWarning, stacklevel=2)
            return self.pipe(*args, **kwargs)
        if self.on_exceed == "adapt":
            option = next((o for o in refusal.options if set(o.change) <= set(self.allow)), None)
            if option is not None:
                with self._promise(option.prediction) as kept:
                    if kept:
                        words = ", ".join(f"{name}={value}" for name, value in option.change.items())
                        warnings.warn(f"{refusal.facts['short']}; for this run: {words}", ExceedsWarning, stacklevel=2)
                        with switched(self.pipe, option.change):
                            return self.pipe(*args, **kwargs)
        raise refusal

    def _there(self) -> Free:
        if self.memory == "free":
            return self._ask(self.pipe)
        return Free(parse_bytes(self.memory), 0)

    @contextmanager
    def _promise(self, prediction: Prediction) -> Iterator[bool]:
        """Whether the memory is there; it is promised until the end of the block."""
        there, device = self._there(), str(getattr(self.pipe, "device", "cuda"))
        amount = max(prediction.upper - there.own_bytes, 0.0)
        kept = _ledger.take(device, amount, there.spare_bytes)
        try:
            yield kept
        finally:
            if kept:
                _ledger.give_back(device, amount)

    def _refusal(self, prediction: Prediction) -> WillNotFit:
        device = str(getattr(self.pipe, "device", "cuda"))
        left = max(self._there().total_bytes - _ledger.promised.get(device, 0.0), 1.0)
        options = options_that_fit(self.model, prediction.workload, memory=left, level=self.level)
        short = (
            f"this run needs up to {format_bytes(prediction.upper)} ({prediction.metric}, level {prediction.level:.3g}) and "
            f"{format_bytes(left)} is there"
        )
        changes = [", ".join(f"{name}={value}" for name, value in option.change.items()) for option in options[:3]]
        would = f"; it would fit with {' or '.join(changes)}" if changes else ""
        return WillNotFit(short + would, prediction=prediction, options=options, available=left, short=short)


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
        A card as `sdfit.load` takes it; None: the card in this machine.
    on_exceed : {'raise', 'warn', 'skip', 'adapt'}
        What to do with a run whose upper bound is above the memory that is there. ``raise``: `WillNotFit`. ``warn``: run it
        with a warning. ``skip``: return None. ``adapt``: switch on the cheapest sufficient change of ``allow`` for this
        run, with a warning; raise where none suffices.
    on_unknown : {'raise', 'warn'}
        What to do with a pipeline or call that sdfit does not know: `NotCovered`, or a warning, and run it unchecked.
    level : float, optional
        Of the bound; None: 0.99, or the highest that the model supports.
    memory : str or float
        ``"free"``: what is free on the pipeline's device, its own weights included; or an amount.
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
    another's runs (`Guard.reserve`); other processes are seen only once they hold it.
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
    model = gpu if isinstance(gpu, Predictor) else load(AUTO if gpu is None else gpu)
    return Guard(
        pipe, model, on_exceed=on_exceed, on_unknown=on_unknown, level=level, memory=memory, allow=allow, ask=ask
    )


@contextmanager
def switched(pipe: Any, change: Mapping[str, Any]) -> Iterator[None]:
    """Switch options of a live pipeline on for the time of a ``with`` block, and back again whatever happens."""
    vae, before = pipe.vae, {name: getattr(pipe.vae, f"use_{name[4:]}", None) for name in ("vae_slicing", "vae_tiling")}
    processors = {part: dict(part.attn_processors) for part in (pipe.unet, vae) if hasattr(part, "attn_processors")}
    try:
        if change.get("attention") == "sdpa":
            from diffusers.models.attention_processor import AttnProcessor2_0

            for part in processors:
                part.set_attn_processor(AttnProcessor2_0())
        for name in ("vae_slicing", "vae_tiling"):
            if change.get(name):
                getattr(vae, f"enable_{name[4:]}")()
        yield
    finally:
        for part, known in processors.items():
            part.set_attn_processor(known)
        for name, was in before.items():
            if was is not None:
                setattr(vae, f"use_{name[4:]}", was)


def _signature(pipe: Any) -> inspect.Signature:
    """The pipeline's own, without ``self``."""
    own = inspect.signature(type(pipe).__call__)
    return own.replace(parameters=list(own.parameters.values())[1:])


class _Callable(ModuleType):
    """A module that is called as its function: ``sdfit.guard(pipe)`` beside ``sdfit.guard.WillNotFit``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Guard:
        return guard(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
