"""Made-up cards are what the trace makes of their tables, to the byte, and few runs are held against them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
from sdfit.backends.trace.tracer import Tracer
from sdfit.errors import UnknownModel
from sdfit.predict.simulation.workspaces import ARCHITECTURES, Workspaces
from sdfit.study.lab import few
from sdfit.study.lab.cards import MADE_UP, MadeUp, drawn, skeleton, skeletons, strange
from sdfit.study.lab.few import Line
from sdfit.workload import Workload

TRIED = (
    Workload(256, 256, 77, 2),
    Workload(264, 520, 77, 2, 1.0, vae_slicing=True),
    Workload(640, 520, dtype="float32", vae_tiling=True),
)


def test_a_skeleton_with_a_table_is_the_trace_with_that_table(tmp_path: Path) -> None:
    """Slices, tiles and float32 too: each stage's peak to the byte; and a cache gives the same skeletons again."""
    bare, cache = Tracer(), tmp_path / "cache.jsonl"
    found = skeletons(TRIED, cache)
    assert skeletons(TRIED, cache) == found == [skeleton(w, bare) for w in TRIED]
    cards = [MadeUp("sm61", "", ARCHITECTURES["sm61"]), MADE_UP["both ways"], MADE_UP["widened"], MADE_UP["cublas"]]
    for card in cards:
        tracer = Tracer(Workspaces(card.architecture))
        for one in found:
            traced = tracer.run(one.workload)
            assert one.stage_peaks(card) == traced.stage_peaks
            record = card.record(0, one)
            assert (record.allocated_bytes, record.baseline_bytes) == (
                traced.peak_bytes,
                traced.weights_bytes + traced.unsplit_bytes,
            )


def test_made_up_cards_differ_from_the_prior_as_they_say() -> None:
    """None holds less, widened more, a constant as much more everywhere; a larger plan only for one image with room."""
    one, two = (skeleton(w, Tracer()) for w in (Workload(512, 512), Workload(512, 512, 77, 2)))
    usual = MadeUp("sm75", "", ARCHITECTURES["sm75"])

    def peak(name: str, run: object = one) -> int:
        return max(run.stage_peaks(MADE_UP[name]).values())  # type: ignore[attr-defined]

    base = max(one.stage_peaks(usual).values())
    assert peak("none") < peak("one way") < base < peak("larger plan") < peak("widened")
    assert peak("constant") == base + (100 << 20)
    assert peak("cublas") == base + 33_554_432 - 8_519_680
    assert peak("larger plan", two) == max(two.stage_peaks(usual).values()) < peak("both ways", two)


def test_a_drawn_card_is_the_same_again_and_others_differ() -> None:
    """By its seed alone; among twenty are cards with a constant, with a larger plan, and with neither."""
    found = [drawn(seed) for seed in range(20)]
    assert [card.architecture for card in found] == [drawn(seed).architecture for seed in range(20)]
    assert len({str(card.architecture.facts()) for card in found}) > 15
    one = skeleton(TRIED[0], Tracer())
    assert strange(1).record(0, one) == strange(1).record(0, one) != strange(2).record(0, one)
    assert {card.constant_bytes > 0 for card in found} == {card.larger is None for card in found} == {True, False}


def line(**changed: object) -> Line:
    counts = dict.fromkeys(few.COUNTS, 0.004)
    plain = {
        "card": "made up", "prior": "sm75", "workloads": 500, "planned": counts, "at_random": counts, "planned_grid": counts,
        "at_random_grid": 0.1, "worst_at": "256x256 x1 unet", "full": 0.001, "full_grid": 0.01, "coverage": 0.97, "coverage_grid": 0.96, "width": 0.02,
        "matched": 1.0, "scale": 1.0,
    }  # fmt: skip
    return Line(**plain | changed)  # type: ignore[arg-type]


def test_what_sixteen_runs_are_to_reach() -> None:
    """Half a percent, or one and a half times the full grid's error; the table and --json say whether."""
    counts = dict.fromkeys(few.COUNTS, 0.006)
    assert line().reached and line().reached_grid
    assert not line(planned=counts).reached and line(planned=counts, full=0.0041).reached
    shown = few.table([line(planned=counts)])
    assert "made up" in shown and "0.60 %" in shown and " no " in shown and "simulated" in shown
    assert few.to_dict([line()])[0]["reached"] is True
    brief = few.table([line(planned={few.WANTED: 0.004}, at_random={}, at_random_grid=None)])
    assert "16 runs" in brief and "at random" not in brief and "8 runs" not in brief


def test_cards_are_asked_for_by_name() -> None:
    """Made up, traced and drawn ones, each with its prior; another is refused in a sentence that says which there are."""
    assert few.card_of("none") == (MADE_UP["none"], few.PRIOR)
    assert few.card_of("sm75")[1] == "sm70"
    assert [few.card_of(name)[0].name for name in ("drawn 7", "strange 3")] == ["drawn 7", "strange 3"]
    for name in ("drawn", "drawn x", "sm99"):
        with pytest.raises(UnknownModel, match=r"larger plan.*drawn 100"):
            few.card_of(name)


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    """One panel a card, in a PNG."""
    pytest.importorskip("matplotlib")
    path = few.draw([line(), line(card="other")], tmp_path / "few.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
