"""The index over all cards: one calculator, a table of the cards, the models that answer for them."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from sdfit.errors import listed
from sdfit.fit.card import Rows
from sdfit.predict.advise import NothingFits
from sdfit.predict.artifact import Artifact
from sdfit.predict.predictor import Predictor
from sdfit.predict.schema import RESTS_ON
from sdfit.study.report.facts import card_facts, cards_of, model_facts
from sdfit.study.report.shell import calculator, html_table, page
from sdfit.units import format_bytes, percent

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
        calculator(),
        '<section id="cards" aria-labelledby="cards-title"><h2 id="cards-title">Cards</h2>'
        "<p>What PyTorch may take is what CUDA reports, less a CUDA context and, on a card that drives a screen, a desktop. The "
        "largest square is the one that is sure to fit: one image, fused attention, float16, or float32 where float16 comes out "
        "wrong; in steps of 64 pixels.</p>"
        '<label class="find">Find a card <input id="find" type="search" placeholder="3060, laptop, sm86..."></label>'
        f"{html_table(rows[0], cells, words=(0, 1, 2, 5, 6), name='cards-table')}</section>",
        '<section id="models" aria-labelledby="models-title"><h2 id="models-title">Models</h2>'
        "<p>Each has its own page: the equation with its numbers, how good it is, what it rests on.</p>"
        + html_table(
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
    return page("GPU memory of Stable Diffusion v1.5 - sdfit", body, links, data, "index.html")


def rests_in_words(models: Mapping[str, Predictor]) -> str:
    """What each of some models rests on, in a sentence or two."""
    kinds: dict[str, list[str]] = {}
    for name, f in models.items():
        kinds.setdefault(f.provenance, []).append(name)
    simulated = "" if set(kinds) - {"published", "traced"} else "No number here was measured by this project. "
    return simulated + "; ".join(f"{listed(names)}: {RESTS_ON[kind]}" for kind, names in kinds.items()) + "."


def _largest_square(f: Predictor, memory_bytes: int) -> str:
    try:
        height, width = f.largest(memory=memory_bytes, dtype="float32" if f.wrong_half else "float16")
    except NothingFits:
        return "none"
    return f"{height}x{width}"


def _unseen_errors(artifact: Artifact) -> dict[str, Any]:
    found: dict[str, Any] = artifact.evaluation.get("cross_validated", artifact.evaluation["fitted"])
    return found
