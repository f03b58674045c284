"""The regression of one stage: it makes a scikit-learn estimator, and its bounds cover the truth."""

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.base import clone
from sklearn.model_selection import GroupKFold, cross_val_score
from worlds import World, generator, grid, run

from sdfit.backends.fake import true_coefficients
from sdfit.fit.estimator import StageRegressor
from sdfit.fit.observations import observe
from sdfit.fit.stage_model import StageModel, nonnegative
from sdfit.workload import Workload

SIDES = tuple(range(256, 1208, 8))


def seen(card, workloads, stage):
    """Key and rows of a stage."""
    key, found = next((k, o) for k, o in observe(run(card, workloads)).items() if k[0] == stage)
    return key, found


def fitted(key, rows):
    """The model of some rows."""
    return StageModel(key).fit(rows.X, rows.activation_bytes, rows.peak_bytes, rows.weight)


def bounded(model, rows):
    """Its bounds."""
    return model.bounds(rows.X, rows.activation_bytes, rows.peak_bytes, rows.weight, groups=rows.groups)


def test_it_is_an_estimator():
    """get_params, set_params and clone carry the key and nothing that was fitted; R² on held-out resolutions is 1."""
    key, rows = seen(World(), grid(attention="eager"), "unet")
    model = StageRegressor(key)
    assert model.get_params() == {"key": key}
    copy = clone(model.fit(rows.X, rows.activation_bytes))
    assert copy.get_params() == {"key": key} and not hasattr(copy, "coef_")
    assert StageRegressor().set_params(key=key).get_params() == {"key": key}
    scores = cross_val_score(StageRegressor(key), rows.X, rows.activation_bytes, groups=rows.groups, cv=GroupKFold(5))
    assert len(scores) == 5 and scores.min() > 1 - 1e-9


def test_it_gives_the_coefficients_back():
    """On a card that follows the equation every coefficient comes back within 0.01 %, for each kind of attention."""
    for attention in ("sdpa", "eager", "sliced"):
        workloads = grid(attention=attention, guidance_scale=1.0) + grid(attention=attention)
        model = fitted(*seen(FakeWorld(), workloads, "unet"))
        truth = true_coefficients(workloads[0], "unet")
        assert len(model.coef_) == 1
        for name, value in zip(model.terms_, model.coef_[0], strict=True):
            assert value == pytest.approx(truth[name], rel=1e-4, abs=1e-4 * max(truth.values()) * (name == "1")), name


class FakeWorld(World):
    """A world without a scale of its own."""

    def __init__(self):
        super().__init__()
        self.scale = dict.fromkeys(self.scale, 1.0)


def coverage(stage, worlds, resolutions, attention, **misfit):
    """Share of 95 % bounds that hold the truth, per set of coefficients and term, over worlds with misfit by resolution."""
    hits = []
    for seed in range(worlds):
        card, rng = World(seed, noise=0.01, wobble=0.03, **misfit), generator(seed)
        workloads = [
            Workload(int(h), int(w), int(p), int(b), float(g), attention=attention)
            for h, w in rng.choice(SIDES, (resolutions, 2))
            for p, b, g in zip(
                rng.choice([77, 154, 231], 4), rng.choice([1, 1, 2, 3], 4), rng.choice([1.0, 7.5], 4), strict=True
            )
        ]
        key, rows = seen(card, workloads, stage)
        model = fitted(key, rows)
        low, high = bounded(model, rows)
        known = true_coefficients(workloads[0], stage)
        told = [i for i, name in enumerate(model.terms_) if name not in model.unidentified_]
        truth = np.array([known[name] * card.scale[stage] for name in model.terms_])
        first = 1 + misfit.get("first", 0.0)  # of one image per pass
        sets = np.array([truth * first, truth])[: len(model.coef_)] if len(model.coef_) > 1 else truth[None, :]
        hits.append(((low <= sets) & (sets <= high))[:, told])
    assert len({h.shape for h in hits}) == 1, "some worlds were split and some were not"
    return np.mean(hits, axis=0)


@pytest.mark.parametrize(("stage", "attention"), [("unet", "eager"), ("vae_decoder_blocks", "sdpa")])
def test_bounds_cover_the_truth_under_misfit(stage, attention):
    """Over 40 worlds whose misfit is no regime, none is split, and each coefficient's 95 % bounds hold the truth about as
    often as they say: one covered in only 90 % of worlds would fail here with a chance of 1e-4 (binomial)."""
    share = coverage(stage, 40, 30, attention)
    assert len(share) == 1
    assert share.min() >= binom.ppf(1e-4, 40, 0.90) / 40, share
    assert share.mean() >= 0.93


def test_bounds_cover_the_truth_of_both_regimes():
    """Over 40 worlds whose decoder needs a quarter more for one image, all are split, and the bounds of both sets hold
    their own truth, as in the test above."""
    share = coverage("vae_decoder_blocks", 40, 30, "sdpa", first=0.25)
    assert len(share) == 2
    assert share.min() >= binom.ppf(1e-4, 40, 0.90) / 40, share
    assert share.mean() >= 0.93


def test_one_bad_row_splits_nothing():
    """A row that is off by a third does not give its regime coefficients of its own; all rows of a regime do."""
    key, rows = seen(World(), grid(), "vae_decoder_blocks")
    one = rows.X[:, 3] == 1
    bad, off = rows.activation_bytes.copy(), rows.activation_bytes.copy()
    bad[np.flatnonzero(one)[3]] *= 1.33
    off[one] *= 1.33
    sets = [len(StageModel(key).fit(rows.X, y, rows.peak_bytes, rows.weight).coef_) for y in (bad, off)]
    assert sets == [1, 2]


def test_bounds_are_deterministic_and_hold_the_estimate():
    """The same data give the same bounds, never negative, around the estimate."""
    key, rows = seen(World(noise=0.05), grid(), "unet")
    model = fitted(key, rows)
    low, high = bounded(model, rows)
    again = bounded(model, rows)
    assert (low == again[0]).all() and (high == again[1]).all()
    assert (low >= 0).all() and (low <= model.coef_).all() and (model.coef_ <= high).all()


def test_bounds_do_not_depend_on_the_last_digits():
    """Rows in another order, and peaks moved by a part in 10^13, as another machine might round: coefficients come again
    to 1e-9 and bounds to 1e-4, in regimes of few resolutions too."""
    sides = [(s, s) for s in (1024, 1536, 2048, 2304, 2560, 3072)]
    workloads = grid() + [Workload(h, w, batch_size=b) for h, w in sides for b in (1, 2, 3, 4)]
    key, rows = seen(World(noise=0.01, first=0.3), workloads, "vae_decoder_blocks")
    model = fitted(key, rows)
    order = generator(1).permutation(len(rows.X))
    moved = rows.activation_bytes * (1 + 1e-13 * generator(2).standard_normal(len(rows.X)))
    again = StageModel(key).fit(rows.X[order], moved[order], rows.peak_bytes[order], rows.weight[order])
    other = again.bounds(
        rows.X[order], moved[order], rows.peak_bytes[order], rows.weight[order], groups=rows.groups[order]
    )
    assert again.regimes_ == model.regimes_ and len(model.coef_) > 1
    assert np.allclose(again.coef_, model.coef_, rtol=1e-9, atol=1e-12)
    for mine, theirs in zip(bounded(model, rows), other, strict=True):
        assert np.allclose(mine, theirs, rtol=1e-4, atol=1e-9)


def test_a_coefficient_that_one_resolution_alone_tells_is_open():
    """Prompts beyond 77 tokens at one resolution only: the coefficient is estimated, and its upper bound is infinite."""
    plain = grid(prompts=(77,), attention="eager")
    key, rows = seen(
        World(noise=0.01), [*plain, *grid(sides=(512, 512), prompts=(154, 231), attention="eager")], "unet"
    )
    model = fitted(key, rows)
    low, high = bounded(model, rows)
    i = model.terms_.index("n·L·A")
    assert "n·L·A" not in model.unidentified_
    assert np.isinf(high[0, i]) and low[0, i] == 0
    assert np.isfinite(high[0, model.terms_.index("n·A²")])


def test_terms_that_are_not_identified_are_named():
    """From prompts of one length, n·L and n·L·A are n and n·A again: both are named, with what to sweep, and get zero."""
    key, rows = seen(World(), grid(prompts=(77,)) + grid(prompts=(77,), guidance_scale=1.0), "unet")
    model = fitted(key, rows)
    assert set(model.unidentified_) == {"n·L·A", "n·L"}
    assert "77" in model.unidentified_["n·L·A"]
    assert np.abs(model.predict(rows.X) / rows.activation_bytes - 1).max() < 1e-6


def test_nonnegative_holds_its_bound():
    """A line that falls is fitted by a constant; a line that rises by itself."""
    x = np.arange(1.0, 6.0)
    design = np.column_stack([np.ones(5), x])
    assert nonnegative(design, 10 - x).tolist() == pytest.approx([7.0, 0.0])
    assert nonnegative(design, 3 + 2 * x).tolist() == pytest.approx([3.0, 2.0])
