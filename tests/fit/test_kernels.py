"""Few runs tell which kernels a card has, to the byte where a table says them, and are not believed where none does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sdfit.equation.stages import stages_of
from sdfit.errors import ArtifactError
from sdfit.files import shipped
from sdfit.fit import few, remade, search
from sdfit.fit.card import fit_summary, model_card
from sdfit.fit.correction import Prior, correct
from sdfit.fit.few import fit_few
from sdfit.fit.kernels import kernels_of_prior, recognise
from sdfit.fit.live import skeleton
from sdfit.fit.search import shown_of
from sdfit.fit.shown import record_of
from sdfit.fit.tables import GROUPS, Odd, Table, own_rules, tables
from sdfit.fit.whose import whose
from sdfit.predict.artifact import Artifact
from sdfit.predict.loading import load_artifact
from sdfit.predict.predictor import Predictor
from sdfit.predict.simulation.simulate import Simulator
from sdfit.predict.simulation.workspaces import ARCHITECTURES, HALF, Architecture, Rule, Workspaces
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
        run, bare = Simulator(Workspaces(architecture)).run(w), skeleton(w, architecture.cublas_bytes)
        assert bare is not None
        found.append(record_of(i, bare, [run.stage_peaks[stage] + more for stage in stages_of(w.variant)]))
    return found


@pytest.fixture(scope="module")
def prior() -> Artifact:
    return load_artifact(shipped("models") / "sm75.joblib")


def test_runs_tell_the_table_and_the_constant() -> None:
    """Other operands copied, and 100 MiB held all the time: both are found, and the runs come out to the byte."""
    records = runs_of(ONE_WAY)
    found = recognise(T4, records)
    assert found.found[HALF] == Table((0, 1, 1), "aligned", False, False) and found.constant_bytes == MORE
    assert set(found.found) == {HALF}, "no run was of float32"
    for record in records:
        seen = [record.stage_peaks_bytes[s] - record.weights_bytes(s) for s in stages_of(record.workload.variant)]
        assert found.held_bytes([record.workload])[0].tolist() == seen


def test_of_tables_that_say_the_same_the_nearest_to_the_prior_is_taken() -> None:
    """A T4's own runs tell a T4, whatever else they would fit too."""
    found = recognise(T4, runs_of(T4, 0))
    assert found.found[HALF] == tables(HALF, T4)[0] and found.constant_bytes == 0
    assert list(found.likely[HALF]) and found.found[HALF] not in found.likely[HALF] and found.is_explained("float16")


def test_of_larger_results_than_any_shown_others_are_as_likely() -> None:
    """They say what the runs show and differ beyond: intervals allow for that, and a plan goes there. What such a run shows is then settled."""
    settled = []
    for workloads in (RUNS[:2], [*RUNS[:2], Workload(2048, 2048, 77, 1, 1.0)]):
        found = recognise(T4, runs_of(T4, 0, workloads))
        beyond = [table for table in found.likely[HALF] if table.having("large")]
        assert found.found[HALF] == tables(HALF, T4)[0] and beyond
        peaks = [found.peaks(tuple(workloads), HALF, table).tolist() for table in (found.found[HALF], *beyond)]
        assert all(mine == peaks[0] for mine in peaks[1:])
        (asked,) = (
            np.array([found.peaks((Workload(1536, 1536),), HALF, t).max() for t in (found.found[HALF], *beyond)]),
        )
        settled.append(bool(np.all(np.abs(asked / asked[0] - 1) < 0.01)))
    assert settled == [False, True]


def test_noise_of_an_allocator_hides_no_table() -> None:
    """Remainders of up to 2 MiB a stage are no other kernels."""
    rng = np.random.default_rng(5)
    noisy = []
    for r in runs_of(ONE_WAY):
        peaks = {stage: peak + int(rng.integers(0, 2 << 20)) for stage, peak in r.stage_peaks_bytes.items()}
        noisy.append(replace(r, stage_peaks_bytes=peaks, allocated_bytes=max(peaks.values())))
    found = recognise(T4, noisy)
    assert found.found[HALF].copies == (0, 1, 1) and abs(found.constant_bytes - MORE) < 2 << 20


@pytest.mark.parametrize(
    "odd",
    [
        Odd("pad", None, MORE),
        Odd("single", (0, 0, 2)),
        Odd("small", (2, 1, 0), 512 * 512),
        Odd("large", (2, 1, 0), 768 * 768),
        Odd("unstrided"),
    ],
)
def test_kernels_that_depart_from_copies_are_found(odd: Odd) -> None:
    """So much more for every layer, others of one image, of small results or of large ones, none where maps become smaller: to the byte."""
    made = Table((1, 1, 0), "aligned", False, False, (odd,))
    found = recognise(T4, runs_of(card(*made.rules(HALF, ())), 0))
    assert found.matched[HALF] == 1.0
    small, asked = {HALF: made}, [Workload(640, 640), Workload(640, 512, 77, 2)]
    true, told = (found.held_bytes(asked, tables) for tables in (small, None))
    assert np.concatenate(told) == pytest.approx(np.concatenate(true), rel=0.02)


def test_a_larger_plan_is_taken_while_there_is_room() -> None:
    """1.8 times as much, as long as the runs show: found, and that it ends beyond them is among what is as likely."""
    made = Table((1, 1, 1), "aligned", True, False, (Odd("larger", None, 18, 8 << 30),))
    records = runs_of(T4, 0)
    shown = shown_of(tuple(RUNS), HALF, T4)
    peaks = np.split(shown.peaks(made), np.cumsum([len(r.stage_peaks_bytes) for r in records])[:-1])
    runs = [
        record_of(r.index, skeleton(r.workload, T4.cublas_bytes), mine.tolist())
        for r, mine in zip(records, peaks, strict=True)
    ]  # type: ignore[arg-type]
    assert any(r.stage_peaks_bytes != t.stage_peaks_bytes for r, t in zip(runs, records, strict=True))
    found = recognise(T4, runs)
    larger = found.found[HALF].having("larger")
    assert found.matched[HALF] == 1.0 and larger is not None and larger.amount == 18
    assert "1.8 times as much" in found.words["float16"]
    both = [found.found[HALF], *found.likely[HALF]]
    room = [odd.room_bytes for table in both for odd in table.odd if odd.kind == "larger"]
    assert set(room) > {None}, "where it ends is not known, and intervals are to allow for it"


def test_where_a_larger_plan_ends_is_the_middle_of_what_runs_allow() -> None:
    """One run took it and a larger one did not: it ends somewhere between, and what is as likely lies on both sides of what is found."""
    workloads = (Workload(512, 512, 77, 1, 1.0), Workload(1536, 1536, 77, 1, 1.0))
    larger = Odd("larger", None, 18, 4 << 30, "one upsampled")
    made = Table((1, 1, 1), "aligned", True, False, (larger,))
    shown = shown_of(workloads, HALF, T4)
    needed = shown.needed(made, larger)
    assert needed[needed > 0].min() < 4 << 30 < needed.max(), "the plan of one run fits, that of the other does not"
    runs, at = [], 0
    for i, w in enumerate(workloads):
        bare = skeleton(w, T4.cublas_bytes)
        assert bare is not None
        runs.append(record_of(i, bare, shown.peaks(made)[at : at + len(bare.bare_bytes)].tolist()))
        at += len(bare.bare_bytes)
    sought = search.Search(T4, runs, HALF).best(None, (), [made], is_more=True)
    ends = {odd.room_bytes for table in [sought.table, *sought.likely] for odd in table.odd if odd.room_bytes}
    found = sought.table.having("larger")
    assert found is not None and found.room_bytes == pytest.approx((min(ends) * max(ends)) ** 0.5, rel=0.01)
    below, above = (
        [end for end in ends if least < end < most]
        for least, most in ((min(ends), found.room_bytes), (found.room_bytes, max(ends)))
    )
    assert below and above and min(ends) in needed and max(ends) + 1 in needed
    assert sought.matched == 1.0


def test_what_no_table_says_makes_intervals_wide(prior: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workspaces that differ from stage to stage: no table is believed, the prior's are corrected, and the uncertainty is that of any kernels."""
    monkeypatch.setattr(search, "DEPTH", 1)
    monkeypatch.setattr(search, "COARSE", (20,))
    monkeypatch.setattr(search, "PARENTS", 4)
    rng = np.random.default_rng(3)
    odd = []
    for r in runs_of(T4, 0):
        peaks = {stage: int(peak * rng.uniform(1.05, 1.6)) for stage, peak in r.stage_peaks_bytes.items()}
        odd.append(replace(r, stage_peaks_bytes=peaks, allocated_bytes=max(peaks.values())))
    known, quiet = Prior(prior), correct(Prior(prior), runs_of(T4, 0))
    posterior = correct(known, odd)
    assert posterior.found is not None and not posterior.found.found and posterior.found.constant_bytes == 0
    assert np.abs(posterior.mean).max() > 0 and posterior.scale > quiet.scale
    assert posterior.prior.wide == {2} and not quiet.prior.wide, "no run was of float32"
    wide = np.array(
        ["kind" in str(name[0]) and "constant" not in str(name[0]) and name[3] == 2 for name in known.effects]
    )
    size = wide & np.array([name[0] == "kind, regime, size" for name in known.effects])
    assert (posterior.prior.sd[size] > 5 * known.sd[size]).all() and (posterior.prior.unshown[size] > 0).all()
    assert np.array_equal(posterior.prior.sd[~wide], known.sd[~wide]) and not posterior.prior.unshown[~size].any()
    monkeypatch.setattr(remade, "GRIDS", ("quick",))
    monkeypatch.setattr(few, "REFERENCE", "quick")
    artifact = fit_few(RecordsFile({"backend": "trace", "name": "new", "workspaces": None}, odd, []), prior)
    low, high = Predictor(artifact)(1024, 768, batch_size=2).interval
    assert high / low > 1.3
    assert "no table gives what the runs show" in fit_summary(artifact) and "as wide as" in model_card(artifact)


def test_arithmetic_on_a_skeleton_is_the_simulation(prior: Artifact) -> None:
    """Slices, tiles, offload and float32: stage peaks under any table of rules to the byte."""
    runs = [
        Workload(264, 520, 77, 2, 1.0, vae_slicing=True), Workload(640, 520, vae_tiling=True), Workload(512, 512, offload="sequential"),
        Workload(640, 520, dtype="float32"),
    ]  # fmt: skip
    odds = (Odd("pad", None, MORE), Odd("single", (0, 1, 0)), Odd("small", (2, 0, 1), 256 * 256))
    for dtypes in GROUPS:
        mine = tuple(w for w in runs if w.dtype in dtypes)
        large = (Odd("large", (0, 3, 1), 256 * 256, None, "several"), Odd("single", (0, 1, 0)))
        known = tables(dtypes, T4)[0]
        of_all = known._replace(odd=(Odd("large", (0, 3, 1), 256 * 256),))
        for table in (
            known,
            of_all,
            Table((2, 1, 1), "all", True, True, odds),
            Table((1, 1, 1), "all", False, False, large),
        ):
            made = replace(T4, rules=table.rules(dtypes, own_rules(dtypes, T4)))
            simulator = Simulator(Workspaces(made))
            true = [simulator.run(w).stage_peaks[stage] for w in mine for stage in stages_of(w.variant)]
            assert shown_of(mine, dtypes, T4).peaks(table).tolist() == true


def test_every_known_card_is_among_the_tables() -> None:
    """So that none needs luck: each architecture's rules are those of a table that another one's runs are tried with."""
    for dtypes in GROUPS[:1]:
        tried = {rules_of(table.rules(dtypes, own_rules(dtypes, T4))) for table in tables(dtypes, T4)}
        for architecture in ARCHITECTURES.values():
            own = tables(dtypes, architecture)[0].rules(dtypes, own_rules(dtypes, architecture))
            assert rules_of(own) in tried, architecture.name


def rules_of(rules: tuple[Rule, ...]) -> tuple[object, ...]:
    """What they say of a convolution of each kind, at 16 bits."""
    made = replace(T4, rules=rules)
    shapes = [
        (batch, ins, outs, side, kernel)
        for batch in (1, 2) for ins, outs in ((4, 320), (256, 256), (512, 512), (2560, 1280)) for side in (16, 64) for kernel in (1, 3)
    ]  # fmt: skip
    held = Workspaces(made).convolution
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
    monkeypatch.setattr(remade, "GRIDS", ("quick",))
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


def test_a_second_line_of_the_unet_comes_with_the_kernels(
    prior: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pascal's widened filters set the peak of small images where the prior has one line; the model is whole, and is saved."""
    monkeypatch.setattr(remade, "GRIDS", ("default",))
    monkeypatch.setattr(few, "REFERENCE", "quick")
    pascal = replace(T4, rules=ARCHITECTURES["sm61"].rules)
    file = RecordsFile({"backend": "trace", "name": "new", "workspaces": None}, runs_of(pascal, more=0), [])
    artifact = fit_few(file, prior)
    deep = "unet_deep|float16|sdpa"
    assert deep in artifact.stages and deep not in prior.stages and set(artifact.prior["kernels"]) == set(HALF)
    (true,) = runs_of(pascal, 0, [Workload(256, 256, offload="model")])
    assert float(Predictor(artifact).predict_workload(true.workload)) == pytest.approx(true.allocated_bytes, rel=0.01)
    assert "the kernels'" in fit_summary(artifact) and model_card(artifact)
    assert load_artifact(artifact.save(tmp_path / "new.joblib")) == artifact
