"""A card's kernels read off its memory snapshot: what was put into made-up cards comes out again, to the byte."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from recorded import Holds, Recorder, run_on, write

from sdfit.backends.trace.backend import TraceBackend
from sdfit.backends.trace.tables import read_table, write_table
from sdfit.backends.trace.tracer import Tracer
from sdfit.equation.weights import rounded
from sdfit.errors import SdfitError, SnapshotError
from sdfit.predict.simulation.shapes import Shapes
from sdfit.predict.simulation.workspaces import ARCHITECTURES, Architecture, Measured, Rule, Workspaces
from sdfit.study.calibration.calibrate import _allocations, calibrate
from sdfit.study.calibration.calibration import Calibration
from sdfit.study.calibration.figure import draw, traced_live
from sdfit.study.calibration.operations import Ran, TracedRun, operations_of
from sdfit.study.calibration.report import Report, report
from sdfit.study.calibration.rules import architecture_of, explained, followed, predicted
from sdfit.study.calibration.snapshot import Event, Frame, read
from sdfit.study.lab.snapshots import lines_of, names
from sdfit.units import MIB
from sdfit.workload import Workload

CUBLAS = 8_519_680
HALF = ("float16", "bfloat16")
CARDS: dict[str, tuple[Rule, ...]] = {
    "copies both ways": (Rule(HALF, ("input", "output", "weight"), "", only="aligned"),),
    "copies one way": (Rule(HALF, ("input", "weight"), "", only="aligned"),),
    "nothing": (),
    "in float32": (Rule(HALF, ("input", "output", "weight"), "", element_bytes=4),),
    "another constant": (Rule(HALF, ("input", "output", "weight"), "", only="aligned", pad_bytes=2048),),
    "one layer apart, batched": (
        Rule(HALF, (), "", min_batch=2, channels=(256, 256)),
        Rule(HALF, ("input", "weight"), "", only="aligned"),
    ),
    "other kernels on small maps": (
        Rule(HALF, (), "", only="aligned", max_pixels=16 * 16),
        Rule(HALF, ("input", "output", "weight"), "", only="aligned"),
    ),
    "Winograd where the filter is large": ARCHITECTURES["sm61"].rules,
}
"""Kernels as cards might have them."""
VARIANTS: tuple[dict[str, Any], ...] = (
    {}, {"batch_size": 2}, {"dtype": "float32"}, {"attention": "eager"}, {"attention": "math"}, {"attention": "sliced"},
    {"vae_slicing": True, "batch_size": 2}, {"vae_tiling": True, "height": 576}, {"vae": "tiny"},
    {"safety_checker": False, "guidance_scale": 1.0}, {"offload": "model"},
)  # fmt: skip
tracer = Tracer()


@cache
def traced(**options: Any) -> TracedRun:
    return operations_of(tracer, Workload(**{"height": 256, "width": 256, **options}))


def kernels_of(architecture: Architecture) -> Holds:
    """Convolutions as the architecture has them; the request is a little less than what is rounded up to it."""

    def holds(ran: Ran) -> Sequence[int]:
        held = predicted(architecture, ran.shapes)
        return (held - 37,) if held else ()

    return holds


def unlike_any(seed: int) -> Holds:
    """Convolutions, products and attention that hold what no rule says, in one block or two, or nothing."""

    def holds(ran: Ran) -> Sequence[int]:
        if ran.shapes.operation not in ("convolution", "addmm", "mm", "empty", "bmm", "baddbmm"):
            return ()
        rng = random.Random(f"{seed} {ran.shapes}")
        return [rng.randrange(1, 40 * MIB) for _ in range(rng.choice((0, 1, 1, 2)))]

    return holds


def snapshot_of(run: TracedRun, tmp_path: Path, *, loaded: bool = True, **how: Any) -> Any:
    """Let a run happen on a made-up card and read what it wrote."""
    card = Recorder()
    run_on(card, run, cublas_bytes=CUBLAS, **how)
    return read(write(tmp_path / "s.pickle", card.snapshot()))


def put_in(run: TracedRun, holds: Holds) -> dict[Shapes, int]:
    """What each kernel of a run was made to hold."""
    return {ran.shapes: sum(map(rounded, holds(ran))) for ran in run.operations if ran.made}


def check(found: Calibration, run: TracedRun, holds: Holds) -> None:
    wanted = put_in(run, holds)
    got = {k.shapes: k.held_bytes for k in found.kernels}
    assert {shapes: got.get(shapes, 0) for shapes in wanted} == wanted
    assert all(kernel.always for kernel in found.kernels)
    times = Counter(ran.shapes for ran in run.operations if ran.made)
    assert {k.shapes: k.times for k in found.kernels} == {s: times[s] for s in got}


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "no frames"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_workspace_comes_out_to_the_byte(options: dict[str, Any], frames: bool, tmp_path: Path) -> None:
    """Of kernels unlike any rule, in every variant, with frames or without: what they hold, and how often each ran."""
    run, holds = traced(**options), unlike_any(3)
    found = calibrate(snapshot_of(run, tmp_path, holds=holds, frames=frames), run)
    assert (found.found, found.frames, found.failures) == (found.of, frames, 0)
    check(found, run, holds)
    assert found.cublas_bytes == CUBLAS
    assert found.placed[0] == found.placed[1] > 1500
    assert not [p for p in found.partings if p.operation in ("convolution", "addmm", "mm")]


@pytest.mark.parametrize("kind", CARDS)
def test_two_runs_give_the_rules_of_a_card(kind: str, tmp_path: Path) -> None:
    """From one image and two of one size come rules that hold at sizes that were not seen, and a trace that is the card."""
    truth = Architecture("truth", (), CARDS[kind], CUBLAS)
    pairs = []
    for options in ({}, {"batch_size": 2}):
        run = traced(**options)
        pairs.append((calibrate(snapshot_of(run, tmp_path, holds=kernels_of(truth)), run, card="truth"), run))
        check(pairs[-1][0], run, kernels_of(truth))
    told = report(pairs, name="truth", base=None, evidence="two runs")
    right, of = followed(told.architecture)
    assert right == of or (
        kind.startswith("Winograd") and right > 0.97 * of
    )  # it depends on sizes and channels at once
    for beside in told.besides:
        assert beside.after == beside.card
        assert beside.reserved[2] == beside.reserved[0]
    if kind in ("other kernels on small maps", "Winograd where the filter is large"):
        return  # where between two sizes a kernel changes is not in two runs
    unseen = traced(height=320, width=448, batch_size=3)
    table = read_table(write_table(told.architecture, tmp_path / "table.json"))
    for ran in unseen.operations:
        if ran.shapes.operation == "convolution":
            assert predicted(table, ran.shapes) == predicted(truth, ran.shapes), ran.shapes


def test_what_is_there_before_the_run_is_told_apart(tmp_path: Path) -> None:
    """Weights that were there already, cuBLAS, somebody's own block: from the segments alone, remainders and all."""
    run = traced()
    card = Recorder()
    card.on = False
    run_on(card, run, cublas_bytes=CUBLAS)  # a first run, unseen, which leaves the weights
    card.alloc(3 * MIB + 5)
    card.empty_cache()
    card.on = True
    remainders = sum(block.size_bytes - rounded(size) for block, size, _ in card.live.values())
    again = TracedRun(run.workload, run.operations, without_weights(run), (), run.traced)
    run_on(card, again, holds=unlike_any(1))
    found = calibrate(read(write(tmp_path / "s.pickle", card.snapshot())), run)
    check(found, run, unlike_any(1))
    assert found.weights_bytes == sum(map(rounded, run.weights))
    assert found.unsplit_bytes == remainders > 29_000_000
    assert found.cublas_bytes == CUBLAS
    assert [(s.what, s.blocks, s.requested_bytes) for s in found.standing] == [
        ("cuBLAS", 1, CUBLAS),
        ("no frames", 1, 3 * MIB + 5),
    ]


def without_weights(run: TracedRun) -> list[tuple[int, int]]:
    made = {made.block for ran in run.operations for made in ran.made}
    return [event for event in run.events if event[0] in made]


def test_of_several_runs_in_a_file_one_is_taken(tmp_path: Path) -> None:
    """Another size before, the same one twice: the last is read, and only it."""
    run, other = traced(), traced(batch_size=2)
    card = Recorder()
    run_on(card, other, cublas_bytes=CUBLAS)
    for seed in (5, 6):
        again = TracedRun(run.workload, run.operations, without_weights(run), (), run.traced)
        run_on(card, again, holds=unlike_any(seed))
    found = calibrate(read(write(tmp_path / "s.pickle", card.snapshot())), run)
    assert found.found == found.of
    check(found, run, unlike_any(6))


def test_a_history_without_its_beginning_gives_what_it_has(tmp_path: Path) -> None:
    """As with max_entries: the last two thirds of the events, and no workspace that was not put in."""
    run, holds = traced(), unlike_any(4)
    card = Recorder()
    run_on(card, run, holds=holds)
    content = card.snapshot()
    content["device_traces"] = [content["device_traces"][0][len(card.events) // 3 :]]
    found = calibrate(read(write(tmp_path / "s.pickle", content)), run)
    assert 0.5 < found.found / found.of < 1
    wanted = put_in(run, holds)
    kernels = {k.shapes: k.held_bytes for k in found.kernels if wanted[k.shapes]}
    assert len(kernels) > 60
    assert kernels == {shapes: wanted[shapes] for shapes in kernels}
    # where the history begins, a latent's own arithmetic may stand for another step's
    assert all(k.path == "pipeline" for k in found.kernels if k.held_bytes and not wanted[k.shapes])


def test_small_blocks_beside_results_are_partings_and_not_workspaces(tmp_path: Path) -> None:
    """What fused attention and normalisation make beside their results on a card is named by operation and place."""

    def holds(ran: Ran) -> Sequence[int]:
        if ran.shapes.operation == "native_group_norm":
            return (4 * ran.shapes.inputs[0][0] * ran.shapes.inputs[0][1],) * 2
        return (16, 8) if ran.shapes.operation == "empty" else ()

    run = traced()
    found = calibrate(snapshot_of(run, tmp_path, holds=holds), run)
    parted = Counter({p.operation: 0 for p in found.partings})
    for p in found.partings:
        assert p.whose == "card" and ":" in p.place
        parted[p.operation] += p.times
    times = Counter(ran.shapes.operation for ran in run.operations if ran.made)
    assert parted == {op: 2 * times[op] for op in ("native_group_norm", "empty")}
    assert not any(k.held_bytes for k in found.kernels if k.shapes.operation in ("convolution", "addmm", "mm"))


def test_contiguous_copies_before_a_result_belong_to_its_operation(tmp_path: Path) -> None:
    """A copy that a convolution makes of its input, before its result, is told from what the operation before held."""

    def before(ran: Ran) -> Sequence[int]:
        return (ran.made[0].requested_bytes + 512,) if ran.shapes.operation == "convolution" else ()

    run = traced()
    for frames in (True, False):
        found = calibrate(snapshot_of(run, tmp_path, before=before, frames=frames), run)
        wanted = put_in(run, before)
        assert {k.shapes: k.held_bytes for k in found.kernels if k.held_bytes} == {s: h for s, h in wanted.items() if h}


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "no frames"])
@pytest.mark.parametrize(
    "options",
    [
        {"height": 320},
        {"height": 512, "width": 512},
        {"batch_size": 3},
        {"dtype": "float32"},
        {"attention": "eager", "height": 512},
    ],
    ids=str,
)
def test_another_run_than_the_one_named_is_refused(options: dict[str, Any], frames: bool, tmp_path: Path) -> None:
    """One sentence with what was looked for, how much of it was found, and what to say."""
    snapshot = snapshot_of(traced(), tmp_path, frames=frames)
    with pytest.raises(SnapshotError, match=r"this is no run of .*--height.*another model") as error:
        calibrate(snapshot, traced(**options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", names())
def test_another_models_history_is_refused(name: str, tmp_path: Path) -> None:
    """Every published list, as a snapshot: few of its blocks are ours, and the sentence says so."""
    events = [
        {"action": row["action"], "addr": int(row["offset"] or 0), "size": int(row["size_bytes"] or 0), "frames": []}
        for row in lines_of(name)
        if not row["action"].startswith("start_")
    ]
    path = write(tmp_path / "s.pickle", {"segments": [], "device_traces": [events]})
    with pytest.raises(SnapshotError, match="another model"):
        calibrate(read(path), traced())


def told(tmp_path: Path) -> tuple[Report, list[tuple[Calibration, TracedRun]]]:
    truth = ARCHITECTURES["sm70"]
    run = traced()
    pairs = [(calibrate(snapshot_of(run, tmp_path, holds=kernels_of(truth)), run, card="v100"), run)]
    return report(pairs, name="v100", base=ARCHITECTURES["sm75"], evidence="one run", word="simulated"), pairs


def test_the_text_says_what_was_found_and_that_it_is_simulated(tmp_path: Path) -> None:
    """Kernels with what they hold, what the prior says and what that is made of; nothing made up is called measured."""
    found, _ = told(tmp_path)
    text = found.to_text()
    assert "measured" not in text.replace("measured convolutions", "")
    assert "trace as sm75" in text and "with this table" in text
    assert "input + weight + 512 B" in text
    assert text.count("to the byte") > 8
    values = found.to_dict()
    assert values["source"] == "simulated"
    row = next(k for k in values["runs"][0]["kernels"] if k["held_bytes"])
    assert row["table_bytes"] > row["held_bytes"]  # sm75 copies both ways


def test_the_figure_is_of_what_the_tracer_says(tmp_path: Path) -> None:
    """The traced curve's peak is the tracer's own with the same table, and the card's is the one calibrated."""
    pytest.importorskip("matplotlib")
    found, ((calibration, run),) = told(tmp_path)
    path = draw(calibration, run, found.architecture, tmp_path / "f.png", word="simulated")
    assert path.stat().st_size > 20_000
    standing = CUBLAS + calibration.unsplit_bytes
    peak = max(live for _, live in traced_live(run, found.architecture, standing))
    with_table = Tracer(Workspaces(found.architecture)).run(run.workload)
    assert peak == with_table.peak_bytes == max(calibration.card_peaks.values())


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """Rules, measured rows, words: the twin gives the same table, and damage is one sentence."""
    found, _ = told(tmp_path)
    path = write_table(found.architecture, tmp_path / "t.json")
    assert read_table(path) == found.architecture
    text = path.read_text()
    for old, new in (
        ('"sdfit_workspaces": 1', '"sdfit_workspaces": 2'),
        ('"copies"', '"copy"'),
        ("8519680", "-1"),
        ("{", ""),
    ):
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(SdfitError, match="cannot read the workspace table"):
            read_table(path)


def test_a_trace_takes_the_table(tmp_path: Path) -> None:
    """The backend with the file gives the card's reserved and allocated memory, and names its table in the records."""
    found, ((calibration, run),) = told(tmp_path)
    path = write_table(found.architecture, tmp_path / "t.json")
    backend = TraceBackend("v100", kernels=str(path))
    row = backend.measure(run.workload)
    assert row["stage_peaks_bytes"] == calibration.card_peaks
    assert row["reserved_bytes"] == calibration.reserved_bytes
    assert backend.environment()["workspaces"].startswith("v100 ")
    assert backend.environment()["workspaces"] != TraceBackend("sm70", workspaces=True).environment()["workspaces"]


# -- real cards, as far as their layers can be told --


def resnet(name: str) -> list[Measured]:
    """The convolutions of ResNet-50 on a V100, float32, cudnn.benchmark on: what a call held beside its result."""
    found = []
    for row in lines_of(name):
        if row["op"] != "cudnn_convolution":
            continue
        image, weight = (tuple(shape) for shape in json.loads(row["input_dims"]))
        result, *held = json.loads(row["memory_events_bytes"].split(";")[0].partition("x")[2])
        pixels = min(
            (side for side in (112, 56, 28, 14, 7)), key=lambda side: abs(4 * image[0] * weight[0] * side**2 - result)
        )
        shapes = Shapes("convolution", "float32", (image, weight), (image[0], weight[0], pixels, pixels))
        found.append(Measured(shapes, rounded(held[0]) if held else 0))
    return found


RESNET = {
    "resnet50-234cf2": {"nothing": 14, "winograd": 2, "unexplained": 7},
    "resnet50-383a06": {"nothing": 11, "winograd": 2, "unexplained": 10},
}
"""Two runs of one benchmark that chose other plans. The lists have block sizes: a third Winograd layer's block is 640 KiB
larger than its tiles, a remainder that was not split, and so is told only by its neighbours."""


@pytest.mark.parametrize("name", RESNET)
def test_the_rules_of_a_real_card_as_far_as_they_can_be_told(name: str) -> None:
    """Of ResNet-50 on a V100, the published lists with shapes: Winograd's tiles in two layers, nothing in most.

    What the rest hold is no sum of copies; it stands by its shapes. No model of ours has any of these layers.
    """
    rows = resnet(name)
    forms = explained(rows)
    kinds = Counter("unexplained" if form is None else " + ".join(form.copies) or "nothing" for form in forms.values())
    assert kinds == RESNET[name]
    table = architecture_of(rows, name="v100", cublas_bytes=CUBLAS, evidence=name)
    kept = {m.shapes: m.held_bytes for m in table.measured}
    assert kept == {m.shapes: m.held_bytes for m in rows}
    for shapes, form in forms.items():
        if form is not None:
            assert predicted(table, shapes) == kept[shapes]


PASSING = {
    "mercury-e171b6": {("gemm_and_bias", 1_048_576): 168},
    "hugepanda-796241": {("run_conv_plan", 4_194_304): 20, ("run_conv_plan", 134_217_728): 25},
    "hugepanda-e02449": {},
    "silmont-769df2": {},
}
"""Blocks that a library's kernel made and freed before the next block was made, in the lists of real cards."""


@pytest.mark.parametrize("name", PASSING)
def test_what_lists_without_shapes_tell(name: str) -> None:
    """Who made a block, and that it passed: cuBLASLt's 1 MiB in every product with a bias, plans of 4 and 128 MiB, or nothing."""
    lines = [row for row in lines_of(name) if not row["action"].startswith("start_")]
    events = [
        Event(r["action"], int(r["offset"] or 0), int(r["size_bytes"] or 0), 0, (Frame(r["native"], "", 0),))
        for r in lines
    ]
    found = Counter(
        (a.event.stack[0].name, a.event.size_bytes)
        for a, following in pairwise(_allocations(events))
        if a.gone < following.at and a.event.stack[0].name in ("gemm_and_bias", "run_conv_plan")
    )
    assert found == PASSING[name]
