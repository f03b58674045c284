"""The allocator model beside published reserved memory: InvokeAI's benchmark of the VAE, replayed.

The benchmark (``vae_benchmarks/benchmark_sd_vae.py`` beside the published results, PyTorch 2.7.1 in that commit's
requirements) loads the VAE three times in one process. Each time it encodes and decodes images of several sizes, seven times
each, gives the cache back between runs, and reports the peak of reserved memory above what was reserved before.
`replay_all` does the same with traces: the weights come, each run's allocations and frees go through
`sdfit.predict.simulation.segments.CachingAllocator`, and what stays from before is there: cuBLAS's workspace, which the first
run leaves in the midst of a segment, and the free parts of segments that still hold weights.
`python -m sdfit.study.lab reserved` prints every published reserved row beside its replay.

The second loading is of float16 and its runs are of float32 (INV-028 to 034). The script means to convert the weights before
each run and back after it. But its first run, of a float16 image in a float32 VAE, fails before they go back, and what the
next function takes for the original dtype is float32: they stay converted, and rows of encoding are missing.

What it does not know: the scaled latents and results of the run before, some of which are still there when the next begins;
rows that are means of unequal runs show it, by fractions of 2 MiB. Decoding in float16 comes out 0.3 to 0.45 % too low from
768x768 on: some layer holds more than the table says. Larger workspaces of 512 channels at the latents' own size would do
here (4.5 times their input), but not for the VAE of FLUX, of which the same source has results.

Float32 decoding was up to 12 % too high at 1536x1536 and 2048x2048, at the right allocated peak, until the results for FLUX
were looked at: its encoder keeps all of its feature maps, so that the peak of allocated memory lies at convolutions of 512
channels and shows what they hold, which had been taken to be their input. With the table's rules FLUX's own ten float32 rows
of reserved memory come out as published too, but for encoding at 1536x1536 and 2048x2048 (-0.2 %).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sdfit.backends.trace.tracer import Tracer
from sdfit.predict.simulation.card import Traced
from sdfit.predict.simulation.meter import Meter
from sdfit.predict.simulation.segments import Block, CachingAllocator
from sdfit.predict.simulation.workspaces import workspaces_for
from sdfit.study.comparison import published
from sdfit.study.lab.published import others, trace_published
from sdfit.units import aligned, format_bytes, percent
from sdfit.workload import Workload

RUNS = 3
"""The second run already sees what every later one sees."""
LOADINGS = (("float16", "float16"), ("float16", "float32"), ("float32", "float32"))
"""The dtypes in which the VAE is loaded and in which it then runs, one after the other."""
CONVERTED = ("INV-028", "INV-032", "INV-034")
"""Rows of the second loading."""
CARD = "rtx4090"


@dataclass(frozen=True, slots=True)
class ReservedRow:
    """One published reserved row beside its replay [bytes]."""

    row: published.PublishedRow
    replayed_bytes: int

    @property
    def error(self) -> float:
        """Of the replay, relative to the published number."""
        return (self.replayed_bytes - self.row.peak_bytes) / self.row.peak_bytes


def reserved_rows() -> tuple[published.PublishedRow, ...]:
    """Every published row of reserved memory."""
    rows = [row for row in (*published.rows(), *others()) if row.metric == "reserved"]
    return tuple(sorted(rows, key=lambda row: (row.dtype, row.id)))


def replay_all(rows: tuple[published.PublishedRow, ...] | None = None) -> tuple[ReservedRow, ...]:
    """Replay published reserved rows, in their order; all of them take some seconds.

    Parameters
    ----------
    rows : tuple of PublishedRow, optional
        Some of `reserved_rows`, which each come out as among all.
    """
    wanted = reserved_rows() if rows is None else rows
    tracer, allocator = Tracer(), CachingAllocator()
    replayed: dict[str, int] = {}
    for loading in LOADINGS:
        weights = _load(allocator, tracer, loading)
        for row in wanted:
            if _loading(row) == loading:
                _, traced = trace_published(row, tracer, keep_events=True)
                replayed[row.id] = _measure(allocator, _events(traced), row.pipeline)
        for block in weights:
            allocator.free(block)
        allocator.release_cached()
    return tuple(ReservedRow(row, replayed[row.id]) for row in wanted)


def _loading(row: published.PublishedRow) -> tuple[str, str]:
    return ("float16" if row.id in CONVERTED else row.dtype, row.dtype)


def _load(allocator: CachingAllocator, tracer: Tracer, loading: tuple[str, str]) -> list[Block]:
    """Load the weights, and convert them one by one; the first time, run once for what that leaves behind."""
    loaded, runs = (_weights(tracer, dtype) for dtype in loading)
    blocks = [allocator.malloc(size) for size in loaded]
    if loading == LOADINGS[0]:
        _leave_cublas(allocator, tracer)
    if loaded != runs:
        for index, size in enumerate(runs):
            old, blocks[index] = blocks[index], allocator.malloc(size)
            allocator.free(_made(old))
        allocator.release_cached()
    return [_made(block) for block in blocks]


def _weights(tracer: Tracer, dtype: str) -> list[int]:
    """Bytes of each weight of the VAE, in the order of its modules."""
    vae = tracer.pipeline(Workload(64, 64, dtype=dtype, safety_checker=False)).vae
    return [tensor.untyped_storage().nbytes() for tensor in (*vae.parameters(), *vae.buffers())]


def _leave_cublas(allocator: CachingAllocator, tracer: Tracer) -> None:
    """Encode once, with cuBLAS's workspace allocated at the first matrix product."""
    kernels = workspaces_for(CARD)
    tracer.workspace = kernels
    before: list[int] = []

    def observe(meter: Meter) -> Any:
        def after(func: Any, args: tuple[Any, ...], out: Any) -> None:
            if func.name() in ("aten::mm", "aten::addmm") and not before and meter.events is not None:
                before.append(len(meter.events))

        return after

    work = Workload(512, 512, safety_checker=False)
    traced = tracer.run(work, task="vae_encode", keep_events=True, observe=observe)
    assert traced.events is not None
    events = _events(traced)
    at = before[0] - (len(traced.events) - len(events))
    live = _play(allocator, events[:at])
    allocator.malloc(kernels.standing_bytes)
    _play(allocator, events[at:], live)
    allocator.release_cached()


def _events(traced: Traced) -> list[tuple[int, int]]:
    """The events of a trace after those of the weights and cuBLAS."""
    assert traced.events is not None
    held, first = traced.weights_bytes + traced.standing_bytes - traced.unsplit_bytes, 0
    while held > 0:
        held -= traced.events[first][1]
        first += 1
    return traced.events[first:]


def _measure(allocator: CachingAllocator, events: list[tuple[int, int]], task: str) -> int:
    """Run as the benchmark does; the peak of reserved memory above what was there before [bytes].

    The image to encode is there all the time, as are the latents before they are scaled.
    """
    number, size = events[0]
    given = _made(allocator.malloc(size))
    if task == "vae_encode":
        events = [event for event in events if event[0] != number]
    above = 0
    for _ in range(RUNS):
        allocator.release_cached()
        allocator.reserved_peak_bytes = before = allocator.reserved_bytes
        _play(allocator, events)
        above = allocator.reserved_peak_bytes - before
    allocator.free(given)
    allocator.release_cached()
    return above


def _play(
    allocator: CachingAllocator, events: list[tuple[int, int]], live: dict[int, Block] | None = None
) -> dict[int, Block]:
    """Send events through the allocator, on top of what is live; returns the blocks that are live then."""
    live = {} if live is None else live
    for number, size in events:
        if size < 0:
            allocator.free(live.pop(number))
        else:
            live[number] = _made(allocator.malloc(size))
    return live


def _made(block: Block | None) -> Block:
    assert block is not None, "an allocator without a cap always finds memory"
    return block


def table(found: tuple[ReservedRow, ...]) -> str:
    """The rows as aligned text."""
    lines = [("row", "what", "dtype", "published", "replayed (simulated)", "error")]
    for one in found:
        r = one.row
        what = f"{r.pipeline} {r.height}x{r.width}{' tiled' if r.vae_tiling else ''}"
        shown = (format_bytes(r.peak_bytes), format_bytes(one.replayed_bytes), percent(one.error))
        lines.append((r.id, what, r.dtype, *shown))
    return aligned(lines, left=3)
