"""Kernel workspaces measured operator by operator, for the table in `sdfit.predict.simulation.workspaces`.

Each convolution and attention call that a pipeline makes is run alone on the card: what the peak holds beyond the
inputs that were there and the output that stays is what its kernel took. A trace tells which shapes occur. Rows are
appended as they come; those that the file holds already are not run again.

What it does not know: a plan may be chosen by how much memory is free, so a call alone on an empty card can take more
than the same call in a full pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from sdfit.backends.counters import Counters
from sdfit.backends.environment import software
from sdfit.backends.trace.tracer import Tracer
from sdfit.equation.weights import rounded
from sdfit.errors import SdfitError
from sdfit.predict.simulation.workspaces import convolution_bytes, workspaces_for
from sdfit.records import Kind
from sdfit.sweep.journal import Journal
from sdfit.units import aligned, format_bytes
from sdfit.workload import VAE_SCALE, Workload

UNET_HEADS, UNET_CHANNELS, VAE_CHANNELS = 8, (320, 640, 1280, 1280), 512
"""Heads and channels of the attention layers, level by level; the VAE has one head."""


WORKLOADS = tuple(
    Workload(height, width, 77, batch, 1.0, dtype, safety_checker=False)
    for dtype in ("float16", "bfloat16", "float32")
    for height, width in ((512, 512), (520, 776))
    for batch in (1, 2)
)
"""Whose operators are measured: aligned and odd latents, one image and two, every dtype."""


@dataclass(frozen=True, slots=True)
class Operator:
    """One call: ``convolution`` of an image with a weight, or ``attention`` of queries, keys and values.

    Parameters
    ----------
    kind : {'convolution', 'attention'}
    dtype : str
    shapes : tuple of tuple of int
        Image and weight, or query, key and value.
    stride, padding : int
        Of a convolution.
    """

    kind: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    stride: int = 1
    padding: int = 0


@dataclass(frozen=True, slots=True)
class Held:
    """What the kernel of an operator held [bytes], and what the table says it holds; None where it says nothing."""

    operator: Operator
    held_bytes: int | None
    table_bytes: int | None
    message: str | None = None


def _held(values: Any) -> Held:
    """Make a row of a parsed line."""
    operator = values["operator"]
    shapes = tuple(tuple(shape) for shape in operator["shapes"])
    return Held(**{**values, "operator": Operator(**{**operator, "shapes": shapes})})


OPERATORS = Kind("operator", _held, asdict, "python -m sdfit.study.lab operators")


def operators_of(workloads: Iterable[Workload], tracer: Tracer | None = None) -> list[Operator]:
    """List the different convolutions and attention calls of some workloads, in the order in which they occur."""
    tracer, found = tracer or Tracer(), dict[Operator, None]()

    def observe(_: Any) -> Callable[[Any, tuple[Any, ...], Any], None]:
        def see(func: Any, args: tuple[Any, ...], out: Any) -> None:
            if func is torch.ops.aten.convolution.default:
                image, weight, _, stride, padding = args[:5]
                dtype = str(image.dtype).removeprefix("torch.")
                found[
                    Operator("convolution", dtype, (tuple(image.shape), tuple(weight.shape)), stride[0], padding[0])
                ] = None

        return see

    for workload in workloads:
        tracer.run(workload, observe=observe)
        found.update(dict.fromkeys(_attention(workload)))
    return list(found)


def _attention(w: Workload) -> Iterator[Operator]:
    """The attention calls of a workload: the UNet's levels, with themselves and the prompt, and the VAE's mid block."""
    rows, columns = w.effective_height // VAE_SCALE, w.effective_width // VAE_SCALE
    pixels = rows * columns
    single = (1 if w.vae_slicing else w.batch_size, 1, pixels, VAE_CHANNELS)
    yield Operator("attention", w.dtype, (single,) * 3)
    for channels in UNET_CHANNELS:
        width = channels // UNET_HEADS
        query = (w.unet_batch, UNET_HEADS, rows * columns, width)
        prompt = (w.unet_batch, UNET_HEADS, w.tokens, width)
        yield Operator("attention", w.dtype, (query,) * 3)
        yield Operator("attention", w.dtype, (query, prompt, prompt))
        rows, columns = -(-rows // 2), -(-columns // 2)


def measure(operator: Operator, counters: Counters) -> int:
    """Run an operator alone; returns what its kernel held beyond its inputs and its output [bytes]."""
    dtype = getattr(torch, operator.dtype)
    with torch.no_grad(), counters.watching():
        inputs = [torch.randn(shape, device=counters.device).to(dtype) for shape in operator.shapes]
        counters.settle()
        _run(operator, inputs)  # once before: handles and plans are made on the first call
        counters.synchronise()
        counters.settle()
        before = counters.allocated()
        counters.reset_peaks()
        out = _run(operator, inputs)
        counters.synchronise()
        peak = counters.peaks()[0]
        return max(peak - before - rounded(out.untyped_storage().nbytes()), 0)


def _run(operator: Operator, inputs: list[torch.Tensor]) -> torch.Tensor:
    if operator.kind == "attention":
        return functional.scaled_dot_product_attention(*inputs)
    return functional.conv2d(inputs[0], inputs[1], None, operator.stride, operator.padding)


def sweep_operators(operators: Iterable[Operator], counters: Counters, path: Path) -> list[Held]:
    """Measure each operator that a file lacks, append it, and return all that the file then holds.

    Raises
    ------
    RecordsError
        If the file is not one of operators, or of another card or other versions.
    """
    facts = counters.facts()
    table = _table_of(str(facts["name"]))
    with Journal(path, facts | software(), OPERATORS) as journal:
        known = {row.operator for row in journal.rows}
        for operator in operators:
            if operator in known:
                continue
            try:
                held = Held(operator, measure(operator, counters), table(operator))
            except RuntimeError as error:  # too large for this card: a row too
                held = Held(operator, None, table(operator), (str(error) or type(error).__name__).splitlines()[0])
            known.add(operator)
            journal.append(held)
        return journal.rows


def _table_of(card: str) -> Callable[[Operator], int | None]:
    """What the table says of a card's convolutions; None for attention, and for cards that it does not hold."""
    try:
        architecture = workspaces_for(card).architecture
    except SdfitError:
        return lambda operator: None

    def says(operator: Operator) -> int | None:
        if operator.kind != "convolution":
            return None
        image, weight = operator.shapes
        sides = ((side + 2 * operator.padding - weight[2]) // operator.stride + 1 for side in image[2:])
        return convolution_bytes(architecture, operator.dtype, image, weight, (image[0], weight[0], *sides))

    return says


def table(found: Iterable[Held]) -> str:
    """The operators as aligned text, those that hold most first."""
    lines = [("operator", "shapes", "dtype", "held", "the table says")]
    for one in sorted(found, key=lambda h: -(h.held_bytes or 0)):
        shapes = " ".join("x".join(map(str, shape)) for shape in one.operator.shapes)
        held = format_bytes(one.held_bytes) if one.held_bytes is not None else (one.message or "failed")
        says = format_bytes(one.table_bytes) if one.table_bytes is not None else "-"
        lines.append((one.operator.kind, shapes, one.operator.dtype, held, says))
    return aligned(lines, left=3)
