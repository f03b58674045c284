"""Count the bytes of live tensors while real PyTorch code runs.

A dispatch mode sees each operation; an output whose storage is new adds its bytes, rounded up to the 512 that the
caching allocator rounds to, and a weak reference takes them off again when the storage is freed. It works on meta
tensors, where nothing is computed, and on CPU tensors, which is how it is checked against a real allocator.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sdfit.backends.trace.recall import run_on_meta
from sdfit.equation.weights import rounded
from sdfit.errors import InvalidWorkload
from sdfit.predict.simulation.meter import Meter

_VIEWS = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
"""What a host may do with its own tensors."""
Operation = Callable[[Any, tuple[Any, ...], Any], None]


class FollowStorages(TorchDispatchMode):
    """Feed a `Meter` with the storages on one kind of device.

    Parameters
    ----------
    meter : Meter
    device : str
        The device type to count, ``meta`` or ``cpu``. Tensors elsewhere stand for host memory.
    workspace : callable, optional
        ``workspace(func, args, out) -> bytes`` that the kernel of this operation holds while it runs.
    after : callable, optional
        ``after(func, args, out)`` is called after each operation, with the outputs already counted.
    size : callable
        ``size(nbytes) -> bytes`` that a storage counts as; by default as the allocator rounds it.
    """

    def __init__(
        self,
        meter: Meter,
        device: str = "meta",
        *,
        workspace: Callable[[Any, tuple[Any, ...], Any], int] | None = None,
        after: Operation | None = None,
        size: Callable[[int], int] = rounded,
    ) -> None:
        super().__init__()
        self.meter, self.device = meter, device
        self.workspace, self.after, self._size = workspace, after, size
        self._known: dict[int, Any] = {}
        self._host: frozenset[int] = frozenset()
        self._blocks: dict[int, int] = {}
        self._paused = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled under this mode, so PyTorch need not guard every operation against it (from 2.9 on it asks)."""
        return False

    def ignore(self, tensor: torch.Tensor) -> None:
        """Never count this tensor's storage: it is counted elsewhere (the weights)."""
        self._known[tensor.untyped_storage()._cdata] = tensor

    def keep_apart(self, tensors: list[torch.Tensor]) -> None:
        """Stand-ins for what is in host memory: an operation on one is refused."""
        self._host = frozenset(t.untyped_storage()._cdata for t in tensors)

    def block_of(self, tensor: torch.Tensor) -> int:
        """The block that a tensor's storage is; 0 if it is counted elsewhere."""
        return self._blocks.get(tensor.untyped_storage()._cdata, 0)

    def made(
        self, shape: tuple[int, ...], stride: tuple[int, ...] | None, dtype: torch.dtype, *, block: int
    ) -> torch.Tensor:
        """Make a tensor in a block that is counted already, and follow it from now on."""
        self._paused = True
        try:
            if stride is None:
                tensor = torch.empty(shape, dtype=dtype, device=self.device)
            else:
                tensor = torch.empty_strided(shape, stride, dtype=dtype, device=self.device)
        finally:
            self._paused = False
        self._follow(tensor.untyped_storage(), block)
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._host:
            self._check_place(func, args)
        if self._paused:
            return func(*args, **kwargs)
        if self.device == "meta":
            stand_in = _leaves_the_device(func, args, kwargs)
            if stand_in is not None:
                return stand_in
        out = run_on_meta(func, args, kwargs) if self.device == "meta" else func(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            self._see(out)
        elif isinstance(out, tuple | list):
            for part in out:
                if isinstance(part, torch.Tensor):
                    self._see(part)
        if self.workspace is not None:
            scratch = self.workspace(func, args, out)
            if scratch:
                self.meter.passing(scratch)
        if self.after is not None:
            self.after(func, args, out)
        return out

    def _check_place(self, func: Any, args: tuple[Any, ...]) -> None:
        if func not in _VIEWS and any(
            isinstance(arg, torch.Tensor) and arg.untyped_storage()._cdata in self._host for arg in args
        ):
            raise InvalidWorkload(
                f"this fails in diffusers itself: {func} meets a weight that its offload left in host memory; take "
                "another offload"
            )

    def _see(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        if hasattr(tensor, "__tensor_flatten__"):  # what is made of tensors has no memory beside theirs
            for name in tensor.__tensor_flatten__()[0]:
                self._see(getattr(tensor, name))
            return
        self._follow(storage, self.meter.allocate(self._size(storage.nbytes())))

    def _follow(self, storage: Any, block: int) -> None:
        key, size = storage._cdata, self._size(storage.nbytes())
        known, blocks, meter = self._known, self._blocks, self.meter

        def gone(_: Any) -> None:
            del known[key], blocks[key]
            meter.free(block, size)

        known[key], blocks[key] = weakref.ref(storage, gone), block


def _leaves_the_device(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer for meta tensors what only a value could answer: zero. None if the operation stays on the device."""
    aten = torch.ops.aten
    if func is aten._local_scalar_dense.default and args[0].is_meta:
        return 0.0 if args[0].is_floating_point() else 0
    if func is aten._to_copy.default and args[0].is_meta:
        target = kwargs.get("device")
        if target is not None and target.type == "cpu":
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    return None


class AsOnACard(TorchFunctionMode):
    """Let functions that PyTorch runs in another way on meta tensors, or under a dispatch mode, run as on a card.

    `linear` of a batch that is no contiguous block is a matrix product to which the bias is added in place; under a
    dispatch mode PyTorch adds it into a new tensor. In the VAE's attention query, key and value come about like this.

    `scaled_dot_product_attention` is a kernel that PyTorch would pick on a card. ``kernel='fused'`` holds its output and the
    float32 log-sum-exp per query (flash and memory-efficient attention); ``kernel='math'`` runs PyTorch's own
    `_scaled_dot_product_attention_math`, operation by operation.
    """

    def __init__(self, kernel: str = "fused") -> None:
        super().__init__()
        self.kernel = kernel

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            return _linear(*args, **kwargs)
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args[:3] if len(args) >= 3 else (kwargs["query"], kwargs["key"], kwargs["value"])
        if self.kernel == "math":
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            return torch.ops.aten._scaled_dot_product_attention_math(
                query, key, value, mask, 0.0, kwargs.get("is_causal", False), scale=kwargs.get("scale")
            )[0]
        batch, heads, rows = query.shape[:3]
        out = torch.empty(batch, rows, heads, value.shape[-1], dtype=query.dtype, device=query.device).transpose(1, 2)
        torch.empty(batch, heads, rows, dtype=torch.float32, device=query.device)  # the log-sum-exp is freed at once
        return out


def _linear(batch: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if bias is None or batch.dim() < 3 or batch.is_contiguous():
        return torch.nn.functional.linear(batch, weight, bias)
    return torch.matmul(batch, weight.t()).add_(bias)
