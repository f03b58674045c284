"""Amounts and spans that are not to be read, and that what is shown can be read back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdfit.errors import InvalidWorkload
from sdfit.units import GIB, KIB, MIB, format_bytes, parse_bytes, parse_duration


@pytest.mark.parametrize(
    "amount", ["", "GiB", "-1", "0 B", "1.5.2", "5 parsecs", "nan", "inf", "1e999 B", "１GiB", "1 \u212a", "5,0"]
)
def test_what_is_no_amount_is_refused(amount: str) -> None:
    """Empty, negative, zero, infinite, unknown units, other scripts' digits and letters: one sentence with an example."""
    with pytest.raises(InvalidWorkload, match=r"is not an amount of memory; write for example 15GiB"):
        parse_bytes(amount)


@pytest.mark.parametrize("amount", ["12", " 1.5 ", "16e9"])
def test_text_without_a_unit_is_asked_for_one(amount: str) -> None:
    """On a command line 12 is hardly 12 bytes: the sentence names the number with units to choose from."""
    with pytest.raises(InvalidWorkload, match=f"'{amount.strip()}' has no unit; write {amount.strip()}GiB, "):
        parse_bytes(amount)


@pytest.mark.parametrize(
    "amount", [None, True, [1], float("nan"), float("inf"), -1, 0, pytest.param(10**400, id="400 digits")]
)
def test_what_is_no_number_is_refused(amount: Any) -> None:
    """None, a boolean, a list, NaN and what no float holds are refused likewise."""
    with pytest.raises(InvalidWorkload, match="is not an amount of memory"):
        parse_bytes(amount)


@pytest.mark.parametrize("span", ["", "0", "-1m", "5x", "m", "nan", "5ſ", "1e3"])
def test_what_is_no_time_span_is_refused(span: str) -> None:
    """Empty, zero, negative or of an unknown unit."""
    with pytest.raises(InvalidWorkload, match="is not a time span"):
        parse_duration(span)


@pytest.mark.parametrize(
    ("low", "high", "half_digit_bytes"),
    [
        pytest.param(1, KIB, 0, id="bytes"),
        pytest.param(KIB, MIB, 0.05 * KIB, id="KiB"),
        pytest.param(MIB, GIB, 0.05 * MIB, id="MiB"),
        pytest.param(GIB, 1 << 50, 0.0005 * GIB, id="GiB"),
    ],
)
@given(data=st.data())
def test_what_is_shown_can_be_read_back(low: int, high: int, half_digit_bytes: float, data: st.DataObject) -> None:
    """Formatting loses no more than half a unit of the last digit shown, and reading no more than the rest of a byte."""
    amount = data.draw(st.integers(low, high - 1))
    assert abs(parse_bytes(format_bytes(amount).replace(",", "")) - amount) <= half_digit_bytes + 1
