"""Regimes: each pass lies in exactly one, numbers and arrays agree, and each stage counts its own batch."""

from __future__ import annotations

import numpy as np
import pytest

from sdfit.equation.regimes import MANY_ELEMENTS, REGIMES, regime
from sdfit.equation.sizes import Sizes
from sdfit.equation.stages import STAGE, STAGES
from sdfit.workload import Workload

SIDES = (64, 512, 1024, 1448, 2048, 2896, 4096, 8192)
BATCHES = (1, 2, 3, 4, 7, 16, 64)
RUNS = [
    Workload(h, w, 77, batch, scale, vae_slicing=slicing, vae_tiling=tiling)
    for h in SIDES
    for w in SIDES
    for batch in BATCHES
    for scale in (1.0, 7.5)
    for slicing in (False, True)
    for tiling in (False, True)
]


@pytest.mark.parametrize("images", [1, 2, 3, 1000])
@pytest.mark.parametrize(
    "elements", [0, MANY_ELEMENTS - 1, MANY_ELEMENTS, 2 * MANY_ELEMENTS - 1, 2 * MANY_ELEMENTS, 1e15]
)
def test_every_pass_lies_in_one_regime(images: int, elements: float) -> None:
    """Of the regimes exactly one holds for any number of images and elements, at the edges too."""
    assert sum(bool(r.holds(images, elements)) for r in REGIMES) == 1


def test_a_regime_without_rows_has_all_others_to_turn_to() -> None:
    """The neighbours of a regime are every other regime, each once."""
    for number, one in enumerate(REGIMES):
        assert sorted((number, *one.neighbours)) == list(range(len(REGIMES)))


@pytest.mark.parametrize("stage", STAGES)
def test_numbers_and_arrays_lie_in_the_same_regime(stage: str) -> None:
    """For thousands of runs the regime of one is that of its row in a table, and the one that the table of regimes says."""
    one_by_one = [regime(stage, Sizes.of_workload(w)) for w in RUNS]
    assert {type(which) for which in one_by_one} == {int}
    sizes = Sizes.of_workloads(RUNS)
    assert np.broadcast_to(regime(stage, sizes), len(RUNS)).tolist() == one_by_one
    images, channels = getattr(sizes, STAGE[stage].batch), STAGE[stage].widest_channels
    holds = which_hold(images, images * sizes.P * channels)
    assert holds[one_by_one, np.arange(len(RUNS))].all()


def which_hold(images: np.ndarray, elements: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """Which regime, a row each, holds for which run."""
    return np.array([r.holds(images, elements) for r in REGIMES])


def test_the_decoder_meets_every_regime() -> None:
    """The runs above reach all regimes of the decoder's blocks, and only the first two of a stage that cannot pass 2^31."""
    sizes = Sizes.of_workloads(RUNS)
    assert set(np.unique(regime("vae_decoder_blocks", sizes))) == set(range(len(REGIMES)))
    assert set(np.unique(regime("unet", sizes))) == {0, 1}


@pytest.mark.parametrize("stage", ["text_encoder", "safety_checker", "unet"])
@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "options", [{"vae_slicing": True}, {"vae_tiling": True}, {"vae_slicing": True, "vae_tiling": True}]
)
def test_how_the_vae_passes_is_no_matter_to_other_stages(stage: str, batch: int, options: dict[str, bool]) -> None:
    """Slicing and tiling change the regime of the VAE's stages alone."""
    plain, changed = (Sizes.of_workload(Workload(2048, 1536, batch_size=batch, **o)) for o in ({}, options))
    assert regime(stage, plain) == regime(stage, changed)
