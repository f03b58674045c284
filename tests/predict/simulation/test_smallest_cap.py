"""The smallest cap under which a run succeeds, against whole replays."""

import random

import pytest

from sdfit.predict.simulation.replay import replay, smallest_cap
from sdfit.predict.simulation.segments import CachingAllocator, segment_bytes
from sdfit.units import MIB

STEP = 2 * MIB


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
def test_what_fails_under_a_limit_is_said_to_and_not_looked_into(seed):
    """Under a limit that suffices the cap is the same one; under one that does not, one byte more than it."""
    events = made_up(seed)
    cap = smallest_cap(events)
    for limit in (cap // 2, cap - STEP, cap - 1, cap, cap + 1, cap + STEP, cap + 3 * STEP, 2 * cap):
        suffices = replay(events, cap_bytes=limit).outcome == "ok"
        assert smallest_cap(events, limit_bytes=limit) == (cap if suffices else limit + 1)
