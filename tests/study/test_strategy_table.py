"""The table of strategies: memory by the model, seconds of one card and one source only, the frontier, recipes."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from worlds import run

from sdfit.backends.fake import FakeBackend
from sdfit.cli import main
from sdfit.predict.library import load
from sdfit.predict.memory import of_box
from sdfit.predict.options import options_that_fit
from sdfit.predict.predictor import Predictor
from sdfit.study.comparison import frontier
from sdfit.study.comparison.strategies import ASKED, CHANGES_NOTHING, Strategies, strategies
from sdfit.study.comparison.times import Time, best_series, measured_times, published_times
from sdfit.units import GIB
from sdfit.workload import CHOICES, Workload

PLAIN = Workload(512, 512)


@pytest.fixture(scope="module")
def p100() -> Predictor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load("p100")


def asked_of(f: Predictor, w: Workload, memory: int = 8 * GIB) -> Strategies:
    return strategies(f, w, memory_bytes=memory, times=published_times())


def test_every_option_is_a_row_and_they_are_sorted_by_peak(p100: Predictor) -> None:
    """Each choice of each field once, by itself; where the model has no number a reason stands instead."""
    found = asked_of(p100, PLAIN)
    changes = [row.change for row in found.rows]
    for name, values in CHOICES.items():
        for value in values[1:]:
            assert {name: value} in changes
    peaks = [float(row.prediction) for row in found.rows if row.prediction is not None]
    assert peaks == sorted(peaks) and len(peaks) > 10
    for row in found.rows:
        assert row.rests_on and (row.prediction is None) == (row.saved_bytes is None) == (not row.answer)
    asked = next(row for row in found.rows if row.name == ASKED)
    assert asked.saved_bytes == 0
    for row in found.rows:
        if row.prediction is not None:
            assert row.prediction == p100.predict_workload(replace(PLAIN, **row.change), metric="required")
            assert row.saved_bytes == float(asked.prediction or 0) - float(row.prediction)


def test_what_changes_nothing_is_said(p100: Predictor) -> None:
    """Gradient checkpointing, schedulers, steps and a late cut-off of guidance stand in the table, without a number."""
    table = asked_of(p100, PLAIN).table()
    assert all(f"{name}: {words}" in table for name, words in CHANGES_NOTHING)
    assert (
        "gradient checkpointing: belongs to training" in table
        and "other quantised weights: of quantised weights those of execution='int8' alone are known" in table
    )


def test_seconds_are_of_this_card_and_one_source(p100: Predictor) -> None:
    """P100: 8.567 s as asked and 10.422 s with model offload, both of gperdrizet's run of 30 steps; both on the frontier."""
    rows = {row.name: row for row in asked_of(p100, PLAIN).rows}
    times = {name: row.time for name, row in rows.items() if row.time is not None}
    assert {t.series for t in times.values()} == {"gperdrizet, 30 steps"} and {t.card for t in times.values()} == {
        "p100"
    }
    assert (times[ASKED].seconds, times["offload=model"].seconds) == (8.567, 10.422)
    assert rows[ASKED].frontier and rows["offload=model"].frontier and rows[ASKED].speed == 1
    assert rows["offload=model"].speed == pytest.approx(8.567 / 10.422)
    assert not any(row.frontier for row in rows.values() if row.time is None)


@pytest.mark.parametrize("change", [{"height": 520}, {"batch_size": 3}, {"guidance_scale": 1.0}, {"dtype": "float32"}])
def test_no_time_of_another_run_is_shown(p100: Predictor, change: dict[str, float]) -> None:
    """Another size, batch, guidance or dtype: no seconds, and a line that says for what there are some."""
    found = asked_of(p100, replace(PLAIN, **change))
    asked = next(row for row in found.rows if row.name == ASKED)
    assert asked.time is None and (found.notes[-1].startswith("seconds: none") or change.get("dtype"))


def test_times_of_one_series_only_and_never_of_another_card() -> None:
    """The series that knows most of the runs is taken whole; a card without times has none."""
    runs = [PLAIN, replace(PLAIN, offload="model")]
    assert [t.id for t in best_series(published_times(), "gtx1070", runs) if t] == [
        "GPT-GTX1070-gpu_only",
        "GPT-GTX1070-model_offload",
    ]
    assert best_series(published_times(), "h200", runs) == [None, None]
    (a100,) = [t for t in best_series(published_times(), "a100", [PLAIN]) if t]
    assert a100.card == "a100" and a100.num_inference_steps == 50


def test_every_published_time_has_its_source_and_settings() -> None:
    """Address, commit and the quoted settings; ids are unique; a T4's batch of four takes 12.095 s at 20 steps."""
    times = published_times()
    assert len({t.id for t in times}) == len(times) == 57
    assert all(t.source.startswith("https://") and "@" in t.source and t.settings and t.seconds > 0 for t in times)
    t4 = next(t for t in times if t.id == "OMT-T4-4-20-None")
    assert t4.seconds == 12.095161 and t4.seconds_per_image == pytest.approx(3.0238, abs=1e-4)


def test_a_measured_sweep_gives_its_own_seconds_and_a_simulated_one_none() -> None:
    """Stage by stage they add up; a trace and a made-up card know no time."""
    card = FakeBackend("p100")
    records = [replace(r, stage_s={"unet": 2.0, "vae_decoder_blocks": 0.5}) for r in run(card, [PLAIN])]
    environment = card.environment() | {"backend": "cuda", "name": "p100"}
    (time,) = measured_times(environment, records)
    assert (time.seconds, time.series, time.card) == (2.5, "measured, 2 steps", "p100") and time.is_of(PLAIN)
    assert measured_times(card.environment(), records) == ()
    assert best_series([time, *published_times()], "p100", [PLAIN]) != [None]


def test_a_recipe_is_what_advice_begins_with(p100: Predictor) -> None:
    """768x768 needs changes; each recipe is the cheapest that suffices in what a card of that box leaves, and no row comes twice."""
    asked = Workload(768, 768, dtype="float32", attention="eager")
    found = asked_of(p100, asked)
    recipes = {row.name: row for row in found.rows if row.name.startswith("card of ")}
    boxes = {int(gib): row for name, row in recipes.items() for gib in re.findall(r"\d+", name.split(" GB")[0])}
    assert boxes.keys() >= {6, 8}
    for gib, row in boxes.items():
        assert row.prediction is not None and row.prediction.upper <= of_box(gib)
        assert row.change == options_that_fit(p100, asked, memory=of_box(gib))[0].change
    changes = [tuple(row.change.items()) for row in found.rows if row.change]
    assert len(changes) == len(set(changes))
    small = asked_of(p100, Workload(256, 256, dtype="float16"))
    assert any("card of 8 GB: fits as asked" in note for note in small.notes)


def test_the_frontier_is_what_nothing_else_beats(p100: Predictor) -> None:
    """A made-up time that beats model offload in both takes its place; sequential offload takes less memory, and longer."""
    quick = next(t for t in published_times() if t.id == "GPT-P100-model_offload")
    tiny = replace(quick, id="made up", vae="tiny", offload="none", seconds=1.0)
    found = strategies(p100, PLAIN, memory_bytes=8 * GIB, times=[*published_times(), tiny])
    assert {row.name for row in found.rows if row.frontier} == {"vae=tiny", "offload=sequential"}
    assert isinstance(tiny, Time)


def test_the_figure_is_written(p100: Predictor, tmp_path: Path) -> None:
    """With times and without, as PNG and as SVG."""
    assert frontier.draw(asked_of(p100, PLAIN), tmp_path / "a.png").stat().st_size > 10_000
    svg = frontier.draw(asked_of(p100, Workload(768, 768)), tmp_path / "b.svg").read_text()
    assert "<svg" in svg


@pytest.mark.filterwarnings("default::sdfit.errors.SimulatedModelWarning")
def test_the_command_answers_in_words_and_in_json(capfd: pytest.CaptureFixture[str]) -> None:
    """The same rows; amounts in bytes; where a number is not known, null."""
    size = ["--gpu", "p100", "--height", "512", "--width", "512", "--memory", "8GiB"]
    assert main(["strategies", *size]) == 0
    words = capfd.readouterr().out
    assert "offload=model" in words and "GPT-P100-gpu_only" in words and "memory: 8.000 GiB as given" in words
    assert main(["strategies", *size, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    rows = {row["strategy"]: row for row in told["strategies"]}
    assert rows[ASKED]["seconds_per_image"] == 8.567 and rows[ASKED]["saved_bytes"] == 0
    assert rows["gradient checkpointing"]["peak_bytes"] is None and told["memory_bytes"] == 8 * GIB
