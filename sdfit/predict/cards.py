"""Short names of cards: from what the driver calls one to what `--gpu` and `sdfit.load` call it."""

from __future__ import annotations

import re

_MAKERS = ("nvidia", "tesla", "geforce", "quadro", "amd", "intel", "graphics", "gpu")
"""Words that name a maker or a line of products; the model says enough without them."""
_FORM = re.compile(r"(sxm\d*|pcie|pci|nvl|hbm\d*e?|oam|ms|mig|\d+gb|\d+g\..*)$")
"""Words that tell how a card is built or how much memory it has; the first of them ends the name."""


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
