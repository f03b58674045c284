"""Calls of modules that need not run: denoising steps, VAE slices and VAE tiles repeat the same operations on the same shapes.

Their peak above what was live before is the same, so one call per shape really runs. Exact, and held against plain runs
by tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sdfit.backends.trace.follow import FollowStorages
from sdfit.predict.simulation.meter import Span


@contextmanager
def skipped(pipe: Any, follow: FollowStorages) -> Iterator[None]:
    """Run each module once per shape at most; likewise one row of a blend between tiles stands for all of its rows."""
    modules = (pipe.unet, pipe.vae.encoder, pipe.vae.decoder)
    blends = [name for name in ("blend_v", "blend_h") if hasattr(pipe.vae, name)]
    with forwards_replaced((module, _once_per_shape(module.forward, follow)) for module in modules):
        for name in blends:
            setattr(pipe.vae, name, _first_row(getattr(pipe.vae, name)))
        try:
            yield
        finally:
            for name in blends:
                delattr(pipe.vae, name)


@contextmanager
def forwards_replaced(replacements: Iterable[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    """Give modules other ``forward`` methods, and afterwards their own back: that of a hook, or the class's."""
    own = []
    try:
        for module, forward in replacements:
            own.append((module, vars(module).get("forward")))
            module.forward = forward
        yield
    finally:
        for module, before in own:
            del module.forward
            if before is not None:
                module.forward = before


def _once_per_shape(forward: Callable[..., Any], follow: FollowStorages) -> Callable[..., Any]:
    meter = follow.meter
    seen: dict[Any, tuple[Span, list[torch.Size], bool]] = {}

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        shapes = tuple(t.shape for t in tensors)
        if shapes not in seen:
            out, span = meter.measure(lambda: forward(*args, **kwargs))
            many = isinstance(out, tuple)
            seen[shapes] = (span, [t.shape for t in (out if many else (out,))], many)
            return out
        span, outputs, many = seen[shapes]
        meter.repeat(span)
        again = tuple(torch.empty(shape, dtype=tensors[0].dtype, device="meta") for shape in outputs)
        return again if many else again[0]

    return run


def _first_row(blend: Callable[..., Any]) -> Callable[..., Any]:
    def run(a: torch.Tensor, b: torch.Tensor, blend_extent: int) -> Any:
        return blend(a, b, min(blend_extent, 1))

    return run
