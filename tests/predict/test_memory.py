"""How much memory there is: what was given, what is free here, or what a named card leaves, each said in words."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from sdfit.errors import InvalidWorkload
from sdfit.predict import memory, nvml
from sdfit.predict.cards import DESKTOP_BYTES, context_bytes, find_card
from sdfit.predict.memory import available
from sdfit.predict.nvml import Here
from sdfit.units import GIB, MIB


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without one, whatever this one has."""
    monkeypatch.setattr(memory, "here", lambda slug=None: None)


@pytest.mark.parametrize(
    ("text", "amount"),
    [("8GB", 8 * 10**9), ("8 GiB", 8 * GIB), ("8g", 8 * GIB), ("800 MiB", 800 * MIB), (8e9, 8 * 10**9)],
)
def test_an_amount_is_taken_as_it_is(text: str | float, amount: int) -> None:
    """And echoed."""
    found = available(text)
    assert found.memory_bytes == amount and "as given" in found.words


def test_a_named_card_leaves_what_context_and_desktop_do_not_take() -> None:
    """A desktop only where there usually is one."""
    t4, rtx = find_card("t4"), find_card("rtx3060")
    assert t4 and rtx
    assert available(None, t4).memory_bytes == t4.memory_bytes - 256 * MIB
    assert available(None, rtx).memory_bytes == rtx.memory_bytes - 256 * MIB - DESKTOP_BYTES
    assert "desktop" in available(None, rtx).words and "desktop" not in available(None, t4).words


def test_a_name_of_several_cards_means_the_smallest_and_says_how_to_name_the_others() -> None:
    """An RTX 3060 may have 8 GiB or 12; what is safe on the first is safe on both."""
    small, large = find_card("rtx3060"), find_card("rtx3060-12gb")
    assert small and large and small.memory_gib == 8 and large.memory_gib == 12
    assert "it is sold with 12 GiB too: name it rtx3060-12gb" in available(None, small).words
    assert available(None, large).memory_bytes > available(None, small).memory_bytes + 3 * GIB


@pytest.mark.parametrize("asked", [None, "free", " Free"])
def test_the_card_here_is_asked_what_is_free(asked: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free less a context, or, where the process has one already, what is free; another card is not asked."""
    t4 = Here("Tesla T4", "7.5", 15 * GIB, 13 * GIB)
    monkeypatch.setattr(memory, "here", lambda slug=None: t4 if slug in (None, "t4") else None)
    for card in (None, find_card("t4")):
        found = available(asked, card)
        assert found.memory_bytes == 13 * GIB - context_bytes(15 * GIB) and "2.000 GiB in use" in found.words
    other = find_card("a100")
    assert other and available(None, other).memory_bytes == other.memory_bytes - other.context_bytes
    running = Here("Tesla T4", "7.5", 15 * GIB, 13 * GIB, context=True)
    monkeypatch.setattr(memory, "here", lambda slug=None: running)
    assert available(asked).memory_bytes == 13 * GIB


def test_what_cannot_be_known_is_asked_for() -> None:
    """Neither an amount nor a card, or free memory without one; a bare number has no unit."""
    with pytest.raises(InvalidWorkload, match="give --memory, as in 8GiB"):
        available(None)
    with pytest.raises(InvalidWorkload, match="no Tesla T4 here whose free memory"):
        available("free", find_card("t4"))
    with pytest.raises(InvalidWorkload, match="'12' has no unit; write 12GiB"):
        available("12")


class Library:
    """pynvml on a machine with a T4 and an A100, of which the driver keeps some."""

    NVMLError = RuntimeError
    nvmlMemory_v2 = 2
    CARDS = ((b"GPU-aa", b"Tesla T4", (7, 5), 15 * GIB), (b"GPU-bb", "NVIDIA A100-SXM4-40GB", (8, 0), 40 * GIB))

    def nvmlDeviceGetCount(self) -> int:
        return len(self.CARDS)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        return self.CARDS[index]

    def nvmlDeviceGetUUID(self, handle: Any) -> Any:
        return handle[0]

    def nvmlDeviceGetName(self, handle: Any) -> Any:
        return handle[1]

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any) -> Any:
        return handle[2]

    def nvmlDeviceGetMemoryInfo(self, handle: Any, version: int | None = None) -> Any:
        total, used, kept = handle[3], GIB, 448 * MIB
        if version is None:
            return SimpleNamespace(total=total, used=used + kept, free=total - used - kept)
        return SimpleNamespace(total=total, used=used, free=total - used - kept, reserved=kept)


@pytest.mark.parametrize(
    ("visible", "name"), [(None, "Tesla T4"), ("1,0", "NVIDIA A100-SXM4-40GB"), ("GPU-b", "NVIDIA A100-SXM4-40GB"), ("", None), ("7", None)]
)  # fmt: skip
def test_the_card_that_cuda_would_see_is_asked(
    visible: str | None, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA_VISIBLE_DEVICES chooses; what the driver keeps for itself is neither in the total nor free."""
    monkeypatch.setattr(nvml, "_library", Library)
    monkeypatch.setitem(sys.modules, "torch", None)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = nvml.here()
    assert (found and found.name) == name
    if found:
        assert found.total_bytes % GIB == 576 * MIB and found.total_bytes - found.free_bytes == GIB
    only = nvml.here("a100")
    assert only is None or only.compute_capability == "8.0"


class Sliced(Library):
    """pynvml on a machine with one A100, of which two slices are made."""

    CARDS = Library.CARDS[1:]
    PARTS: ClassVar = {3: (b"MIG-a", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, 5 * GIB),
                       6: (b"MIG-b", "NVIDIA A100-SXM4-40GB MIG 2g.10gb", None, 10 * GIB)}  # fmt: skip

    def nvmlDeviceGetMigMode(self, handle: Any) -> list[int]:
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: int) -> Any:
        if index not in self.PARTS:
            raise RuntimeError("not found")
        return self.PARTS[index]


@pytest.mark.parametrize(("visible", "gib"), [(None, 5), ("MIG-b", 10), ("MIG-c", None)])
def test_a_slice_of_a_card_has_its_own_memory(
    visible: str | None, gib: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card in slices is none that a process could take whole."""
    monkeypatch.setattr(nvml, "_library", Sliced)
    monkeypatch.setitem(sys.modules, "torch", None)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = nvml.here("a100")
    assert (found and -(-found.total_bytes // GIB)) == gib
    assert found is None or found.compute_capability == "8.0"


def test_the_memory_of_a_slice_that_is_named_is_the_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the whole card is in this machine; a slice here is asked."""
    part = find_card("NVIDIA A100-SXM4-80GB MIG 1g.10gb")
    assert part and "10 GiB" in available(None, part).words
    whole = Here("NVIDIA A100-SXM4-80GB", "8.0", 79 * GIB, 79 * GIB)
    monkeypatch.setattr(memory, "here", lambda slug=None: whole)
    assert available(None, part).memory_bytes < 10 * GIB
    monkeypatch.setattr(memory, "here", lambda slug=None: replace(whole, total_bytes=9 * GIB, free_bytes=6 * GIB))
    assert available(None, part).memory_bytes == 6 * GIB - part.context_bytes


def test_a_process_that_uses_pytorch_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the context is there already, and what PyTorch holds of the card is this process's own to use."""
    facts = SimpleNamespace(name="Tesla T4", major=7, minor=5)
    cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        get_device_properties=lambda index: facts,
        mem_get_info=lambda index: (9 * GIB, 14 * GIB),
        memory_reserved=lambda index: 2 * GIB,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    found = nvml.here("t4")
    assert found == Here("Tesla T4", "7.5", 14 * GIB, 11 * GIB, context=True)
    monkeypatch.setattr(memory, "here", lambda slug=None: found)
    assert available(None).memory_bytes == 11 * GIB


@pytest.mark.parametrize(
    ("there", "others"),
    [
        ({1: 5, 0: 7}, 5),  # 0 stands for this process
        ({0: 7}, 0),
        ({1: 5}, None),  # a container: this process is not listed under its number
        ({1: None, 0: 7}, None),  # Windows
    ],
)
def test_what_other_processes_have_is_known_only_where_the_driver_says_whose_it_is(
    there: dict[int, int | None], others: int | None
) -> None:
    """One that is listed for its graphics as well counts once; a driver that refuses the question says nothing."""

    class Listed(Library):
        def nvmlSystemGetDriverVersion(self) -> str:
            return "580.1"

        def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Any]:
            if handle is None:
                raise RuntimeError("not supported")
            return [SimpleNamespace(pid=pid or os.getpid(), usedGpuMemory=used) for pid, used in there.items()]

        def nvmlDeviceGetGraphicsRunningProcesses(self, handle: Any) -> list[Any]:
            return [one for one in self.nvmlDeviceGetComputeRunningProcesses(handle) if one.pid == 1]

    assert nvml.Nvml(Listed(), Library.CARDS[0]).used_by_others() == others
    assert nvml.Nvml(Listed(), None).used_by_others() is None
