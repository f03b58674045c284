"""The allocator model against published reserved memory: the replay of InvokeAI's VAE benchmark."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from sdfit.backends.trace.tracer import Tracer  # noqa: E402
from sdfit.study.comparison import published  # noqa: E402
from sdfit.study.lab.published import others  # noqa: E402
from sdfit.study.lab.reserved import ReservedRow, replay_row, table  # noqa: E402

TRACER = Tracer()
WITHIN = {"INV-002": 0.005, "INV-004": 0.06, "INV-010": 0.005, "INV-012": 0.01, "INV-044": 0.02, "INV-052": 0.01}
"""The largest error that each row is held to; INV-004 misses the aim of 5 % by half a percent."""
OTHERS = {
    "INX-D1536-H-R": (-0.001, 0.001),
    "INX-D2048-H-R": (-0.005, 0),
    "INX-E768-F-R": (-0.005, 0),
    "INX-D768-F-R": (0, 0.03),
    "INX-D1536-F-R": (0.06, 0.08),
    "INX-D2048-F-R": (0.12, 0.13),
}
"""Between which errors the rows lie that no rule was fitted to; the last two are the misses that the module tells of."""


@pytest.mark.parametrize("name", sorted(WITHIN))
def test_a_published_reserved_row_comes_out_of_the_replay(name: str) -> None:
    """Weights, workspaces and the allocator's rules together give the reserved memory that was published."""
    found = replay_row(published.row(name), TRACER)
    assert abs(found.error) <= WITHIN[name]


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_rows_that_nothing_was_fitted_to_err_as_the_module_says(name: str) -> None:
    """Half precision holds up to 2048x2048; float32 comes out too high from 1536x1536 on, by 7 and 12 %."""
    (row,) = (row for row in others() if row.id == name)
    least, most = OTHERS[name]
    assert least <= replay_row(row, TRACER).error <= most


def test_reserved_is_above_what_is_live() -> None:
    """The replayed reserved memory of a decode is well above its allocated memory, as it was on the card."""
    reserved, allocated = published.row("INV-004"), published.row("INV-003")
    assert replay_row(reserved, TRACER).replayed_bytes > 1.5 * allocated.peak_bytes


def test_the_table_names_each_row_and_says_that_it_is_simulated() -> None:
    """The table has a line per row, and calls the replay what it is."""
    row = published.row("INV-004")
    text = table((ReservedRow(row, row.peak_bytes),))
    assert "simulated" in text and "INV-004" in text and "0.00 %" in text
