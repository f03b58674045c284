"""Few runs tell which kernels a card has, to the byte where a table says them, and are not believed where none does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sdfit.equation.stages import stages_of
from sdfit.errors import ArtifactError
from sdfit.files import shipped
from sdfit.fit import few, kernels
from sdfit.fit.card import fit_summary, model_card
from sdfit.fit.correction import Prior, correct
from sdfit.fit.few import fit_few
from sdfit.fit.kernels import GROUPS, Table, kernels_of_prior, recognise, simulated, tables
from sdfit.fit.whose import whose
from sdfit.predict.artifact import Artifact
from sdfit.predict.loading import load_artifact
from sdfit.predict.predictor import Predictor
from sdfit.predict.simulation.workspaces import ARCHITECTURES, HALF, Architecture, Rule
from sdfit.records import Record, RecordsFile
from sdfit.workload import Workload

T4 = ARCHITECTURES["sm75"]
RUNS = [Workload(512, 512), Workload(768, 640, 77, 2), Workload(1024, 1024, 77, 1, 1.0)]
"""Of float16 alone; each is simulated under some two hundred tables, once for all tests."""
MORE = 100 << 20


def card(*rules: Rule) -> Architecture:
    """A T4 whose kernels of 16 bits are others."""
    return replace(T4, rules=(*rules, *(r for r in T4.rules if not set(r.dtypes) & set(HALF))))


ONE_WAY = card(Rule(HALF, ("output", "weight"), "", only="aligned"))


def runs_of(architecture: Architecture, more: int = MORE, workloads: list[Workload] = RUNS) -> list[Record]:
    """What a card with these kernels, that holds so much more all the time, would have shown."""
    found = []
    for i, w in enumerate(workloads):
        record = simulated(i, w, architecture)
        assert record is not None
        peaks = {stage: peak + more for stage, peak in record.stage_peaks_bytes.items()}
        found.append(replace(record, stage_peaks_bytes=peaks, allocated_bytes=max(peaks.values())))
    return found


@pytest.fixture(scope="module")
def prior() -> Artifact:
    return load_artifact(shipped("models") / "sm75.joblib")


def test_runs_tell_the_table_and_the_constant() -> None:
    """Other operands copied, and 100 MiB held all the time: both are found, and the runs come out to the byte."""
    records = runs_of(ONE_WAY)
    found = recognise(T4, records)
    table, _ = found.found[HALF]
    assert table == Table((0, 1, 1), "aligned", False, False) and found.constant_bytes == MORE
    assert set(found.found) == {HALF}, "no run was of float32"
    for record in records:
        seen = [record.stage_peaks_bytes[s] - record.weights_bytes(s) for s in stages_of(record.workload.variant)]
        assert found.held_bytes(record.workload).tolist() == seen


def test_of_tables_that_say_the_same_the_nearest_to_the_prior_is_taken() -> None:
    """A T4's own runs tell a T4, whatever else they would fit too."""
    found = recognise(T4, runs_of(T4, 0))
    assert found.found[HALF] == tables(HALF, T4)[0] and found.constant_bytes == 0
    assert list(found.others[HALF]) and found.found[HALF][1] not in found.others[HALF]


def test_noise_of_an_allocator_hides_no_table() -> None:
    """Remainders of up to 2 MiB a stage are no other kernels."""
    rng = np.random.default_rng(5)
    noisy = []
    for r in runs_of(ONE_WAY):
        peaks = {stage: peak + int(rng.integers(0, 2 << 20)) for stage, peak in r.stage_peaks_bytes.items()}
        noisy.append(replace(r, stage_peaks_bytes=peaks, allocated_bytes=max(peaks.values())))
    found = recognise(T4, noisy)
    assert found.found[HALF][0].copies == (0, 1, 1) and abs(found.constant_bytes - MORE) < 2 << 20


def test_what_no_table_says_is_left_to_corrections(prior: Artifact) -> None:
    """A hundred MiB for every convolution are neither copies nor held all the time: the prior's kernels stay, and are corrected."""
    odd = card(Rule(HALF, ("output",), "", pad_bytes=MORE))
    records = runs_of(odd, 0)
    posterior = correct(Prior(prior), records)
    assert posterior.found is not None and not posterior.found.found and posterior.found.constant_bytes == 0
    assert np.abs(posterior.mean).max() > 0


def test_every_known_card_is_among_the_tables() -> None:
    """So that none needs luck: each architecture's rules are those of a table that another one's runs are tried with."""
    for dtypes in GROUPS[:1]:
        tried = {rules_of(rules) for _, rules in tables(dtypes, T4)}
        for architecture in ARCHITECTURES.values():
            assert rules_of(tables(dtypes, architecture)[0][1]) in tried, architecture.name


def rules_of(rules: tuple[Rule, ...]) -> tuple[object, ...]:
    """What they say of a convolution of each kind, at 16 bits."""
    made = replace(T4, rules=rules)
    shapes = [
        (batch, ins, outs, side, kernel)
        for batch in (1, 2) for ins, outs in ((4, 320), (256, 256), (512, 512), (2560, 1280)) for side in (16, 64) for kernel in (1, 3)
    ]  # fmt: skip
    held = kernels.Workspaces(made).convolution
    return tuple(
        held("float16", (b, i, s, s), (o, i, k, k), (b, o, s, s)) if (i, k) != (4, 1) else 0 for b, i, o, s, k in shapes
    )


def test_a_prior_that_was_not_simulated_has_no_tables(prior: Artifact) -> None:
    """Nor one that rests on a table that this sdfit does not know."""
    assert kernels_of_prior(prior) == T4
    for environment in ({}, {"workspaces": None}, {"workspaces": "sm75 0123456789abcdef"}):
        assert kernels_of_prior(replace(prior, environment=environment)) is None


def test_the_model_is_what_a_sweep_of_such_a_card_would_give(
    prior: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At sizes that no run had, it is right within the equation's own error, says whose each coefficient is, and is saved."""
    monkeypatch.setattr(kernels, "GRIDS", ("quick",))
    monkeypatch.setattr(few, "REFERENCE", "quick")
    file = RecordsFile({"backend": "trace", "name": "new", "workspaces": None}, runs_of(ONE_WAY), [])
    artifact = fit_few(file, prior)
    predictor = Predictor(artifact)
    asked = [Workload(640, 640), Workload(896, 512, 77, 2)]
    for true in runs_of(ONE_WAY, workloads=asked):
        found = predictor.predict_workload(true.workload)
        assert float(found) == pytest.approx(true.allocated_bytes, rel=0.005)
        assert found.interval[0] <= true.allocated_bytes <= found.interval[1]
    before = [float(Predictor(prior).predict_workload(w)) for w in asked]
    assert (
        max(abs(b / t.allocated_bytes - 1) for b, t in zip(before, runs_of(ONE_WAY, workloads=asked), strict=True))
        > 0.005
    )
    assert set(artifact.prior["kernels"]) == set(HALF) and artifact.prior["constant_bytes"] == MORE
    owners = {whose(artifact, "vae_decoder_blocks|float16|kl", row, "m·P") for row in range(2)}
    assert "card" in owners
    assert whose(artifact, "unet|float16|math", 0, "n·A") == "kernels"
    assert whose(artifact, "vae_decoder_mid|float32|eager|kl", 0, "m·P") == "prior"
    said = fit_summary(artifact)
    assert "copies its output and its filter" in said and "the kernels'" in said and "+104,857,600 B" in said
    assert "copies its output and its filter" in model_card(artifact)
    assert load_artifact(artifact.save(tmp_path / "new.joblib")) == artifact
    for spoilt in ({"kernels": {"float8": "x"}}, {"kernels": {"float16": 3}}, {"constant_bytes": 0.5}):
        with pytest.raises(ArtifactError, match="'prior'"):
            replace(artifact, prior=artifact.prior | spoilt).save(tmp_path / "spoilt.joblib")
