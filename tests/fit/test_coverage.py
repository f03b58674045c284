"""Intervals that mean what they say: coverage over many made-up worlds, with the chance of a false alarm stated.

Each world is a card of its own with misfit that no term explains, swept at random sizes, fitted, and asked about fresh
workloads of the same law. If its n conformal scores and the fresh ones are exchangeable, the number of m fresh runs
covered at a level is beta-binomial(m; k, n + 1 - k) with k = ceil((n + 1)·level), and worlds are independent: the law of
the mean over worlds is known exactly. Each test demands that the mean lies where all but ``FALSE_ALARM`` of that law does,
half of it on either side, so that is the chance that a right sdfit fails here; the seeds are fixed, so it fails always or never.
"""

import math

import numpy as np
import pytest
from scipy.stats import betabinom
from worlds import World, drawn, file_of, generator, run

from sdfit.fit.fit import fit, fit_stage
from sdfit.fit.observations import observe
from sdfit.fit.scores import FEWEST_SCORES
from sdfit.predict.conformal import half_width
from sdfit.predict.predictor import Predictor
from sdfit.workload import Workload

FALSE_ALARM = 1e-4
QUESTIONS = (("interval", 0.90), ("interval", 0.95), ("upper", 0.95), ("upper", 0.99))
SIDES = tuple(range(256, 1208, 8))
FRESH = 30
KINDS = {
    "noise": {"noise": 0.03},
    "misfit": {"noise": 0.01, "wobble": 0.05},
    "regimes": {"noise": 0.02, "first": 0.2},
    "censored": {"noise": 0.03, "capacity_bytes": 7 << 30},
}


def band(scores, level):
    """Where the mean over worlds with so many scores lies, but for `FALSE_ALARM`."""
    law = np.ones(1)
    for n in scores:
        k = math.ceil((n + 1) * level - 1e-9)
        one = betabinom.pmf(np.arange(FRESH + 1), FRESH, k, n + 1 - k) if k <= n else np.eye(FRESH + 1)[FRESH]
        law = np.convolve(law, one)
    total = np.cumsum(law)
    low, high = np.searchsorted(total, [FALSE_ALARM / 2, 1 - FALSE_ALARM / 2])
    return low / (len(law) - 1), high / (len(law) - 1)


def holds(f, record, kind, level):
    found = f.predict_workload(record.workload, level=level)
    low, high = found.interval if kind == "interval" else (0.0, found.upper)
    return low <= record.allocated_bytes <= high


def simulate(worlds, rows, **kind):
    """Share of fresh successful runs covered, per question, and the number of scores of each world."""
    hits = dict.fromkeys(QUESTIONS, 0)
    scores = []
    for seed in range(worlds):
        card, rng = World(seed, **kind), generator(10**6 + seed)
        f = Predictor(fit(file_of(card, run(card, drawn(rng, rows, sides=SIDES)))))
        scores.append(len(f.artifact.scores["allocated"][""]))
        fresh = []
        while len(fresh) < FRESH:
            fresh += [r for r in run(card, drawn(rng, FRESH, sides=SIDES)) if r.outcome == "ok"]
        for record in fresh[:FRESH]:
            for question in QUESTIONS:
                hits[question] += holds(f, record, *question)
    return {q: count / (worlds * FRESH) for q, count in hits.items()}, scores


def check(worlds, rows, kind):
    found, scores = simulate(worlds, rows, **KINDS[kind])
    outside = {}
    for question, share in found.items():
        low, high = band(scores, question[1])
        if not low <= share <= high:
            outside[question] = (share, low, high)
    assert not outside


@pytest.mark.parametrize("kind", KINDS)
def test_coverage(kind):
    """Eight worlds: coverage of 90 and 95 % intervals, 0.95 and 0.99 bounds lies in its band (false alarm 1e-4 each)."""
    check(8, 140 if kind == "censored" else 110, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_coverage_of_many_worlds(kind):
    """Eighty worlds: the same, in a band of ±2.7 points at 90 % and ±2 at 95 %."""
    check(80, 160 if kind == "censored" else 120, kind)


def test_the_band_is_the_law():
    """The band holds all but the stated share of simulated means of exchangeable scores (2000 draws, 100-fold alarm)."""
    rng = generator(0)
    low, high = band([60] * 5, 0.9)
    means = []
    for _ in range(2000):
        scores = np.sort(rng.random((5, 60)))
        means.append(np.mean(rng.random((5, FRESH)) <= scores[:, [math.ceil(61 * 0.9) - 1]]))
    assert np.mean((np.array(means) < low) | (np.array(means) > high)) < 100 * FALSE_ALARM
    assert high - low < 0.25


def test_a_wrong_interval_is_caught():
    """The test has teeth: the same rule on residuals of the fit's own rows, not held out, falls out of the band."""
    worlds, rows, hits = 30, 16, 0
    low, _ = band([rows] * worlds, 0.9)
    for seed in range(worlds):
        card, rng = World(seed, noise=0.03), generator(seed)
        records = run(card, drawn(rng, rows, sides=SIDES))
        f = Predictor(fit(file_of(card, records)))
        width = half_width([residual(f, r) for r in records], 0.9)
        hits += sum(abs(residual(f, r)) <= width for r in run(card, drawn(rng, FRESH, sides=SIDES)))
    assert hits / (worlds * FRESH) < low


def residual(f, record):
    """What a conformal score would be, with a prediction that may have seen the record."""
    found = f.predict_workload(record.workload)
    activation = max(found.stage_peaks.values()) - min(f.variant(record.workload.variant).weights.values())
    return (record.allocated_bytes - found) / activation


def test_families_with_few_scores_use_those_of_all():
    """A variant seen less often than FEWEST_SCORES has no scores of its own, and its interval is that of all variants."""
    card, rng = World(3, noise=0.03), generator(3)
    rare = [Workload(w.height, w.width, attention="eager") for w in drawn(rng, 12, sides=SIDES)]
    f = Predictor(fit(file_of(card, run(card, drawn(rng, 60, sides=SIDES) + rare))))
    families = f.artifact.scores["allocated"]
    assert not any("eager" in name for name in families) and any("sdpa" in name for name in families)
    assert FEWEST_SCORES > 12
    half = f.predict_workload(rare[0]).interval
    width = np.sort(np.abs(families[""]))[math.ceil((len(families[""]) + 1) * 0.95) - 1]
    peaks = f.predict_workload(rare[0]).stage_peaks
    weights = min(f.variant(rare[0].variant).weights.values())
    assert half.high - f.predict_workload(rare[0]) == pytest.approx(width * (max(peaks.values()) - weights))


def test_outside_the_domain_intervals_are_flagged_and_wider():
    """Twice the pixels of the largest swept image: flagged, and the interval twice as wide for the same activations."""
    card = World(4, noise=0.03)
    f = Predictor(fit(file_of(card, run(card, drawn(generator(4), 60, sides=SIDES, most=1 << 20)))))
    inside, outside = f(640, 640), f(1600, 1600)
    assert not inside.extrapolated and outside.extrapolated

    def relative(p):
        return (p.interval.high - p) / (
            max(p.stage_peaks.values()) - min(f.variant(p.workload.variant).weights.values())
        )

    largest = f.variant(outside.workload.variant).domain["A"][1]
    assert relative(outside) == pytest.approx(relative(inside) * 1600**2 / largest, rel=1e-6)


def underprediction(models, card, workloads):
    """How far the UNet's fit lies below the truth, where it does: mean relative error of the activations."""
    (key,) = [k for k in models if k[0] == "unet"]
    from sdfit.equation.sizes import size_columns

    predicted = models[key].predict(size_columns(workloads))
    weights = sum(run(card, workloads[:1])[0].component_bytes.values())
    truth = np.array([card.stage_peaks(w)["unet"] for w in workloads]) - weights
    return float(np.mean(np.maximum(1 - predicted / truth, 0)))


def test_out_of_memory_rows_carry_information():
    """Where only small sizes succeed, the failed ones hold the fit up: over 20 worlds the mean underprediction of sizes
    that ran out of memory is a fifth smaller than without them or less, and in no world larger."""
    large = [Workload(s, s, attention="eager") for s in (768, 896, 1024)]
    small = [Workload(h, w, attention="eager") for h in (256, 320, 384) for w in (256, 320, 384)]
    with_rows, without = [], []
    for seed in range(20):
        free = World(seed, noise=0.2)
        cap = min(free.stage_peaks(w)["unet"] for w in large) - (64 << 20)
        card = World(seed, noise=0.2, capacity_bytes=cap)
        records = run(card, small + large)
        failed = [r for r in records if r.outcome == "oom"]
        assert len(failed) >= 2
        for rows, errors in ((records, with_rows), (run(card, small), without)):
            seen = {k: o for k, o in observe(rows).items() if k[0] == "unet"}
            models = {k: fit_stage(k, o) for k, o in seen.items()}
            errors.append(underprediction(models, free, large))
    assert np.mean(with_rows) < 0.8 * np.mean(without)
    assert all(a <= b + 1e-3 for a, b in zip(with_rows, without, strict=True))


def test_a_bound_that_is_exceeded_does_not_pull_down():
    """Failed runs whose true peak is far above their cap change nothing where the fit is above the cap already."""
    card = World(5)
    small = [Workload(h, w, attention="eager") for h in (256, 384, 512) for w in (256, 320, 512)]
    huge = [Workload(2048, s, attention="eager") for s in (1024, 1536, 2048)]
    capped = World(5, capacity_bytes=6 << 30)
    records, failed = run(card, small), run(capped, huge, start=100)
    assert all(r.outcome == "oom" for r in failed)
    alone, both = fit(file_of(card, records)), fit(file_of(card, records + failed))
    key = next(k for k in alone.stages if k.startswith("unet"))
    for name in ("coef", "low", "high"):
        assert np.allclose(alone.stages[key][name], both.stages[key][name], rtol=1e-9), name
