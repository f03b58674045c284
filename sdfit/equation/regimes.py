"""Regimes: ranges of sizes in which a stage's kernels run the same plans, and so one set of coefficients holds.

cuDNN chooses other plans for one image than for several (published: A100, RTX 4090, T4). A convolution of more than
2^31 elements runs image by image and needs copies of one only: first those of the widest tensors, at twice the size
those of tensors half as wide. With two images the copies for one still count, with more the tensors outweigh them.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdfit.equation.sizes import Numbers, Sizes
from sdfit.equation.stages import STAGE

MANY_ELEMENTS = 2**31


@dataclass(frozen=True, slots=True)
class Regime:
    """A range of images per pass and of elements of the widest tensor.

    Parameters
    ----------
    words : str
        How tables name it.
    images : (int, float)
        Fewest and most images, or samples, per pass.
    elements : (int, float)
        From the first, up to but not including the second.
    neighbours : tuple of int
        Where a regime without rows takes its coefficients from: the nearest that needs more rather than less.
    rough : bool
        Whether its one set of coefficients stands for runs whose highest operation differs: off by percents.
    """

    words: str
    images: tuple[int, float]
    elements: tuple[int, float]
    neighbours: tuple[int, ...]
    rough: bool = False

    def holds(self, images: Numbers, elements: Numbers) -> Numbers:
        """Whether a pass lies in it; numbers or arrays."""
        (fewest, most), (start, end) = self.images, self.elements
        return (fewest <= images) & (images <= most) & (start <= elements) & (elements < end)


_FEW, _MANY, _MORE, _ALL = (
    (0, MANY_ELEMENTS),
    (MANY_ELEMENTS, 2 * MANY_ELEMENTS),
    (2 * MANY_ELEMENTS, math.inf),
    math.inf,
)
REGIMES = (
    #      words                                         images     elements    neighbours
    Regime("one image per pass",                         (1, 1),    (0, _ALL),  (1, 2, 3, 4, 5)),
    Regime("several images per pass",                    (2, _ALL), _FEW,       (0, 2, 3, 4, 5)),
    Regime("two images, past 2^31 elements",             (2, 2),    _MANY,      (1, 3, 0, 4, 5)),
    Regime("three images or more, past 2^31 elements",   (3, _ALL), _MANY,      (2, 1, 5, 4, 0), rough=True),
    Regime("two images, past 2^32 elements",             (2, 2),    _MORE,      (2, 5, 3, 1, 0)),
    Regime("three images or more, past 2^32 elements",   (3, _ALL), _MORE,      (3, 4, 2, 1, 0), rough=True),
)  # fmt: skip


ROUGH = (0.62, 0.11)
"""How much less, and more, than the equation says runs of rough regimes need, in units of `sdfit.predict.conformal.scale`: the
furthest of 1,600 random ones beside their simulation (400 a model; less: the tiny VAE, more: 16 images of 1536x680 in float32)."""
IMAGES_THAT_MATTER = max(r.images[0] for r in REGIMES)
"""From so many images or samples on, more of them change no regime by themselves."""
_ELEMENTS = sorted({r.elements[0] for r in REGIMES})
_CELLS = np.array(
    [
        [next(i for i, r in enumerate(REGIMES) if r.holds(images, elements)) for elements in _ELEMENTS]
        for images in range(1, IMAGES_THAT_MATTER + 1)
    ]
)
"""The regime of each number of images that matters, and of each range of elements."""
_OF_ONE: list[list[int]] = _CELLS.tolist()


def regime(stage: str, sizes: Sizes) -> Numbers:
    """The regime of a stage at some sizes, an index into `REGIMES`; a number or an array.

    Each stage counts its own batch and, where its convolutions can pass 2^31 elements, those of its widest tensor.

    Examples
    --------
    >>> sizes = Sizes.of(2048, 2048, 77, 2, 4)
    >>> regime("vae_decoder_blocks", sizes), regime("text_encoder", sizes)
    (2, 1)
    """
    one = STAGE[stage]
    images = getattr(sizes, one.batch)
    if isinstance(images, int):  # a tenth of the time that arrays take
        elements = images * sizes.P * one.widest_channels
        return _OF_ONE[min(images, IMAGES_THAT_MATTER) - 1][bisect(_ELEMENTS, elements) - 1]
    row = np.minimum(images, IMAGES_THAT_MATTER).astype(np.intp) - 1
    if not one.widest_channels:
        found = _CELLS[row, 0]
    else:
        elements = images * sizes.P * one.widest_channels
        found = _CELLS[row, sum((elements >= start).astype(np.intp) for start in map(np.float64, _ELEMENTS[1:]))]
    return found if np.ndim(found) else int(found)


def is_rough(stages: Sequence[str], sizes: Sizes) -> bool:
    """Whether some stage of a run lies in a regime that one set of coefficients describes to percents only.

    Examples
    --------
    >>> is_rough(["vae_decoder_blocks"], Sizes.of(2048, 2048, 77, 3, 6)), is_rough(["unet"], Sizes.of(2048, 2048, 77, 3, 6))
    (True, False)
    """
    return any(REGIMES[int(regime(stage, sizes))].rough for stage in stages)


def edges(stages: Sequence[str]) -> list[float]:
    """Images times pixels of a pass at which the regime of one of some stages may change, in ascending order."""
    ends = {r.elements[0] / STAGE[s].widest_channels for r in REGIMES for s in stages if STAGE[s].widest_channels}
    return sorted(ends - {0.0})
