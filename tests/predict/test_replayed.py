"""A model that replays what its equation leaves open: exact where asked, quick where the equation is sure, honest about it."""

import copy
import pickle
import warnings

import numpy as np
import pytest

import sdfit
from sdfit.cli import main
from sdfit.errors import NeverSwept, SdfitError
from sdfit.predict.options import options_that_fit
from sdfit.predict.predictor import Predictor
from sdfit.predict.replayed import Replayed, replaying, why_not
from sdfit.predict.simulated import ReplayedPrediction
from sdfit.predict.simulation.needed import Needed
from sdfit.units import GIB
from sdfit.workload import Workload


@pytest.fixture(scope="module", autouse=True)  # a model says what it rests on once
def f():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sdfit.load("t4").equation


class Counted:
    """A replay that is an eighth above the equation, and knows what it was asked."""

    def __init__(self, f, factor=1.125):
        self.f, self.factor, self.asked = f, factor, []

    def __call__(self, workload, metric):
        self.asked.append((workload, metric))
        return round(self.factor * self.f.predict_workload(workload, metric=metric))

    def suffices(self, workload, metric, cap):
        return self(workload, metric) <= cap

    @property
    def patient(self):
        return self


def test_what_hangs_on_packing_is_the_replay_and_what_is_allocated_the_equation(f):
    """And a run is replayed once, however often it is asked for."""
    replay = Counted(f)
    g = Replayed(f, replay)
    w = Workload(768, 512, attention="eager")
    got = g.predict_workload(w, metric="required", level=0.99)
    assert isinstance(got, ReplayedPrediction) and got == round(1.125 * f.predict_workload(w, metric="required"))
    assert g(768, 512, attention="eager", metric="required") == got and len(replay.asked) == 1
    same = g.predict_workload(w)
    assert same == f.predict_workload(w) and type(same) is sdfit.Prediction
    reserved, device = (g.predict_workload(w, metric=metric) for metric in ("reserved", "device"))
    assert reserved == round(1.125 * f.predict_workload(w, metric="reserved")) and device == reserved + g.context_bytes
    assert device.replayed and len(replay.asked) == 2
    assert got.to_dict()["replayed"] and not f.predict_workload(w, metric="required").to_dict()["replayed"]


def test_the_interval_rests_on_published_runs_alone(f):
    """Far narrower than the equation's where packing jumps, never narrower than the published scores, and it nests."""
    w = Workload(1024, 768, attention="eager")
    equation, got = (
        model.predict_workload(w, metric="required", level=0.99) for model in (f, Replayed(f, Counted(f, factor=1.0)))
    )
    assert got < got.upper < equation.upper and equation.lower < got.lower < got
    scores = f.artifact.scores["required"]["replayed"]["values"]
    assert got.upper - got > 0.9 * max(scores) * 0.5 * 2**31  # in units of activations and half the weights
    wide = Replayed(f, Counted(f, factor=1.0)).predict_workload(w, metric="required", level=0.8)
    assert wide.upper <= got.upper
    assert got.chance_within(got.upper) > 0.9 and got.chance_within(got.lower - GIB) == 0


def test_only_what_is_open_is_replayed(f):
    """A run that surely fits, and one that surely does not, cost no replay; the answers of both models agree there."""
    replay = Counted(f)
    g = Replayed(f, replay, limit_bytes=8 * GIB)
    for size, answer in ((512, "fits"), (3072, "does not fit")):
        assert g.verdict(size, size, memory="8 GiB").answer == answer == f.verdict(size, size, memory="8 GiB").answer
    assert not replay.asked
    open_ = next(s for s in range(512, 3072, 8) if f.verdict(s, s, memory="8 GiB").answer == "may fit")
    assert g.verdict(open_, open_, memory="8 GiB").prediction.to_dict()["replayed"] and replay.asked


def test_the_largest_size_is_as_large_as_a_replay_says(f):
    """Were every run an eighth smaller than the equation says, a larger size is sure; none beyond what it then needs."""
    smaller, plain = Replayed(f, Counted(f, 0.875), limit_bytes=6 * GIB), f.largest(memory="6 GiB", attention="eager")
    found = smaller.largest(memory="6 GiB", attention="eager")
    assert found[0] >= plain[0]
    assert smaller.predict_workload(Workload(*found, attention="eager"), metric="required", level=0.99).upper <= 6 * GIB


def test_it_pickles_and_copies(f):
    """The model, its predictions, and what `within` makes share what was replayed."""
    g = Replayed(f, Counted(f))
    got = g.predict_workload(Workload(512, 512), metric="required")
    for again in (pickle.loads(pickle.dumps(got)), copy.deepcopy(got)):
        assert type(again) is ReplayedPrediction and again == got and again.upper == got.upper
    assert pickle.loads(pickle.dumps(g)).predict_workload(Workload(512, 512), metric="required") == got
    replay = Counted(f)
    g = Replayed(f, replay)
    assert g.predict_workload(Workload(512, 512), metric="required") == got
    near = g.within(float(f(512, 512, metric="required")))  # which the equation does not settle
    assert near.predict_workload(Workload(512, 512), metric="required") == got and len(replay.asked) == 1


def test_a_model_that_does_not_rest_on_traces_is_not_replayed(noisy):
    """A measured or made-up card knows more than a simulation; one sentence."""
    with pytest.raises(SdfitError, match="ask the model itself"):
        Replayed(noisy, lambda workload, metric: 1)


def test_a_limit_is_answered_as_by_the_whole_number():
    """By one replay under what the bound leaves of the limit; of the run itself the number is whole."""
    w = Workload(880, 880, attention="eager")
    for metric in ("required", "minimum", "reserved", "device"):
        bound = sdfit.load("t4").predict_workload(w, metric=metric, level=0.99).upper
        for limit in (bound - 2**21, bound - 1, bound + 1, bound + 2**21):
            assert sdfit.load("t4").is_sure(w, limit, metric=metric, level=0.99, simulated=True) == (bound <= limit)


def test_a_feature_map_of_one_pixel_is_simulated_too():
    """An image of 64x64: what it requires lies above what the smallest cap without workspaces is, which the equation's did not."""
    g, w = sdfit.load("t4"), Workload(64, 64, dtype="bfloat16", attention="sliced")
    needs = {metric: g.predict_workload(w, metric=metric) for metric in ("minimum", "required", "reserved")}
    assert all(peak.replayed for peak in needs.values())
    assert needs["minimum"] <= needs["required"] <= needs["reserved"]


def test_a_run_of_too_many_allocations_is_the_equations(f, monkeypatch):
    """A replay that would take long, or much memory, is not begun."""
    monkeypatch.setattr("sdfit.predict.simulation.simulate.MOST_EVENTS", 5_000)
    got = replaying(f).predict_workload(Workload(512, 512), metric="required")
    assert got == f.predict_workload(Workload(512, 512), metric="required") and got.replayed is False


def test_what_nothing_else_answers_is_simulated_however_long_it_takes(f, monkeypatch):
    """Up to a length that is bounded too; the number is that of a simulation without such a limit."""
    g = sdfit.load("t4")
    whole = g(512, 512, **NEVER_SWEPT, metric="required")
    monkeypatch.setattr("sdfit.predict.simulation.simulate.MOST_EVENTS", 5_000)
    again = replaying(f)(512, 512, **NEVER_SWEPT, metric="required")
    assert again == whole and again.replayed and g.max_batch_size(512, 512, memory="4 GiB", **NEVER_SWEPT) >= 1
    monkeypatch.setattr("sdfit.predict.simulation.simulate.MOST_PATIENT", 5_000)
    with pytest.raises(NeverSwept, match="5,000 allocations"):
        replaying(f)(512, 512, **NEVER_SWEPT, metric="required")


def test_a_model_of_other_kernels_is_not_replayed(f):
    """Of a table that was calibrated elsewhere, or that has changed since: its own equation answers, with no word of a replay."""
    for table in ("sm75 0123456789abcdef", None):
        artifact = copy.deepcopy(f.artifact)
        artifact.environment["workspaces"] = table
        other = replaying(Predictor(artifact))
        assert type(other) is Predictor and "another table" in why_not(other)


@pytest.mark.parametrize(
    "options",
    [{"attention": "eager"}, {"offload": "model"}, {"vae_tiling": True}, {"offload": "group_block"},
     {"offload": "sequential", "attention": "sliced", "dtype": "bfloat16"},
     {"offload": "sequential", "attention": "sliced", "dtype": "bfloat16", "height": 64, "width": 64}],
    ids=str,
)  # fmt: skip
def test_a_real_replay_equals_a_record(options):
    """Of kinds of run where packing jumps: the smallest cap of a trace of the same run."""
    pytest.importorskip("diffusers")
    from sdfit.backends.trace.backend import TraceBackend

    w, g = Workload(**({"height": 584, "width": 712} | options)), sdfit.load("t4")
    record = TraceBackend("t4", workspaces=True).measure(w)
    never_swept = isinstance(g.predict_workload(w), ReplayedPrediction)
    assert never_swept == ("dtype" in options)
    for metric in ("required", "minimum", "reserved", *(("allocated",) if never_swept else ())):
        assert g.predict_workload(w, metric=metric) == record[f"{metric}_bytes"]


NEVER_SWEPT = {"offload": "sequential", "attention": "eager"}


def test_what_was_never_swept_is_simulated_in_every_metric(f):
    """The equation refuses it; the model answers, with the simulated run's stages, an interval, and its breakdown."""
    g = sdfit.load("t4")
    with pytest.raises(NeverSwept):
        f(512, 512, **NEVER_SWEPT)
    for metric in ("allocated", "reserved", "device", "required", "minimum"):
        peak = g(512, 512, **NEVER_SWEPT, metric=metric)
        assert peak.replayed and not peak.extrapolated and peak.provenance == "published"
        assert 0 < peak.interval.low < peak < peak.upper <= peak.interval.high
        assert sum(peak.breakdown.values()) == pytest.approx(peak)
        assert peak.stage == max(peak.stage_peaks, key=peak.stage_peaks.get)
        assert peak.chance_within(peak.interval.high) > 0.9 and peak.chance_within(0) == 0
        again = pickle.loads(pickle.dumps(peak))
        assert again == peak and again.upper == peak.upper and again.to_dict() == peak.to_dict()
    assert g(512, 512, **NEVER_SWEPT) == max(peak.stage_peaks.values())
    assert (
        g(512, 512, **NEVER_SWEPT, metric="device") == g(512, 512, **NEVER_SWEPT, metric="reserved") + g.context_bytes
    )


def test_a_table_may_hold_rows_that_were_never_swept():
    """Each row is what a call gives, with its interval."""
    g = sdfit.load("t4")
    table = {
        "height": [512, 512, 640],
        "width": 512,
        "offload": ["sequential", "none", "sequential"],
        "attention": "eager",
    }
    for metric in ("allocated", "reserved", "required"):
        values, ends = g.predict(table, metric=metric), g.predict_interval(table, metric=metric, level=0.9)
        for row, offload in enumerate(table["offload"]):
            call = g if offload == "sequential" else g.equation
            peak = call(table["height"][row], 512, offload=offload, attention="eager", metric=metric, level=0.9)
            assert (values[row], *ends[row]) == pytest.approx((peak, *peak.interval), rel=1e-12)


def test_questions_about_what_was_never_swept_agree():
    """Verdict, fits, the largest size and batch, and advice: one answer; what is refused says why."""
    g = sdfit.load("t4")
    wide = {"height": 512, "width": [512, 4096]} | NEVER_SWEPT
    assert g.beyond(wide, 2**32, metric="required", level=0.9).tolist() == [False, True]
    size = g.largest(memory="4 GiB", **NEVER_SWEPT)
    assert g.fits(*size, memory="4 GiB", **NEVER_SWEPT)
    assert g.verdict(*size, memory="4 GiB", **NEVER_SWEPT).answer == "fits"
    assert g.verdict(2048, 2048, memory="4 GiB", **NEVER_SWEPT).answer == "does not fit"
    batch = g.max_batch_size(512, 512, memory="4 GiB", **NEVER_SWEPT)
    assert g.fits(512, 512, batch_size=batch, memory="4 GiB", **NEVER_SWEPT)
    assert not g.fits(512, 512, batch_size=batch + 1, memory="4 GiB", **NEVER_SWEPT)
    asked = Workload(1024, 1024, dtype="bfloat16", attention="sliced_max")
    for option in options_that_fit(g, asked, memory="3.5 GiB"):
        assert g.fits(**asked.to_dict() | option.change, memory="3.5 GiB")
    with pytest.raises(
        NeverSwept, match=r"no coefficients for float16 eager .* not simulated: .* 2,000,000 allocations"
    ):
        g(16384, 16384, batch_size=4, vae_slicing=True, vae_tiling=True, **NEVER_SWEPT, metric="required")


@pytest.mark.parametrize("options", [{}, {"attention": "eager"}, {"dtype": "float32", "batch_size": 2}])
def test_what_a_table_leaves_out_of_a_search_does_not_fit(f, options):
    """The sizes that are beyond a limit by the table are beyond it one by one, by the equation and by replays."""
    sides = list(range(64, 3072, 64))
    table = {"height": sides, "width": sides} | options
    for model in (f, Replayed(f, Counted(f, factor=1.0))):
        beyond = model.beyond(table, 9 * GIB, metric="required", level=0.99)
        near = model.within(9 * GIB)
        runs = [Workload(side, side, **options) for side in sides]
        uppers = [near.predict_workload(run, metric="required", level=0.99).upper for run in runs]
        assert beyond.any() and not any(out and upper <= 9 * GIB for out, upper in zip(beyond, uppers, strict=True))
        assert sum(upper > 9 * GIB for upper in uppers) - beyond.sum() <= (0 if model is f else 12)


def test_what_is_known_of_a_run_changes_no_answer(f):
    """Where the equation settles whether a run needs more than a limit, its answer is the same before and after a replay."""
    g, w, limit = Replayed(f, Counted(f)), Workload(512, 512), 8 * GIB
    before = g.within(limit).predict_workload(w, metric="required")
    assert g.predict_workload(w, metric="required") > before  # an eighth above the equation
    assert g.within(limit).predict_workload(w, metric="required") == before


def test_numbers_within_a_limit_are_exact_where_asked():
    """A run beyond the limit that the equation leaves open has its whole number; one that it settles is the equation's."""
    g = sdfit.load("t4")
    open_, settled = Workload(880, 880, attention="eager"), Workload(2048, 2048, attention="eager")
    whole = g.predict_workload(open_, metric="required")
    near = sdfit.load("t4").within(whole - 2**21)
    assert near.predict_workload(open_, metric="required") == whole
    assert near.predict_workload(settled, metric="required").replayed is False


def test_the_commands_answer_for_what_was_never_swept(capsys):
    """Each of those that ask about one run."""
    asked = ["--gpu", "t4", "--height", "512", "--width", "512", "--offload", "sequential", "--attention", "eager"]
    for command in ("predict", "fits", "advise", "strategies"):
        assert main([command, *asked, *([] if command == "predict" else ["--memory", "4GiB"])]) == 0
        assert "simulated" in capsys.readouterr().out or command in ("advise", "strategies")


@pytest.mark.parametrize("options", [NEVER_SWEPT, NEVER_SWEPT | {"vae_slicing": True}], ids=str)
def test_a_ladder_without_coefficients_is_halved_by_what_is_live(options):
    """No batch that fits is left out; far above the limit none is asked for one by one."""
    g, limit = sdfit.load("t4").within(5 << 30), 5 << 30
    batches = np.arange(1, 1025)
    table = Workload(512, 384, **options).to_dict() | {"batch_size": batches}
    beyond = g.beyond(table, limit, metric="required", level=0.99)
    largest = g.max_batch_size(512, 384, memory=limit, **options)
    assert largest < batches[beyond][0] < 4 * largest and beyond[batches >= batches[beyond][0]].all()
    assert g.equation is not g and not g.beyond(table, 2**62, metric="required", level=0.99).any()


def test_three_images_past_many_elements_are_simulated_though_the_equation_has_a_number():
    """One set of coefficients stands for runs that differ there: a V100 by 2.5 %. Two images, and fewer elements, are its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        f = sdfit.load("v100")
    replay = Needed("sm70")
    w = Workload(2360, 2368, batch_size=3)
    assert f(2360, 2368, batch_size=3) == f.predict_workload(w) == replay(w, "allocated")
    assert (
        f(2360, 2368, batch_size=3).replayed
        and abs(f.equation(2360, 2368, batch_size=3) / f(2360, 2368, batch_size=3) - 1) > 0.02
    )
    assert not f(2360, 2368, batch_size=2).replayed and not f(512, 512, batch_size=3).replayed
    assert not f(2360, 2368, batch_size=3, vae_slicing=True).replayed  # one image at a time


@pytest.mark.parametrize(
    "options", [{"vae_slicing": True, "offload": "model"}, {"vae": "tiny", "attention": "eager", "offload": "model"}]
)
def test_what_the_equation_has_no_runs_of_its_kind_for_is_not_settled_by_it(options):
    """These were never swept together: the equation says a seventh too little of them or less; only its bound is above the truth."""
    f = sdfit.load("t4")
    run = Workload(1024, 1024, batch_size=2, **options)
    needed = f.predict_workload(run, metric="required", level=0.99)
    alone = f.equation.predict_workload(run, metric="required", level=0.99)
    assert alone < 0.86 * needed and needed <= alone.upper and not alone.of_its_kind
    memory = (float(alone) + float(needed)) / 2
    assert not f.fits(**run.to_dict(), memory=memory) and f.verdict(**run.to_dict(), memory=memory).answer != "fits"
    batch = f.max_batch_size(1024, 1024, memory=memory, **options)
    assert batch < 2
    usual = f.equation(1024, 1024, metric="required", level=0.99)
    assert usual.of_its_kind and not f.equation(4096, 4096, metric="required", level=0.99).of_its_kind


def test_what_the_equation_overrates_far_outside_the_sweep_fits_all_the_same():
    """Where it says several times too much, `fits`, the verdict and the largest batch say one thing: what is simulated."""
    g = sdfit.load("t4")
    w = Workload(9536, 4768, batch_size=2, vae="tiny", offload="sequential", safety_checker=False)
    needed = g.predict_workload(w, metric="required", level=0.99)
    limit = 48 * GIB
    assert needed.upper <= limit and g.equation.predict_workload(w, metric="required").lower > 1.5 * limit
    assert g.verdict(w.height, w.width, batch_size=2, memory=limit, **_options(w)).answer == "fits"
    assert g.fits(w.height, w.width, batch_size=2, memory=limit, **_options(w))
    assert g.max_batch_size(w.height, w.width, memory=limit, **_options(w)) >= 2


def _options(w):
    return {name: getattr(w, name) for name in ("vae", "offload", "safety_checker")}


@pytest.mark.parametrize(
    "options", [{"attention": "sliced", "vae": "tiny"}, {"offload": "group_block", "vae_tiling": True}], ids=str
)
def test_what_is_allocated_far_outside_the_sweep_is_simulated_where_the_equation_goes_astray(options):
    """By call, called again, and as a workload; within the sweep it is the equation's."""
    g = sdfit.load("t4")
    w = Workload(384, 488, 231, 13, dtype="float16", **options)
    needed = Needed("sm75")(w, "allocated")
    for _ in range(2):
        got = g(384, 488, 231, 13, **options)
        assert got == g.predict_workload(w) == needed and got.replayed and not got.extrapolated
    assert g.equation.predict_workload(w).extrapolated
    assert not g(512, 512, **options).replayed
