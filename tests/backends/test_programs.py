"""A module's program gives what running the module gives, to the byte and in order."""

import random
from itertools import pairwise

import pytest

pytest.importorskip("diffusers")

from sdfit.backends.trace import repeats
from sdfit.backends.trace.tracer import Tracer
from sdfit.predict.simulation.programs import DECODER, ENCODER, UNET, Lengths, Recorded, find, probes, sides
from sdfit.predict.simulation.replay import replay, smallest_cap
from sdfit.predict.simulation.segments import CACHE_GIVEN_BACK
from sdfit.predict.simulation.workspaces import workspaces_for
from sdfit.sweep.grid import load
from sdfit.workload import Workload

SEED = 20261126


class Plain(Tracer):
    """Runs every module."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._known = None


def renumbered(traced):
    """The events with blocks numbered as they are born, and which of them are workspaces."""
    numbers, events = {}, []
    for block, size in traced.events:
        if (block, size) == CACHE_GIVEN_BACK or size:
            events.append((numbers.setdefault(block, len(numbers)), size))
    return events, {numbers[block] for block in traced.workspaces}


def assert_equal(fast, plain, workload):
    """Twice, as the first run of a kind is a plain one; with the events and without."""
    for _ in range(1 + repeats.WORTH_FINDING):
        got = fast.run(workload, keep_events=True)
    expected = plain.run(workload, keep_events=True)
    assert renumbered(got) == renumbered(expected), workload
    assert got.stage_peaks == expected.stage_peaks == fast.run(workload).stage_peaks, workload


@pytest.mark.parametrize(
    "workload",
    [
        Workload(520, 776, 154, 3),
        Workload(1096, 904, batch_size=2, attention="eager", vae_slicing=True),
        Workload(1024, 768, batch_size=1, dtype="float32", vae_tiling=True, offload="model"),
        Workload(704, 640, batch_size=2, attention="sliced", guidance_scale=1.0, safety_checker=False),
    ],
    ids=["odd latents", "eager, slicing", "float32, tiling, offload", "sliced"],
)
def test_a_program_is_the_module(workload):
    """Every allocation and free, in order; every stage's peak; which blocks are workspaces."""
    fast = Tracer(workspaces_for("sm75"))
    assert_equal(fast, Plain(workspaces_for("sm75")), workload)
    found = {key[0] for key, program in fast._known.programs.items() if program is not None}
    assert found == {UNET, ENCODER, DECODER}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm61", "sm75"])
def test_a_tenth_of_the_default_grid(architecture):
    """Drawn with a seed; Pascal's table has a plan that only some sizes take."""
    fast, plain = Tracer(workspaces_for(architecture)), Plain(workspaces_for(architecture))
    workloads = load("default").workloads
    drawn = random.Random(SEED).sample(workloads, len(workloads) // 10)
    for workload in drawn:
        assert_equal(fast, plain, workload)
    print(f"seed {SEED}: {len(drawn)} workloads equal to the byte on {architecture}")


def test_programs_are_looked_for_only_when_they_pay():
    """One trace by itself finds none, and a module of other settings has none."""
    tracer = Tracer(workspaces_for("sm75"))
    tracer.run(Workload(512, 512))
    assert not tracer._known.programs
    tiny = Workload(512, 512, vae="tiny")
    for _ in range(3):
        tracer.run(tiny)
    assert {key[0] for key in tracer._known.programs} == {UNET}


def runs_of(kind, sizes, probes_at):
    """Recorded runs in which one block of ``sizes(lengths)`` is born and stays."""
    return [
        (at, Recorded([(1, sizes(at))], {}, [(0, "unet")], 1, (at.batch, 4, at.height, at.width))) for at in probes_at
    ]


def test_a_size_is_a_product_or_there_is_no_program():
    """A factor, the batch, an area and the tokens come back; a sum of two areas does not pass for one."""
    at = probes(UNET, 2, exact=False, even=True)
    program = find(UNET, "float16", runs_of(UNET, lambda one: 6 * one.batch * one.height * one.width, at))
    assert program is not None
    taken, shape = program.call(Lengths(7, 40, 48, 77), None, keep_events=True)
    assert taken.events == [(1, -(-6 * 7 * 40 * 48 // 512) * 512)] and shape == (7, 4, 40, 48)
    assert find(UNET, "float16", runs_of(UNET, lambda one: one.height * one.width + 3 * one.tokens, at)) is None


def test_runs_that_do_not_line_up_have_no_program():
    """One more event in one of the runs is enough."""
    runs = runs_of(UNET, lambda one: 512 * one.batch, probes(UNET, 2, exact=False, even=True))
    longer = runs[1][1]._replace(events=[*runs[1][1].events, (2, 512), (2, -512)])
    assert find(UNET, "float16", [runs[0], (runs[1][0], longer), runs[2]]) is None


@pytest.mark.parametrize("kind", [UNET, ENCODER, DECODER])
@pytest.mark.parametrize("even", [True, False])
def test_probes_have_nothing_in_common(kind, even):
    """No length of one side is a length of the other, and the areas of no two probes are in one proportion."""
    at = probes(kind, 2, exact=False, even=even)
    for one in at:
        assert len({*sides(one.height, kind)[1:], *sides(one.width, kind)[1:]}) == 2 * len(sides(one.height, kind)[1:])
    assert len({one.batch for one in at}) == len({one.tokens for one in at}) == 3
    ratios = [a.height * a.width / (b.height * b.width) for a, b in pairwise(at)]
    assert not any(ratio.is_integer() or (1 / ratio).is_integer() for ratio in ratios)


def bisected(events):
    """The smallest cap by plain bisection over whole replays."""
    step = 2 * 2**20
    fails, works = 0, replay(events).reserved_bytes // step + 1
    while works - fails > 1:
        middle = (fails + works) // 2
        if replay(events, cap_bytes=middle * step).outcome == "ok":
            works = middle
        else:
            fails = middle
    return works * step


@pytest.mark.parametrize("seed", range(8))
def test_the_smallest_cap_holds_and_less_does_not(seed):
    """Of made-up runs: whole replays succeed under it and fail under 2 MiB less; no smaller cap is missed by much."""
    rng = random.Random(seed)
    live, events = {}, []
    for number in range(1, 400):
        while live and rng.random() < 0.45:
            gone = rng.choice(list(live))
            events.append((gone, -live.pop(gone)))
        live[number] = int(512 * 2 ** rng.uniform(0, 17))
        events.append((number, live[number]))
    cap = smallest_cap(events)
    assert replay(events, cap_bytes=cap).outcome == "ok"
    assert replay(events, cap_bytes=cap - 2 * 2**20).outcome == "oom"
    assert cap <= bisected(events) * 1.1
