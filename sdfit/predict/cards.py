"""CUDA cards: what the driver calls them, what people call them, their architecture and their memory.

The table is `cards.csv` beside this file. Names are as NVML and `torch.cuda.get_device_name` write them. Compute
capabilities are those of NVIDIA's list (developer.nvidia.com/cuda-gpus). Memory is what ``nvidia-smi`` shows as total
where that was known (``memory_from``), otherwise the nominal GiB of the product's data sheet; it was not checked on the
cards. ``half``: how a card computes float16: ``fast``, ``slow`` (in float32), or ``wrong`` (GeForce 16 gives black
images, so people run it in float32).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sdfit.errors import UnknownModel, listed
from sdfit.units import GIB, MIB

CONTEXT_BYTES = 450 * MIB
"""CUDA context and libraries on a card, assumed: published are about 180 MiB (T4), 256 MiB (RTX 3090) and 426 MiB (RTX
6000 Ada); it grows as kernels load."""

_MAKERS = ("nvidia", "tesla", "geforce", "quadro", "amd", "intel", "graphics", "gpu")
"""Words that name a maker or a line of products; the model says enough without them."""
_FORM = re.compile(r"(sxm\d*|pcie|pci|nvl|hbm\d*e?|oam|ms|mig|\d+gb|\d+g\..*)$")
"""Words that tell how a card is built or how much memory it has; the first of them ends the name."""
_AMOUNT = re.compile(r"(\d+)\s*(?:gb|gib|g)\b")
_ARCHITECTURE = re.compile(r"sm_?(\d{2,3})")

KERNELS = {
    "sm60": "sm61", "sm61": "sm61",
    "sm70": "sm70",
    "sm75": "sm75", "sm80": "sm75", "sm86": "sm75", "sm89": "sm75",
    "sm90": "sm90", "sm100": "sm90", "sm120": "sm90",
}  # fmt: skip
"""The model that answers for an architecture: those whose kernels hold the same memory share one, bit for bit. A test
holds it to the table of `sdfit.backends.trace.workspaces`."""
UNSEEN = ("sm60", "sm86", "sm90", "sm100", "sm120")
"""Architectures with few published rows or none, whose entries rest on a named neighbour (see models/README.md)."""


@dataclass(frozen=True, slots=True)
class Card:
    """A CUDA card.

    Parameters
    ----------
    name : str
        As NVML writes it.
    compute_capability : str
        As ``"8.6"``.
    memory_bytes : int
        In all.
    drives_screen : bool
        Whether a desktop usually takes some of it.
    half : {'fast', 'slow', 'wrong'}
        How it computes float16.
    memory_from : {'nvidia-smi', 'nominal'}
    """

    name: str
    compute_capability: str
    memory_bytes: int
    drives_screen: bool
    half: str
    memory_from: str

    @property
    def slug(self) -> str:
        """What `--gpu` calls it."""
        return card_slug(self.name)

    @property
    def architecture(self) -> str:
        """As ``"sm86"``."""
        return "sm" + self.compute_capability.replace(".", "")


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
    words = re.split(r"[^a-z0-9.]+", name.lower())
    kept: list[str] = []
    for word in words:
        if not word or word in _MAKERS or word == "generation":
            continue
        if kept and _FORM.fullmatch(word):
            break
        kept.append(word)
    return "".join(kept) or "unnamed"


@cache
def table() -> tuple[Card, ...]:
    """Every card of the table, in its order."""
    with Path(__file__).with_name("cards.csv").open(encoding="utf-8", newline="") as lines:
        return tuple(
            Card(
                row["name"],
                row["compute_capability"],
                int(row["memory_mib"]) * MIB,
                row["drives_screen"] == "yes",
                row["half"],
                row["memory_from"],
            )
            for row in csv.DictReader(lines)
        )


def architecture_of(text: str) -> str | None:
    """The architecture that a name such as ``sm86`` or ``SM_86`` stands for, if a model answers for it; else None.

    Examples
    --------
    >>> architecture_of("sm86"), architecture_of("t4")
    ('sm86', None)
    """
    match = _ARCHITECTURE.fullmatch(text.strip().lower())
    found = f"sm{match[1]}" if match else None
    return found if found in KERNELS else None


def find_card(text: str) -> Card | None:
    """The card that a name stands for: as the driver writes it, as people do, or its number alone; None if there is none.

    Where cards of one name differ in memory, the first of the table is meant, unless an amount is named too.

    Raises
    ------
    UnknownModel
        If the name fits several cards that differ in architecture or memory.

    Examples
    --------
    >>> find_card("RTX 3060").memory_bytes >> 30, find_card("NVIDIA GeForce RTX 3060 Laptop GPU").memory_bytes >> 30
    (12, 6)
    >>> find_card("4090").name, find_card("a100 80gb").memory_bytes >> 30
    ('NVIDIA GeForce RTX 4090', 80)
    """
    exact = [card for card in table() if card.name.lower() == text.strip().lower()]
    if exact:
        return exact[0]
    slug, amount = card_slug(text), _AMOUNT.search(text.lower().replace("-", " "))
    cards = [card for card in table() if card.slug == slug]
    if not cards:
        known = list(dict.fromkeys(card.slug for card in table()))
        slugs = [one for one in known if one.endswith(slug)] or [one for one in known if one.startswith(slug)]
        cards = [card for card in table() if card.slug in slugs] if len(slug) > 1 else []
    if amount:
        cards = [card for card in cards if round(card.memory_bytes / GIB) == int(amount[1])] or cards
    if not cards:
        return None
    first = cards[0]
    if any(card.slug != first.slug for card in cards) and _differ(cards):
        raise UnknownModel(
            f"'{text}' fits several cards: {listed(dict.fromkeys(card.slug for card in cards))}; give one of these",
            given=text,
            known=[card.slug for card in cards],
        )
    return first


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
        architecture = card.architecture if card else ""
    return KERNELS.get(architecture)


def _differ(cards: Sequence[Card]) -> bool:
    return len({(card.architecture, card.memory_bytes) for card in cards}) > 1
