"""Made-up worlds whose answer is known: cards with chosen coefficients, misfit, regimes and a capacity; and draws of runs."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from sdfit.backends.fake import FakeBackend
from sdfit.equation.regimes import REGIMES
from sdfit.equation.stages import STAGES, resident
from sdfit.equation.weights import component_bytes
from sdfit.files import fingerprint
from sdfit.predict.artifact import Artifact
from sdfit.records import Record, RecordsFile
from sdfit.workload import Workload

SIDES = (256, 320, 384, 456, 512, 584, 640, 768, 776, 896, 1024, 1200)
SWEPT: tuple[dict[str, Any], ...] = (
    {}, {"attention": "eager"}, {"attention": "math"}, {"attention": "sliced"}, {"dtype": "bfloat16"},
    {"dtype": "float32"}, {"dtype": "float32", "attention": "eager"}, {"vae_slicing": True}, {"vae_tiling": True},
    {"vae_slicing": True, "vae_tiling": True}, {"vae": "tiny"}, {"offload": "model"}, {"safety_checker": False},
)  # fmt: skip
"""Options of variants that the default grid sweeps."""


class World(FakeBackend):
    """A fake card of its own: activations scaled per stage, and missed by terms that no equation has.

    Each resolution's activations are off by up to ±``wobble`` (shared by its rows: misfit), each run's by up to
    ±``noise`` on top, and the decoder of a single image by ``first`` (another regime).
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        noise: float = 0.0,
        wobble: float = 0.0,
        first: float = 0.0,
        capacity_bytes: int = 1 << 40,
    ) -> None:
        super().__init__("t4", capacity_bytes=capacity_bytes)
        self.seed, self.run_noise, self.wobble, self.first = seed, noise, wobble, first
        rng = random.Random(seed)
        self.scale = {stage: rng.uniform(0.8, 1.25) for stage in STAGES}

    def stage_peaks(self, workload: Workload) -> dict[str, int]:
        """The fake card's peaks, scaled and missed [bytes]."""
        exact = super().stage_peaks(workload)
        parts = component_bytes(workload)
        size = [workload.effective_height, workload.effective_width]
        peaks = {}
        for stage, peak in exact.items():
            weights = sum(parts.get(c, 0) for c in resident(stage, workload.offload))
            factor = self.scale[stage]
            factor *= (
                1 + self._draw(self.wobble, [stage, size]) + self._draw(self.run_noise, [stage, workload.to_dict()])
            )
            if stage == "vae_decoder_blocks" and workload.batch_size == 1:
                factor *= 1 + self.first
            peaks[stage] = weights + round((peak - weights) * factor)
        return peaks

    def _draw(self, most: float, key: Any) -> float:
        return random.Random(fingerprint([self.seed, key])).uniform(-most, most)


def run(backend: FakeBackend, workloads: Iterable[Workload], start: int = 0) -> list[Record]:
    """Measure workloads on a fake card, without a file or a process."""
    return [Record(i, w, **backend.measure(w)) for i, w in enumerate(workloads, start)]


def file_of(backend: FakeBackend, records: Iterable[Record]) -> RecordsFile:
    """The records file that a sweep of the card would leave."""
    return RecordsFile(backend.environment(), list(records), [])


def measured(workloads: Iterable[Workload], **options: Any) -> RecordsFile:
    """Records of the plain fake card, made with some options."""
    card = FakeBackend(**options)
    return file_of(card, run(card, workloads))


def drawn(
    rng: np.random.Generator,
    count: int,
    *,
    sides: Sequence[int] = SIDES,
    batches: Sequence[int] = (1, 2, 3, 4),
    prompts: Sequence[int] = (77, 154, 231),
    attention: Sequence[str] = ("sdpa",),
    most: int = 8 << 20,
) -> list[Workload]:
    """Draw workloads at random from one law, so that those of a sweep and fresh ones are exchangeable."""
    found: list[Workload] = []
    while len(found) < count:
        w = Workload(
            int(rng.choice(sides)),
            int(rng.choice(sides)),
            int(rng.choice(prompts)),
            int(rng.choice(batches)),
            float(rng.choice([1.0, 7.5])),
            attention=str(rng.choice(attention)),
        )
        if w.pixels * w.batch_size <= most:
            found.append(w)
    return found


def grid(
    sides: Sequence[int] = (256, 384, 512, 520, 640, 768, 896, 1024),
    batches: Sequence[int] = (1, 2, 4),
    prompts: Sequence[int] = (77, 154),
    **options: Any,
) -> list[Workload]:
    """A small factorial grid, square and not."""
    return [
        Workload(h, w, p, b, **options)
        for i, h in enumerate(sides)
        for w in {h, sides[i - 1]}
        for p in prompts
        for b in batches
        if b * h * w <= 4 << 20
    ]


def generator(seed: int) -> np.random.Generator:
    """NumPy's generator."""
    return np.random.default_rng(seed)


@st.composite
def swept_workloads(draw: DrawFn) -> Workload:
    """Any size, in a variant that the default grid sweeps: for hypothesis."""
    return Workload(
        draw(st.integers(64, 4000)),
        draw(st.integers(64, 4000)),
        draw(st.integers(1, 400)),
        draw(st.integers(1, 40)),
        draw(st.sampled_from((0.0, 1.0, 1.5, 7.5))),
        **draw(st.sampled_from(SWEPT)),
    )


def far_and_wide(rng: random.Random, count: int, options: Mapping[str, Any]) -> list[Workload]:
    """Workloads of one variant with sides, batches and prompts over all that a Workload may have, small ones no rarer."""

    def between(low: int, high: int) -> int:
        return round(math.exp(rng.uniform(math.log(low), math.log(high))))

    return [
        Workload(
            between(64, 8192),
            between(64, 8192),
            between(1, 1000),
            rng.choice((1, 2, 3, between(1, 64))),
            rng.choice((1.0, 7.5)),
            **options,
        )
        for _ in range(count)
    ]


def with_regimes(artifact: Artifact, rng: random.Random) -> Artifact:
    """The artifact with made-up coefficients of their own in each regime, within a factor of two of what they were."""
    stages = {
        key: stage
        | {
            "coef": [[(c + 1e-9) * rng.uniform(0.5, 2) for c in stage["coef"][0]] for _ in REGIMES],
            "regimes": list(range(len(REGIMES))),
        }
        for key, stage in artifact.stages.items()
    }
    return replace(artifact, stages=stages)
