"""How much memory a run may take: what was given, what is free on the card here, or what a named card leaves.

What a caller gives is taken as it is: what PyTorch may take. Otherwise what is not PyTorch's comes off: the CUDA context
and, on a card that drives a screen, a desktop. Both are stated in the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from sdfit.errors import InvalidWorkload, listed
from sdfit.predict.cards import DESKTOP_BYTES, LEAST_SHARE, Card, also_sold, context_bytes
from sdfit.predict.nvml import Here, here
from sdfit.units import GIB, MIB, format_bytes, parse_bytes

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
    >>> available(None, find_card("Tesla T4")).words
    '14.312 GiB: 14.562 GiB that CUDA has on a Tesla T4 less 256.0 MiB for a CUDA context (assumed)'
    """
    if memory is not None and not (isinstance(memory, str) and memory.strip().lower() == FREE):
        amount = parse_bytes(memory)
        return Memory(amount, f"{format_bytes(amount)} as given")
    found = here(card.slug if card else None)
    if found is not None and not (card and card.slice and found.total_bytes > card.memory_gib * GIB):  # the whole card
        return _free(found)
    if memory is not None:
        which = f"no {card.name}" if card else "no card"
        raise InvalidWorkload(
            f"there is {which} here whose free memory could be asked for; give --memory, as in 8GiB, or leave it out for "
            "what the card named by --gpu leaves",
            given=memory,
        )
    if card is None:
        raise InvalidWorkload(
            "how much memory there is cannot be known; give --memory, as in 8GiB, or a card of: sdfit cards"
        )
    return left(card)


def _free(card: Here) -> Memory:
    """What is free on a card in this machine."""
    context = 0 if card.context else context_bytes(card.total_bytes)
    free = max(card.free_bytes - context, 1)
    used = card.total_bytes - card.free_bytes
    less = f"{format_bytes(used)} in use" + (
        f" and {format_bytes(context)} for a CUDA context (assumed)" if context else ""
    )
    return Memory(
        free, f"{format_bytes(free)} free: {format_bytes(card.total_bytes)} of the {card.name} here less {less}"
    )


def left(card: Card) -> Memory:
    """What a card leaves that nobody is known to use."""
    taken = [(card.context_bytes, "a CUDA context")] + [(DESKTOP_BYTES, "a desktop")] * card.drives_screen
    left = card.memory_bytes - sum(amount for amount, _ in taken)
    has = "that CUDA has on" if card.found else f"that CUDA is taken to have of {card.memory_gib} GiB on"
    less = " and ".join(f"{format_bytes(amount)} for {what}" for amount, what in taken)
    words = f"{format_bytes(left)}: {format_bytes(card.memory_bytes)} {has} {_a(card.name)} less {less} (assumed)"
    others = also_sold(card)
    if others:
        words += f"; it is sold with {listed(others)} GiB too: name it {card.slug}-{others[-1]}gb"
    return Memory(left, words)


def of_box(gib: int) -> int:
    """What a card with so many GiB on its box leaves at the least, beside a CUDA context and a desktop [bytes].

    Examples
    --------
    >>> format_bytes(of_box(8))
    '6.270 GiB'
    """
    total = int(gib * 1024 * LEAST_SHARE[""]) * MIB
    return left(Card(f"card of {gib} GB", "0.0", gib, total, "geforce", found=False)).memory_bytes


def _a(name: str) -> str:
    return f"{'an' if name.startswith('N') else 'a'} {name}"
