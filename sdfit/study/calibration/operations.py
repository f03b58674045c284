"""A traced run as the list of its operations: what each allocates, how long that lives, and which code asked for it.

The same pipeline runs on meta tensors as on the card, so its operations come in the same order and from the same lines of
diffusers. `operations_of` writes them down in the form that a memory snapshot has: requested bytes, order, Python frames.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, NamedTuple

import torch

from sdfit.backends.boundaries import modules_followed
from sdfit.backends.trace.follow import Operation
from sdfit.backends.trace.tracer import Tracer
from sdfit.equation.stages import COMPONENTS
from sdfit.predict.simulation.card import Traced
from sdfit.predict.simulation.meter import Meter
from sdfit.predict.simulation.shapes import Shapes, shapes_of
from sdfit.study.calibration.snapshot import Frame, Stack
from sdfit.workload import Workload

PACKAGES = ("diffusers/", "transformers/")
"""Whose frames tell one operation from another; those of PyTorch and of who called the pipeline vary."""


class Made(NamedTuple):
    """A block that an operation made. ``block`` as in the events of the trace."""

    block: int
    requested_bytes: int


@dataclass(frozen=True, slots=True)
class Ran:
    """One operation of a traced run."""

    stage: str
    path: str
    shapes: Shapes
    made: tuple[Made, ...]
    stack: Stack


@dataclass(slots=True)
class TracedRun:
    """The operations of a run in order, and its events.

    Attributes
    ----------
    workload : Workload
    operations : list of Ran
    events : list of (int, int)
        As `sdfit.backends.trace.follow.Meter.events`; the weights first.
    weights : tuple of int
        Requested bytes of every weight.
    traced : Traced
    """

    workload: Workload
    operations: list[Ran]
    events: list[tuple[int, int]]
    weights: tuple[int, ...]
    traced: Traced


@dataclass
class _Writer:
    """Told of every operation by the tracer; ``seen`` are the storages that are there, at first the weights."""

    seen: dict[int, Any]
    operations: list[Ran] = field(default_factory=list)
    path: list[str] = field(default_factory=list)
    places: dict[CodeType, str | None] = field(default_factory=dict)
    meter: Meter | None = None
    at: int = 0

    def attach(self, meter: Meter) -> Operation:
        self.meter = meter
        return self.see

    def see(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        assert self.meter is not None and self.meter.events is not None
        events = self.meter.events
        blocks = [block for block, size in events[self.at :] if size > 0]
        self.at = len(events)
        fresh = []
        for part in out if isinstance(out, tuple | list) else (out,):
            if isinstance(part, torch.Tensor) and part.is_meta:
                storage = part.untyped_storage()
                key = storage._cdata
                if key not in self.seen:
                    self.seen[key] = weakref.ref(storage, self._gone(key))
                    if storage.nbytes():
                        fresh.append(storage.nbytes())
        made = tuple(Made(*pair) for pair in zip(blocks[len(blocks) - len(fresh) :], fresh, strict=True))
        self.operations.append(
            Ran(
                self.meter.stage,
                self.path[-1] if self.path else "pipeline",
                shapes_of(func, args, out),
                made,
                self.stack(),
            )
        )

    def _gone(self, key: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            self.seen.pop(key, None)

        return gone

    def stack(self) -> Stack:
        found = []
        frame = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if code not in self.places:
                self.places[code] = place(code.co_filename)
            where = self.places[code]
            if where is not None:
                found.append(Frame(code.co_name, where, frame.f_lineno))
            frame = frame.f_back  # type: ignore[assignment]
        return tuple(found)


def place(filename: str) -> str | None:
    """The part of a path that is the same on every machine; None outside of `PACKAGES`.

    Examples
    --------
    >>> place("/usr/lib/python3/dist-packages/diffusers/models/resnet.py")
    'diffusers/models/resnet.py'
    >>> place("/home/me/run.py")
    """
    for package in PACKAGES:
        at = filename.rfind(f"/{package}")
        if at >= 0:
            return filename[at + 1 :]
        if filename.startswith(package):
            return filename
    return None


def operations_of(tracer: Tracer, workload: Workload) -> TracedRun:
    """Trace a workload, every step, slice and tile of it, and write its operations down.

    Parameters
    ----------
    tracer : Tracer
        Best one without workspaces: what kernels hold is what a snapshot is asked for.
    workload : Workload
    """
    pipe = tracer.pipeline(workload)
    parts = [part for name in COMPONENTS if (part := getattr(pipe, name)) is not None]
    tensors = [t for part in parts for t in (*part.parameters(), *part.buffers())]
    writer = _Writer({t.untyped_storage()._cdata: t for t in tensors})
    with modules_followed(pipe, writer.path.append, writer.path.pop):
        traced = tracer.run(workload, keep_events=True, observe=writer.attach, full=True)
    assert traced.events is not None
    weights = tuple(t.untyped_storage().nbytes() for t in tensors)
    return TracedRun(workload, writer.operations, traced.events, weights, traced)
