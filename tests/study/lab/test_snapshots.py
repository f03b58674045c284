"""The allocator model against real allocators: published memory snapshots, address by address."""

from __future__ import annotations

import ast
import re
from itertools import pairwise

import pytest

from sdfit.equation.weights import rounded
from sdfit.errors import RecordsError
from sdfit.predict.simulation.segments import SMALL_BYTES
from sdfit.predict.simulation.workspaces import winograd_tiles
from sdfit.study.lab.snapshots import lines_of, names, recorded, replay_recorded, table
from sdfit.units import MIB

NAMES = names()
UNTOLD_DIFFER = {
    "hugepanda-e02449": 99,
    "hugepanda-007209": 346,
    "hugepanda-300688": 10,
    "hugepanda-cdcdc0": 5,
    "meclab-47c79b": 4,
    "meclab-9930a4": 5,
    "mercury-e171b6": 26,
}
"""Allocations that another one of several equal cached blocks serves, where the driver's addresses are not given."""


@pytest.mark.parametrize("name", NAMES)
def test_told_where_segments_lie_the_model_gives_every_address(name: str) -> None:
    """Each allocation lies where it lay on the card, and what goes back when the cache is emptied is the same."""
    found = replay_recorded(recorded(name), told=True)
    assert found.equal == found.allocations > 0
    assert found.equal_releases == found.releases
    assert found.model_bytes == found.card_bytes


@pytest.mark.parametrize("name", NAMES)
def test_not_told_the_model_reserves_as_much(name: str) -> None:
    """With the model's own addresses the peak of reserved memory is the recorded one, though equal blocks swap places."""
    found = replay_recorded(recorded(name), told=False)
    assert found.allocations - found.equal == UNTOLD_DIFFER.get(name, 0)
    assert found.model_bytes == found.card_bytes


def test_the_lists_hold_what_the_allocator_module_says() -> None:
    """11,836 allocations in 14 lists, three of them with expandable segments; 32 times cached segments went back."""
    found = [replay_recorded(recorded(name), told=True) for name in NAMES]
    assert sum(one.allocations for one in found) == 11_836
    assert sum(one.releases for one in found) == 32
    assert (len(NAMES), sum(recorded(name).expandable for name in NAMES)) == (14, 3)


def test_most_segments_lie_below_the_one_made_before() -> None:
    """The driver's addresses fall in 335 of 517 cases: the model's own rule, of what was recorded."""
    falls = steps = 0
    for name in NAMES:
        made = [event.address for event in recorded(name).events if event.action == "segment_alloc"]
        falls += sum(after < before for before, after in pairwise(made))
        steps += max(len(made) - 1, 0)
    assert (falls, steps) == (335, 517)


def test_cublaslt_holds_1_mib_for_the_call() -> None:
    """A linear layer with a bias goes through cuBLASLt, which takes 1 MiB and gives it back with the next free."""
    lines = lines_of("mercury-e171b6")
    taken = [number for number, line in enumerate(lines) if line["native"] == "gemm_and_bias"]
    assert len(taken) > 80
    for number in taken:
        after = lines[number + 1]
        assert lines[number]["size_bytes"] == str(MIB)
        assert (after["action"], after["offset"]) == ("free_completed", lines[number]["offset"])


def test_three_convolutions_of_a_v100_hold_a_winograd_plan() -> None:
    """In float32, cudnn.benchmark on: the workspaces that the table's rule for heavy convolutions is taken from."""
    held = set()
    for line in lines_of("resnet50-234cf2"):
        image, weight = ast.literal_eval(line["input_dims"])[:2]
        if line["op"] != "cudnn_convolution" or weight[2:] != [3, 3]:
            continue
        tiles = winograd_tiles((image[0], weight[0], *image[2:]))
        plan = rounded(144 * (weight[0] * weight[1] + tiles * (weight[0] + weight[1])))
        workspaces = {int(size) for size in re.findall(r"\[\d+, (\d+),", line["memory_events_bytes"])}
        if any(plan <= size <= plan + SMALL_BYTES for size in workspaces):  # the profile counts unsplit remainders
            held.add((weight[0], image[2]))
    assert held == {(128, 28), (256, 14), (512, 7)}


def test_the_table_names_each_list_and_says_that_it_is_simulated() -> None:
    """A line per list; the model's peak is called simulated."""
    text = table([recorded("meclab-47c79b")])
    assert "simulated" in text and "meclab-47c79b" in text and "0.00 %" in text


def test_a_list_that_is_not_there_is_refused() -> None:
    """The error names what was asked for, and what is near."""
    with pytest.raises(RecordsError, match="no list 'meclab'"):
        recorded("meclab")
