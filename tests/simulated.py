"""Workloads for the tests of simulated runs, drawn with a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator

from sdfit.workload import CHOICES, Workload


def drawn(seed: int, count: int) -> Iterator[Workload]:
    """Covered workloads: odd sizes and round ones, every discrete field, prompts of one chunk and of more.

    All but what diffusers fails on: the tiny VAE under offload of blocks, and its tiles in 16 bits.
    """
    rng = random.Random(seed)
    for number in range(count):
        vae, dtype = rng.choice(("kl", "kl", "tiny")), rng.choice(("float16", "bfloat16", "float32"))
        offloads = [str(o) for o in CHOICES["offload"] if (vae, o) != ("tiny", "group_block")]
        step = rng.choice((1, 8, 64))
        yield Workload(
            rng.randrange(128 // step, 1400 // step) * step,
            rng.randrange(128 // step, 1400 // step) * step,
            rng.choice((rng.randrange(1, 78), rng.randrange(78, 232), 154)),
            rng.choice((1, 1, 2, 3, rng.randrange(4, 9))),
            rng.choice((1.0, 7.5)),
            dtype,
            str(CHOICES["attention"][number % len(CHOICES["attention"])]),
            vae,
            vae_slicing=rng.random() < 0.4,
            vae_tiling=(vae == "kl" or dtype == "float32") and rng.random() < 0.4,
            offload=rng.choice(offloads),
            safety_checker=rng.random() < 0.6,
        )
