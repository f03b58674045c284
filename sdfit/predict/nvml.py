"""The cards in this machine: memory in use on a whole card, as NVML counts it, and what is free on one.

None of it where there is no driver or no library: nothing here is imported before it is asked for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from sdfit.predict.cards import card_slug


class Nvml:
    """One card's NVML handle."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._library, self._handle = library, handle
        driver = library.nvmlSystemGetDriverVersion()
        self.driver = driver.decode() if isinstance(driver, bytes) else str(driver)

    @classmethod
    def open(cls, uuid: str, index: int) -> Nvml | None:
        """None where NVML is not there, or does not know the card (a slice of a MIG card)."""
        handles = cls._handles()
        library = _library()
        if library is None or not handles:
            return None
        found = handles.get(uuid) or (next(iter(handles.values())) if len(handles) == 1 else None)
        return cls(library, found) if found is not None else None

    @classmethod
    def used_of_all(cls) -> dict[str, int]:
        """Bytes in use on each card, by its uuid."""
        library = _library()
        return {uuid: _used(library, handle) for uuid, handle in cls._handles().items()}

    @classmethod
    def _handles(cls) -> dict[str, Any]:
        library = _library()
        if library is None:
            return {}
        found = {}
        for i in range(library.nvmlDeviceGetCount()):
            handle = library.nvmlDeviceGetHandleByIndex(i)
            uuid = library.nvmlDeviceGetUUID(handle)
            found[uuid.decode() if isinstance(uuid, bytes) else uuid] = handle
        return found

    def used(self) -> int:
        """Bytes in use on the card."""
        return _used(self._library, self._handle)

    def used_by_others(self) -> int | None:
        """Bytes that other processes have on the card; None where the driver does not list this one, as in a container, or
        does not say what each has, as on Windows."""
        library, handle = self._library, self._handle
        try:
            there = [
                *library.nvmlDeviceGetComputeRunningProcesses(handle),
                *library.nvmlDeviceGetGraphicsRunningProcesses(handle),
            ]
        except library.NVMLError:
            return None
        known = {process.pid: process.usedGpuMemory for process in there}  # one may be listed as both
        if os.getpid() not in known or None in known.values():
            return None
        return sum(int(size) for pid, size in known.items() if pid != os.getpid())


@dataclass(frozen=True, slots=True)
class Here:
    """A card in this machine, as it is now.

    Parameters
    ----------
    name : str
        As NVML writes it.
    compute_capability : str
        As ``"8.6"``.
    total_bytes : int
        What CUDA can hand out of it in all, nearly: the driver's own part is left out.
    free_bytes : int
        What of it nobody uses, but for this process.
    context : bool
        Whether this process has its CUDA context already; if not, that comes off what is free.
    """

    name: str
    compute_capability: str
    total_bytes: int
    free_bytes: int
    context: bool = False


def here(slug: str | None = None) -> Here | None:
    """The card in this machine that a process would take, or the first of a short name; None if there is none.

    PyTorch is asked where this process uses it on a card already, otherwise NVML, which starts nothing on the card; where
    NVML's library is not installed, PyTorch is imported, if it is. ``CUDA_VISIBLE_DEVICES`` is obeyed.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        found = [_of_torch(torch, index) for index in range(torch.cuda.device_count())]
    else:
        known = _of_nvml()
        found = known if known is not None else _ask_torch() if find_spec("pynvml") is None else []
    return next((card for card in found if slug is None or card_slug(card.name) == slug), None)


def _of_torch(torch: Any, index: int) -> Here:
    """What PyTorch says of a card; what this process holds of it already is its own to use."""
    facts = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    own = int(torch.cuda.memory_reserved(index))
    return Here(facts.name, f"{facts.major}.{facts.minor}", int(total), int(free) + own, context=True)


def _ask_torch() -> list[Here]:
    """The cards by PyTorch, where it is installed: slow, and it starts a context on each."""
    try:
        import torch

        return [_of_torch(torch, index) for index in range(torch.cuda.device_count())]
    except (ImportError, RuntimeError):
        return []


def _of_nvml() -> list[Here] | None:
    """The cards that a CUDA process would see, by NVML; None if it is not there."""
    library = _library()
    if library is None:
        return None
    found = []
    for card, handle in _visible(_seen_by_cuda(library)):
        memory = _memory(library, handle)
        major, minor = library.nvmlDeviceGetCudaComputeCapability(card)
        kept = int(getattr(memory, "reserved", 0))
        name = library.nvmlDeviceGetName(handle)
        name = name.decode() if isinstance(name, bytes) else str(name)
        found.append(Here(name, f"{major}.{minor}", int(memory.total) - kept, int(memory.free)))
    return found


def _seen_by_cuda(library: Any) -> dict[str, tuple[Any, Any]]:
    """What a CUDA process may run on, by uuid: a card's handle twice, or of a card in slices (MIG) its and the slice's."""
    found: dict[str, tuple[Any, Any]] = {}
    for uuid, card in Nvml._handles().items():
        slices = _slices(library, card)
        found |= {uuid: (card, card)} if slices is None else {name: (card, part) for name, part in slices.items()}
    return found


def _slices(library: Any, card: Any) -> dict[str, Any] | None:
    """The slices of a card, by uuid; None where it is whole."""
    try:
        if library.nvmlDeviceGetMigMode(card)[0] != 1:
            return None
        most = library.nvmlDeviceGetMaxMigDeviceCount(card)
    except (library.NVMLError, AttributeError):  # most cards have no such mode
        return None
    found = {}
    for index in range(most):
        try:
            part = library.nvmlDeviceGetMigDeviceHandleByIndex(card, index)
        except library.NVMLError:  # places may be empty
            continue
        uuid = library.nvmlDeviceGetUUID(part)
        found[uuid.decode() if isinstance(uuid, bytes) else uuid] = part
    return found


def _visible(handles: Mapping[str, Any]) -> list[Any]:
    """The handles that ``CUDA_VISIBLE_DEVICES`` names, in its order: up to the first that names none, as CUDA reads it."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return list(handles.values())
    found: list[Any] = []
    for word in map(str.strip, chosen.split(",")):
        if word.isdigit() and int(word) < len(handles):
            found.append(list(handles.values())[int(word)])
        elif len(named := [h for uuid, h in handles.items() if word and uuid.startswith(word)]) == 1:
            found += named
        else:
            break
    return found


def _used(library: Any, handle: Any) -> int:
    return int(_memory(library, handle).used)


def _memory(library: Any, handle: Any) -> Any:
    version = getattr(library, "nvmlMemory_v2", None)
    try:  # version 2 leaves out what the driver keeps for itself, as nvidia-smi does
        return library.nvmlDeviceGetMemoryInfo(handle, version=version)
    except (library.NVMLError, TypeError):
        return library.nvmlDeviceGetMemoryInfo(handle)


def _library() -> Any:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, no library: device memory is then unknown, and recorded as such
        return None
    return pynvml
