"""Whose the coefficients of a corrected model are: the card's, as its runs tell them, its kernels', or its prior's. In words and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import product
from typing import Any

from sdfit.equation.regimes import REGIMES
from sdfit.equation.terms import TERMS
from sdfit.predict.artifact import Artifact

TOLD, LEFT = 0.9, 0.1
"""A coefficient is the card's from so large a share of its variance on that the runs removed, the prior's up to the other."""
WORDS = {"card": "the card's", "both": "both's", "kernels": "the kernels'", "prior": "the prior's"}
MOVED = 0.01
"""Of the prior's coefficient: one of the kernels is listed if it differs by more."""
EVIDENCE = (
    "draws of what the runs leave open of the kernels and the corrections, and errors of the prior's equation on unseen resolutions",
    "every sum of one such draw and one of the prior's own scores, stretched where the runs lie further apart",
)
"""What the intervals of a corrected model rest on: of allocated memory, of the other metrics."""


def whose(artifact: Artifact, key: str, row: int, term: str) -> str:
    """Whose a coefficient of a corrected model is: ``card``, ``both``, ``kernels`` or ``prior``.

    The runs removed `TOLD` of its variance or more; more than `LEFT`; or less, and it follows from a simulation with the kernels
    that the runs show, or is the prior's as it was.
    """
    told = artifact.prior["stages"][key]
    share = told["told"][row][told["terms"].index(term)] if term in told["terms"] else 0.0
    if share > LEFT:
        return "card" if share >= TOLD else "both"
    return "kernels" if key.split("|")[1] in artifact.prior.get("kernels", {}) else "prior"


def summary(artifact: Artifact) -> list[str]:
    """How many constants and slopes are whose: a sentence, then a line for what the kernels hold and for each stage."""
    counts: dict[str, Counter[str]] = {}
    for key, stage in artifact.stages.items():
        for term, row in product(artifact.prior["stages"][key]["terms"], range(len(stage["coef"]))):
            name = f"{key.split('|')[0]}, {'constants' if term == '1' else term}"
            counts.setdefault(name, Counter())[whose(artifact, key, row, term)] += 1
    known, every = artifact.prior, sum(counts.values(), Counter[str]())
    rest = "follow from the kernels that the runs show" if known.get("kernels") else "are the prior's"
    head = (
        f"{known['rows']} runs correct the prior '{known['name']}' ({known['provenance']}): of its {every.total()} constants and "
        f"slopes these are whose: {_shared(every)}; all other terms {rest}. A coefficient is the card's where its runs, or "
        f"those of what is like it, removed {TOLD:.0%} of its uncertainty or more, and not the card's where they removed {LEFT:.0%} "
        "or less"
    )
    return [head, *_of_kernels(known), *(f"{name}: {_shared(found)}" for name, found in counts.items())]


def _of_kernels(known: Mapping[str, Any]) -> list[str]:
    """What the runs show of the kernels, a line for each table, and what is held all the time."""
    said: dict[str, list[str]] = {}
    for dtype, words in known.get("kernels", {}).items():
        said.setdefault(words, []).append(dtype)
    lines = [f"kernels of {' and '.join(dtypes)}, as the runs show them: {words}" for words, dtypes in said.items()]
    if "kernels" in known and not said:
        lines = [
            "kernels: no table gives what the runs show; the prior's are corrected, and intervals are as wide as workspaces may be: "
            "sweep the whole grid of this card"
        ]
    constant = known.get("constant_bytes", 0)
    return lines + [f"held all the time beside what the prior has: {constant:+,} B"] * bool(constant)


def _shared(found: Counter[str]) -> str:
    return ", ".join(f"{found[owner]} {words}" for owner, words in WORDS.items() if found[owner])


def moved_rows(artifact: Artifact) -> list[tuple[str, ...]]:
    """Every coefficient that is not all the prior's, before and after; the head first."""
    lines: list[tuple[str, ...]] = [("stage", "regime", "term", "prior", "corrected", "unit", "whose")]
    for key, stage in artifact.stages.items():
        told = artifact.prior["stages"][key]
        for (i, term), row in product(enumerate(told["terms"]), range(len(stage["coef"]))):
            owner = whose(artifact, key, row, term)
            if owner == "prior":
                continue
            where = [REGIMES[r].words for r, index in enumerate(stage["regimes"]) if index == row]
            now = stage["coef"][row][stage["terms"].index(term)]
            if owner == "kernels" and abs(now - told["prior"][row][i]) <= MOVED * told["prior"][row][i]:
                continue
            numbers = (f"{value:.6g}" for value in (told["prior"][row][i], now))
            regime = "; ".join(where) if len(stage["coef"]) > 1 else "all"
            lines.append((" ".join(key.split("|")), regime, term, *numbers, TERMS[term].unit, owner))
    return lines
