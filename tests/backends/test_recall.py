"""Recalled operations are the operations: a trace with them and one without are the same to the byte."""

import random

import pytest

pytest.importorskip("diffusers")

import torch

from sdfit.backends.trace import follow, recall
from sdfit.backends.trace.tracer import Tracer
from sdfit.predict.simulation.workspaces import workspaces_for
from sdfit.sweep.grid import load

SAMPLE = random.Random(20261125).sample(load("default").workloads, 8)


def plainly(func, args, kwargs):
    return func(*args, **kwargs)


@pytest.fixture(scope="module")
def tracer():
    return Tracer(workspaces_for("sm75"))


@pytest.mark.parametrize("workload", SAMPLE, ids=lambda w: f"{w.dtype}-{w.attention}-{w.height}x{w.width}")
def test_a_trace_that_recalls_equals_a_plain_one(tracer, workload, monkeypatch):
    """Every allocation and free, in order, and every stage's peak: eight of the default grid, drawn with a seed."""
    recalled = tracer.run(workload, keep_events=True)
    monkeypatch.setattr(follow, "run_on_meta", plainly)
    plain = tracer.run(workload, keep_events=True)
    assert recalled.events == plain.events
    assert recalled.stage_peaks == plain.stage_peaks


def test_a_result_that_shares_its_storage_is_never_recalled():
    """A view, and an operation that gives back its argument's storage without saying so, run as they are each time."""
    x = torch.empty(4, 6, device="meta")
    for func, arguments in ((torch.ops.aten.t.default, (x,)), (torch.ops.aten._unsafe_view.default, (x, [6, 4]))):
        for _ in range(2):
            out = recall.run_on_meta(func, arguments, {})
            assert out.untyped_storage()._cdata == x.untyped_storage()._cdata


def test_equal_arguments_of_other_types_are_told_apart():
    """The dtype of a result follows the type of a number: 1 and 1.0 are equal as keys of a table."""
    x = torch.empty(3, dtype=torch.int64, device="meta")
    add = torch.ops.aten.add.Tensor
    for number, dtype in ((1, torch.int64), (1.0, torch.float32), (True, torch.int64)):
        assert recall.run_on_meta(add, (x, number), {}).dtype is dtype
        assert recall.run_on_meta(add, (x, number), {}).dtype is dtype


def test_an_operation_in_place_gives_back_its_argument():
    """The second time without running, and never another tensor of the same shape."""
    for _ in range(2):
        x = torch.empty(3, device="meta")
        assert recall.run_on_meta(torch.ops.aten.add_.Tensor, (x, 1), {}) is x
