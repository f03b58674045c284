"""Count the bytes that are live, their peak per stage, and write down each block's birth and death."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from sdfit.predict.simulation.programs import Taken
from sdfit.predict.simulation.segments import CACHE_GIVEN_BACK


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
        first = len(self.events) if self.events is not None else 0
        self.stage_peaks = {}
        self.enter(stage)
        if self.listener is not None:
            self.listener.begins()
        result = call()
        self.leave()
        inside, self.stage_peaks = self.stage_peaks, before
        for name, peak in inside.items():
            before[name] = max(peak, before.get(name, 0))
        events = self.events[first:] if self.events is not None else []
        span = Span({name: peak - live for name, peak in inside.items()}, events, self.stage)
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
        if self.events is None:
            return
        open_blocks: dict[int, tuple[int, int]] = {}
        for block, size in span.events:
            if size > 0:
                self._blocks += 1
                open_blocks[block] = (self._blocks, size)
                if block in self.workspaces:
                    self.workspaces.add(self._blocks)
                self.events.append((self._blocks, size))
            elif block in open_blocks:
                self.events.append((open_blocks.pop(block)[0], size))
            elif (block, size) == CACHE_GIVEN_BACK:
                self.give_cache_back()
        self.events.extend((block, -size) for block, size in open_blocks.values())

    def play(self, taken: Taken) -> tuple[Span, list[int]]:
        """Count a call that need not run; return it as a span for `repeat`, and the blocks that it leaves."""
        first = self._blocks
        for stage, above in taken.peaks_bytes.items():
            self.enter(stage)
            self._peak_bytes = max(self._peak_bytes, self.live_bytes + above)
        self.enter(taken.last_stage)
        self._peak_bytes += taken.left_bytes
        self.live_bytes += taken.left_bytes
        events = [event if event == CACHE_GIVEN_BACK else (event[0] + first, event[1]) for event in taken.events]
        if self.events is not None:
            self.events.extend(events)
            self._blocks += max((block for block, _ in taken.events), default=0)
            self.workspaces.update(block + first for block in taken.workspaces)
        return Span(taken.peaks_bytes, events, taken.last_stage), [block + first for block in taken.made]


@dataclass(frozen=True, slots=True)
class Span:
    """What a piece of a run took: each stage's peak above what was live before, its events, where it ended."""

    peaks_bytes: dict[str, int]
    events: list[tuple[int, int]]
    last_stage: str


class Listener(Protocol):
    """Told of the spans that a `Meter` measures and counts again (see `sdfit.backends.trace.observe`)."""

    def begins(self) -> None:
        """Hear that a span begins."""

    def ends(self, span: Span) -> None:
        """Hear that the span that began last is over."""

    def again(self, span: Span) -> None:
        """Hear that a span is counted once more, on top of what is live now."""
