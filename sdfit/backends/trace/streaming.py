"""Weights that come to the card module by module, on meta tensors: accelerate's and diffusers' own hooks.

`enable_sequential_cpu_offload` (accelerate's `AlignDevicesHook`) and `enable_group_offload` (diffusers'
`GroupOffloadingHook`) decide which module's weights come when, and go when. They are attached here as the pipeline attaches
them; only the copy itself is replaced, because on the meta device host and card are one: a weight that comes is a new
tensor, which the meter counts, and one that goes is the stand-in that it was before, which nobody counts. An operation
that meets such a stand-in would mix host and card, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch

from sdfit.backends.pipeline import GROUPS
from sdfit.equation.stages import COMPONENTS, RESIDENT_WHEN_STREAMED
from sdfit.equation.weights import rounded

META = torch.device("meta")


@contextmanager
def streamed(pipe: Any, offload: str, follow: Any) -> Iterator[int]:
    """Let a pipeline's weights come and go as under an offload of `sdfit.workload.STREAMED`, for a ``with`` block.

    Parameters
    ----------
    follow : FollowStorages
        What counts the tensors that come.

    Yields
    ------
    int
        What is on the card all the time beside whole components: the buffers of the others [bytes].

    Notes
    -----
    accelerate empties the allocator's cache after each weight that it brings (`set_module_tensor_to_device`); the meter
    notes it. Buffers stay on the card under sequential offload.
    """
    parts = {name: part for name in COMPONENTS if (part := getattr(pipe, name, None)) is not None}
    moving = {name: part for name, part in parts.items() if name not in RESIDENT_WHEN_STREAMED[offload]}
    host = [t for part in moving.values() for t in (*part.parameters(), *_buffers(part, offload))]
    with ExitStack() as undo:
        for part in moving.values():
            undo.enter_context(_sequential(part, follow.meter) if offload == "sequential" else _grouped(part, offload))
        stay = [b for part in moving.values() for b in part.buffers()] if offload == "sequential" else []
        sizes = [rounded(b.untyped_storage().nbytes()) for b in stay]
        held = [follow.meter.allocate(size) for size in sizes]
        follow.keep_apart(host)
        try:
            yield sum(sizes)
        finally:
            follow.keep_apart([])
            for block, size in zip(held, sizes, strict=True):
                follow.meter.free(block, size)


def moved(part: Any, offload: str) -> list[tuple[Any, list[torch.Tensor]]]:
    """List the modules of a component that bring weights when they are called and send them back when they are done.

    Each with these weights, in the order in which they come and go; none for a component that stays.

    Raises
    ------
    AssertionError
        If one module brings what another sends back.
    """
    if offload == "sequential":
        own = ((module, [p for p in module._parameters.values() if p is not None]) for module in part.modules())
        return [(module, weights) for module, weights in own if weights]
    with _grouped(part, offload):
        groups = [(module, hook.group) for module in part.modules() if (hook := _group_hook(module)) is not None]
        if any(not (group.onload_leader is group.offload_leader is module) for module, group in groups):
            raise AssertionError("a group comes with one module and goes with another")
        return [(module, _tensors(group)) for module, group in groups]


def _buffers(part: Any, offload: str) -> list[torch.Tensor]:
    return [] if offload == "sequential" else list(part.buffers())


def _arrived(stand_in: torch.Tensor) -> torch.Tensor:
    """A copy on the card of what is in host memory."""
    return torch.empty(stand_in.shape, dtype=stand_in.dtype, device=META)


class _HostWeights(Mapping[str, torch.Tensor]):
    """The weights of a component in host memory; each look at one is a copy that goes to the card."""

    def __init__(self, part: Any, meter: Any) -> None:
        self._weights, self._meter = part.state_dict(keep_vars=True), meter

    def __getitem__(self, name: str) -> torch.Tensor:
        copy = _arrived(self._weights[name])
        self._meter.give_cache_back()
        return copy

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


@contextmanager
def _sequential(part: Any, meter: Any) -> Iterator[None]:
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    before = [(module, dict(module._parameters), vars(module).get("forward")) for module in part.modules()]
    cpu_offload(part, META, offload_buffers=len(part._parameters) > 0, state_dict=_HostWeights(part, meter))
    for module, stand_ins, _ in before:
        hook: Any = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "offload", False):
                one.post_forward = _back_to_host(one.post_forward, stand_ins)
    try:
        yield
    finally:
        remove_hook_from_module(part, recurse=True)
        for module, stand_ins, forward in before:
            module._parameters.update(stand_ins)
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


def _back_to_host(post_forward: Callable[..., Any], stand_ins: dict[str, Any]) -> Callable[..., Any]:
    def run(module: Any, output: Any) -> Any:
        output = post_forward(module, output)
        module._parameters.update(stand_ins)
        return output

    return run


def _no_accelerator(group_offloading: Any) -> AbstractContextManager[Any]:
    """Let diffusers find an accelerator's module, of which it uses nothing without streams: there is none for meta."""
    if hasattr(group_offloading, "TorchDeviceBackend"):
        return patch.object(group_offloading, "TorchDeviceBackend", lambda device: None)
    if hasattr(torch, "accelerator"):  # diffusers before 0.41 asks PyTorch
        return patch.object(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    return nullcontext()


@contextmanager
def _grouped(part: Any, offload: str) -> Iterator[None]:
    from diffusers.hooks import apply_group_offloading, group_offloading

    apply = getattr(part, "enable_group_offload", None)
    forwards = [(module, vars(module).get("forward")) for module in part.modules()]
    with _no_accelerator(group_offloading):
        if apply is not None:
            apply(onload_device=META, offload_device=META, **GROUPS[offload])
        else:
            apply_group_offloading(part, onload_device=META, offload_device=META, **GROUPS[offload])
    for module in part.modules():
        hook = _group_hook(module)
        if hook is not None:
            _counted(hook.group)
    try:
        # a timestep is in host memory here, on a card it is on the card: no hook copies it
        with patch.object(group_offloading, "send_to_device", lambda given, *_, **__: given):
            yield
    finally:
        for module, forward in forwards:
            vars(module).pop("_diffusers_hook", None)
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


def _group_hook(module: Any) -> Any:
    registry = getattr(module, "_diffusers_hook", None)
    return registry.get_hook("group_offloading") if registry is not None else None


def _tensors(group: Any) -> list[torch.Tensor]:
    """Of a group, each once: what a group of unmatched modules lists twice is there already the second time."""
    tensors = [t for module in group.modules for t in (*module.parameters(), *module.buffers())]
    return list({id(t): t for t in (*tensors, *group.parameters, *group.buffers)}.values())


def _counted(group: Any) -> None:
    """Replace how a group's tensors are copied; which, and when, stays diffusers' own."""
    tensors = _tensors(group)
    stand_ins = [t.data for t in tensors]

    def come() -> None:
        for tensor, stand_in in zip(tensors, stand_ins, strict=True):
            tensor.data = _arrived(stand_in)

    def go() -> None:
        for tensor, stand_in in zip(tensors, stand_ins, strict=True):
            tensor.data = stand_in

    group._onload_from_memory, group._offload_to_memory = come, go
