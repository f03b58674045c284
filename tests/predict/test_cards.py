"""The names of cards, short and long, and the table of them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from sdfit.errors import UnknownModel
from sdfit.predict.cards import KERNELS, Card, card_slug, find_card, table
from sdfit.units import GIB, MIB

NAMES = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-PCIE-40GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100",
    "Tesla T4": "t4",
    "NVIDIA T4": "t4",
    "Tesla V100-SXM2-16GB": "v100",
    "Tesla P100-PCIE-16GB": "p100",
    "NVIDIA H200": "h200",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100",
    "NVIDIA GH200 480GB": "gh200",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA GeForce RTX 3090 Ti": "rtx3090ti",
    "NVIDIA GeForce RTX 4060 Laptop GPU": "rtx4060laptop",
    "NVIDIA GeForce GTX 1070": "gtx1070",
    "NVIDIA RTX 6000 Ada Generation": "rtx6000ada",
    "NVIDIA RTX A6000": "rtxa6000",
    "Quadro RTX 8000": "rtx8000",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "l40s",
    "NVIDIA A10G": "a10g",
    "NVIDIA A10": "a10",
    "NVIDIA A30": "a30",
    "NVIDIA B200": "b200",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb": "a100",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_card_is_called_by_its_model(name: str) -> None:
    """What the driver says becomes the name that people type, for every kind of name in use."""
    assert card_slug(name) == NAMES[name]


@pytest.mark.parametrize("slug", sorted(set(NAMES.values())))
def test_a_short_name_is_its_own_short_name(slug: str) -> None:
    """Shortening twice changes nothing, so --gpu may be given either way."""
    assert card_slug(slug) == slug


def test_a_name_of_nothing_but_makers_still_has_a_name() -> None:
    """It becomes a file name, so it is never empty."""
    assert card_slug("NVIDIA Graphics") == "unnamed"


# -- the table --


def test_the_table_holds_the_common_cards() -> None:
    """At least 80, no name twice, every number plausible, every architecture one that a model answers for."""
    names = [card.name for card in table()]
    assert len(names) >= 80 and len(set(names)) == len(names)
    for card in table():
        assert 2 * GIB <= card.memory_bytes <= 192 * GIB and card.memory_bytes % MIB == 0
        assert card.half in ("fast", "slow", "wrong") and card.memory_from in ("nvidia-smi", "nominal")
        assert card.architecture in KERNELS
        assert (card.half == "wrong") == ("GTX 16" in card.name)


@pytest.mark.parametrize("card", table(), ids=lambda card: card.name)
def test_every_card_is_found_by_its_name(card: Card) -> None:
    """As the driver writes it, as people do, and by its short name: a card of that architecture."""
    assert find_card(card.name) == card
    people = re.sub("NVIDIA |GeForce |Tesla |Quadro | Generation| GPU", "", card.name)
    for name in (card.slug, people, people.lower(), people.replace(" ", "-")):
        found = find_card(name)
        assert found is not None and (found.slug, found.architecture) == (card.slug, card.architecture)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("4090", "NVIDIA GeForce RTX 4090"), ("3060", "NVIDIA GeForce RTX 3060"), ("1080ti", "NVIDIA GeForce GTX 1080 Ti"),
        ("A6000", "NVIDIA RTX A6000"), ("A100 80GB", "NVIDIA A100-SXM4-80GB"), ("rtx 3060 8gb", "NVIDIA GeForce RTX 3060 8GB"),
        ("v100-32gb", "Tesla V100-SXM2-32GB"), ("tesla t4", "Tesla T4"), ("rtx 6000 ada", "NVIDIA RTX 6000 Ada Generation"),
    ],
)  # fmt: skip
def test_names_as_people_write_them(text: str, name: str) -> None:
    """A number alone, an amount beside it, any case."""
    found = find_card(text)
    assert found is not None and found.name == name


def test_a_name_that_fits_several_cards_is_asked_about() -> None:
    """With those that it fits; and what is no card is None."""
    with pytest.raises(UnknownModel, match="'5000' fits several cards: "):
        find_card("5000")
    assert find_card("voodoo2") is None and find_card("a") is None


def test_architectures_that_share_a_model_have_the_same_kernels() -> None:
    """The workspace table holds the same rules, evidence aside, and the same cuBLAS workspace."""
    pytest.importorskip("torch")
    from sdfit.backends.trace.workspaces import ARCHITECTURES

    assert set(ARCHITECTURES) == set(KERNELS)
    for name, model in KERNELS.items():
        one, other = ARCHITECTURES[name], ARCHITECTURES[model]
        assert one.cublas_bytes == other.cublas_bytes
        assert [replace(r, evidence="") for r in one.rules] == [replace(r, evidence="") for r in other.rules]
