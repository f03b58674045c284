"""The page of one model: the calculator and the maps, and what the numbers rest on.

It is one self-contained HTML file that asks the network for nothing. Its arithmetic is `assets/model.js`, its data the JSON
of `sdfit.study.report.facts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from sdfit.fit.card import (
    accuracy_rows,
    environment_rows,
    evidence_lines,
    published_lines,
    short_rows,
    source_rows,
)
from sdfit.judging.evaluation import Evaluation
from sdfit.predict.artifact import Artifact
from sdfit.predict.predictor import Predictor
from sdfit.predict.schema import RESTS_ON
from sdfit.study.report import figures, tables
from sdfit.study.report.facts import card_facts, cards_of, model_facts
from sdfit.study.report.shell import asset, calculator, html_table, link, page, text_table
from sdfit.study.report.words import inline, paragraphs, section
from sdfit.units import percent
from sdfit.workload import CHOICES


def report(predictor: Predictor, unseen: Evaluation | None = None, *, home: str = "#") -> str:
    """The page of one model.

    Parameters
    ----------
    predictor : Predictor
        Its card is the calculator's first choice; the others are those that its model answers for.
    unseen : Evaluation, optional
        Of records that the fit did not see (`sdfit.study.report.unseen`); None: there were none at hand.
    home : str
        Where the name at the top leads.

    Returns
    -------
    str
        HTML.
    """
    artifact, card = predictor.artifact, predictor.card
    cards = [card_facts(f) for f in cards_of({artifact.name: predictor}) if f.artifact is artifact]
    first = card_facts(predictor)
    if card is None and cards:
        first = _best_known(artifact, cards)
    elif first["typed"] not in {known["typed"] for known in cards}:
        cards.insert(0, first)
    name = card.name if card is not None else f"Model {artifact.name}"
    lead = (
        "How much memory an img2img run needs, and whether it fits: the fitted equation, to be asked here, with what it rests on. "
        f"Made by sdfit from the model <code>{escape(artifact.name)}</code>."
    )
    rests = predictor.rests_on.split(": ", 1)[1]
    body = [
        f"<h1>{escape(name)}: GPU memory of Stable Diffusion v1.5</h1>",
        f'<p class="lead">{lead}</p>',
        f'<p class="rests">{escape(rests[:1].upper() + rests[1:])}.</p>',
        calculator(),
        _equation(artifact),
        _goodness(predictor, unseen),
        _published(predictor),
        _provenance(artifact),
    ]
    links = {
        "calculator": "Calculator",
        "map": "What fits",
        "equation": "Equation",
        "good": "How good",
        "published": "Published",
        "rests": "Provenance",
    }
    data = {"card": first["typed"], "cards": cards, "models": {artifact.name: model_facts(artifact)}}
    return page(f"{name} - sdfit", body, links, data, home)


def _best_known(artifact: Artifact, cards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the cards that a model answers for, the one with most published measurements; without any the first."""
    published: dict[str, int] = artifact.evaluation["published"]["cards"] if "published" in artifact.evaluation else {}
    return max(cards, key=lambda card: published.get(str(card["typed"]).split("-")[0], 0))


def _equation(artifact: Artifact) -> str:
    note = tables.theory_note(artifact)
    theory = tables.theory_rows(artifact)
    return (
        '<section id="equation" aria-labelledby="equation-title"><h2 id="equation-title">The equation</h2>'
        f"{asset('equation.html')}<p>The stages run one after the other, so the peak is the largest of them, never their sum. W is the weights that "
        "are on the card in the stage; the coefficients c are not negative and are fitted, one set for each stage, for each "
        "combination of the options that reach it, and for each regime of sizes in which its kernels run the same plans.</p>"
        f"{text_table(tables.symbol_rows(), numbers=False)}"
        f"<h3>Theory beside the fit</h3>{text_table(theory, words=(0, 1, 5))}"
        + (f'<p class="hint">{escape(note)}</p>' if note else "")
        + '<p class="hint">In bytes per unit of the term, float16 unless it says otherwise. A bound is open where some resolution '
        "alone tells the coefficient.</p>"
        f"<h3>Every term, in a sentence</h3>{paragraphs(section('Every term, in a sentence'))}"
        '<p class="hint">Numbers in these sentences are of float16 and, where kernels matter, of the model sm75.</p>'
        f"<h3>All stages, {CHOICES['dtype'][0]}</h3><details><summary>The coefficients that matter, stage by stage</summary>"
        f"{text_table(short_rows(artifact), numbers=False)}<p class='hint'>All of them, with bounds: <code>sdfit report --gpu "
        f"{escape(artifact.name)} --json</code>.</p></details></section>"
    )


def _goodness(predictor: Predictor, unseen: Evaluation | None) -> str:
    artifact, found = predictor.artifact, tables.beside(predictor)
    parts = [
        '<section id="good" aria-labelledby="good-title"><h2 id="good-title">How good it is</h2>',
        "<p>Relative errors of the regression against the records that it was fitted to"
        + ("" if artifact.provenance == "measured" else ", which are simulated")
        + ":</p>",
        text_table(accuracy_rows(artifact)),
    ]
    if found:
        inside = sum(one.inside for one in found)
        own = artifact.provenance == "published"
        parts.append(
            f"<p>Of {len(found)} published whole runs on cards that this model answers for, {inside} lie inside their "
            f"95&nbsp;% interval of allocated memory; they are listed below."
            + (" That is no proof: the intervals rest on these rows." if own else "")
            + "</p>"
        )
    if unseen is not None:
        kind = {"cuda": "measured", "trace": "simulated", "fake": "made-up"}.get(unseen.backend, unseen.backend)
        parts.append(
            f"<h3>Coverage on {kind} runs that the fit did not see</h3>{text_table(tables.coverage_rows(unseen))}"
        )
    else:
        parts.append(
            '<p class="hint">No records that the fit did not see were at hand; to judge it on some: <code>sdfit report --gpu '
            f"{escape(predictor.name)} --out page.html RECORDS</code>.</p>"
        )
    parts.append(_scatter(found, unseen))
    parts.append("<h3>What the intervals rest on</h3><ul>")
    parts += [f"<li>{inline(line)}</li>" for line in evidence_lines(artifact)]
    return "".join(parts) + "</ul></section>"


def _scatter(found: Sequence[tables.Beside], unseen: Evaluation | None) -> str:
    """Predicted beside true, and errors by size; nothing where there is no run to show."""
    few, few_errors = [], []
    for one in found:
        w = one.row.workload()
        words = (
            f"{one.row.id}, {one.row.card}, {one.row.height}x{one.row.width}, {w.batch_size}: {percent(one.error, 2)}"
        )
        few.append(figures.Dot(one.row.peak_bytes, one.predicted_bytes, words))
        few_errors.append(figures.Dot(w.batch_size * w.pixels, one.error, words))
    kind = "" if unseen is None else {"cuda": "measured", "trace": "simulated"}.get(unseen.backend, unseen.backend)
    many: dict[str, list[figures.Dot]] = {"allocated": [], "required": []}
    pairs: list[figures.Dot] = []
    for p in unseen.points if unseen else ():
        if p.metric in many:
            many[p.metric].append(figures.Dot(p.workload.batch_size * p.workload.pixels, p.error))
        if p.metric == "allocated":
            pairs.append(figures.Dot(p.actual_bytes, p.predicted_bytes))
    whose = " and ".join(
        [f"{len(few)} published whole runs (blue)"] * bool(few)
        + [f"{len(pairs)} unseen {kind} runs (grey)"] * bool(pairs)
    )
    drawn = []
    if few or pairs:
        drawn.append(
            (figures.predicted_against_true(few, pairs), f"Predicted against true peaks of allocated memory: {whose}.")
        )
        drawn.append(
            (
                figures.errors_by_size(few_errors, many["allocated"]),
                "Errors of allocated memory by size; the axis is linear up to 0.01 % and logarithmic beyond.",
            )
        )
    if many["required"]:
        drawn.append(
            (figures.errors_by_size([], many["required"]), f"Errors of required memory by size, unseen {kind} runs.")
        )
    shown = (f"<figure>{svg}<figcaption>{escape(words)}</figcaption></figure>" for svg, words in drawn)
    return f'<div class="figures">{"".join(shown)}</div>' if drawn else ""


def _published(predictor: Predictor) -> str:
    found = tables.beside(predictor)
    alone, rows = tables.alone_rows(predictor)
    parts = [
        '<section id="published" aria-labelledby="published-title"><h2 id="published-title">What others measured, beside ours</h2>'
    ]
    if found:
        head, *body = tables.beside_rows(found)
        cells = [[link(one.row, row[0]), *map(escape, row[1:])] for one, row in zip(found, body, strict=True)]
        parts.append("<p>Published peaks of allocated memory, whole runs; each row links to its source.</p>")
        parts.append(html_table(head, cells, words=(0, 1, 2, 3)))
    else:
        parts.append("<p>No whole run on a card that this model answers for was published.</p>")
    missing = tables.left_out(predictor)
    if missing:
        parts.append(f"<p>Left out: {missing} with options that this model has no coefficients for.</p>")
    if rows:
        head, *body = alone
        cells = [[link(one, row[0]), *map(escape, row[1:])] for one, row in zip(rows, body, strict=True)]
        parts.append(f"<details><summary>The VAE alone, beside its trace: {len(rows)} rows</summary>")
        parts.append(html_table(head, cells, words=(0, 1, 2, 3)) + "</details>")
    if "published" in predictor.artifact.evaluation:
        lines = published_lines(predictor.artifact)
        parts.append("".join(f"<p>{inline(line.removeprefix('- '))}</p>" for line in lines))
    return "".join(parts) + "</section>"


def _provenance(artifact: Artifact) -> str:
    return (
        '<section id="rests" aria-labelledby="rests-title"><h2 id="rests-title">What it rests on</h2>'
        f"<p>Provenance: <strong>{escape(artifact.provenance)}</strong>, {escape(RESTS_ON[artifact.provenance])}.</p>"
        f"{text_table(source_rows(artifact), words=(0, 1))}"
        f"<details><summary>Environment</summary>{text_table(environment_rows(artifact), numbers=False)}</details>"
        f"<h3>What is assumed, and what is not included</h3>{paragraphs(section('What is assumed, and what is not included'))}"
        "</section>"
    )
