"""Made-up worlds whose answer is known: cards with chosen coefficients, misfit, regimes and a capacity."""

from __future__ import annotations

import random

import numpy as np

from sdfit.backends.fake import FakeBackend
from sdfit.equation.stages import STAGES, resident
from sdfit.equation.weights import component_bytes
from sdfit.records import Record, RecordsFile, fingerprint
from sdfit.workload import Workload

SIDES = (256, 320, 384, 456, 512, 584, 640, 768, 776, 896, 1024, 1200)


class World(FakeBackend):
    """A fake card of its own: activations scaled per stage, and missed by terms that no equation has.

    Each resolution's activations are off by up to ±``wobble`` (shared by its rows: misfit), each run's by up to
    ±``noise`` on top, and the decoder of a single image by ``first`` (another regime).
    """

    def __init__(self, seed=0, *, noise=0.0, wobble=0.0, first=0.0, capacity_bytes=1 << 40):
        super().__init__("t4", capacity_bytes=capacity_bytes)
        self.seed, self.run_noise, self.wobble, self.first = seed, noise, wobble, first
        rng = random.Random(seed)
        self.scale = {stage: rng.uniform(0.8, 1.25) for stage in STAGES}

    def stage_peaks(self, workload):
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

    def _draw(self, most, key):
        return random.Random(fingerprint([self.seed, key])).uniform(-most, most)


def run(backend, workloads, start=0):
    """Measure workloads on a fake card."""
    return [Record(i, w, **backend.measure(w)) for i, w in enumerate(workloads, start)]


def file_of(backend, records):
    """The records file that a sweep of the card would leave."""
    return RecordsFile(backend.environment(), list(records), [])


def drawn(rng, count, *, sides=SIDES, batches=(1, 2, 3, 4), prompts=(77, 154, 231), attention=("sdpa",), most=8 << 20):
    """Draw workloads at random from one law, so that those of a sweep and fresh ones are exchangeable."""
    found = []
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


def grid(sides=(256, 384, 512, 520, 640, 768, 896, 1024), batches=(1, 2, 4), prompts=(77, 154), **options):
    """A small factorial grid, square and not."""
    return [
        Workload(h, w, p, b, **options)
        for i, h in enumerate(sides)
        for w in {h, sides[i - 1]}
        for p in prompts
        for b in batches
        if b * h * w <= 4 << 20
    ]


def generator(seed):
    return np.random.default_rng(seed)
