"""What the equation alone says of combinations that were never swept together, and of runs that it is known to describe roughly."""

from __future__ import annotations

import numpy as np
import pytest

import sdfit
from sdfit.equation.metrics import Place
from sdfit.fit.scores import FEWEST_KINDS, of_kinds
from sdfit.predict.predictor import Predictor
from sdfit.predict.replayed import Replayed
from sdfit.workload import Workload

TOO_LOW = [  # where the bound lay 16 to 22 % below the simulation when it rested on other kinds' errors
    ("sm75", Workload(872, 736, guidance_scale=1.0, dtype="float32", attention="sliced", vae="tiny", vae_tiling=True, offload="model")),
    ("sm90", Workload(3040, 424, 154, guidance_scale=1.0, attention="math", vae_tiling=True, offload="model")),
    ("sm90", Workload(304, 2528, dtype="float32", attention="math", vae="tiny", offload="model")),
    ("sm70", Workload(2264, 760, batch_size=2, attention="sliced", vae_tiling=True, offload="model")),
    ("sm61", Workload(776, 160, batch_size=8, dtype="bfloat16", vae_slicing=True, vae_tiling=True, safety_checker=False)),
]  # fmt: skip
ROUGH = [Workload(1536, 680, batch_size=16, guidance_scale=1.0, dtype="float32"), Workload(2048, 2048, batch_size=3)]


@pytest.fixture(scope="module")
def loaded() -> dict[str, Predictor]:
    """The shipped models, which simulate what is asked."""
    return {name: sdfit.load(name) for name in ("sm61", "sm70", "sm75", "sm90")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "workload"), TOO_LOW)
def test_the_equations_bound_of_a_kind_never_seen_holds(
    loaded: dict[str, Predictor], name: str, workload: Workload
) -> None:
    """It is not of its kind, the simulation lies within its bounds, and the number within them too."""
    f = loaded[name]
    alone = f.equation.predict_workload(workload, metric="required", level=0.99)
    simulated = f.predict_workload(workload, metric="required")
    assert simulated.replayed and not alone.of_its_kind
    assert alone.lower <= simulated <= alone.upper and alone.lower <= alone <= alone.upper
    assert not f.equation.fits(**workload.to_dict(), memory=float(simulated) - 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workload", ROUGH)
@pytest.mark.parametrize("name", ["sm61", "sm70", "sm75", "sm90"])
def test_bounds_of_runs_that_the_equation_describes_roughly_are_wide_enough(
    loaded: dict[str, Predictor], name: str, workload: Workload
) -> None:
    """Three images or more past 2^31 elements: what they hold and what they require, at the default level and the safe one."""
    f = loaded[name]
    for metric, level in (("allocated", 0.95), ("required", 0.99)):
        alone = f.equation.predict_workload(workload, metric=metric, level=level)
        assert alone.lower <= f.predict_workload(workload, metric=metric) <= alone.upper


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("metric", ["allocated", "required"])
def test_tables_have_the_same_bounds_as_single_calls(loaded: dict[str, Predictor], metric: str) -> None:
    """Of kinds never seen, of rough runs and of usual ones, inside the swept domain and outside."""
    f = loaded["sm75"].equation
    every = [w for name, w in TOO_LOW] + ROUGH + [Workload(512, 512), Workload(64, 8192, attention="eager", vae="tiny")]
    assert isinstance(loaded["sm75"], Replayed)
    table = {name: [w.to_dict()[name] for w in every] for name in every[0].to_dict()}
    value, interval = f.predict(table, metric=metric), f.predict_interval(table, metric=metric, level=0.98)
    for row, w in enumerate(every):
        one = f.predict_workload(w, metric=metric, level=0.98)
        assert value[row] == pytest.approx(float(one), rel=1e-12)
        assert interval[row] == pytest.approx(tuple(one.interval), rel=1e-9)


def test_a_kind_counts_once_however_many_runs_it_has() -> None:
    """Of each the most and the least; too few kinds say nothing of a new one."""
    kinds = [
        Place(2, "sdpa", vae, offload, sliced, tiled, True, False, 1, "unet")
        for vae in ("kl", "tiny")
        for offload in ("none", "model")
        for sliced in (False, True)
        for tiled in (False, True)
    ] + [
        Place(4, "sdpa", "kl", "none", sliced, tiled, True, False, 1, "unet")
        for sliced in (False, True)
        for tiled in (False, True)
    ]
    added = [(place, np.linspace(0.0, 0.01 * i, 3 + i)) for i, place in enumerate(kinds)]
    found = of_kinds(added)
    assert len(kinds) >= FEWEST_KINDS and set(found) == {"unseen", "unseen|least", "unseen|fused", "unseen|fused|least"}
    assert found["unseen"].tolist() == pytest.approx([0.01 * i for i in range(len(kinds))])
    assert found["unseen|least"].max() == 0
    assert of_kinds(added[: FEWEST_KINDS - 1]) == {}
