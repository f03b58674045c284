"""The backend ``trace``: records from meta tensors, on any machine.

Allocated memory is traced; reserved and required memory come from replaying the traced allocations through a model of
the caching allocator (`sdfit.allocator`); device memory adds the CUDA context, where one was published for the card.
Nothing here is measured, and the records say so.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from sdfit.backends.trace import Tracer
from sdfit.workload import Workload


class TraceBackend:
    """Traces workloads as a card would run them.

    Parameters
    ----------
    gpu : str
        The card that the trace stands for.
    workspaces : bool
        Add the kernel workspaces known for that card's architecture; otherwise the bare trace.
    num_inference_steps : int
    """

    def __init__(self, gpu: str = "none", *, workspaces: bool = False, num_inference_steps: int = 2) -> None:
        torch.set_num_threads(1)
        self.gpu, self.num_inference_steps = gpu, num_inference_steps
        self.spent = False
        self._tracer = Tracer(num_inference_steps=num_inference_steps)

    def environment(self) -> dict[str, Any]:
        """See `sdfit.backends.Backend.environment`."""
        return {
            "backend": "trace",
            "gpu": f"none (a trace for '{self.gpu}')",
            "name": self.gpu,
            "workspaces": None,
            "num_inference_steps": self.num_inference_steps,
            **software(),
        }

    def measure(self, workload: Workload) -> dict[str, Any]:
        """See `sdfit.backends.Backend.measure`."""
        traced = self._tracer.run(workload)
        return {
            "outcome": "ok",
            "stage_peaks_bytes": traced.stage_peaks,
            "component_bytes": traced.component_bytes,
            "allocated_bytes": traced.peak_bytes,
            "baseline_bytes": traced.weights_bytes,
            "stage_s": {stage: round(seconds, 4) for stage, seconds in traced.stage_seconds.items()},
        }


def software() -> dict[str, str | None]:
    """Versions of what runs the pipeline."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("diffusers", "transformers", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found

