"""The short names of cards."""

from __future__ import annotations

import pytest

from sdfit.predict.cards import card_slug

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
