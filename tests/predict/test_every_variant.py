"""Every variant there can be, on every shipped model and on one with regimes: one answer, and each option moves its own."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds import far_and_wide, with_regimes

from sdfit.equation.sizes import Sizes
from sdfit.errors import UnknownVariant
from sdfit.files import shipped
from sdfit.predict.loading import load_artifact
from sdfit.predict.predictor import Predictor
from sdfit.workload import CHOICES, VARIANT_FIELDS, Workload

MODELS = ["fake with regimes", *sorted(path.stem for path in shipped("models").glob("*.joblib"))]
OPTIONS = [dict(zip(VARIANT_FIELDS, key, strict=True)) for key in itertools.product(*CHOICES.values())]
DRAWS = 6
"""Workloads per variant."""


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, fake_model: Path) -> Predictor:
    """A shipped model, or the fake card's with made-up coefficients of their own in each regime."""
    if request.param in MODELS[1:]:
        return Predictor(load_artifact(shipped("models") / f"{request.param}.joblib"))
    return Predictor(with_regimes(load_artifact(fake_model), random.Random(3)))


def known(model: Predictor) -> list[dict[str, Any]]:
    """The options of the variants that a model can predict."""
    found = []
    for options in OPTIONS:
        try:
            model.variant(tuple(options.values()))  # type: ignore[arg-type]
        except UnknownVariant:
            continue
        found.append(options)
    return found


def test_a_call_and_a_row_of_a_table_agree(model: Predictor) -> None:
    """Over sizes of every regime, in every variant and metric that the model has, f(...) is f.predict(...) to 1e-12."""
    rng = random.Random(model.name)
    variants = known(model)
    workloads = [w for options in variants for w in far_and_wide(rng, DRAWS, options)]
    columns = {name: np.array([getattr(w, name) for w in workloads]) for name in workloads[0].to_dict()}
    assert len(variants) >= 40
    for metric in ("allocated", *model.artifact.metrics):
        rows = model.predict(columns, metric=metric)
        calls = np.array([float(model(**w.to_dict(), metric=metric)) for w in workloads])
        given = np.array([float(model.predict_workload(w, metric=metric)) for w in workloads])
        for one in (calls, given):
            off = np.abs(one / rows - 1)
            assert off.max() < 1e-12, (metric, workloads[int(off.argmax())])


def test_the_peak_is_that_of_the_highest_stage(model: Predictor) -> None:
    """In every variant allocated memory is the highest of the stage peaks, and the stage named is the one that has it."""
    rng = random.Random(model.name)
    for w in (w for options in known(model) for w in far_and_wide(rng, 2, options)):
        peak = model(**w.to_dict())
        assert max(peak.stage_peaks.values()) == peak.stage_peaks[peak.stage] == pytest.approx(peak, rel=1e-12)


def test_calls_and_tables_know_the_same_variants(model: Predictor) -> None:
    """A variant that was never swept is refused by a call, by a Workload and by a table, with its own name."""
    swept = known(model)
    never = [options for options in OPTIONS if options not in swept]
    for options in never:
        fails = options["vae"] == "tiny" and options["offload"] == "group_block"
        words = "fails in diffusers itself" if fails else options["dtype"]
        for ask in (
            lambda options=options: model(512, 512, **options),
            lambda options=options: model.predict_workload(Workload(512, 512, **options)),
            lambda options=options: model.predict({"height": [512], "width": [512]} | options),
        ):
            with pytest.raises(UnknownVariant, match=words):
                ask()
    assert never


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 9, 64])
@pytest.mark.parametrize("size", [(256, 256), (512, 768), (2048, 2048), (4096, 3072)])
def test_slicing_and_tiling_of_the_vae_move_only_the_vae(model: Predictor, batch: int, size: tuple[int, int]) -> None:
    """The text encoder, the UNet and the checker peak where they did, at any batch; with several images the VAE moves."""
    plain, sliced, tiled, both = (
        stages_of(model, Workload(*size, batch_size=batch, vae_slicing=s, vae_tiling=t))
        for s, t in ((False, False), (True, False), (False, True), (True, True))
    )
    for changed in (sliced, tiled, both):
        others = {stage for stage in plain if not stage.startswith("vae")}
        assert {stage: changed[stage] for stage in others} == {stage: plain[stage] for stage in others}
        assert others == {"text_encoder", "unet", "safety_checker"}
    assert (sliced["vae_decoder_blocks"] != plain["vae_decoder_blocks"]) == (batch > 1)


def stages_of(model: Predictor, w: Workload) -> dict[str, float]:
    """The stage peaks of a workload, read off the model itself."""
    return model.variant(w.variant).stage_peaks(Sizes.of_workload(w))


def test_half_a_table_of_one_regime_and_half_of_another(model: Predictor) -> None:
    """Rows keep their own regime's coefficients when a table crosses from one regime into the next."""
    sides = np.arange(512, 8192, 56)
    for batch in (1, 2, 3):
        rows = model.predict({"height": sides, "width": 1024, "batch_size": batch})
        alone = [float(model(int(side), 1024, batch_size=batch)) for side in sides]
        assert np.abs(rows / alone - 1).max() < 1e-12
