"""What to change: sufficient, minimal, cheapest first, and never what does not help."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from sdfit.errors import UnknownVariant
from sdfit.predict.options import COSTS, options_that_fit
from sdfit.predict.predictor import Predictor
from sdfit.predict.verdict import bound, fits
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
