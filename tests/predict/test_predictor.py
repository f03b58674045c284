"""`f`: one answer whichever way it is asked, with its reasons, and bad input refused."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import SWEPT, swept_workloads

import sdfit
from sdfit.equation.metrics import METRICS, NEVER_BELOW_LIVE
from sdfit.errors import InvalidWorkload, SimulatedModelWarning, UnknownKeyword, UnknownModel, UnknownVariant
from sdfit.predict import library
from sdfit.predict.loading import load_artifact
from sdfit.predict.prediction import BEYOND, Prediction
from sdfit.predict.predictor import Predictor
from sdfit.workload import VARIANT_FIELDS, Workload


@given(swept_workloads(), st.sampled_from((0.5, 0.8, 0.95)), st.sampled_from(("allocated", "reserved", "required")))
@settings(max_examples=200, deadline=None)
def test_one_answer_whichever_way_it_is_asked(f: Predictor, w: Workload, level: float, metric: str) -> None:
    """Keywords, a Workload and a table agree to 1e-12 in value and stage, to 1e-9 in the interval."""
    fields = w.to_dict()
    f(**fields)  # now the variant is known, and the next call takes the short way
    short, long = f(**fields), f.predict_workload(w)
    assert short == pytest.approx(float(long), rel=1e-12)
    assert (short.workload, short.stage, short.interval) == (w, long.stage, pytest.approx(long.interval, rel=1e-12))
    assert float(long) == pytest.approx(max(long.stage_peaks.values()), rel=1e-12)
    asked = f(**fields, metric=metric, level=level)
    columns = {name: [value, value] for name, value in fields.items()}
    for table in (fields, columns):
        value = f.predict(table, metric=metric)
        assert value == pytest.approx(np.full(len(value), float(asked)), rel=1e-12)
        low, high = f.predict_interval(table, metric=metric, level=level)[-1]
        assert (low, high) == pytest.approx(tuple(asked.interval), rel=1e-9)


@given(swept_workloads(), st.sampled_from(METRICS))
@settings(max_examples=100, deadline=None)
def test_the_breakdown_adds_up(f: Predictor, w: Workload, metric: str) -> None:
    """Whatever the metric, the parts of the breakdown add up to the prediction; only workspaces that PyTorch can do without
    are a part below zero."""
    peak = f.predict_workload(w, metric=metric)
    assert sum(peak.breakdown.values()) == pytest.approx(float(peak), rel=1e-12)
    assert min(peak.breakdown.values()) >= -1e-5 * peak or metric not in NEVER_BELOW_LIVE
    assert (BEYOND in peak.breakdown) == (metric != "allocated")
    assert peak.stage_peaks[peak.stage] == max(peak.stage_peaks.values())
    assert 0 <= peak.interval.low <= peak <= peak.interval.high and peak <= peak.upper


@given(swept_workloads(), st.sampled_from(METRICS[1:]))
@settings(max_examples=50, deadline=None)
def test_what_lies_beyond_allocated_memory_is_a_part_of_its_own(f: Predictor, w: Workload, metric: str) -> None:
    """The breakdown of reserved, device and required is that of allocated memory and the rest of the metric."""
    allocated, peak = f.predict_workload(w), f.predict_workload(w, metric=metric)
    parts = peak.breakdown
    assert parts.pop(BEYOND) == pytest.approx(peak - allocated, rel=1e-9, abs=1e-3)
    assert parts == allocated.breakdown


@given(swept_workloads(), st.integers(0, 400), st.sampled_from(("height", "width", "batch_size", "prompt_length")))
@settings(max_examples=200, deadline=None)
def test_within_one_set_of_coefficients_more_never_needs_less(f: Predictor, w: Workload, more: int, field: str) -> None:
    """On a card that has no regimes the peak does not fall as height, width, batch or prompt grows, nor with guidance.

    Models with regimes may fall where one begins: see the test of the shipped models.
    """
    larger = replace(w, **{field: getattr(w, field) + more})
    # two orders of the same sum may differ in the last digit
    assert f.predict_workload(larger) >= f.predict_workload(w) * (1 - 1e-12)
    guided, unguided = (f.predict_workload(replace(w, guidance_scale=scale)) for scale in (7.5, 1.0))
    assert guided >= unguided * (1 - 1e-12)


@given(swept_workloads(), st.integers(0, 7), st.integers(0, 7), st.integers(1, 77))
@settings(max_examples=100, deadline=None)
def test_what_the_pipeline_floors_and_pads_costs_the_same(
    f: Predictor, w: Workload, down: int, right: int, prompt: int
) -> None:
    """Up to 7 pixels more, a prompt of 1 to 77 tokens, another guidance above 1: the same bytes."""
    base = replace(w, height=w.effective_height, width=w.effective_width, prompt_length=77, guidance_scale=7.5)
    other = replace(
        base, height=base.height + down, width=base.width + right, prompt_length=prompt, guidance_scale=1.01
    )
    assert f.predict_workload(base) == f.predict_workload(other)
    assert f(**base.to_dict()) == f(**other.to_dict())


@given(swept_workloads())
@settings(max_examples=50, deadline=None)
def test_numpy_numbers_are_numbers(f: Predictor, w: Workload) -> None:
    """NumPy integers, floats, strings and booleans give the same prediction, and plain values when it is shown."""
    kinds: dict[type, Any] = {int: np.int64, float: np.float64, bool: np.bool_, str: np.str_}
    peak = f(**{name: kinds[type(value)](value) for name, value in w.to_dict().items()})
    assert peak == pytest.approx(float(f(**w.to_dict())), rel=1e-12)
    assert json.loads(json.dumps(peak.to_dict()))["workload"] == w.to_dict()


def test_a_prediction_is_a_float(f: Predictor) -> None:
    """Arithmetic, comparison, formatting, rounding and JSON are a float's."""
    peak = f(512, 512)
    assert isinstance(peak, float) and isinstance(peak, Prediction)
    assert peak + 1 == float(peak) + 1 and f"{peak:.0f}" == f"{float(peak):.0f}" and round(peak) == round(float(peak))
    assert sorted([f(1024, 1024), peak])[0] is peak
    assert json.loads(json.dumps({"peak": peak})) == {"peak": float(peak)}


FACTS = (
    "metric", "level", "interval", "upper", "stage", "stage_peaks", "breakdown", "workload", "extrapolated",
    "provenance",
)  # fmt: skip


@pytest.mark.parametrize("asked", [{}, {"metric": "required", "level": 0.9, "attention": "eager", "offload": "model"}])
@pytest.mark.parametrize(
    "keep",
    [
        copy.copy,
        copy.deepcopy,
        *(lambda p, protocol=protocol: pickle.loads(pickle.dumps(p, protocol)) for protocol in (2, 4, 5)),
    ],
    ids=["copy", "deepcopy", "pickle 2", "pickle 4", "pickle 5"],
)
@pytest.mark.parametrize("read_before", [False, True])
def test_a_prediction_is_kept_whole(
    noisy: Predictor, f: Predictor, asked: dict[str, Any], keep: Any, read_before: bool
) -> None:
    """Copied or pickled, before or after its facts were read, it has its value and every fact; so has a list of them."""
    for model, options in ((f, asked), (noisy, {"level": 0.8})):
        model(768, 520, 99, 2)  # the next call takes the short way
        for peak in (model(768, 520, 99, 2), model(768, 520, 99, 2, **options)):
            before = {name: getattr(peak, name) for name in FACTS} if read_before else {}
            (kept,) = keep([peak])
            assert type(kept) is Prediction and float(kept) == float(peak)
            facts = {name: getattr(kept, name) for name in FACTS}
            assert facts == {name: getattr(peak, name) for name in FACTS} and before.items() <= facts.items()
            assert kept.to_dict() == peak.to_dict()


@pytest.mark.parametrize("name", ["metric", "level", "interval", "upper", "stage", "workload", "breakdown", "anything"])
def test_a_prediction_is_frozen(f: Predictor, name: str) -> None:
    """No attribute can be set, deleted or added, and tables that it gives are the reader's own."""
    peak = f(512, 512)
    for one in (peak, copy.copy(peak), pickle.loads(pickle.dumps(peak))):
        with pytest.raises(AttributeError, match=f"'{name}' cannot be set"):
            setattr(one, name, "reserved")
        with pytest.raises(AttributeError, match=f"'{name}' cannot be deleted"):
            delattr(one, name)
    peak.breakdown.clear()
    peak.stage_peaks.clear()
    assert peak.breakdown and peak.stage_peaks and peak.metric == "allocated"


def test_a_model_that_was_used_can_be_sent_to_another_process(f: Predictor) -> None:
    """After its first calls a Predictor pickles and copies, and answers the same."""
    used = Predictor(f.artifact, f.path)
    asked = [used(768, 512, batch_size=2, **options) for options in SWEPT]
    for again in (pickle.loads(pickle.dumps(used)), copy.deepcopy(used)):
        assert [again(768, 512, batch_size=2, **options) for options in SWEPT] == asked
        assert (again.name, again.path, again.artifact) == (used.name, used.path, used.artifact)


def test_to_dict_holds_plain_bytes(f: Predictor) -> None:
    """Amounts are whole bytes with their unit in the name, an infinite bound is null, and JSON takes it all."""
    shown = json.loads(json.dumps(f(512, 512, level=0.99999).to_dict(), allow_nan=False))
    assert shown["allocated_bytes"] == round(f(512, 512)) and shown["upper_bytes"] is None
    assert shown["interval_bytes"][1] is None and shown["provenance"] == "fake" and shown["extrapolated"] is False


def test_outside_the_swept_domain_is_flagged_and_wider(f: Predictor, noisy: Predictor) -> None:
    """Inside: not flagged. Larger, more images, longer prompts or tinier: flagged, with an interval that grows."""
    assert not f(512, 512).extrapolated and not f(1000, 1400, 231, 4).extrapolated
    for w in (Workload(4096, 4096), Workload(512, 512, batch_size=64), Workload(512, 512, 1000), Workload(128, 128)):
        assert f(**w.to_dict()).extrapolated
    inside, outside = noisy(1536, 1536), noisy(4096, 4096)
    assert (outside.upper - outside) / outside > 2 * (inside.upper - inside) / inside > 0


def test_levels_widen_the_interval(noisy: Predictor) -> None:
    """A higher level is wider; one that the scores cannot support is infinite, not wrong."""
    widths = [noisy(768, 768, level=level).interval for level in (0.5, 0.8, 0.9, 0.99)]
    assert all(a.high < b.high and a.low > b.low for a, b in itertools.pairwise(widths))
    assert noisy(768, 768, level=0.9999).interval.high == math.inf == noisy(768, 768, level=0.9999).upper
    assert noisy(768, 768, level=0.9).upper < noisy(768, 768, level=0.9).interval.high * 1.01


@pytest.mark.parametrize("level", [0, 1, -0.5, 1.5, 95, float("nan"), "0.95", None, True])
def test_levels_that_are_none_are_refused(f: Predictor, level: Any) -> None:
    """Only numbers strictly between 0 and 1, by calling, by Workload and by table."""
    for ask in (
        lambda: f(512, 512, level=level),
        lambda: f.predict_workload(Workload(512, 512), level=level),
        lambda: f.predict_interval({"height": 512, "width": 512}, level=level),
    ):
        with pytest.raises(InvalidWorkload, match=r"level is .* must lie between 0 and 1"):
            ask()


def test_metrics_that_are_there_and_not(fake_model: Path) -> None:
    """All four come from a model that has them; from one that has not, the error names those there are."""
    f = Predictor(load_artifact(fake_model))
    by_metric = {m: float(f(768, 768, metric=m)) for m in ("allocated", "required", "reserved", "device")}
    assert list(by_metric.values()) == sorted(by_metric.values())
    bare = Predictor(replace(f.artifact, metrics={"reserved": f.artifact.metrics["reserved"]}))
    assert bare(512, 512, metric="reserved") == f(512, 512, metric="reserved")
    with pytest.raises(UnknownVariant, match="'fake' has no 'required'; it has: allocated, reserved"):
        bare(512, 512, metric="required")
    with pytest.raises(
        InvalidWorkload, match="metric is 'peak'; it must be one of allocated, reserved, device, required"
    ):
        f(512, 512, metric="peak")


@pytest.mark.parametrize(
    ("name", "nearest"), [("guidence_scale", "guidance_scale"), ("metrik", "metric"), ("batch", "batch_size")]
)
def test_unknown_keyword_is_a_type_error_with_the_nearest(f: Predictor, name: str, nearest: str) -> None:
    """By calling, by table, and by the questions about fitting."""
    for ask in (
        lambda: f(512, 512, **{name: 1}),
        lambda: f.predict({"height": 512, "width": 512, name: 1}),
        lambda: f.fits(512, 512, memory="8 GiB", **{name: 1}),
        lambda: f.largest(memory="8 GiB", **{name: 1}),
        lambda: f.max_batch_size(512, 512, memory="8 GiB", **{name: 1}),
    ):
        with pytest.raises(TypeError, match=f"unknown keyword '{name}'") as caught:
            ask()
        assert isinstance(caught.value, UnknownKeyword)
    with pytest.raises(UnknownKeyword, match=f"did you mean '{nearest}'"):
        f(512, 512, **{name: 1})


@pytest.mark.parametrize(
    "fields",
    [
        {"height": 0}, {"height": -512}, {"height": 63}, {"height": 10**7}, {"height": 512.0}, {"height": float("nan")},
        {"height": "512"}, {"height": None}, {"height": True}, {"prompt_length": 0}, {"batch_size": 0},
        {"batch_size": float("nan")}, {"guidance_scale": float("nan")}, {"guidance_scale": -1.0}, {"guidance_scale": "7"},
        {"dtype": "fp16"}, {"dtype": ["float16"]}, {"attention": None}, {"vae_slicing": 1}, {"vae_tiling": 0},
        {"safety_checker": 1}, {"vae_slicing": "True"}, {"offload": {}},
    ],
)  # fmt: skip
def test_bad_input_is_refused_whether_or_not_the_variant_is_known(f: Predictor, fields: dict[str, Any]) -> None:
    """Before and after the variant was used, each bad value is an InvalidWorkload that names its field."""
    asked = {"height": 512, "width": 512} | fields
    used = Predictor(f.artifact)
    for options in SWEPT:
        used(512, 512, **options)
    for g in (Predictor(f.artifact), used):
        with pytest.raises(InvalidWorkload, match=next(iter(fields))):
            g(**asked)


def test_a_variant_that_was_never_swept_names_the_nearest_that_were(f: Predictor) -> None:
    """A few of them, and the command that adds one."""
    with pytest.raises(UnknownVariant, match="no coefficients for bfloat16 sdpa vae=tiny") as caught:
        f(512, 512, dtype="bfloat16", vae="tiny")
    assert "float16 sdpa vae=tiny" in str(caught.value) and "sdfit sweep --gpu fake" in str(caught.value)
    assert len(str(caught.value)) < 400
    with pytest.raises(UnknownVariant):
        f.predict({"height": [512, 512], "width": [512, 512], "dtype": ["float16", "float32"], "vae": "tiny"})


def test_a_combination_whose_stages_were_swept_has_a_prediction(f: Predictor) -> None:
    """Slicing without the checker was never swept as such, but each of its stages was."""
    peak = f(512, 512, batch_size=4, vae_slicing=True, safety_checker=False)
    assert "float16 sdpa vae_slicing=True safety_checker=False" not in f.artifact.swept
    assert f(512, 512, batch_size=4, vae_slicing=True) - peak == pytest.approx(607_963_176)


def test_models_are_found_by_path_and_in_order(
    fake_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path, then SDFIT_MODELS, then ./models, then the shipped ones; f.path says which, in any case of letters."""
    content = fake_model.read_bytes()
    for folder in ("env", "models"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "fake.joblib").write_bytes(content)
    (tmp_path / "models" / "only.joblib").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SDFIT_MODELS", raising=False)
    monkeypatch.setattr(library, "_warned", set())
    with pytest.warns(SimulatedModelWarning, match=r"not measured; it rests on a made-up card"):
        assert sdfit.load("fake").path == Path("models/fake.joblib")
    monkeypatch.setenv("SDFIT_MODELS", str(tmp_path / "env"))
    with pytest.warns(SimulatedModelWarning):
        assert sdfit.load("FAKE").path == tmp_path / "env" / "fake.joblib"
    with pytest.warns(SimulatedModelWarning):
        assert sdfit.load("only").path == Path("models/only.joblib")
    with pytest.warns(SimulatedModelWarning):
        assert sdfit.load(str(fake_model)).path == fake_model
    assert sdfit.load(fake_model).name == "fake"  # the second time it does not warn (a warning is an error here)
    assert {"fake", "only"} <= set(sdfit.available())


def test_an_unknown_model_names_those_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_model: Path
) -> None:
    """And the command that measures the one asked for."""
    monkeypatch.setenv("SDFIT_MODELS", str(fake_model.parent))
    with pytest.raises(
        UnknownModel, match=r"no model for 'v9000'; there are: .*fake.*sdfit sweep --gpu v9000"
    ) as caught:
        sdfit.load("v9000")
    assert caught.value.exit_code == 1 and caught.value.facts["given"] == "v9000"


def test_a_model_says_what_it_is(f: Predictor) -> None:
    """Its name, what it rests on and how many variants it holds."""
    assert repr(f) == f"<sdfit model 'fake', fake, {len(f.artifact.swept)} variants>"
    assert len(VARIANT_FIELDS) == len(Workload(512, 512).variant)
