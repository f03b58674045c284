"""The regression of one stage: a scikit-learn estimator whose bounds cover the truth."""

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.base import clone
from sklearn.model_selection import GroupKFold, cross_val_score
from worlds import World, generator, grid, run

from sdfit.backends.fake import true_coefficients
from sdfit.equation.terms import size_columns
from sdfit.fit import stage_model
from sdfit.fit.fit import observe
from sdfit.fit.stage_model import StageModel, nonnegative
from sdfit.workload import Workload

SIDES = tuple(range(256, 1208, 8))


def seen(card, workloads, stage):
    """Key, X, y, scale and groups of a stage's rows."""
    key, found = next((k, o) for k, o in observe(run(card, workloads)).items() if k[0] == stage)
    groups = [f"{w.effective_height}x{w.effective_width}" for w in found.workloads]
    return key, size_columns(found.workloads), np.array(found.activation_bytes), np.array(found.scale_bytes), groups


def test_it_is_an_estimator():
    """get_params, set_params and clone carry the key and nothing that was fitted; R² on held-out resolutions is 1."""
    key, X, y, _, groups = seen(World(), grid(attention="eager"), "unet")
    model = StageModel(key)
    assert model.get_params() == {"key": key}
    fitted = model.fit(X, y)
    copy = clone(fitted)
    assert copy.get_params() == {"key": key} and not hasattr(copy, "coef_")
    assert StageModel().set_params(key=key).get_params() == {"key": key}
    scores = cross_val_score(StageModel(key), X, y, groups=groups, cv=GroupKFold(5))
    assert len(scores) == 5 and scores.min() > 1 - 1e-9


def test_it_gives_the_coefficients_back():
    """On a card that follows the equation every coefficient comes back within 0.01 %, for each kind of attention."""
    for attention in ("sdpa", "eager", "sliced"):
        workloads = grid(attention=attention, guidance_scale=1.0) + grid(attention=attention)
        key, X, y, scale, _ = seen(FakeWorld(), workloads, "unet")
        model = StageModel(key).fit(X, y, scale)
        truth = true_coefficients(workloads[0], "unet")
        assert len(model.coef_) == 1
        for name, value in zip(model.terms_, model.coef_[0], strict=True):
            assert value == pytest.approx(truth[name], rel=1e-4, abs=1e-4 * max(truth.values()) * (name == "1")), name


class FakeWorld(World):
    """A world without a scale of its own."""

    def __init__(self):
        super().__init__()
        self.scale = dict.fromkeys(self.scale, 1.0)


def coverage(stage, worlds, resolutions, monkeypatch, attention):
    """Share of 95 % bounds that hold the truth, per term, over worlds with misfit shared by resolution."""
    monkeypatch.setattr(stage_model, "POOLED_MISFIT", np.inf)  # misfit here is no regime
    hits = []
    for seed in range(worlds):
        card, rng = World(seed, noise=0.01, wobble=0.03), generator(seed)
        workloads = [
            Workload(int(h), int(w), int(p), int(b), float(g), attention=attention)
            for h, w in rng.choice(SIDES, (resolutions, 2))
            for p, b, g in zip(
                rng.choice([77, 154, 231], 4), rng.choice([1, 2, 3], 4), rng.choice([1.0, 7.5], 4), strict=True
            )
        ]
        key, X, y, scale, groups = seen(card, workloads, stage)
        model = StageModel(key).fit(X, y, scale)
        low, high = model.bounds(X, y, scale, groups)
        known = true_coefficients(workloads[0], stage)
        told = [i for i, name in enumerate(model.terms_) if name not in model.unidentified_]
        truth = np.array([known[name] * card.scale[stage] for name in model.terms_])
        hits.append(((low[0] <= truth) & (truth <= high[0]))[told])
    return np.mean(hits, axis=0)


@pytest.mark.parametrize(("stage", "attention"), [("unet", "eager"), ("vae_decoder_blocks", "sdpa")])
def test_bounds_cover_the_truth_under_misfit(stage, attention, monkeypatch):
    """Over 40 worlds each coefficient's 95 % bounds hold the truth about as often as they say: a coefficient covered in
    only 90 % of worlds would fail here with a chance of 1e-4 per term (binomial), one whose bounds hold in 75 % (as
    resampling fits that are bounded at zero does for m·A) mostly does."""
    share = coverage(stage, 40, 30, monkeypatch, attention)
    least = binom.ppf(1e-4, 40, 0.90) / 40
    assert share.min() >= least, share
    assert share.mean() >= 0.93


def test_bounds_are_deterministic_and_hold_the_estimate():
    """The same data give the same bounds, never negative, around the estimate."""
    key, X, y, scale, groups = seen(World(noise=0.05), grid(), "unet")
    model = StageModel(key).fit(X, y, scale)
    low, high = model.bounds(X, y, scale, groups)
    again = model.bounds(X, y, scale, groups)
    assert (low == again[0]).all() and (high == again[1]).all()
    assert (low >= 0).all() and (low <= model.coef_).all() and (model.coef_ <= high).all()


def test_terms_that_cannot_be_told_apart_are_named():
    """From prompts of one length, n·L and n·L·A are n and n·A again: both are named, with what to sweep, and get zero."""
    key, X, y, scale, _ = seen(World(), grid(prompts=(77,)) + grid(prompts=(77,), guidance_scale=1.0), "unet")
    model = StageModel(key).fit(X, y, scale)
    assert set(model.unidentified_) == {"n·L·A", "n·L"}
    assert "77" in model.unidentified_["n·L·A"]
    assert np.abs(model.predict(X) / y - 1).max() < 1e-6


def test_nonnegative_holds_its_bound():
    """A line that falls is fitted by a constant; a line that rises by itself."""
    x = np.arange(1.0, 6.0)
    design = np.column_stack([np.ones(5), x])
    assert nonnegative(design, 10 - x).tolist() == pytest.approx([7.0, 0.0])
    assert nonnegative(design, 3 + 2 * x).tolist() == pytest.approx([3.0, 2.0])
