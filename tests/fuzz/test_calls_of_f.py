"""Whatever `f` is asked: a finite prediction, or one `SdfitError` of one line."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from sdfit.equation.metrics import METRICS
from sdfit.errors import SdfitError
from sdfit.files import shipped
from sdfit.predict.loading import load_artifact
from sdfit.predict.predictor import Predictor
from sdfit.workload import CHOICES, WORKLOAD_FIELDS, Workload

SEED, FEW, MANY = 20261125, 300, 10_000
F = Predictor(load_artifact(shipped("models") / "sm75.joblib"))
HUGE = 10**5000


class Nasty:
    """A value that cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


class Failing:
    """A number by its word, whose every conversion fails."""

    __class__ = int  # type: ignore[assignment]

    def __index__(self) -> int:
        raise RuntimeError("no")

    def __float__(self) -> float:
        raise KeyError("no")


class Agreeing(str):
    """Text that is equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = str.__hash__


odd = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.binary(max_size=5),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from([HUGE, -HUGE, Nasty(), Failing(), Agreeing("x"), np.int64(512), np.float32(7.5), np.array([512]), np.ma.masked, 1j, float]),
)  # fmt: skip
likely = {
    "height": st.integers(64, 4096), "width": st.integers(64, 4096), "prompt_length": st.integers(1, 400),
    "batch_size": st.integers(1, 40), "guidance_scale": st.floats(0, 20), **{n: st.sampled_from(c) for n, c in CHOICES.items()},
    "metric": st.sampled_from(METRICS), "level": st.floats(1e-12, 1 - 1e-12),
}  # fmt: skip


@st.composite
def calls(draw: Any) -> dict[str, Any]:
    """Keywords of a call: height and width, some others, and one of them, or none, of any kind at all."""
    names = {"height", "width"} | draw(st.sets(st.sampled_from(sorted(likely)), max_size=5))
    found = {name: draw(likely[name]) for name in sorted(names)}
    if draw(st.booleans()):
        found[draw(st.one_of(st.sampled_from(sorted(likely)), st.text(max_size=12)))] = draw(odd)
    return found


def answered(call: Any) -> bool:
    """Whether a call gives an answer; otherwise it must raise one known failure of one line."""
    try:
        call()
    except SdfitError as error:
        assert "\n" not in str(error) and len(str(error)) < 20_000
        return False
    return True


def ask(keywords: dict[str, Any]) -> None:
    """Everything that a prediction can be asked, scalar and as a table."""
    peak = F(**keywords)
    assert 0 <= peak < math.inf and 0 <= peak.interval.low <= peak <= peak.interval.high and peak.lower <= peak.upper
    assert peak.to_dict()["workload"] and peak.stage in peak.stage_peaks
    fields = {name: value for name, value in keywords.items() if name in WORKLOAD_FIELDS}
    asked = {name: keywords[name] for name in ("metric", "level") if name in keywords}
    table = {name: np.array([value]) for name, value in fields.items()}
    assert F.predict_interval(table, **asked)[0] == pytest.approx(tuple(peak.interval), rel=1e-9)
    assert F.fits(**fields, memory="8 GiB") in (True, False)


def asked_many(count: int) -> tuple[int, int]:
    """Answers and known failures among so many calls."""
    ends = [0, 0]

    @seed(SEED)
    @settings(max_examples=count, deadline=None, database=None)
    @given(calls())
    def run(keywords: dict[str, Any]) -> None:
        ends[answered(lambda: ask(keywords))] += 1

    run()
    return ends[1], ends[0]


def test_some_calls_of_f() -> None:
    """A share of those of `test_many_calls_of_f`."""
    answers, failures = asked_many(FEW)
    assert min(answers, failures) > FEW / 20


@pytest.mark.slow
def test_many_calls_of_f(record_property: Callable[[str, object], None]) -> None:
    """Calls drawn at random, half of them with a value of any kind at all."""
    answers, failures = asked_many(MANY)
    record_property(
        "fuzz", f"{MANY} calls of f, seed {SEED}: {answers} predictions, {failures} known failures, nothing else"
    )
    assert min(answers, failures) > MANY / 20


SIZES = {"height": [512, 768], "width": [512, 768]}


@pytest.mark.parametrize(
    "table",
    [
        SIZES | {"height": np.ma.array([512, 768], mask=[False, True])},
        SIZES | {"dtype": np.ma.array(["float16", "float32"], mask=[False, True])},
        SIZES | {"height": [[512], [768]]},
        SIZES | {"height": [[512, 512], [768]]},
        SIZES | {"vae_tiling": [[True], [False, True]]},
        SIZES | {"height": [512, None]},
        SIZES | {"height": [512, HUGE]},
        SIZES | {"dtype": HUGE},
        SIZES | {"dtype": ["float16", None]},
        SIZES | {"height": Nasty()},
        {"height": [512]},
        [512, 512],
    ],
    ids=lambda table: "",
)
def test_columns_that_are_none(table: Any) -> None:
    """Masked, ragged, two-dimensional, with a missing value, with a number of 5,000 digits: one sentence each."""
    assert not answered(lambda: F.predict(table))


def test_missing_values_of_pandas() -> None:
    """pd.NA is a missing value in a column of numbers and in one of options."""
    pd = pytest.importorskip("pandas")
    for name, values in (("height", [512, pd.NA]), ("dtype", ["float16", pd.NA]), ("vae_tiling", [True, pd.NA])):
        assert not answered(lambda name=name, values=values: F.predict(pd.DataFrame(SIZES | {name: values})))  # type: ignore[misc]
    assert not answered(lambda: F(512, 512, dtype=pd.NA))


@pytest.mark.parametrize("level", [0, 1e-12, 1e-9, 1, 1.5, float("nan"), HUGE, "0.95", True], ids=lambda level: "")
def test_levels_that_are_none(level: Any) -> None:
    """The widest interval came back at 1e-12."""
    assert not answered(lambda: F(512, 512, level=level).interval)
    assert not answered(lambda: F.predict_interval(SIZES, level=level))


@pytest.mark.parametrize("level", [1e-6, 0.01, 0.5, 0.9, 0.95])
def test_wider_at_higher_levels(level: float) -> None:
    """An interval is no wider than that of a higher level."""
    low, high = F(512, 512, level=level).interval
    wide = F(512, 512, level=level + 0.04).interval
    assert wide.low <= low <= high <= wide.high


def test_values_by_place_that_are_too_many() -> None:
    """`fits` takes the fields of a workload by place, and no more."""
    fields = list(Workload(512, 512).to_dict().values())
    assert F.fits(*fields, memory="8 GiB")
    assert not answered(lambda: F.fits(*fields, "required", memory="8 GiB"))
    assert not answered(lambda: F.fits(512, 512, height=512, memory="8 GiB"))
    assert not answered(lambda: F.fits(512, 512, memory=HUGE)) and not answered(
        lambda: F.fits(512, 512, memory=Nasty())
    )


def test_a_predictor_pickles_after_its_first_call() -> None:
    """It comes back with the same answers, and so does the answer."""
    peak = F(512, 512, metric="required")
    again, answer = pickle.loads(pickle.dumps((F, peak)))
    assert again(512, 512, metric="required") == answer == peak and answer.interval == peak.interval
