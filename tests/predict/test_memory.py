"""How much memory there is: what was given, what is free here, or what a named card leaves, each said in words."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sdfit.errors import InvalidWorkload
from sdfit.predict import memory
from sdfit.predict.cards import CONTEXT_BYTES, find_card
from sdfit.predict.memory import DESKTOP_BYTES, available
from sdfit.units import GIB, MIB


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without one, whatever this one has."""
    monkeypatch.setattr(memory.Nvml, "first", classmethod(lambda cls, slug=None: None))


@pytest.mark.parametrize(
    ("text", "amount"),
    [("8GB", 8 * 10**9), ("8 GiB", 8 * GIB), ("8g", 8 * GIB), ("800 MiB", 800 * MIB), (8e9, 8 * 10**9)],
)
def test_an_amount_is_taken_as_it_is(text: str | float, amount: int) -> None:
    """And echoed."""
    found = available(text)
    assert found.memory_bytes == amount and "as given" in found.words


def test_a_named_card_leaves_what_context_and_desktop_do_not_take() -> None:
    """A desktop only where there usually is one."""
    t4, rtx = find_card("t4"), find_card("rtx3060")
    assert t4 and rtx
    assert available(None, t4).memory_bytes == t4.memory_bytes - CONTEXT_BYTES
    assert available(None, rtx).memory_bytes == rtx.memory_bytes - CONTEXT_BYTES - DESKTOP_BYTES
    assert "desktop" in available(None, rtx).words and "desktop" not in available(None, t4).words


def test_the_card_here_is_asked_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its total less what is in use and a context, and the words say so."""
    here = SimpleNamespace(name="Tesla T4", total=lambda: 15 * GIB, used=lambda: 2 * GIB)
    monkeypatch.setattr(
        memory.Nvml, "first", classmethod(lambda cls, slug=None: here if slug in (None, "t4") else None)
    )
    for card in (None, find_card("t4")):
        for asked in (None, "free"):
            found = available(asked, card)
            assert found.memory_bytes == 13 * GIB - CONTEXT_BYTES and "2.000 GiB in use" in found.words
    other = find_card("a100")
    assert other and available(None, other).memory_bytes == other.memory_bytes - CONTEXT_BYTES


def test_what_cannot_be_known_is_asked_for() -> None:
    """Neither an amount nor a card, or free memory without one; a bare number has no unit."""
    with pytest.raises(InvalidWorkload, match="give --memory, as in 8GiB"):
        available(None)
    with pytest.raises(InvalidWorkload, match="no card here whose free memory"):
        available("free", find_card("t4"))
    with pytest.raises(InvalidWorkload, match="'12' has no unit; write 12GiB"):
        available("12")
