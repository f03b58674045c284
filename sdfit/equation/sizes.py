"""The sizes that the terms are products of, and the tiles of the VAE: once, for numbers and for arrays.

B  images per call                       n  samples per UNet call: B, or 2·B with classifier-free guidance
A  effective pixels of one image         L  tokens as the UNet sees them
m  images per VAE pass: 1 with slicing   P  pixels per VAE pass: a tile with tiling, else A
D  pixels that earlier VAE passes of the call left behind: slices and tiles that are done; else 0
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from sdfit.workload import Workload

TILE_PIXELS, TILE_STRIDE = 512, 384
"""Side of a VAE tile and the distance to the next one [pixels] (`tile_sample_min_size`, overlap 0.25)."""

Numbers = Any  # a number, or an array of float64
Array = np.ndarray[Any, np.dtype[np.float64]]


class Sizes(NamedTuple):
    """The sizes of a workload, or of many as arrays of equal length; the letters are those above."""

    B: Numbers
    n: Numbers
    A: Numbers
    L: Numbers
    m: Numbers
    P: Numbers
    D: Numbers

    @classmethod
    def of(
        cls,
        height: Numbers,
        width: Numbers,
        tokens: Numbers,
        batch: Numbers,
        unet_batch: Numbers,
        slicing: Numbers = False,
        tiling: Numbers = False,
    ) -> Sizes:
        """Work the sizes out from effective sides [pixels], tokens, images, UNet samples and the VAE's two options.

        Examples
        --------
        >>> Sizes.of(512, 768, 77, 2, 4, tiling=True)
        Sizes(B=2, n=4, A=393216, L=77, m=2, P=262144, D=622592)
        """
        A = height * width
        if slicing is False and tiling is False:
            return cls(batch, unet_batch, A, tokens, batch, A, 0)
        m = batch - (batch - 1) * slicing
        tiled = tiling * ((height > TILE_PIXELS) | (width > TILE_PIXELS))
        P = A + tiled * (_within(height) * _within(width) - A)
        covered = A + tiled * (tiled_pixels(height) * tiled_pixels(width) - A)
        return cls(batch, unet_batch, A, tokens, m, P, (batch - m) * A + m * (covered - P))

    @classmethod
    def of_workload(cls, w: Workload) -> Sizes:
        """The sizes of one workload, as whole numbers."""
        return cls.of(*w.runs_as, w.vae_slicing, w.vae_tiling)

    @classmethod
    def of_workloads(cls, workloads: Sequence[Workload]) -> Sizes:
        """The sizes of workloads, as arrays of float64."""
        return cls.of(*size_columns(workloads).T)


def _within(side: Numbers) -> Numbers:
    return side - (side - TILE_PIXELS) * (side > TILE_PIXELS)


def tiles(side: int) -> list[int]:
    """The lengths of the VAE's tiles along one side [pixels]: `TILE_STRIDE` apart, cut off at the edge.

    Source: `AutoencoderKL._tiled_encode`, `tiled_decode` of diffusers.

    Examples
    --------
    >>> tiles(1024)
    [512, 512, 256]
    """
    return [min(TILE_PIXELS, side - start) for start in range(0, side, TILE_STRIDE)]


def tiled_pixels(side: Numbers) -> Numbers:
    """Pixels along one side that all `tiles` cover together, overlaps counted twice; a number or an array.

    Examples
    --------
    >>> tiled_pixels(1024), all(tiled_pixels(side) == sum(tiles(side)) for side in range(64, 4096, 8))
    (1280, True)
    """
    count = (side + TILE_STRIDE - 1) // TILE_STRIDE
    whole = (side >= TILE_PIXELS) * ((side - TILE_PIXELS) // TILE_STRIDE + 1)
    cut_off = count - whole  # those that reach beyond the edge
    starts = (count * (count - 1) - whole * (whole - 1)) // 2 * TILE_STRIDE
    return TILE_PIXELS * whole + side * cut_off - starts


def vae_passes(w: Workload) -> Iterator[tuple[int, int, int]]:
    """List the passes that the VAE makes: (m, P, D) of each, in order.

    One for the whole batch; with slicing one for each image; with tiling, of an image with a side above 512, one for
    each tile.

    Examples
    --------
    >>> list(vae_passes(Workload(512, 512, batch_size=2, vae_slicing=True)))
    [(1, 262144, 0), (1, 262144, 262144)]
    >>> list(vae_passes(Workload(512, 640, vae_tiling=True)))
    [(1, 262144, 0), (1, 131072, 262144), ...]
    """
    slices = w.batch_size if w.vae_slicing else 1
    images = w.batch_size // slices
    height, width = w.effective_height, w.effective_width
    tiled = w.vae_tiling and max(height, width) > TILE_PIXELS
    rows, columns = (tiles(height), tiles(width)) if tiled else ([height], [width])
    done = 0
    for _ in range(slices):
        inside = done
        for pixels in (row * column for row in rows for column in columns):
            yield images, pixels, inside
            inside += images * pixels
        done += images * height * width


SIZE_COLUMNS = (
    "effective_height",
    "effective_width",
    "tokens",
    "batch_size",
    "unet_batch",
    "vae_slicing",
    "vae_tiling",
)
"""What `Sizes.of` takes, and the columns of a regression's ``X``."""


def size_columns(workloads: Sequence[Workload]) -> Array:
    """Rows of `SIZE_COLUMNS` for some workloads [pixels, tokens, images, samples, 0 or 1]."""
    rows = [(*w.runs_as, w.vae_slicing, w.vae_tiling) for w in workloads]
    return np.array(rows, dtype=float).reshape(-1, len(SIZE_COLUMNS))


def resolution(w: Workload) -> str:
    """The size that a workload's images run at: what groups rows wherever whole resolutions are left out.

    Examples
    --------
    >>> resolution(Workload(380, 396))
    '376x392'
    """
    height, width, *_ = w.runs_as
    return f"{height}x{width}"


def domain_columns(A: Numbers, B: Numbers, L: Numbers) -> dict[str, Numbers]:
    """What a domain is measured in: pixels, images, images times pixels, tokens; numbers or arrays."""
    return {"A": A, "B": B, "B·A": B * A, "L": L}
