"""Few runs correct a prior: planned, fitted, told apart; held against made-up cards whose truth is known."""

from __future__ import annotations

import json
import random
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from worlds import World, file_of, measured, run

from sdfit.backends.fake import COEFFICIENTS
from sdfit.cli import main
from sdfit.equation.sizes import Sizes
from sdfit.equation.stages import STAGES, stages_of
from sdfit.errors import ArtifactError, FitError, SimulatedModelWarning
from sdfit.fit import few as few_module
from sdfit.fit import remade, search
from sdfit.fit.card import coefficients, fit_summary, model_card
from sdfit.fit.correction import MISFIT, Prior, correct, misfit_bytes
from sdfit.fit.few import fit_few
from sdfit.fit.planning import Few
from sdfit.fit.priors import FEW, few_for, model_of_kernels, prior_of
from sdfit.fit.whose import whose
from sdfit.predict.artifact import Artifact
from sdfit.predict.loading import load_artifact
from sdfit.predict.predictor import Predictor
from sdfit.records import RecordsFile
from sdfit.sweep import grid
from sdfit.workload import DTYPE_BYTES, Workload

MEMORY = 14 << 30
GRID = grid.load("default").workloads


class Kernels(World):
    """A made-up card whose kernels hold more or less than the fake one's, as tables of workspaces differ: bytes per pixel of the
    VAE's blocks by stage, dtype and number of images, a little of the UNet, and a constant everywhere."""

    def __init__(self, seed: int, **misfit: float) -> None:
        super().__init__(seed, **misfit)
        self.scale = dict.fromkeys(STAGES, 1.0)
        rng = random.Random(seed)
        self.constant = rng.randrange(100 << 20)
        self.share = {
            (stage, dtype, several): rng.uniform(-0.3, 0.5) if "blocks" in stage else rng.uniform(0, 0.05)
            for stage in ("vae_encoder_blocks", "vae_decoder_blocks", "unet")
            for dtype in (2, 4)
            for several in (False, True)
        }

    def stage_peaks(self, workload: Workload) -> dict[str, int]:
        """The fake card's peaks and what its kernels hold besides [bytes]."""
        peaks = super().stage_peaks(workload)
        sizes = Sizes.of_workload(workload)
        for stage, peak in peaks.items():
            images, pixels = (sizes.n, sizes.A) if stage == "unet" else (sizes.m, sizes.P)
            share = self.share.get((stage, DTYPE_BYTES[workload.dtype], images > 1), 0.0)
            slope = COEFFICIENTS[stage].get("n·A" if stage == "unet" else "m·P", 0.0) * DTYPE_BYTES[workload.dtype] / 2
            peaks[stage] = peak + self.constant + round(share * slope * images * pixels)
        return peaks


@pytest.fixture(scope="module")
def prior(f: Predictor) -> Artifact:
    """The model of the plain made-up card, fitted to its whole default grid."""
    return f.artifact


@pytest.fixture(scope="module")
def few(prior: Artifact) -> Few:
    """Sixteen runs of the default grid that a card of 14 GiB holds."""
    return Few(Prior(prior), GRID, 16, MEMORY)


@pytest.fixture(scope="module")
def held(prior: Artifact) -> list[Workload]:
    """A quarter of what such a card holds of the default grid."""
    predictor = Predictor(prior)
    return [w for w in GRID[::4] if float(predictor.predict_workload(w)) < MEMORY]


def swept(card: World, few: Few) -> RecordsFile:
    """What a sweep of the plan leaves."""
    file = file_of(card, run(card, [GRID[step.index] for step in few.steps]))
    return replace(file, environment=file.environment | {"total_memory_bytes": 15 << 30})


def errors(artifact: Artifact, card: World, workloads: list[Workload]) -> np.ndarray:
    predictor = Predictor(artifact)
    true = np.array([max(card.stage_peaks(w).values()) for w in workloads])
    return np.array([float(predictor.predict_workload(w)) for w in workloads]) / true - 1


def test_the_plan_is_cheap_varied_and_never_more_than_asked_for(few: Few, prior: Artifact) -> None:
    """It visits every dtype, both kinds of VAE and one image and several, within memory; more runs begin with the same."""
    found = [GRID[step.index] for step in few.steps]
    assert len(found) == len(set(found)) == 16
    assert {w.dtype for w in found} >= {"float32"} and {w.dtype for w in found} & {"float16", "bfloat16"}
    assert {w.vae for w in found} == {"kl", "tiny"} and {w.batch_size > 1 for w in found} == {False, True}
    assert len({w.attention for w in found}) >= 3
    assert all(float(Predictor(prior).predict_workload(w)) < MEMORY for w in found)
    assert few.steps[-1].width < few.steps[0].width / 4
    assert Few(Prior(prior), GRID, 5, MEMORY).steps == few.steps[:5]


def test_sixteen_runs_beat_random_ones_and_the_prior(few: Few, prior: Artifact, held: list[Workload]) -> None:
    """On cards whose kernels hold from a third less to half as much again, errors fall far below the prior's own."""
    rng = np.random.default_rng(0)
    for seed in range(2):
        card = Kernels(seed)
        planned = np.abs(errors(fit_few(swept(card, few), prior), card, held))
        before = np.abs(errors(prior, card, held))
        drawn = rng.choice(len(held), 16, replace=False)
        at_random = fit_few(file_of(card, run(card, [held[i] for i in drawn])), prior)
        assert np.median(planned) < 0.002 and planned.max() < 0.01
        assert planned.max() < before.max() / 20
        assert planned.mean() < np.abs(errors(at_random, card, held)).mean()


def test_the_intervals_hold_on_cards_that_the_prior_never_saw(few: Few, prior: Artifact, held: list[Workload]) -> None:
    """Of 95 % intervals on five made-up cards, some with misfit, at least 95 % hold in all, and 88 % on each card.

    On one card the workloads share their corrections, so one card may do worse than the level.
    """
    shares = []
    for seed in range(5):
        card = Kernels(100 + seed, wobble=0.003 * (seed % 3))
        predictor = Predictor(fit_few(swept(card, few), prior))
        ends = [predictor.predict_workload(w).interval for w in held]
        true = [max(card.stage_peaks(w).values()) for w in held]
        shares.append(np.mean([low <= value <= high for (low, high), value in zip(ends, true, strict=True)]))
    assert np.mean(shares) >= 0.95 and min(shares) >= 0.88, shares


def test_a_card_like_the_prior_stays_the_prior(few: Few, prior: Artifact, held: list[Workload]) -> None:
    """Runs of the very card that the prior is of move nothing by more than a thousandth."""
    card = World(0)
    card.scale = dict.fromkeys(STAGES, 1.0)
    artifact = fit_few(swept(card, few), prior)
    assert np.abs(errors(artifact, card, held)).max() < 1e-3 and artifact.prior["scale"] == 1.0


def test_what_the_equation_misses_is_allowed_for_where_it_is(prior: Artifact) -> None:
    """Three images or more that run one by one are off by a share, but for the tiny VAE; filters in 32 bits by twice those in 16."""
    large = {"height": 2048, "width": 2048, "batch_size": 4}
    several, one, tiny = (Workload(**w) for w in (large, large | {"batch_size": 1}, large | {"vae": "tiny"}))
    rows = Prior(prior).rows([several, one, tiny])
    split = [stages_of(several.variant)[i] for i in np.flatnonzero(rows.apart_bytes)]
    assert split == ["vae_encoder_blocks", "vae_decoder_blocks"] and (rows.misfit_bytes >= rows.apart_bytes).all()
    half, single = (misfit_bytes(("unet", dtype, "sdpa"), 1e9, 1e9) for dtype in ("float16", "float32"))
    assert single - MISFIT * 1e9 == 2 * (half - MISFIT * 1e9) > 0


def test_runs_that_contradict_the_prior_widen_the_intervals(few: Few, prior: Artifact) -> None:
    """Misfit of 5 % that no correction explains makes the scale rise, and with it every interval."""
    quiet, loud = (fit_few(swept(Kernels(1, noise=noise), few), prior) for noise in (0.0, 0.05))
    widths = [(p := Predictor(a)(768, 768)).interval[1] / p - 1 for a in (quiet, loud)]
    assert loud.prior["scale"] > 1.2 * quiet.prior["scale"] and widths[1] > 1.2 * widths[0]


def test_it_says_whose_each_coefficient_is(prior: Artifact) -> None:
    """Runs of float16 alone tell its decoder; its quadratic terms, and float32's slopes, stay the prior's."""
    card = Kernels(3)
    runs = [Workload(side, side, 77, batch) for side in (512, 1024) for batch in (1, 2, 4)]
    artifact = fit_few(file_of(card, run(card, runs)), prior)
    assert whose(artifact, "vae_decoder_blocks|float16|kl", 0, "m·P") == "card"
    assert whose(artifact, "vae_decoder_blocks|float16|kl", 0, "m·P²") == "prior"
    assert whose(artifact, "vae_decoder_blocks|float32|kl", 0, "m·P") == "prior"
    before, after = (a.stages["vae_decoder_blocks|float32|kl"] for a in (prior, artifact))
    column = before["terms"].index("m·P")
    assert after["coef"][0][column] == pytest.approx(before["coef"][0][column], rel=1e-6)
    assert {c["whose"] for c in coefficients(artifact)} == {"card", "both", "prior"}
    assert not any("whose" in c for c in coefficients(prior))
    said = fit_summary(artifact)
    assert "6 runs correct the prior 'fake' (fake)" in said and "vae_decoder_blocks, m·P" in said
    assert "## Whose the coefficients are" in model_card(artifact)


def test_a_corrected_model_is_saved_loaded_and_checked(few: Few, prior: Artifact, tmp_path: Path) -> None:
    """It comes back as it was; one whose shares do not fit its coefficients is not written."""
    artifact = fit_few(swept(Kernels(4), few), prior)
    path = artifact.save(tmp_path / "few.joblib")
    assert load_artifact(path) == artifact
    assert "16 runs, none of them on a card, correct the model 'fake' (fake)" in Predictor(artifact).rests_on
    for spoilt in ({"rows": 0}, {"stages": {}}, {"scale": 0.5}, {"name": 3}):
        with pytest.raises(ArtifactError, match="'prior'"):
            replace(artifact, prior=artifact.prior | spoilt).save(path)


def test_other_metrics_move_with_the_peak(few: Few, prior: Artifact, held: list[Workload]) -> None:
    """Required and reserved memory of a made-up card are found within 3 % in the median, measured in the runs or not."""
    card = Kernels(5)
    file = swept(card, few)
    silent = replace(file, records=[replace(r, required_bytes=None, reserved_bytes=None) for r in file.records])
    for records in (file, silent):
        predictor = Predictor(fit_few(records, prior))
        for metric in ("required", "reserved"):
            off = [
                float(predictor.predict_workload(w, metric=metric)) / card.measure(w)[f"{metric}_bytes"] - 1
                for w in held[::6]
            ]
            assert np.median(np.abs(off)) < 0.03


def test_failed_runs_and_foreign_variants_are_said(prior: Artifact) -> None:
    """Without a run that succeeded, or with a variant that the prior lacks, the error says so."""
    tight = measured([Workload(2048, 2048)], capacity_bytes=3 << 30)
    with pytest.raises(FitError, match="none of the 1 runs succeeded"):
        fit_few(tight, prior)
    lacking = replace(prior, stages={k: s for k, s in prior.stages.items() if "float32" not in k})
    with pytest.raises(FitError, match="knows nothing of"):
        fit_few(measured([Workload(512, 512, dtype="float32")]), lacking)
    with pytest.raises(FitError, match="no workload of the grid"):
        Few(Prior(prior), GRID, 4, 1 << 30)


def test_which_prior_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows of a card or its trace correct the model of its kernels, never one that was itself corrected."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remade, "GRIDS", ("quick",))
    monkeypatch.setattr(few_module, "REFERENCE", "quick")
    few_rows = measured([Workload(512, 512)])
    of_card = replace(few_rows, environment={"backend": "cuda", "name": "t4"})
    assert prior_of("auto", few_rows) is None and prior_of("none", of_card) is None
    found = prior_of("auto", of_card)
    assert found is not None and found.name == "sm75"
    assert prior_of("sm70", few_rows).name == "sm70"  # type: ignore[union-attr]
    assert model_of_kernels({"name": "unheard of", "compute_capability": "9.0"}).name == "sm90"  # type: ignore[union-attr]
    assert model_of_kernels({"name": "unheard of"}) is None
    many = replace(of_card, records=[replace(of_card.records[0], index=i) for i in range(FEW)])
    assert prior_of("auto", many) is None
    fit_few(of_card, found).save(tmp_path / "models" / "sm75.joblib")
    assert not model_of_kernels({"name": "t4"}).prior  # type: ignore[union-attr]
    with pytest.raises(FitError, match="--prior, as sm75"):
        few_for("unheard of", GRID)


def test_left_out_runs_are_predicted_by_the_others(prior: Artifact) -> None:
    """The closed form of leaving a run out is the fit without it."""
    card = Kernels(7, noise=0.01)
    records = run(card, GRID[:240:24])
    known = Prior(prior)
    rows = known.rows([records[3].workload])
    others = correct(known, records[:3] + records[4:])
    again = float(rows.highest(rows.prior_bytes + rows.X @ others.mean)[0])
    moved = correct(known, records).left_out[3]
    assert float(rows.highest(rows.prior_bytes + moved)[0]) == pytest.approx(again, rel=1e-9)


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sweep few, go on, fit, ask: the same file grows, the card and --json say what the numbers rest on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        search, "DEPTH", 1
    )  # no table gives what the made-up card shows, and looking for one takes long
    monkeypatch.setattr(search, "COARSE", (20,))
    monkeypatch.setattr(search, "PARENTS", 4)
    sweep = ("sweep", "--gpu", "mine", "--backend", "fake", "--prior", "sm75", "--narrow", "0.1%")
    assert main([*sweep, "--runs", "5", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "prior: sm75" in shown and len(shown.splitlines()) == 7
    assert main([*sweep, "--runs", "5"]) == 0
    path = capsys.readouterr().out.strip()
    assert main([*sweep, "--runs", "8"]) == 0
    heard = capsys.readouterr()
    assert heard.out.strip() == path and "8 of 719 done" in heard.err and "5 were there already" in heard.err
    assert "95 % intervals of allocated memory are now" in heard.err
    assert main(["fit", path, "--prior", "sm75", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["prior"]["name"] == "sm75" and told["prior"]["rows"] == 8
    assert {c["whose"] for c in told["coefficients"]} == {"card", "both", "prior"}
    with warnings.catch_warnings():
        warnings.simplefilter("always", SimulatedModelWarning)
        assert main(["predict", "--gpu", "models/mine.joblib", "--height", "512", "--width", "512"]) == 0
    assert "8 runs, none of them on a card, correct the model 'sm75'" in capsys.readouterr().err
    assert main([*sweep[:-1], "30%", "--runs", "12"]) == 0
    assert "enough after 8 runs" in capsys.readouterr().err
    assert main(["sweep", "--gpu", "mine", "--backend", "fake", "--runs", "3"]) == 1
    assert "name one with --prior" in capsys.readouterr().err
    assert main(["sweep", "--runs", "3"]) == 1
    assert "there is no CUDA card here" in capsys.readouterr().err
    assert main([*sweep[:-1], "wide", "--runs", "3"]) == 2
    assert "'wide' is not a share" in capsys.readouterr().err
