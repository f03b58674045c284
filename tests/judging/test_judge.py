"""A fit that judges itself: what is wrong is found and named, and what is right is left alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from worlds import World, drawn, file_of, generator, grid, run

from sdfit.errors import ArtifactError, FitError
from sdfit.fit.fit import fit
from sdfit.fit.stage_model import nonnegative
from sdfit.judging.checks import check_censored, check_duplicates, check_equation, variant_key
from sdfit.judging.findings import Finding
from sdfit.judging.judge import judge, judge_table
from sdfit.judging.robust import lacking_term, trimmed_fit
from sdfit.records import Record
from sdfit.workload import Workload, variant_name

WORKLOADS = grid(sides=(256, 384, 512, 520, 640, 768))


def spoiled(record: Record, stage: str, factor: float) -> Record:
    """The record with one stage's peak miscounted."""
    peaks = record.stage_peaks_bytes | {stage: int(record.stage_peaks_bytes[stage] * factor)}
    return replace(record, stage_peaks_bytes=peaks, allocated_bytes=max(peaks.values()))


def blamed(found: Iterable[Finding]) -> set[int]:
    """The rows that findings name."""
    return {int(f.row.split()[1]) for f in found if f.kind == "outlier"}


def test_a_sound_sweep_is_left_alone() -> None:
    """On a card that follows its equation nothing graver than a note is said, and held-out resolutions come out."""
    card = World()
    records = run(card, WORKLOADS)
    found = judge(records, fit(file_of(card, records)))
    assert found.sound and [f.kind for f in found] == ["held out"]
    assert max(abs(line.worst) for line in found.held_out) < 1e-6
    assert len(found.held_out) == len({(r.workload.height, r.workload.width) for r in records})


@pytest.mark.parametrize("misfit", [0.0, 0.002, 0.01])
def test_misfit_alone_names_no_row(misfit: float) -> None:
    """Uniform misfit of up to ±2·1 % of the activations is called neither a bad row nor a lacking term (6 worlds)."""
    for seed in range(6):
        found = judge(run(World(seed, noise=misfit, wobble=misfit), drawn(generator(seed), 40)))
        assert found.sound, found.table()


def test_bad_rows_are_named_and_do_not_hide_each_other() -> None:
    """Two spoiled rows of one stage, one too high and one too low, are both named, with how far; no other row is."""
    records = run(World(noise=0.002), WORKLOADS)
    high, low = (
        next(r.index for r in records if r.workload.height == side and r.workload.batch_size == 2)
        for side in (384, 768)
    )
    records[high] = spoiled(records[high], "unet", 1.4)
    records[low] = spoiled(records[low], "unet", 0.93)
    found = judge(records)
    assert blamed(found) == {high, low}
    offs = {int(f.row.split()[1]): f.off for f in found if f.kind == "outlier"}
    assert offs[high] == pytest.approx(0.40, abs=0.01) and offs[low] == pytest.approx(-0.07, abs=0.01)
    assert all(f.severity == "error" and f.where == "unet float16 sdpa" for f in found if f.kind == "outlier")
    assert max(abs(line.worst) for line in found.held_out) < 0.01, "held-out errors are those of the sound rows"


def test_a_plain_fit_blames_the_wrong_row() -> None:
    """Why least trimmed squares: with two bad rows at the largest sizes, the worst plain residual is a sound row's."""
    x = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 20, 20.5])
    design, target = np.column_stack([np.ones_like(x), x]), 5 + x
    target[[8, 9]] *= 0.3
    plain = np.abs(design @ nonnegative(design, target) - target)
    assert int(np.argmax(plain)) not in (8, 9)
    assert set(np.flatnonzero(trimmed_fit(design, target).far)) == {8, 9}


def test_a_lacking_term_is_named_and_no_row_is() -> None:
    """A checker that needs (H·W)² and has no such term: the term is named with its coefficient, no row is blamed."""

    class Quadratic(World):
        def stage_peaks(self, workload: Workload) -> dict[str, int]:
            peaks = super().stage_peaks(workload)
            extra = round(0.002 * workload.batch_size * workload.pixels**2)
            return peaks | {"safety_checker": peaks["safety_checker"] + extra}

    found = judge(run(Quadratic(), WORKLOADS))
    lacking = [f for f in found if f.kind == "term"]
    assert [f.where for f in lacking] == ["safety_checker float16"]
    assert "m·P²: with 0.002 B" in lacking[0].message
    assert not blamed(found)


def test_a_quadratic_table_fitted_without_its_square_is_told_so() -> None:
    """A table with 0.0078125·(H·W)² judged by constant and H·W only lacks the term A², with that coefficient."""
    side = np.arange(256, 1400, 128)
    found = judge_table(side, side, 8e6 + 160.0 * side**2 + 0.0078125 * side**4, terms=("1", "A"))
    lacking = next(f for f in found if f.kind == "term")
    assert "m·P²: with 0.0078125 B" in lacking.message and lacking.severity == "error"
    assert any(f.kind == "sign" for f in found), "least squares without bounds answers negative bytes"


def test_odd_latents_are_told_apart() -> None:
    """Memory that only latent sides off a multiple of 8 need (as on the T4 at 1200x1800) is named as such."""

    class Odd(World):
        def stage_peaks(self, workload: Workload) -> dict[str, int]:
            peaks = super().stage_peaks(workload)
            odd = workload.effective_height // 8 % 8 or workload.effective_width // 8 % 8
            return peaks | {"vae_decoder_mid": peaks["vae_decoder_mid"] + round(0.006 * workload.pixels**2) * bool(odd)}

    found = judge(run(Odd(), grid(sides=(256, 320, 384, 456, 512, 520, 640, 776))))
    assert any(f.kind == "term" and "not a multiple of 8" in f.message for f in found), found.table()


def test_a_regime_with_too_few_rows_is_named() -> None:
    """One run of a single image among many of several, on a card that treats it differently: the regime is named."""
    card = World(first=0.2)
    records = run(card, [w for w in WORKLOADS if w.batch_size > 1] + [Workload(512, 512)])
    found = judge(records, fit(file_of(card, records)))
    assert [f.kind for f in found if f.severity != "note"] == ["regime"]
    assert "one image per pass" in found[0].message and "more there" in found[0].message
    assert judge(run(card, WORKLOADS)).sound, "with rows enough it has coefficients of its own"


def test_two_kinds_of_rows_are_not_called_outliers() -> None:
    """Where a third of the rows follows another equation at random, the equation is blamed and not the rows."""
    rng = generator(1)
    records = run(World(), WORKLOADS)
    for i in rng.choice(len(records), len(records) // 3, replace=False):
        records[i] = spoiled(records[i], "unet", 1.3)
    found = judge(records)
    assert not blamed(found)
    assert any(f.kind == "regime" and "fit them apart" in f.message for f in found), found.table()


def test_duplicates_that_disagree_are_named() -> None:
    """Prompts of 40 and 77 tokens are the same work; if their peaks differ by 0.2 % the pair is named, equal ones not."""
    card = World()
    records = run(card, [Workload(512, 512), Workload(515, 512, 40), Workload(768, 512)])
    records[1] = replace(records[1], **{n: getattr(records[0], n) for n in ("stage_peaks_bytes", "allocated_bytes")})
    assert check_duplicates(records) == []
    records[1] = replace(records[1], allocated_bytes=int(records[0].allocated_bytes * 1.002))
    (found,) = check_duplicates(records)
    assert found.severity == "warning" and found.off == pytest.approx(0.002, rel=0.01) and "row 0" in found.message


def test_an_out_of_memory_run_above_the_equation_is_named() -> None:
    """An equation that gives 10 % less than a failed run's lower bound is contradicted; one above it is not."""
    card = World()
    records = run(card, WORKLOADS)
    artifact = fit(file_of(card, records))
    w = Workload(768, 768, batch_size=8)
    peak = card.stage_peaks(w)["vae_decoder_blocks"]
    failed = Record(99, w, "oom", oom_stage="vae_decoder_blocks", oom_bytes=int(1.1 * peak), cap_bytes=1 << 40)
    (found,) = check_censored([failed], artifact)
    assert found.severity == "error" and found.off == pytest.approx(0.1, abs=0.005)
    assert check_censored([replace(failed, oom_bytes=int(0.9 * peak))], artifact) == []


def test_runs_that_contradict_each_other_or_their_cap_are_named() -> None:
    """A small run fails where a larger one passes; a run passes above its cap."""
    peak = 5 << 30
    passed = Record(0, Workload(768, 768), "ok", {"unet": peak}, allocated_bytes=peak, cap_bytes=8 << 30)
    failed = Record(1, Workload(512, 512), "oom", cap_bytes=8 << 30)
    assert ["needs no less" in f.message for f in check_censored([passed, failed])] == [True]
    assert check_censored([passed, replace(failed, workload=Workload(1024, 1024))]) == []
    (found,) = check_censored([replace(passed, cap_bytes=4 << 30)])
    assert found.severity == "error" and "cap was not in force" in found.message


def test_a_peak_that_falls_is_found() -> None:
    """An equation whose peak falls from one image to two is reported, with the place and that regimes change there."""
    card = World()
    artifact = fit(file_of(card, run(card, WORKLOADS)))
    assert check_equation(artifact) == []
    key = next(k for k in artifact.stages if k.startswith("vae_decoder_blocks"))
    stage = artifact.stages[key]
    thrice = [3 * c for c in stage["coef"][0]]
    changed = stage | {"coef": [thrice, stage["coef"][0]], "regimes": [0, 1, 1, 1, 1, 1]}
    found = check_equation(replace(artifact, stages=artifact.stages | {key: changed}))
    assert {f.kind for f in found} == {"monotone"} and {f.severity for f in found} == {"warning"}
    assert any("x1 to" in f.message and "regime ends" in f.message for f in found)


def test_negative_bytes_are_found() -> None:
    """A negative coefficient in an artifact makes its peak fall, and is an error."""
    card = World()
    artifact = fit(file_of(card, run(card, WORKLOADS)))
    stages = {k: s | {"coef": [[-c for c in row] for row in s["coef"]]} for k, s in artifact.stages.items()}
    found = check_equation(replace(artifact, stages=stages))
    assert {f.kind for f in found} == {"sign", "monotone"} and "error" in {f.severity for f in found}


def test_the_verdict_is_plain_and_ordered() -> None:
    """A verdict prints a line per finding, gravest first, and turns into JSON."""
    records = run(World(), WORKLOADS)
    records[3] = spoiled(records[3], "unet", 2.0)
    found = judge(records)
    assert found.table().splitlines()[0].startswith("error    outlier")
    assert len(found.table().splitlines()) == len(found)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["findings"][0]["kind"] == "outlier"


def test_a_term_is_looked_for_on_unseen_resolutions_only() -> None:
    """A column that is not zero at one resolution alone could absorb a bad row, and is passed over."""
    x = np.arange(1.0, 9.0)
    target = np.where(x == 5, 9.0, 1 + x)
    design = np.column_stack([np.ones(8), x])
    assert lacking_term(design, target, x, {"only there": (x == 5) * 1.0}) is None


@pytest.mark.parametrize(
    ("height", "peak", "words"),
    [([256, 512], [1e6, 2e6], "2 rows cannot be judged"), ([256] * 6, [1e6] * 5 + [-1], "row 6: peak_bytes is -1")],
)
def test_tables_that_cannot_be_judged(height: Sequence[int], peak: Sequence[float], words: str) -> None:
    """Too few rows, and amounts that cannot be, are refused with the number in hand."""
    with pytest.raises(FitError, match=words):
        judge_table(height, height, peak)


def test_nothing_to_judge() -> None:
    """Records without a successful run are refused."""
    with pytest.raises(FitError, match="none of the 1 runs succeeded"):
        judge([Record(0, Workload(512, 512), "crash")])


def test_variants_are_read_back_from_their_words() -> None:
    """Every variant's words give the variant back; other words are refused."""
    for w in (Workload(64, 64), Workload(64, 64, dtype="float32", attention="eager", vae_tiling=True, offload="model")):
        assert variant_key(variant_name(w.variant)) == w.variant
    for words in ("float16 magic", "float16 sdpa vae_tiling=Maybe", "float16 sdpa colour=red"):
        with pytest.raises(ArtifactError, match="is no variant"):
            variant_key(words)
