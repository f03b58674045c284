"""The equation once: its products for numbers and arrays, and made-up coefficients through a matrix and through a model."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from worlds import SWEPT, far_and_wide, swept_workloads, with_regimes

from sdfit.equation.regimes import REGIMES, regime
from sdfit.equation.sizes import Sizes
from sdfit.equation.stages import STAGE, STAGES, stage_key, stages_of
from sdfit.equation.terms import COLUMN, TERMS, design_matrix, design_of, products, terms_of
from sdfit.predict.predictor import Predictor
from sdfit.predict.variant import Variant
from sdfit.workload import Workload

MEANT: dict[str, Callable[[Sizes], float]] = {
    "1": lambda s: 1,
    "m": lambda s: s.m,
    "B": lambda s: s.B,
    "n": lambda s: s.n,
    "m·P": lambda s: s.m * s.P,
    "m·P²": lambda s: s.m * s.P**2,
    "n·A": lambda s: s.n * s.A,
    "n·A²": lambda s: s.n * s.A**2,
    "A²": lambda s: s.A**2,
    "n·L·A": lambda s: s.n * s.L * s.A,
    "n·L": lambda s: s.n * s.L,
    "B·A": lambda s: s.B * s.A,
    "D": lambda s: s.D,
}


@given(swept_workloads())
def test_a_product_is_what_its_name_says(w: Workload) -> None:
    """Each term multiplies the letters of its name; as whole numbers exactly, as arrays to the last digits."""
    sizes = Sizes.of_workload(w)
    assert dict(zip(TERMS, products(*sizes), strict=True)) == {name: meant(sizes) for name, meant in MEANT.items()}
    columns = [np.broadcast_to(column, 2) for column in products(*Sizes.of_workloads([w, w]))]
    for column, number in zip(columns, products(*sizes), strict=True):
        assert column == pytest.approx([number, number], rel=1e-15)


def test_terms_have_one_place_each() -> None:
    """The table of terms, their places and the stages' lists agree, and no term is without a stage."""
    assert list(COLUMN) == list(TERMS) == list(MEANT) and list(COLUMN.values()) == list(range(len(TERMS)))
    used = {name for stage in STAGE.values() for name in stage.terms} | set(terms_of(("unet", "float16", "sliced")))
    assert used == set(TERMS)
    assert terms_of(("unet", "float16", "sliced")) == ("1", "n·A", "A²", "n", "n·L·A", "n·L")


@pytest.mark.parametrize("stage", STAGES)
def test_a_design_matrix_holds_a_stages_products(stage: str) -> None:
    """Its columns are the products of the stage's terms, in their order, a row per workload."""
    workloads = far_and_wide(random.Random(1), 50, {})
    key = stage_key(stage, workloads[0].variant)
    matrix = design_of(key, workloads)
    assert matrix.shape == (50, len(terms_of(key)))
    assert (matrix == design_matrix(key, Sizes.of_workloads(workloads))).all()
    for row, w in zip(matrix, workloads, strict=True):
        every = products(*Sizes.of_workload(w))
        assert row == pytest.approx([every[COLUMN[name]] for name in terms_of(key)], rel=1e-15)


@pytest.mark.parametrize("options", SWEPT, ids=str)
def test_made_up_coefficients_come_out_of_the_matrix_as_of_the_model(f: Predictor, options: dict[str, object]) -> None:
    """The matrix times coefficients that differ in every regime, and the weights, is what a model with them predicts.

    By stage, for one workload and for all of them at once; the breakdown of a stage names the same parts.
    """
    artifact = with_regimes(f.artifact, random.Random(7))
    workloads = far_and_wide(random.Random(str(options)), 120, options)
    variant = Variant(artifact, workloads[0].variant)
    together, sizes = variant.stage_arrays(Sizes.of_workloads(workloads)), [Sizes.of_workload(w) for w in workloads]
    seen = set()
    for stage in stages_of(variant.key):
        key = stage_key(stage, variant.key)
        coef = np.array(artifact.stages["|".join(key)]["coef"])
        regimes = np.array([regime(stage, s) for s in sizes])
        wanted = variant.weights[stage] + (design_of(key, workloads) * coef[regimes]).sum(axis=1)
        assert [variant.stage_peaks(s)[stage] for s in sizes] == pytest.approx(wanted, rel=1e-12)
        assert together[stage] == pytest.approx(wanted, rel=1e-12)
        for s, which, peak in zip(sizes, regimes, wanted, strict=True):
            parts = variant.breakdown(s, stage)
            named = zip(terms_of(key), coef[which], strict=True)
            known = {name: c * products(*s)[COLUMN[name]] for name, c in named}
            assert sum(parts.values()) == pytest.approx(peak, rel=1e-12)
            # what is left of the constant when the weights are taken off it is good to a byte
            assert parts.pop("weights") == variant.weights[stage]
            assert parts == pytest.approx({name: value for name, value in known.items() if value > 0}, rel=1e-9, abs=1)
        seen |= set(regimes.tolist())
    assert seen >= {0, 1} and seen <= set(range(len(REGIMES)))


def test_made_up_coefficients_reach_every_regime() -> None:
    """The draws of the test above are wide enough to meet each regime of the decoder."""
    sizes = Sizes.of_workloads(far_and_wide(random.Random("{}"), 120, {}))
    assert set(np.unique(regime("vae_decoder_blocks", sizes))) == set(range(len(REGIMES)))
