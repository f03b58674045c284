"""The smallest cap under which a run succeeds, against whole replays."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from simulated import drawn

from sdfit.predict.simulation.capped import Beginning, Capped, Checkpoint
from sdfit.predict.simulation.needed import Needed
from sdfit.predict.simulation.order import Call, Order
from sdfit.predict.simulation.pools import Pool
from sdfit.predict.simulation.replay import _Replays, between, replay, smallest_cap
from sdfit.predict.simulation.segments import CachingAllocator, segment_bytes
from sdfit.predict.simulation.simulate import Simulator
from sdfit.predict.simulation.streams import Streams
from sdfit.predict.simulation.workspaces import workspaces_for
from sdfit.units import MIB
from sdfit.workload import Workload

STEP, SEED = 2 * MIB, 20261128


def made_up(seed):
    """Blocks of all sizes that come and go; every third run grows."""
    rng = random.Random(seed)
    live, events = {}, []
    for number in range(1, 400):
        while live and rng.random() < 0.45:
            gone = rng.choice(list(live))
            events.append((gone, -live.pop(gone)))
        live[number] = int(512 * 2 ** rng.uniform(0, 17 + number / 200 * (seed % 3 == 0)))
        events.append((number, live[number]))
    return events


def bisected(events):
    """By plain bisection over whole replays."""
    fails, works = 0, replay(events).reserved_bytes // STEP + 1
    while works - fails > 1:
        middle = (fails + works) // 2
        if replay(events, cap_bytes=middle * STEP).outcome == "ok":
            works = middle
        else:
            fails = middle
    return works * STEP


def searched(events):
    """As `smallest_cap` searches, each replay from the beginning and none left out."""

    def wanted(cap):
        allocator, blocks = CachingAllocator(cap), {}
        for number, size in events:
            if not size:
                allocator.release_cached()
                continue
            if size < 0:
                allocator.free(blocks.pop(number))
                continue
            block = allocator.malloc(size)
            if block is None:
                return allocator.reserved_bytes + segment_bytes(-(-size // 512) * 512)
            blocks[number] = block
        return None

    works, fails = -(-replay(events).live_bytes // STEP) * STEP, -STEP
    while (needed := wanted(works)) is not None:
        fails, works = works, needed
    middle = works - STEP
    while fails < middle:
        if wanted(middle) is None:
            works = middle
        else:
            fails = middle
        middle = (fails + works) // (2 * STEP) * STEP
    return works


@pytest.mark.parametrize("seed", range(12))
def test_the_smallest_cap_holds_and_less_does_not(seed):
    """Whole replays succeed under it and fail under 2 MiB less; no smaller cap is missed by much."""
    events = made_up(seed)
    cap = smallest_cap(events)
    assert replay(events, cap_bytes=cap).outcome == "ok"
    assert replay(events, cap_bytes=cap - STEP).outcome == "oom"
    assert cap <= bisected(events) * 1.1


@pytest.mark.parametrize("seed", range(12))
def test_what_is_left_out_would_tell_nothing_new(seed):
    """The search that replays all from the beginning ends at the same cap."""
    assert smallest_cap(made_up(seed)) == searched(made_up(seed))


def test_a_replay_stands_for_the_caps_around_it():
    """Under any cap from what it reserved up to below what it refused, the same happens."""
    events = made_up(3)
    cap = smallest_cap(events) + 4 * STEP
    allocator, blocks = CachingAllocator(cap), {}
    for number, size in events:
        if size < 0:
            allocator.free(blocks.pop(number))
        else:
            blocks[number] = allocator.malloc(size)
    least, most = allocator.reserved_peak_bytes, min(allocator.least_refused_bytes, cap + 8 * STEP)
    assert least <= cap < most
    for other in (least, most - 512):
        again = replay(events, cap_bytes=int(other))
        assert (again.outcome, again.retries, again.reserved_bytes) == ("ok", allocator.retries, least)


@pytest.mark.parametrize("seed", range(12))
def test_whether_a_cap_suffices_is_what_the_smallest_says(seed):
    """With what the events begin with served once, and without; under caps that are met at once, late, and never."""
    events = made_up(seed)
    cap = smallest_cap(events)
    order = replace(Order.of(events), beginning=60)
    beginning = Beginning(order)
    assert beginning.begins(order) and not beginning.begins(replace(Order.of(events[1:]), beginning=60))
    assert smallest_cap(order, beginning=beginning) == cap
    for limit in (cap // 8, cap // 2, cap - STEP, cap - 1, cap, cap + 1, cap + STEP, cap + 3 * STEP, 2 * cap):
        for known in (None, beginning):
            fails, works = between(order, limit, beginning=known)
            assert fails < cap <= works and (works <= limit) == (cap <= limit)
        if not beginning.meets(limit) and replay(events, cap_bytes=limit).outcome == "ok":
            assert beginning.least_bytes(order) <= limit


def test_a_run_that_fits_under_less_and_not_under_more_is_not_sure():
    """Sliced attention, eight images of 768x768: some caps below 12 GiB do, 12 GiB do not."""
    workload, limit = Workload(768, 768, batch_size=8, attention="sliced"), 12 << 30
    needed = Needed("sm75")
    simulator = Simulator(workspaces_for("sm75"))
    order = simulator.order(workload)
    assert any(_Replays(order).wanted(limit - k * STEP) is None for k in range(10, 40))
    assert _Replays(order).wanted(limit) is not None
    assert not any(needed.suffices(workload, "required", limit - k * STEP) for k in range(40))


@pytest.mark.parametrize("seed", range(3))
def test_runs_are_answered_as_by_whole_replays(seed):
    """Drawn runs of all kinds, with workspaces and without, under caps near the smallest: pool by pool, from checkpoints, with what
    comes to nothing left out. Of 400 runs and 2,400 caps all were equal to what was said before pools were served apart."""
    simulators = (
        Simulator(workspaces_for("sm75"), most_slices=4),
        Simulator(workspaces_for("sm75").bare(), most_slices=4),
    )
    for workload, simulator in zip(drawn(SEED + seed, 2), simulators, strict=True):
        order = simulator.order(workload)
        beginning = Beginning(order)
        cap = searched(order.listed())
        assert smallest_cap(order, beginning=beginning) == smallest_cap(order) == cap, workload
        for limit in (cap + k * STEP + 1 for k in (-30, -2, -1, 0, 5, 100)):
            fails, works = between(order, limit, beginning=beginning)
            assert fails < cap <= works and (works <= limit) == (cap <= limit), workload
            assert (_Replays(order).wanted(limit) is None) == (replay(order.listed(), cap_bytes=limit).outcome == "ok")


@pytest.mark.parametrize("seed", range(6))
def test_a_part_may_end_within_what_comes_to_nothing(seed):
    """Served in parts that are cut anywhere, both pools end as in one go."""
    order = Order.of(made_up(seed))
    streams, rng = Streams(order, 0), random.Random(seed)
    whole, parts = Pool.both(), Pool.both()
    cuts = sorted(rng.sample(range(1, streams.end), 40))
    for stream, one, other in zip(streams.pools, whole, parts, strict=True):
        stream.play(one, 0, streams.end)
        for first, end in pairwise([0, *cuts, streams.end]):
            stream.play(other, first, end)
        assert (one.pieces, one.reserved_bytes) == (other.pieces, other.reserved_bytes)
    assert sum(len(stream.marks) for stream in streams.pools) > 5


def alike(seed, left):
    """A call that is made four times, with blocks between them that stay or go, and what it leaves; where the calls are."""
    rng = random.Random(seed)
    inside = made_up(seed)[:200]
    inside += [(number, -size) for number, size in dict(open_at_the_end(inside)).items()]
    births = max(number for number, _ in inside)
    events, calls, number, kept = [(1, 30 * MIB), (2, 900 * MIB), (2, -900 * MIB)], [], 2, []
    for _ in range(4):
        first = len(events)
        events += [(block + number, size) for block, size in inside]
        number += births
        calls.append(Call(first, len(events), 0))
        size = rng.choice((512, 70 * 512, 3 * MIB if left else 1024))
        number += 1
        events.append((number, size))
        kept.append((number, -size))
        if rng.random() < 0.5:
            events.append(kept.pop(0))
    return events, tuple(calls)


def open_at_the_end(events):
    """The blocks that are still there."""
    there = {}
    for number, size in events:
        if size > 0:
            there[number] = size
        else:
            del there[number]
    return there


@pytest.mark.parametrize("seed", range(24))
def test_a_call_that_is_known_is_not_served_again_but_for_the_small_pool(seed):
    """And each cap is answered as by a whole replay, whether the calls meet it, reserve more, or do neither."""
    events, calls = alike(seed, left=seed % 3 == 0)
    order = replace(Order.of(events), calls=calls)
    cap = smallest_cap(events)
    assert smallest_cap(order) == cap
    most = replay(events).reserved_bytes
    for limit in {cap // 2, cap - STEP, cap, cap + STEP, (cap + most) // 2, most - STEP, most, most + STEP}:
        assert (_Replays(order).wanted(limit) is None) == (replay(events, cap_bytes=limit).outcome == "ok")


def test_known_calls_are_few_events(monkeypatch):
    """Of four calls alike the first is served in full, the others in the small pool alone."""
    events, calls = alike(1, left=False)
    served = []
    serve = Pool.serve

    def counting(self, events, first, end, limit_bytes):
        served.append(end - first)
        return serve(self, events, first, end, limit_bytes)

    monkeypatch.setattr(Pool, "serve", counting)
    order = replace(Order.of(events), calls=calls)
    replayed = Capped(Streams(order, 0), Checkpoint(0, Pool.both(), 0), 1 << 40).replay()
    assert replayed.wanted_bytes is None and sum(served) < 0.8 * len(events)
