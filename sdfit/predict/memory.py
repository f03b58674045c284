"""How much memory a run may take: what was given, what is free on the card here, or what a named card leaves.

What a caller gives is taken as it is: what PyTorch may take. Otherwise what is not PyTorch's comes off: the CUDA context
and, on a card that drives a screen, a desktop. Both are stated in the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from sdfit.errors import InvalidWorkload
from sdfit.predict.cards import CONTEXT_BYTES, Card, card_slug
from sdfit.predict.nvml import Nvml
from sdfit.units import MIB, format_bytes, parse_bytes

DESKTOP_BYTES = 600 * MIB
"""What a desktop and a browser take on a card that drives a screen: assumed, not measured."""
FREE = "free"


@dataclass(frozen=True, slots=True)
class Memory:
    """An amount of memory, and where it comes from.

    Parameters
    ----------
    memory_bytes : int
        What PyTorch may take.
    words : str
        How it came about, for the answer.
    """

    memory_bytes: int
    words: str


def available(memory: str | float | None, card: Card | None = None) -> Memory:
    """Work out how much memory there is.

    Parameters
    ----------
    memory : str or float, optional
        An amount, ``"15 GiB"`` or bytes; ``"free"``: what is free on the card in this machine. None: the same if the card
        asked for is in this machine, otherwise what that card leaves.
    card : Card, optional
        The card asked for; None: unknown.

    Raises
    ------
    InvalidWorkload
        If nothing was given and nothing can be known.

    Examples
    --------
    >>> available("8g").words
    '8.000 GiB as given'
    >>> from sdfit.predict.cards import find_card
    >>> available(None, find_card("Tesla P40")).words
    '23.561 GiB: 24.000 GiB of a Tesla P40 less 450.0 MiB for a CUDA context (assumed)'
    """
    if memory is not None and memory != FREE:
        amount = parse_bytes(memory)
        return Memory(amount, f"{format_bytes(amount)} as given")
    here = Nvml.first(card_slug(card.name) if card else None)
    if here is not None:
        free = max(here.total() - here.used() - CONTEXT_BYTES, 1)
        return Memory(
            free,
            f"{format_bytes(free)}: {format_bytes(here.total())} of the {here.name} here less {format_bytes(here.used())} in "
            f"use and {format_bytes(CONTEXT_BYTES)} for a CUDA context (assumed)",
        )
    if memory == FREE:
        raise InvalidWorkload("there is no card here whose free memory could be asked for; give --memory, as in 8GiB")
    if card is None:
        raise InvalidWorkload(
            "how much memory there is cannot be known; give --memory, as in 8GiB, or a card of: sdfit cards"
        )
    taken = [(CONTEXT_BYTES, "a CUDA context")] + [(DESKTOP_BYTES, "a desktop")] * card.drives_screen
    left = card.memory_bytes - sum(amount for amount, _ in taken)
    less = " and ".join(f"{format_bytes(amount)} for {what}" for amount, what in taken)
    return Memory(
        left, f"{format_bytes(left)}: {format_bytes(card.memory_bytes)} of a {card.name} less {less} (assumed)"
    )
