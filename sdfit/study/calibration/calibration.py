"""What a recorded run tells of a card, as values: `sdfit.study.calibration.calibrate` finds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from sdfit.predict.simulation.shapes import Shapes
from sdfit.workload import Workload


class Kernel(NamedTuple):
    """An operation on some shapes, and what its kernel holds while it runs.

    Attributes
    ----------
    shapes : Shapes
    times : int
        How often it was seen.
    held_bytes : int
        The most that was live of the card's own blocks, rounded as the allocator rounds [bytes].
    requested : tuple of int
        The blocks that were live then, as asked for [bytes].
    always : bool
        Whether it was the same each time.
    path : str
        The first module that ran it.
    """

    shapes: Shapes
    times: int
    held_bytes: int
    requested: tuple[int, ...]
    always: bool
    path: str


class Parting(NamedTuple):
    """Blocks that one side has and the other has not; ``whose`` is card or trace."""

    whose: str
    operation: str
    place: str
    times: int
    largest_bytes: int


class Standing(NamedTuple):
    """Blocks that are there beside the weights all the time."""

    what: str
    blocks: int
    requested_bytes: int
    counted_bytes: int


@dataclass(frozen=True)
class Calibration:
    """What a snapshot tells. All amounts in bytes.

    Attributes
    ----------
    workload : Workload
    card : str
    found, of : int
        Allocations of the trace that the card has too, and all.
    frames : bool
        Whether the recording has Python frames; otherwise sizes and order alone decided.
    kernels : tuple of Kernel
        Convolutions, matrix products, and whatever else held something.
    standing : tuple of Standing
        What stays around the weights.
    weights_bytes, unsplit_bytes : int
        The weights, each rounded up to 512 B, and what the allocator counts beyond that: remainders it did not split.
    cublas_bytes : int
        What cuBLAS keeps; 0 where nothing such was seen.
    card_peaks : dict of str to int
        The most that was live in each stage on the card.
    partings : tuple of Parting
        The largest first.
    reserved_bytes : int
        The most that was reserved during the run.
    segments : dict of int to int
        Segments by size at the end.
    placed : (int, int)
        How many of the file's allocations lie where the allocator's model puts them, and how many there are; (0, 0) with
        expandable segments.
    failures : int
        Requests that found no memory during the run: then kernels took other plans.
    live : list of (int, int)
        For the figure: the place in the run (an operation's number) and the live bytes, at each change.
    """

    workload: Workload
    card: str
    found: int
    of: int
    frames: bool
    kernels: tuple[Kernel, ...]
    standing: tuple[Standing, ...]
    weights_bytes: int
    unsplit_bytes: int
    cublas_bytes: int
    card_peaks: dict[str, int]
    partings: tuple[Parting, ...]
    reserved_bytes: int
    segments: dict[int, int]
    placed: tuple[int, int]
    failures: int
    live: list[tuple[int, int]] = field(repr=False, default_factory=list)
