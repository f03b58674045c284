"""diffusers' VAEs between their modules' calls, written out: sampling, slicing, tiling (see `sdfit.predict.simulation.pipeline`)."""

from __future__ import annotations

from collections.abc import Callable

from sdfit.predict.simulation.modules import IMAGE_CHANNELS, LATENT_CHANNELS, Modules
from sdfit.predict.simulation.tape import Tensor, concatenated, empty
from sdfit.workload import VAE_SCALE

TILE_PIXELS, OVERLAP = 512, 0.25
"""`tile_sample_min_size` and `tile_overlap_factor` of `AutoencoderKL`."""
TILE_LATENTS = TILE_PIXELS // VAE_SCALE


TINY_OVERLAP, MASK_BYTES = 0.125, 4
"""Of `AutoencoderTiny`, whose tiles are as large; it blends them by masks in float32."""


class Vae:
    """`AutoencoderKL` or `AutoencoderTiny`.

    Parameters
    ----------
    modules : Modules
    """

    def __init__(self, modules: Modules) -> None:
        self.modules, self.workload = modules, modules.workload
        self._kl = self.workload.vae == "kl"

    def encode(self, image: Tensor) -> Tensor:
        """`retrieve_latents` of what `encode` gives."""
        if not self._kl:
            return self._sliced(self._encode, image)
        posterior = self._posterior(image)
        return posterior.sample()

    def decode(self, z: Tensor) -> Tensor:
        """`decode`."""
        return self._sliced(self._decode, z)

    def _posterior(self, x: Tensor) -> _Gaussian:
        slices = self._slices(self._encode, x)
        return _Gaussian(concatenated(slices, 0) if len(slices) > 1 else slices.pop())

    def _sliced(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        slices = self._slices(run, x)
        return concatenated(slices, 0) if len(slices) > 1 else slices.pop()

    def _slices(self, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
        if self.workload.vae_slicing:
            return [run(x.view(1, *x.shape[1:])) for _ in range(x.shape[0])]
        return [run(x)]

    def _encode(self, x: Tensor) -> Tensor:
        if self.workload.vae_tiling and not self._kl:
            shape = (x.shape[0], LATENT_CHANNELS, *(side // VAE_SCALE for side in x.shape[2:]))
            return self._tiny_tiled(x, self.modules.encoder, shape, (TILE_PIXELS, TILE_LATENTS))
        if self.workload.vae_tiling and max(x.shape[2:]) > TILE_PIXELS:
            return self._tiled_encode(x)
        enc = self.modules.encoder(x)
        return self._convolved(enc)

    def _decode(self, z: Tensor) -> Tensor:
        if self.workload.vae_tiling and not self._kl:
            shape = (z.shape[0], IMAGE_CHANNELS, *(side * VAE_SCALE for side in z.shape[2:]))
            return self._tiny_tiled(z, self.modules.decoder, shape, (TILE_LATENTS, TILE_PIXELS))
        if self.workload.vae_tiling and max(z.shape[2:]) > TILE_LATENTS:
            return self._tiled_decode(z)
        z = self._convolved(z)
        return self.modules.decoder(z)

    def _convolved(self, x: Tensor) -> Tensor:
        """`quant_conv` and `post_quant_conv`, which the tiny VAE lacks."""
        return self.modules.convolved(x, x.shape[1]) if self._kl else x

    def _tiny_tiled(
        self, x: Tensor, run: Callable[[Tensor], Tensor], shape: tuple[int, ...], tile_sides: tuple[int, int]
    ) -> Tensor:
        """`AutoencoderTiny._tiled_encode` and `_tiled_decode`: tiles of a side go in, of another come out."""
        side, mask = tile_sides[0], (tile_sides[1], tile_sides[1])
        blend_masks = empty(self.modules.meter, (2, *mask), MASK_BYTES)
        out = empty(self.modules.meter, shape, MASK_BYTES)
        for i, height in enumerate(_tiles(x.shape[2], side, TINY_OVERLAP)):
            for j, width in enumerate(_tiles(x.shape[3], side, TINY_OVERLAP)):
                tile = run(x.view(*x.shape[:2], height, width))
                tile_out = out.view(*tile.shape)
                blend_mask_i = blend_masks.new(mask) if i == 0 else blend_masks.view(*mask)
                blend_mask_j = blend_masks.new(mask) if j == 0 else blend_masks.view(*mask)
                blend_mask = blend_mask_i * blend_mask_j
                blend_mask = blend_mask.view(*tile.shape[2:])
                blend_mask * tile + (1 - blend_mask) * tile_out
        return out

    def _tiled_encode(self, x: Tensor) -> Tensor:
        return _blended(self._encoded_tiles(x), TILE_LATENTS)

    def _tiled_decode(self, z: Tensor) -> Tensor:
        return _blended(self._decoded_tiles(z), TILE_PIXELS)

    def _encoded_tiles(self, x: Tensor) -> list[list[Tensor]]:
        rows = []
        for height in _tiles(x.shape[2], TILE_PIXELS):
            row = []
            for width in _tiles(x.shape[3], TILE_PIXELS):
                tile = x.view(*x.shape[:2], height, width)
                tile = self.modules.encoder(tile)
                tile = self._convolved(tile)
                row.append(tile)
            rows.append(row)
        return rows

    def _decoded_tiles(self, z: Tensor) -> list[list[Tensor]]:
        rows = []
        for height in _tiles(z.shape[2], TILE_LATENTS):
            row = []
            for width in _tiles(z.shape[3], TILE_LATENTS):
                tile = z.view(*z.shape[:2], height, width)
                tile = self._convolved(tile)
                decoded = self.modules.decoder(tile)
                row.append(decoded)
            rows.append(row)
        return rows


def _blended(rows: list[list[Tensor]], side: int) -> Tensor:
    """The tiles in one; of a blend one row stands for all, as each takes what the one before gave back."""
    row_limit = side - int(side * OVERLAP)
    result_rows = []
    for i, row in enumerate(rows):
        result_row = []
        for j, tile in enumerate(row):
            if i > 0:
                _blend(tile.view(*tile.shape[:2], tile.shape[3]))
            if j > 0:
                _blend(tile.view(*tile.shape[:2], tile.shape[2]))
            result_row.append(tile.view(*tile.shape[:2], *(min(s, row_limit) for s in tile.shape[2:])))
        result_rows.append(concatenated(result_row, 3))
    joined = concatenated(result_rows, 2)
    del rows, row, tile, result_rows, result_row
    return joined


class _Gaussian:
    """`DiagonalGaussianDistribution`; goes in the order of its fields."""

    def __init__(self, parameters: Tensor) -> None:
        batch, channels, *rest = parameters.shape
        self.parameters = parameters
        self.mean = parameters.view(batch, channels // 2, *rest)
        self.logvar = self.mean.like()
        self.std = (0.5 * self.logvar).like()
        self.var = self.logvar.like()

    def sample(self) -> Tensor:
        sample = self.mean.like()
        x = self.mean + self.std * sample
        return x


def _tiles(side: int, tile: int, overlap: float = OVERLAP) -> list[int]:
    """Sizes of the tiles along a side."""
    return [min(tile, side - first) for first in range(0, side, int(tile * (1 - overlap)))]


def _blend(edge: Tensor) -> None:
    edge * 0.5 + edge * 0.5
