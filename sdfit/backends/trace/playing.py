"""Calls of modules that an observed run need not make: another size's operations, by name, and their program's amounts.

A module runs the same operations whatever the size (`sdfit.predict.simulation.programs`); which ones, by name, one real
call tells. What is live at each of them then follows for any size from the module's program. Exact, and held against
plain runs by a test; a real call whose live bytes are not its program's is never played, nor is one without a program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from sdfit.backends.trace.follow import FollowStorages
from sdfit.backends.trace.repeats import forwards_replaced
from sdfit.predict.simulation.library import Key, NotSimulated, shipped_library
from sdfit.predict.simulation.modules import IMAGE_CHANNELS, LATENT_CHANNELS, TEXT_CHANNELS
from sdfit.predict.simulation.programs import CHECKER, DECODER, ENCODER, PICTURE, TEXT, UNET, Lengths, Program, Taken
from sdfit.workload import STREAMED, VAE_SCALE, Workload

MADE = {TEXT: 2, UNET: 1, ENCODER: 1, DECODER: 1, CHECKER: 0}
"""How many blocks a call leaves; the tiny VAE's may be what goes in."""


class Observer(Protocol):
    """What is asked of `sdfit.backends.trace.observe.Observer`."""

    pipe: Any
    workload: Workload
    workspace: Any
    passes: list[Any]

    def played(self, names: list[Any], live_bytes: list[int]) -> None:
        """Write down the operations of a call that is not made."""


class _Call(NamedTuple):
    """The operations of a call, and after how many of its events each one is done."""

    names: list[Any]
    events: Any


class Known:
    """What calls of modules are known to do, over the runs of one tracer."""

    def __init__(self) -> None:
        self._calls: dict[Any, _Call | None] = {}

    @contextmanager
    def playing(self, observer: Observer, follow: FollowStorages) -> Iterator[None]:
        """Play the calls of an observed run that are known, and learn the others."""
        pipe, workload = observer.pipe, observer.workload
        kinds = {UNET: pipe.unet, ENCODER: pipe.vae.encoder, DECODER: pipe.vae.decoder, TEXT: pipe.text_encoder}
        kinds |= {CHECKER: pipe.safety_checker} if pipe.safety_checker is not None else {}
        if observer.workspace is not None or workload.offload in STREAMED or workload.execution != "default":
            kinds = {}
        with forwards_replaced((m, self._forward(kind, m.forward, observer, follow)) for kind, m in kinds.items()):
            yield

    def _forward(
        self, kind: str, forward: Callable[..., Any], observer: Observer, follow: FollowStorages
    ) -> Callable[..., Any]:
        workload, meter = observer.workload, follow.meter
        dtype = getattr(torch, workload.dtype)

        def run(*args: Any, **kwargs: Any) -> Any:
            lengths = _lengths(kind, args, kwargs)
            try:
                program = shipped_library().program(kind, workload, lengths)
            except NotSimulated:
                return forward(*args, **kwargs)
            # there are as many operations as slices, and the checker looks at one picture after the other
            one_by_one = kind == CHECKER or bool(program.loops)
            key = Key.of(kind, workload, lengths), lengths.batch if one_by_one else 0
            known = self._calls.get(key)
            if known is None:
                before, first = meter.live_bytes, len(meter.events or ())
                out = forward(*args, **kwargs)
                if key not in self._calls:
                    self._calls[key] = _learnt(observer, program, lengths, before, first)
                return out
            before, taken = meter.live_bytes, program.call(lengths, None, keep_events=True)
            observer.played(known.names, (before + _live(taken)[known.events]).tolist())
            blocks = iter(meter.play(taken)[1])
            made = [follow.made(shape, None, dtype, block=next(blocks)) for shape in _shapes(kind, workload, args)]
            if kind == CHECKER:
                return kwargs["images"], [False] * len(kwargs["images"])
            return made[0] if kind in (ENCODER, DECODER) else tuple(made)

        return run


def _learnt(observer: Observer, program: Program, lengths: Lengths, before: int, first: int) -> _Call | None:
    """The call that was made last; None if its program does not give what was live in it."""
    made = observer.passes[-1]
    events = np.array(made.events, dtype=np.intp) - first
    live = _live(program.call(lengths, None, keep_events=True))
    leaves = len(program.made) == MADE[program.kind]
    right = leaves and len(events) and events.max() < len(live) and (before + live[events] == made.live_bytes).all()
    return _Call(made.names, events) if right else None


def _live(taken: Taken) -> Any:
    """What is live after each number of events, above what was before [bytes]."""
    return np.concatenate([[0], np.cumsum(taken.events.changes)])


def _lengths(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lengths:
    if kind == TEXT:
        return Lengths(args[0].shape[0])
    if kind == CHECKER:
        return Lengths(kwargs["clip_input"].shape[0], PICTURE, PICTURE)
    batch, _, height, width = args[0].shape
    return Lengths(batch, height, width, *((kwargs["encoder_hidden_states"].shape[1],) if kind == UNET else ()))


def _shapes(kind: str, workload: Workload, args: tuple[Any, ...]) -> list[tuple[int, ...]]:
    """Of what a call leaves."""
    if kind == CHECKER:
        return []
    if kind == TEXT:
        batch, tokens = args[0].shape
        return [(batch, tokens, TEXT_CHANNELS), (batch, TEXT_CHANNELS)]
    batch, channels, height, width = args[0].shape
    if kind == ENCODER:
        channels = LATENT_CHANNELS * (2 if workload.vae == "kl" else 1)
        height, width = height // VAE_SCALE, width // VAE_SCALE
    elif kind == DECODER:
        channels, height, width = IMAGE_CHANNELS, height * VAE_SCALE, width * VAE_SCALE
    return [(batch, channels, height, width)]
