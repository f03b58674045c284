"""What fits: the largest is the largest, the advice holds, and what is not known is not claimed."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from sdfit.errors import InvalidWorkload
from sdfit.predict.advise import (
    LargestBatch,
    LargestSize,
    NothingFits,
    largest,
    largest_sure,
    max_batch_size,
    sizes_of_aspect,
)
from sdfit.predict.predictor import Predictor
from sdfit.predict.verdict import best_metric, bound, fits
from sdfit.units import GIB
from sdfit.workload import MAX_BATCH_SIZE, MAX_SIDE, MIN_SIDE, Workload


@pytest.mark.parametrize("aspect", [(1, 1), (3, 2), (2, 3), (16, 9), (1, 4), (6, 4)])
@pytest.mark.parametrize("step", [8, 24, 64])
@pytest.mark.parametrize("memory_gib", [4, 12, 80])
def test_the_largest_size_is_the_largest(noisy: Predictor, aspect: tuple[int, int], step: int, memory_gib: int) -> None:
    """It has the aspect ratio to half a step, it fits, and the next size of that ratio does not."""
    memory = memory_gib * GIB
    height, width = noisy.largest(memory=memory, aspect=aspect, step=step, level=0.9)
    across, down = aspect
    assert height % step == width % step == 0
    short, long = sorted((height, width))
    assert (height > width) == (down > across) or height == width
    assert abs(long - short * max(aspect) / min(aspect)) <= step / 2
    assert noisy.fits(height, width, memory=memory, level=0.9)
    bigger_short = short + step
    bigger_long = round(bigger_short / step * max(aspect) / min(aspect)) * step
    larger = (bigger_short, bigger_long) if across >= down else (bigger_long, bigger_short)
    assert not noisy.fits(*larger, memory=memory, level=0.9)


def test_what_is_sure_alone_is_what_the_whole_answer_says(noisy: Predictor) -> None:
    """The same size; none where nothing is sure."""
    aspects = (1, 1), (16, 9), (2, 3)
    alone = {aspect: largest(noisy, memory=9 * GIB, aspect=aspect) for aspect in aspects}
    assert largest_sure(noisy, aspects, memory=9 * GIB) == alone and largest_sure(noisy, (), memory=1) == {}
    assert largest_sure(noisy, aspects, memory=1) == dict.fromkeys(aspects)


@pytest.mark.parametrize("aspect", [(1, 1), (3, 2), (2, 3), (16, 9), (1, 4), (7, 5), (21, 9)])
def test_one_size_less_costs_little_of_the_area(aspect: tuple[int, int]) -> None:
    """Without a step given: multiples of 64 from 1024 pixels on, and from 128 on no size is 15 % larger than the one before it."""
    sizes = sizes_of_aspect(aspect)
    assert sizes == sorted(sizes, key=min) and all(MIN_SIDE <= side <= MAX_SIDE for size in sizes for side in size)
    for less, more in pairwise(sizes):
        assert 0.85 < less[0] * less[1] / (more[0] * more[1]) < 1 or min(less) < 128
    for size in sizes:
        assert all(side % (64 if min(size) >= 1024 else 8) == 0 for side in size)
    assert [size for size in sizes if min(size) >= 1024] == [s for s in sizes_of_aspect(aspect, 64) if min(s) >= 1024]


@pytest.mark.parametrize("memory_gib", [4, 6, 12, 40])
@pytest.mark.parametrize("aspect", [(1, 1), (3, 2), (9, 16)])
def test_the_largest_without_a_step_is_the_last_that_fits(
    noisy: Predictor, aspect: tuple[int, int], memory_gib: int
) -> None:
    """Of all its sizes, one by one; what is likely is the last that fits at the lower level."""
    memory = memory_gib * GIB
    found = noisy.largest(memory=memory, aspect=aspect, batch_size=2, level=0.9)
    for size, level in ((found, 0.9), (found.likely, 0.5)):
        fitting = [s for s in sizes_of_aspect(aspect) if noisy.fits(*s, batch_size=2, memory=memory, level=level)]
        assert size == fitting[-1]


@pytest.mark.parametrize(("aspect", "step"), [((1, 1), 64), ((3, 2), 24), ((7, 5), 24), ((100, 1), 64)])
def test_unbounded_memory_ends_at_the_largest_side(noisy: Predictor, aspect: tuple[int, int], step: int) -> None:
    """With a petabyte the answer is the largest size that a Workload may have, never one beyond it."""
    height, width = noisy.largest(memory=1e15, aspect=aspect, step=step, level=0.5)
    assert MAX_SIDE - max(aspect) * step / min(aspect) < max(height, width) <= MAX_SIDE


def test_an_aspect_that_no_size_can_have_is_refused(noisy: Predictor) -> None:
    """Where the smallest size of a ratio in whole steps is beyond the largest side, its side is named with the limits."""
    with pytest.raises(InvalidWorkload, match=f"height is 102400; it must be from 64 to {MAX_SIDE}"):
        noisy.largest(memory=1e15, aspect=(1, 100), step=1024, level=0.5)


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"prompt_length": 231}])
def test_the_largest_batch_is_the_largest(noisy: Predictor, options: dict[str, Any]) -> None:
    """It fits and one image more does not, at random sizes and amounts of memory."""
    rng = random.Random(3)
    for _ in range(25):
        height, width = rng.randrange(256, 1024), rng.randrange(256, 1024)
        memory = rng.randrange(5, 60) * GIB
        batch = noisy.max_batch_size(height, width, memory=memory, level=0.9, **options)
        assert noisy.fits(height, width, batch_size=batch, memory=memory, level=0.9, **options)
        assert not noisy.fits(height, width, batch_size=batch + 1, memory=memory, level=0.9, **options)
    assert noisy.max_batch_size(256, 256, memory=1e15, level=0.9) == MAX_BATCH_SIZE


def test_beyond_a_drop_the_largest_is_still_found(noisy: Predictor) -> None:
    """Where a regime begins the bound may fall: what fits again beyond the drop is found, for sizes and for batches."""
    key = "vae_decoder_blocks|float16|kl"
    stage = noisy.artifact.stages[key]
    split = [
        [c * (0.75 if name == "m·P" else 1) for name, c in zip(stage["terms"], row, strict=True)]
        for row in stage["coef"]
    ]
    half = len(stage["coef"])
    regimes = [*stage["regimes"][:2], *(index + half for index in stage["regimes"][2:])]
    changed = stage | {"coef": [*stage["coef"], *split], "regimes": regimes}
    f = Predictor(replace(noisy.artifact, stages=noisy.artifact.stages | {key: changed}))
    found = 0
    for memory in range(12 * GIB, 40 * GIB, 2 * GIB):
        sides = [s for s in range(64, 6400, 64) if f.fits(s, s, batch_size=2, memory=memory, level=0.9)]
        batches = [b for b in range(1, 200) if f.fits(800, 800, batch_size=b, memory=memory, level=0.9)]
        assert f.largest(memory=memory, batch_size=2, level=0.9) == (sides[-1], sides[-1])
        assert f.max_batch_size(800, 800, memory=memory, level=0.9) == batches[-1]
        found += (len(sides) < sides[-1] // 64) + (len(batches) < batches[-1])
    assert found > 0  # there was a drop to look beyond


def test_fits_compares_the_upper_bound_with_the_memory(noisy: Predictor) -> None:
    """At exactly the bound it fits, at one byte less it does not; a higher level asks for more."""
    w = Workload(768, 768, batch_size=2)
    upper = bound(noisy, w, None, 0.9).upper
    assert fits(noisy, w, memory=int(upper) + 1, level=0.9) and not fits(noisy, w, memory=int(upper) - 1, level=0.9)
    assert bound(noisy, w, None, 0.95).upper > upper
    assert noisy.fits(768, 768, 77, 2, memory=f"{(int(upper) + (1 << 20)) >> 20} MiB", level=0.9)


def test_the_metric_that_decides(noisy: Predictor) -> None:
    """`required` where the model has it, else `reserved`, else `allocated`; a metric asked for is taken."""
    w = Workload(512, 512)
    assert bound(noisy, w, None, 0.9).metric == best_metric(noisy) == "required"
    bare = Predictor(replace(noisy.artifact, metrics={"reserved": noisy.artifact.metrics["reserved"]}))
    assert bound(bare, w, None, 0.9).metric == "reserved"
    empty = Predictor(replace(noisy.artifact, metrics={}))
    assert bound(empty, w, None, 0.9).metric == "allocated"
    assert empty.fits(512, 512, memory="100 GiB", level=0.9)
    assert bound(noisy, w, "device", 0.9).metric == "device"


def test_a_level_beyond_the_scores_is_refused_not_guessed(noisy: Predictor) -> None:
    """150 scores cannot support 0.999: the error says what to ask for instead."""
    with pytest.raises(InvalidWorkload, match=r"too few scores for level 0.999; ask for at most 0.99"):
        noisy.fits(512, 512, memory="80 GiB", level=0.999)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"memory": "lots"}, "not an amount of memory"),
        ({"memory": None}, "not an amount of memory"),
        ({"memory": -1}, "not an amount of memory"),
        ({"aspect": (0, 1)}, "aspect is 0"),
        ({"aspect": (1.5, 1)}, "aspect must be a whole number"),
        ({"aspect": "3:2"}, r"aspect is '3:2'; it must be two whole numbers such as \(3, 2\)"),
        ({"aspect": (1, 2, 3)}, "aspect is"),
        ({"aspect": None}, "aspect is None"),
        ({"step": 12}, "step is 12; it must be a multiple of 8"),
        ({"step": 0}, "step is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"dtype": "fp8"}, "dtype must be one of"),
        ({"level": 2}, "level is 2"),
    ],
)
def test_bad_questions_are_refused(noisy: Predictor, arguments: dict[str, Any], words: str) -> None:
    """Each with the value and what is allowed."""
    with pytest.raises(InvalidWorkload, match=words):
        largest(noisy, **({"memory": "8 GiB", "level": 0.9} | arguments))


def test_when_nothing_fits_the_answer_is_no(noisy: Predictor) -> None:
    """Exit code 3, and the amount that was too little."""
    with pytest.raises(NothingFits, match=r"no size of 1:1 is sure to fit 1\.000 GiB") as caught:
        largest(noisy, memory="1 GiB", level=0.9)
    assert caught.value.exit_code == 3
    with pytest.raises(NothingFits, match="not even one image of 512x512 is sure to fit"):
        max_batch_size(noisy, 512, 512, memory="1 GiB", level=0.9)


def test_what_is_likely_is_at_least_what_is_sure(noisy: Predictor) -> None:
    """The likely size and batch fit at level 0.5 and the next ones do not; both answers pickle and copy whole."""
    for gib in range(5, 24, 3):
        size = noisy.largest(memory=gib * GIB, level=0.9)
        batch = noisy.max_batch_size(512, 512, memory=gib * GIB, level=0.9)
        (side, _), most = size.likely, batch.likely
        assert side >= size[0] and most >= batch
        assert noisy.fits(side, side, memory=gib * GIB, level=0.5)
        assert not noisy.fits(side + 64, side + 64, memory=gib * GIB, level=0.5)
        assert noisy.fits(512, 512, batch_size=most, memory=gib * GIB, level=0.5)
        assert not noisy.fits(512, 512, batch_size=most + 1, memory=gib * GIB, level=0.5)
        for answer in (size, batch):
            again = pickle.loads(pickle.dumps(answer))
            assert again == answer and again.likely == answer.likely and type(again) is type(answer)
    assert any(
        noisy.largest(memory=gib * GIB, level=0.99).likely > noisy.largest(memory=gib * GIB, level=0.99)
        for gib in range(6, 20)
    )
    assert isinstance(size, LargestSize) and isinstance(batch, LargestBatch)


def test_where_nothing_is_sure_what_is_likely_is_told(noisy: Predictor) -> None:
    """Between the two bounds of the smallest run the answer is no, with what is likely to fit."""
    w = Workload(64, 64)
    sure, likely = (bound(noisy, w, None, level).upper for level in (0.99, 0.5))
    with pytest.raises(NothingFits, match="likely to fit: ") as caught:
        largest(noisy, memory=(sure + likely) / 2, level=0.99)
    assert caught.value.facts["likely"] >= 1
