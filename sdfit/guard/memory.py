"""Memory that is there for a run, and what runs in progress were promised of it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sdfit.errors import InvalidWorkload
from sdfit.predict.pipelines import components


@dataclass(frozen=True, slots=True)
class Free:
    """Memory of a device at one moment [bytes].

    Parameters
    ----------
    spare_bytes : int
        What a run may take beside what is there: free, and what PyTorch's cache holds unused.
    own_bytes : int
        The pipeline's weights that are on the device already, and stay there.
    allocated_bytes : int
        What all tensors of this process hold on the device. By what it has grown, runs in progress have taken of what they
        were promised; 0 if that is not known, and then a promise counts in full until it is given back.
    """

    spare_bytes: int
    own_bytes: int
    allocated_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """What this pipeline may take in all: its own bytes are its own; another model's are not free."""
        return self.spare_bytes + self.own_bytes


def device_of(pipe: Any) -> Any:
    """The torch device that a pipeline runs on, with its number; offloaded weights may lie elsewhere."""
    import torch

    parts = components(pipe)
    hooks = (getattr(vars(part).get("_hf_hook"), "execution_device", None) for part in parts.values())
    found = next((device for device in hooks if device is not None), None)  # a device, its name, or its number
    if found is None:
        first = next(iter(parts["unet"].parameters()), None) if "unet" in parts else None
        on_card = first is not None and first.device.type == "cuda"
        found = (
            first.device if on_card and first is not None else getattr(pipe, "_execution_device", None) or pipe.device
        )
    device = torch.device("cuda", found) if isinstance(found, int) else torch.device(found)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def free_memory(pipe: Any) -> Free:
    """Ask the pipeline's device: free + reserved - allocated, and the pipeline's own bytes.

    Raises
    ------
    InvalidWorkload
        If the pipeline is on no CUDA card.

    Notes
    -----
    A cap on this process (`torch.cuda.set_per_process_memory_fraction`) counts. What PyTorch's cache holds in pieces counts
    as free, although another model's pieces may be too small for a large block.
    """
    import torch

    device = device_of(pipe)
    if device.type != "cuda":
        raise InvalidWorkload(f"the pipeline is on '{device}', which has no memory to ask; give memory='15 GiB'")
    free, total = torch.cuda.mem_get_info(device)
    allocated = int(torch.cuda.memory_allocated(device))
    spare = int(free) + int(torch.cuda.memory_reserved(device)) - allocated
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    if share < 1:
        spare = min(spare, int(total * share) - allocated)
    return Free(spare, _staying(pipe, "cuda"), allocated)


def given_memory(pipe: Any, amount: int) -> Free:
    """An amount that the pipeline may take in all, as `Free`: the weights that stay on its device are part of it."""
    own = _staying(pipe, None)
    return Free(amount - own, own)


def _staying(pipe: Any, where: str | None) -> int:
    """Bytes of the weights on a kind of device that no hook moves; None: on whatever device."""
    total = 0
    for part in components(pipe).values():
        first = next(iter(part.parameters()), None)
        moved = "_hf_hook" in vars(part) or "_diffusers_hook" in vars(part)
        if first is not None and not moved and where in (None, first.device.type):
            total += _bytes_of(part, first.dtype)
    return total


_known: weakref.WeakKeyDictionary[Any, tuple[Any, int]] = weakref.WeakKeyDictionary()


def _bytes_of(part: Any, dtype: Any) -> int:
    """Bytes of a component's weights, counted once for each dtype that it comes in."""
    known = _known.get(part)
    if known is None or known[0] != dtype:
        tensors = {id(t): t for t in (*part.parameters(), *part.buffers())}
        known = _known[part] = (
            dtype,
            sum(t.numel() * t.element_size() for whole in tensors.values() for t in _stored(whole)),
        )
    return known[1]


def _stored(tensor: Any) -> list[Any]:
    """The tensors that hold a tensor: of a quantised one, its whole numbers and its scales."""
    parts = getattr(tensor, "__tensor_flatten__", None)
    return [tensor] if parts is None else [getattr(tensor, name) for name in parts()[0]]


class Ledger:
    """What runs in progress were promised, by account: a device, or a pipeline with an amount of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._promised: dict[object, float] = {}
        self._allocated_before: dict[object, int] = {}

    def take(self, account: object, upper: float, ask: Callable[[], Free], held: float = 0.0) -> float | None:
        """Promise a run what it needs beside its own weights, if that is there beside what is promised already.

        Parameters
        ----------
        upper : float
            What the run needs in all [bytes].
        ask : callable
            Gives what is there.
        held : float
            What the run was promised before [bytes].

        Returns
        -------
        float or None
            The amount, to be given back [bytes]; None if it is not there.
        """
        with self._lock:
            there = ask()
            if not self._promised.get(account):
                self._allocated_before[account] = there.allocated_bytes
            amount = max(upper - there.own_bytes - held, 0.0)
            if amount > self._left(account, there):
                return None
            self._promised[account] = self._promised.get(account, 0.0) + amount
            return amount

    def give_back(self, account: object, amount: float) -> None:
        """A run is over."""
        with self._lock:
            left = self._promised.get(account, 0.0) - amount
            if left < 1:
                self._promised.pop(account, None)
                self._allocated_before.pop(account, None)
            else:
                self._promised[account] = left

    def left(self, account: object, there: Free) -> float:
        """What is not promised of what is there, beside the pipeline's own weights [bytes]."""
        with self._lock:
            return self._left(account, there)

    def _left(self, account: object, there: Free) -> float:
        """What promised runs have taken already is neither spare nor still to be taken: it counts once.

        What other code of this process takes while a run is in progress cannot be told from what the run takes.
        """
        promised = self._promised.get(account, 0.0)
        grown = there.allocated_bytes - self._allocated_before.get(account, there.allocated_bytes)
        return there.spare_bytes - promised + min(max(grown, 0), promised)


LEDGER = Ledger()
"""Shared by all guards of the process."""
