"""The names of cards, short and long, and the table of them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from sdfit.errors import UnknownModel
from sdfit.predict.cards import DESKTOP_BYTES, KERNELS, KINDS, Card, card_slug, find_card, table
from sdfit.units import GIB

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
    """At least 80, none twice, every number plausible, every architecture one that a model answers for."""
    rows = [(card.name, card.memory_gib) for card in table()]
    assert len({card.slug for card in table()}) >= 80 and len(set(rows)) == len(rows)
    assert sorted({card.kind for card in table()}) == sorted(KINDS)
    for card in table():
        assert 2 <= card.memory_gib <= 192 and 0.9 < card.memory_bytes / (card.memory_gib * GIB) < 1, card
        assert card.half in ("fast", "slow", "wrong") and card.architecture in KERNELS
        assert (card.half == "slow") == (card.architecture == "sm61")
        assert card.context_bytes + DESKTOP_BYTES * card.drives_screen < card.memory_bytes
    wrong = {card.slug for card in table() if card.half == "wrong"}
    assert wrong == {slug for slug in wrong if re.search("gtx16|t600|t1000|t2000", slug)}
    assert wrong >= {card.slug for card in table() if "GTX 16" in card.name}


def test_cards_of_one_short_name_are_of_one_architecture() -> None:
    """Whatever else tells them apart, the same model answers, and float16 is as good."""
    for slug in {card.slug for card in table()}:
        assert len({(card.architecture, card.half) for card in table() if card.slug == slug}) == 1, slug


def test_no_name_leads_to_another_card() -> None:
    """No card's other name is a card's short name or another card's other name."""
    slugs = {card.slug for card in table()}
    others = [(card_slug(name), card.slug) for card in table() for name in card.also]
    assert not [pair for pair in others if pair[0] in slugs - {pair[1]}]
    assert len({name for name, _ in others}) == len(set(others))


@pytest.mark.parametrize("card", table(), ids=lambda card: f"{card.name} {card.memory_gib}")
def test_every_card_is_found_by_its_names(card: Card) -> None:
    """As the driver writes it, as people do, by its short name, and by its memory: a card of that kind."""
    people = re.sub("NVIDIA |GeForce |Tesla |Quadro | Generation| GPU", "", card.name)
    for name in (card.name, card.slug, people, people.lower(), people.replace(" ", "-"), *card.also):
        found = find_card(name)
        assert found is not None and (found.slug, found.architecture) == (card.slug, card.architecture)
        alike = [c.memory_gib for c in table() if c.name == card.name]
        assert name != card.name or (found.name, found.memory_gib) == (card.name, min(alike))
    named = find_card(f"{card.slug}-{card.memory_gib}gb")
    assert named is not None and (named.slug, named.memory_gib) == (card.slug, card.memory_gib)


@pytest.mark.parametrize(
    ("text", "name", "gib"),
    [
        ("4090", "NVIDIA GeForce RTX 4090", 24), ("3060", "NVIDIA GeForce RTX 3060", 8),
        ("1080ti", "NVIDIA GeForce GTX 1080 Ti", 11), ("A6000", "NVIDIA RTX A6000", 48),
        ("A100 80GB", "NVIDIA A100 80GB PCIe", 80), ("a100", "NVIDIA A100-PCIE-40GB", 40),
        ("rtx 3060 12gb", "NVIDIA GeForce RTX 3060", 12), ("v100-32gb", "Tesla V100-PCIE-32GB", 32),
        ("tesla t4", "Tesla T4", 16), ("rtx 6000 ada", "NVIDIA RTX 6000 Ada Generation", 48),
        ("RTX 3060 Laptop", "NVIDIA GeForce RTX 3060 Laptop GPU", 6), ("h100 nvl", "NVIDIA H100 NVL", 94),
        ("2060 laptop", "NVIDIA GeForce RTX 2060", 6), ("rtx pro 6000", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 96),
        ("NVIDIA GeForce RTX 2070 with Max-Q Design", "NVIDIA GeForce RTX 2070", 8), ("geforce gtx 1660", "NVIDIA GeForce GTX 1660", 6),
        ("RTX 3060 12 GB", "NVIDIA GeForce RTX 3060", 12), ("A100-80G", "NVIDIA A100 80GB PCIe", 80), ("NVIDIA GH200 480GB", "NVIDIA GH200 480GB", 96),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5), ("h200 mig 3g.71gb+me", "NVIDIA H200 MIG 3g.71gb", 71),
        ("a100 1g.5gb", "NVIDIA A100-PCIE-40GB MIG 1g.5gb", 5), ("a100 7g.80gb", "NVIDIA A100 80GB PCIe MIG 7g.80gb", 80),
    ],
)  # fmt: skip
def test_names_as_people_write_them(text: str, name: str, gib: int) -> None:
    """A number alone, an amount beside it, any case; of several amounts the least."""
    found = find_card(text)
    assert found is not None and (found.name, found.memory_gib) == (name, gib)


def test_a_name_that_fits_several_cards_is_asked_about() -> None:
    """With those that it fits; what is no card is None; an amount that a card is not sold with is refused."""
    with pytest.raises(UnknownModel, match="'5000' fits several cards: "):
        find_card("5000")
    with pytest.raises(UnknownModel, match="no 'rtx 3060 16gb' in the table of cards; there are those of 8, 12 GiB"):
        find_card("rtx 3060 16gb")
    with pytest.raises(UnknownModel, match="no '4090 48gb' in the table of cards; there are those of 24 GiB"):
        find_card("4090 48gb")
    for text, why in (
        ("a100 9g.99gb", "it has 40 GiB"),
        ("NVIDIA A100-SXM4-40GB MIG 7g.80gb", "it has 40 GiB"),
        ("t4 1g.5gb", "it cannot be parted"),
    ):
        with pytest.raises(UnknownModel, match=rf"' has no '\dg\.\d+gb': {why}"):
            find_card(text)
    assert [find_card(name) for name in ("voodoo2", "a", "rtx", "980 ti", "090", "")] == [None] * 6


def test_architectures_that_share_a_model_have_the_same_kernels() -> None:
    """The workspace table holds the same rules, evidence aside, and the same cuBLAS workspace."""
    pytest.importorskip("torch")
    from sdfit.predict.simulation.workspaces import ARCHITECTURES

    assert set(ARCHITECTURES) == set(KERNELS)
    for name, model in KERNELS.items():
        one, other = ARCHITECTURES[name], ARCHITECTURES[model]
        assert one.cublas_bytes == other.cublas_bytes
        assert [replace(r, evidence="") for r in one.rules] == [replace(r, evidence="") for r in other.rules]
