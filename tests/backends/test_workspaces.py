"""The workspace table against what others measured: `data/published/measurements.csv` and `other.csv`.

`USED` are the rows that the rules were found on. Nothing was fitted: a rule names tensors, and the only free choice is
the load order, of which the median was taken. `other.csv` was collected after the rules stood.
"""

from __future__ import annotations

import itertools
import statistics
from functools import cache

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from sdfit.backends.trace.tracer import Tracer  # noqa: E402
from sdfit.errors import InvalidWorkload, SdfitError  # noqa: E402
from sdfit.predict.simulation.card import Traced  # noqa: E402
from sdfit.predict.simulation.replay import replay  # noqa: E402
from sdfit.predict.simulation.unsplit import LOAD_ORDER, unsplit_bytes  # noqa: E402
from sdfit.predict.simulation.workspaces import (  # noqa: E402
    ARCHITECTURES,
    T4_EXCESS,
    convolution_bytes,
    workspaces_for,
)
from sdfit.study.comparison import published  # noqa: E402
from sdfit.study.lab.published import trace_published  # noqa: E402
from sdfit.study.lab.reserved import reserved_rows  # noqa: E402
from sdfit.units import GIB, MIB  # noqa: E402
from sdfit.workload import Workload  # noqa: E402

GIVEN = {r.id: r for r in published.rows() if r.metric == "allocated"}
OTHER = {r.id: r for r in published.read(published.path().with_name("other.csv")) if r.metric == "allocated"}
ROWS = GIVEN | OTHER

USED = {id for id in GIVEN if id.startswith("OM-")} | {
    "COL-001", "COL-002", "INV-001", "INV-003", "INV-011", "INV-027", "INV-031", "HFB-001", "GP-001",
}  # fmt: skip
EXACT = {
    "OM-020", "OM-021", "OM-067", "OM-068", "OM-108", "INV-001", "INV-009", "INV-043", "INV-051",
    "OMX-V8-A100", "OMX-V16-A100", "OMX-V32-A100", "OMX-V8-4090", "OMX-V16-4090", "OMX-V32-4090",
}  # fmt: skip
MISSES = {
    "COL-003": (-0.1740, "cause not established, probably a convolution plan with a larger workspace, see T4_EXCESS"),
    "GP-002": (0.0070, "model offload on Pascal: which of the UNet's convolutions take the Winograd plan is not known"),
    "GP-005": (0.0070, "as GP-002"),
}
CARDS = ("t4", "v100", "a100", "rtx4090")
GIB_STEP = GIB // 1000
"""HFB rows were published to 0.001 GiB."""

_tracer = Tracer()
_by_rules: dict[object, tuple[int, Traced]] = {}


@cache
def traced(id: str) -> tuple[int, Traced]:
    """Trace a row, once for all cards whose rules are the same."""
    row = ROWS[id]
    a = workspaces_for(row.card).architecture
    rules = tuple(rule for rule in a.rules if row.dtype in rule.dtypes)
    what = (row.height, row.width, row.batch_size, row.guidance_scale, row.dtype, row.attention, row.vae_tiling)
    key = ([(r.copies, r.min_batch, r.channels, r.element_bytes) for r in rules].__repr__(), a.cublas_bytes, *what,
           row.offload, row.safety_checker, row.scope, row.pipeline)  # fmt: skip
    if key not in _by_rules:
        _by_rules[key] = trace_published(row, _tracer)
    return _by_rules[key]


def error(id: str) -> float:
    """Relative error of a row."""
    return traced(id)[0] / ROWS[id].peak_bytes - 1


def test_every_row_that_does_not_miss_is_within_half_a_percent() -> None:
    """Twice as close as asked, on every card, pipeline and dtype, except for the rows named in MISSES."""
    far = {id: error(id) for id in GIVEN if id not in MISSES and abs(error(id)) > 0.005}
    assert far == {}


def test_whole_pipelines_of_the_four_cards_reach_the_median() -> None:
    """The median of T4, V100, A100 and RTX 4090 is below 0.1 %, where 0.3 % was asked, COL-003 included."""
    whole = [abs(error(id)) for id, row in GIVEN.items() if row.whole_pipeline and row.card in CARDS]
    assert len(whole) == 24
    assert statistics.median(whole) < 0.001


def test_rows_that_the_rules_were_not_found_on() -> None:
    """Of the given rows, those outside USED are as close as those in it: nothing was fitted to them."""
    held_out = [abs(error(id)) for id in GIVEN if id not in USED | set(MISSES)]
    assert len(held_out) > len(GIVEN) / 3
    assert statistics.median(held_out) < 0.001
    assert max(held_out) < 0.0035


@pytest.mark.parametrize("id", sorted(EXACT))
def test_exact_to_the_byte(id: str) -> None:
    """Copies, filter, padding, cuBLAS and unsplit blocks of the VAE add up to the published number itself."""
    assert traced(id)[0] == ROWS[id].peak_bytes


@pytest.mark.parametrize("id", sorted(OTHER))
def test_rows_collected_afterwards(id: str) -> None:
    """Batches up to 32, sizes up to 2048x2048 and tiled runs that no rule was found on come out within 0.5 %."""
    assert abs(error(id)) < 0.005


@pytest.mark.parametrize("id", sorted(MISSES))
def test_misses_still_miss_by_what_is_said(id: str) -> None:
    """The list of misses is neither longer nor rosier than the truth."""
    assert error(id) == pytest.approx(MISSES[id][0], abs=0.0005)


def test_the_bound_on_the_t4_row_holds() -> None:
    """T4_EXCESS on top of the rules gives COL-003 within what was printed, and is impossible at 2048x2048 on a T4."""
    row = ROWS["COL-003"]
    bound = traced("COL-003")[0] + T4_EXCESS * row.workload().pixels
    assert abs(bound - row.peak_bytes) < 0.005 * GIB
    assert traced("COLX-2048")[0] + T4_EXCESS * 2048**2 > 15 * GIB  # the card has 14.6 GiB for PyTorch


def test_score_matrices_do_not_explain_the_t4_row() -> None:
    """Three float16 score matrices of the VAE's mid block and k tensors of (N, 512) never give 9.06 GiB.

    Whatever the order of loading that the two smaller rows of the same session leave possible.
    """
    _, run = traced("COL-003")
    tokens = 150 * 225
    printed = set()
    possible = 0
    for order in itertools.permutations(LOAD_ORDER):
        more = unsplit_bytes(_sizes(), order) - unsplit_bytes(_sizes())
        if all(abs(traced(id)[0] + more - ROWS[id].peak_bytes) < 0.005 * GIB for id in ("COL-001", "COL-002")):
            possible += 1
            base = run.weights_bytes + run.standing_bytes + more + 3 * tokens**2 * 2
            printed |= {f"{(base + k * tokens * 512 * 2) / GIB:.2f}" for k in range(12)}
    assert possible
    assert "9.06" not in printed
    assert {"9.05", "9.08"} <= printed


@pytest.mark.parametrize(("card", "first", "exceptions"), [("a10", "HFB-018", set()), ("v100", "HFB-001", {"HFB-014"})])
def test_levels_are_load_orders(card: str, first: str, exceptions: set[str]) -> None:
    """One card and one workload gave several peaks: each is this run after another order of loading the weights."""
    _, run = traced(first)
    shape = (1, 256, 512, 512)
    largest = convolution_bytes(workspaces_for(card).architecture, "float16", shape, (256, 256, 3, 3), shape)
    remainder = -largest % (2 * MIB)  # the largest request of the run has a segment of its own, left unsplit
    assert remainder < MIB
    rest = run.peak_bytes - unsplit_bytes(_sizes()) + remainder
    levels = [rest + unsplit_bytes(_sizes(), order) for order in itertools.permutations(LOAD_ORDER)]
    rows = [row for row in GIVEN.values() if row.card == card]
    assert len({row.peak_bytes for row in rows}) == 5
    off = {row.id for row in rows if min(abs(level - row.peak_bytes) for level in levels) > GIB_STEP / 2}
    assert off == exceptions


def test_a_replay_through_the_allocator_closes_the_last_gap() -> None:
    """With one image the workspace's own block stays unsplit too; the allocator's model finds it, to the byte."""
    _tracer.workspace = workspaces_for("t4")
    work = Workload(512, 512, safety_checker=False)
    run = _tracer.run(work, task="vae_decode", keep_events=True)
    assert run.events is not None
    assert run.peak_bytes == ROWS["OM-019"].peak_bytes - 916_992
    assert replay(run.events).allocated_bytes == ROWS["OM-019"].peak_bytes


def test_unsplit_blocks_of_the_pipeline() -> None:
    """LOAD_ORDER gives the median over all orders, and the VAE alone has 5.25 MiB of it."""
    orders = [unsplit_bytes(_sizes(), order) for order in itertools.permutations(LOAD_ORDER)]
    assert unsplit_bytes(_sizes()) == statistics.median_low(orders) == 29_810_688
    assert (min(orders), max(orders)) == (24_797_184, 40_304_640)
    assert unsplit_bytes({"vae": _sizes()["vae"]}) == 5_505_024


@cache
def _sizes() -> dict[str, list[int]]:
    pipe = _tracer.pipeline(Workload(512, 512))
    return {
        name: [t.numel() * t.element_size() for t in (*part.parameters(), *part.buffers())]
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }


def test_pieces_above_the_32_bit_limit() -> None:
    """At 32 images of 512x512 the 256->128 convolution runs four images at a time and copies only those."""
    shapes = (32, 256, 512, 512), (128, 256, 3, 3), (32, 128, 512, 512)
    four = (4, 256, 512, 512), (128, 256, 3, 3), (4, 128, 512, 512)
    a100 = ARCHITECTURES["sm80"]
    assert convolution_bytes(a100, "float16", *shapes) == convolution_bytes(a100, "float16", *four)
    # one image less stays below the limit and is copied whole
    whole = (31, *shapes[0][1:]), shapes[1], (31, *shapes[2][1:])
    assert convolution_bytes(a100, "float16", *whole) > 7 * convolution_bytes(a100, "float16", *four)


def test_batched_upsampler_holds_nothing() -> None:
    """The 256->256 rule looks at the images in the convolution, so VAE slicing brings the copies back."""
    t4 = Tracer(workspaces_for("t4"))
    plain, sliced, one = (
        t4.run(Workload(512, 512, batch_size=b, vae_slicing=s), task="vae_decode")
        for b, s in ((4, False), (4, True), (1, False))
    )
    assert plain.peak_bytes - one.peak_bytes > 5700 * 512**2
    latents, images = 3 * 32_768, 4 * 3 * 512**2 * 2
    assert one.peak_bytes < sliced.peak_bytes <= one.peak_bytes + latents + images


def test_standing_memory_is_in_every_stage_and_in_the_events_once() -> None:
    """cuBLAS is an event like any other; the unsplit blocks are not, because a replay makes its own."""
    work = Workload(256, 256, safety_checker=False)
    bare = Tracer().run(work, keep_events=True)
    run = Tracer(workspaces_for("sm90")).run(work, keep_events=True)
    assert (bare.standing_bytes, run.standing_bytes) == (0, 33_554_432 + 28_000_256)
    for stage, peak in bare.stage_peaks.items():
        assert run.stage_peaks[stage] >= peak + run.standing_bytes
    assert run.events is not None
    peak = max(itertools.accumulate(size for _, size in run.events))
    assert peak == run.peak_bytes - 28_000_256


def test_tasks_cover_less_than_the_whole() -> None:
    """txt2img peaks where img2img does, and the VAE alone has only the VAE's weights."""
    work = Workload(256, 256, safety_checker=False)
    whole, text, encode, decode = (
        _bare(work, task) for task in ("img2img", "txt2img", "vae_encode", "vae_decode")
    )  # fmt: skip
    assert 0 <= whole.peak_bytes - text.peak_bytes < 64 * 1024
    assert encode.weights_bytes == decode.weights_bytes == 167_320_064
    assert "vae_encoder_blocks" not in text.stage_peaks
    assert decode.peak_bytes - decode.weights_bytes == pytest.approx(1536 * 256**2, rel=0.001)


def _bare(work: Workload, task: str) -> Traced:
    _tracer.workspace = None
    return _tracer.run(work, task=task)


def test_unknown_names_say_what_is_known() -> None:
    """A card or a task that is not in the table is refused in one sentence that names the nearest."""
    with pytest.raises(SdfitError, match="no kernel workspaces are known for 'sm50'; did you mean 'sm"):
        workspaces_for("sm50")
    with pytest.raises(InvalidWorkload, match="there is no task 'img2im'; did you mean 'img2img'"):
        _tracer.run(Workload(256, 256), task="img2im")


def test_every_entry_has_evidence_or_says_that_it_has_none() -> None:
    """Each rule names published rows that exist and are of its architecture's dtype, or says 'none'."""
    import re

    rows = ROWS | {row.id: row for row in reserved_rows()}
    for architecture in ARCHITECTURES.values():
        for rule in architecture.rules:
            if rule.evidence.startswith("none"):
                continue
            named = re.findall(r"\b(?:(?:OM|INV|HFB|GP|SAY)-\d{3}|INX-[A-Z\d-]+)\b", rule.evidence)
            assert named, rule
            for id in named:
                assert rows[id].dtype in rule.dtypes, (architecture.name, id)
