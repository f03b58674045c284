"""The sizes of a run and the tiles of its VAE: the same for a number as for an array, and those of every single pass."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from worlds import swept_workloads

from sdfit.equation.sizes import TILE_PIXELS, TILE_STRIDE, Sizes, domain_columns, tiled_pixels, tiles, vae_passes
from sdfit.workload import MAX_SIDE, MIN_SIDE, VAE_SCALE, Workload

EVERY_SIDE = range(MIN_SIDE, MAX_SIDE + 1, VAE_SCALE)


def test_tiled_pixels_are_those_of_the_tiles() -> None:
    """For every side that a run can have they are the sum of its tiles: as a whole number, and in an array of either kind."""
    sums = [sum(tiles(side)) for side in EVERY_SIDE]
    assert [tiled_pixels(side) for side in EVERY_SIDE] == sums
    for kind in (np.int64, np.float64):
        assert tiled_pixels(np.array(EVERY_SIDE, dtype=kind)).tolist() == sums


def test_tiles_cover_a_side_and_overlap_by_what_is_left() -> None:
    """Tiles begin one stride apart, are never longer than a tile, and the last reaches the edge of the image."""
    for side in EVERY_SIDE:
        lengths = tiles(side)
        assert max(lengths) == min(side, TILE_PIXELS) and min(lengths) > 0
        assert (len(lengths) - 1) * TILE_STRIDE + lengths[-1] == side


@given(swept_workloads())
def test_sizes_of_a_workload_are_those_of_a_row(w: Workload) -> None:
    """One workload as whole numbers, and the same as a row of arrays, have the same sizes."""
    one, rows = Sizes.of_workload(w), Sizes.of_workloads([w, w])
    assert all(type(value) is int for value in one)
    assert [(float(value),) * 2 for value in one] == [tuple(np.broadcast_to(column, 2)) for column in rows]


@given(swept_workloads())
def test_sizes_follow_from_the_passes_that_the_vae_makes(w: Workload) -> None:
    """m and P are those of its first pass, which is the largest; D is what is done when all but one such pass are."""
    sizes, passes = Sizes.of_workload(w), list(vae_passes(w))
    assert {m for m, _, _ in passes} == {sizes.m}
    assert passes[0] == (sizes.m, sizes.P, 0) and max(P for _, P, _ in passes) == sizes.P
    m, last, done = passes[-1]
    assert done + m * last - m * sizes.P == sizes.D


@pytest.mark.parametrize("options", [{}, {"vae_slicing": True}, {"vae_tiling": True}])
def test_what_does_not_reach_the_vae_does_not_move_its_sizes(options: dict[str, bool]) -> None:
    """One image up to the side of a tile is one pass with nothing done before it, whatever the VAE's options."""
    assert Sizes.of_workload(Workload(512, 384, **options)) == Sizes.of_workload(Workload(512, 384))


def test_domain_columns_take_numbers_and_arrays() -> None:
    """The columns of a domain are the same for a number as for an array of it."""
    one, many = domain_columns(4096, 3, 77), domain_columns(*(np.array([x, x]) for x in (4096, 3, 77)))
    assert {name: [value] * 2 for name, value in one.items()} == {name: c.tolist() for name, c in many.items()}
