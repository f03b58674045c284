"""Published tables of gguf-parser, one of them with a mistyped row, judged as anyone's table would be."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from sdfit.files import shipped
from sdfit.fit.stage_model import nonnegative
from sdfit.judging.findings import Verdict
from sdfit.judging.judge import judge_table
from sdfit.units import MIB

Array = np.ndarray[Any, np.dtype[Any]]


def table(name: str) -> tuple[Array, Array, Array, Array]:
    """Height, width, peak in MiB, and which rows are to be fitted."""
    with (shipped("data/published") / f"gguf_parser_{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    columns = [np.array([float(r[c]) for r in rows]) for c in ("height", "width", "peak_mib")]
    return *columns, np.array([r["use"] == "fit" for r in rows])


def judged(name: str, unit: int = MIB) -> Verdict:
    """The verdict on the rows to be fitted."""
    height, width, peak, use = table(name)
    return judge_table(height[use], width[use], peak[use] * unit)


def held_out_errors(name: str, coef: Mapping[str, float]) -> Array:
    """Relative errors at the sizes that were not fitted."""
    height, width, peak, use = table(name)
    pixels = (height * width)[~use]
    predicted = coef["1"] + coef["A"] * pixels + coef["A²"] * pixels**2
    return predicted / (peak[~use] * MIB) - 1


def test_sd1_gives_back_the_bytes_of_its_scores() -> None:
    """SD 1's table gives back 8 heads · 4 B / 64² = 0.0078125 B/px² within 0.005 %, and nothing in it is blamed."""
    found = judged("sd1")
    assert found.sound
    assert found.coef["A²"] == pytest.approx(8 * 4 / 64**2, rel=5e-5)


def test_sd1_is_in_mib() -> None:
    """Read in units of 10^6 B, the same table misses 0.0078125 by 4.6 %: the published MB are MiB."""
    assert judged("sd1", 10**6).coef["A²"] == pytest.approx(0.0078125 * 10**6 / MIB, rel=5e-5)


def test_sd1_held_out_sizes_come_out() -> None:
    """SD 1's fit predicts the two sizes that it did not see within 0.01 %."""
    assert np.abs(held_out_errors("sd1", judged("sd1").coef)).max() < 1e-4


def test_the_mistyped_row_of_sd2_is_named() -> None:
    """SD 2's row at 1024x1024, which holds SDXL's number, is the first finding, an error, and the only row blamed."""
    found = judged("sd2")
    assert not found.sound
    assert (found[0].severity, found[0].kind, found[0].row) == ("error", "outlier", "row 3 (1024x1024)")
    assert found[0].off == pytest.approx(-0.843, abs=0.001)
    assert [f.row for f in found if f.kind == "outlier"] == ["row 3 (1024x1024)"]
    assert any(f.kind == "sign" and "-391" in f.message for f in found), "its unbounded fit answers negative bytes"


def test_sd2_without_its_bad_row_predicts_the_held_out_sizes() -> None:
    """The coefficients of the verdict leave that row out, and predict both held-out sizes of SD 2 within 0.01 %."""
    coef = judged("sd2").coef
    assert np.abs(held_out_errors("sd2", coef)).max() < 1e-4
    assert coef["A²"] == pytest.approx(5 * 4 / 64**2, rel=5e-5), "SD 2 has 5 heads where SD 1 has 8"


def test_a_plain_fit_of_sd2_misses_by_far() -> None:
    """Fitted to all seven rows, as published, SD 2's held-out sizes are off by 75 %: the row had to be found."""
    height, width, peak, use = table("sd2")
    pixels, y = (height * width)[use], peak[use] * MIB
    design = np.column_stack([np.ones_like(pixels), pixels, pixels**2])
    coef = dict(zip(("1", "A", "A²"), nonnegative(design / y[:, None], np.ones_like(y)), strict=True))
    assert (np.abs(held_out_errors("sd2", coef)) > 0.7).all()


@pytest.mark.parametrize("factor", [0.16, 0.9, 1.1, 6.0])
def test_any_one_row_of_sd1_can_be_wrong(factor: float) -> None:
    """Whichever row of SD 1 is spoilt, too small or too large, it is the one that is named."""
    height, width, peak, use = table("sd1")
    for bad in range(int(use.sum())):
        spoilt = peak[use] * MIB
        spoilt[bad] *= factor
        found = judge_table(height[use], width[use], spoilt)
        assert [f.row.split()[1] for f in found if f.kind == "outlier"] == [str(bad + 1)], bad


def test_two_bad_rows_do_not_hide_each_other() -> None:
    """Of nine rows of SD 1 any two may be wrong in the same direction, and both are named (36 pairs)."""
    height, width, peak, _ = table("sd1")
    missed = []
    for pair in combinations(range(9), 2):
        spoilt = peak * MIB
        spoilt[list(pair)] *= 1.5
        found = judge_table(height, width, spoilt)
        if {f.row.split()[1] for f in found if f.kind == "outlier"} != {str(i + 1) for i in pair}:
            missed.append(pair)
    assert not missed
