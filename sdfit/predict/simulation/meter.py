"""Count the bytes that are live, their peak per stage, and write down each block's birth and death."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
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
    """A meter of a run that is simulated, which writes its events in arrays and notes which of them are calls alike."""

    def __init__(self) -> None:
        super().__init__(keep_events=True)
        self._parts: list[Events] = []
        self._calls: list[Call] = []
        self._kinds: dict[Span, int] = {}
        self._count = 0

    @property
    def count(self) -> int:
        """How many events there were."""
        return self._count + len(self.events or ())

    def order(self, beginning: int) -> Order:
        """All of them; ``beginning`` of them came before the image did."""
        self._put_away()
        kinds = Counter(call.kind for call in self._calls)
        calls = tuple(call for call in self._calls if kinds[call.kind] > 1)
        blocks, changes = (np.concatenate([part[column] for part in self._parts]) for column in (0, 1))
        return Order(blocks, changes, calls, beginning)

    def _write(self, events: Events, span: Span | None = None) -> None:
        self._put_away()
        before = self._count
        self._add(events)
        self._blocks += events.born
        if span is not None and events.blocks.all():  # the cache given back is that of both pools
            self._calls.append(Call(before, self._count, self._kind(events, span)))

    def _kind(self, events: Events, span: Span) -> int:
        """A number for what calls do in the large pool: one that leaves a block there does not do what its repetition does."""
        left = int(events.changes[np.abs(events.changes) > SMALL_BYTES].sum())
        return -1 - len(self._calls) if left else self._kinds.setdefault(span, len(self._kinds))

    def _put_away(self) -> None:
        if self.events:
            self._add(Events.of(self.events))
            self.events.clear()

    def _add(self, events: Events) -> None:
        self._parts.append(events)
        self._count += len(events.blocks)


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
