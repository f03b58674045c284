"""Memory in use on a whole card, as NVML counts it; None of it where there is no driver or no library."""

from __future__ import annotations

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

    @classmethod
    def first(cls, slug: str | None = None) -> Nvml | None:
        """The first card of the machine, or the first of a short name; None if there is none."""
        library = _library()
        found = [cls(library, handle) for handle in cls._handles().values()] if library is not None else []
        return next((card for card in found if slug is None or card_slug(card.name) == slug), None)

    @property
    def name(self) -> str:
        """As NVML writes it."""
        name = self._library.nvmlDeviceGetName(self._handle)
        return name.decode() if isinstance(name, bytes) else str(name)

    def total(self) -> int:
        """Bytes of the card."""
        return int(self._library.nvmlDeviceGetMemoryInfo(self._handle).total)

    def used(self) -> int:
        """Bytes in use on the card."""
        return _used(self._library, self._handle)


def _used(library: Any, handle: Any) -> int:
    version = getattr(library, "nvmlMemory_v2", None)
    try:  # version 2 leaves out what the driver keeps for itself, as nvidia-smi does
        return int(library.nvmlDeviceGetMemoryInfo(handle, version=version).used)
    except (library.NVMLError, TypeError):
        return int(library.nvmlDeviceGetMemoryInfo(handle).used)


def _library() -> Any:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, no library: device memory is then unknown, and recorded as such
        return None
    return pynvml
