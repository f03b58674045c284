"""The largest sizes by a model beside those by the truth: counted by hand in a world whose answer is known."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
from worlds import measured

import sdfit
from sdfit.errors import RecordsError
from sdfit.judging.decisions import decide, decide_by_simulation
from sdfit.predict.advise import sizes_of_aspect
from sdfit.predict.predictor import Predictor
from sdfit.records import Record
from sdfit.units import GIB
from sdfit.workload import Workload

LADDER = [Workload(side, side, batch_size=b) for side in range(256, 2048, 128) for b in (1, 2)]


def truth() -> list[Record]:
    return measured(LADDER).records


def test_a_true_model_keeps_nearly_all_and_never_fails(f: Predictor) -> None:
    """On the card that it was fitted on: no failure, nothing refused, all of the area."""
    found = decide(f, truth(), capacities=[6 * GIB, 8 * GIB, 12 * GIB])
    line = found.lines[-1]
    assert line.variant == "all" and line.decisions + found.skipped == 2 * 3
    assert line.failed == 0 and line.kept_median == 1 and line.refused == 0
    assert 0 <= line.above_truth < 0.01


def test_failures_refusals_and_shares_are_counted_by_hand(f: Predictor) -> None:
    """With the truth moved by a tenth each way: what the model then says is wrong by that, and the counts say so."""
    bounds = {r.workload: f.predict_workload(r.workload, metric="required", level=0.99).upper for r in truth()}
    for factor in (0.9, 1.1):
        records = [replace(r, required_bytes=round(bounds[r.workload] * factor)) for r in truth()]
        capacity = 10 * GIB
        line = decide(f, records, capacities=[capacity]).lines[-1]
        fails, shares, fitting, refused = 0, [], 0, 0
        for batch in (1, 2):
            mine = [r for r in records if r.workload.batch_size == batch]
            really = [r for r in mine if r.required_bytes is not None and r.required_bytes <= capacity]
            sure = [r for r in mine if bounds[r.workload] <= capacity]
            answer, best = (max(some, key=lambda r: r.workload.pixels) for some in (sure, really))
            fails += answer not in really
            shares.append(min(answer.workload.pixels / best.workload.pixels, 1))
            fitting += len(really)
            refused += sum(r not in sure for r in really)
        assert line.decisions == 2 and line.failed == fails / 2
        assert line.kept_worst == pytest.approx(min(shares)) and line.refused == pytest.approx(refused / fitting)
        assert line.above_truth == pytest.approx(1 / factor - 1, abs=1e-6)
    assert fails == 2  # a truth above the bound fails both


def test_capacities_outside_the_ladders_decide_nothing(f: Predictor) -> None:
    """Where every size fits, or none, there is no answer to judge."""
    found = decide(f, truth(), capacities=[GIB, 8 * GIB, 900 * GIB])
    assert found.skipped == 4 and found.lines[-1].decisions == 2


def test_records_without_ladders_are_refused(f: Predictor) -> None:
    """One size a shape, or no required memory: with what to sweep."""
    single = measured([Workload(512, 512), Workload(512, 1024)]).records
    none = [replace(r, required_bytes=None) for r in truth()]
    for records in (single, none):
        with pytest.raises(RecordsError, match="sweep the grid 'decisions'"):
            decide(f, records)


def test_decisions_by_simulation_are_those_that_a_person_gets() -> None:
    """Largest sizes of `f.largest` itself beside the largest that a replay says fit, at one shape and batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        f = sdfit.load("t4")
    capacity, options = 4 * GIB, {"attention": "eager"}
    asked: dict[str, Any] = {"variants": [options], "shapes": [(3, 2)], "batches": [4], "capacities": [capacity]}
    found = decide_by_simulation(f, f, **asked)
    line = found.lines[-1]
    one = f.predict_workload(Workload(512, 512), metric="required", level=0.99)
    assert found.level == 0.99 and found.supported == one.supported
    assert "level 0.974, the most that 38 runs support (asked for: 0.99), beside" in found.table()
    fitting = [
        size
        for size in sizes_of_aspect((3, 2))
        if min(size) < 512 and f(*size, batch_size=4, metric="required", **options) <= capacity
    ]
    answer = sdfit.load("t4").largest(memory=capacity, aspect=(3, 2), batch_size=4, **options)
    assert line.decisions == 1 and line.failed == 0 and max(map(min, fitting)) < 480
    assert line.kept_worst == math.prod(answer) / math.prod(fitting[-1])
    assert 0 < line.above_truth < 0.02
    by_equation = decide_by_simulation(f.equation, f, **asked).lines[-1]
    assert by_equation.kept_worst <= line.kept_worst and by_equation.above_truth > line.above_truth


def test_a_model_that_simulates_nothing_tells_no_truth(f: Predictor) -> None:
    """It is asked for records."""
    with pytest.raises(RecordsError, match="simulates no runs; give records"):
        decide_by_simulation(f, f)
