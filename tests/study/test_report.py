"""The report: what it holds, and that its calculator, in a browser, answers what Python answers, to the byte."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import Page, unusable
from worlds import grid, measured, with_regimes

import sdfit
from sdfit.equation.regimes import REGIMES
from sdfit.equation.stages import STAGE
from sdfit.equation.terms import TERMS
from sdfit.errors import SdfitError, UnknownVariant
from sdfit.fit.card import coefficients, model_card, short_rows, usual_stages
from sdfit.predict.advise import NothingFits
from sdfit.predict.cards import kernels_of, table
from sdfit.predict.library import find_model
from sdfit.predict.memory import left
from sdfit.predict.options import options_that_fit
from sdfit.predict.predictor import Predictor
from sdfit.study.comparison import published
from sdfit.study.report import figures, tables
from sdfit.study.report.facts import boxes, card_facts, cards_of, equation_facts, model_facts
from sdfit.study.report.make import holdout, unseen, write_report, write_site
from sdfit.study.report.page import report
from sdfit.study.report.site import rests_in_words
from sdfit.study.report.words import paragraphs, section
from sdfit.units import GIB, format_bytes
from sdfit.workload import CHOICES, MAX_BATCH_SIZE, MAX_PROMPT_LENGTH, MAX_SIDE, MIN_SIDE, Workload

MOST_BYTES = 1 << 20
"""A report is to be mailed."""
CARDS = ("gtx1070", "v100", "t4", "h100")
"""One for each shipped model."""
needs_chromium = pytest.mark.usefixtures("browser_that_starts")


@pytest.fixture(scope="session")
def browser_that_starts() -> None:
    """Skip what needs Chromium where there is none, or it cannot be started."""
    why = unusable()
    if why:
        pytest.skip(why)


@pytest.fixture(scope="module")
def shipped() -> dict[str, Predictor]:
    """The shipped models, by card."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {card: sdfit.load(card).equation for card in CARDS}


@pytest.fixture(scope="module")
def t4(shipped: dict[str, Predictor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the T4."""
    path = tmp_path_factory.mktemp("report") / "t4.html"
    path.write_text(report(shipped["t4"], unseen(shipped["t4"])), encoding="utf-8")
    return path


def data_of(page: str) -> Any:
    """The data in a page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


# -- what a page holds --


def test_a_report_holds_what_it_promises(t4: Path, shipped: dict[str, Predictor]) -> None:
    """The equation beside theory, every term, errors and coverage, figures, published rows, provenance; under 1 MiB."""
    page, a = t4.read_text(encoding="utf-8"), shipped["t4"].artifact
    assert len(page.encode()) < MOST_BYTES and "{{" not in page
    for part in ("calculator", "map", "equation", "good", "published", "rests"):
        assert page.count(f'id="{part}"') == 1 and f'href="#{part}"' in page
    fitted = a.stages["vae_decoder_blocks|float16|kl"]["coef"][0]
    assert f"{fitted[a.stages['vae_decoder_blocks|float16|kl']['terms'].index('m·P')]:,.1f}" in page and "2,432" in page
    for title in ("Constant.", "VAE decoder: 1,536 B per pixel", "L·H·W: 0.5 B per pixel"):
        assert title in page
    assert page.count('<svg class="figure"') == 3 and "150 unseen simulated runs" in page
    for fact in (a.environment["torch"], a.sources[0]["sha256"][:16], f"{a.evaluation['rows']:,}"):
        assert str(fact) in page
    assert "not measured" in page and "the intervals rest on these rows" in page


def test_a_page_asks_the_network_for_nothing(t4: Path) -> None:
    """Nothing is loaded: no source, style, font or script has an address; links alone do, and a policy forbids the rest."""
    page = t4.read_text(encoding="utf-8")
    outside = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"\bsrc=|url\(|@import|<link[^>]+href=\"http", outside)
    assert set(re.findall(r'<(\w+)[^>]+href="https?:', outside)) == {"a"}
    assert "default-src 'none'" in page


def test_every_published_run_is_beside_ours_with_its_source(shipped: dict[str, Predictor]) -> None:
    """Each whole run on a card of the model: its amount, ours, and a link to the file at its commit."""
    found = tables.beside(shipped["t4"])
    whole = [row for row in tables.every_published() if row.whole_pipeline and row.metric == "allocated"]
    models = {f.artifact.name: f for f in shipped.values()}
    known = {row.id for row in whole if variant_known(models[kernels_of(row.card) or row.card], row.workload())}
    assert {one.row.id for f in shipped.values() for one in tables.beside(f)} == known and len(known) > 40
    assert sum(map(tables.left_out, shipped.values())) == len(whole) - len(known)
    one = next(one for one in found if one.row.id == "COL-003")
    assert one.error == pytest.approx(-0.174, abs=0.002) and one.inside
    page = report(shipped["t4"])
    for row in (one.row for one in found):
        assert f'href="{tables.address(row)}"' in page
    assert all(tables.address(row).startswith("https://") for row in tables.every_published())
    odd = replace(published.row("COL-001"), source="somebody's notebook")
    with pytest.raises(SdfitError, match="names no address"):
        tables.address(odd)


def test_coverage_is_that_of_the_evaluation(shipped: dict[str, Predictor]) -> None:
    """The table repeats the evaluation of the holdout; without records a page says how to give some."""
    found = unseen(shipped["t4"])
    assert found is not None and holdout(shipped["t4"].artifact)
    line = next(line for line in found.lines if (line.metric, line.group) == ("required", "all"))
    row = next(row for row in tables.coverage_rows(found) if row[0] == "required")
    assert row[1] == str(line.rows) and row[4] == f"{100 * (line.coverage or 0):.1f} %"
    assert "No records that the fit did not see were at hand" in report(shipped["v100"], unseen(shipped["v100"]))


def test_theory_of_other_kernels_is_called_so(shipped: dict[str, Predictor]) -> None:
    """Beside the numbers of Pascal and V100 the page says that the theory is that of other plans."""
    assert not tables.theory_note(shipped["t4"].artifact) and not tables.theory_note(shipped["h100"].artifact)
    assert "float16 is computed in float32" in tables.theory_note(shipped["gtx1070"].artifact)
    assert "the output is not copied" in tables.theory_note(shipped["v100"].artifact)
    for f in shipped.values():
        assert len(tables.theory_rows(f.artifact)) > 8


def test_facts_are_json_and_hold_every_term(shipped: dict[str, Predictor], f: Predictor) -> None:
    """No infinity, no text that ends a script; a card that no table has asks for its memory."""
    for one in (*shipped.values(), f):
        json.dumps([equation_facts(), model_facts(one.artifact), boxes()], allow_nan=False)
    assert equation_facts()["terms"] == list(TERMS)
    assert card_facts(f)["memory_bytes"] is None and card_facts(shipped["t4"])["memory_bytes"] == 15367929856
    page = report(f)
    assert data_of(page)["cards"][0]["typed"] == "fake" and page.count("</script>") == 2


def test_what_a_card_is_called_in_a_page_is_what_finds_it(shipped: dict[str, Predictor]) -> None:
    """Two cards of one short name are told apart, and each name that is shown leads to that card."""
    cards = [card_facts(one) for one in cards_of({"sm75": shipped["t4"], "sm61": shipped["gtx1070"]})]
    assert len({card["typed"] for card in cards}) == len(cards) > 80
    for card in cards:
        path, _, row = find_model(card["typed"])
        assert row is not None and path.stem == card["model"] and left(row).memory_bytes == card["memory_bytes"]


@pytest.fixture(scope="module")
def site(shipped: dict[str, Predictor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of all shipped models."""
    out = tmp_path_factory.mktemp("site") / "site"
    write_site({f.artifact.name: Predictor(f.artifact, f.path) for f in shipped.values()}, out)
    return out


def test_a_site_is_an_index_with_one_calculator_and_a_page_for_each_model(site: Path, tmp_path: Path) -> None:
    """Every card is in the index and links into the calculator; the pages it links to are there."""
    assert sorted(path.name for path in site.iterdir()) == ["index.html", *(f"sm{n}.html" for n in (61, 70, 75, 90))]
    page = (site / "index.html").read_text(encoding="utf-8")
    data = data_of(page)
    assert len(data["cards"]) == page.count('<a href="#gpu=') == len(table()) and page.count('id="form"') == 1
    assert set(data["models"]) == {"sm61", "sm70", "sm75", "sm90"} and len(page.encode()) < MOST_BYTES
    assert all((site / name).exists() for name in re.findall(r'href="(\w+\.html)"', page))
    assert data["card"] in {card["typed"] for card in data["cards"]}
    with pytest.raises(SdfitError, match="no model to report on"):
        write_site({}, tmp_path)


def test_an_index_says_what_its_models_rest_on(shipped: dict[str, Predictor]) -> None:
    """By name, and that nothing was measured only where nothing was."""
    one, other = shipped["t4"], Predictor(replace(shipped["v100"].artifact, provenance="measured"))
    assert rests_in_words({"a": one}).startswith("No number here was measured by this project. a: a simulated trace")
    both = rests_in_words({"a": one, "b": other})
    assert both.startswith("a: a simulated trace") and both.endswith("b: a sweep of that card.")


def test_a_page_replaces_only_a_page(shipped: dict[str, Predictor], tmp_path: Path) -> None:
    """Another file of that name, or a place that is none, is refused with what to do; an older page is replaced."""
    (tmp_path / "page.html").write_text("<p>mine")
    with pytest.raises(SdfitError, match="no page of sdfit's; choose another file"):
        write_report(shipped["v100"], tmp_path / "page.html")
    for _ in range(2):
        assert write_report(shipped["v100"], tmp_path / "ours.html").exists()
    with pytest.raises(SdfitError, match=r"ends in \.html"):
        write_report(shipped["v100"], tmp_path / "page.joblib")


def test_the_markdown_card_is_short_and_json_holds_every_coefficient(shipped: dict[str, Predictor]) -> None:
    """A line for each stage and regime of float16; each shipped card is what its model says now."""
    for f in shipped.values():
        card = model_card(f.artifact)
        assert f.path is not None and f.path.with_suffix(".md").read_text(encoding="utf-8") == card
        assert len(card) < 9_000
        rows = short_rows(f.artifact)[1:]
        assert len(rows) < 30 and all("float16" in row[0] for row in rows)
        for key in usual_stages(f.artifact):
            told = [words for row in rows if row[0] == key.replace("|", " ") for words in row[1].split("; ")]
            known = len(REGIMES) if STAGE[key.partition("|")[0]].widest_channels else 2
            assert told == ["all"] or (len(set(told)) == len(told) == known)
        every = coefficients(f.artifact)
        assert len(every) == sum(len(s["coef"]) * len(s["terms"]) for s in f.artifact.stages.values())
        assert all((one["coefficient"] is None) == bool(one["unidentified"]) for one in every)


def test_notes_become_html() -> None:
    """Paragraphs, lists, code, bold and links; what is not there is refused by name."""
    html = paragraphs(
        "A **b** `c<d`.\n\n- one\n  more\n- [two](https://x.org/)\n\n| a |\n| --- |\n\n```text\nno\n```\n"
    )
    assert html == (
        '<p>A <strong>b</strong> <code>c&lt;d</code>.</p>\n<ul><li>one more</li><li><a href="https://x.org/">two</a></li></ul>'
    )
    with pytest.raises(SdfitError, match="no part 'Nothing'"):
        section("Nothing")


def test_figures_place_what_they_show() -> None:
    """An exact prediction lies on the diagonal, an error of nothing in the middle, a larger one further out."""
    svg = figures.predicted_against_true([figures.Dot(GIB, GIB, "a<b")], [figures.Dot(4 * GIB, 4 * GIB)])
    assert "a&lt;b" in svg and svg.count("<circle") == 1
    dots = [figures.Dot(2.0**20, error, "x") for error in (0.0, 0.001, 0.1, -0.1)]
    svg = figures.errors_by_size(dots, [])
    heights = [float(y) for y in re.findall(r'<circle class="few" cx="[\d.]+" cy="([\d.]+)"', svg)]
    middle = (figures.TOP + figures.HIGH - figures.BOTTOM) / 2
    assert heights[0] == middle and heights[2] < heights[1] < middle
    assert heights[3] - middle == pytest.approx(middle - heights[2], abs=0.2)


# -- the calculator, in a browser --

ASK = """(cases => JSON.stringify(cases.map(([w, memory, wanted]) => {
  const model = sdfitPage.modelOf(sdfitPage.card());
  try {
    const verdict = model.verdict(w, memory), metrics = {};
    for (const metric of model.metrics) {
      const p = model.predict(w, metric, sdfitPage.data.facts.level);
      metrics[metric] = [p.value, p.low, p.high, p.lower, p.upper];
    }
    const live = model.predict(w, 'allocated', sdfitPage.data.facts.level);
    return {answer: verdict.answer, chance: verdict.chance, slower: verdict.slower, margin: verdict.margin,
      upper: model.upper(w), metrics, peaks: live.stages.map(({name, peak}) => [name, peak]), stage: live.stage,
      parts: model.breakdown(live), extrapolated: live.extrapolated, level: verdict.prediction.level,
      batch: wanted ? model.largestBatch(w, memory) : null,
      options: wanted ? model.options(w, memory).map(o => [o.change, o.upper, o.saved, o.costs]) : null};
  } catch (error) {
    if (error instanceof sdfit.Unknown) return {unknown: error.message};
    throw error;
  }
})))"""
CHUNK = 500
ON_A_CARD = float(1 << 38)
"""Amounts up to it, more than any card has, are compared to the byte [bytes]; sums of products beyond it have fewer digits."""
NOISE = 1e-3
"""By how much two orders of a sum of products may differ below `ON_A_CARD`, where they round to different sides of a half [bytes]."""


def drawn(rng: random.Random) -> tuple[dict[str, Any], int]:
    """A workload of any kind that is allowed, and an amount of memory [bytes]."""

    def side() -> int:
        return rng.randint(MIN_SIDE, rng.choice((1024, 3000, MAX_SIDE)))

    w = {
        "height": side(),
        "width": side(),
        "prompt_length": rng.choice((77, rng.randint(1, 77), rng.randint(78, 400), rng.randint(1, MAX_PROMPT_LENGTH))),
        "batch_size": rng.choice((1, 1, 2, 3, rng.randint(1, 16), rng.randint(1, MAX_BATCH_SIZE))),
        "guidance_scale": rng.choice((7.5, 1.0, 0.0, rng.uniform(0, 9))),
        **{name: rng.choice(choices if rng.random() < 0.4 else choices[:1]) for name, choices in CHOICES.items()},
    }
    return w, int(2 ** rng.uniform(31, 37))


def largest_batch(f: Predictor, w: dict[str, Any], memory: int) -> dict[str, int]:
    """The largest batch of a workload's size, as the page gives it."""
    try:
        found = f.max_batch_size(**{name: value for name, value in w.items() if name != "batch_size"}, memory=memory)
    except NothingFits:
        return {"sure": 0, "likely": 0}
    return {"sure": int(found), "likely": found.likely}


def asked(f: Predictor, w: dict[str, Any], memory: int, wanted: bool) -> dict[str, Any]:
    """What Python answers, in the shape of `ASK`."""
    workload = Workload(**w)
    try:
        peaks = {metric: f.predict_workload(workload, metric=metric) for metric in f.metrics}
        verdict = f.verdict(**w, memory=memory)
        options = options_that_fit(f, workload, memory=memory) if wanted else None
        batch = largest_batch(f, w, memory) if wanted else None
    except UnknownVariant:
        return {"unknown": True}
    live = peaks["allocated"]
    return {
        "answer": verdict.answer,
        "chance": verdict.chance,
        "slower": verdict.slower,
        "margin": verdict.margin_bytes,
        "upper": verdict.prediction.upper,
        "level": verdict.prediction.level,
        "metrics": {name: [float(p), *p.interval, p.lower, p.upper] for name, p in peaks.items()},
        "peaks": [[name, peak] for name, peak in live.stage_peaks.items()],
        "stage": live.stage,
        "parts": [[name, part] for name, part in live.breakdown.items()],
        "extrapolated": live.extrapolated,
        "batch": batch,
        "options": None
        if options is None
        else [[o.change, o.upper_bytes, o.saved_bytes, o.to_dict()["costs"]] for o in options],
    }


def same(theirs: Any, ours: Any) -> bool:
    """Whether two answers are equal, their amounts to the byte."""
    if isinstance(ours, float):
        if theirs is None or not math.isfinite(ours):
            return theirs is None and math.isinf(ours)
        apart = abs(theirs - ours)
        if max(abs(theirs), abs(ours)) < ON_A_CARD:
            return round(theirs) == round(ours) or apart < NOISE
        return bool(apart <= 1e-12 * abs(ours))
    if isinstance(ours, dict):
        return theirs.keys() == ours.keys() and all(same(theirs[name], ours[name]) for name in ours)
    if isinstance(ours, list | tuple):
        return len(theirs) == len(ours) and all(map(same, theirs, ours))
    return bool(theirs == ours)


def held_together(page: Page, f: Predictor, rows: int, seed: int, every: int) -> None:
    """Ask the page and Python the same of so many runs that the model knows, options of some; what one knows not, neither does."""
    rng, known, unknown = random.Random(seed), 0, 0
    while known < rows:
        cases = [(*drawn(rng), i % every == 0) for i in range(min(CHUNK, 2 * (rows - known)))]
        answers = json.loads(page(f"{ASK}({json.dumps(cases)})"))
        for (w, memory, wanted), theirs in zip(cases, answers, strict=True):
            ours = asked(f, w, memory, wanted)
            if "unknown" in ours:
                assert "unknown" in theirs, w
                unknown += 1
            else:
                assert same(theirs, ours), (w, memory, theirs, ours)
                known += 1
    assert unknown


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Predictor], Page]]:
    """Open the report of a model in a browser."""
    pages: list[Page] = []

    def opened(f: Predictor) -> Page:
        path = tmp_path_factory.mktemp("opened") / "page.html"
        path.write_text(report(f), encoding="utf-8")
        pages.append(Page(path).__enter__())
        return pages[-1]

    yield opened
    for page in pages:
        page.__exit__(None, None, None)


@needs_chromium
@pytest.mark.parametrize("card", CARDS)
def test_the_page_answers_what_python_answers(
    card: str, shipped: dict[str, Predictor], opened: Callable[[Predictor], Page]
) -> None:
    """Verdict, chance, every metric with its bounds, stages, parts and changes of 100 random workloads, to the byte."""
    page = opened(shipped[card])
    held_together(page, shipped[card], 100, seed=1, every=5)
    assert not page.console


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_the_page_answers_what_python_answers_over_ten_thousand(
    card: str, shipped: dict[str, Predictor], opened: Callable[[Predictor], Page]
) -> None:
    """The same of 10,000 random workloads."""
    held_together(opened(shipped[card]), shipped[card], 10_000, seed=2, every=20)


@needs_chromium
def test_models_of_every_provenance_are_answered_alike(
    f: Predictor, noisy: Predictor, shipped: dict[str, Predictor], opened: Callable[[Predictor], Page]
) -> None:
    """A swept card, one with too few scores for the safe level, and a traced model, which never says that a run fits."""
    traced = Predictor(replace(shipped["t4"].artifact, provenance="traced"), None, "t4", shipped["t4"].card)
    for model in (f, noisy, traced):
        held_together(opened(model), model, 60, seed=3, every=10)


@needs_chromium
def test_weights_that_come_module_by_module_are_answered_alike(opened: Callable[[Predictor], Page]) -> None:
    """A made-up card that was swept with every offload, slices of every size and other executions, regimes of their own."""
    pytest.importorskip("sklearn")
    from sdfit.fit.fit import fit

    options: list[dict[str, Any]] = [{"offload": kind} for kind in CHOICES["offload"]]
    options += [{"attention": kind} for kind in CHOICES["attention"]] + [{"dtype": "float32", "execution": "tf32"}]
    options += [{"execution": "channels_last"}, {"offload": "sequential", "safety_checker": False}]
    swept = [w for one in options for w in grid(sides=(256, 384, 520, 768), batches=(1, 3), **one)]
    made = with_regimes(fit(measured(swept)), random.Random(1))
    stages = {key: stage | {"low": stage["coef"], "high": stage["coef"]} for key, stage in made.stages.items()}
    f = Predictor(replace(made, stages=stages))
    held_together(opened(f), f, 150, seed=4, every=10)


@needs_chromium
def test_the_form_shows_what_python_says(t4: Path, shipped: dict[str, Predictor]) -> None:
    """Fields filled by hand, a link, a change that is applied, a combination that is not known, a size that cannot be."""
    model = shipped["t4"]
    with Page(t4, "#height=2048&width=2048&batch_size=2&memory=14.5") as page:
        verdict = model.verdict(2048, 2048, batch_size=2, memory="14.5 GiB")
        assert verdict.answer == "does not fit" and "Does not fit" in page("verdict.textContent")
        words = page("document.getElementById('in-words').textContent")
        assert format_bytes(verdict.prediction) in words and format_bytes(verdict.prediction.upper) in words
        shown = page("document.getElementById('metrics').textContent")
        for metric in model.metrics:
            assert f"{round(model(2048, 2048, batch_size=2, metric=metric)):,} B" in shown
        assert page("command.textContent") == (
            "sdfit fits --gpu t4 --memory 14.5GiB --width 2048 --height 2048 --batch-size 2"
        )
        assert "is the better number" in page("document.getElementById('shell-words').textContent")
        options = options_that_fit(model, Workload(2048, 2048, batch_size=2), memory="14.5 GiB")
        assert page("[...document.querySelectorAll('.changes code')].map(c => c.textContent)") == [
            ", ".join(f"{name}={value}" for name, value in option.change.items()) for option in options
        ]
        page("document.querySelector('.changes button').click()")
        assert "Fits" in page("verdict.textContent") and page("form.batch_size.value") == "1"
        page.type("vae", "tiny")
        page.type("vae_tiling", True)
        assert page("verdict.textContent") == "Not known" and page("told.hidden")
        assert "not fitted to this combination" in page("document.getElementById('shell-words').textContent")
        assert page("command.textContent").endswith("--vae tiny --vae-tiling")
        page.type("vae", "kl")
        page.type("width", 8)
        assert page("verdict.textContent") == "Not a run" and "from 64 to 16384" in page(
            "document.getElementById('in-words').textContent"
        )
        page.type("width", 640)
        page.type("card", "rtx3060-12gb")
        assert page("memory.value") == f"{card_facts(sdfit_quietly('rtx3060-12gb'))['memory_bytes'] / GIB:.3f}"
        address = page("location.hash")
        assert (
            page("command.textContent") == ("sdfit fits --gpu rtx3060-12gb --width 640 --height 2048 --vae-tiling")
            and "gpu=rtx3060-12gb" in address
        )
        assert not page.console
    undecided = model.verdict(640, 640, batch_size=2, attention="eager", memory="8 GiB")
    with Page(t4, "#height=640&width=640&batch_size=2&attention=eager&memory=8") as page:
        assert undecided.answer == "may fit" and not undecided.slower
        assert "The equation cannot decide this one" in page("document.getElementById('shell-words').textContent")
        page("copy.focus()")
        page.press("Enter")
        page.wait("copy.textContent !== 'Copy'")  # on the clipboard, or where a page may not write there selected
        assert page("copy.textContent === 'Copied' || getSelection().toString().startsWith('sdfit fits --gpu t4')")
        page.type("height", 1152)
        page.type("width", 1152)
        page.type("attention", "sdpa")
        assert "with slower kernels" in page("verdict.textContent") and page("copy.textContent") == "Copy"
        assert "cannot decide" not in page("document.getElementById('shell-words').textContent")
        assert not page.console
    with Page(t4, address) as again:
        assert again("command.textContent").endswith("--vae-tiling") and again("form.width.value") == "640"


def variant_known(f: Predictor, w: Workload) -> bool:
    """Whether a model knows the variant of a workload."""
    try:
        f.variant(w.variant)
    except UnknownVariant:
        return False
    return True


def sdfit_quietly(name: str) -> Predictor:
    """Load a model without its note."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sdfit.load(name).equation


@needs_chromium
def test_the_maps_follow_and_can_be_walked(t4: Path, shipped: dict[str, Predictor]) -> None:
    """The map says of a size what the model says; arrows move, Enter puts it into the calculator; the slider is the batch."""
    model = shipped["t4"]
    with Page(t4) as page:
        for _ in range(4):
            page("document.querySelector('#fits-map svg').focus()")
            page.press("ArrowRight")
        page(
            "(s => { s.value = 3; s.dispatchEvent(new Event('input', {bubbles: true})); })(document.getElementById('map-batch'))"
        )
        wanted = model.verdict(1024, 1280, batch_size=3, memory="80 GiB").prediction.upper
        words = f"1280 wide, 1024 high, 3 images: at most {format_bytes(wanted)}."
        page.wait(f"document.getElementById('fits-words').textContent.startsWith({json.dumps(words)})")
        box = next((box for box in boxes() if wanted <= box["memory_bytes"]), None)
        assert box and page("document.getElementById('fits-words').textContent").endswith(
            f"Sure to fit on {box['gib']} GB."
        )
        page("document.querySelector('#fits-map svg').focus()")
        page.press("Enter")
        assert page("[form.width.value, form.height.value, form.batch_size.value]") == ["1280", "1024", "3"]
        assert page("document.querySelectorAll('#stage-maps svg').length") == sum(
            variant_known(model, Workload(512, 512, attention=kind)) for kind in CHOICES["attention"]
        )
        page.type("batch_size", 1)
        page.type("offload", "group_block")
        page.wait("document.getElementById('stage-legend').textContent.includes('UNet, deep blocks')")
        assert "undefined" not in page("document.getElementById('map').innerHTML")
        assert not page.console


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(390, 844), (1400, 1000)], ids=["phone", "desk"])
def test_a_page_is_readable(scheme: str, size: tuple[int, int], t4: Path) -> None:
    """No line is wider than a phone, text stands out (4.5 to 1 at least), nothing is asked of the network, nothing fails."""
    with Page(t4, size=size, scheme=scheme) as page:
        assert page("document.documentElement.scrollWidth <= innerWidth")
        page("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        assert page("document.documentElement.scrollWidth <= innerWidth")
        faint = page(CONTRAST)
        assert not faint, faint
        assert not page.console and page.requests == [t4.resolve().as_uri()]
        unnamed = page(
            "[...document.querySelectorAll('input,select,button')].filter(x => !(x.labels?.length || x.ariaLabel || x.textContent.trim())).length"
        )
        assert unnamed == 0


CONTRAST = """(() => {
  const brush = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => { brush.clearRect(0, 0, 1, 1); brush.fillStyle = colour; brush.fillRect(0, 0, 1, 1); return [...brush.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => { const c = [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * c[0] + .7152 * c[1] + .0722 * c[2]; };
  const ground = node => { for (; node; node = node.parentElement) { const c = rgba(getComputedStyle(node).backgroundColor); if (c[3] > 200) return c; } return [255, 255, 255, 255]; };
  const found = new Set();
  for (const node of document.querySelectorAll('main *, header *, footer *')) {
    const own = [...node.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || !node.checkVisibility({opacityProperty: true}) || node.closest('svg, option, math')) continue;
    const a = light(rgba(getComputedStyle(node).color)), b = light(ground(node));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) found.add(`${node.tagName}.${node.className} ${ratio.toFixed(2)} ${node.textContent.slice(0, 30)}`);
  }
  return [...found];
})()"""


@needs_chromium
def test_a_picture_that_is_dropped_gives_its_size(t4: Path) -> None:
    """PNG, JPEG, WebP, GIF, BMP and AVIF, turned as their notes say, are as Pillow sees them; a torn or other file is none."""
    pillow = pytest.importorskip("PIL.Image")
    from PIL import features

    def saved(kind: str, turned: bool = False, **how: Any) -> bytes:
        picture, out = pillow.effect_noise((413, 277), 60).convert("RGB"), io.BytesIO()
        if turned:
            exif = pillow.Exif()
            exif[0x0112] = 6
            how["exif"] = exif
        picture.save(out, kind, **how)
        return out.getvalue()

    files = {
        "png": saved("PNG"), "turned png": saved("PNG", turned=True), "jpeg": saved("JPEG"),
        "progressive": saved("JPEG", progressive=True, icc_profile=bytes(150_000)), "turned jpeg": saved("JPEG", turned=True),
        "webp": saved("WEBP"), "lossless webp": saved("WEBP", lossless=True), "turned webp": saved("WEBP", turned=True),
        "gif": saved("GIF"), "bmp": saved("BMP"),
    }  # fmt: skip
    if features.check("avif"):
        files["avif"] = saved("AVIF")
    with Page(t4) as page:
        for name, content in files.items():
            wanted = [277, 413] if "turned" not in name else [413, 277]
            assert size_in(page, content) == {"height": wanted[0], "width": wanted[1]}, name
        assert size_in(page, b"a letter, not a picture, and long enough for a header") is None
        assert size_in(page, files["jpeg"][:30]) is None and size_in(page, b"") is None
        page(
            "(async () => { const bag = new DataTransfer(); bag.items.add(new File([Uint8Array.from(atob('"
            + base64.b64encode(files["turned jpeg"]).decode()
            + "'), c => c.charCodeAt(0))], 'photo.jpg')); picture.files = bag.files; picture.dispatchEvent(new Event('change')); })()"
        )
        page.wait("form.height.value === '413'")
        assert page("form.width.value") == "277" and "photo.jpg" in page(
            "document.getElementById('picture-words').textContent"
        )
        assert not page.console


@needs_chromium
def test_a_page_is_used_by_mouse_and_keys(t4: Path, tmp_path: Path) -> None:
    """A picture dropped on the field or beside it, a slider that is dragged, fields reached with Tab and changed with keys."""
    pillow = pytest.importorskip("PIL.Image")
    photo, letter = tmp_path / "photo.png", tmp_path / "letter.txt"
    pillow.new("RGB", (640, 960)).save(photo)
    letter.write_text("not a picture", encoding="utf-8")
    with Page(t4) as page:
        for where in ("#drop", "h1"):
            page.type("width", 512)
            page.drop(photo, where)
            page.wait("form.width.value === '640' && form.height.value === '960'")
        page.drop(letter, "h1")
        page.wait("document.getElementById('picture-words').textContent.startsWith('letter.txt: not a picture')")
        assert page("location.href").startswith(t4.resolve().as_uri()) and page("form.width.value") == "640"
        page.slide("#map-batch")
        page.wait("document.getElementById('map-batch-shown').textContent === '16'")
        page("form.width.focus()")
        page.press("ArrowUp")
        assert page("form.width.value") == "641"
        while page("document.activeElement.name") != "offload":
            page.press("Tab")
        page.press("ArrowDown")
        while page("document.activeElement.name") != "vae_tiling":
            page.press("Tab")
        page.press("Space")
        page.wait("document.getElementById('command').textContent.includes('--vae-tiling --offload model')")
        assert not page.console


def size_in(page: Page, content: bytes) -> Any:
    """What the page makes of a file's content."""
    text = base64.b64encode(content).decode()
    return page(f"pictures.size(new Blob([Uint8Array.from(atob('{text}'), c => c.charCodeAt(0))]))")


@needs_chromium
def test_the_index_finds_a_card_and_asks_about_it(site: Path) -> None:
    """The table is filtered by what is typed; a card's link puts it, and its model, into the calculator."""
    with Page(site / "index.html", size=(390, 844)) as page:
        page(
            "(box => { box.value = 'v100 32'; box.dispatchEvent(new Event('input')); })(document.getElementById('find'))"
        )
        links = "[...document.querySelectorAll('#cards-table tbody tr')].filter(r => !r.hidden).map(r => r.querySelector('a'))"
        assert page(f"{links}.length > 0 && {links}.every(a => a.textContent.includes('V100'))")
        page(f"{links}[0].click()")
        page.wait("sdfitPage.card().model === 'sm70'")
        needed = sdfit_quietly("v100").verdict(512, 512, memory="80 GiB").prediction
        assert format_bytes(needed.upper) in page("document.getElementById('in-words').textContent")
        assert page("document.documentElement.scrollWidth <= innerWidth") and not page.console
