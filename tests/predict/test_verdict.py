"""Three answers: each says what the bounds say, the chance is between them, and nothing is claimed without kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdfit.errors import InvalidWorkload
from sdfit.predict.conformal import Scores
from sdfit.predict.predictor import Predictor
from sdfit.predict.verdict import ANSWERS, DOES_NOT_FIT, FITS, MAY_FIT
from sdfit.units import GIB


@given(st.floats(2, 40), st.integers(64, 1600), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_a_verdict_agrees_with_the_bounds(noisy: Predictor, gib: float, side: int, batch: int) -> None:
    """Fits exactly where `fits` says so at that level; does not fit exactly where the lower bound is above the memory."""
    found = noisy.verdict(side, 512, batch_size=batch, memory=gib * GIB, level=0.9)
    peak = found.prediction
    assert found.answer in ANSWERS
    assert (found.answer == FITS) == noisy.fits(side, 512, batch_size=batch, memory=gib * GIB, level=0.9)
    assert (found.answer == DOES_NOT_FIT) == (peak.lower > found.memory_bytes and not found.slower)
    assert found.chance is not None and 0 <= found.chance <= 1
    assert found.chance >= 0.9 if found.answer == FITS else found.chance < 0.9 + 1e-9
    assert found.margin_bytes == found.memory_bytes - peak.upper


def test_the_chance_rises_with_the_memory(noisy: Predictor) -> None:
    """From nothing to certainty, through all three answers, without a step back."""
    peak = noisy(768, 768, metric="required")
    found = [noisy.verdict(768, 768, memory=peak * share, level=0.95) for share in (0.8 + 0.005 * i for i in range(80))]
    chances = [one.chance for one in found]
    assert chances == sorted(chances) and chances[0] == 0 and chances[-1] >= 0.95
    answers = list(dict.fromkeys(one.answer for one in found))
    assert answers == [DOES_NOT_FIT, MAY_FIT, FITS]


def test_a_traced_model_never_says_that_a_run_fits(noisy: Predictor) -> None:
    """Without kernel workspaces it promises too much: at most may fit, with no chance named; no stays no."""
    traced = Predictor(replace(noisy.artifact, provenance="traced"))
    assert traced.verdict(512, 512, memory="900 GiB", level=0.9).answer == MAY_FIT
    assert traced.verdict(512, 512, memory="900 GiB", level=0.9).chance is None
    assert traced.verdict(512, 512, memory="1 GiB", level=0.9).answer == DOES_NOT_FIT


def test_what_runs_without_workspaces_may_fit_with_slower_kernels(noisy: Predictor) -> None:
    """Where required does not fit and what is needed without workspaces does, the answer is may fit, and says so."""
    coef = {"": {"edges": [], "coef": [[0.0, 0.5, *[0.0] * 6]]}}  # half of the activations
    scores = {"": {"count": 100, "values": [0.0] * len(Scores.of(range(100)).ranks)}}
    artifact = replace(
        noisy.artifact,
        metrics=noisy.artifact.metrics | {"minimum": coef},
        scores=noisy.artifact.scores | {"minimum": scores},
    )
    f = Predictor(artifact)
    required, least = f(1024, 1024, metric="required", level=0.9), f(1024, 1024, metric="minimum", level=0.9)
    found = f.verdict(1024, 1024, memory=(required.lower + least.upper) / 2, level=0.9)
    assert found.answer == MAY_FIT and found.slower
    assert f.verdict(1024, 1024, memory=least.lower - GIB, level=0.9).answer == DOES_NOT_FIT


def test_a_verdict_as_plain_values(noisy: Predictor) -> None:
    """In bytes, with the prediction that decides."""
    told = noisy.verdict(512, 512, memory="8 GiB", level=0.9).to_dict()
    assert told["answer"] == "fits" and told["fits"] is True and told["memory_bytes"] == 8 * GIB
    assert told["metric"] == "required" and told["margin_bytes"] == 8 * GIB - told["upper_bytes"]


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((512, 512), {"height": 512}, "height was given twice"),
        ((512,) * 20, {}, r"20 values were given by place; there are \d+ fields"),
        ((512,), {}, "needs height and width"),
    ],
)
def test_odd_questions_are_refused(noisy: Predictor, args: tuple[Any, ...], kwargs: dict[str, Any], words: str) -> None:
    """One sentence each."""
    with pytest.raises(InvalidWorkload, match=words):
        noisy.verdict(*args, memory="8 GiB", level=0.9, **kwargs)
