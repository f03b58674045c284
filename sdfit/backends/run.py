"""One call of the pipeline, followed stage by stage through a device's counters, and what its error says about memory."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

import torch

from sdfit.backends.counters import Counters
from sdfit.equation.stages import STAGES

_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_REQUEST = re.compile(r"Tried to allocate ([0-9.]+) (bytes|KiB|MiB|GiB)")
_ALLOCATION_FAILED = re.compile(r"out of memory|_ALLOC_FAILED", re.IGNORECASE)
_NO_ENGINE = re.compile(r"unable to find an engine", re.IGNORECASE)
_HOST = re.compile(r"DefaultCPUAllocator", re.IGNORECASE)


@dataclass
class Run:
    """What one call of the pipeline does to the counters, stage by stage."""

    counters: Counters
    stage: str = ""
    stage_peaks: dict[str, int] = field(default_factory=dict)
    stage_s: dict[str, float] = field(default_factory=dict)
    reserved_bytes: int = 0
    device_bytes: int | None = None
    others_bytes: list[int] = field(default_factory=list)
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
        others = self.counters.others()
        self.others_bytes += [] if others is None else [others]

    def fail(self, error: BaseException) -> None:
        """Take down where memory ended. The error still holds the frames, and they what was live."""
        live = self.counters.allocated()
        self.failed, self.message = True, (str(error) or type(error).__name__).splitlines()[0]
        if not self.stage:  # it failed while the prompt's embeddings were made
            self.stage = STAGES[0]
        self.leave()
        self.oom_bytes = max(self.stage_peaks[self.stage], live + requested_bytes(str(error)))

    @property
    def attention_kernel(self) -> str | None:
        """The UNet's kernel, and the VAE's where it is another one."""
        unet, vae = self.kernels.get("unet"), self.kernels.get("vae")
        return unet if vae is None or vae == unet else f"{unet}; vae: {vae}"


def requested_bytes(message: str) -> int:
    """The request that failed, from PyTorch's message: the least that its rounded text allows; 0 if it names none.

    Examples
    --------
    >>> requested_bytes("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")
    2142114938
    >>> requested_bytes("Tried to allocate 512 bytes.")
    512
    """
    match = _REQUEST.search(message)
    if match is None:
        return 0
    unit = _UNITS[match[2]]
    return int((float(match[1]) - (0.005 if unit > 1 else 0)) * unit)


def is_out_of_memory(error: BaseException, failures: int = 0) -> bool:
    """Whether a failure means that the device had too little memory.

    Besides PyTorch's own error, libraries report in their words that an allocation of theirs failed. cuDNN says that
    there is no plan both where none exists and where none fitted: it is the latter if requests failed on the way.

    Parameters
    ----------
    error : BaseException
    failures : int
        Requests that the allocator could not serve during the run.

    Examples
    --------
    >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    True
    >>> is_out_of_memory(ValueError("out of memory"))
    False
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    if not isinstance(error, RuntimeError) or _HOST.search(text):
        return False
    return bool(_ALLOCATION_FAILED.search(text) or (failures and _NO_ENGINE.search(text)))
