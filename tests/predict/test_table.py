"""Many workloads at once: mixed variants, every kind of column, and rows refused by number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import swept_workloads

from sdfit.errors import InvalidWorkload, SdfitError
from sdfit.predict.predictor import Predictor
from sdfit.predict.table import BLOCK_ROWS
from sdfit.workload import Workload

SIZES = {"height": [512, 768], "width": [512, 512]}


@given(st.lists(swept_workloads(), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_rows_of_mixed_variants_keep_their_order(f: Predictor, rows: list[Workload]) -> None:
    """Each row of a table of mixed variants gets the prediction and the interval of its own workload."""
    columns = {name: np.array([getattr(w, name) for w in rows]) for name in rows[0].to_dict()}
    one_by_one = [f.predict_workload(w) for w in rows]
    assert f.predict(columns) == pytest.approx(np.array([float(p) for p in one_by_one]), rel=1e-12)
    assert f.predict_interval(columns) == pytest.approx(np.array([p.interval for p in one_by_one]), rel=1e-9)


def test_a_frame_is_a_table(f: Predictor) -> None:
    """A DataFrame, its nullable types and its row order give what a mapping of lists gives."""
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(SIZES | {"attention": ["eager", "sdpa"], "vae_tiling": [False, True]})
    expected = [f(512, 512, attention="eager"), f(768, 512, vae_tiling=True)]
    assert f.predict(frame) == pytest.approx(expected)
    assert f.predict(frame.iloc[::-1]) == pytest.approx(expected[::-1])
    assert f.predict(frame.convert_dtypes()) == pytest.approx(expected)
    frame["attention"] = frame["attention"].astype("category")
    assert f.predict(frame) == pytest.approx(expected)


def test_one_value_stands_for_all_rows_and_defaults_for_missing_columns(f: Predictor) -> None:
    """A single value is broadcast; columns that are not there take the Workload's defaults."""
    assert f.predict(SIZES) == pytest.approx([f(512, 512), f(768, 512)])
    assert f.predict(SIZES | {"batch_size": 3}) == pytest.approx([f(512, 512, 77, 3), f(768, 512, 77, 3)])
    assert f.predict({"height": 512, "width": 512}) == pytest.approx([f(512, 512)])
    assert f.predict({"height": np.array([512.0]), "width": np.array([512], dtype=np.uint16)}) == pytest.approx(
        [f(512, 512)]
    )


@pytest.mark.parametrize("options", [{}, {"dtype": []}, {"vae_tiling": np.array([], dtype=bool)}])
def test_no_rows_give_no_predictions(f: Predictor, options: dict[str, Any]) -> None:
    """An empty table is answered by an empty array, also with columns of options."""
    table = {"height": [], "width": []} | options
    assert f.predict(table).shape == (0,) and f.predict_interval(table).shape == (0, 2)


def test_more_rows_than_a_block(f: Predictor) -> None:
    """Rows on both sides of a block's edge agree with the scalar path."""
    rows = BLOCK_ROWS + 5
    heights = 256 + 8 * (np.arange(rows) % 100)
    got = f.predict({"height": heights, "width": 512, "vae_tiling": True})
    for i in (0, BLOCK_ROWS - 1, BLOCK_ROWS, rows - 1):
        assert got[i] == pytest.approx(float(f(int(heights[i]), 512, vae_tiling=True)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"height": [512, 0]}, r"row 1: height is 0; it must be a whole number from 64 to 16384"),
        ({"height": [512, 512.5]}, r"row 1: height is 512.5"),
        ({"width": [float("nan"), 512]}, r"row 0: width is nan"),
        ({"width": [512, 1e9]}, r"row 1: width is 1e\+09"),
        ({"prompt_length": [77, 0]}, r"row 1: prompt_length is 0"),
        ({"batch_size": [-1, 1]}, r"row 0: batch_size is -1"),
        ({"guidance_scale": [float("nan"), 1]}, r"row 0: guidance_scale is nan"),
        ({"guidance_scale": [float("inf"), 1]}, r"row 0: guidance_scale is inf"),
        ({"height": ["512", "512"]}, r"column 'height' must hold numbers"),
        ({"height": [None, 512]}, r"column 'height' must hold numbers"),
        ({"height": [True, True]}, r"column 'height' must hold numbers"),
        ({"height": [[512], [512]]}, r"column 'height' must hold numbers"),
        ({"height": [512, 512, 512]}, r"rows, another has"),
        ({"dtype": ["float16", "float8"]}, r"dtype must be one of float16, bfloat16, float32, not 'float8'"),
        ({"dtype": ["float16", float("nan")]}, r"dtype must be one of"),
        ({"dtype": ["float16", None]}, r"dtype must be one of"),
        ({"vae_slicing": [0, 1]}, r"vae_slicing must be one of False, True"),
        ({"vae_slicing": 0}, r"vae_slicing must be one of False, True"),
        ({"vae_slicing": ["False", "True"]}, r"vae_slicing must be one of False, True"),
        ({"heigth": [1, 1]}, r"unknown keyword 'heigth'; did you mean 'height'"),
        ({5: [1, 1]}, r"unknown keyword '5'"),
    ],
)
def test_a_bad_row_is_refused_by_its_number(f: Predictor, change: dict[Any, Any], words: str) -> None:
    """Which row, which column, its value and what is allowed; before and after the variants were used."""
    for g in (Predictor(f.artifact), f):
        with pytest.raises(SdfitError, match=words):
            g.predict(SIZES | change)


@pytest.mark.parametrize("table", [5, None, [512, 512], "height", np.zeros((2, 2))])
def test_what_is_no_table_is_refused(f: Predictor, table: Any) -> None:
    """A number, a list, an array: refused by its type."""
    with pytest.raises(InvalidWorkload, match="a table is a mapping of columns or a DataFrame"):
        f.predict(table)


@pytest.mark.parametrize(("table", "name"), [({}, "height"), ({"height": [512]}, "width")])
def test_a_table_without_sides_says_which(f: Predictor, table: Any, name: str) -> None:
    """Height and width must be there."""
    with pytest.raises(InvalidWorkload, match=f"no column '{name}'"):
        f.predict(table)
