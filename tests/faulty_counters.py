"""Counters of a device that fails where it is told to, in any process of a sweep.

``SDFIT_TEST_FAULTS`` names a folder with ``faults.json``: for some runs, counted over all processes, the stage entry in which
they fail (0 is the text encoder) and how.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from cpu_counters import CpuCounters

FOLDER = "SDFIT_TEST_FAULTS"
ERRORS: dict[str, BaseException] = {
    "oom": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total capacity of ..."),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "oom, then lost": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
    "sticky": RuntimeError(
        "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported"
    ),
}
LOST = RuntimeError("CUDA error: unspecified launch failure")


class NVMLError_GpuIsLost(Exception):
    """As pynvml has it."""


class FaultyCounters(CpuCounters):
    """Fails as it is told; after ``sticky`` nothing of that process works any more, as with a CUDA context."""

    def __init__(self, gpu: str = "cpu") -> None:
        super().__init__(gpu)
        self.folder = Path(os.environ[FOLDER])
        self.faults: dict[str, list[Any]] = json.loads((self.folder / "faults.json").read_text())
        self.entries, self.fault, self.broken, self.others_bytes = 0, [-1, ""], False, 1 << 30

    def reset_peaks(self) -> None:
        super().reset_peaks()
        if not self.entries:
            with (self.folder / "runs").open("a+b") as runs:
                runs.write(b"x")
                self.fault = self.faults.get(str(runs.tell() - 1), [-1, ""])
        self.entries += 1

    def settle(self) -> None:
        self.synchronise()
        super().settle()
        self.entries = 0

    def synchronise(self) -> None:
        if self.broken:
            raise LOST

    def others(self) -> int | None:
        if self._is_now("driver lost"):
            raise NVMLError_GpuIsLost("GPU is lost")
        self.others_bytes += self._is_now("others") * (1 << 30)
        return self.others_bytes

    def _is_now(self, kind: str) -> bool:
        stage, wanted = self.fault
        return kind == wanted and self.entries == stage + 1

    def _check(self, func: Any, args: Any, out: Any) -> None:
        super()._check(func, args, out)
        on_device = isinstance(out, torch.Tensor) and out.is_floating_point()  # tokens are made on the host
        for kind, error in ERRORS.items():
            if on_device and self._is_now(kind):
                self.broken = kind in ("sticky", "oom, then lost")
                self.fault = [-1, ""]  # what comes after it finds memory again
                raise error
