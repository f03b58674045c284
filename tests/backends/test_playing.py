"""A module that ran at one size is played at the others: the same operations, and the same bytes at each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sdfit.backends.trace.observe import watching
from sdfit.backends.trace.playing import Known
from sdfit.backends.trace.tracer import Tracer
from sdfit.workload import Workload

SIZES = (
    Workload(512, 512),
    Workload(768, 256, 154, 3),
    Workload(520, 328, 77, 2),
    Workload(712, 600, 231, 3, 1.0),
    Workload(384, 640, batch_size=1, guidance_scale=1.0),
    Workload(1024, 768, batch_size=2),
)


@pytest.fixture(scope="module")
def tracer() -> Tracer:
    return Tracer()


@pytest.mark.parametrize(
    "variant",
    [{}, {"attention": "sliced", "vae_tiling": True}, {"offload": "model", "vae": "tiny", "attention": "eager"}],
    ids=["sdpa", "slices and tiles", "offload"],
)
def test_played_calls_are_those_that_would_run(tracer: Tracer, variant: dict[str, object]) -> None:
    """Every operation by name, in order, with its live bytes; the stage peaks; and calls are really played."""
    made = {"calls": 0}
    plain, played = [], []
    for known, runs in ((None, plain), (Known(), played)):
        with watching(tracer, replace(SIZES[0], **variant), known) as watch:
            for size in SIZES:
                traced, seen = watch(replace(size, **variant))
                runs.append((traced, [(p.path, p.names, p.live_bytes) for p in seen.passes]))
                made["calls"] += known is not None and sum(p.repeated and not p.events for p in seen.passes)
    for (before, passes), (after, others) in zip(plain, played, strict=True):
        assert others == passes
        assert after.stage_peaks == before.stage_peaks and after.component_bytes == before.component_bytes
    assert made["calls"] > 15


def test_a_pipeline_of_other_modules_runs_them(tracer: Tracer) -> None:
    """What a call holds that is not its program's is never played: kernel workspaces belong to no program here."""
    with_workspaces = Tracer(lambda workload, func, args, out: 512 if func.name() == "aten::convolution" else 0)
    found = []
    for known in (None, Known()):
        with watching(with_workspaces, SIZES[0], known) as watch:
            found.append([p.live_bytes for size in SIZES[:2] for p in watch(size)[1].passes])
    assert found[0] == found[1]
