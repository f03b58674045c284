"""The shell of a page: its assets put together, the calculator's form, tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import sdfit
from sdfit.fit.card import Rows
from sdfit.predict.cards import KINDS
from sdfit.study.comparison.published import PublishedRow
from sdfit.study.report.facts import boxes, equation_facts
from sdfit.study.report.tables import address
from sdfit.study.report.words import inline
from sdfit.workload import CHOICES

ASSETS = Path(__file__).with_name("assets")
SCRIPTS = ("model.js", "picture.js", "maps.js", "page.js")
"""In the order in which they build on each other."""


def page(title: str, body: Sequence[str], links: Mapping[str, str], data: dict[str, Any], home: str) -> str:
    """Put a page together.

    Parameters
    ----------
    title : str
    body : sequence of str
        Its parts, as HTML.
    links : mapping
        Anchor -> what the top of the page calls it.
    data : dict
        For the scripts: ``card``, the first choice; ``cards``; ``models``.
    home : str
        Where the name at the top leads.
    """
    words = dict(zip(KINDS, ("GeForce", "Laptop", "Workstation", "Data centre"), strict=True))
    data = {"facts": equation_facts() | {"kinds": words}, "boxes": boxes()} | data
    parts = {
        "title": escape(title),
        "style": asset("page.css"),
        "version": escape(sdfit.__version__),
        "home": escape(home),
        "links": "".join(f'<a href="#{anchor}">{words}</a>' for anchor, words in links.items()),
        "body": "\n".join(body),
        "footer": f"Made by sdfit {escape(sdfit.__version__)}. This page holds all it needs: it loads nothing and sends nothing.",
        # a closing tag inside the data would end the script
        "data": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/"),
        "script": "\n".join(asset(name) for name in SCRIPTS),
    }
    page = asset("page.html")
    for name, text in parts.items():
        page = page.replace("{{" + name + "}}", text)
    return page


def asset(name: str) -> str:
    """The text of a file beside the Python."""
    return (ASSETS / name).read_text(encoding="utf-8").rstrip("\n")


def link(row: PublishedRow, text: str) -> str:
    """A published row's name, leading to its source."""
    return f'<a href="{escape(address(row))}" rel="noreferrer">{escape(text)}</a>'


def text_table(rows: Rows, *, numbers: bool = True, words: Sequence[int] = (0,)) -> str:
    """A table of text, its cells with the marks of `sdfit.study.report.words.inline`."""
    head, *body = rows
    return html_table(
        head, [[inline(cell) for cell in row] for row in body], words=words if numbers else range(len(head))
    )


def html_table(head: Sequence[str], cells: Sequence[Sequence[str]], *, words: Sequence[int], name: str = "") -> str:
    """A table of HTML cells; columns that are not of words are flush right."""
    kind = ["" if i in words else ' class="n"' for i in range(len(head))]
    top = "".join(f'<th scope="col"{k}>{inline(text)}</th>' for k, text in zip(kind, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{cell}</td>" for k, cell in zip(kind, row, strict=True)) + "</tr>" for row in cells
    )
    mark = (f' id="{name}"' if name else "") + (' class="many"' if len(head) > 4 else "")
    return f'<div class="scroll"><table{mark}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def calculator() -> str:
    """The calculator and the maps, the options as `sdfit.workload.CHOICES` has them."""
    options = []
    ticked_last = sorted(CHOICES.items(), key=lambda item: isinstance(item[1][0], bool))
    for name, allowed in ticked_last:
        label = name.replace("_", " ").replace("vae", "VAE")
        if isinstance(allowed[0], bool):
            options.append(f'<label class="check"><input type="checkbox" name="{name}"> {label}</label>')
        else:
            values = "".join(f'<option value="{value}">{value}</option>' for value in allowed)
            options.append(f'<label>{label} <select name="{name}">{values}</select></label>')
    return asset("calculator.html").replace("{{options}}", "\n".join(options))
