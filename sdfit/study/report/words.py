"""Prose of ``models/README.md`` as HTML, so that the page and the notes say the same: a small part of Markdown, no more."""

from __future__ import annotations

import re
from functools import cache
from html import escape

from sdfit.errors import SdfitError
from sdfit.files import shipped

_INLINE = (
    (re.compile(r"`([^`]+)`"), r"<code>\1</code>"),
    (re.compile(r"\*\*([^*]+)\*\*"), r"<strong>\1</strong>"),
    (re.compile(r"\[([^\]]+)\]\((https?://[^)]+)\)"), r'<a href="\2">\1</a>'),
)


@cache
def notes() -> str:
    """The notes on the equation, as Markdown."""
    path = shipped("models") / "README.md"
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SdfitError(f"cannot read '{path}': {error.strerror}; reinstall sdfit", path=str(path)) from error


def section(title: str) -> str:
    """The text under a heading of the notes.

    Examples
    --------
    >>> section("Why prompts of up to 77 tokens cost nothing").split(".")[0]
    'The tokenizer pads and cuts every prompt to 77 tokens before the first tensor is made'
    """
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", notes(), re.MULTILINE | re.DOTALL)
    if found is None:
        raise SdfitError(f"the notes on the equation, models/README.md, have no part '{title}'")
    return found[1].strip()


def rows_of(text: str) -> list[list[str]]:
    """The first Markdown table of a text, its head first, without the rule under it."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in table if set("".join(row)) - set("-")]


def inline(text: str) -> str:
    """Code, bold and links of a line; everything else is escaped.

    Examples
    --------
    >>> inline("**1** < `a`")
    '<strong>1</strong> &lt; <code>a</code>'
    """
    found = escape(text, quote=False)
    for pattern, shape in _INLINE:
        found = pattern.sub(shape, found)
    return found


def paragraphs(text: str) -> str:
    """Paragraphs and lists as HTML; tables and code are left out: they are shown by who knows their numbers."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    found = []
    for part in re.split(r"\n\s*\n", text):
        lines = part.strip().splitlines()
        if not lines or lines[0].startswith("|"):
            continue
        if lines[0].startswith("- "):
            items = re.split(r"^- ", part.strip(), flags=re.MULTILINE)[1:]
            found.append("<ul>" + "".join(f"<li>{inline(' '.join(item.split()))}</li>" for item in items) + "</ul>")
        else:
            found.append(f"<p>{inline(' '.join(lines))}</p>")
    return "\n".join(found)
