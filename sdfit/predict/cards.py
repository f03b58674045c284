"""CUDA cards: what the driver calls them, what people call them, their architecture and their memory.

The table is `cards.csv` beside this file, a row per name and memory. Names are as NVML and
`torch.cuda.get_device_name` write them; ``also`` holds others that people write. Compute capabilities are those of
https://developer.nvidia.com/cuda-gpus and https://developer.nvidia.com/cuda-legacy-gpus, laptop cards those of their
chip. ``memory_gib`` is the number on the box, from NVIDIA's product pages and
https://en.wikipedia.org/wiki/List_of_Nvidia_graphics_processing_units. ``cuda_mib`` is what CUDA reports as total, which
is less: the driver keeps some, and ECC a sixteenth (a T4 of 16 GB has 14,912 MiB). It is the least of what PyTorch
printed in public logs up to November 2026 (``CUDA:0 (NVIDIA L4, 22563MiB)`` of Ultralytics' tools; "GPU 0 has a total
capacity of 79.10 GiB" of its out-of-memory messages); empty where none was found. Windows shows more than Linux.
``half``: how a card computes float16: ``fast``, ``slow`` (no faster than float32), or ``wrong``: black images, so people
run float32 (the list is ComfyUI's, ``nvidia_16_series`` in comfy/model_management.py).

None of it was checked on the cards.
"""

from __future__ import annotations

import csv
import re
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from sdfit.errors import UnknownModel, listed
from sdfit.units import GIB, MIB

KINDS = ("geforce", "laptop", "workstation", "data centre")
"""The last kind usually drives no screen, the others do."""
LEAST_SHARE = {"data centre": 0.91, "workstation": 0.91, "": 0.94}
"""Of the memory on the box, the share that CUDA is taken to report where no log was found: below the least that was
found, T4 (14,912 of 16,384 MiB, with ECC) and RTX PRO 2000 Laptop (7,710 of 8,192 MiB). Workstation cards may have ECC on."""

CONTEXT_BYTES = ((17 * GIB, 256 * MIB), (50 * GIB, 600 * MIB), (1 << 50, 750 * MIB))
"""CUDA context and libraries of a process that runs PyTorch: on a card of up to so much memory, so much [bytes].

Above what PyTorch's out-of-memory messages give, as far as they were found in public logs (memory of this process in use,
less what PyTorch has allocated and reserved): T4 111 to 151 MiB, 16 GB cards to 249; L4 181 and 251, 24 GB GeForce 315 to
579, A6000 294 to 491, RTX 5090 489 and 499; A100 501, H200 670, B200 712. It grows with the number of processors on the
card and as kernels load; programs that load more than PyTorch have more."""
DESKTOP_BYTES = 1 * GIB
"""What a desktop, a browser and the like take on a card that drives a screen: assumed, not measured. ComfyUI sets 600 MiB
aside on Windows and 400 MiB elsewhere, beyond what it finds in use."""

MOST_NAMED = 12
"""Cards that a message names."""

UNNAMED = "unnamed"
"""The short name of a card of which only the maker is said."""
_MAKERS = ("nvidia", "tesla", "geforce", "quadro", "grid", "amd", "intel", "graphics", "gpu")
"""Words that name a maker or a line of products; the model says enough without them."""
_BUILT = ("generation", "with", "max", "q", "design", "blackwell", "workstation", "server", "edition")
"""Words that tell which of several builds of a model it is."""
_FORM = re.compile(r"(sxm\d*|pcie|pci|nvl|hbm\d*e?|oam|ms|mig|\d+gb|\d+g\..*)$")
"""Words that tell how a card is built or how much memory it has; the first of them ends the name."""
_AMOUNT = re.compile(r"\b(\d+)\s*(?:gb|gib|g)\b")
_SLICE = re.compile(r"[\s-](?:mig[\s-]+)?(\d+g\.(\d+)gb)\S*", re.IGNORECASE)
"""A part of a card (MIG), as in ``NVIDIA A100-SXM4-40GB MIG 1g.5gb`` or ``a100 1g.5gb``, and the memory in its name [GB]."""
WHOLE = ("6.0", "6.1", "7.0", "7.5", "8.6", "8.7", "8.9")
"""Compute capabilities of cards that cannot be parted so (NVIDIA's Multi-Instance GPU User Guide lists those that can)."""
SLICE_SHARE = 0.88
"""Of the memory in a slice's name, what CUDA is taken to report; less than what was found, to be sure: ``nvidia-smi mig -lgip`` as
people print it lists 4.75 GiB for 1g.5gb of an A100, 9.75 for 1g.10gb and 39.50 for 3g.40gb of an H100
(https://jbarrow.ai/field_notes/nvidia-mig/). Of an H200 it is not known."""
_OTHERS = re.compile(r"(rx|mi|arca|arcb)\d+\w*|radeon.*|instinct.*|gaudi\d*|tpu.*|m[1-5](pro|max|ultra)?|mps|cpu|xpu")
"""Short names of what runs no CUDA."""
_ARCHITECTURE = re.compile(r"sm_?(\d{2,3})")

KERNELS = {
    "sm60": "sm61", "sm61": "sm61",
    "sm70": "sm70",
    "sm75": "sm75", "sm80": "sm75", "sm86": "sm75", "sm89": "sm75",
    "sm90": "sm90", "sm100": "sm90", "sm120": "sm90",
}  # fmt: skip
"""The model that answers for an architecture: those whose kernels hold the same memory share one, bit for bit. A test
holds it to the table of `sdfit.predict.simulation.workspaces`."""


@dataclass(frozen=True, slots=True)
class Card:
    """A CUDA card.

    Parameters
    ----------
    name : str
        As NVML writes it.
    compute_capability : str
        As ``"8.6"``.
    memory_gib : int
        What is on the box [GiB].
    memory_bytes : int
        What CUDA reports as total, at least [bytes].
    kind : str
        One of `KINDS`.
    half : {'fast', 'slow', 'wrong'}
        How it computes float16.
    found : bool
        Whether ``memory_bytes`` was found in a log; otherwise it is a share of ``memory_gib`` (`LEAST_SHARE`).
    also : tuple of str
        Other names.
    """

    name: str
    compute_capability: str
    memory_gib: int
    memory_bytes: int
    kind: str = ""
    half: str = "fast"
    found: bool = True
    also: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """What `--gpu` calls it."""
        return card_slug(self.name)

    @property
    def typed(self) -> str:
        """What to type to mean this card and no other: with its memory where cards of one short name differ in it."""
        if self.slice:
            return self.name
        return f"{self.slug}-{self.memory_gib}gb" if also_sold(self) else self.slug

    @property
    def slice(self) -> bool:
        """Whether it is a part of a card (MIG)."""
        return _SLICE.search(self.name) is not None

    @property
    def architecture(self) -> str:
        """As ``"sm86"``."""
        return "sm" + self.compute_capability.replace(".", "")

    @property
    def drives_screen(self) -> bool:
        """Whether a desktop usually takes some of it."""
        return self.kind != "data centre"

    @property
    def context_bytes(self) -> int:
        """What a CUDA context on it is taken to need (`CONTEXT_BYTES`)."""
        return context_bytes(self.memory_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, amounts in bytes."""
        return asdict(self) | {
            "slug": self.slug,
            "typed": self.typed,
            "architecture": self.architecture,
            "drives_screen": self.drives_screen,
            "context_bytes": self.context_bytes,
        }


def context_bytes(total_bytes: int) -> int:
    """What a CUDA context on a card of so much memory is taken to need [bytes], by `CONTEXT_BYTES`.

    Examples
    --------
    >>> [context_bytes(gib << 30) >> 20 for gib in (8, 24, 80)]
    [256, 600, 750]
    """
    return next(context for most, context in CONTEXT_BYTES if total_bytes <= most)


def card_slug(name: str) -> str:
    """Shorten the driver's name of a card: lower case, no maker, no form factor, no spaces.

    Parameters
    ----------
    name : str
        As ``nvidia-smi`` and ``torch.cuda.get_device_name`` give it.

    Returns
    -------
    str
        Cards that differ only in memory or form factor share one: ``total_memory_bytes`` tells them apart.

    Examples
    --------
    >>> card_slug("NVIDIA A100-SXM4-80GB"), card_slug("Tesla T4"), card_slug("NVIDIA GeForce RTX 4090")
    ('a100', 't4', 'rtx4090')
    >>> card_slug("NVIDIA RTX 6000 Ada Generation"), card_slug("NVIDIA GH200 480GB")
    ('rtx6000ada', 'gh200')
    """
    words = re.split(r"[^a-z0-9.]+", _AMOUNT.sub(r"\1gb", name.lower()))
    kept: list[str] = []
    ended = False
    for word in words:
        if not word or word in _MAKERS or word in _BUILT:
            continue
        ended = ended or bool(kept and _FORM.fullmatch(word))
        if not ended or word == "laptop":  # a "6GB Laptop GPU" is another card than one of 6 GB
            kept.append(word)
    return "".join(kept) or UNNAMED


@cache
def table() -> tuple[Card, ...]:
    """Every card of the table, in its order."""
    with Path(__file__).with_name("cards.csv").open(encoding="utf-8", newline="") as lines:
        return tuple(_card(row) for row in csv.DictReader(lines))


def _card(row: dict[str, str]) -> Card:
    gib, kind = int(row["memory_gib"]), row["kind"]
    least = int(gib * 1024 * LEAST_SHARE.get(kind, LEAST_SHARE[""]))
    mib = int(row["cuda_mib"] or least)
    also = tuple(name for name in row["also"].split(";") if name)
    return Card(row["name"], row["compute_capability"], gib, mib * MIB, kind, row["half"], bool(row["cuda_mib"]), also)


def architecture_of(text: str) -> str | None:
    """The architecture that a name such as ``sm86`` or ``SM_86`` stands for, if a model answers for it; else None.

    One that the table lacks is answered by the highest below it of the same major version, whose code it runs.

    Examples
    --------
    >>> architecture_of("sm86"), architecture_of("sm87"), architecture_of("t4")
    ('sm86', 'sm86', None)
    """
    match = _ARCHITECTURE.fullmatch(text.strip().lower())
    if match is None:
        return None
    wanted = int(match[1])
    below = [n for n in (int(known[2:]) for known in KERNELS) if n <= wanted and n // 10 == wanted // 10]
    return f"sm{max(below)}" if below else None


def find_card(text: str) -> Card | None:
    """The card that a name stands for: as the driver writes it, as people do, or its number alone; None if there is none.

    Of cards that share the name and differ in memory the one with the least is meant, unless an amount is named too. A slice
    of a card (MIG) is that card with the slice's memory.

    Raises
    ------
    UnknownModel
        If the name fits several cards that differ in architecture, or the card is not sold with the amount named or not so parted.

    Examples
    --------
    >>> find_card("RTX 3060").memory_gib, find_card("rtx 3060 12GB").memory_gib
    (8, 12)
    >>> find_card("4090").name, find_card("a100 80gb").memory_gib
    ('NVIDIA GeForce RTX 4090', 80)
    >>> find_card("NVIDIA A100-SXM4-40GB MIG 1g.5gb").memory_gib, find_card("h100-3g.40gb").memory_gib
    (5, 40)
    """
    part = _SLICE.search(text)
    if part is not None:
        return _slice(text[: part.start()], part[1].lower(), int(part[2]))
    cards = _named(text)
    amount = _AMOUNT.search(text.lower().replace("-", " "))
    if amount and not any(_whole(text) == _whole(card.name) for card in cards):  # a GH200 480GB has 96 on its GPU
        known = sorted({card.memory_gib for card in cards})
        cards = [card for card in cards if card.memory_gib == int(amount[1])]
        if known and not cards:
            raise UnknownModel(
                f"there is no '{text}' in the table of cards; there are those of {listed(known)} GiB; of another one give the "
                "memory beside the card (--memory)",
                given=text,
            )
    if not cards:
        return None
    slugs = dict.fromkeys(card.slug for card in cards)
    if len(slugs) > 1:
        raise UnknownModel(
            f"'{text}' fits several cards: {listed(list(slugs)[:MOST_NAMED])}"
            f"{' and others' if len(slugs) > MOST_NAMED else ''}; give one of these (sdfit cards lists them)",
            given=text,
            known=list(slugs),
        )
    return min(cards, key=lambda card: card.memory_bytes - DESKTOP_BYTES * card.drives_screen)


def _slice(text: str, name: str, gib: int) -> Card | None:
    """A part of a card; that its kernels are the whole one's is assumed: it has fewer processors."""
    card = find_card(text)
    if card is not None and card.compute_capability in WHOLE:
        raise UnknownModel(f"'{card.name}' has no '{name}': it cannot be parted (MIG)", given=text)
    if card is not None and card.memory_gib < gib:  # that of the name with the least is too small to be parted so
        larger = [other for other in _named(text) if other.slug == card.slug and other.memory_gib >= gib]
        if not larger or _AMOUNT.search(text.lower().replace("-", " ")):
            raise UnknownModel(f"'{card.name}' has no '{name}': it has {card.memory_gib} GiB", given=text)
        card = min(larger, key=lambda other: other.memory_bytes)
    if card is None:
        return None
    least = int(gib * 1024 * SLICE_SHARE) * MIB
    return replace(card, name=f"{card.name} MIG {name}", memory_gib=gib, memory_bytes=least, found=False, also=())


def no_cuda(text: str) -> bool:
    """Whether a name is known to be of something that runs no CUDA.

    Examples
    --------
    >>> [no_cuda(name) for name in ("MI210", "RX 7900 XTX", "Intel Arc A770", "cpu", "MX450", "M40")]
    [True, True, True, True, False, False]
    """
    return bool(_OTHERS.fullmatch(card_slug(text)))


def matching(pattern: str) -> list[Card]:
    """The cards whose name, short name or architecture holds a text, in the order of the table; all for an empty one.

    Examples
    --------
    >>> [card.typed for card in matching("3060")]
    ['rtx3060-8gb', 'rtx3060-12gb', 'rtx3060ti', 'rtx3060laptop']
    """
    text = pattern.strip().lower()
    slug = card_slug(text) if text else ""
    return [c for c in table() if text in c.name.lower() or slug in c.slug or text in (c.architecture, c.typed)]


def _named(text: str) -> list[Card]:
    """Every card that a name may stand for: by its whole name, else by its short one, else by the end or start of that."""
    whole, slug = _whole(text), card_slug(text)
    number = len(slug) > 1 and any(map(str.isdigit, slug))

    def ends(name: str) -> bool:
        return number and name.endswith(slug) and not name[: -len(slug)][-1:].isdigit()

    for known in (
        lambda card: whole == _whole(card.name),
        lambda card: slug in _slugs(card),
        lambda card: any(map(ends, _slugs(card))),
        lambda card: len(slug) > 3 and card.slug.startswith(slug),
    ):
        found = [card for card in table() if known(card)]
        if found:
            return found
    return []


@cache
def _slugs(card: Card) -> tuple[str, ...]:
    return (card.slug, *map(card_slug, card.also))


def _whole(name: str) -> str:
    """A name without makers, case and spaces, but with its build and memory."""
    return "".join(word for word in re.split(r"[^a-z0-9.]+", name.lower()) if word not in _MAKERS)


def also_sold(card: Card) -> list[int]:
    """Other amounts of memory that cards of this short name have [GiB].

    Examples
    --------
    >>> also_sold(find_card("rtx3060")), also_sold(find_card("rtx3060 12gb")), also_sold(find_card("t4"))
    ([12], [8], [])
    """
    if card.slice:
        return []
    return sorted({other.memory_gib for other in table() if other.slug == card.slug} - {card.memory_gib})


def kernels_of(name: str) -> str | None:
    """The model whose kernels a card, an architecture or a model has; None where it is not known.

    Examples
    --------
    >>> kernels_of("t4"), kernels_of("sm86"), kernels_of("h200")
    ('sm75', 'sm75', 'sm90')
    """
    architecture = architecture_of(name)
    if architecture is None:
        card = find_card(name)
        architecture = architecture_of(card.architecture) if card else None
    return KERNELS.get(architecture or "")
