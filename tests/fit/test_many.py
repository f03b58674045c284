"""Many rows are summed up, or drawn from, before they are fitted again and again: the answers stay those of them all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
from worlds import World, drawn, file_of, generator, run

from sdfit.fit import held_out, metric_models
from sdfit.fit.fit import fit
from sdfit.fit.held_out import cross_validate, equations_of, fit_stage
from sdfit.fit.observations import Runs, observe
from sdfit.fit.stage_model import StageModel
from sdfit.judging import robust
from sdfit.judging.judge import judge
from sdfit.predict.predictor import Predictor
from sdfit.records import Record


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """A card with misfit, another regime for single images, and runs that ran out of memory."""
    card = World(3, noise=0.001, wobble=0.002, first=0.05, capacity_bytes=12 << 30)
    return run(card, drawn(generator(4), 500, sides=range(256, 1280, 8), attention=("sdpa", "eager")))


@contextmanager
def many(rows: int) -> Iterator[None]:
    """From so many rows on there are many."""
    with (
        patch.object(held_out, "MANY_ROWS", rows),
        patch.object(metric_models, "MANY_ROWS", rows),
        patch.object(robust, "MANY_ROWS", rows),
    ):
        yield


def test_rows_that_are_summed_up_give_the_same_coefficients(records):
    """Whether some of the folds stay or all: to rounding what the rows themselves give."""
    for key, rows in observe(records).items():
        equations = equations_of(key, rows)
        folds = rows.groups % 7
        few, of = equations.summed_up(folds)
        assert len(few.target) < len(rows) and few.counts.sum() == pytest.approx(len(rows))
        for stay, stays in ((folds != 3, of != 3), (folds >= 0, of >= 0)):
            for apart in (False, True):
                plain = StageModel(key).solve(equations.where(stay), apart=apart)
                summed = StageModel(key).solve(few.where(stays), apart=apart)
                assert summed.regimes_ == plain.regimes_ and summed.unidentified_ == plain.unidentified_
                worth = np.abs(plain.coef_).max(axis=0) * np.abs(equations.design).max(axis=0)
                assert np.abs(summed.coef_ - plain.coef_) * np.abs(equations.design).max(axis=0) == pytest.approx(
                    0, abs=1e-7 * worth.max()
                )


def test_left_out_runs_are_predicted_alike(records):
    """By the rows of the other folds, and by what they are summed up in; lower bounds count in both."""
    runs = Runs(records)
    seen = observe(runs)
    models = {key: fit_stage(key, rows) for key, rows in seen.items()}
    plain, borrowed, folds = cross_validate(runs, seen, models)
    with many(40):
        summed, alike, again = cross_validate(runs, seen, models)
    assert folds == again == 10 and any(r.outcome == "oom" for r in records)
    assert (np.isnan(plain) == np.isnan(summed)).all() and (borrowed == alike).all()
    # the regimes are found on all rows, and not in each fold: no fold of these decides otherwise
    assert np.nanmax(np.abs(summed / plain - 1)) < 1e-6


def test_a_model_of_many_rows_is_as_good(records):
    """Errors on runs that it never saw, of every metric, and the share of them that its bounds hold."""
    data = file_of(World(3), records)
    with many(60):
        found = fit(data)
    plain = fit(data)
    assert found.evaluation["cross_validated"]["p95"] == pytest.approx(
        plain.evaluation["cross_validated"]["p95"], rel=0.1
    )
    fresh = run(World(3, noise=0.001, wobble=0.002, first=0.05), drawn(generator(5), 300, sides=range(256, 1280, 8)))
    for artifact in (found, plain):
        f = Predictor(artifact)
        for metric in ("allocated", "reserved", "required"):
            bounds = [f.predict_workload(r.workload, metric=metric, level=0.9).upper for r in fresh]
            held = np.mean([getattr(r, f"{metric}_bytes") <= b for r, b in zip(fresh, bounds, strict=True)])
            assert held > 0.84, metric  # 300 of 0.9: below with a chance of 0.0003
    for metric, errors in plain.evaluation["metrics"].items():
        assert found.evaluation["metrics"][metric]["median"] < 1.5 * errors["median"] + 1e-4


def test_a_bad_row_among_many_is_named(records):
    """As among few: the row, and no other."""
    clean = run(World(3, noise=0.0005), drawn(generator(6), 400))
    at = next(i for i, r in enumerate(clean) if r.workload.batch_size == 4)
    peaks = dict(clean[at].stage_peaks_bytes)
    peaks["vae_decoder_blocks"] = round(1.3 * peaks["vae_decoder_blocks"])
    spoilt = {**{f: getattr(clean[at], f) for f in Record.__dataclass_fields__}, "stage_peaks_bytes": peaks}
    clean[at] = Record(**spoilt)
    with many(100), patch.object(robust, "SAMPLE", 80):
        named = {f.row for f in judge(clean) if f.kind == "outlier"}
    assert len(named) == 1 and f"row {at} " in named.pop()
