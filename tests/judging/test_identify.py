"""What the data can tell apart is told, and what to sweep next does tell it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from worlds import World, grid, run

from sdfit.errors import FitError
from sdfit.judging.identify import StageReport, TermReport, identifiability
from sdfit.records import Record
from sdfit.workload import Workload

SHORT = [*grid(prompts=(77,), attention="eager"), *grid(prompts=(77,), attention="eager", guidance_scale=1.0)]


def unet(workloads: Iterable[Workload], **kind: Any) -> StageReport:
    """What a sweep on a made-up card tells of the UNet with eager attention."""
    return identifiability(run(World(**kind), workloads)).stage("unet float16 eager")


def term(report: StageReport, name: str) -> TermReport:
    """One term of a report."""
    return next(t for t in report.terms if t.term == name)


def test_short_prompts_do_not_tell_lhw_from_hw() -> None:
    """With prompts up to 77 tokens L·H·W is not identified, its column is H·W's (cosine 1), and a longer one is proposed."""
    found = term(unet(SHORT), "n·L·A")
    assert found.status == "not identified" and found.coef is None
    assert found.closest == "n·A" and found.correlation == pytest.approx(1.0)
    assert "prompt_length 308" in found.next


def test_the_proposal_tells_it_apart() -> None:
    """Sweeping what is proposed for n·L·A and n·L makes both known, and n·L·A comes back as the card has it."""
    proposed = {name: term(unet(SHORT), name).next for name in ("n·L·A", "n·L")}
    extra = []
    for text in proposed.values():
        size, batch, prompt = text.removesuffix(", no guidance").split(", ")
        height, width = map(int, size.split("x"))
        guidance = 1.0 if text.endswith("no guidance") else 7.5
        extra.append(
            Workload(height, width, int(prompt.split()[1]), int(batch.split()[1]), guidance, attention="eager")
        )
    report = unet(SHORT + extra)
    assert {term(report, n).status for n in ("n·L·A", "n·L")}.isdisjoint({"not identified"})
    assert term(report, "n·L·A").coef == pytest.approx(0.02 * World().scale["unet"], rel=0.05)


def test_an_effect_of_nothing_is_called_so() -> None:
    """Fused attention holds no scores: n·L·A is identified by long prompts, and no effect is seen."""
    report = identifiability(run(World(noise=0.01), grid(prompts=(77, 154, 231)))).stage("unet float16 sdpa")
    found = term(report, "n·L·A")
    assert found.status == "no effect seen" and found.low == 0
    assert report.prompt_lengths == (77, 154, 231)


def test_the_table_speaks_of_lhw_first() -> None:
    """The table begins with L·H·W of each UNet, and names what to sweep."""
    text = identifiability(run(World(), SHORT)).table()
    assert text.startswith("L·H·W in unet float16 eager: prompts of 77 tokens; it cannot be told from H·W")
    assert "to identify n·L: sweep" in text and "condition" in text


def test_it_turns_into_json() -> None:
    """The report is plain values, every stage in it."""
    found = identifiability(run(World(), SHORT))
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert len(values["stages"]) == 7
    with pytest.raises(KeyError):
        found.stage("unet float16 magic")


def test_without_a_successful_run_nothing_is_told() -> None:
    """Failed runs only: refused with what to do."""
    with pytest.raises(FitError, match="none of the 1 runs succeeded"):
        identifiability([Record(0, Workload(512, 512), "oom")])
