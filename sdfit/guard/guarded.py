"""A pipeline that asks before it runs."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from sdfit.errors import InvalidWorkload, SdfitError, listed
from sdfit.guard.memory import LEDGER, Free, device_of, given_memory
from sdfit.guard.reader import Reader
from sdfit.guard.turns import turns_of
from sdfit.predict import process
from sdfit.predict.calls import arguments, defaults_of, workload_of
from sdfit.predict.library import AUTO, load
from sdfit.predict.options import Option, options_that_fit
from sdfit.predict.prediction import Prediction
from sdfit.predict.predictor import Predictor
from sdfit.predict.verdict import bound, level_in_words
from sdfit.units import format_bytes, parse_bytes
from sdfit.workload import Workload


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
    """A run goes on although it may not fit, or was adapted so that it does, or is not what it looks like."""


@dataclass(eq=False)
class _Reservation:
    """What a ``with guard.reserve(...)`` block was promised; one call at a time draws on it."""

    pipe: Any
    amount: float
    in_use: threading.Lock = field(default_factory=threading.Lock)


_reserved: ContextVar[tuple[_Reservation, ...]] = ContextVar("sdfit_reserved", default=())


class Guard:
    """A pipeline that asks before it runs; call it as the pipeline. Made by `sdfit.guard`.

    Notes
    -----
    May be called by several threads at once. A copy, or one from a pickle, guards the pipeline that was copied with it.
    """

    def __init__(
        self,
        pipe: Any,
        model: Predictor | None,
        *,
        on_exceed: str,
        on_unknown: str,
        level: float | None,
        memory: str | float,
        allow: Collection[str],
        ask: Callable[[Any], Free],
    ) -> None:
        self.pipe, self._model = pipe, model
        self.on_exceed, self.on_unknown, self.level, self.memory = on_exceed, on_unknown, level, memory
        self.allow, self._ask, self._reader, self._turns = tuple(allow), ask, Reader(pipe), turns_of(pipe)
        self._of_device: tuple[str, Predictor] | None = None
        self._told: set[str] = set()
        self.__signature__ = _signature(pipe)
        self._defaults = defaults_of(self.__signature__)
        functools.update_wrapper(self, type(pipe).__call__, assigned=("__doc__",), updated=())

    def __reduce__(self) -> tuple[Any, ...]:
        names = ("on_exceed", "on_unknown", "level", "memory", "allow")
        return _again, (self.pipe, self._model, {name: getattr(self, name) for name in names} | {"ask": self._ask})

    @property
    def model(self) -> Predictor:
        """What predicts: the model that was given, or that of the card which the pipeline is on now."""
        if self._model is not None:
            return self._model
        device = device_of(self.pipe)
        if self._of_device is None or self._of_device[0] != str(device):
            name = sys.modules["torch"].cuda.get_device_name(device) if device.type == "cuda" else AUTO
            self._of_device = str(device), load(name)
        return self._of_device[1]

    def workload(self, *args: Any, **kwargs: Any) -> Workload:
        """What a call comes to.

        Raises
        ------
        NotCovered
            If the pipeline or the call is of a kind that sdfit does not know.
        InvalidWorkload
            If diffusers itself fails on the call; with its reason.
        """
        return self._workload(args, kwargs)[0]

    def _workload(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Workload, str]:
        reading = self._turns.read(self._reader.read)
        try:
            found, odd, remark = workload_of(reading, arguments(self.__signature__, args, kwargs, self._defaults))
        except InvalidWorkload as error:
            if "field" not in error.facts:  # what diffusers fails on
                raise
            raise NotCovered(
                f"{error}; run the pipeline itself, or guard it with on_unknown='warn'", unknown=[str(error)]
            ) from None
        unknown = [*reading.unknown, *odd]
        if unknown:
            raise NotCovered(
                f"sdfit does not know {listed(unknown)}: its number would be that of another pipeline; run the pipeline "
                "itself, or guard it with on_unknown='warn'",
                unknown=unknown,
            )
        return found, remark

    def predict(self, *args: Any, **kwargs: Any) -> Prediction:
        """What a call requires, with the bound that is acted on as ``.upper``."""
        return self._predict(args, kwargs, 3)

    def _predict(self, args: tuple[Any, ...], kwargs: dict[str, Any], depth: int) -> Prediction:
        """Predict, and warn of what the caller may not have meant; ``depth`` is how far up the caller's line is."""
        workload, remark = self._workload(args, kwargs)
        for text in (remark, process.remark()):
            if text and text not in self._told:
                self._told.add(text)
                warnings.warn(text, ExceedsWarning, stacklevel=depth)
        return bound(self.model, workload, None, self.level)

    @contextmanager
    def reserve(self, *args: Any, **kwargs: Any) -> Iterator[Prediction]:
        """Promise a call its memory for the time of a ``with`` block, so that no other call is promised the same.

        A guarded call of the same pipeline inside the block, one at a time, draws on what the block was promised. That
        goes by context (`contextvars`): a call handed to `asyncio.to_thread` takes it along, one handed to a bare thread
        does not.

        Raises
        ------
        WillNotFit
            If it is not there beside what others were promised.
        """
        prediction = self._predict(args, kwargs, 4)
        with self._promise(prediction, 0.0) as amount:
            if amount is None:
                raise self._refusal(prediction)
            mine = _Reservation(self.pipe, amount)
            _reserved.set((*_reserved.get(), mine))
            try:
                yield prediction
            finally:
                _reserved.set(tuple(one for one in _reserved.get() if one is not mine))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the pipeline, if it fits; otherwise do what ``on_exceed`` says."""
        with self._draw() as held, self._turns.shared():
            try:
                prediction = self._predict(args, kwargs, 3)
            except NotCovered as error:
                if self.on_unknown == "raise":
                    raise
                warnings.warn(f"not checked: {error}", ExceedsWarning, stacklevel=2)
                return self.pipe(*args, **kwargs)
            with self._promise(prediction, held) as kept:
                if kept is not None:
                    return self.pipe(*args, **kwargs)
            if self.on_exceed == "skip":
                return None
            refusal = self._refusal(prediction, held)
            if self.on_exceed == "warn":
                warnings.warn(str(refusal), ExceedsWarning, stacklevel=2)
                return self.pipe(*args, **kwargs)
            if self.on_exceed == "raise" or self._turns.depth > 1:
                raise refusal
        with self._draw() as held, self._turns.alone():
            return self._adapted(args, kwargs, held)

    def _adapted(self, args: tuple[Any, ...], kwargs: dict[str, Any], held: float) -> Any:
        """Run the pipeline with the cheapest change that suffices; alone, for other runs would run with it too."""
        before = self._reader.read()
        prediction = self._predict(args, kwargs, 4)
        with self._promise(prediction, held) as kept:  # there may be room by now
            if kept is not None:
                return self.pipe(*args, **kwargs)
        refusal = self._refusal(prediction, held)
        option = next((o for o in refusal.options if set(o.change) <= set(self.allow)), None)
        if option is None:
            raise refusal
        with self._promise(option.prediction, held) as kept:
            if kept is None:
                raise refusal
            words = ", ".join(f"{name}={value}" for name, value in option.change.items())
            warnings.warn(f"{refusal.facts['short']}; for this run: {words}", ExceedsWarning, stacklevel=3)
            with self._turns.switched(self.pipe, option.change, before):
                return self.pipe(*args, **kwargs)

    def _account(self) -> object:
        """Who shares the memory that is there: all on a device, or this pipeline alone where it was given an amount."""
        return ("pipeline", id(self.pipe)) if self.memory != "free" else ("device", str(device_of(self.pipe)))

    def _there(self) -> Free:
        return self._ask(self.pipe) if self.memory == "free" else given_memory(self.pipe, parse_bytes(self.memory))

    @contextmanager
    def _promise(self, prediction: Prediction, held: float) -> Iterator[float | None]:
        """Promise a run, until the end of the block, what it needs beside what it holds already [bytes]; None: not there."""
        account = self._account()
        amount = LEDGER.take(account, prediction.upper, self._there, held)
        try:
            yield amount
        finally:
            if amount is not None:
                LEDGER.give_back(account, amount)

    @contextmanager
    def _draw(self) -> Iterator[float]:
        """What a reservation around this call holds for it [bytes]; 0 without one, or while another call draws on it."""
        mine = next((r for r in reversed(_reserved.get()) if r.pipe is self.pipe and r.in_use.acquire(False)), None)
        try:
            yield mine.amount if mine else 0.0
        finally:
            if mine:
                mine.in_use.release()

    def _refusal(self, prediction: Prediction, held: float = 0.0) -> WillNotFit:
        there = self._there()
        left = max(LEDGER.left(self._account(), there) + there.own_bytes + held, 1.0)
        options = options_that_fit(self.model, prediction.workload, memory=left, level=self.level)
        short = (
            f"this run needs up to {format_bytes(prediction.upper)} ({prediction.metric}, {level_in_words(prediction)}) and "
            f"{format_bytes(left)} is there"
        )
        changes = [", ".join(f"{name}={value}" for name, value in option.change.items()) for option in options[:3]]
        would = f"; it would fit with {' or '.join(changes)}" if changes else ""
        return WillNotFit(short + would, prediction=prediction, options=options, available=left, short=short)


def _again(pipe: Any, model: Predictor | None, options: dict[str, Any]) -> Guard:
    """A guard from what it was made with."""
    return Guard(pipe, model, **options)


def _signature(pipe: Any) -> inspect.Signature:
    """The pipeline's own, without ``self``."""
    own = inspect.signature(type(pipe).__call__)
    return own.replace(parameters=list(own.parameters.values())[1:])
