"""The allocator model against published reserved memory: the replay of InvokeAI's VAE benchmark."""

from __future__ import annotations

from functools import cache

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from sdfit.study.comparison import published  # noqa: E402
from sdfit.study.lab.reserved import CONVERTED, ReservedRow, replay_all, reserved_rows, table  # noqa: E402
from sdfit.units import MIB  # noqa: E402

SEGMENT_BYTES = 2 * MIB
"""To which the allocator asks the driver for large blocks; a published mean over five runs lies up to one of them off."""
MISSES = {
    "INV-012": -0.0043,
    "INV-052": -0.0063,
    "INX-D768-H-R": -0.0026,
    "INX-D1536-H-R": -0.0040,
    "INX-D2048-H-R": -0.0037,
}
"""Errors of the rows that are further off; all but INV-052, a segment of 20 MiB, are of decoding in float16."""


@cache
def replayed() -> dict[str, ReservedRow]:
    """Every published reserved row."""
    return {one.row.id: one for one in replay_all()}


def test_published_reserved_rows_come_out_of_the_replay_to_a_segment() -> None:
    """Weights, workspaces, and the allocator's rules in the benchmark's order give 16 of 21 rows to 2 MiB."""
    off = {id: one.replayed_bytes - one.row.peak_bytes for id, one in replayed().items() if id not in MISSES}
    assert len(off) == 16
    assert {id: bytes_ for id, bytes_ in off.items() if abs(bytes_) > SEGMENT_BYTES} == {}


@pytest.mark.parametrize("name", sorted(MISSES))
def test_the_rows_that_are_further_off_are_off_by_what_is_said(name: str) -> None:
    """The list of misses is neither longer nor rosier than the truth."""
    assert replayed()[name].error == pytest.approx(MISSES[name], abs=0.0001)


def test_float32_decoding_is_right_at_all_five_sizes() -> None:
    """The workspaces of 512 channels: before they were known, 1536x1536 and 2048x2048 were 7 and 12 % too high."""
    decoded = [one for one in replayed().values() if one.row.pipeline == "vae_decode" and one.row.dtype == "float32"]
    assert {one.row.height for one in decoded} == {512, 768, 1024, 1536, 2048}
    assert max(abs(one.error) for one in decoded) < 0.002


def test_some_rows_come_out_as_among_all() -> None:
    """What the first run leaves behind is there for a row of a later loading too."""
    row = next(row for row in reserved_rows() if row.id == CONVERTED[0])
    assert replay_all((row,)) == (replayed()[row.id],)


def test_reserved_is_above_what_is_live() -> None:
    """The replayed reserved memory of a decode is well above its allocated memory, as it was on the card."""
    assert replayed()["INV-004"].replayed_bytes > 1.5 * published.row("INV-003").peak_bytes


def test_the_table_names_each_row_and_says_that_it_is_simulated() -> None:
    """The table has a line per row, and calls the replay what it is."""
    row = published.row("INV-004")
    text = table((ReservedRow(row, row.peak_bytes),))
    assert "simulated" in text and "INV-004" in text and "0.00 %" in text
