"""One call of the pipeline, followed stage by stage through a device's counters."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from sdfit.backends.counters import Counters
from sdfit.backends.oom import requested_bytes
from sdfit.equation.stages import STAGES


@dataclass
class Run:
    """What one call of the pipeline does to the counters, stage by stage."""

    counters: Counters
    stage: str = ""
    stage_peaks: dict[str, int] = field(default_factory=dict)
    stage_s: dict[str, float] = field(default_factory=dict)
    reserved_bytes: int = 0
    device_bytes: int | None = None
    retries: int = 0
    failures: int = 0
    failed: bool = False
    oom_bytes: int | None = None
    message: str | None = None
    kernels: dict[str, str] = field(default_factory=dict)
    _since: float = 0.0

    def enter(self, stage: str) -> None:
        """Close the stage before and begin one."""
        self.leave()
        self.stage = stage
        self.counters.reset_peaks()
        self._since = time.perf_counter()

    def leave(self) -> None:
        """Read the counters of the stage that ends; resetting them for the next one resets both, so both are kept."""
        if not self.stage:
            return
        self.counters.synchronise()
        seconds = time.perf_counter() - self._since
        allocated, reserved = self.counters.peaks()
        self.stage_peaks[self.stage] = max(allocated, self.stage_peaks.get(self.stage, 0))
        self.stage_s[self.stage] = self.stage_s.get(self.stage, 0.0) + seconds
        self.reserved_bytes = max(reserved, self.reserved_bytes)
        # reserved only grows within a stage, unless the allocator gave its cache back: its end shows the most
        used = self.counters.used()
        if used is not None:
            self.device_bytes = max(used, self.device_bytes or 0)

    def fail(self, error: BaseException) -> None:
        """Take down where memory ended. The error still holds the frames, and they what was live."""
        live = self.counters.allocated()
        self.failed, self.message = True, str(error).splitlines()[0]
        if not self.stage:  # it failed while the prompt's embeddings were made
            self.stage = STAGES[0]
        self.leave()
        self.oom_bytes = max(self.stage_peaks[self.stage], live + requested_bytes(str(error)))

    @property
    def attention_kernel(self) -> str | None:
        """The UNet's kernel, and the VAE's where it is another one."""
        unet, vae = self.kernels.get("unet"), self.kernels.get("vae")
        return unet if vae is None or vae == unet else f"{unet}; vae: {vae}"
