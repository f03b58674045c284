"""Which allocation of a card is which of the trace: two lists set beside each other in order.

An allocation of the trace can only be one of the same size on the card; frames say which of several it is, where the
recording has them. Both keep their order. What is left over on the card belongs to kernels, what is left over in the trace
the card does without. The pairing is the one of most agreement (Needleman and Wunsch 1970), row by row in NumPy; long lists
are taken piece by piece, so that time and memory grow with their length and not with its square.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdfit.study.calibration.operations import place
from sdfit.study.calibration.snapshot import Frame, Stack

SAME_SIZE, SAME_LINES, SAME_FUNCTIONS, SAME_FUNCTION, OTHER_FUNCTION, SAME_LIFE = 1.0, 0.5, 0.3, 0.2, -0.9, 0.1
"""What an agreement is worth; sizes must agree, frames and what happens next make it more or less likely."""
MISSING = 0.2
"""The price of an allocation of the trace that the card lacks."""
ALONE = 1e-3
"""The price of one of the card's own between two pairs: of several runs in a file one is taken, not parts of two."""
PIECE = 3000
"""Allocations of the trace that are aligned at once; of each piece three quarters are kept."""
REACH = 6
"""How many allocations the card may make for one of the trace, on average over a piece."""
MOST_CELLS = 600_000_000
FOUND = 0.5
"""Share of a piece that must be found, for the run to begin there."""
NEAR_BEST = 0.3
"""Runs whose agreement is this near the best are equal, and the last of them is taken: as a share of what it would cost one
run to be torn in two so far apart."""
AROUND, FEW = 20, 0.5
"""A pair among so many neighbours of the trace, both ways, of which fewer than that share have one, is chance."""

INNERMOST = 3
"""Frames that must agree: the function, the block that calls it, and that one's caller; the outer ones vary with versions."""

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Allocations:
    """Allocations in order, as numbers: sizes [bytes], and frames at three degrees of likeness (-1: none known): lines,
    functions, the innermost functions."""

    size: Indices
    lines: Indices
    functions: Indices
    function: Indices
    passing: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.size)

    def part(self, begin: int, end: int) -> Allocations:
        """A stretch of it."""
        cut = slice(begin, end)
        return Allocations(self.size[cut], self.lines[cut], self.functions[cut], self.function[cut], self.passing[cut])


class Numbers:
    """Gives equal stacks equal numbers, in both lists."""

    def __init__(self) -> None:
        self._known: dict[object, int] = {}
        self._of: dict[Stack, tuple[int, int, int]] = {}

    def sequence(self, sizes: Sequence[int], stacks: Iterable[Stack], passing: Sequence[bool]) -> Allocations:
        """Put allocations in numbers."""
        numbers = np.array([self._numbers(stack) for stack in stacks], dtype=np.int64).reshape(-1, 3)
        return Allocations(
            np.array(sizes, dtype=np.int64), numbers[:, 0], numbers[:, 1], numbers[:, 2], np.array(passing, dtype=bool)
        )

    def _numbers(self, stack: Stack) -> tuple[int, int, int]:
        if stack not in self._of:
            ours = told(stack)
            names = tuple(frame[:2] for frame in ours)
            keys = (ours, names, names[:INNERMOST])
            self._of[stack] = tuple(self._known.setdefault(k, len(self._known)) if ours else -1 for k in keys)  # type: ignore[assignment]
        return self._of[stack]


def told(stack: Stack) -> Stack:
    """The frames that are the same on every machine."""
    return tuple(Frame(f.name, where, f.line) for f in stack if (where := place(f.filename)) is not None)


def align(trace: Allocations, card: Allocations) -> Indices:
    """Find the card's allocation for each of the trace's.

    Returns
    -------
    array of int
        For each allocation of the trace its place in the card's list, rising; -1 where the card has none. Of several runs
        in the list the one that agrees most, of equal ones the last.

    Examples
    --------
    >>> numbers = Numbers()
    >>> made = lambda *sizes: numbers.sequence(sizes, [()] * len(sizes), [False] * len(sizes))
    >>> align(made(512, 1024, 2048), made(4096, 512, 9216, 1024, 2048, 512)).tolist()
    [1, 3, 4]
    """
    pairs = np.full(len(trace), -1, dtype=np.int64)
    rows = max(min(PIECE, MOST_CELLS // max(len(card), 1)), 200)
    begin, at, found = 0, 0, False
    while begin < len(trace) and at < len(card):
        end = min(begin + rows, len(trace))
        reach = len(card) if not found else min(at + REACH * (end - begin) + 1000, len(card))
        piece = _best(trace.part(begin, end), card.part(at, reach), anywhere=not found)
        share = float(np.mean(piece >= 0))
        if not found and share < FOUND and end < len(trace):
            begin = end  # the recording begins later
            continue
        found = True
        keep = end - begin if end == len(trace) else (end - begin) * 3 // 4
        kept = piece[:keep]
        pairs[begin : begin + keep] = np.where(kept >= 0, kept + at, -1)
        begin += keep
        if (kept >= 0).any():
            at += int(kept.max()) + 1
            rows = PIECE
    return _without_strays(pairs)


def _without_strays(pairs: Indices) -> Indices:
    """Leave out pairs that stand nearly alone."""
    width = 2 * AROUND + 1
    if len(pairs) <= width:
        return pairs
    near = np.convolve(pairs >= 0, np.ones(width), "same") / np.convolve(np.ones(len(pairs)), np.ones(width), "same")
    return np.where(near < FEW, -1, pairs)


def _best(trace: Allocations, card: Allocations, *, anywhere: bool) -> Indices:
    """The best pairing of two stretches; the card's may go on after the trace's, and with ``anywhere`` begin before it."""
    width = len(card)
    places = {int(size): np.flatnonzero(card.size == size) for size in np.unique(trace.size)}
    slope = ALONE * np.arange(width + 1)
    row = np.zeros(width + 1) if anywhere else -slope
    paired = np.zeros((len(trace), (width + 8) // 8), dtype=np.uint8)
    passed = np.zeros_like(paired)
    for i in range(len(trace)):
        above = row - MISSING
        at = places[int(trace.size[i])]
        took = np.zeros(width + 1, dtype=bool)
        if len(at):
            better = row[at] + _worth(trace, i, card, at)
            wins = better > above[at + 1]
            above[at[wins] + 1] = better[wins]
            took[at[wins] + 1] = True
        tilted = above + slope
        risen = np.maximum.accumulate(tilted)
        passed[i] = np.packbits(risen > tilted)
        paired[i] = np.packbits(took)
        row = risen - slope
    j = _last_peak(row, len(trace)) if anywhere else int(np.flatnonzero(row >= row.max() - 1e-9)[-1])
    pairs = np.full(len(trace), -1, dtype=np.int64)
    for i in range(len(trace) - 1, -1, -1):
        while passed[i, j >> 3] >> (7 - (j & 7)) & 1:
            j -= 1
        if paired[i, j >> 3] >> (7 - (j & 7)) & 1:
            j -= 1
            pairs[i] = j
    return pairs


def _last_peak(row: NDArray[np.floating[Any]], length: int) -> int:
    """Where the last of those pairings ends that are as good as the best one, each a whole run after the one before."""
    enough = row.max() - NEAR_BEST * ALONE * length
    peak = int(np.argmax(row))
    while len(later := row[peak + length :]) and later.max() >= enough:
        peak += length + int(np.argmax(later))
    return peak


def _worth(trace: Allocations, i: int, card: Allocations, at: Indices) -> NDArray[np.float64]:
    worth = np.full(len(at), SAME_SIZE)
    worth += SAME_LIFE * (card.passing[at] == trace.passing[i])
    if trace.function[i] >= 0:
        known = card.function[at] >= 0
        same = card.function[at] == trace.function[i]
        worth += SAME_FUNCTION * same + OTHER_FUNCTION * (known & ~same)
        worth += SAME_FUNCTIONS * (card.functions[at] == trace.functions[i])
        worth += SAME_LINES * (card.lines[at] == trace.lines[i])
    return worth
