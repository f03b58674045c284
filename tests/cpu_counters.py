"""Counters of CPU tensors, with which the backend ``cuda`` runs where there is no card; no card is like this."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers import StableDiffusionImg2ImgPipeline  # noqa: F401  what it makes as it is imported is not the run's

from sdfit.backends.trace.meter import FollowStorages, Meter
from sdfit.equation.weights import rounded
from sdfit.units import MIB


class CpuCounters:
    """The storages of CPU tensors, followed as a trace follows them."""

    SEGMENT_BYTES = 2 * MIB

    def __init__(self, gpu: str = "cpu") -> None:
        self.device = "cpu"
        self.meter = Meter()
        self.capacity_bytes: int | None = None
        self._failures = 0
        self._follow = FollowStorages(self.meter, "cpu", after=self._check)

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

    def troubles(self) -> tuple[int, int]:
        return 0, self._failures

    def cap(self, capacity_bytes: int | None) -> None:
        self.capacity_bytes = capacity_bytes

    def _check(self, func: Any, args: Any, out: Any) -> None:
        if self.capacity_bytes is not None and self.meter.live_bytes > self.capacity_bytes:
            self._failures += 1
            size = rounded(out.untyped_storage().nbytes()) if isinstance(out, torch.Tensor) else 0
            raise torch.OutOfMemoryError(f"CPU tensors out of memory. Tried to allocate {size} bytes.")
