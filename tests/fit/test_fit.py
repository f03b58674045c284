"""The fit in a world whose answer is known: the coefficients come back, the intervals hold, bad input is refused."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from worlds import measured

pytest.importorskip("sklearn")

from sdfit.backends.fake import FakeBackend, true_coefficients
from sdfit.equation.stages import stage_key, stages_of
from sdfit.equation.terms import design_of
from sdfit.errors import FitError, RecordsError
from sdfit.fit.baseline import FEWEST_ROWS
from sdfit.fit.card import accuracy_rows
from sdfit.fit.files import fit_files, swept_files
from sdfit.fit.fit import fit, provenance
from sdfit.fit.held_out import cross_validate, fit_stage
from sdfit.fit.observations import Runs, observe
from sdfit.predict.artifact import Artifact
from sdfit.predict.loading import load_artifact
from sdfit.predict.predictor import Predictor
from sdfit.records import RECORDS, RecordsFile, read
from sdfit.sweep import grid
from sdfit.sweep.journal import Journal
from sdfit.workload import Workload, variant_name

SIDES = (256, 320, 376, 512, 520, 640, 768, 1000, 1024, 1400, 1536, 2048)
SDPA = [
    Workload(h, w, tokens, batch, scale)
    for i, h in enumerate(SIDES)
    for w in (SIDES[-1 - i], SIDES[(3 * i) % len(SIDES)])
    for tokens, batch, scale in ((77, 1, 7.5), (77, 2, 1.0), (231, 4, 7.5), (154, 1, 1.0))
]


def drawn(count: int, seed: int) -> list[Workload]:
    """Random float16 sdpa workloads, all from one distribution."""
    rng = random.Random(seed)
    return [
        Workload(
            rng.randrange(256, 1600),
            rng.randrange(256, 1600),
            rng.choice((77, 154, 231)),
            rng.choice((1, 2, 4)),
            rng.choice((1.0, 7.5)),
        )
        for _ in range(count)
    ]


def test_every_stage_gives_its_coefficients_back(fake_model: Path) -> None:
    """Sweep, fit, save, load: each coefficient of each stage of the default grid is the fake card's to 1e-5, relative.

    The peaks are rounded to bytes, so a coefficient that is zero comes back as less than one byte at the largest size.
    Stages with terms that the rows cannot tell apart (m·A and B·A without slicing) are left to the test of predictions.
    """
    artifact = load_artifact(fake_model)
    exemplars = {stage_key(s, w.variant): (w, s) for w in grid.load("default").workloads for s in stages_of(w.variant)}
    assert set(artifact.stages) == {"|".join(key) for key in exemplars}
    compared = 0
    for key, (workload, stage) in exemplars.items():
        found = artifact.stages["|".join(key)]
        if found["unidentified"]:
            continue
        assert len(found["coef"]) == 1, key
        largest = design_of(key, [Workload(3072, 3072, 231, 4)])[0]
        for (name, true), value, most in zip(
            true_coefficients(workload, stage).items(), found["coef"][0], largest, strict=True
        ):
            assert value == pytest.approx(true, rel=1e-5) if true else value * most < 1.0, (key, name)
            compared += 1
    assert compared > 60


def test_predictions_equal_the_card_outside_the_grid(f: Predictor) -> None:
    """Each stage of 60 random workloads per swept variant inside its domain is predicted to 1e-6 of the peak."""
    card, rng = FakeBackend(), random.Random(5)
    for variant in sorted({w.variant for w in grid.load("default").workloads}):
        tried = 0
        while tried < 60:
            w = Workload(
                rng.randrange(256, 1536), rng.randrange(256, 1536), rng.choice((77, 154, 231)), rng.choice((1, 2, 4)),
                rng.choice((1.0, 7.5)), *variant,
            )  # fmt: skip
            peak = f.predict_workload(w)
            # tiles smaller than 512 pixels lie outside what was swept with tiling, even where the area does not
            if peak.extrapolated or (w.vae_tiling and min(w.effective_height, w.effective_width) < 512):
                tried += peak.extrapolated * 0.1
                continue
            tried += 1
            for stage, true in card.stage_peaks(w).items():
                assert peak.stage_peaks[stage] == pytest.approx(true, rel=1e-6), (variant_name(variant), w, stage)
            assert peak.stage == max(card.stage_peaks(w), key=card.stage_peaks(w).__getitem__)


def test_all_metrics_come_back(f: Predictor) -> None:
    """Reserved, device and required of the fake card are linear in its peak: predicted to 1e-5 by a fit of one variant.

    In the model of all variants they share coefficients with offloaded runs, for which that is not so: 1 %.
    """
    card, one = FakeBackend(), Predictor(fit(measured(drawn(150, 3))))
    for w in drawn(60, 11):
        truth = card.measure(w)
        for metric in ("reserved", "device", "required"):
            actual = truth[f"{metric}_bytes"]
            assert float(one.predict_workload(w, metric=metric)) == pytest.approx(actual, rel=1e-5)
            assert float(f.predict_workload(w, metric=metric)) == pytest.approx(actual, rel=1e-2)


def test_bounds_hold_the_estimate_and_unidentified_terms_are_zero(fake_model: Path) -> None:
    """The 95 % bounds hold the estimate; a term that the rows cannot tell apart is zero and says what to sweep."""
    artifact = load_artifact(fake_model)
    for key, stage in artifact.stages.items():
        for coef, low, high in zip(stage["coef"], stage["low"], stage["high"], strict=True):
            assert all(a <= b <= c for a, b, c in zip(low, coef, high, strict=True)), key
        for name, remedy in stage["unidentified"].items():
            assert all(row[stage["terms"].index(name)] == 0 for row in stage["coef"]) and remedy, (key, name)
    assert "D" in artifact.stages["vae_decoder_blocks|float32|kl"]["unidentified"]  # float32 was not swept with tiles


def test_plain_prompts_leave_the_prompt_term_unidentified() -> None:
    """Prompts of up to 77 tokens cannot tell L·H·W from H·W, and the fit names the term and what to sweep."""
    artifact = fit(measured([w for w in SDPA if w.prompt_length == 77]))
    assert artifact.stages["unet|float16|sdpa"]["unidentified"]["n·L·A"].startswith("prompt_length above 77")


def test_intervals_cover_what_they_promise() -> None:
    """With ±2 % misfit that no term explains, the 90 % interval covers 90 %: false alarm once in 10,000.

    250 workloads calibrate, 500 of the same distribution judge. The covered number is beta-binomial: level 0.9 of n
    scores is the k-th smallest, k = ceil(0.9 (n + 1)), whose coverage is Beta(k, n + 1 - k). The upper bound at 0.9 likewise.
    """
    from scipy.stats import betabinom

    f = Predictor(fit(measured(drawn(250, 1), noise=0.02)))
    judged = measured(drawn(500, 2), noise=0.02).records
    peaks = [f.predict_workload(r.workload, level=0.9) for r in judged]
    actual = [r.allocated_bytes or 0 for r in judged]
    covered = sum(p.interval.low <= a <= p.interval.high for p, a in zip(peaks, actual, strict=True))
    below = sum(a <= p.upper for p, a in zip(peaks, actual, strict=True))
    rank = int(np.ceil(0.9 * 251 - 1e-9))
    law = betabinom(500, rank, 251 - rank)
    for count in (covered, below):
        assert law.ppf(2.5e-5) <= count <= law.ppf(1 - 2.5e-5), (covered, below)


def test_out_of_memory_rows_are_bounds_not_gaps() -> None:
    """On a card of 8 GiB the coefficients still come back, and the failed runs are predicted to need more."""
    data = measured(SDPA, capacity_bytes=8 << 30)
    failed = [r for r in data.records if r.outcome == "oom"]
    assert 5 < len(failed) < len(SDPA) / 2
    artifact = fit(data)
    assert artifact.evaluation["oom_rows"] == len(failed)
    f = Predictor(artifact)
    for record in failed:
        assert f.predict_workload(record.workload) >= (record.oom_bytes or 0) * (1 - 1e-6)
        assert f.predict_workload(record.workload, metric="required") > 8 << 30
        assert float(f.predict_workload(record.workload)) == pytest.approx(
            max(FakeBackend().stage_peaks(record.workload).values()), rel=1e-4
        )


def test_an_out_of_memory_row_raises_a_fit_that_lies_below_it() -> None:
    """Where the successes alone say too little, the bound of a failed run lifts the prediction up to it."""
    data = measured([w for w in SDPA if w.batch_size == 1 and w.pixels < 700_000])
    big = Workload(1536, 1536)
    known = FakeBackend().measure(big)
    bound = 2 * known["allocated_bytes"]
    failed = replace(
        data.records[0], index=999, workload=big, outcome="oom", oom_bytes=bound, oom_stage="vae_decoder_blocks",
        stage_peaks_bytes={k: v for k, v in known["stage_peaks_bytes"].items() if k in ("text_encoder", "unet")},
        allocated_bytes=bound,
    )  # fmt: skip
    without, with_it = fit(data), fit(RecordsFile(data.environment, [*data.records, failed], []))
    assert Predictor(without).predict_workload(big) < 0.6 * bound
    assert Predictor(with_it).predict_workload(big) > 0.9 * bound


def test_observations_of_an_unfinished_tiled_run_leave_its_visits_out() -> None:
    """A run that failed amid its tiles says nothing about the VAE stages that it had not finished."""
    w = Workload(1024, 1024, vae_tiling=True)
    row = measured([w]).records[0]
    row = replace(row, outcome="oom", oom_stage="vae_encoder_mid", oom_bytes=5 << 30)
    seen = {key[0]: obs.at_least for key, obs in observe([row]).items()}
    assert "vae_encoder_blocks" not in seen and seen["vae_encoder_mid"] == [True] and seen["unet"] == [False]


def test_no_successful_rows_are_refused_with_counts() -> None:
    """All out of memory, or nothing at all: how many of what, and what to do."""
    data = measured(SDPA[:8], capacity_bytes=1 << 30)
    with pytest.raises(FitError, match=r"none of the 8 runs succeeded \(8 out of memory, 0 crashed\); sweep smaller"):
        fit(data)
    with pytest.raises(FitError, match="none of the 0 runs succeeded"):
        fit(RecordsFile(data.environment, [], []))


@pytest.mark.parametrize(("sizes", "term", "more"), [(1, "H·W", 2), (2, "(H·W)²", 1)])
def test_too_few_sizes_name_the_term_and_how_many_more(sizes: int, term: str, more: int) -> None:
    """One or two sizes cannot determine three terms: which one fails, and how many sizes it still needs."""
    workloads = [Workload(s, s, batch_size=b) for s in SIDES[:sizes] for b in (1, 2, 4)]
    with pytest.raises(FitError, match=f"sweep {more} more") as caught:
        fit(measured(workloads))
    assert caught.value.facts == {"term": term, "more": more} and f"the term {term}:" in str(caught.value)


def test_sizes_at_which_every_run_failed_do_not_count() -> None:
    """Three sizes of which the largest failed before the UNet are two: one more is asked for."""
    data = measured([Workload(s, s, attention="eager") for s in (256, 512, 2048)], capacity_bytes=5 << 30)
    assert [(r.outcome, r.oom_stage) for r in data.records] == [
        ("ok", None),
        ("ok", None),
        ("oom", "vae_encoder_blocks"),
    ]
    with pytest.raises(FitError, match="sweep 1 more"):
        fit(data)


def test_a_size_whose_unet_finished_counts_though_the_run_failed() -> None:
    """Three sizes of which the largest failed only in the VAE's decoder are three: the fit goes through."""
    data = measured([Workload(s, s) for s in (256, 512, 2048)], capacity_bytes=10 << 30)
    assert [r.oom_stage for r in data.records] == [None, None, "vae_decoder_blocks"]
    assert fit(data).evaluation["oom_rows"] == 1


def test_weights_that_disagree_are_refused() -> None:
    """Records of two different pipelines in one file: the component and both sizes."""
    data = measured(SDPA[:12])
    odd = replace(data.records[5], component_bytes=data.records[5].component_bytes | {"unet": 5})
    rows = [*data.records[:5], odd, *data.records[6:]]
    with pytest.raises(
        FitError, match="the weights of unet in float16 take 1719041928 B in one record and 5 B in record"
    ):
        fit(RecordsFile(data.environment, rows, []))


def _file(path: Path, data: RecordsFile, **facts: object) -> Path:
    with Journal(path, data.environment | facts, RECORDS) as journal:
        for row in data.records:
            journal.append(row)
    return path


def test_mixed_environments_and_holdouts_are_not_fitted(tmp_path: Path) -> None:
    """Files of two cards are refused with the facts that differ; a holdout is refused by name; nothing is written."""
    data = measured(SDPA[:24])
    one = _file(tmp_path / "a.jsonl", data)
    other = _file(tmp_path / "b.jsonl", data, torch="2.1", total_memory_bytes=5)
    holdout = _file(tmp_path / "c.jsonl", data, grid="holdout")
    out = tmp_path / "m.joblib"
    with pytest.raises(RecordsError, match=r"differ in total_memory_bytes: \d+ / 5; torch: None / 2.1"):
        fit_files([one, other], None, out)
    with pytest.raises(RecordsError, match=r"c\.jsonl' is of the grid 'holdout', which judges models"):
        fit_files([one, holdout], None, out)
    assert not out.exists()


def test_files_under_data_are_found_by_card(tmp_path: Path) -> None:
    """Measured files come before simulated ones; holdouts, proofs and published tables are left out; none is an error."""
    data = measured(SDPA[:4])
    with pytest.raises(RecordsError, match=r"no records to fit under ./data; type: sdfit sweep --gpu auto"):
        swept_files(tmp_path)
    _file(tmp_path / "t4" / "1.jsonl", data, backend="trace")
    real = _file(tmp_path / "t4" / "2.jsonl", data, backend="cuda")
    _file(tmp_path / "t4" / "3.jsonl", data, backend="cuda", grid="holdout")
    (tmp_path / "t4" / "proof.jsonl").write_text('{"what": "steps"}\n')
    (tmp_path / "t4" / "broken.jsonl").write_text("{\n")
    (tmp_path / "t4" / "empty.jsonl").write_text("")
    (tmp_path / "published").mkdir()
    simulated = _file(tmp_path / "l4" / "1.jsonl", data, backend="trace")
    assert swept_files(tmp_path) == {"l4": [simulated], "t4": [real]}
    assert swept_files(tmp_path, "l4") == {"l4": [simulated]}
    with pytest.raises(RecordsError, match=r"under ./data/v100; type: sdfit sweep --gpu v100"):
        swept_files(tmp_path, "v100")


def test_the_artifact_says_where_it_comes_from(fake_records: Path, fake_model: Path) -> None:
    """Sources carry the file's name and hash, the rows and the grid; provenance follows the backend; the card is written."""
    import hashlib

    artifact = load_artifact(fake_model)
    assert artifact.sources == [
        {
            "grid": "default",
            "name": "fake/2026-01-01-default.jsonl",
            "oom": 0,
            "rows": len(read(fake_records).records),
            "sha256": hashlib.sha256(fake_records.read_bytes()).hexdigest(),
        }
    ]
    assert artifact.provenance == "fake" and artifact.name == "fake"
    assert [provenance({"backend": b, "workspaces": w}) for b, w in (("cuda", None), ("trace", "sm75 x"), ("trace", None))] == [
        "measured", "published", "traced",
    ]  # fmt: skip
    assert "0.00781" in fake_model.with_suffix(".md").read_text()


def test_the_stages_beat_the_plain_regression(fake_model: Path) -> None:
    """The four-term baseline is reported for every variant with rows enough, and on eager attention it is worse a thousandfold."""
    artifact: Artifact = load_artifact(fake_model)
    known = artifact.baseline["variants"]
    assert (
        set(known) <= set(artifact.swept) and len(known) >= 2 and min(v["rows"] for v in known.values()) >= FEWEST_ROWS
    )
    assert (
        artifact.baseline["variants"]["float16 eager"]["worst"] > 1000 * artifact.evaluation["cross_validated"]["worst"]
    )
    assert artifact.evaluation["cross_validated"]["worst"] < 1e-4


def test_a_run_that_alone_tells_its_regime_is_judged_apart() -> None:
    """Left out it is predicted by another regime's numbers, which says nothing of the fit: errors are given with and without it."""
    lone = Workload(1400, 1400, batch_size=3, guidance_scale=1.0)
    data = measured([*(Workload(side, side, guidance_scale=1.0) for side in SIDES if side != 1400), lone])
    runs = Runs(data.records)
    seen = observe(runs)
    _, borrowed, folds = cross_validate(runs, seen, {key: fit_stage(key, rows) for key, rows in seen.items()})
    assert folds > 2 and [r.workload for r, one in zip(data.records, borrowed, strict=True) if one] == [lone]
    artifact = fit(data)
    apart, whole = artifact.evaluation["regime_known"], artifact.evaluation["cross_validated"]
    assert apart["rows"] == whole["rows"] - 1 and apart["worst"] <= whole["worst"]
    titles = [row[0] for row in accuracy_rows(artifact)]
    assert "the same, where other resolutions of the regime were left in" in titles
    assert "regime_known" not in fit(measured([Workload(side, side) for side in SIDES])).evaluation
