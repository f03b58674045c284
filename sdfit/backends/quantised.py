"""The UNet with the weights of its linear layers in 8 bits, as optimum-quanto has them: on a card its own, on meta tensors its like.

diffusers' ``QuantoConfig(weights_dtype="int8")`` puts a `QLinear` in the place of each `torch.nn.Linear`. Its weight is whole
numbers of 8 bits and one scale for each output. When it runs, it makes the weight in the run's dtype anew, multiplies by that, and
adds the bias into another tensor (optimum-quanto 0.2.7, ``library/qbytes_mm.py``, what CUDA runs where activations are not
quantised too; ``tensor/weights/qbytes.py``). All of that is PyTorch's own operations, so a trace sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, cast

import torch

from sdfit.errors import SdfitError


class WidenedLinear(torch.nn.Module):
    """What a frozen `QLinear` holds and does, for tensors without values.

    Parameters
    ----------
    linear : torch.nn.Linear
        Whose place it takes.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        there: dict[str, Any] = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.in_features, self.out_features = linear.in_features, linear.out_features
        whole = torch.empty_like(linear.weight, dtype=torch.int8)
        self.weight = torch.nn.Parameter(whole, requires_grad=False)
        self.scale = torch.nn.Parameter(torch.empty(linear.out_features, 1, **there), requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("input_scale", torch.ones((), **there))
        self.register_buffer("output_scale", torch.ones((), **there))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `torch.nn.Linear`'s, with one more tensor for the weight, and one for the bias."""
        rows = input.reshape(-1, self.in_features)
        out = torch.matmul(rows, (self.scale * self.weight).t()).reshape(*input.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


def in_int8(unet: torch.nn.Module) -> None:
    """Put 8 bits into the linear layers of a UNet: one without values at once, another by optimum-quanto.

    Raises
    ------
    SdfitError
        If optimum-quanto is needed and not there.
    """
    meta = next(unet.parameters()).is_meta
    made: Callable[[torch.nn.Linear], torch.nn.Module] = WidenedLinear if meta else _quanto()
    for module in list(unet.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(module, name, made(child))


def _quanto() -> Callable[[torch.nn.Linear], torch.nn.Module]:
    try:
        quanto: Any = import_module("optimum.quanto")
    except ImportError as error:
        raise SdfitError("execution=int8 needs optimum-quanto on a card: pip install optimum-quanto") from error

    def made(linear: torch.nn.Linear) -> torch.nn.Module:
        found: Any = quanto.QLinear.from_module(linear, weights=quanto.qint8)
        found.freeze()
        return cast(torch.nn.Module, found)

    return made


def stored(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The tensors that hold a module's weights and buffers: of one that is made of several, those.

    Examples
    --------
    >>> [tuple(tensor.shape) for tensor in stored(torch.nn.Linear(2, 3))]
    [(3, 2), (3,)]
    """
    for tensor in (*module.parameters(), *module.buffers()):
        parts = getattr(tensor, "__tensor_flatten__", None)
        yield from [tensor] if parts is None else [getattr(tensor, name) for name in parts()[0]]
