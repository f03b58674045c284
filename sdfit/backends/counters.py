"""The memory counters that `sdfit.backends.cuda` reads.

All that talks to CUDA and NVML stands in `CudaCounters`; everything above it runs on any `Counters`, as its tests do.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch

from sdfit.backends.environment import a_card_is_there
from sdfit.errors import DeviceError, listed
from sdfit.predict.cards import card_slug
from sdfit.predict.nvml import Nvml

ANY_CARD = "auto"


class Counters(Protocol):
    """What one device says about its memory. All amounts in bytes."""

    device: str

    def facts(self) -> dict[str, Any]:
        """The device's part of the environment (see `sdfit.records.MATTERS`)."""

    def watching(self) -> AbstractContextManager[Any]:
        """Count inside this ``with`` block."""

    def settle(self) -> None:
        """Collect garbage and give cached memory back: what is left belongs to somebody."""

    def forget(self) -> None:
        """Give back what libraries keep between calls."""

    def synchronise(self) -> None:
        """Wait until the device has done what it was told."""

    def allocated(self) -> int:
        """Bytes that are allocated now."""

    def reset_peaks(self) -> None:
        """Begin both peaks afresh."""

    def peaks(self) -> tuple[int, int]:
        """Most bytes allocated and reserved since the last reset."""

    def used(self) -> int | None:
        """Bytes in use on the whole device; None where nobody knows."""

    def others(self) -> int | None:
        """Bytes in use on the device that are not this process's; None where nobody knows.

        Where the driver does not say which are whose, all that is in use and not reserved by this process's allocator: its
        context is among it, and grows by some megabytes as kernels load.
        """

    def troubles(self) -> tuple[int, int]:
        """How often, since the process began, the allocator gave its cache back, and how often that did not help."""

    def recording(self) -> AbstractContextManager[Callable[[], dict[str, Any]]]:
        """Let the allocator write down what it does in a ``with`` block; gives a function that returns its snapshot."""

    def cap(self, capacity_bytes: int | None) -> None:
        """Let the process take no more than this; None: all there is."""


class CudaCounters:
    """PyTorch's CUDA allocator and NVML.

    Parameters
    ----------
    gpu : str
        The card wanted, as `sdfit.predict.cards.card_slug` names it; ``auto`` takes the first one that is free.

    Raises
    ------
    DeviceError
        If there is no card, none of that name, or another process measures on it.
    """

    def __init__(self, gpu: str = ANY_CARD) -> None:
        before = Nvml.used_of_all()  # before PyTorch makes a context
        a_card_is_there(gpu)
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        index, self._claim = claimed(chosen(gpu, names), [_uuid(i) for i in range(len(names))])
        self.device, self.name = f"cuda:{index}", names[index]
        torch.cuda.set_device(index)
        self._index = index
        self._nvml = Nvml.open(_uuid(index), index)
        self._properties = torch.cuda.get_device_properties(index)
        torch.empty(1, device=self.device)
        self.synchronise()
        alone = next(iter(before.values())) if len(before) == 1 else None
        self.idle_bytes = before.get(_uuid(index), alone)
        used = self.used()
        known = used is not None and self.idle_bytes is not None
        self.context_bytes = used - self.idle_bytes - torch.cuda.memory_reserved(index) if known else None  # type: ignore[operator]

    def facts(self) -> dict[str, Any]:
        """See `Counters.facts`. ``context_bytes`` is what the bare context took when it was made; it grows with use."""
        settings = [os.environ.get(n, "") for n in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")]
        return {
            "backend": "cuda",
            "gpu": self.name,
            "name": card_slug(self.name),
            "compute_capability": f"{self._properties.major}.{self._properties.minor}",
            "total_memory_bytes": self._properties.total_memory,
            "driver": self._nvml.driver if self._nvml else None,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "allocator_settings": ",".join(s for s in settings if s),
            "cublas_workspace_config": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
            "context_bytes": self.context_bytes,
            "idle_bytes": self.idle_bytes,
            "device_counts": "NVML, the whole card: other processes and idle_bytes included",
        }

    def watching(self) -> AbstractContextManager[Any]:
        """See `Counters.watching`: the allocator counts by itself."""
        return nullcontext()

    def settle(self) -> None:
        """See `Counters.settle`."""
        gc.collect()
        self.synchronise()
        torch.cuda.empty_cache()

    def forget(self) -> None:
        """See `Counters.forget`: cuBLAS keeps one workspace per handle and stream."""
        torch._C._cuda_clearCublasWorkspaces()

    def synchronise(self) -> None:
        """See `Counters.synchronise`."""
        torch.cuda.synchronize(self._index)

    def allocated(self) -> int:
        """See `Counters.allocated`."""
        return int(torch.cuda.memory_allocated(self._index))

    def reset_peaks(self) -> None:
        """See `Counters.reset_peaks`."""
        torch.cuda.reset_peak_memory_stats(self._index)

    def peaks(self) -> tuple[int, int]:
        """See `Counters.peaks`."""
        return torch.cuda.max_memory_allocated(self._index), torch.cuda.max_memory_reserved(self._index)

    def used(self) -> int | None:
        """See `Counters.used`."""
        return self._nvml.used() if self._nvml else None

    def others(self) -> int | None:
        """See `Counters.others`."""
        if self._nvml is None:
            return None
        known = self._nvml.used_by_others()
        return known if known is not None else self._nvml.used() - torch.cuda.memory_reserved(self._index)

    def troubles(self) -> tuple[int, int]:
        """See `Counters.troubles`."""
        found = torch.cuda.memory_stats(self._index)
        return int(found.get("num_alloc_retries", 0)), int(found.get("num_ooms", 0))

    @contextmanager
    def recording(self) -> Iterator[Callable[[], dict[str, Any]]]:
        """See `Counters.recording`: Python frames of allocations only, C++ frames take minutes to name."""
        torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python")
        try:
            yield lambda: torch.cuda.memory._snapshot(self._index)
        finally:
            torch.cuda.memory._record_memory_history(None)

    def cap(self, capacity_bytes: int | None) -> None:
        """See `Counters.cap`: what is reserved may not grow past it; context and libraries are not counted."""
        share = 1.0 if capacity_bytes is None else min(capacity_bytes / self._properties.total_memory, 1.0)
        torch.cuda.set_per_process_memory_fraction(share, self._index)


def chosen(gpu: str, names: list[str]) -> list[int]:
    """Which of the cards that are there is the one asked for.

    Raises
    ------
    DeviceError
        If none is; it names those that are there.

    Examples
    --------
    >>> chosen("t4", ["NVIDIA H200", "Tesla T4"])
    [1]
    """
    if gpu == ANY_CARD:
        return list(range(len(names)))
    found = [i for i, name in enumerate(names) if card_slug(name) == card_slug(gpu)]
    if not found:
        there = listed(f"{name} ('{card_slug(name)}')" for name in names)
        raise DeviceError(
            f"the card asked for is '{gpu}', and there is {there}; type --gpu {card_slug(names[0])}, or --gpu auto",
            given=gpu,
            found=names,
        )
    return found


def claimed(candidates: list[int], uuids: list[str]) -> tuple[int, Any]:
    """Take the first candidate on which no other worker measures; it is held until the process ends.

    Two workers on one card would each count the other's memory.

    Raises
    ------
    DeviceError
        If all are taken.
    """
    try:
        import fcntl
    except ImportError:  # not on this system: then two workers on one card are the user's business
        return candidates[0], None
    for index in candidates:
        path = Path(tempfile.gettempdir(), f"sdfit-{os.getuid()}-{uuids[index]}.lock")
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
        else:
            return index, file
    raise DeviceError("another sdfit process measures on this card; wait for it to end, or type --workers 1")


def _uuid(index: int) -> str:
    return f"GPU-{getattr(torch.cuda.get_device_properties(index), 'uuid', index)}"
