"""Bisecting for the smallest capacity: against known answers, against the made-up card, and how often it runs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdfit.backends.capacity import SEGMENT_BYTES, STEP_BYTES, smallest_capacity
from sdfit.backends.fake import FakeBackend
from sdfit.units import GIB, MIB
from sdfit.workload import Workload


class Card:
    """Succeeds from a known capacity on, and remembers what it was asked."""

    def __init__(self, needs_bytes):
        self.needs_bytes, self.tried = needs_bytes, []

    def __call__(self, capacity_bytes):
        self.tried.append(capacity_bytes)
        return capacity_bytes >= self.needs_bytes


@given(
    allocated=st.integers(3 * GIB, 40 * GIB),
    extra=st.integers(0, 30 * GIB),
    needs=st.floats(0, 1),
)
def test_the_answer_is_within_a_step_of_the_truth(allocated, extra, needs):
    """Wherever the truth lies between allocated and reserved, the answer suffices and is at most one step more."""
    reserved = -(-(allocated + extra) // SEGMENT_BYTES) * SEGMENT_BYTES
    card = Card(round(allocated + needs * (reserved - allocated)))
    found = smallest_capacity(card, allocated, reserved)
    assert card.needs_bytes <= found <= card.needs_bytes + STEP_BYTES


@given(below=st.integers(0, 2 * GIB))
def test_a_run_that_succeeds_with_less_than_it_had_allocated_is_followed_down(below):
    """cuDNN takes smaller plans under a cap, so the truth may lie below allocated; it is found there too."""
    card = Card(8 * GIB - below)
    found = smallest_capacity(card, 8 * GIB, 9 * GIB)
    assert card.needs_bytes <= found <= card.needs_bytes + STEP_BYTES


def test_a_run_that_always_succeeds_ends():
    """There is no capacity below zero to try."""
    card = Card(0)
    assert smallest_capacity(card, GIB, GIB) <= STEP_BYTES
    assert min(card.tried) > 0


def test_nothing_is_run_twice_and_the_uncapped_peak_is_not_run_again():
    """Each try costs a run: log2 of the span in steps, plus one, and no more."""
    card = Card(70 * GIB)
    smallest_capacity(card, 64 * GIB, 96 * GIB)
    assert len(card.tried) == len(set(card.tried)) <= 1 + 11  # 32 GiB are 2^11 steps of 16 MiB
    assert 96 * GIB not in card.tried


def test_a_coarser_step_takes_fewer_runs():
    """The step is the caller's choice between time and precision."""
    fine, coarse = Card(70 * GIB), Card(70 * GIB)
    smallest_capacity(fine, 64 * GIB, 96 * GIB)
    found = smallest_capacity(coarse, 64 * GIB, 96 * GIB, step_bytes=GIB)
    assert len(coarse.tried) < len(fine.tried)
    assert 70 * GIB <= found <= 71 * GIB


@pytest.mark.parametrize(
    "workload", [Workload(512, 512), Workload(1024, 1536, batch_size=4), Workload(768, 768, attention="eager")]
)
def test_the_made_up_card_gives_its_own_answer_back(workload):
    """Bisecting the made-up card's capacity finds the required bytes that it was made with, to one step."""
    free = FakeBackend().measure(workload)

    def fits(capacity_bytes):
        return FakeBackend(capacity_bytes=capacity_bytes).measure(workload)["outcome"] == "ok"

    found = smallest_capacity(fits, free["allocated_bytes"], free["reserved_bytes"])
    assert free["required_bytes"] <= found <= free["required_bytes"] + STEP_BYTES
    assert found - free["allocated_bytes"] > 3 * MIB  # the two are really told apart
