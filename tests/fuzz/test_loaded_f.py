"""What `sdfit.load` gives, asked everything: a sound answer or one `SdfitError` of one line, in bounded time.

`tests/fuzz/test_calls_of_f.py` asks the equation alone; this one simulates runs, and is asked what decides about memory.
"""

from __future__ import annotations

import math
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

import sdfit
from sdfit.equation.metrics import METRICS
from sdfit.errors import SdfitError
from sdfit.predict.options import options_that_fit
from sdfit.predict.prediction import Prediction
from sdfit.predict.predictor import Predictor
from sdfit.predict.verdict import ANSWERS
from sdfit.workload import CHOICES, WORKLOAD_FIELDS, Workload

SEED, FEW, MANY = 20261128, 60, 1000
LONGEST_S = 60.0
"""Of the processor's time that one call may take: the largest batch of a card of 80 GiB takes the longest."""


class Nasty:
    """A value that cannot be shown, compared or told true from false."""

    def __repr__(self) -> str:
        raise RuntimeError("no")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no")

    def __bool__(self) -> bool:
        raise RuntimeError("no")

    __hash__ = object.__hash__


ODD: list[Any] = [
    None, True, False, math.nan, math.inf, -math.inf, 10**5000, -(10**5000), 2**63, -1, 0, -0.0, 0.5, 1e308, 5e-324, 512.0, 1j,
    "", "x", "512", "float16\0", "t" * 100_000, "-1 GiB", "nan", "inf", "1e400", "free", "8 GiB\n", b"x", [], [512], {}, {1}, (512,), float,
    np.int64(512), np.int8(64), np.uint64(2**64 - 1), np.float32(7.5), np.float64("nan"), np.bool_(True), np.str_("float16"),
    np.array(512), np.array([512]), np.array([]), np.array([[1]]), np.array("float16"), np.ma.masked, np.ma.array(512, mask=True),
    np.datetime64("2026-11-28"), Decimal("NaN"), Decimal(512), Nasty(), object(),
]  # fmt: skip
SIDES = (8, 64, 65, 72, 127, 200, 256, 380, 512, 513, 768, 1000, 1024, 1111, 1536, 2048, 4096, 16384)
LIKELY: dict[str, tuple[Any, ...]] = {
    "prompt_length": (1, 77, 78, 300), "batch_size": (1, 2, 3, 8, 33, 1000), "guidance_scale": (0, 1, 1.0001, 7.5, 1e308), **CHOICES,
}  # fmt: skip
LEVELS = (1e-12, 1e-9, 1e-6, 0.01, 0.5, 0.9, 0.95, 0.99, 1 - 1e-6, 1 - 1e-12, 1 - 2**-53)
MEMORY = ("100MB", "3.6 GiB", "8GiB", "15 GiB", "24g", "80GiB", "1 B", 1, 8.5e9, 2**62, np.int64(8 << 30))


@pytest.fixture(scope="module")
def models() -> list[Predictor]:
    """A card of each shipped model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [sdfit.load(name) for name in ("gtx1080", "v100", "t4", "rtx3060", "h100")]


def sound(peak: Prediction) -> None:
    """A prediction whose numbers are in order."""
    assert 0 <= peak < math.inf and 0 <= peak.interval.low <= peak <= peak.interval.high
    assert peak.lower <= peak <= peak.upper and 0 <= peak.chance_within(8 << 30) <= 1
    assert peak.to_dict()["workload"] and repr(peak) and peak.stage in peak.stage_peaks


def ask_f(f: Predictor, fields: dict[str, Any], memory: Any, how: dict[str, Any]) -> None:
    sound(f(**fields, **how))


def ask_verdict(f: Predictor, fields: dict[str, Any], memory: Any, how: dict[str, Any]) -> None:
    found = f.verdict(**fields, memory=memory, **how)
    sound(found.prediction)
    assert found.answer in ANSWERS and 0 <= (found.chance or 0) <= 1 and found.to_dict()
    assert found.answer != "fits" or f.fits(**fields, memory=memory, **how) is True


def ask_fits(f: Predictor, fields: dict[str, Any], memory: Any, how: dict[str, Any]) -> None:
    assert f.fits(**fields, memory=memory, **how) in (True, False)


def ask_largest(f: Predictor, fields: dict[str, Any], memory: Any, how: dict[str, Any]) -> None:
    aspect = fields.pop("height"), fields.pop("width")
    found = f.largest(memory=memory, aspect=aspect if fields.pop("metric", 0) else (3, 2), **fields, **how)
    assert min(found) >= 64 and max(found) <= 16384 and all(a >= b for a, b in zip(found.likely, found, strict=True))


def ask_batch(f: Predictor, fields: dict[str, Any], memory: Any, how: dict[str, Any]) -> None:
    fields.pop("batch_size", None)
    found = f.max_batch_size(memory=memory, **fields, **how)
    assert 1 <= found <= found.likely


def ask_advise(f: Predictor, fields: dict[str, Any], memory: Any, how: dict[str, Any]) -> None:
    for option in options_that_fit(f, Workload.from_dict(fields), memory=memory, **how):
        sound(option.prediction)
        assert option.change and option.to_dict()


def ask_table(f: Predictor, fields: dict[str, Any], memory: Any, how: dict[str, Any]) -> None:
    """A table is what the scalar says of each row: of what a run requires, the equation's where it has coefficients."""
    table = {name: [value] * 2 for name, value in fields.items()}
    metric = {name: how[name] for name in how if name == "metric"}
    value, ends = f.predict(table, **metric), f.predict_interval(table, **how)
    assert value.shape == (2,) and np.isfinite(value).all() and (ends[:, 0] >= 0).all()
    assert (ends[:, 0] <= value).all() and (value <= ends[:, 1]).all()
    try:
        alone = f.equation(**fields, **how)
    except SdfitError:
        alone = f(**fields, **how)  # simulated there too
    assert value.tolist() == pytest.approx([float(alone)] * 2, rel=1e-9)


QUESTIONS = (ask_f, ask_verdict, ask_verdict, ask_fits, ask_largest, ask_batch, ask_advise, ask_table)


def asked(models: list[Predictor], count: int) -> Counter[str]:
    """How so many questions ended, half of them with an odd value somewhere."""
    rng, ends = random.Random(SEED), Counter[str]()
    for number in range(count):
        fields = {"height": rng.choice(SIDES), "width": rng.choice(SIDES)}
        fields |= {name: rng.choice(some) for name, some in LIKELY.items() if rng.random() < 0.3}
        how: dict[str, Any] = {"metric": rng.choice(("required", "required", *METRICS))} if rng.random() < 0.6 else {}
        how |= {"level": rng.choice(LEVELS)} if rng.random() < 0.5 else {}
        memory = rng.choice(MEMORY)
        if rng.random() < 0.5:
            odd, name = rng.choice(ODD), rng.choice((*WORKLOAD_FIELDS, "x", "metric", "level", "memory"))
            if name == "memory":
                memory = odd
            else:
                (how if name in ("metric", "level") else fields)[name] = odd
        f, question = rng.choice(models), rng.choice(QUESTIONS)
        started = time.process_time()
        try:
            question(f, fields, memory, how)
            end = "answered"
        except SdfitError as error:
            assert str(error).isprintable() and len(str(error)) < 20_000
            end = type(error).__name__
        took = time.process_time() - started
        assert took < LONGEST_S, f"question {number}, {question.__name__}, took {took:.1f} s"
        ends[end] += 1
    return ends


def test_some_questions(models: list[Predictor]) -> None:
    """A share of those of `test_many_questions`."""
    assert asked(models, FEW)["answered"] > FEW / 5


@pytest.mark.slow
def test_many_questions(models: list[Predictor], record_property: Callable[[str, object], None]) -> None:
    """Each kind of question, of each model, with values of any kind."""
    ends = asked(models, MANY)
    record_property("fuzz", f"{MANY} questions to loaded models, seed {SEED}: {dict(ends.most_common())}, nothing else")
    assert ends["answered"] > MANY / 5


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: type(odd).__name__)
@pytest.mark.parametrize("name", ["metric", "level", "memory"])
def test_how_it_is_asked_is_checked_before_anything_runs(models: list[Predictor], name: str, odd: Any) -> None:
    """Neither a list nor pandas' NA nor an empty array is taken for a metric, or for none."""
    if odd is None or (name == "level" and type(odd) is float and 0 < odd < 1 - 1e-9 and odd > 1e-9):
        return
    for question in (ask_verdict, ask_fits, ask_batch, ask_largest, ask_advise, ask_f):
        how = {} if name == "memory" else {name: odd}
        try:
            question(models[2], {"height": 256, "width": 256}, odd if name == "memory" else "1 B", how)
        except SdfitError as error:
            assert str(error).isprintable()


@pytest.mark.parametrize("name", ["metric", "level", "memory", "height", "dtype"])
def test_pandas_missing_value_is_no_value(models: list[Predictor], name: str) -> None:
    """pd.NA cannot even be told true from false."""
    pd = pytest.importorskip("pandas")
    fields, how = {"height": 512, "width": 512}, {name: pd.NA} if name in ("metric", "level") else {}
    fields |= {name: pd.NA} if name in ("height", "dtype") else {}
    for question in (ask_verdict, ask_fits, ask_advise):
        with pytest.raises(SdfitError):
            question(models[2], dict(fields), pd.NA if name == "memory" else "8 GiB", how)
