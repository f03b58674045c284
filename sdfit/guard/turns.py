"""Options of a live pipeline switched for one run, while no other thread runs it or reads it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sdfit.predict.pipelines import Reading


class Turns:
    """Who runs one pipeline: any number of threads at once, or one alone, which may switch its options.

    Notes
    -----
    Sees guarded runs only. What a run itself starts (in a callback) belongs to it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._runs = self._waiting = 0
        self._alone = False
        self._mine = threading.local()
        self._reading = threading.Lock()
        self._before: Reading | None = None

    @property
    def depth(self) -> int:
        """How many runs of the pipeline this thread is inside of; more than one where a run's callback starts another."""
        return getattr(self._mine, "depth", 0)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Run beside others, but not beside one that is alone."""
        with self._changed:
            while not self.depth and (self._alone or self._waiting):
                self._changed.wait()
            self._runs += 1
        with self._inside():
            try:
                yield
            finally:
                with self._changed:
                    self._runs -= 1
                    self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Run beside no other: waits for those that run, and lets no new one begin. Not for a thread inside a run."""
        with self._changed:
            self._waiting += 1
            try:
                while self._alone or self._runs:
                    self._changed.wait()
                self._alone = True
            finally:  # an interrupted wait must not hold the others back
                self._waiting -= 1
                self._changed.notify_all()
        with self._inside():
            try:
                yield
            finally:
                with self._changed:
                    self._alone = False
                    self._changed.notify_all()

    @contextmanager
    def _inside(self) -> Iterator[None]:
        self._mine.depth = self.depth + 1
        try:
            yield
        finally:
            self._mine.depth -= 1

    def read(self, look: Callable[[], Reading]) -> Reading:
        """The pipeline as it is; to other threads as it was before options were switched for a run of this one."""
        with self._reading:
            return self._before if self._before is not None and not self.depth else look()

    @contextmanager
    def switched(self, pipe: Any, change: Mapping[str, Any], before: Reading) -> Iterator[None]:
        """Switch options on for the time of a ``with`` block, and back again whatever happens; inside `alone` only."""
        vae = pipe.vae
        flags = {name: getattr(vae, f"use_{name[4:]}", None) for name in ("vae_slicing", "vae_tiling")}
        processors = {part: dict(part.attn_processors) for part in (pipe.unet, vae) if hasattr(part, "attn_processors")}
        try:
            with self._reading:
                self._before = before
                _switch(pipe, change, list(processors))
            yield
        finally:
            with self._reading:
                for part, known in processors.items():
                    part.set_attn_processor(known)
                for name, was in flags.items():
                    if was is not None:
                        setattr(vae, f"use_{name[4:]}", was)
                self._before = None


def _switch(pipe: Any, change: Mapping[str, Any], parts: list[Any]) -> None:
    if change.get("attention") == "sdpa":
        from diffusers.models.attention_processor import AttnProcessor2_0

        for part in parts:
            part.set_attn_processor(AttnProcessor2_0())
    for name in ("vae_slicing", "vae_tiling"):
        if change.get(name):
            getattr(pipe.vae, f"enable_{name[4:]}")()


_every: weakref.WeakKeyDictionary[Any, Turns] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def turns_of(pipe: Any) -> Turns:
    """The turns of a pipeline: one object for all guards of it."""
    with _lock:
        return _every.setdefault(pipe, Turns())
