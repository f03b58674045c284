"""The allocator model beside real allocators: lists of allocations that others recorded on their cards, replayed.

`torch.cuda.memory._dump_snapshot` writes what PyTorch's caching allocator did, event by event, with addresses.
``data/snapshots/`` holds such lists as their authors published them. `replay_recorded` sends one through
`sdfit.predict.simulation.segments.CachingAllocator`, seeded with the segments that were there before recording began, and
compares where each block lies: once with the addresses that the card's driver gave to new segments, once with the
model's own. ``python -m sdfit.study.lab snapshots`` prints the table.

Allocations, frees, and when cached segments went back are taken from the list; which block serves an allocation, what
is split off, joined, newly reserved and given back is the model's.
"""

from __future__ import annotations

import csv
import lzma
from bisect import bisect_right, insort
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sdfit.errors import RecordsError, nearest
from sdfit.files import shipped
from sdfit.predict.simulation.segments import SMALL_BYTES, Block, CachingAllocator
from sdfit.study.lab.expandable import SPACE_BYTES, ExpandableAllocator
from sdfit.units import aligned, format_bytes, percent

RELEASES = ("segment_free", "segment_unmap")
GROWTHS = ("segment_alloc", "segment_map")
ORIGIN = 1 << 45
"""Addresses of the lists count from the lowest: a constant is missing, and this stands for it. Segments come to lie below what was there."""


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a list; what it holds besides is in the folder's README."""

    action: str
    address: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Recorded:
    """A published list and where it comes from."""

    name: str
    card: str
    torch: str
    source: str
    expandable: bool
    seeds: tuple[Event, ...]
    """Segments and blocks from before the recording."""
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Replayed:
    """How a replay compares with what was recorded.

    Attributes
    ----------
    allocations, equal : int
        How many there are, and how many of them lie where they lay on the card: in the same segment, counted in the
        order in which segments were made, at the same place in it.
    releases, equal_releases : int
        How often cached segments went back, and how often what was left after it is equal.
    card_bytes, model_bytes : int
        Peak of reserved memory, recorded and replayed [bytes].
    """

    allocations: int
    equal: int
    releases: int
    equal_releases: int
    card_bytes: int
    model_bytes: int


def names() -> tuple[str, ...]:
    """The lists with addresses, as the index of the folder names them."""
    return tuple(row["name"] for row in _index() if row["kind"] == "snapshot")


def recorded(name: str) -> Recorded:
    """Read one list.

    Raises
    ------
    RecordsError
        If there is none of that name.
    """
    for row in _index():
        if row["name"] == name and row["kind"] == "snapshot":
            break
    else:
        raise RecordsError(f"there is no list '{name}' in data/snapshots{nearest(name, names())}", given=name)
    lines = tuple(Event(r["action"], ORIGIN + int(r["offset"] or 0), int(r["size_bytes"] or 0)) for r in lines_of(name))
    return Recorded(
        name,
        row["card"],
        row["torch"],
        f"{row['repository']} at {row['commit'][:8]}, {row['path']}",
        row["expandable"] == "yes",
        tuple(event for event in lines if event.action.startswith("start_")),
        tuple(event for event in lines if not event.action.startswith("start_")),
    )


def replay_recorded(one: Recorded, *, told: bool) -> Replayed:
    """Replay one list through the allocator model.

    Parameters
    ----------
    one : Recorded
    told : bool
        Whether the model is given the address of each new segment. In a list with expandable segments there is
        nothing to tell: its addresses count from the beginning of its pool's one segment either way.
    """
    made = [event.address for event in one.events if event.action == "segment_alloc"]
    drivers = iter(made)
    driver = (lambda size: next(drivers)) if told else None
    allocator = ExpandableAllocator() if one.expandable else CachingAllocator(driver=driver)
    shifts = _Shifts(made)
    live: dict[int, Block] = {}
    for segment in (event for event in one.seeds if event.action == "start_segment"):
        end = segment.address + segment.size_bytes
        blocks = [
            (event.address, event.size_bytes)
            for event in one.seeds
            if event.action == "start_block" and segment.address <= event.address < end
        ]
        adopted = allocator.adopt(segment.address, segment.size_bytes, sorted(blocks))
        live.update((block.address, block) for block in adopted)
        shifts.adopted(segment.address)
    on_card = card_peak = allocator.reserved_bytes
    allocations = equal = releases = equal_releases = 0
    bases: dict[bool, int] = {}  # of the small and the large pool's expandable segment
    last_map = 0
    releasing = False
    for event in (*one.events, Event("end", 0, 0)):
        if event.action in RELEASES:
            if not releasing:
                allocator.release_cached()
            releasing = True
            on_card -= event.size_bytes
            continue
        if releasing:
            releasing = False
            releases += 1
            equal_releases += on_card == allocator.reserved_bytes
        if event.action in GROWTHS:
            on_card += event.size_bytes
            card_peak = max(card_peak, on_card)
            last_map = event.address
        elif event.action == "alloc":
            before = allocator.reserved_bytes
            block = allocator.malloc(event.size_bytes)
            assert block is not None, "an allocator without a cap always finds memory"
            live[event.address] = block
            if one.expandable:
                address = block.address % SPACE_BYTES + bases.setdefault(event.size_bytes <= SMALL_BYTES, last_map)
            else:
                if allocator.reserved_bytes > before:
                    shifts.made(block.address)
                address = block.address + shifts.of(block.address)
            allocations += 1
            equal += address == event.address
        elif event.action == "free_completed":
            allocator.free(live.pop(event.address))
    return Replayed(allocations, equal, releases, equal_releases, card_peak, allocator.reserved_peak_bytes)


class _Shifts:
    """From the model's addresses to the card's: the model's third new segment stands for the card's third, and so on."""

    def __init__(self, on_card: list[int]) -> None:
        self._on_card = iter(on_card)
        self._begins: list[int] = []
        self._shifts: dict[int, int] = {}

    def adopted(self, address: int) -> None:
        """A segment that both had before."""
        self._add(address, address)

    def made(self, address: int) -> None:
        """A segment that the model has made; one that the card never made stands nowhere."""
        self._add(address, next(self._on_card, -1))

    def of(self, address: int) -> int:
        """What to add to an address of the model's."""
        return self._shifts[self._begins[bisect_right(self._begins, address) - 1]]

    def _add(self, address: int, on_card: int) -> None:
        if address not in self._shifts:
            insort(self._begins, address)
        self._shifts[address] = on_card - address


def table(rows: Iterable[Recorded] | None = None) -> str:
    """Every list beside its replays, as aligned text."""
    titles = "list, card, torch, events, allocations, equal told, equal untold, reserved, simulated, error"
    lines = [tuple(titles.split(", "))]
    for one in rows if rows is not None else map(recorded, names()):
        told, untold = (replay_recorded(one, told=told) for told in (True, False))
        peaks = (format_bytes(untold.card_bytes), format_bytes(untold.model_bytes))
        counts = (len(one.events), told.allocations, told.equal, untold.equal)
        error = percent(untold.model_bytes / untold.card_bytes - 1)
        lines.append((one.name, one.card, one.torch, *map(str, counts), *peaks, error))
    return aligned(lines, left=3)


def _index() -> list[dict[str, str]]:
    if not _folder().is_dir():
        raise RecordsError(
            f"{_folder()} is not there; the lists come with a checkout of the repository, no wheel has them"
        )
    with (_folder() / "index.csv").open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def lines_of(name: str) -> list[dict[str, str]]:
    """Every line of one of the folder's lists, by column, for all that `Event` leaves out."""
    with lzma.open(_folder() / f"{name}.csv.xz", "rt", encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def _folder() -> Path:
    return shipped("data/snapshots")
