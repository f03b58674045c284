"""Find the programs of the pipeline's modules (`sdfit.predict.simulation.programs`) from runs of the real ones.

A module whose runs do not line up, or with a size that is no product of the lengths, has no program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import pairwise, product
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from diffusers.models.attention_processor import Attention

from sdfit.backends.boundaries import watched
from sdfit.backends.pipeline import variant_applied
from sdfit.backends.trace.follow import AsOnACard, FollowStorages
from sdfit.backends.trace.streaming import moved
from sdfit.backends.trace.tracer import Tracer
from sdfit.equation.stages import STAGES
from sdfit.predict.simulation.meter import Meter
from sdfit.predict.simulation.programs import (
    CHECKER,
    DECODER,
    ENCODER,
    PICTURE,
    TEXT,
    UNET,
    Layer,
    Lengths,
    Program,
    Shape,
    sides,
)
from sdfit.workload import CHUNK_TOKENS, SLICES, STREAMED, VAE_SCALE, Workload

_PROBES = {True: ((56, 88, 77), (104, 72, 154), (72, 136, 231)), False: ((59, 91, 77), (107, 75, 154), (77, 133, 231))}
"""Height and width of the latents, and tokens: what a program is found from, where the latents are multiples of 8 and not."""
_PROBE_BATCHES = (3, 5, 4)


class Recorded(NamedTuple):
    """One run of the real module.

    ``events`` hold (block, bytes) not rounded, those of a convolution's workspace (block, 1) and (block, -1);
    ``convolutions`` the shapes of its operands by that block; ``made`` the blocks that are there afterwards; ``calls`` and
    ``modules`` as of a `Program`.
    """

    events: list[tuple[int, int]]
    convolutions: dict[int, tuple[tuple[int, ...], ...]]
    marks: list[tuple[int, str]]
    made: tuple[int, ...]
    slices: list[list[int]]
    """Of each attention in slices, the events at which they begin."""
    calls: Sequence[int] = ()
    modules: Sequence[int] = ()


def probes(kind: str, *, single: bool, even: bool) -> list[Lengths]:
    """List the sizes that a program is found from.

    Parameters
    ----------
    kind : str
        Of `sdfit.predict.simulation.programs.KINDS`.
    single : bool
        One image or sample, which runs other operations than several.
    even : bool
        Whether the latents are multiples of 8.

    Examples
    --------
    >>> probes("encoder", single=False, even=True)[0]
    Lengths(batch=3, height=448, width=704, tokens=77)
    """
    batches = (1,) * 3 if single else _PROBE_BATCHES
    if kind in (TEXT, CHECKER):
        side = PICTURE if kind == CHECKER else 1
        return [Lengths(batch, side, side) for batch in batches]
    scale = VAE_SCALE if kind == ENCODER else 1
    return [Lengths(b, h * scale, w * scale, t) for b, (h, w, t) in zip(batches, _PROBES[even], strict=True)]


def record(tracer: Tracer, workload: Workload, kind: str, at: Lengths) -> Recorded:
    """Run a module of a workload's pipeline once by itself, and write down every block that it makes."""
    pipe = tracer.pipeline(workload)
    meter = Meter(keep_events=True)
    assert meter.events is not None
    events = meter.events
    convolutions: dict[int, tuple[tuple[int, ...], ...]] = {}
    marks: list[tuple[int, str]] = []
    slices: list[list[int]] = []

    def workspace(func: Any, args: tuple[Any, ...], out: Any) -> int:
        if func.name() != "aten::convolution":
            return 0
        convolutions[meter.blocks + 1] = (tuple(args[0].shape), tuple(args[1].shape), tuple(out.shape))
        return 1

    part, module, arguments, inputs = _called(pipe, kind, at)
    follow = FollowStorages(meter, workspace=workspace, size=int)
    for tensor in (*module.parameters(), *module.buffers(), *arguments, *inputs.values()):
        if isinstance(tensor, torch.Tensor):
            follow.ignore(tensor)
    as_on_a_card = AsOnACard("math" if workload.attention == "math" else "fused")
    sliced = _slices_noted(slices, events) if workload.attention in SLICES else nullcontext()
    stages = watched(pipe, lambda stage: marks.append((len(events), stage)), streamed=True)
    calls: list[tuple[int, int]] = []
    noted = _calls_noted(movers(part), lambda number: calls.append((len(events), number)))
    with torch.no_grad(), variant_applied(pipe, workload), as_on_a_card, stages, noted, sliced, follow:
        out = module(*arguments, **inputs)
        happened = list(events)
        results = out.values() if isinstance(out, dict) else out if isinstance(out, tuple) else (out,)
        made = tuple(follow.block_of(t) for t in results if isinstance(t, torch.Tensor) and t.is_meta)
    there = {block for block, size in happened if size > 0} - {block for block, size in happened if size < 0}
    if there != set(made) - {0}:
        raise AssertionError(f"{kind} leaves more than its results")
    return Recorded(
        happened,
        convolutions,
        marks[1:] or [(0, STAGES[0])],
        tuple(b for b in made if b),
        slices,
        [position for position, _ in calls],
        [number for _, number in calls],
    )


@cache
def movers(part: Any) -> dict[Any, int]:
    """The modules of a component with which weights come and go under some offload, by their numbers from 1."""
    found = {module for offload in STREAMED for module, _ in moved(part, offload)}
    return {module: number for number, module in enumerate(part.modules(), 1) if module in found}


@contextmanager
def _calls_noted(numbers: dict[Any, int], note: Callable[[int], None]) -> Iterator[None]:
    """Note when each of these modules is called, and when it is done, as the hooks of an offload are."""
    handles = []
    for module, number in numbers.items():
        handles.append(module.register_forward_pre_hook(lambda *_, number=number: note(number)))
        handles.append(module.register_forward_hook(lambda *_, number=number: note(-number)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _called(pipe: Any, kind: str, at: Lengths) -> tuple[Any, Any, list[Any], dict[str, Any]]:
    """A component, its module, and what the pipeline calls it with."""

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    dtype = pipe.unet.dtype
    if kind == TEXT:
        return (
            pipe.text_encoder,
            pipe.text_encoder,
            [empty(at.batch, CHUNK_TOKENS, dtype=torch.int64)],
            {"attention_mask": None},
        )
    if kind == CHECKER:
        picture = empty(at.batch, 3, at.height, at.width, dtype=dtype)
        inputs = {"images": np.zeros((at.batch, 1)), "clip_input": picture}
        return pipe.safety_checker, pipe.safety_checker, [], inputs
    latents = pipe.unet.config.in_channels
    if kind == UNET:
        text = empty(at.batch, at.tokens, pipe.unet.config.cross_attention_dim, dtype=dtype)
        sample = empty(at.batch, latents, at.height, at.width, dtype=dtype)
        step = torch.zeros((), dtype=torch.int64)
        return pipe.unet, pipe.unet, [sample, step], {"encoder_hidden_states": text, "return_dict": False}
    sample = empty(at.batch, 3 if kind == ENCODER else latents, at.height, at.width, dtype=dtype)
    return pipe.vae, {ENCODER: pipe.vae.encoder, DECODER: pipe.vae.decoder}[kind], [sample], {}


@contextmanager
def _slices_noted(slices: list[list[int]], events: list[tuple[int, int]]) -> Iterator[None]:
    """Note after how many events each slice of each attention begins."""
    scores = Attention.get_attention_scores
    last: list[Any] = [None]

    def noted(attention: Any, *args: Any) -> Any:
        if attention is not last[0]:
            last[0] = attention
            slices.append([])
        slices[-1].append(len(events))
        return scores(attention, *args)

    with patch.object(Attention, "get_attention_scores", noted):
        yield


def _of_three_slices(run: Recorded) -> tuple[Recorded, tuple[tuple[int, int, int], ...]]:
    """The run with the first two slices and the last one of each attention, and at which events they begin."""
    events: list[tuple[int, int]] = []
    loops: list[tuple[int, int, int]] = []
    numbers: dict[int, int] = {}
    born: list[int] = []

    def keep(first: int, end: int) -> int:
        for block, size in run.events[first:end]:
            if size > 0:
                born.append(block)
                numbers[block] = len(born)
            events.append((numbers[block], size))
        return len(events)

    def births(first: int, end: int) -> list[int]:
        return [block for block, size in run.events[first:end] if size > 0]

    position = 0
    for begins in run.slices:
        second = births(begins[1], begins[2])
        if len({tuple(size for _, size in run.events[a:b]) for a, b in pairwise(begins[1:])}) != 1:
            raise AssertionError("slices differ from one another")
        loops.append((keep(position, begins[0]), keep(begins[0], begins[1]), keep(begins[1], begins[2])))
        for left_out, kept in zip(births(begins[-2], begins[-1]), second, strict=True):
            numbers[left_out] = numbers[kept]
        position = begins[-1]
    keep(position, len(run.events))
    convolutions = {numbers[block]: shapes for block, shapes in run.convolutions.items()}
    made = tuple(numbers[block] for block in run.made)

    def shortened(position: int) -> int:
        return position - sum(begins[-1] - begins[2] for begins in run.slices if position >= begins[-1])

    marks = [(shortened(first), stage) for first, stage in run.marks]
    shorter = run._replace(events=events, convolutions=convolutions, made=made, marks=marks)
    return shorter._replace(calls=[shortened(position) for position in run.calls]), tuple(loops)


def find(kind: str, runs: Sequence[tuple[Lengths, Recorded]], heads_at_once: int = 0) -> Program | None:
    """Find a module's program from runs of it at several sizes.

    Parameters
    ----------
    kind : str
    runs : sequence of (Lengths, Recorded)
    heads_at_once : int
        Heads in a slice of the attention; 0 if it is computed whole.

    Returns
    -------
    Program or None
        None if the runs do not line up, or a size is no product of the lengths.
    """
    loops: tuple[tuple[int, int, int], ...] = ()
    if heads_at_once and runs[0][0].batch > 1:
        three = [(at, *_of_three_slices(run)) for at, run in runs]
        loops = three[0][2]
        if any(other != loops for *_, other in three):
            return None
        runs = [(at, run) for at, run, _ in three]
    first = runs[0][1]
    orders = [[(block, size > 0) for block, size in run.events] for _, run in runs]
    if any(order != orders[0] for order in orders) or any(
        (run.marks, run.made, run.calls, run.modules, sorted(run.convolutions))
        != (first.marks, first.made, first.calls, first.modules, sorted(first.convolutions))
        for _, run in runs
    ):
        return None
    amounts: dict[tuple[int, ...], int] = {}
    layers: dict[Any, int] = {}
    steps: list[tuple[int, int]] = []
    born = 0
    for position, (block, size) in enumerate(first.events):
        if size < 0:
            steps.append((0, block - born - 1))
            continue
        born += 1
        if block != born:
            raise AssertionError("blocks are numbered as they are born")
        if block in first.convolutions:
            shapes = tuple(run.convolutions[block] for _, run in runs)
            steps.append((1, layers.setdefault(shapes, len(layers))))
        else:
            sizes = tuple(run.events[position][1] for _, run in runs)
            steps.append((0, amounts.setdefault(sizes, len(amounts))))
    lengths = [one for one, _ in runs]
    products = [_product(kind, lengths, sizes) for sizes in amounts]
    found = [
        (_shape(kind, lengths, [s[0] for s in many]), many[0][1], _shape(kind, lengths, [s[2] for s in many]))
        for many in layers
    ]
    convolutions = [Layer(image, weight, out) for image, weight, out in found if image is not None and out is not None]
    if None in products or len(convolutions) < len(found):
        return None
    return Program(
        kind,
        np.array([number + len(amounts) * is_layer for is_layer, number in steps]),
        np.array(products, dtype=np.int64),
        tuple(convolutions),
        tuple(first.marks),
        first.made,
        np.array(first.calls, dtype=np.int64),
        np.array(first.modules, dtype=np.int64),
        loops,
        heads_at_once if loops else 0,
    )


def _product(kind: str, lengths: Sequence[Lengths], sizes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Factor, powers of batch, tokens and area, and which area: the first product that gives all sizes [bytes]."""
    areas = [[h * w for h, w in zip(sides(one.height, kind), sides(one.width, kind), strict=True)] for one in lengths]
    for of_batch, of_tokens, of_area in product((1, 0), (0, 1), (1, 2, 0)):
        for level in range(1, len(areas[0])) if of_area else (0,):
            units = [
                one.batch**of_batch * one.tokens**of_tokens * area[level] ** of_area
                for one, area in zip(lengths, areas, strict=True)
            ]
            factor, rest = divmod(sizes[0], units[0])
            if not rest and all(size == factor * unit for size, unit in zip(sizes, units, strict=True)):
                return factor, of_batch, of_tokens, of_area, level
    return None


def _shape(kind: str, lengths: Sequence[Lengths], shapes: Sequence[tuple[int, ...]]) -> Shape | None:
    """The shape of a tensor that was this one at these lengths."""
    channels = {shape[1] for shape in shapes}
    along = [list(zip(sides(one.height, kind), sides(one.width, kind), strict=True)) for one in lengths]
    levels = [
        level
        for level in range(len(along[0]))
        if all(pair[level] == shape[2:] for pair, shape in zip(along, shapes, strict=True))
    ]
    batches = {shape[0] for shape in shapes}
    if all(shape[0] == one.batch for shape, one in zip(shapes, lengths, strict=True)):
        batches = {0}
    if len(channels) != 1 or len(batches) != 1 or not levels:
        return None
    return Shape(batches.pop(), channels.pop(), levels[0])
