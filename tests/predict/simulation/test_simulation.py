"""A simulated run is the traced one: every allocation and free, in order; and what the shipped records say, to the byte."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from simulated import drawn

from sdfit.errors import SdfitError
from sdfit.files import shipped
from sdfit.predict.simulation.library import FILE, LARGEST_BYTES, Library, NotSimulated, shipped_library
from sdfit.predict.simulation.modules import Modules
from sdfit.predict.simulation.needed import MOST_SLICES, Needed, alike, least_bytes
from sdfit.predict.simulation.programs import ALL_SLICES, UNET
from sdfit.predict.simulation.replay import replay, smallest_cap, without
from sdfit.predict.simulation.simulate import Simulator
from sdfit.predict.simulation.vae import vae_calls
from sdfit.predict.simulation.workspaces import ARCHITECTURES, Architecture, Workspaces, workspaces_for
from sdfit.records import read
from sdfit.sweep.grid import load
from sdfit.workload import Workload

SEED = 20261128
OLDER_REPLAY = ("sm90",)
"""What these records say of reserved, required and minimum memory is an older replay's: one row in seven differs, from today's
trace too."""
EDGES = [
    Workload(520, 776, 154, 3),
    Workload(1096, 904, batch_size=2, attention="eager", vae_slicing=True),
    Workload(1024, 768, dtype="float32", vae_tiling=True, offload="model"),
    Workload(1000, 1300, 100, 3, 1.0, "bfloat16", "math", vae_tiling=True, vae_slicing=True, offload="model"),
    Workload(72, 136, 231, 2, vae="tiny", safety_checker=False),
    Workload(264, 328, 100, 3, attention="sliced", dtype="float32"),
    Workload(64, 328, batch_size=2, attention="math"),
    Workload(776, 256, vae_tiling=True, attention="eager"),
    Workload(128, 192, batch_size=1, attention="sliced_8"),
    Workload(264, 328, 100, 3, dtype="float32", attention="sliced", offload="sequential"),
    Workload(584, 712, batch_size=2, attention="eager", vae_tiling=True, vae_slicing=True, offload="sequential"),
    Workload(256, 320, 77, 1, 1.0, "bfloat16", "sliced_max", offload="group_block", safety_checker=False),
    Workload(392, 264, 231, 2, attention="math", vae_slicing=True, offload="group_block"),
    Workload(576, 648, 154, 2, 1.0, vae="tiny", offload="sequential"),
    Workload(776, 520, vae="tiny", dtype="float32", vae_tiling=True, offload="group_leaf"),
    Workload(520, 1032, batch_size=2, vae="tiny", dtype="float32", vae_tiling=True, vae_slicing=True),
]


def assert_equal(workload, architecture, tracer, simulator):
    """With the events and without."""
    expected, got = tracer.run(workload, keep_events=True), simulator.run(workload, keep_events=True)
    assert got.renumbered() == expected.renumbered(), (architecture, workload)
    assert got.is_like(expected), (architecture, workload)
    assert simulator.run(workload).stage_peaks == expected.stage_peaks, (architecture, workload)


def held_against_a_trace(workloads, architecture):
    """Simulate and trace each, without workspaces where there is no architecture."""
    pytest.importorskip("diffusers")
    from sdfit.backends.trace.tracer import Tracer

    workspaces = None if architecture is None else workspaces_for(architecture)
    tracer, simulator = Tracer(workspaces), Simulator(workspaces)
    for workload in workloads:
        assert_equal(workload, architecture, tracer, simulator)


@pytest.mark.parametrize(
    "workload", EDGES, ids=lambda w: " ".join(map(str, (w.height, w.width, w.attention, w.vae, w.offload)))
)
def test_a_simulated_run_is_the_traced_one(workload):
    """Every allocation and free, in order; every stage's peak; which blocks are workspaces."""
    held_against_a_trace([workload], "sm75")


@pytest.mark.parametrize("architecture", [None, "sm61"])
def test_without_workspaces_and_on_another_architecture(architecture):
    """Pascal's table has plans for convolutions of 1x1, and one that only some sizes take."""
    held_against_a_trace([Workload(328, 264, 90, 2, vae_slicing=True)], architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm61", "sm70", "sm75", "sm90"])
def test_a_drawn_sample(architecture):
    """Every covered variant is drawn from; with a seed."""
    held_against_a_trace(drawn(SEED + int(architecture[2:]), 60), architecture)
    print(f"seed {SEED}: 60 workloads equal event by event on {architecture}")


@pytest.mark.slow
def test_more_steps_are_simulated_too():
    """From five steps on the scheduler keeps all the history that it uses."""
    pytest.importorskip("diffusers")
    from sdfit.backends.trace.tracer import Tracer

    for steps in (1, 3, 6):
        tracer, simulator = Tracer(num_inference_steps=steps), Simulator(num_inference_steps=steps)
        assert_equal(Workload(256, 192, batch_size=2), None, tracer, simulator)


def recorded_files(*grids):
    """The simulated records that are shipped, of these grids or of all."""
    found = sorted(Path(shipped("data")).glob("sm*/*-trace.jsonl.gz"))
    return [path for path in found if not grids or any(f"-{grid}-" in path.name for grid in grids)]


def rows_of(path):
    """A file's rows; those of float32 left out if its workspaces are of an older table, which had other rules for them."""
    architecture, file = ARCHITECTURES[path.parent.name], read(path)
    today = file.environment["workspaces"] == workspaces_for(architecture.name).label
    return [record for record in file.records if today or record.workload.dtype != "float32"]


def simulated(simulator, record, *, keep_events):
    """The run of a record, None where it is not simulated."""
    try:
        return simulator.run(record.workload, keep_events=keep_events)
    except NotSimulated:
        return None


def assert_recorded(run, record, architecture):
    """Stage peaks, and what the allocator makes of the run, are what the record says."""
    assert (run.stage_peaks, run.peak_bytes) == (record.stage_peaks_bytes, record.allocated_bytes), record.workload
    if run.events is None or architecture in OLDER_REPLAY:
        return
    assert replay(run.events).reserved_bytes == record.reserved_bytes, record.workload
    assert smallest_cap(run.events) == record.required_bytes, record.workload
    assert smallest_cap(without(run.events, run.workspaces)) == record.minimum_bytes, record.workload


@pytest.mark.parametrize(
    "path", recorded_files("default", "holdout"), ids=lambda path: f"{path.parent.name} {path.name}"
)
def test_the_shipped_records_are_simulated_to_the_byte(path):
    """Stage peaks and what was allocated, of every covered row; reserved and required memory of every hundredth."""
    simulator, count = Simulator(workspaces_for(path.parent.name)), 0
    for number, record in enumerate(rows_of(path)):
        run = simulated(simulator, record, keep_events=number % 100 == 50)
        if run is not None:
            assert_recorded(run, record, path.parent.name)
            count += 1
    assert count > 20


@pytest.mark.slow
@pytest.mark.parametrize("path", recorded_files(), ids=lambda path: f"{path.parent.name} {path.name}")
def test_all_of_the_shipped_records(path):
    """Reserved, required and minimum memory of every covered row: minutes."""
    simulator, count = Simulator(workspaces_for(path.parent.name)), 0
    for record in rows_of(path):
        run = simulated(simulator, record, keep_events=True)
        if run is not None:
            assert_recorded(run, record, path.parent.name)
            count += 1
    print(f"{path.name}: {count} rows equal to the byte")


@pytest.mark.parametrize(
    "options",
    [{"execution": "tf32"}, {"vae": "tiny", "offload": "group_block"}, {"vae": "tiny", "vae_tiling": True},
     {"height": 64, "width": 64}, {"batch_size": 1024, "attention": "sliced_max"}, {"batch_size": 1024, "vae_slicing": True},
     {"height": 16384, "width": 16384, "batch_size": 4, "vae_slicing": True, "vae_tiling": True}],
    ids=str,
)  # fmt: skip
def test_what_is_not_written_out_is_said(options):
    """Nothing is guessed."""
    with pytest.raises(NotSimulated):
        Simulator(workspaces_for("sm75")).run(Workload(**({"height": 512, "width": 512} | options)), keep_events=True)


@pytest.mark.parametrize("events", [True, False])
def test_how_often_the_vae_is_called_is_known_before(monkeypatch, events):
    """By slices and tiles of either VAE: what is counted beforehand is what a run does; so it is with the UNet."""
    called, once = Counter(), Modules._once_per_shape

    def counted(self, kind, lengths, shape):
        called[kind, lengths] += 1
        return once(self, kind, lengths, shape)

    monkeypatch.setattr(Modules, "_once_per_shape", counted)
    simulator = Simulator(None)
    for w in [*drawn(SEED + 4, 14), Workload(1800, 700, batch_size=9, vae_slicing=True, vae_tiling=True)]:
        called.clear()
        simulator.run(w, keep_events=events)
        unet = {key: count for key, count in called.items() if key[0] == UNET}
        assert called - Counter(unet) == {
            (kind, lengths): count for kind, lengths, count in vae_calls(w, every=events)
        }, w
        assert unet == {(UNET, (w.unet_batch, w.effective_height // 8, w.effective_width // 8, w.tokens)): 3}, w


def test_a_run_too_long_is_refused_before_it_begins(monkeypatch):
    """Of one that goes on for too long nothing is called."""
    monkeypatch.setattr(Modules, "_plays", None)
    with pytest.raises(NotSimulated, match="too long"):
        Simulator(workspaces_for("sm75"), most_slices=MOST_SLICES).order(
            Workload(256, 256, batch_size=700, vae_slicing=True, attention="sliced")
        )


@pytest.mark.parametrize("attention", ["sliced_max", "sliced_2", "sliced"])
@pytest.mark.parametrize("offload", ["none", "sequential", "group_block"])
def test_slices_beyond_the_first_need_nothing_more(attention, offload):
    """Played in full or not, the run takes the same of the card, with workspaces and without, whether there is room or not."""
    w = Workload(392, 264, batch_size=9, attention=attention, offload=offload)
    needs = []
    for most in (MOST_SLICES, ALL_SLICES):
        run = Simulator(workspaces_for("sm75"), most_slices=most).run(w, keep_events=True)
        bare = without(run.events, run.workspaces)
        needs.append((run.stage_peaks, replay(run.events).reserved_bytes, smallest_cap(run.events), smallest_cap(bare)))
        needs[-1] += (len(run.events),)
    assert needs[0][:-1] == needs[1][:-1] and needs[0][-1] < needs[1][-1]


@pytest.mark.parametrize(
    "options",
    [
        {"height": 2952, "width": 520, "offload": "model"},
        {"height": 584, "width": 1976, "vae": "tiny", "dtype": "float32"},
        {"height": 520, "width": 2952, "batch_size": 8, "vae_slicing": True, "offload": "sequential"},
    ],
    ids=str,
)
def test_a_few_tiles_of_each_row_tell_what_is_live(options):
    """And a few of the images that go one by one: each stage's peak is that of all of them."""
    w, simulator = Workload(**options, vae_tiling=True), Simulator(workspaces_for("sm75"), one_pixel=True)
    few, every = (simulator.run(w, keep_events=keep) for keep in (False, True))
    assert few.stage_peaks == every.stage_peaks and few.resident_bytes == every.resident_bytes
    assert (few.peak_bytes, few.requested_bytes) == (every.peak_bytes, every.requested_bytes)


def test_events_in_arrays_are_the_same():
    """Those of each run in order, and the most that is live of them; without workspaces those of a table without them."""
    table = workspaces_for("sm75")
    simulator, bare = Simulator(table), Simulator(table.bare())
    for w in drawn(SEED + 1, 8):
        run, order = simulator.run(w, keep_events=True), simulator.order(w)
        assert order.listed() == run.events and order.requested_bytes == run.requested_bytes, w
        sizes = [size for _, size in without(run.events, run.workspaces)]
        assert bare.order(w).changes.tolist() == sizes, w


def test_a_question_is_answered_as_the_smallest_cap_says():
    """Whether a cap suffices, at the smallest one, below it and far from it, of every metric; over drawn runs, with a seed."""
    needed, step = Needed("sm75"), 2 << 20
    for w in drawn(SEED + 2, 3):
        for metric in ("required", "minimum", "reserved", "allocated"):
            value = needed(w, metric)
            for cap in (value // 2, value - step, value - 1, value, value + 50 * step, 2 * value):
                assert needed.suffices(w, metric, cap) == (value <= cap), (w, metric, cap - value)


def test_no_run_takes_less_than_its_least():
    """What is known of a run before it is simulated; over drawn ones, with a seed. Of large images it is nearly all."""
    simulator = Simulator(None)
    runs = [(w, simulator.run(w)) for w in drawn(SEED, 300)]
    assert all(least_bytes(w) <= run.requested_bytes for w, run in runs)
    large = Workload(2040, 2048)
    assert least_bytes(large) > 0.998 * simulator.run(large).requested_bytes


def test_an_image_that_lies_takes_what_it_takes_upright():
    """Event by event, whatever the kernels hold; but for tiles, of which some do not."""
    simulators = [Simulator(workspaces_for(name)) for name in ("sm61", "sm70", "sm75", "sm89")]
    turned = [(w, replace(w, height=w.width, width=w.height)) for w in drawn(SEED + 3, 28)]
    assert all((alike(w) == alike(other)) == (w.height == w.width or not w.vae_tiling) for w, other in turned)
    for number, (w, other) in enumerate(turned):
        if alike(w) == alike(other):
            one, two = (simulators[number % 4].order(each) for each in (w, other))
            assert (one.blocks.tolist(), one.changes.tolist()) == (two.blocks.tolist(), two.changes.tolist()), w
            assert (one.calls, one.beginning) == (two.calls, two.beginning)


def test_measured_kernels_are_left_to_the_trace():
    """Programs know convolutions; what a matrix product holds they cannot tell."""
    table = Architecture("sm75", (), (), 0, products=(("addmm", 512),))
    with pytest.raises(NotSimulated):
        Simulator(Workspaces(table)).run(Workload(512, 512))


def test_what_is_not_simulated_is_not_needed_either():
    """The question is left to whoever asked, and a card that nobody knows is refused at once."""
    with pytest.raises(NotSimulated):
        Needed("sm75")(Workload(512, 512, execution="tf32"), "required")
    with pytest.raises(SdfitError):
        Needed("no such card")


def test_the_library_is_small_and_comes_back():
    """Read and written again, the file is the same; it is a tenth of what is allowed."""
    content = FILE.read_bytes()
    assert Library.from_bytes(content).to_bytes() == content
    assert len(content) < LARGEST_BYTES / 10


@pytest.mark.parametrize("position", range(3))
def test_programs_are_found_again(position):
    """A seeded part of them, from the modules themselves; and of bfloat16 what float16 takes."""
    import random

    pytest.importorskip("diffusers")
    from sdfit.backends.trace.tracer import Tracer
    from sdfit.study.lab.programs import found, keys

    assert list(shipped_library().programs) == keys()
    key = random.Random(SEED).sample(keys(), 3)[position]
    tracer, known = Tracer(), shipped_library().programs[key]
    for dtype in (key.dtype,) if key.dtype == "float32" else ("float16", "bfloat16"):
        again = found(tracer, key, dtype)
        assert (again.steps.tolist(), again.products.tolist()) == (known.steps.tolist(), known.products.tolist())
        assert (again.layers, again.marks, again.made) == (known.layers, known.marks, known.made)
        assert (again.calls.tolist(), again.modules.tolist()) == (known.calls.tolist(), known.modules.tolist())


def test_what_each_module_brings_is_found_again():
    """By the hooks themselves, under each offload; and all of a component's weights come with one module or another."""
    pytest.importorskip("diffusers")
    from sdfit.backends.trace.tracer import Tracer
    from sdfit.study.lab.programs import brought

    known = shipped_library()
    assert dict(brought(Tracer())) == known.brought
    for (name, offload), of_modules in known.brought.items():
        moving = sorted(weight for which in of_modules.values() for weight in which)
        left = len(known.weights["float16", name]) - len(moving)
        assert len(set(moving)) == len(moving) and left == (offload == "sequential" and name in WITH_BUFFERS)


WITH_BUFFERS = ("text_encoder", "safety_checker")
"""Their position ids, which sequential offload leaves on the card."""


@pytest.mark.slow
def test_all_programs_are_found_again():
    """The file, byte for byte."""
    pytest.importorskip("diffusers")
    from sdfit.study.lab.programs import library

    assert library().to_bytes() == FILE.read_bytes()


PROGRAM = """
import sys, warnings
warnings.simplefilter("ignore")
import sdfit
f = sdfit.load("t4")
peak = f(768, 512, metric="required", attention="eager")
assert peak.to_dict()["replayed"]
print(*sorted({name.split(".")[0] for name in sys.modules} & {"torch", "diffusers", "transformers", "scipy", "joblib"}))
"""


def test_a_replay_needs_numpy_alone():
    """A process that settles an answer by replay has no torch in memory."""
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""


def test_architectures_without_a_number_are_simulated_too():
    """Every architecture of the table, one run each: more is held than the weights."""
    for name in ARCHITECTURES:
        run = Simulator(workspaces_for(name)).run(load("quick").workloads[0])
        assert run.peak_bytes > run.weights_bytes
