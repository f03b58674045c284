"""One self-contained HTML page: the calculator and the maps, and what the numbers rest on.

`report` makes the page of one model, `index` that of all cards with one calculator. Neither asks the network for anything;
its arithmetic is `assets/model.js`, its data the JSON of `sdfit.study.report.facts`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import sdfit
from sdfit.errors import listed
from sdfit.fit.card import (
    Rows,
    accuracy_rows,
    environment_rows,
    evidence_lines,
    published_lines,
    short_rows,
    source_rows,
)
from sdfit.judging.evaluation import Evaluation
from sdfit.predict.artifact import RESTS_ON, Artifact
from sdfit.predict.predictor import Predictor
from sdfit.study.comparison.published import PublishedRow
from sdfit.study.report import figures, tables
from sdfit.study.report.facts import boxes, card_facts, cards_of, equation_facts, model_facts
from sdfit.study.report.words import inline, paragraphs, section
from sdfit.units import format_bytes, percent
from sdfit.workload import CHOICES

ASSETS = Path(__file__).with_name("assets")
LABELS = {
    "dtype": "dtype",
    "attention": "attention",
    "vae": "VAE",
    "offload": "offload",
    "execution": "execution",
    "vae_slicing": "VAE slicing",
    "vae_tiling": "VAE tiling",
    "safety_checker": "safety checker",
}
_EQUATION = (
    '<div class="equation"><math display="block"><mi mathvariant="normal">peak</mi><mo>=</mo>'
    '<munder><mo movablelimits="false">max</mo><mrow><mi mathvariant="normal">stages</mi><mspace width=".25em"/><mi>s</mi></mrow>'
    '</munder><mrow><mo>(</mo><msub><mi>W</mi><mi>s</mi></msub><mo>+</mo><munder><mo>∑</mo><mrow><mi mathvariant="normal">terms'
    '</mi><mspace width=".25em"/><mi>t</mi></mrow></munder><msub><mi>c</mi><mrow><mi>s</mi><mo>,</mo><mi>t</mi></mrow></msub>'
    "<mo>·</mo><mi>t</mi><mo>(</mo><mi>B</mi><mo>,</mo><mi>n</mi><mo>,</mo><mi>A</mi><mo>,</mo><mi>L</mi><mo>,</mo><mi>m</mi>"
    "<mo>,</mo><mi>P</mi><mo>,</mo><mi>D</mi><mo>)</mo><mo>)</mo></mrow></math></div>"
)


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
        _calculator(),
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
    return _page(f"{name} - sdfit", body, links, data, home)


def _best_known(artifact: Artifact, cards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the cards that a model answers for, the one with most published measurements; without any the first."""
    published: dict[str, int] = artifact.evaluation.get("published", {}).get("cards", {})
    return max(cards, key=lambda card: published.get(str(card["typed"]).split("-")[0], 0))


FIRST_CARD = "rtx3060-12gb"
"""What the index's calculator starts with: a card that many have."""


def index(models: Mapping[str, Predictor]) -> str:
    """The page of all cards: one calculator over every model, and a table of the cards.

    Parameters
    ----------
    models : mapping
        Name -> the model, each with a page of its own named after it.
    """
    known = cards_of(dict(models))
    rows: Rows = [("card", "type", "float16", "PyTorch may take", "largest square", "rests on", "model")]
    for f in known:
        facts = card_facts(f)
        rows.append(
            (
                facts["name"],
                facts["typed"],
                f.card.half if f.card else "",
                format_bytes(facts["memory_bytes"]),
                _largest_square(f, facts["memory_bytes"]),
                f.evidence,
                f.artifact.name,
            )
        )
    cells = [
        [
            f'<a href="#gpu={r[1]}&amp;height=512&amp;width=512">{escape(r[0])}</a>',
            f"<code>{escape(r[1])}</code>",
            *map(escape, r[2:6]),
            f'<a href="{r[6]}.html">{escape(r[6])}</a>',
        ]
        for r in rows[1:]
    ]
    body = [
        "<h1>GPU memory of Stable Diffusion v1.5</h1>",
        f'<p class="lead">How much memory an img2img run needs, and whether it fits, on {len(known)} cards. Ask the calculator, '
        "or look a card up below.</p>",
        f'<p class="rests">{escape(rests_in_words(models))}</p>',
        _calculator(),
        '<section id="cards" aria-labelledby="cards-title"><h2 id="cards-title">Cards</h2>'
        "<p>What PyTorch may take is what CUDA reports, less a CUDA context and, on a card that drives a screen, a desktop. The "
        "largest square is the one that is sure to fit: one image, fused attention, float16, or float32 where float16 comes out "
        "wrong; in steps of 64 pixels.</p>"
        '<label class="find">Find a card <input id="find" type="search" placeholder="3060, laptop, sm86..."></label>'
        f"{_html_table(rows[0], cells, words=(0, 1, 2, 5, 6), name='cards-table')}</section>",
        '<section id="models" aria-labelledby="models-title"><h2 id="models-title">Models</h2>'
        "<p>Each has its own page: the equation with its numbers, how good it is, what it rests on.</p>"
        + _html_table(
            ("model", "provenance", "runs", "median error, unseen resolutions", "worst"),
            [
                [
                    f'<a href="{n}.html">{escape(n)}</a>',
                    f.provenance,
                    f"{f.artifact.evaluation['rows']:,}",
                    *(percent(_unseen_errors(f.artifact)[k], 3) for k in ("median", "worst")),
                ]
                for n, f in models.items()
            ],
            words=(0, 1),
        )
        + "</section>",
    ]
    links = {"calculator": "Calculator", "map": "What fits", "cards": "Cards", "models": "Models"}
    data = {
        "card": FIRST_CARD,
        "cards": [card_facts(f) for f in known] or [card_facts(f) for f in models.values()],
        "models": {name: model_facts(f.artifact) for name, f in models.items()},
    }
    return _page("GPU memory of Stable Diffusion v1.5 - sdfit", body, links, data, "index.html")


def rests_in_words(models: Mapping[str, Predictor]) -> str:
    """What each of some models rests on, in a sentence or two."""
    kinds: dict[str, list[str]] = {}
    for name, f in models.items():
        kinds.setdefault(f.provenance, []).append(name)
    simulated = "" if set(kinds) - {"published", "traced"} else "No number here was measured by this project. "
    return simulated + "; ".join(f"{listed(names)}: {RESTS_ON[kind]}" for kind, names in kinds.items()) + "."


def _largest_square(f: Predictor, memory_bytes: int) -> str:
    from sdfit.predict.advise import NothingFits

    try:
        height, width = f.largest(memory=memory_bytes, dtype="float32" if f.wrong_half else "float16")
    except NothingFits:
        return "none"
    return f"{height}x{width}"


def _unseen_errors(artifact: Artifact) -> dict[str, Any]:
    found: dict[str, Any] = artifact.evaluation.get("cross_validated", artifact.evaluation["fitted"])
    return found


# -- the parts --


def _calculator() -> str:
    options = []
    for name, allowed in sorted(
        CHOICES.items(), key=lambda item: isinstance(item[1][0], bool)
    ):  # boxes to tick come last
        label = LABELS.get(name, name)
        if isinstance(allowed[0], bool):
            options.append(f'<label class="check"><input type="checkbox" name="{name}"> {label}</label>')
        else:
            values = "".join(f'<option value="{value}">{value}</option>' for value in allowed)
            options.append(f'<label>{label} <select name="{name}">{values}</select></label>')
    return _asset("calculator.html").replace("{{options}}", "\n".join(options))


def _equation(artifact: Artifact) -> str:
    note = tables.theory_note(artifact)
    theory = tables.theory_rows(artifact)
    return (
        '<section id="equation" aria-labelledby="equation-title"><h2 id="equation-title">The equation</h2>'
        f"{_EQUATION}<p>The stages run one after the other, so the peak is the largest of them, never their sum. W is the weights that "
        "are on the card in the stage; the coefficients c are not negative and are fitted, one set for each stage, for each "
        "combination of the options that reach it, and for each regime of sizes in which its kernels run the same plans.</p>"
        f"{_text_table(tables.symbol_rows(), numbers=False)}"
        f"<h3>Theory beside the fit</h3>{_text_table(theory, words=(0, 1, 5))}"
        + (f'<p class="hint">{escape(note)}</p>' if note else "")
        + '<p class="hint">In bytes per unit of the term, float16 unless it says otherwise. A bound is open where some resolution '
        "alone tells the coefficient.</p>"
        f"<h3>Every term, in a sentence</h3>{paragraphs(section('Every term, in a sentence'))}"
        '<p class="hint">Numbers in these sentences are of float16 and, where kernels matter, of the model sm75.</p>'
        f"<h3>All stages, {CHOICES['dtype'][0]}</h3><details><summary>The coefficients that matter, stage by stage</summary>"
        f"{_text_table(short_rows(artifact), numbers=False)}<p class='hint'>All of them, with bounds: <code>sdfit report --gpu "
        f"{escape(artifact.name)} --json</code>.</p></details></section>"
    )


def _goodness(predictor: Predictor, unseen: Evaluation | None) -> str:
    artifact, found = predictor.artifact, tables.beside(predictor)
    parts = [
        '<section id="good" aria-labelledby="good-title"><h2 id="good-title">How good it is</h2>',
        "<p>Relative errors of the regression against the records that it was fitted to"
        + ("" if artifact.provenance == "measured" else ", which are simulated")
        + ":</p>",
        _text_table(accuracy_rows(artifact)),
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
            f"<h3>Coverage on {kind} runs that the fit did not see</h3>{_text_table(tables.coverage_rows(unseen))}"
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
        cells = [[_link(one.row, row[0]), *map(escape, row[1:])] for one, row in zip(found, body, strict=True)]
        parts.append("<p>Published peaks of allocated memory, whole runs; each row links to its source.</p>")
        parts.append(_html_table(head, cells, words=(0, 1, 2, 3)))
    else:
        parts.append("<p>No whole run on a card that this model answers for was published.</p>")
    if rows:
        head, *body = alone
        cells = [[_link(one, row[0]), *map(escape, row[1:])] for one, row in zip(rows, body, strict=True)]
        parts.append(f"<details><summary>The VAE alone, beside its trace: {len(rows)} rows</summary>")
        parts.append(_html_table(head, cells, words=(0, 1, 2, 3)) + "</details>")
    if "published" in predictor.artifact.evaluation:
        lines = published_lines(predictor.artifact)
        parts.append("".join(f"<p>{inline(line.removeprefix('- '))}</p>" for line in lines))
    return "".join(parts) + "</section>"


def _provenance(artifact: Artifact) -> str:
    return (
        '<section id="rests" aria-labelledby="rests-title"><h2 id="rests-title">What it rests on</h2>'
        f"<p>Provenance: <strong>{escape(artifact.provenance)}</strong>, {escape(RESTS_ON[artifact.provenance])}.</p>"
        f"{_text_table(source_rows(artifact), words=(0, 1))}"
        f"<details><summary>Environment</summary>{_text_table(environment_rows(artifact), numbers=False)}</details>"
        f"<h3>What is assumed, and what is not included</h3>{paragraphs(section('What is assumed, and what is not included'))}"
        "</section>"
    )


# -- putting together --


def _page(title: str, body: Sequence[str], links: Mapping[str, str], data: dict[str, Any], home: str) -> str:
    from sdfit.predict.cards import KINDS

    words = dict(zip(KINDS, ("GeForce", "Laptop", "Workstation", "Data centre"), strict=True))
    data = {"facts": equation_facts() | {"kinds": words}, "boxes": boxes()} | data
    parts = {
        "title": escape(title),
        "style": _asset("page.css"),
        "version": escape(sdfit.__version__),
        "home": escape(home),
        "links": "".join(f'<a href="#{anchor}">{words}</a>' for anchor, words in links.items()),
        "body": "\n".join(body),
        "footer": f"Made by sdfit {escape(sdfit.__version__)}. This page holds all it needs: it loads nothing and sends nothing.",
        # a closing tag inside the data would end the script
        "data": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/"),
        "script": "\n".join(_asset(name) for name in ("model.js", "picture.js", "page.js")),
    }
    page = _asset("page.html")
    for name, text in parts.items():
        page = page.replace("{{" + name + "}}", text)
    return page


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8").rstrip("\n")


def _link(row: PublishedRow, text: str) -> str:
    return f'<a href="{escape(tables.address(row))}" rel="noreferrer">{escape(text)}</a>'


def _text_table(rows: Rows, *, numbers: bool = True, words: Sequence[int] = (0,)) -> str:
    """A table of text, its cells with the marks of `sdfit.study.report.words.inline`."""
    head, *body = rows
    return _html_table(
        head, [[inline(cell) for cell in row] for row in body], words=words if numbers else range(len(head))
    )


def _html_table(head: Sequence[str], cells: Sequence[Sequence[str]], *, words: Sequence[int], name: str = "") -> str:
    """A table of HTML cells; columns that are not of words are flush right."""
    kind = ["" if i in words else ' class="n"' for i in range(len(head))]
    top = "".join(f'<th scope="col"{k}>{inline(text)}</th>' for k, text in zip(kind, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{cell}</td>" for k, cell in zip(kind, row, strict=True)) + "</tr>" for row in cells
    )
    mark = (f' id="{name}"' if name else "") + (' class="many"' if len(head) > 4 else "")
    return f'<div class="scroll"><table{mark}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
