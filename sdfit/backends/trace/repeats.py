"""Calls of modules that need not run: in one run, repeats of a call; from run to run, calls whose program is known.

Denoising steps, VAE slices and VAE tiles repeat the same operations on the same shapes; their peak above what was live
before is the same. From one run to the next the same module runs on other shapes: then its `sdfit.predict.simulation.programs`
gives what it takes. The text encoder and the safety checker do the same for every batch of one size, and are remembered
as they were. All of it is exact, and held against plain runs by tests.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sdfit.backends.boundaries import watched
from sdfit.backends.trace.meter import FollowStorages, Meter, Span
from sdfit.equation.weights import rounded
from sdfit.predict.simulation.programs import (
    DECODER,
    ENCODER,
    UNET,
    Convolution,
    Lengths,
    Program,
    Recorded,
    Taken,
    find,
    probes,
    sides,
)
from sdfit.workload import Workload

WORTH_FINDING = 2
"""Calls of a module after which its program is looked for, which takes three more: for a sweep, where hundreds follow."""
_TIMESTEP = torch.int64
_WHOLE = ("sdpa", "eager", "math")
"""Attention that runs the same operations for any number of images, from two on."""
_HANDED_THROUGH = "images"
"""The safety checker blackens these where it finds something, which it never does in a trace: their size is nothing to it."""


@dataclass(slots=True)
class Known:
    """What is known of a tracer's modules from earlier runs.

    Parameters
    ----------
    patience : int
        Calls of a module at sizes of its own, after which its program is looked for.
    """

    patience: int = WORTH_FINDING
    programs: dict[Hashable, Program | None] = field(default_factory=dict)
    calls: dict[Hashable, tuple[Taken, Any]] = field(default_factory=dict)
    wanted: dict[Hashable, int] = field(default_factory=dict)

    def learn(self, pipe: Any, workload: Workload) -> None:
        """Look for the programs that were wanted often enough, with the pipeline set to a workload's variant."""
        for key, count in list(self.wanted.items()):
            if count >= self.patience:
                del self.wanted[key]
                kind, batch, exact, even = key[0], key[1], key[2], key[3]  # type: ignore[index]
                runs = [(at, _record(pipe, kind, at)) for at in probes(kind, batch, exact=exact, even=even)]
                self.programs[key] = find(kind, workload.dtype, runs)


@contextmanager
def skipped(
    pipe: Any, workload: Workload, follow: FollowStorages, known: Known | None, workspace: Any
) -> Iterator[None]:
    """Run each module once per shape at most, and not at all where ``known`` says what it takes.

    Likewise one row of a blend between tiles stands for all of its rows. ``workspace`` is asked for those of convolutions
    (`sdfit.predict.simulation.workspaces.Workspaces`); without one there are none.
    """
    modules = {UNET: pipe.unet, ENCODER: pipe.vae.encoder, DECODER: pipe.vae.decoder}
    rest = [part for part in (pipe.text_encoder, pipe.safety_checker) if part is not None] if known else []
    blends = [name for name in ("blend_v", "blend_h") if hasattr(pipe.vae, name)]
    own = [(module, vars(module).get("forward")) for module in (*modules.values(), *rest)]  # that of a hook
    convolution = getattr(workspace, "convolution", None)
    for kind, module in modules.items():
        module.forward = _once_per_shape(module.forward, kind, workload, follow, known, convolution)
    for part in rest:
        assert known is not None
        part.forward = _remembered(part.forward, (type(part).__name__, workspace), workload, follow, known)
    for name in blends:
        setattr(pipe.vae, name, _first_row(getattr(pipe.vae, name)))
    try:
        yield
    finally:
        for module, forward in own:
            del module.forward
            if forward is not None:
                module.forward = forward
        for name in blends:
            delattr(pipe.vae, name)


def _once_per_shape(
    forward: Callable[..., Any],
    kind: str,
    workload: Workload,
    follow: FollowStorages,
    known: Known | None,
    convolution: Convolution | None,
) -> Callable[..., Any]:
    meter = follow.meter
    seen: dict[Any, tuple[Span, list[torch.Size], bool]] = {}

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        shapes = tuple(t.shape for t in tensors)
        if shapes not in seen:
            program, lengths = _program(kind, workload, args, kwargs, known)
            if program is not None:
                taken, shape = program.call(lengths, convolution, keep_events=meter.events is not None)
                span, blocks = meter.play(taken)
                made = follow.made(shape, None, tensors[0].dtype, block=next(iter(blocks), 0))
                out: Any = (made,) if kind == UNET else made
            else:
                out, span = meter.measure(lambda: forward(*args, **kwargs))
            many = isinstance(out, tuple)
            seen[shapes] = (span, [t.shape for t in (out if many else (out,))], many)
            return out
        span, outputs, many = seen[shapes]
        meter.repeat(span)
        again = tuple(torch.empty(shape, dtype=tensors[0].dtype, device="meta") for shape in outputs)
        return again if many else again[0]

    return run


def _program(
    kind: str, workload: Workload, args: tuple[Any, ...], kwargs: dict[str, Any], known: Known | None
) -> tuple[Program | None, Lengths]:
    """The program of a call, if it is of the kind that a pipeline makes; notes that one is wanted."""
    sample = args[0] if args and isinstance(args[0], torch.Tensor) else None
    nothing = Lengths(0, 0, 0, 0)
    if known is None or sample is None or sample.ndim != 4 or (kind != UNET and workload.vae != "kl"):
        return None, nothing
    batch, _, height, width = sample.shape
    tokens = 1
    if kind == UNET:
        plain = {name: value for name, value in kwargs.items() if name != "encoder_hidden_states"}
        text = kwargs.get("encoder_hidden_states")
        if len(args) != 2 or text is None or args[1].dtype != _TIMESTEP or any(plain.values()):
            return None, nothing
        tokens = text.shape[1]
    elif len(args) != 1 or any(value is not None for value in kwargs.values()):
        return None, nothing
    scale = 8 if kind == ENCODER else 1
    if min(sides(height, kind)[1:] + sides(width, kind)[1:]) == 1:  # what has one pixel is laid out in any order
        return None, nothing
    exact = workload.attention not in _WHOLE  # slices are as many as there are images
    even = height % (8 * scale) == 0 and width % (8 * scale) == 0
    key = (
        kind,
        batch if exact else min(batch, 2),
        exact,
        even,
        workload.dtype,
        workload.attention,
        sample.is_contiguous(),
    )
    if key not in known.programs:
        known.wanted[key] = known.wanted.get(key, 0) + 1
    return known.programs.get(key), Lengths(batch, height, width, tokens)


def _record(pipe: Any, kind: str, at: Lengths) -> Recorded:
    """Run a module once by itself, and write down every block that it makes."""
    meter = Meter(keep_events=True)
    assert meter.events is not None
    events = meter.events
    convolutions: dict[int, tuple[tuple[int, ...], ...]] = {}
    marks: list[tuple[int, str]] = []

    def workspace(func: Any, args: tuple[Any, ...], out: Any) -> int:
        if func.name() != "aten::convolution":
            return 0
        convolutions[meter.blocks + 1] = (tuple(args[0].shape), tuple(args[1].shape), tuple(out.shape))
        return 1

    module = {UNET: pipe.unet, ENCODER: pipe.vae.encoder, DECODER: pipe.vae.decoder}[kind]
    follow = FollowStorages(meter, workspace=workspace, size=int)
    for tensor in (*module.parameters(), *module.buffers()):
        follow.ignore(tensor)
    dtype = next(module.parameters()).dtype
    channels = 3 if kind == ENCODER else module.config.in_channels if kind == UNET else module.conv_in.in_channels
    sample = torch.empty(at.batch, channels, at.height, at.width, dtype=dtype, device="meta")
    inputs: dict[str, Any] = {}
    arguments: list[Any] = [sample]
    if kind == UNET:
        width = module.config.cross_attention_dim
        text = torch.empty(at.batch, at.tokens, width, dtype=dtype, device="meta")
        inputs = {"encoder_hidden_states": text, "return_dict": False}
        arguments.append(torch.zeros((), dtype=_TIMESTEP))
        follow.ignore(text)
    follow.ignore(sample)
    with torch.no_grad(), watched(pipe, lambda stage: marks.append((len(events), stage))), follow:
        del marks[:]
        out = module(*arguments, **inputs)
        happened = list(events)
    out = out[0] if isinstance(out, tuple) else out
    there = {block for block, size in happened if size > 0} - {block for block, size in happened if size < 0}
    return Recorded(happened, convolutions, marks, there.pop() if len(there) == 1 else 0, tuple(out.shape))


def _remembered(
    forward: Callable[..., Any], name: Hashable, workload: Workload, follow: FollowStorages, known: Known
) -> Callable[..., Any]:
    """A call that is the same for each batch of one size: run once, then recalled as it was."""
    meter = follow.meter

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            facts = _facts((args, {name: value for name, value in kwargs.items() if name != _HANDED_THROUGH}))
            key = (name, workload.dtype, workload.attention, meter.events is not None, facts)
        except TypeError:
            return forward(*args, **kwargs)
        if key in known.calls:
            taken, form = known.calls[key]
            _, blocks = meter.play(taken)
            return _made(form, (args, kwargs), follow, iter(blocks))
        first, before = meter.blocks, meter.live_bytes
        out, span = meter.measure(lambda: forward(*args, **kwargs))
        try:
            form = _form(out, (args, kwargs))
        except TypeError:
            return out
        given = {id(tensor) for tensor in _tensors((args, kwargs))}
        made = [tensor for tensor in _tensors(out) if id(tensor) not in given]
        left = meter.live_bytes - before
        if left == sum(rounded(tensor.untyped_storage().nbytes()) for tensor in made):
            events = [(block - first, size) for block, size in span.events]
            held = frozenset(block - first for block in meter.workspaces if block > first)
            where = tuple(follow.block_of(tensor) - first for tensor in made)
            if all(block > 0 for block, _ in events):
                known.calls[key] = (Taken(span.peaks_bytes, span.last_stage, left, events, where, held), form)
        return out

    return run


def _facts(value: Any) -> Hashable:
    """What a call's memory can depend on, of its arguments."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.stride(), value.dtype, value.device.type)
    if isinstance(value, np.ndarray):
        return ("array", value.shape)
    if isinstance(value, tuple | list):
        return tuple(map(_facts, value))
    if isinstance(value, dict):
        return tuple((name, _facts(part)) for name, part in value.items())
    if value is None or isinstance(value, bool | int | float | str):
        return (type(value).__name__, value)
    raise TypeError(f"a {type(value).__name__}")


def _tensors(out: Any) -> Iterator[torch.Tensor]:
    """The tensors of a result on the device, in a fixed order."""
    if isinstance(out, torch.Tensor):
        yield out
    elif isinstance(out, dict):
        for part in out.values():
            yield from _tensors(part)
    elif isinstance(out, tuple | list):
        for part in out:
            yield from _tensors(part)


def _form(out: Any, given: Any) -> Any:
    """How to make a result again: its tensors by their layout, what was handed through by where it came from."""
    args, kwargs = given
    where = next((name for name, value in (*enumerate(args), *kwargs.items()) if value is out), None)
    if isinstance(out, torch.Tensor | np.ndarray) and where is not None:
        return ("argument", where)
    if isinstance(out, torch.Tensor) and out.is_meta:
        return ("tensor", tuple(out.shape), out.stride(), out.dtype)
    if isinstance(out, dict):
        return ("fields", type(out), {name: _form(part, given) for name, part in out.items()})
    if isinstance(out, tuple | list):
        return ("sequence", type(out), [_form(part, given) for part in out])
    if out is None or isinstance(out, bool | int | float | str):
        return ("value", out)
    raise TypeError(f"a {type(out).__name__}")


def _made(form: Any, given: Any, follow: FollowStorages, blocks: Iterator[int]) -> Any:
    """A result by its form; its tensors are in these blocks, which are counted already."""
    kind, *what = form
    if kind == "tensor":
        return follow.made(*what, block=next(blocks, 0))
    if kind == "argument":
        args, kwargs = given
        return args[what[0]] if isinstance(what[0], int) else kwargs[what[0]]
    if kind == "fields":
        return what[0](**{name: _made(part, given, follow, blocks) for name, part in what[1].items()})
    if kind == "sequence":
        return what[0](_made(part, given, follow, blocks) for part in what[1])
    return what[0]


def _first_row(blend: Callable[..., Any]) -> Callable[..., Any]:
    def run(a: torch.Tensor, b: torch.Tensor, blend_extent: int) -> Any:
        return blend(a, b, min(blend_extent, 1))

    return run
