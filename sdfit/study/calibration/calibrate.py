"""What one recorded run tells of a card: every kernel's workspace, its segments, and where trace and card part.

`calibrate` sets a memory snapshot beside the trace of the same workload, allocation by allocation
(`sdfit.study.calibration.align`). What the card allocates beyond the trace belongs to operations: to the one that made the
block before it if the frames say so, or, without frames, if it is freed before the next one makes its own.

What it does not know: memory that a kernel takes without asking PyTorch's allocator. A block of a kernel that has the size
of the operation's own result, and lives as long, cannot be told from it; both are counted, whichever is called the result.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sdfit.equation.stages import STAGES
from sdfit.equation.weights import rounded
from sdfit.errors import SnapshotError
from sdfit.predict.simulation.shapes import Shapes
from sdfit.study.calibration.align import Allocations, Indices, Numbers, align, told
from sdfit.study.calibration.calibration import Calibration, Kernel, Parting, Standing
from sdfit.study.calibration.operations import Ran, TracedRun
from sdfit.study.calibration.snapshot import Event, Held, Snapshot, Stack
from sdfit.study.lab import snapshots
from sdfit.units import MIB

CONVOLUTIONS = ("convolution",)
PRODUCTS = ("addmm", "mm", "bmm", "baddbmm")
FEWEST = 0.5
"""Share of the trace's allocations that must be found; a foreign run shares small ones by chance."""
FEWEST_LARGE = 0.6
"""The same of those of `LARGE_BYTES` and more, which chance gives rarely."""
LARGE_BYTES = 1 * MIB
CUBLAS_BYTES = (8_519_680, 33_554_432)
"""What PyTorch gives a cuBLAS handle unless told otherwise (`getChosenWorkspaceSize`)."""


def calibrate(snapshot: Snapshot, run: TracedRun, *, card: str = "") -> Calibration:
    """Set a snapshot beside the trace of the workload that ran.

    Parameters
    ----------
    snapshot : Snapshot
    run : TracedRun
        Of a trace without workspaces.
    card : str
        Its name, for the text.

    Raises
    ------
    SnapshotError
        If the snapshot is of another workload or another model.
    """
    return _Sides(snapshot, run).calibration(card)


@dataclass
class _Alloc:
    """An allocation on the card: when it comes and goes, by place in the events."""

    at: int
    event: Event
    gone: int
    owner: int = -1
    made: bool = False


class _Sides:
    """Both lists, and what follows from their pairs."""

    def __init__(self, snapshot: Snapshot, run: TracedRun) -> None:
        self.snapshot, self.run = snapshot, run
        self.card = list(_allocations(snapshot.events))
        self.made = [(i, made) for i, ran in enumerate(run.operations) for made in ran.made]
        self.pairs = self._paired()
        self.first, self.last = self._bounds()
        self._own()

    def _paired(self) -> Indices:
        numbers = Numbers()
        ends = [a.at for a in self.card[1:]] + [len(self.snapshot.events)]
        passing = [a.gone < end for a, end in zip(self.card, ends, strict=True)]
        card = numbers.sequence([a.event.size_bytes for a in self.card], [a.event.stack for a in self.card], passing)
        operations = self.run.operations
        trace = numbers.sequence(
            [made.requested_bytes for _, made in self.made],
            [operations[i].stack for i, _ in self.made],
            _passing(self.run.events, {made.block for _, made in self.made}),
        )
        self.frames = bool((card.function >= 0).any())
        pairs = align(trace, card)
        self._check(pairs, trace)
        return pairs

    def _check(self, pairs: Indices, trace: Allocations) -> None:
        found = float(np.mean(pairs >= 0))
        large = trace.size >= LARGE_BYTES
        found_large = float(np.mean(pairs[large] >= 0)) if large.any() else found
        if found < FEWEST or found_large < FEWEST_LARGE:
            w = self.run.workload
            raise SnapshotError(
                f"this is no run of {w.effective_height}x{w.effective_width} with {w.batch_size} image(s), {w.dtype}, "
                f"{w.attention}: of the trace's {len(pairs):,} allocations {found:.0%} are in it, of the large ones "
                f"{found_large:.0%}; say what ran (--height, --width, --batch-size, ...), or it is another model",
                found=found,
            )

    def _bounds(self) -> tuple[int, int]:
        """The card's allocations from the run's first to its last."""
        there = self.pairs[self.pairs >= 0]
        return int(there[0]), int(there[-1])

    def _own(self) -> None:
        """Say to which operation each block of the card belongs, its result or not."""
        before: tuple[int, _Alloc] | None = None
        queue = [(i, int(j)) for (i, _), j in zip(self.made, self.pairs, strict=True) if j >= 0]
        for i, j in queue:
            self.card[j].owner, self.card[j].made = i, True
        self.owners = [i for i, _ in queue]
        self.firsts = [self.card[j].at for _, j in queue]
        for (i, j), (following, k) in zip(queue, [*queue[1:], (queue[-1][0], len(self.card))], strict=True):
            before = (i, self.card[j])
            after = self.card[k] if k < len(self.card) else None
            for alone in self.card[j + 1 : k]:
                alone.owner = self._owner(alone, before, (following, after) if after is not None else None)
            if after is None:
                break

    def _owner(self, alone: _Alloc, before: tuple[int, _Alloc], after: tuple[int, _Alloc] | None) -> int:
        stack = alone.event.stack
        if after is None or (stack and stack == before[1].event.stack):
            return before[0]
        if stack and stack == after[1].event.stack:
            return after[0]
        if told(stack):  # of an operation between the two that makes nothing, or of nobody's
            between = self.run.operations[before[0] + 1 : after[0]]
            names = [frame[:2] for frame in told(stack)]
            found = (i for i, ran in enumerate(between, before[0] + 1) if [f[:2] for f in ran.stack] == names)
            return next(found, -1)
        return before[0] if alone.gone < after[1].at else after[0]

    # -- what follows --

    def calibration(self, card: str) -> Calibration:
        run = self.run
        begins = self.card[self.first].at
        weights, standing, unsplit, cublas = self._standing(begins)
        ends = max(a.at for a in self.card[self.first : self.last + 1])
        live, peaks, reserved = self._live(begins, ends)
        return Calibration(
            run.workload,
            card,
            int((self.pairs >= 0).sum()),
            len(self.pairs),
            self.frames,
            tuple(self._kernels()),
            standing,
            weights,
            unsplit,
            cublas,
            peaks,
            self._partings(),
            reserved,
            dict(sorted(Counter(s.size_bytes for s in self.snapshot.end.segments).items())),
            _placed(self.snapshot),
            sum(e.action == "oom" for e in self.snapshot.events[begins : ends + 1]),
            live,
        )

    def _inside(self) -> list[_Alloc]:
        """The card's own blocks of the run that belong to an operation."""
        found = [a for a in self.card[self.first :] if a.owner >= 0 and not a.made]
        if self.run.workload.offload == "none":
            return found
        weights = set(self.run.weights)  # they come and go during the run
        return [a for a in found if a.event.size_bytes not in weights or self._passes(a)]

    def _kernels(self) -> Iterator[Kernel]:
        blocks: dict[int, list[_Alloc]] = defaultdict(list)
        for a in self._inside():
            if self._passes(a):
                blocks[a.owner].append(a)
        seen = {a.owner for a in self.card if a.made}
        by_shapes: dict[Shapes, list[tuple[int, tuple[int, ...], str]]] = defaultdict(list)
        for i in sorted(seen):
            ran = self.run.operations[i]
            if ran.shapes.operation in (*CONVOLUTIONS, *PRODUCTS) or blocks.get(i):
                by_shapes[ran.shapes].append((*_most(blocks.get(i, [])), ran.path))
        for shapes, times in by_shapes.items():
            held, requested, path = max(times, key=lambda t: t[0])
            yield Kernel(shapes, len(times), held, requested, len({t[:2] for t in times}) == 1, path)

    def _passes(self, block: _Alloc) -> bool:
        """Whether a block goes before the operation after its own makes its result."""
        following = bisect_right(self.owners, block.owner)
        return block.gone < (self.firsts[following] if following < len(self.firsts) else len(self.snapshot.events))

    def _standing(self, begins: int) -> tuple[int, tuple[Standing, ...], int, int]:
        """What is there when the run begins, and what its products leave."""
        counted = {block.address: block for block in self.snapshot.end.held}
        held: dict[int, Held] = {block.address: block for block in self.snapshot.start.held}
        for event in self.snapshot.events[:begins]:
            if event.action == "alloc":
                size = rounded(event.size_bytes)
                held[event.address] = Held(event.address, size, event.size_bytes, event.stack)
            elif event.action == "free_completed":
                held.pop(event.address, None)
        freed = {e.address for e in self.snapshot.events[begins:] if e.action == "free_completed"}
        there = [counted.get(a, b) if a not in freed else b for a, b in held.items()]
        missing = Counter(self.run.weights)
        rest: list[Held] = []
        weights = unsplit = 0
        for block in there:
            unsplit += block.size_bytes - rounded(block.requested_bytes)
            if missing[block.requested_bytes] > 0:
                missing[block.requested_bytes] -= 1
                weights += rounded(block.requested_bytes)
            else:
                rest.append(block)
        for a in self._inside():
            product = self.run.operations[a.owner].shapes.operation in PRODUCTS
            if product and a.gone == len(self.snapshot.events):
                size = a.event.size_bytes
                rest.append(Held(a.event.address, rounded(size), size, a.event.stack))
        return weights, tuple(_grouped(rest)), unsplit, max((s for b in rest if (s := _cublas(b))), default=0)

    def _staying(self) -> dict[int, int]:
        """What the allocator counts of those blocks that are there at the end, by the place of their event."""
        counted = {block.address: block.size_bytes for block in self.snapshot.end.held}
        ends = len(self.snapshot.events)
        return {a.at: counted[a.event.address] for a in self.card if a.gone == ends and a.event.address in counted}

    def _live(self, begins: int, ends: int) -> tuple[list[tuple[int, int]], dict[str, int], int]:
        """Live bytes over the run, its stages' peaks, and the most that was reserved."""
        start = self.snapshot.start
        live, reserved = start.allocated_bytes, start.reserved_bytes
        owners = {a.at: a.owner for a in self.card if a.owner >= 0}
        stays = self._staying()
        gone: dict[int, int] = {}
        points: list[tuple[int, int]] = []
        peaks: dict[str, int] = {}
        most_reserved, now, stage = reserved, 0, ""
        for at, event in enumerate(self.snapshot.events[: ends + 1]):
            if event.action == "alloc":
                gone[event.address] = stays.get(at, rounded(event.size_bytes))
                live += gone[event.address]
            elif event.action == "free_completed":
                live -= gone.pop(event.address, rounded(event.size_bytes))
            elif event.action in ("segment_alloc", "segment_map"):
                reserved += event.size_bytes
            elif event.action in ("segment_free", "segment_unmap"):
                reserved -= event.size_bytes
            if at < begins:
                continue
            now = max(owners.get(at, now), now)
            most_reserved = max(most_reserved, reserved)
            stage = self.run.operations[now].stage
            peaks[stage] = max(peaks.get(stage, 0), live)
            points.append((now, live))
        return points, {s: peaks[s] for s in STAGES if s in peaks}, most_reserved

    def _partings(self) -> tuple[Parting, ...]:
        found: dict[tuple[str, str, str], list[int]] = defaultdict(list)
        for a in self._inside():
            ran = self.run.operations[a.owner]
            kernel = ran.shapes.operation in (*CONVOLUTIONS, *PRODUCTS)
            if not kernel or (not self._passes(a) and a.gone < len(self.snapshot.events)):
                found["card", ran.shapes.operation, _place(ran, a.event.stack)].append(a.event.size_bytes)
        for (i, made), j in zip(self.made, self.pairs, strict=True):
            if j < 0:
                ran = self.run.operations[i]
                found["trace", ran.shapes.operation, _place(ran, ())].append(made.requested_bytes)
        rows = [Parting(*key, len(sizes), max(sizes)) for key, sizes in found.items()]
        return tuple(sorted(rows, key=lambda p: -p.largest_bytes))


def _allocations(events: Sequence[Event]) -> Iterator[_Alloc]:
    """Every allocation, with the place of its end in the events."""
    live: dict[int, _Alloc] = {}
    found = []
    for at, event in enumerate(events):
        if event.action == "alloc":
            live[event.address] = _Alloc(at, event, len(events))
            found.append(live[event.address])
        elif event.action == "free_completed" and event.address in live:
            live.pop(event.address).gone = at
    return iter(found)


def _passing(events: Sequence[tuple[int, int]], blocks: set[int]) -> list[bool]:
    """Whether each block of the trace, in order, is freed before any other is made."""
    last, found = 0, {}
    for block, size in events:
        if size > 0:
            last = block
            found[block] = False
        elif size < 0 and block == last:
            found[block] = True
    return [found[block] for block in found if block in blocks]


def _placed(snapshot: Snapshot) -> tuple[int, int]:
    if any(segment.expandable for segment in snapshot.end.segments):
        return 0, 0
    seeds = [snapshots.Event("start_segment", s.address, s.size_bytes) for s in snapshot.start.segments]
    seeds += [snapshots.Event("start_block", b.address, b.size_bytes) for b in snapshot.start.held]
    events = tuple(snapshots.Event(*event[:3]) for event in snapshot.events)
    recorded = snapshots.Recorded("", "", "", "", False, tuple(seeds), events)
    found = snapshots.replay_recorded(recorded, told=True)
    return found.equal, found.allocations


def _most(blocks: Iterable[_Alloc]) -> tuple[int, tuple[int, ...]]:
    """The most that some blocks hold at once, and which they are then."""
    moments = sorted([(a.at, 1, a) for a in blocks] + [(a.gone, 0, a) for a in blocks], key=lambda m: m[:2])
    live: list[_Alloc] = []
    best: tuple[int, tuple[int, ...]] = (0, ())
    for _, comes, a in moments:
        if comes:
            live.append(a)
            held = sum(rounded(b.event.size_bytes) for b in live)
            if held > best[0]:
                best = held, tuple(b.event.size_bytes for b in live)
        else:
            live.remove(a)
    return best


def _cublas(block: Held) -> int:
    """The size of a block that is cuBLAS's, by its frames or, without any, by its size; 0 if it is not."""
    named = any("cublas" in frame.name.lower() or frame.name == "getNewWorkspace" for frame in block.stack)
    return block.requested_bytes if named or block.requested_bytes in CUBLAS_BYTES else 0


def _grouped(blocks: Iterable[Held]) -> Iterator[Standing]:
    groups: dict[str, list[Held]] = defaultdict(list)
    for block in blocks:
        inner = f"{block.stack[0].filename.rsplit('/', 1)[-1]} {block.stack[0].name}" if block.stack else "no frames"
        groups["cuBLAS" if _cublas(block) else inner].append(block)
    for what, group in sorted(groups.items(), key=lambda g: -sum(b.size_bytes for b in g[1])):
        yield Standing(what, len(group), sum(b.requested_bytes for b in group), sum(b.size_bytes for b in group))


def _place(ran: Ran, stack: Stack) -> str:
    frames = stack or ran.stack
    return f"{frames[0].filename.rsplit('/', 1)[-1]}:{frames[0].line}" if frames else ran.path
