"""What to change: sufficient, minimal, cheapest first, and never what does not help."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import combinations, permutations
from typing import Any

import pytest

import sdfit
from sdfit.errors import UnknownVariant
from sdfit.predict.options import COSTS, cost_of, no_dearer, options_that_fit
from sdfit.predict.predictor import Predictor
from sdfit.predict.verdict import bound, fits
from sdfit.study.comparison.times import published_times
from sdfit.units import GIB
from sdfit.workload import Workload

CASES = [
    (Workload(1024, 1024, batch_size=4, attention="eager"), 15),
    (Workload(2048, 2048, batch_size=8), 12),
    (Workload(1536, 1536, batch_size=2, dtype="float32"), 10),
    (Workload(512, 512), 3),
]


@pytest.mark.parametrize(("w", "gib"), CASES, ids=str)
def test_each_option_suffices_and_none_of_its_parts_could_be_left_out(f: Predictor, w: Workload, gib: int) -> None:
    """The changed run fits, needs less than now, and without any one of the changes it does not fit or is not known."""
    memory, now = gib * GIB, bound(f, w).upper
    assert now > memory
    found = options_that_fit(f, w, memory=memory)
    assert [option.cost for option in found] == sorted(option.cost for option in found)
    for option in found:
        changed = replace(w, **option.change)
        assert changed != w and fits(f, changed, memory=memory)
        assert option.saved_bytes == now - option.prediction.upper > 0
        size = {"height", "width"} <= option.change.keys()
        for some in combinations(option.change.items(), len(option.change) - 1):
            if some and not size:
                with suppress(UnknownVariant):
                    assert not fits(f, replace(w, **dict(some)), memory=memory)
    assert len({str(option.change) for option in found}) == len(found)


def test_the_first_option_is_what_costs_least(f: Predictor) -> None:
    """Fused attention before everything else, where it suffices."""
    found = options_that_fit(f, *CASES[0][:1], memory="15 GiB")
    assert found[0].change == {"attention": "sdpa"}


def test_a_batch_is_split_into_as_few_calls_as_possible(f: Predictor) -> None:
    """Of eight images as many at a time as fit."""
    w = Workload(1024, 1024, batch_size=8)
    memory = (bound(f, replace(w, batch_size=4)).upper + bound(f, replace(w, batch_size=5)).upper) / 2
    split = next(o for o in options_that_fit(f, w, memory=memory) if set(o.change) == {"batch_size"})
    assert split.change["batch_size"] == 4


def test_what_fits_needs_no_change(f: Predictor) -> None:
    """And where nothing helps nothing is named."""
    assert options_that_fit(f, Workload(512, 512), memory="80 GiB") == []
    assert options_that_fit(f, Workload(512, 512), memory="1 GiB") == []


def test_variants_that_were_never_swept_are_left_out(f: Predictor) -> None:
    """From bfloat16 with eager attention, which the fake card never ran, every option leads to what it did run."""
    w = Workload(1024, 1024, batch_size=4, attention="eager")
    for option in options_that_fit(f, w, memory="15 GiB"):
        f.predict_workload(replace(w, **option.change))


def test_every_change_has_a_stated_cost(f: Predictor) -> None:
    """As a rank and in words, in the option's plain values too."""
    told: dict[str, Any] = options_that_fit(f, CASES[0][0], memory="15 GiB")[0].to_dict()
    assert told["costs"] == [COSTS["attention"][1]] and told["saved_bytes"] > 0


@pytest.mark.filterwarnings("ignore::sdfit.errors.SimulatedModelWarning")
def test_weights_come_module_by_module_only_where_nothing_cheaper_does_with_the_same_fields() -> None:
    """On a card of 2 GB sequential offload is named where model offload does not do, and never beside it."""
    model = sdfit.load("rtx3050")
    w, found = Workload(512, 512), []
    for memory in ("1.2 GiB", "1.4 GiB", "2 GiB", "3 GiB"):
        options = [option.change for option in options_that_fit(model, w, memory=memory)]
        for one, other in permutations(options, 2):
            assert not no_dearer(one, other), (memory, one, other)
        found += [change["offload"] for change in options if "offload" in change]
    assert {"model", "sequential", "group_leaf"} <= set(found)


def test_the_time_of_sequential_offload_is_the_published_one() -> None:
    """2.4 and 4.4 times that of the same run without offload, by the table of times."""
    seconds = {(t.card, t.offload): t.seconds for t in published_times() if "gperdrizet" in t.series}
    for card, name in (("gtx1070", "GTX 1070"), ("p100", "P100")):
        times = f"{seconds[card, 'sequential'] / seconds[card, 'none']:.1f} times"
        assert times in COSTS["offload=sequential"][1] and name in COSTS["offload=sequential"][1]
    assert cost_of("offload", "model") == COSTS["offload"] and "slowest" in cost_of("offload", "sequential")[1]


@pytest.mark.filterwarnings("ignore::sdfit.errors.SimulatedModelWarning")
def test_an_option_has_the_number_that_its_run_gets_when_it_is_asked_about() -> None:
    """A simulated one, where the equation would do to know that it suffices; what it is wrong about is not advised."""
    f, memory = sdfit.load("t4"), 14.5 * GIB
    w = Workload(2048, 2048, batch_size=2)
    found = options_that_fit(f, w, memory=memory)
    assert len(found) > 4
    for option in found:
        there = f.verdict(**(w.to_dict() | option.change), memory=memory)
        assert there.answer == "fits" and there.prediction.upper == option.upper_bytes, option.change
    assert {"vae_slicing": True, "offload": "model"} not in [option.change for option in found]
