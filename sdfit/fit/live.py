"""What is live at each convolution of a simulated run, whatever its kernel then holds: a run's *skeleton*.

One simulation without kernel workspaces gives the stage peaks of a run under any table of them, by arithmetic alone: a
stage's peak is the highest of what is live without workspaces, and of each convolution's live bytes and its kernel's. So
thousands of tables are tried in the time that simulating one of them for each run takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from sdfit.predict.simulation.card import Card
from sdfit.predict.simulation.library import Library, NotSimulated, shipped_library
from sdfit.predict.simulation.meter import Meter, Span
from sdfit.predict.simulation.programs import WITHOUT_STREAMS, Lengths, Program, Taken, sides
from sdfit.predict.simulation.simulate import Simulator
from sdfit.predict.simulation.streaming import Moves
from sdfit.predict.simulation.workspaces import Architecture, Rule, Workspaces
from sdfit.workload import Workload

Convolution = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""dtype and shapes (B, C, H, W), (K, C, R, S), (B, K, P, Q) of one convolution."""
_Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A run without kernel workspaces.

    Parameters
    ----------
    workload : Workload
    component_bytes : dict
        Component -> its weights [bytes].
    baseline_bytes : int
        The weights and the allocator's remainders around them.
    bare_bytes : dict
        Stage -> its peak without workspaces, with what a cuBLAS handle keeps.
    live_bytes : dict
        Stage -> convolution -> most that was live while it ran, without its workspace [bytes].
    """

    workload: Workload
    component_bytes: dict[str, int]
    baseline_bytes: int
    bare_bytes: dict[str, int]
    live_bytes: dict[str, dict[Convolution, int]]


class _Watched(Program):
    """A program that notes what is live at its convolutions, above what was before its call."""

    noted: dict[int, tuple[Taken, list[tuple[str, _Shapes, int]]]]

    def call(self, lengths: Lengths, convolution: Any, *, moves: Moves | None = None, **options: Any) -> Taken:
        """As `Program.call`, without workspaces."""
        heights, widths = sides(lengths.height, self.kind), sides(lengths.width, self.kind)
        shapes: list[_Shapes] = [
            (layer.image.at(lengths, heights, widths), layer.weight, layer.out.at(lengths, heights, widths))
            for layer in self.layers
        ]
        numbers = iter(range(1, len(shapes) + 1))  # each holds its own number of bytes: so its event says which it is
        marked = super().call(lengths, lambda *_: next(numbers), moves=moves, keep_events=True)
        changes = marked.events.changes
        live = np.cumsum(np.where(marked.events.workspace, 0, changes))
        taken = super().call(lengths, None, moves=moves, **options)
        found = []
        for at, stage in zip(
            np.flatnonzero(marked.events.workspace & (changes > 0)).tolist(), self._stages, strict=True
        ):
            name = stage if moves is not None else WITHOUT_STREAMS.get(stage, stage)
            found.append((name, shapes[int(changes[at]) - 1], int(live[at])))
        self.noted[id(taken)] = taken, found
        return taken

    @cached_property
    def _stages(self) -> list[str]:
        """The stage of each convolution, in their order."""
        order = self._order
        (at,) = np.nonzero(order.born & (order.amounts >= len(self.products)))
        return [self.marks[place][1] for place in (np.searchsorted(order.firsts, at, side="right") - 1).tolist()]


class _Watching(Library):
    """The shipped programs, watched."""

    def __init__(self) -> None:
        known = shipped_library()
        super().__init__(known.programs, known.weights, known.brought, known.found_in)
        self.noted: dict[int, tuple[Taken, list[tuple[str, _Shapes, int]]]] = {}
        for key, program in self.programs.items():
            fields = {name: getattr(program, name) for name in Program.__dataclass_fields__}
            self.programs[key] = watched = _Watched(**fields)
            object.__setattr__(watched, "noted", self.noted)


class _Notes(Meter):
    """A meter that keeps the most that was live at each convolution of each stage."""

    def __init__(self, dtype: str, noted: dict[int, tuple[Taken, list[tuple[str, _Shapes, int]]]]) -> None:
        super().__init__()
        self.dtype, self.noted = dtype, noted
        self.found: dict[str, dict[Convolution, int]] = {}
        self._spans: dict[int, tuple[Span, Taken]] = {}

    def play(self, taken: Taken) -> tuple[Span, list[int]]:
        """As `Meter.play`."""
        self._keep_all(taken)
        span, blocks = super().play(taken)
        self._spans[id(span)] = span, taken
        return span, blocks

    def repeat(self, span: Span) -> None:
        """As `Meter.repeat`."""
        self._keep_all(self._spans[id(span)][1])
        super().repeat(span)

    def _keep_all(self, taken: Taken) -> None:
        for stage, shapes, live in self.noted[id(taken)][1]:
            self.keep(stage, shapes, live + self.live_bytes)

    def keep(self, stage: str, shapes: _Shapes, live: int) -> None:
        """Remember a convolution."""
        known, one = self.found.setdefault(stage, {}), (self.dtype, *shapes)
        known[one] = max(live, known.get(one, 0))


class _Bare(Workspaces):
    """No workspaces; convolutions that are no part of a program are noted."""

    def __init__(self, architecture: Architecture) -> None:
        nothing = Rule((), (), "of no dtype: what has rules is asked")
        super().__init__(Architecture(architecture.name, (), (nothing,), architecture.cublas_bytes))
        self.notes: _Notes | None = None

    def convolution(self, dtype: str, image: tuple[int, ...], weight: tuple[int, ...], out: tuple[int, ...]) -> int:
        """As `Workspaces.convolution`."""
        if self.notes is not None:
            self.notes.keep(self.notes.stage, (tuple(image), tuple(weight), tuple(out)), self.notes.live_bytes)
        return 0


@lru_cache(8)
def _simulator(cublas_bytes: int) -> tuple[Simulator, _Bare, _Watching]:
    bare, library = _Bare(Architecture("bare", (), (), cublas_bytes)), _Watching()
    return Simulator(bare, library=library), bare, library


@lru_cache(4096)
def skeleton(workload: Workload, cublas_bytes: int) -> Skeleton | None:
    """Simulate a run without kernel workspaces; None if it is not simulated."""
    simulator, bare, library = _simulator(cublas_bytes)
    notes = bare.notes = _Notes(workload.dtype, library.noted)
    told: Callable[[Card, int, int], Any] = lambda card, buffers, beginning: card.taken(None, {}, buffers=buffers)  # noqa: E731
    try:
        run = simulator._run(workload, notes, told)
    except NotSimulated:
        return None
    finally:
        library.noted.clear()
        simulator._taken.clear()  # a call that is known already would not be noted
        bare.notes = None
    before = run.weights_bytes + run.unsplit_bytes
    return Skeleton(workload, run.component_bytes, before, dict(run.stage_peaks), notes.found)
