"""What the tests of simulated runs share: a run's events in one numbering, and workloads drawn with a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from sdfit.predict.simulation.card import Traced
from sdfit.predict.simulation.segments import CACHE_GIVEN_BACK
from sdfit.workload import Workload


def renumbered(traced: Traced) -> tuple[list[tuple[int, int]], set[int]]:
    """The events with blocks numbered as they are born, and which of them are workspaces."""
    numbers: dict[int, int] = {}
    events = []
    for block, size in traced.events or ():
        if (block, size) == CACHE_GIVEN_BACK or size:
            events.append((numbers.setdefault(block, len(numbers)), size))
    return events, {numbers[block] for block in traced.workspaces}


def facts(traced: Traced) -> list[Any]:
    """All that a run came to but its events."""
    return [
        traced.stage_peaks,
        traced.component_bytes,
        traced.standing_bytes,
        traced.unsplit_bytes,
        traced.resident_bytes,
    ]


def drawn(seed: int, count: int, attentions: tuple[str, ...]) -> Iterator[Workload]:
    """Covered workloads: odd sizes and round ones, every discrete field, prompts of one chunk and of more."""
    rng = random.Random(seed)
    for number in range(count):
        vae = rng.choice(("kl", "kl", "tiny"))
        step = rng.choice((1, 8, 64))
        yield Workload(
            rng.randrange(128 // step, 1400 // step) * step,
            rng.randrange(128 // step, 1400 // step) * step,
            rng.choice((rng.randrange(1, 78), rng.randrange(78, 232), 154)),
            rng.choice((1, 1, 2, 3, rng.randrange(4, 9))),
            rng.choice((1.0, 7.5)),
            rng.choice(("float16", "bfloat16", "float32")),
            attentions[number % len(attentions)],
            vae,
            vae_slicing=rng.random() < 0.4,
            vae_tiling=vae == "kl" and rng.random() < 0.4,
            offload=rng.choice(("none", "none", "model")),
            safety_checker=rng.random() < 0.6,
        )
