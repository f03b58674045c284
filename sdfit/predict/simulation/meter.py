"""Count the bytes that are live, their peak per stage, and write down each block's birth and death."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np

from sdfit.predict.simulation.order import Call, Events, Order
from sdfit.predict.simulation.programs import Taken
from sdfit.predict.simulation.segments import CACHE_GIVEN_BACK, SMALL_BYTES


class Meter:
    """A running total of live bytes, its peak per stage, and, if asked for, the list of events.

    ``events`` holds ``(block, size_bytes)``: a block allocated with its size, or freed with the negative of it. A
    workspace is allocated and freed at once; ``workspaces`` holds their blocks.
    """

    def __init__(self, *, keep_events: bool = False) -> None:
        self.live_bytes = 0
        self.stage = ""
        self.stage_peaks: dict[str, int] = {}
        self.events: list[tuple[int, int]] | None = [] if keep_events else None
        self.workspaces: set[int] = set()
        self.listener: Listener | None = None
        self._peak_bytes = 0
        self._blocks = 0

    def enter(self, stage: str) -> None:
        """Close the current stage and begin another with the bytes that are live now."""
        self.leave()
        self.stage, self._peak_bytes = stage, self.live_bytes

    def leave(self) -> None:
        """Write the current stage's peak down."""
        if self.stage:
            self.stage_peaks[self.stage] = max(self._peak_bytes, self.stage_peaks.get(self.stage, 0))

    def allocate(self, size_bytes: int) -> int:
        """Count a block, already rounded, and return its number."""
        self._blocks += 1
        self.live_bytes += size_bytes
        self._peak_bytes = max(self._peak_bytes, self.live_bytes)
        if self.events is not None:
            self.events.append((self._blocks, size_bytes))
        return self._blocks

    def allocate_all(self, sizes_bytes: Sequence[int]) -> range:
        """Count blocks, already rounded, one after the other, and return their numbers."""
        numbers = range(self._blocks + 1, self._blocks + 1 + len(sizes_bytes))
        self.live_bytes += sum(sizes_bytes)
        self._peak_bytes = max(self._peak_bytes, self.live_bytes)
        if self.events is not None:
            sizes = _array(tuple(sizes_bytes))
            self._write(Events(np.arange(numbers.start, numbers.stop), sizes, np.zeros(len(sizes), dtype=bool)))
        else:
            self._blocks += len(sizes_bytes)
        return numbers

    @property
    def count(self) -> int:
        """How many events there were, where they are kept."""
        return len(self.events or ())

    @property
    def blocks(self) -> int:
        """How many blocks were allocated so far; the last one has this number."""
        return self._blocks

    def free(self, block: int, size_bytes: int) -> None:
        """Take a block off again."""
        self.live_bytes -= size_bytes
        if self.events is not None:
            self.events.append((block, -size_bytes))

    def give_cache_back(self) -> None:
        """Note that the program empties the allocator's cache here; no bytes are live or freed by it."""
        if self.events is not None:
            self.events.append(CACHE_GIVEN_BACK)

    def passing(self, size_bytes: int) -> None:
        """Count bytes that a kernel holds only while it runs."""
        block = self.allocate(size_bytes)
        self.free(block, size_bytes)
        if self.events is not None:
            self.workspaces.add(block)

    def measure(self, call: Callable[[], Any]) -> tuple[Any, Span]:
        """Run ``call``; return its result and what it took, so that `repeat` can count it again without running it."""
        self.leave()
        before, live, stage = self.stage_peaks, self.live_bytes, self.stage
        first, blocks = len(self.events) if self.events is not None else 0, self._blocks
        self.stage_peaks = {}
        self.enter(stage)
        if self.listener is not None:
            self.listener.begins()
        result = call()
        self.leave()
        inside, self.stage_peaks = self.stage_peaks, before
        for name, peak in inside.items():
            before[name] = max(peak, before.get(name, 0))
        events = Events.of(self.events[first:] if self.events is not None else [])
        above = {name: peak - live for name, peak in inside.items()}
        kernels = np.isin(events.blocks, list(self.workspaces)) if self.workspaces else events.workspace
        span = Span(above, events._replace(workspace=kernels), self.stage, blocks)
        if self.listener is not None:
            self.listener.ends(span)
        return result, span

    def repeat(self, span: Span) -> None:
        """Count a span once more on top of what is live now; nothing of it stays."""
        if self.listener is not None:
            self.listener.again(span)
        for stage, above in span.peaks_bytes.items():
            self.enter(stage)
            self._peak_bytes = max(self._peak_bytes, self.live_bytes + above)
        self.enter(span.last_stage)
        if self.events is not None:
            self._write(span.again.after(self._blocks - span.before), span)

    def play(self, taken: Taken) -> tuple[Span, list[int]]:
        """Count a call that need not run; return it as a span for `repeat`, and the blocks that it leaves."""
        first = self._blocks
        for stage, above in taken.peaks_bytes.items():
            self.enter(stage)
            self._peak_bytes = max(self._peak_bytes, self.live_bytes + above)
        self.enter(taken.last_stage)
        self._peak_bytes += taken.left_bytes
        self.live_bytes += taken.left_bytes
        span = Span(taken.peaks_bytes, taken.events.after(first), taken.last_stage, first)
        if self.events is not None:
            self._write(span.events, span)
        return span, [block + first for block in taken.made]

    def _write(self, events: Events, span: Span | None = None) -> None:
        """Write events down whose blocks are numbered on from the last one; those of a span, if they are."""
        assert self.events is not None
        self.events += events.listed()
        self.workspaces.update(events.blocks[events.workspace].tolist())
        self._blocks += events.born


@dataclass(frozen=True, eq=False)
class Span:
    """What a piece of a run took: each stage's peak above what was live before, its events, where it ended.

    ``before`` is how many blocks there were before it.
    """

    peaks_bytes: dict[str, int]
    events: Events
    last_stage: str
    before: int

    @cached_property
    def again(self) -> Events:
        """Its events as they are when it is counted again."""
        return self.events.repeated(self.before)


class Writer(Meter):
    """A meter of a run that is simulated, which counts nothing: it writes events in arrays and notes which of them are calls alike."""

    def __init__(self) -> None:
        super().__init__(keep_events=True)
        self._single: list[int] = []
        """A block, its change, the next block: of events that are not in an array yet."""
        self._parts: list[tuple[Any, Any]] = []
        self._calls: list[tuple[Span, int, Events]] = []
        self._count = 0

    def enter(self, stage: str) -> None:
        """Begin another stage."""
        self.stage = stage

    def leave(self) -> None:
        """No stage has a peak here."""

    def allocate(self, size_bytes: int) -> int:
        """Write a block down, already rounded, and return its number."""
        self._blocks += 1
        self._single += (self._blocks, size_bytes)
        return self._blocks

    def free(self, block: int, size_bytes: int) -> None:
        """Write down that it goes."""
        self._single += (block, -size_bytes)

    def give_cache_back(self) -> None:
        """Note that the program empties the allocator's cache here."""
        self._single += CACHE_GIVEN_BACK

    def passing(self, size_bytes: int) -> None:
        """Write down what a kernel holds only while it runs."""
        self.free(self.allocate(size_bytes), size_bytes)

    @property
    def count(self) -> int:
        """How many events there were."""
        return self._count + len(self._single) // 2

    def order(self, beginning: int) -> Order:
        """All of them; ``beginning`` of them came before the image did."""
        self._put_away()
        blocks, changes = (np.concatenate([part[column] for part in self._parts]) for column in (0, 1))
        return Order(blocks, changes, tuple(self._alike()), beginning)

    def _write(self, events: Events, span: Span | None = None) -> None:
        self._put_away()
        if span is not None:
            self._calls.append((span, self._count, events))
        self._add(events.blocks, events.changes)
        self._blocks += events.born

    def _alike(self) -> Iterator[Call]:
        """Calls that do the same in the large pool, of which there are several, in order.

        One that leaves a block there does not do what its repetition does, and the cache given back is that of both pools.
        """
        often = Counter(span for span, _, _ in self._calls)
        calls = [
            (span, first, first + len(events.blocks))
            for span, first, events in self._calls
            if often[span] > 1
            and events.blocks.all()
            and not events.changes[np.abs(events.changes) > SMALL_BYTES].sum()
        ]
        often = Counter(span for span, _, _ in calls)
        kinds = {span: kind for kind, span in enumerate(often)}
        return (Call(first, end, kinds[span]) for span, first, end in calls if often[span] > 1)

    def _put_away(self) -> None:
        if self._single:
            pairs = np.array(self._single, dtype=np.int64).reshape(-1, 2)
            self._add(pairs[:, 0], pairs[:, 1])
            self._single.clear()

    def _add(self, blocks: Any, changes: Any) -> None:
        self._parts.append((blocks, changes))
        self._count += len(blocks)


@lru_cache(maxsize=16)
def _array(sizes: tuple[int, ...]) -> Any:
    """Of a component's weights, which every run has."""
    return np.array(sizes, dtype=np.int64)


class Listener(Protocol):
    """Told of the spans that a `Meter` measures and counts again (see `sdfit.backends.trace.observe`)."""

    def begins(self) -> None:
        """Hear that a span begins."""

    def ends(self, span: Span) -> None:
        """Hear that the span that began last is over."""

    def again(self, span: Span) -> None:
        """Hear that a span is counted once more, on top of what is live now."""
