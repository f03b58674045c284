"""Every combination of options that diffusers runs has an answer in every metric; the others are refused with its reason."""

from __future__ import annotations

import itertools
import random
import warnings
from collections import Counter

import pytest

import sdfit
from sdfit.errors import InvalidWorkload, UnknownVariant
from sdfit.predict.predictor import Predictor
from sdfit.workload import CHOICES, VARIANT_FIELDS, Workload, why_it_fails

EVERY = [
    Workload(512, 384, 77, 1, guidance, *key)  # type: ignore[arg-type]
    for guidance in (1.0, 7.5)
    for key in itertools.product(*CHOICES.values())
    if key[VARIANT_FIELDS.index("execution")] == "default"
]
RUNS = [w for w in EVERY if not why_it_fails(w.variant)]
METRICS = ("allocated", "reserved", "device", "required", "minimum")
SEED = 20261128


@pytest.fixture(scope="module")
def f() -> Predictor:
    """The shipped model of a T4."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sdfit.load("t4")


def answered(f: Predictor, workloads: list[Workload], metrics: tuple[str, ...]) -> Counter[tuple[str, str, str]]:
    """How many have an answer, by metric, offload, and what it is from; each is a number with a finite bound above it."""
    found: Counter[tuple[str, str, str]] = Counter()
    for w, metric in itertools.product(workloads, metrics):
        peak = f.predict_workload(w, metric=metric, level=0.95)
        assert 0 < peak.lower <= peak <= peak.upper < 2 * peak, (w, metric)
        found[metric, w.offload, "simulated" if peak.replayed else "equation"] += 1
    return found


def test_what_diffusers_runs_has_an_answer(f: Predictor) -> None:
    """All combinations, with guidance and without: allocated memory, from the equation where it has coefficients that hold."""
    assert (len(EVERY), len(RUNS)) == (3360, 2576)
    found = answered(f, RUNS, ("allocated",))
    assert sum(found.values()) == len(RUNS)
    for (_, offload, source), count in found.items():
        swept = sum(w.offload == offload and is_swept(f, w) for w in RUNS)
        assert count == (swept if source == "equation" else sum(w.offload == offload for w in RUNS) - swept)


def is_swept(f: Predictor, w: Workload) -> bool:
    """Whether the equation has coefficients, and does not go astray there."""
    try:
        return not (f.equation.variant(w.variant).strays and f.equation.predict_workload(w).extrapolated)
    except UnknownVariant:
        return False


def test_a_sample_is_answered_in_every_metric_and_question(f: Predictor) -> None:
    """Drawn with a seed: what decides is always simulated, a verdict has one of three answers, and fits agrees."""
    drawn = random.Random(SEED).sample(RUNS, 25)
    found = answered(f, drawn, METRICS)
    assert sum(found.values()) == len(drawn) * len(METRICS)
    assert {source for (metric, _, source) in found if metric == "required"} == {"simulated"}
    for w in drawn:
        for memory in ("1 GiB", "2.5 GiB", "6 GiB"):
            verdict = f.verdict(**w.to_dict(), memory=memory)
            assert (verdict.answer == "fits") == f.fits(**w.to_dict(), memory=memory)


@pytest.mark.slow
def test_all_are_answered_in_every_metric(f: Predictor) -> None:
    """The whole table: minutes."""
    found = answered(f, RUNS, METRICS)
    for metric in METRICS:
        assert sum(count for (m, _, _), count in found.items() if m == metric) == len(RUNS)
        print(metric, {(offload, source): n for (m, offload, source), n in sorted(found.items()) if m == metric})


def test_what_is_refused_says_that_diffusers_fails_on_it(f: Predictor) -> None:
    """The tiny VAE in tiles of 16 bits, and under offload of blocks, whatever else is asked; nothing else."""
    refused = [w for w in EVERY if w not in set(RUNS)]
    for w in refused:
        assert w.vae == "tiny" and (w.offload == "group_block" or (w.vae_tiling and w.dtype != "float32"))
        for model in (f, f.equation):
            with pytest.raises(UnknownVariant, match="fails in diffusers itself"):
                model.predict_workload(w)


@pytest.mark.parametrize(
    "options",
    [{"vae_tiling": True}, {"vae_tiling": True, "dtype": "bfloat16"}, {"offload": "group_block"}],
    ids=str,
)
def test_diffusers_does_fail_on_it(options: dict[str, str | bool]) -> None:
    """The pipeline itself, run by the tracer."""
    pytest.importorskip("diffusers")
    from sdfit.backends.trace.tracer import Tracer

    w = Workload(256, 256, vae="tiny", **options)  # type: ignore[arg-type]
    assert why_it_fails(w.variant)
    with pytest.raises((RuntimeError, InvalidWorkload)):
        Tracer().run(w)
