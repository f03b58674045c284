"""A card that writes its memory down: snapshots in PyTorch's format, made from traced runs, with kernels of one's choice.

What a card has and a trace has not is put in: workspaces, cuBLAS's own, blocks that kernels make beside their results,
segments and addresses. No card is like this; what comes out again must be what was put in.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sdfit.equation.weights import rounded
from sdfit.predict.simulation.segments import CACHE_GIVEN_BACK, Block, CachingAllocator
from sdfit.study.calibration.operations import Ran, TracedRun

SITE = "/opt/conda/lib/python3.11/site-packages/"
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
Holds = Callable[[Ran], Sequence[int]]


def nothing(ran: Ran) -> Sequence[int]:
    """A kernel that holds nothing."""
    return ()


class Recorder:
    """The caching allocator with PyTorch's recording on."""

    def __init__(self) -> None:
        self.allocator = CachingAllocator()
        self.live: dict[int, tuple[Block, int, list[Any]]] = {}
        self.segments: dict[int, int] = {}
        self.events: list[dict[str, Any]] = []
        self.on = True
        self.time = 1_700_000_000_000_000
        self._count = 0

    def _note(self, action: str, address: int, size: int, frames: list[Any] | None = None) -> None:
        self.time += 3
        if self.on:
            entry = {"action": action, "addr": address, "size": size, "stream": 0, "time_us": self.time}
            self.events.append(entry | {"frames": frames or [], "compile_context": "N/A", "user_metadata": ""})

    def alloc(self, size: int, frames: list[Any] | None = None) -> int:
        """Allocate; returns a number for `free`."""
        before = self.allocator.reserved_bytes
        block = self.allocator.malloc(size)
        assert block is not None
        if self.allocator.reserved_bytes > before:
            grown = self.allocator.reserved_bytes - before
            self.segments[block.address] = grown
            self._note("segment_alloc", block.address, grown, frames)
        self._note("alloc", block.address, size, frames)
        self._count += 1
        self.live[self._count] = (block, size, frames or [])
        return self._count

    def free(self, number: int) -> None:
        """Free; at once, as on one stream."""
        block, size, _ = self.live.pop(number)
        for action in ("free_requested", "free_completed"):
            self._note(action, block.address, size)
        self.allocator.free(block)

    def empty_cache(self) -> None:
        """Give cached segments back."""
        live = sorted(block.address for block, _, _ in self.live.values())
        for address, size in sorted(self.segments.items()):
            if not any(address <= at < address + size for at in live):
                self._note("segment_free", address, size)
                del self.segments[address]
        self.allocator.release_cached()
        assert self.allocator.reserved_bytes == sum(self.segments.values())

    def snapshot(self, **more: Any) -> dict[str, Any]:
        """What `torch.cuda.memory._snapshot` returns."""
        segments = []
        for start, size in sorted(self.segments.items()):
            inside = sorted(
                (b.address, b.size_bytes, r, f) for b, r, f in self.live.values() if start <= b.address < start + size
            )
            blocks, at = [], start
            for address, taken, requested, frames in [*inside, (start + size, 0, 0, [])]:
                if address > at:
                    blocks.append(
                        {"address": at, "size": address - at, "requested_size": 0, "state": "inactive", "frames": []}
                    )
                if taken:
                    blocks.append({"address": address, "size": taken, "requested_size": requested,
                                   "state": "active_allocated", "frames": frames})  # fmt: skip
                at = address + taken
            used = sum(b["size"] for b in blocks if b["state"] != "inactive")
            segments.append({"device": 0, "address": start, "total_size": size, "allocated_size": used, "active_size": used,
                             "requested_size": used, "stream": 0, "segment_type": "small" if size == 2 << 20 else "large",
                             "segment_pool_id": (0, 0), "is_expandable": False, "frames": [], "blocks": blocks})  # fmt: skip
        settings = {"PYTORCH_CUDA_ALLOC_CONF": "", "max_split_size": -1, "garbage_collection_threshold": 0.0}
        return {"segments": segments, "device_traces": [self.events], "allocator_settings": settings,
                "external_annotations": [], **more}  # fmt: skip


def run_on(
    recorder: Recorder,
    run: TracedRun,
    *,
    holds: Holds = nothing,
    before: Holds = nothing,
    cublas_bytes: int = 0,
    frames: bool = True,
) -> None:
    """Let a traced run happen on the card.

    Parameters
    ----------
    holds : callable
        ``holds(ran)``: blocks that an operation's kernel makes after its result, and frees before the next operation.
    before : callable
        Blocks that it makes before its result, and frees after it.
    cublas_bytes : int
        What the first matrix product makes and nobody frees.
    """
    of_block = {made.block: (ran, made) for ran in run.operations for made in ran.made}
    last = {ran.made[-1].block: ran for ran in run.operations if ran.made}
    first = {ran.made[0].block: ran for ran in run.operations if ran.made}
    numbers: dict[int, int] = {}
    passing: list[int] = []
    known: dict[Any, list[Any]] = {}
    weights = iter(run.weights)
    for block, size in run.events:
        if (block, size) == CACHE_GIVEN_BACK:
            recorder.empty_cache()
            continue
        if size < 0:
            recorder.free(numbers.pop(block))
            continue
        if block not in of_block:
            requested = next(weights) if run.workload.offload == "none" else size
            assert rounded(requested) == size
            numbers[block] = recorder.alloc(
                requested, stack_of([("convert", "torch/nn/modules/module.py", 1343)], frames, known)
            )
            continue
        ran, made = of_block[block]
        stack = stack_of([*_inner(ran), *ran.stack], frames, known)
        if block in first:
            passing += [recorder.alloc(s, stack) for s in before(ran)]
        numbers[block] = recorder.alloc(made.requested_bytes, stack)
        if block in last:
            if cublas_bytes and ran.shapes.operation in PRODUCTS:
                recorder.alloc(cublas_bytes, stack)
                cublas_bytes = 0
            passing += [recorder.alloc(s, stack) for s in holds(ran)]
            while passing:
                recorder.free(passing.pop())
    for number in [
        n for b, n in numbers.items() if b in of_block
    ]:  # what outlives the run in the trace, as a result does
        recorder.free(number)


def _inner(ran: Ran) -> list[tuple[str, str, int]]:
    inner = {"convolution": ("_conv_forward", "torch/nn/modules/conv.py", 553), "addmm": ("forward", "torch/nn/modules/linear.py", 125),
             "mm": ("forward", "torch/nn/modules/linear.py", 125)}  # fmt: skip
    return [inner[ran.shapes.operation]] if ran.shapes.operation in inner else []


def stack_of(lines: Iterable[tuple[str, str, int]], on: bool, known: dict[Any, list[Any]]) -> list[Any]:
    """Frames as PyTorch writes them, equal ones the same object."""
    if not on:
        return []
    key = tuple(tuple(line) for line in lines)
    if key not in known:
        frames = [*((n, SITE + f, i) for n, f, i in key), ("<module>", "/home/somebody/img2img.py", 42)]
        known[key] = [
            known.setdefault(f, {"name": f[0], "filename": f[1], "line": f[2]})
            for f in frames  # type: ignore[arg-type]
        ]
    return known[key]


def write(path: Path, content: Any) -> Path:
    """As `torch.cuda.memory._dump_snapshot` writes it."""
    with path.open("wb") as file:
        pickle.dump(content, file)
    return path
