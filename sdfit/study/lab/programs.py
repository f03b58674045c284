"""Find the programs of the pipeline's modules and write them down: ``python -m sdfit.study.lab programs``."""

from __future__ import annotations

from collections.abc import Iterator

from sdfit.backends.environment import releases
from sdfit.backends.trace.finding import find, movers, probes, record
from sdfit.backends.trace.streaming import moved
from sdfit.backends.trace.tracer import Tracer
from sdfit.equation.weights import PARAMETERS, rounded
from sdfit.errors import SdfitError
from sdfit.predict.simulation.library import ATTENTIONS, DTYPES, INT8, VAES, WEIGHTS, Brought, Key, Library
from sdfit.predict.simulation.programs import CHECKER, DECODER, ENCODER, KINDS, TEXT, UNET, Program
from sdfit.workload import SLICES, STREAMED, Workload

EXECUTION = ("default", "int8")
"""Of a UNet, and of one whose linear layers have 8 bits."""


def keys() -> list[Key]:
    """Every program that is shipped."""
    return [
        Key(kind, dtype, str(attention), str(vae), single, even, int8)
        for kind in KINDS
        for dtype in DTYPES
        for attention in ATTENTIONS
        if kind == UNET or attention not in (*SLICES, *(("eager",) if kind in (TEXT, CHECKER) else ()))
        for vae in (VAES if kind in (ENCODER, DECODER) else ("kl",))
        if vae == "kl" or attention == "sdpa"
        for single in (True, False)
        for even in ((True, False) if kind == UNET else (True,))
        for int8 in ((False, True) if kind == UNET else (False,))
    ]


def found(tracer: Tracer, key: Key, dtype: str | None = None) -> Program:
    """The program of a key, from runs of the real module; with ``dtype`` from those of another dtype.

    Raises
    ------
    SdfitError
        If it has none.
    """
    workload = Workload(
        512, 512, dtype=dtype or key.dtype, attention=key.attention, vae=key.vae, execution=EXECUTION[key.int8]
    )
    runs = [(at, record(tracer, workload, key.kind, at)) for at in probes(key.kind, single=key.single, even=key.even)]
    program = find(key.kind, runs, SLICES.get(key.attention, 0))
    if program is None:
        raise SdfitError(
            f"there is no program of {key}: its runs do not line up, or a size is no product of the lengths"
        )
    return program


def weights(tracer: Tracer) -> Iterator[tuple[tuple[str, str], tuple[int, ...]]]:
    """Sizes of each component's weights and buffers, by dtype and name."""
    for dtype in DTYPES:
        for name in WEIGHTS:
            vae, execution = "tiny" if name == "vae_tiny" else "kl", EXECUTION[name == INT8]
            pipe = tracer.pipeline(Workload(512, 512, dtype=dtype, vae=vae, execution=execution))
            part = getattr(pipe, {"vae_tiny": "vae", INT8: "unet"}.get(name, name))
            tensors = [*part.parameters(), *part.buffers()]
            yield (dtype, name), tuple(rounded(tensor.untyped_storage().nbytes()) for tensor in tensors)


def brought(tracer: Tracer) -> Iterator[tuple[tuple[str, str], Brought]]:
    """Which weights come with which module, by name and offload."""
    for name in PARAMETERS:
        pipe = tracer.pipeline(Workload(512, 512, vae="tiny" if name == "vae_tiny" else "kl"))
        part = getattr(pipe, "vae" if name == "vae_tiny" else name)
        numbers = {id(tensor): number for number, tensor in enumerate([*part.parameters(), *part.buffers()])}
        for offload in STREAMED:
            if (name, offload) != ("vae_tiny", "group_block"):  # fails in diffusers itself
                which = {module: [numbers[id(t)] for t in tensors] for module, tensors in moved(part, offload)}
                of_modules = [(number, which[module]) for module, number in movers(part).items() if module in which]
                yield (name, offload), {number: tuple(weights) for number, weights in of_modules}


def library() -> Library:
    """Find all of it: half a minute."""
    tracer = Tracer()
    programs = {key: found(tracer, key) for key in keys()}
    return Library(programs, dict(weights(tracer)), dict(brought(tracer)), releases())
