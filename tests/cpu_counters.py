"""Counters of CPU tensors, with which the backend ``cuda`` runs where there is no card; no card is like this."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib import import_module
from typing import Any

import torch
from diffusers import StableDiffusionImg2ImgPipeline  # noqa: F401  what it makes as it is imported is not the run's
from recorded import Recorder

from sdfit.backends.trace.follow import FollowStorages
from sdfit.equation.weights import rounded
from sdfit.predict.simulation.meter import Meter
from sdfit.units import MIB

with suppress(ImportError):
    # makes two tables of 8 KiB in host memory as it is imported, when the first layer is put in 8 bits
    import_module("optimum.quanto.tensor.weights.marlin")


class Writing(Meter):
    """A meter that tells a recorder, as PyTorch's allocator does, of requested bytes and Python frames."""

    def __init__(self) -> None:
        super().__init__()
        self.requested_bytes = 0
        self.live: dict[int, int] = {}
        self.recorder: Recorder | None = None
        self.numbers: dict[int, int] = {}

    def allocate(self, size_bytes: int) -> int:
        block = super().allocate(size_bytes)
        self.live[block] = self.requested_bytes
        if self.recorder is not None and self.requested_bytes:
            self.numbers[block] = self.recorder.alloc(self.requested_bytes, _frames())
        return block

    def free(self, block: int, size_bytes: int) -> None:
        super().free(block, size_bytes)
        del self.live[block]
        if self.recorder is not None and block in self.numbers:
            self.recorder.free(self.numbers.pop(block))


class Following(FollowStorages):
    """Tells the meter how many bytes were asked for, before they are rounded."""

    def _see(self, tensor: torch.Tensor) -> None:
        self.meter.requested_bytes = tensor.untyped_storage().nbytes()
        super()._see(tensor)


def _frames() -> list[dict[str, Any]]:
    found = []
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        found.append({"name": code.co_name, "filename": code.co_filename, "line": frame.f_lineno})
        frame = frame.f_back
    return found


class CpuCounters:
    """The storages of CPU tensors, followed as a trace follows them."""

    SEGMENT_BYTES = 2 * MIB

    def __init__(self, gpu: str = "cpu") -> None:
        self.device = "cpu"
        self.meter = Writing()
        self.capacity_bytes: int | None = None
        self._failures = 0
        self._follow = Following(self.meter, "cpu", after=self._check)

    def facts(self) -> dict[str, Any]:
        return {"backend": "cpu", "gpu": "none (CPU tensors)", "name": "cpu", "total_memory_bytes": None}

    def watching(self) -> AbstractContextManager[Any]:
        """Only what is made inside is seen, so the weights must be made inside too."""
        return self._follow

    def settle(self) -> None:
        gc.collect()

    def forget(self) -> None:
        """Nothing is kept."""

    def synchronise(self) -> None:
        """Nothing is under way."""

    def allocated(self) -> int:
        return self.meter.live_bytes

    def reset_peaks(self) -> None:
        self.meter.stage = ""  # else entering would write the old peak down again
        self.meter.stage_peaks.clear()
        self.meter.enter("since the reset")

    def peaks(self) -> tuple[int, int]:
        """For reserved it stands whole segments of 2 MiB."""
        self.meter.leave()
        peak = max(self.meter.stage_peaks.values(), default=self.meter.live_bytes)
        return peak, -(-peak // self.SEGMENT_BYTES) * self.SEGMENT_BYTES

    def used(self) -> int | None:
        return None

    def others(self) -> int | None:
        return None

    def troubles(self) -> tuple[int, int]:
        return 0, self._failures

    @contextmanager
    def recording(self) -> Iterator[Callable[[], dict[str, Any]]]:
        """What the meter counts while it runs, as PyTorch's allocator would write it down."""
        recorder = Recorder()
        recorder.on = False
        self.meter.numbers = {block: recorder.alloc(size) for block, size in self.meter.live.items()}
        recorder.on = True
        self.meter.recorder = recorder
        try:
            yield recorder.snapshot
        finally:
            self.meter.recorder = None

    def cap(self, capacity_bytes: int | None) -> None:
        self.capacity_bytes = capacity_bytes

    def _check(self, func: Any, args: Any, out: Any) -> None:
        if self.capacity_bytes is not None and self.meter.live_bytes > self.capacity_bytes:
            self._failures += 1
            size = rounded(out.untyped_storage().nbytes()) if isinstance(out, torch.Tensor) else 0
            raise torch.OutOfMemoryError(f"CPU tensors out of memory. Tried to allocate {size} bytes.")
