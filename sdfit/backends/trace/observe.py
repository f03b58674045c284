"""Watch a traced run from the inside: every operation by name, and every tensor that is live.

The tracer says how much; this says what. Hooks on the modules keep the path of the module that is running, so that
an operation has a name that is the same in every run of a variant: its stage, the path, the aten operation, and how
many of that kind came before it in the same call of the outermost module (a *pass*: one run of the UNet, one tile of
the decoder). Denoising steps, slices and tiles that the tracer skips are known by the pass that they repeat.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from sdfit.backends.boundaries import modules_followed
from sdfit.backends.trace.follow import FollowStorages, Operation
from sdfit.backends.trace.playing import Known
from sdfit.backends.trace.tracer import Tracer
from sdfit.equation.weights import rounded
from sdfit.predict.simulation.card import Traced
from sdfit.predict.simulation.meter import Meter, Span
from sdfit.workload import Workload

PIPELINE = "pipeline"
"""The path of what runs in no module; the name of the function follows after a point."""


class OperationName(NamedTuple):
    """What an operation is called in every run of a variant."""

    stage: str
    path: str
    operation: str
    nth: int


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """A block that is live: who made it, and what it is. ``size_bytes`` is rounded as the allocator rounds."""

    path: str
    operation: str
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int


@dataclass(slots=True)
class Pass:
    """One call of an outermost module, or one stretch between two such calls (``path`` is `PIPELINE`).

    ``events`` says of each operation after how many of the run's it is done, where they are kept.
    """

    path: str
    before_bytes: int
    names: list[OperationName] = field(default_factory=list)
    live_bytes: list[int] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Peak:
    """The operation with the most live bytes, and the tensors that were live."""

    name: OperationName
    live_bytes: int
    workspace_bytes: int
    ordinal: int
    tensors: tuple[LiveTensor, ...]


class Observer:
    """Records the operations of one traced run; use `observed`.

    Parameters
    ----------
    tracer, workload
        The run to watch.
    tensors : bool
        Also keep the list of live tensors, and at each new maximum of a key remember it.
    key : callable, optional
        ``key(name)`` groups operations for which a `Peak` each is wanted, None for none. By default one, the whole run.
    """

    def __init__(
        self,
        tracer: Tracer,
        workload: Workload,
        *,
        tensors: bool = False,
        key: Callable[[OperationName], Any] = lambda name: "run",
    ) -> None:
        self.workload, self.workspace = workload, tracer.workspace
        self.passes: list[Pass] = [Pass(PIPELINE, 0)]
        self.peaks: dict[Any, Peak] = {}
        self.pipe, self._key, self._tensors = tracer.pipeline(workload), key, tensors
        self._path: list[str] = []
        self._counts: dict[tuple[str, str, str], int] = {}
        self._spans: dict[int, tuple[Span, Pass]] = {}
        self._live: dict[int, tuple[Any, LiveTensor]] = {}
        self._weights = {t.untyped_storage()._cdata for t in tracer.weights(workload)} if tensors else set()
        self._operations: dict[Any, str] = {}
        self._ordinal = 0
        self.meter: Meter

    def attach(self, meter: Meter) -> Operation:
        """Begin to watch a meter; the ``observe`` argument of `Tracer.run`."""
        self.meter, meter.listener = meter, self
        return self._see

    def enter(self, name: str) -> None:
        """Hear that a module begins."""
        if not self._path:
            self._begin(name)
        self._path.append(name)

    def leave(self) -> None:
        """Hear that it is done."""
        self._path.pop()
        if not self._path:
            self._begin(PIPELINE)

    def _begin(self, path: str) -> None:
        self.passes.append(Pass(path, self.meter.live_bytes))
        self._counts = {}

    def begins(self) -> None:
        """Note what is live when a pass begins that may be repeated."""
        self.passes[-1].before_bytes = self.meter.live_bytes

    def ends(self, span: Span) -> None:
        """Remember which pass a span is."""
        self._spans[id(span)] = (span, self.passes[-1])

    def again(self, span: Span) -> None:
        """Write the operations of an earlier pass down once more, on top of what is live now."""
        first, now = self._spans[id(span)][1], self.passes[-1]
        above = self.meter.live_bytes - first.before_bytes
        now.before_bytes, now.repeated = self.meter.live_bytes, True
        now.names = first.names
        now.live_bytes = [live + above for live in first.live_bytes]

    def played(self, names: list[OperationName], live_bytes: list[int]) -> None:
        """Write down the operations of a call that is not made (see `sdfit.backends.trace.playing`)."""
        now = self.passes[-1]
        now.names, now.live_bytes, now.repeated = names, live_bytes, True

    def _see(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        operation = self._operations.get(func)
        if operation is None:
            operation = self._operations[func] = func._schema.name.removeprefix("aten::")
        path = self._path[-1] if self._path else _caller()
        scratch = self.workspace(self.workload, func, args, out) if self.workspace is not None else 0
        live = self.meter.live_bytes + scratch
        if self._tensors:
            for part in out if isinstance(out, tuple | list) else (out,):
                if isinstance(part, torch.Tensor) and part.is_meta:
                    self._allocated(part, path, operation)
        self._ordinal += 1
        current = self.passes[-1]
        if current.repeated:
            return
        count = (self.meter.stage, path, operation)
        nth = self._counts[count] = self._counts.get(count, -1) + 1
        name = OperationName(*count, nth)
        current.names.append(name)
        current.live_bytes.append(live)
        if self.meter.events is not None:
            current.events.append(len(self.meter.events))
        if self._tensors:
            key = self._key(name)
            if key is not None and (key not in self.peaks or live > self.peaks[key].live_bytes):
                live_now = tuple(tensor for _, tensor in self._live.values())
                self.peaks[key] = Peak(name, live, scratch, self._ordinal - 1, live_now)

    def _allocated(self, tensor: torch.Tensor, path: str, operation: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._weights:
            return
        made = LiveTensor(
            path, operation, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), rounded(storage.nbytes())
        )
        live = self._live
        live[key] = (weakref.ref(storage, lambda _: live.pop(key, None)), made)

    @property
    def stage_peaks(self) -> dict[str, int]:
        """The highest operation of each stage [bytes], which must be what the meter found."""
        peaks: dict[str, int] = {}
        for one in self.passes:
            for name, live in zip(one.names, one.live_bytes, strict=True):
                peaks[name.stage] = max(live, peaks.get(name.stage, 0))
        return peaks


@contextmanager
def watching(
    tracer: Tracer, workload: Workload, known: Known | None = None
) -> Iterator[Callable[..., tuple[Traced, Observer]]]:
    """Watch runs of one pipeline, its modules' hooks placed once.

    Parameters
    ----------
    tracer : Tracer
    workload : Workload
        Whose pipeline it is.
    known : Known, optional
        Plays calls of modules that earlier runs made at another size; None: every run makes its own.

    Yields
    ------
    callable
        Takes a workload, and ``full``, ``tensors`` and ``key``, as `observed` does.
    """
    now: list[Observer] = []

    def watch(
        workload: Workload,
        *,
        full: bool = False,
        tensors: bool = False,
        key: Callable[[OperationName], Any] = lambda name: "run",
    ) -> tuple[Traced, Observer]:
        observer = Observer(tracer, workload, tensors=tensors, key=key)
        now[:] = [observer]
        plays = known if not (full or tensors) else None

        def around(follow: FollowStorages) -> AbstractContextManager[None]:
            return nullcontext() if plays is None else plays.playing(observer, follow)

        kept = plays is not None
        return tracer.run(workload, observe=observer.attach, full=full, keep_events=kept, around=around), observer

    def begins(path: str) -> None:
        now[0].enter(path)

    def ends() -> None:
        now[0].leave()

    with modules_followed(tracer.pipeline(workload), begins, ends):
        yield watch


def observed(
    tracer: Tracer,
    workload: Workload,
    *,
    full: bool = False,
    tensors: bool = False,
    key: Callable[[OperationName], Any] = lambda name: "run",
) -> tuple[Traced, Observer]:
    """Trace a workload and watch it.

    Parameters
    ----------
    full : bool
        Run every step, slice and tile. With ``tensors`` this is needed for the list at the true peak, because what a
        repeated pass makes is not there to be listed.
    tensors, key
        See `Observer`.
    """
    with watching(tracer, workload) as watch:
        return watch(workload, full=full, tensors=tensors, key=key)


def _caller() -> str:
    """Name the function of the pipeline, the VAE or the scheduler that runs, for what runs in no module."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("diffusers.") or module == "sdfit.backends.pipeline":
            function = "call" if frame.f_code.co_name == "__call__" else frame.f_code.co_name
            return f"{PIPELINE}.{function}"
        frame = frame.f_back  # type: ignore[assignment]
    return PIPELINE
