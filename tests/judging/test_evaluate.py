"""An artifact held against records: the numbers are those that the records say, and the figures say what they show."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from worlds import World, drawn, file_of, generator, grid, run

from sdfit.errors import InvalidWorkload, RecordsError, SdfitError
from sdfit.fit.fit import fit
from sdfit.judging.evaluate import evaluate, size_class
from sdfit.judging.evaluation import BASELINE, UPPER_LEVEL, Evaluation
from sdfit.predict.predictor import Predictor
from sdfit.records import Record, RecordsFile
from sdfit.workload import Workload

plots = pytest.importorskip("sdfit.judging.plots")


@pytest.fixture(scope="module")
def card() -> World:
    """A card with noise and a capacity of 8 GiB."""
    return World(1, noise=0.03, capacity_bytes=8 << 30)


@pytest.fixture(scope="module")
def predictor(card: World) -> Predictor:
    """Its model, of sdpa and eager attention."""
    sweep = grid() + grid(attention="eager", sides=(256, 384, 512, 640))
    return Predictor(fit(file_of(card, run(card, sweep))))


@pytest.fixture(scope="module")
def fresh(card: World) -> RecordsFile:
    """Runs that the model never saw, one that fails and one of a variant that was never swept."""
    rng = generator(5)
    workloads = drawn(rng, 60, sides=tuple(range(256, 1032, 8)), batches=(1, 2, 4), prompts=(77, 154), most=4 << 20)
    return file_of(
        card, run(card, [*workloads, Workload(2048, 2048, batch_size=2), Workload(512, 512, dtype="float32")])
    )


def test_every_number_is_the_records_own(predictor: Predictor, fresh: RecordsFile) -> None:
    """Errors, coverage, share above the bound and over-reservation equal those worked out row by row with f."""
    found = evaluate(predictor, fresh, 0.9)
    ok = [r for r in fresh.records if r.outcome == "ok" and r.workload.dtype == "float16"]
    one = [predictor.predict_workload(r.workload, level=0.9) for r in ok]
    bound = np.array([predictor.predict_workload(r.workload, level=UPPER_LEVEL).upper for r in ok])
    actual = np.array([r.allocated_bytes for r in ok])
    error = np.array(one) / actual - 1
    line = found.line()
    assert line.rows == len(ok) and line.worst_error == error[np.argmax(np.abs(error))]
    assert line.median_error == np.median(np.abs(error)) and line.bias == np.median(error)
    assert line.worst_row == ok[int(np.argmax(np.abs(error)))].index
    assert line.coverage == np.mean([p.interval.low <= a <= p.interval.high for p, a in zip(one, actual, strict=True)])
    assert line.above_upper == np.mean(actual > bound)
    assert line.over_reserved == pytest.approx(np.mean((bound / actual - 1)[actual <= bound]))
    assert line.width == pytest.approx(np.mean([(p.interval.high - p) / p for p in one]))


def test_lines_partition_the_rows(predictor: Predictor, fresh: RecordsFile) -> None:
    """By stage, variant, size and domain every row is counted once, for each metric that the records have."""
    found = evaluate(predictor, fresh)
    assert {line.metric for line in found.lines} == {"allocated", "reserved", "device", "required", "minimum"}
    for metric in ("allocated", "required"):
        for group in ("stage", "variant", "size", "domain"):
            rows = [line.rows for line in found.lines if (line.metric, line.group) == (metric, group)]
            assert sum(rows) == found.line(metric).rows
    assert found.line("allocated", "variant", "float16 sdpa").rows == found.line().rows
    with pytest.raises(KeyError):
        found.line("allocated", "variant", "float16 magic")


def test_out_of_memory_rows_are_asked_about(predictor: Predictor, card: World) -> None:
    """A run that failed is one that the estimate puts above the cap; one that the artifact calls safe is counted too."""
    failed = run(card, [Workload(2048, 2048), Workload(1024, 1024, batch_size=8)])
    small = replace(failed[0], index=9, workload=Workload(256, 256))
    found = evaluate(predictor, [*failed, small])
    assert [(p.said_so, p.upper_said_so) for p in found.oom] == [(True, True), (True, True), (False, False)]
    assert all(p.cap_bytes == 8 << 30 for p in found.oom)
    assert "3 runs; the estimate lies above the cap for 2" in found.table()


def test_the_baseline_stands_beside_it(card: World) -> None:
    """Where two stages take turns, the plain four-term regression over whole runs is worse than the stages."""
    sweep = grid(attention="eager", sides=(256, 384, 512, 640, 768))
    free = World(1)
    f = Predictor(fit(file_of(free, run(free, sweep))))
    found = evaluate(f, run(free, [Workload(s, s, attention="eager") for s in (320, 456, 600, 700)]))
    plain = found.line("allocated", BASELINE, "plain four terms")
    assert plain.rows == 4 and plain.coverage is None
    assert plain.median_error > 100 * found.line().median_error


def test_stages_are_judged_by_themselves(predictor: Predictor, fresh: RecordsFile) -> None:
    """Each stage's own peak has its errors, over all runs in which it was recorded."""
    found = evaluate(predictor, fresh)
    assert {line.stage for line in found.stages} >= {"unet", "vae_decoder_blocks", "text_encoder"}
    assert all(line.rows == found.line().rows and abs(line.worst_error) < 0.05 for line in found.stages)


def test_what_is_skipped_is_counted(predictor: Predictor, fresh: RecordsFile) -> None:
    """Crashes, variants that were never swept and failures without a cap are counted with the reason."""
    crash = Record(90, Workload(512, 512), "crash")
    found = evaluate(predictor, [*fresh.records, crash])
    assert found.skipped == {"never swept: float32 sdpa": 1, "crashed": 1}
    assert "skipped: 1 rows, crashed" in found.table()


def test_it_turns_into_json(predictor: Predictor, fresh: RecordsFile) -> None:
    """The whole evaluation is JSON without infinities; an unbounded bound is null and said to be so in the table."""
    few = Predictor(
        replace(
            predictor.artifact, scores={m: {"": {"count": 9, "values": [0.0] * 9}} for m in predictor.artifact.scores}
        )
    )
    found = evaluate(few, fresh)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["points"][0]["high_bytes"] is None and values["simulated"] is True
    assert found.line().unbounded == found.line().rows and "unbounded" in found.table()


def test_size_classes() -> None:
    """Classes go by pixels and not by the longer side."""
    names = [size_class(Workload(h, w)) for h, w in ((512, 512), (520, 512), (1024, 256), (1024, 1024), (1032, 1024))]
    assert names == ["to 512²", "to 768²", "to 512²", "to 1024²", "above 1024²"]


def test_nothing_to_hold_it_against(predictor: Predictor, card: World) -> None:
    """Rows of variants that were never swept, and a level that is none, are refused with what would do."""
    with pytest.raises(RecordsError, match=r"1 never swept: float32 sdpa.*it knows: float16 eager, float16 sdpa"):
        evaluate(predictor, run(card, [Workload(512, 512, dtype="float32")]))
    with pytest.raises(InvalidWorkload, match="level is 95"):
        evaluate(predictor, [], 95)


def test_origin_is_never_guessed(predictor: Predictor, fresh: RecordsFile) -> None:
    """Records of a made-up card are simulated, those of a card measured, bare rows neither."""
    assert evaluate(predictor, fresh).source == "simulated"
    assert evaluate(predictor, replace(fresh, environment={"backend": "cuda"})).source == "measured"
    assert evaluate(predictor, fresh.records).source == "recorded"


def words_of(figure_of: Callable[..., Path], evaluation: Evaluation, tmp_path: Path) -> str:
    """The text of a figure, from its svg."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):
        return figure_of(evaluation, tmp_path / "figure.svg").read_text()


@pytest.mark.parametrize("draw", [plots.predicted_against_actual, plots.residuals])
def test_figures_say_what_they_show(
    draw: Callable[..., Path], predictor: Predictor, fresh: RecordsFile, tmp_path: Path
) -> None:
    """A figure of a trace says "simulated (trace)" and never "measured"; one of a card says "measured" and not the other."""
    traced = words_of(draw, evaluate(predictor, replace(fresh, environment={"backend": "trace"})), tmp_path)
    assert "simulated (trace)" in traced and "measured" not in traced and "float16 sdpa" in traced
    real = words_of(draw, evaluate(predictor, replace(fresh, environment={"backend": "cuda"})), tmp_path)
    assert "simulated" not in real and "measured" in real


def test_all_figures_are_drawn(predictor: Predictor, fresh: RecordsFile, tmp_path: Path) -> None:
    """draw_all writes two PNG files for each of the five metrics into a folder that it makes."""
    paths = plots.draw_all(predictor, fresh, tmp_path / "new" / "figures")
    assert len(paths) == 10 and all(p.read_bytes()[:4] == b"\x89PNG" for p in paths)


def test_many_variants_share_a_colour(predictor: Predictor, fresh: RecordsFile, tmp_path: Path) -> None:
    """More variants than colours: the rarest are drawn as one, and none is lost."""
    points = evaluate(predictor, fresh).points
    options = [
        {"dtype": d, "attention": a} for d in ("float16", "float32", "bfloat16") for a in ("sdpa", "eager", "sliced")
    ]
    many = [replace(p, workload=replace(p.workload, **options[i % 9])) for i, p in enumerate(points)]
    groups = plots._by_variant(many)
    assert len(groups) == plots.MOST_VARIANTS and sum(len(g[1]) for g in groups) == len(points)
    assert groups[-1][0] == "3 other variants"


def test_figures_that_cannot_be_drawn(predictor: Predictor, fresh: RecordsFile, tmp_path: Path) -> None:
    """A metric without points, an unknown ending and a folder that is none are one sentence each."""
    found = evaluate(predictor, fresh)
    bare = replace(found, points=tuple(p for p in found.points if p.metric == "allocated"))
    with pytest.raises(RecordsError, match="no run has 'required' to draw; there are: allocated"):
        plots.residuals(bare, tmp_path / "a.png", metric="required")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "a.xyz", tmp_path / "file" / "a.png"):
        with pytest.raises(SdfitError, match="cannot write the figure"):
            plots.residuals(found, path)
