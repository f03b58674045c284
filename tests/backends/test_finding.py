"""Programs are found from runs that line up, each size a product of the lengths, or not at all."""

from itertools import pairwise

import pytest

pytest.importorskip("diffusers")

from sdfit.backends.trace.finding import Recorded, find, probes
from sdfit.predict.simulation.programs import DECODER, ENCODER, UNET, Lengths, sides


def runs_of(sizes, probes_at):
    """Recorded runs in which one block of ``sizes(lengths)`` is born and stays."""
    return [(at, Recorded([(1, sizes(at))], {}, [(0, "unet")], (1,), [])) for at in probes_at]


def test_a_size_is_a_product_or_there_is_no_program():
    """A factor, the batch, an area and the tokens come back; a sum of two areas does not pass for one."""
    at = probes(UNET, single=False, even=True)
    program = find(UNET, runs_of(lambda one: 6 * one.batch * one.height * one.width, at))
    assert program is not None
    taken = program.call(Lengths(7, 40, 48, 77), None, keep_events=True)
    assert taken.events.listed() == [(1, -(-6 * 7 * 40 * 48 // 512) * 512)] and taken.made == (1,)
    assert find(UNET, runs_of(lambda one: one.height * one.width + 3 * one.tokens, at)) is None


def test_runs_that_do_not_line_up_have_no_program():
    """One more event in one of the runs is enough."""
    runs = runs_of(lambda one: 512 * one.batch, probes(UNET, single=False, even=True))
    longer = runs[1][1]._replace(events=[*runs[1][1].events, (2, 512), (2, -512)])
    assert find(UNET, [runs[0], (runs[1][0], longer), runs[2]]) is None


def sliced(slices):
    """A run whose attention is computed in so many slices: each leaves a block that the next one's second block replaces."""
    events, begins, left, block = [(1, 512)], [], None, 1
    for _ in range(slices):
        begins.append(len(events))
        events += [(block + 1, 1024), (block + 2, 2048), (block + 1, -1024)]
        if left is not None:
            events.append((left, -2048))
        left, block = block + 2, block + 2
    return Recorded([*events, (1, -512), (block + 1, 4096), (left, -2048)], {}, [(0, "unet")], (block + 1,), [begins])


@pytest.mark.parametrize("batch", [2, 3, 7])
def test_slices_are_as_many_as_there_are(batch):
    """Found from runs of 3, 5 and 4, played for more and for as few as two; the blocks that they hand on are the right ones."""
    at = probes(UNET, single=False, even=True)
    program = find(UNET, [(one, sliced(one.batch)) for one in at], heads_at_once=8)
    assert program is not None
    taken = program.call(Lengths(batch, 40, 48, 77), None, keep_events=True)
    expected = sliced(batch)
    assert (taken.events.listed(), taken.made) == (expected.events, expected.made)


@pytest.mark.parametrize("kind", [UNET, ENCODER, DECODER])
@pytest.mark.parametrize("even", [True, False])
def test_probes_have_nothing_in_common(kind, even):
    """No length of one side is a length of the other, and the areas of no two probes are in one proportion."""
    at = probes(kind, single=False, even=even)
    for one in at:
        assert len({*sides(one.height, kind)[1:], *sides(one.width, kind)[1:]}) == 2 * len(sides(one.height, kind)[1:])
    assert len({one.batch for one in at}) == len({one.tokens for one in at}) == 3
    ratios = [a.height * a.width / (b.height * b.width) for a, b in pairwise(at)]
    assert not any(ratio.is_integer() or (1 / ratio).is_integer() for ratio in ratios)
