"""Intervals that mean what they say: coverage over many made-up worlds, with the chance of a false alarm stated.

Each world is a card of its own with misfit that no term explains, swept at random sizes, fitted, and asked about fresh
workloads of the same law. If its n conformal scores and the fresh ones are exchangeable, the number of m fresh runs
covered at a level is beta-binomial(m; k, n + 1 - k), k of `ranks_between`, and worlds are independent: the law of
the mean over worlds is known exactly. Each test demands that the mean lies where all but ``FALSE_ALARM`` of that law does,
half of it on either side, so that is the chance that a right sdfit fails here; the seeds are fixed, so it fails always or never.
"""

import math

import numpy as np
import pytest
from scipy.stats import betabinom
from worlds import World, drawn, file_of, generator, run

from sdfit.fit.fit import fit
from sdfit.fit.scores import FEWEST_SCORES
from sdfit.predict.conformal import Scores, scale
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


def ranks_between(n, level, kind):
    """How many of n + 1 equally likely places a bound, or an interval with the same tail on each side, covers."""
    if kind == "upper":
        return math.ceil((n + 1) * level - 1e-9)
    tail = (1 - level) / 2
    return math.ceil((n + 1) * (1 - tail) - 1e-9) - math.floor((n + 1) * tail + 1e-9)


def band(scores, level, kind="upper"):
    """Where the mean over worlds with so many scores lies, but for `FALSE_ALARM`."""
    law = np.ones(1)
    for n in scores:
        k = ranks_between(n, level, kind)
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
        scores.append(f.artifact.scores["allocated"][""]["count"])
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
        low, high = band(scores, question[1], question[0])
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
        width = Scores.of([abs(residual(f, r)) for r in records]).quantile(0.9)
        hits += sum(abs(residual(f, r)) <= width for r in run(card, drawn(rng, FRESH, sides=SIDES)))
    assert hits / (worlds * FRESH) < low


def residual(f, record):
    """What a conformal score would be, with a prediction that may have seen the record."""
    found = f.predict_workload(record.workload)
    return (record.allocated_bytes - found) / scale(found.stage_peaks, f.variant(record.workload.variant).weights)


def test_families_with_few_scores_use_those_of_all():
    """A variant seen less often than FEWEST_SCORES has no scores of its own, and its interval is that of all variants."""
    card, rng = World(3, noise=0.03), generator(3)
    rare = [Workload(w.height, w.width, attention="eager") for w in drawn(rng, 12, sides=SIDES)]
    f = Predictor(fit(file_of(card, run(card, drawn(rng, 60, sides=SIDES) + rare))))
    families = f.artifact.scores["allocated"]
    assert not any("eager" in name for name in families) and any("sdpa" in name for name in families)
    assert FEWEST_SCORES > 12
    found = f.predict_workload(rare[0])
    every = Scores.read(families[""]["count"], families[""]["values"])
    unit = scale(found.stage_peaks, f.variant(rare[0].variant).weights)
    assert found.upper - found == pytest.approx(every.quantile(0.95) * unit)
