"""Count the bytes of live tensors while real PyTorch code runs.

A dispatch mode sees each operation; an output whose storage is new adds its bytes, rounded up to the 512 that the
caching allocator rounds to, and a weak reference takes them off again when the storage is freed. It works on meta
tensors, where nothing is computed, and on CPU tensors, which is how it is checked against a real allocator.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sdfit.backends.trace.recall import run_on_meta
from sdfit.equation.weights import rounded
from sdfit.errors import InvalidWorkload
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
        events = [(block + first, size) for block, size in taken.events]
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


_VIEWS = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
"""What a host may do with its own tensors."""
Operation = Callable[[Any, tuple[Any, ...], Any], None]


class FollowStorages(TorchDispatchMode):
    """Feed a `Meter` with the storages on one kind of device.

    Parameters
    ----------
    meter : Meter
    device : str
        The device type to count, ``meta`` or ``cpu``. Tensors elsewhere stand for host memory.
    workspace : callable, optional
        ``workspace(func, args, out) -> bytes`` that the kernel of this operation holds while it runs.
    after : callable, optional
        ``after(func, args, out)`` is called after each operation, with the outputs already counted.
    size : callable
        ``size(nbytes) -> bytes`` that a storage counts as; by default as the allocator rounds it.
    """

    def __init__(
        self,
        meter: Meter,
        device: str = "meta",
        *,
        workspace: Callable[[Any, tuple[Any, ...], Any], int] | None = None,
        after: Operation | None = None,
        size: Callable[[int], int] = rounded,
    ) -> None:
        super().__init__()
        self.meter, self.device = meter, device
        self.workspace, self.after, self._size = workspace, after, size
        self._known: dict[int, Any] = {}
        self._host: frozenset[int] = frozenset()
        self._blocks: dict[int, int] = {}
        self._paused = False

    def ignore(self, tensor: torch.Tensor) -> None:
        """Never count this tensor's storage: it is counted elsewhere (the weights)."""
        self._known[tensor.untyped_storage()._cdata] = tensor

    def keep_apart(self, tensors: list[torch.Tensor]) -> None:
        """Stand-ins for what is in host memory: an operation on one is refused."""
        self._host = frozenset(t.untyped_storage()._cdata for t in tensors)

    def block_of(self, tensor: torch.Tensor) -> int:
        """The block that a tensor's storage is; 0 if it is counted elsewhere."""
        return self._blocks.get(tensor.untyped_storage()._cdata, 0)

    def made(
        self, shape: tuple[int, ...], stride: tuple[int, ...] | None, dtype: torch.dtype, *, block: int
    ) -> torch.Tensor:
        """Make a tensor in a block that is counted already, and follow it from now on."""
        self._paused = True
        try:
            if stride is None:
                tensor = torch.empty(shape, dtype=dtype, device=self.device)
            else:
                tensor = torch.empty_strided(shape, stride, dtype=dtype, device=self.device)
        finally:
            self._paused = False
        self._follow(tensor.untyped_storage(), block)
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._host:
            self._check_place(func, args)
        if self._paused:
            return func(*args, **kwargs)
        if self.device == "meta":
            stand_in = _leaves_the_device(func, args, kwargs)
            if stand_in is not None:
                return stand_in
        out = run_on_meta(func, args, kwargs) if self.device == "meta" else func(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            self._see(out)
        elif isinstance(out, tuple | list):
            for part in out:
                if isinstance(part, torch.Tensor):
                    self._see(part)
        if self.workspace is not None:
            scratch = self.workspace(func, args, out)
            if scratch:
                self.meter.passing(scratch)
        if self.after is not None:
            self.after(func, args, out)
        return out

    def _check_place(self, func: Any, args: tuple[Any, ...]) -> None:
        if func not in _VIEWS and any(
            isinstance(arg, torch.Tensor) and arg.untyped_storage()._cdata in self._host for arg in args
        ):
            raise InvalidWorkload(
                f"this fails in diffusers itself: {func} meets a weight that its offload left in host memory; take "
                "another offload"
            )

    def _see(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._follow(storage, self.meter.allocate(self._size(storage.nbytes())))

    def _follow(self, storage: Any, block: int) -> None:
        key, size = storage._cdata, self._size(storage.nbytes())
        known, blocks, meter = self._known, self._blocks, self.meter

        def gone(_: Any) -> None:
            del known[key], blocks[key]
            meter.free(block, size)

        known[key], blocks[key] = weakref.ref(storage, gone), block


def _leaves_the_device(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer for meta tensors what only a value could answer: zero. None if the operation stays on the device."""
    aten = torch.ops.aten
    if func is aten._local_scalar_dense.default and args[0].is_meta:
        return 0.0 if args[0].is_floating_point() else 0
    if func is aten._to_copy.default and args[0].is_meta:
        target = kwargs.get("device")
        if target is not None and target.type == "cpu":
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    return None


class AsOnACard(TorchFunctionMode):
    """Let functions that PyTorch runs in another way on meta tensors, or under a dispatch mode, run as on a card.

    `linear` of a batch that is no contiguous block is a matrix product to which the bias is added in place; under a
    dispatch mode PyTorch adds it into a new tensor. In the VAE's attention query, key and value come about like this.

    `scaled_dot_product_attention` is a kernel that PyTorch would pick on a card. ``kernel='fused'`` holds its output and the
    float32 log-sum-exp per query (flash and memory-efficient attention); ``kernel='math'`` runs PyTorch's own
    `_scaled_dot_product_attention_math`, operation by operation.
    """

    def __init__(self, kernel: str = "fused") -> None:
        super().__init__()
        self.kernel = kernel

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            return _linear(*args, **kwargs)
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args[:3] if len(args) >= 3 else (kwargs["query"], kwargs["key"], kwargs["value"])
        if self.kernel == "math":
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            return torch.ops.aten._scaled_dot_product_attention_math(
                query, key, value, mask, 0.0, kwargs.get("is_causal", False), scale=kwargs.get("scale")
            )[0]
        batch, heads, rows = query.shape[:3]
        out = torch.empty(batch, rows, heads, value.shape[-1], dtype=query.dtype, device=query.device).transpose(1, 2)
        torch.empty(batch, heads, rows, dtype=torch.float32, device=query.device)  # the log-sum-exp is freed at once
        return out


def _linear(batch: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if bias is None or batch.dim() < 3 or batch.is_contiguous():
        return torch.nn.functional.linear(batch, weight, bias)
    return torch.matmul(batch, weight.t()).add_(bias)
