"""diffusers' VAEs between their modules' calls, written out: sampling, slicing, tiling (see `sdfit.predict.simulation.pipeline`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product

from sdfit.predict.simulation.modules import IMAGE_CHANNELS, LATENT_CHANNELS, Modules
from sdfit.predict.simulation.programs import DECODER, ENCODER, Lengths
from sdfit.predict.simulation.tape import Tensor, concatenated, empty
from sdfit.workload import VAE_SCALE, Workload

TILE_PIXELS, OVERLAP = 512, 0.25
"""`tile_sample_min_size` and `tile_overlap_factor` of `AutoencoderKL`."""
TILE_LATENTS = TILE_PIXELS // VAE_SCALE
TINY_OVERLAP, MASK_BYTES = 0.125, 4
"""Of `AutoencoderTiny`, whose tiles are as large; it blends them by masks in float32."""

ENDS = 3
"""Of a row of tiles, or of images one by one, so many of each end tell what is live at most: the first begin it, the last two may
be cut off, and the one before is whole. Between them each takes what the one before did, beside one result more."""


def vae_calls(workload: Workload, *, every: bool) -> Iterator[tuple[str, Lengths, int]]:
    """With what a run calls the VAE's encoder and decoder, and how often with each; as `Vae` does, which may not play ``every`` one."""
    batch = 1 if workload.vae_slicing else workload.batch_size
    images = sum(_shown(workload.batch_size // batch, every=every))
    overlap = OVERLAP if workload.vae == "kl" else TINY_OVERLAP
    for kind, scale, tile in ((ENCODER, 1, TILE_PIXELS), (DECODER, VAE_SCALE, TILE_LATENTS)):
        sides = workload.effective_height // scale, workload.effective_width // scale
        if workload.vae_tiling and (workload.vae != "kl" or max(sides) > tile):
            tiles = (_tiles(side, tile, overlap, every=every) for side in sides)
            rows, columns = (Counter(size for size, shown in row if shown).items() for row in tiles)
            for (height, down), (width, across) in product(rows, columns):
                yield kind, Lengths(batch, height, width), images * down * across
        else:
            yield kind, Lengths(batch, *sides), images


class Vae:
    """`AutoencoderKL` or `AutoencoderTiny`.

    Parameters
    ----------
    modules : Modules
    """

    def __init__(self, modules: Modules) -> None:
        self.modules, self.workload = modules, modules.workload
        self._every = modules.meter.events is not None
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
        if not self.workload.vae_slicing:
            return [run(x)]
        found: list[Tensor] = []
        for shown in _shown(x.shape[0], every=self._every):
            found.append(run(x.view(1, *x.shape[1:])) if shown else found[-1].like())
        return found

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
        rows, columns = (_tiles(x.shape[axis], side, TINY_OVERLAP, every=self._every) for axis in (2, 3))
        for i, height in ((i, height) for i, (height, shown) in enumerate(rows) if shown):
            for j, width in ((j, width) for j, (width, shown) in enumerate(columns) if shown):
                tile = run(x.view(*x.shape[:2], height, width))
                tile_out = out.view(*tile.shape)
                blend_mask_i = blend_masks.new(mask) if i == 0 else blend_masks.view(*mask)
                blend_mask_j = blend_masks.new(mask) if j == 0 else blend_masks.view(*mask)
                blend_mask = blend_mask_i * blend_mask_j
                blend_mask = blend_mask.view(*tile.shape[2:])
                blend_mask * tile + (1 - blend_mask) * tile_out
        return out

    def _tiled_encode(self, x: Tensor) -> Tensor:
        return self._blended(self._encoded_tiles(x), TILE_LATENTS)

    def _tiled_decode(self, z: Tensor) -> Tensor:
        return self._blended(self._decoded_tiles(z), TILE_PIXELS)

    def _encoded_tiles(self, x: Tensor) -> list[list[Tensor]]:
        rows, tile = [], x
        for height, down in _tiles(x.shape[2], TILE_PIXELS, every=self._every):
            row: list[Tensor] = []
            for width, across in _tiles(x.shape[3], TILE_PIXELS, every=self._every):
                if not (down and across):
                    row.append(tile.new((*tile.shape[:2], height // VAE_SCALE, width // VAE_SCALE)))
                    continue
                tile = x.view(*x.shape[:2], height, width)
                tile = self.modules.encoder(tile)
                tile = self._convolved(tile)
                row.append(tile)
            rows.append(row)
        return rows

    def _decoded_tiles(self, z: Tensor) -> list[list[Tensor]]:
        rows, decoded = [], z
        for height, down in _tiles(z.shape[2], TILE_LATENTS, every=self._every):
            row: list[Tensor] = []
            for width, across in _tiles(z.shape[3], TILE_LATENTS, every=self._every):
                if not (down and across):
                    row.append(decoded.new((*decoded.shape[:2], height * VAE_SCALE, width * VAE_SCALE)))
                    continue
                tile = z.view(*z.shape[:2], height, width)
                tile = self._convolved(tile)
                decoded = self.modules.decoder(tile)
                row.append(decoded)
            rows.append(row)
        return rows

    def _blended(self, rows: list[list[Tensor]], side: int) -> Tensor:
        """The tiles in one; of a blend one row stands for all, as each takes what the one before gave back: less than all in one."""
        row_limit = side - int(side * OVERLAP)
        result_rows = []
        for i, row in enumerate(rows):
            result_row = []
            for j, tile in enumerate(row):
                if i > 0 and self._every:
                    _blend(tile.view(*tile.shape[:2], tile.shape[3]))
                if j > 0 and self._every:
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


def _shown(count: int, *, every: bool) -> list[bool]:
    """Which of a row are played: all of them, but where only what is live at most is asked for."""
    return [every or min(k, count - 1 - k) < ENDS for k in range(count)]


def _tiles(side: int, tile: int, overlap: float = OVERLAP, *, every: bool) -> list[tuple[int, bool]]:
    """Sizes of the tiles along a side, and which are played."""
    sizes = [min(tile, side - first) for first in range(0, side, int(tile * (1 - overlap)))]
    return list(zip(sizes, _shown(len(sizes), every=every), strict=True))


def _blend(edge: Tensor) -> None:
    edge * 0.5 + edge * 0.5
