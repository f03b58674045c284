"""A Workload: what is let in, what is refused and how, and the sizes that follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import sdfit
from sdfit.cli import cli
from sdfit.errors import InvalidWorkload, SdfitError, UnknownKeyword
from sdfit.sweep.grid import load
from sdfit.workload import (
    CHOICES,
    MAX_BATCH_SIZE,
    MAX_PROMPT_LENGTH,
    MAX_SIDE,
    VARIANT_FIELDS,
    WORKLOAD_FIELDS,
    Workload,
    check_keywords,
    effective,
    plain_run,
    variant_name,
)

WORKLOADS = st.builds(
    Workload,
    st.integers(64, MAX_SIDE),
    st.integers(64, MAX_SIDE),
    st.integers(1, MAX_PROMPT_LENGTH),
    st.integers(1, MAX_BATCH_SIZE),
    st.floats(0, 50),
    **{name: st.sampled_from(choices) for name, choices in CHOICES.items()},
)


@given(WORKLOADS)
def test_sizes_follow_from_the_fields(w: Workload) -> None:
    """Sides are floored to 8, prompts padded to 77, the UNet's batch doubled above a guidance of 1."""
    for side, run in ((w.height, w.effective_height), (w.width, w.effective_width)):
        assert run % 8 == 0 and 0 <= side - run < 8
    assert w.pixels == w.effective_height * w.effective_width
    assert w.tokens == max(77, w.prompt_length)
    assert w.unet_batch == w.batch_size * (1 + (w.guidance_scale > 1))


@given(WORKLOADS)
def test_plain_numbers_run_as_any_others(w: Workload) -> None:
    """The quick way from plain numbers to what runs gives what the one for arrays gives, and leaves the rest to Workload."""
    numbers = [getattr(w, name) for name in WORKLOAD_FIELDS[:5]]
    assert plain_run(*numbers) == effective(*numbers)
    for name in range(5):
        assert plain_run(*(str(v) if i == name else v for i, v in enumerate(numbers))) is None
    assert plain_run(63, *numbers[1:]) is None and plain_run(*numbers[:3], MAX_BATCH_SIZE + 1, 7.5) is None


@given(WORKLOADS)
def test_round_trip_through_a_dict(w: Workload) -> None:
    """to_dict and from_dict are inverse, and equal workloads hash alike."""
    again = Workload.from_dict(w.to_dict())
    assert again == w and hash(again) == hash(w)
    assert tuple(w.to_dict()) == WORKLOAD_FIELDS
    assert w.variant == tuple(getattr(w, name) for name in VARIANT_FIELDS)


@given(WORKLOADS)
def test_numpy_values_give_the_same_workload(w: Workload) -> None:
    """NumPy's integers, floats, booleans and strings are taken and become plain values."""
    kinds: dict[type, Any] = {int: np.int64, float: np.float64, bool: np.bool_, str: np.str_}
    same = Workload(**{name: kinds[type(value)](value) for name, value in w.to_dict().items()})
    assert same == w
    assert all(type(value) in kinds for value in same.to_dict().values())


@pytest.mark.parametrize("name", ["height", "width", "prompt_length", "batch_size"])
@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        512.0,
        512.5,
        True,
        "512",
        None,
        float("nan"),
        float("inf"),
        10**9,
        pytest.param(10**6000, id="6000 digits"),
        [512],
        np.float32(64),
    ],
)
def test_whole_numbers_outside_their_range_are_refused(name: str, value: Any) -> None:
    """Not an integer, not positive, absurdly large: refused with the field's name and its range."""
    with pytest.raises(InvalidWorkload, match=rf"^{name} .* from \d+ to \d+") as caught:
        Workload(**({"height": 512, "width": 512} | {name: value}))
    assert len(str(caught.value)) < 300
    assert caught.value.facts["field"] == name


def test_sides_under_64_are_refused() -> None:
    """63 is refused and 64 taken, the largest side is taken and one more refused."""
    for bad in (63, MAX_SIDE + 1):
        with pytest.raises(InvalidWorkload, match=f"height is {bad}; it must be from 64 to {MAX_SIDE}"):
            Workload(bad, 512)
    assert Workload(64, MAX_SIDE).pixels == 64 * MAX_SIDE


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -0.1, "7.5", None, True, pytest.param(10**400, id="400 digits"), 1j]
)
def test_guidance_must_be_finite(value: Any) -> None:
    """NaN, infinite, negative, textual or unrepresentable guidance is refused with the value."""
    with pytest.raises(InvalidWorkload, match="guidance_scale must be a finite number >= 0"):
        Workload(512, 512, guidance_scale=value)


@pytest.mark.parametrize("name", VARIANT_FIELDS)
@pytest.mark.parametrize("value", ["fp8", "", None, 0, 1, 2.0, ["float16"], {}, float("nan")])
def test_discrete_fields_name_their_choices(name: str, value: Any) -> None:
    """Anything but a listed choice, 0 and 1 for a boolean included, is refused with the list."""
    with pytest.raises(InvalidWorkload, match=f"{name} must be one of {CHOICES[name][0]}, {CHOICES[name][1]}"):
        Workload(512, 512, **{name: value})


@pytest.mark.filterwarnings("ignore::sdfit.errors.SimulatedModelWarning")
@pytest.mark.parametrize("value", ["int8", "nf4"])
def test_quantised_weights_are_refused_with_the_reason_wherever_they_are_asked_for(value: str, tmp_path: Path) -> None:
    """As a workload, a keyword of f, a column of a table, an option of a command and an axis of a grid; f stays usable."""
    f, grid = sdfit.load("t4"), tmp_path / "mine.toml"
    grid.write_text(f'[[block]]\nshapes = [512]\ndtype = "{value}"\n')
    asked: list[Callable[[], Any]] = [
        lambda: Workload(512, 512, dtype=value),
        lambda: f(512, 512, dtype=value),
        lambda: f.predict({"height": [512], "width": [512], "dtype": [value]}),
        lambda: load(str(grid)),
    ]
    for ask in asked:
        with pytest.raises(SdfitError, match=f"'{value}'; of quantised weights those of execution='int8' alone"):
            ask()
    words = CliRunner().invoke(cli, ["predict", "--gpu", "t4", "--height", "512", "--width", "512", "--dtype", value])
    assert words.exit_code == 2 and "of quantised weights those" in words.output
    assert f(512, 512) > 0


@pytest.mark.parametrize(
    ("given_name", "nearest"),
    [("guidance", "guidance_scale"), ("heigth", "height"), ("batchsize", "batch_size"), ("vae_tilling", "vae_tiling")],
)
def test_unknown_keyword_names_the_nearest(given_name: str, nearest: str) -> None:
    """A misspelt keyword is a TypeError that names the one that was meant."""
    with pytest.raises(TypeError, match=f"unknown keyword '{given_name}'; did you mean '{nearest}'?") as caught:
        Workload.from_dict({"height": 512, "width": 512, given_name: 1})
    assert isinstance(caught.value, UnknownKeyword)
    with pytest.raises(UnknownKeyword, match="known: height, width"):
        check_keywords({"zzzz": 1})


@pytest.mark.parametrize("values", [{}, {"height": 512}, {"width": 512}, [], 5, "512x512", None])
def test_from_dict_says_what_is_missing(values: Any) -> None:
    """A table without a side, or no table at all, is refused in words."""
    with pytest.raises(InvalidWorkload, match="a workload"):
        Workload.from_dict(values)


def test_it_cannot_be_changed() -> None:
    """Frozen after birth."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Workload(512, 512).height = 0  # type: ignore[misc]


@given(WORKLOADS)
def test_variant_names_tell_variants_apart(w: Workload) -> None:
    """A name changes when, and only when, a discrete field does."""
    other = dataclasses.replace(w, safety_checker=not w.safety_checker)
    assert variant_name(other.variant) != variant_name(w.variant)
    assert variant_name(dataclasses.replace(w, batch_size=1).variant) == variant_name(w.variant)
