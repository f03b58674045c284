"""Which attention kernel really runs, noted while the pipeline runs and without taking memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode


@contextmanager
def kernels_noted(pipe: Any, found: dict[str, str]) -> Iterator[None]:
    """Note which kernel runs the first attention of the UNet and the VAE, on the tensors of the run itself.

    PyTorch is asked for its choice (`torch._fused_sdp_choice`, what `scaled_dot_product_attention` itself asks), which
    takes no memory. A processor that does not call it multiplies matrices itself and is noted as ``materialised``.
    """
    handles = []
    modes: list[_NoteChoice] = []

    def begin(name: str) -> Any:
        def hook(*_: Any) -> None:
            if name not in found and not modes:
                modes.append(_NoteChoice())
                modes[-1].__enter__()

        return hook

    def end(name: str) -> Any:
        def hook(*_: Any) -> None:
            if modes and name not in found:
                mode = modes.pop()
                mode.__exit__(None, None, None)
                found[name] = mode.choice or "materialised"

        return hook

    for name, module in first_attentions(pipe).items():
        handles.append(module.register_forward_pre_hook(begin(name)))
        handles.append(module.register_forward_hook(end(name)))
    try:
        yield
    finally:
        for mode in modes:  # the attention itself ran out of memory
            mode.__exit__(None, None, None)
        for handle in handles:
            handle.remove()


def first_attentions(pipe: Any) -> dict[str, Any]:
    """The UNet's first self-attention, the largest one, and the VAE's, where it has one."""
    found = {"unet": next(m for n, m in pipe.unet.named_modules() if n.endswith("attn1"))}
    mid = getattr(pipe.vae.decoder, "mid_block", None)
    if mid is not None and mid.attentions and mid.attentions[0] is not None:
        found["vae"] = mid.attentions[0]
    return found


class _NoteChoice(TorchFunctionMode):
    choice: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.choice = SDPBackend(torch._fused_sdp_choice(*args, **kwargs)).name.lower()
        return func(*args, **kwargs)
