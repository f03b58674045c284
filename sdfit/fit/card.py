"""An artifact in words: the tables of its card, in Markdown here and in HTML by `sdfit.study.report`; what a fit prints."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from sdfit.equation.metrics import REPLAYED_FAMILY, UNSEEN
from sdfit.equation.regimes import REGIMES, regime
from sdfit.equation.sizes import Array, Sizes
from sdfit.equation.stages import STAGE
from sdfit.equation.terms import TERMS, design_matrix
from sdfit.fit import whose
from sdfit.predict.artifact import Artifact
from sdfit.predict.predictor import Predictor
from sdfit.predict.schema import RESTS_ON
from sdfit.units import aligned, percent
from sdfit.workload import CHOICES

Rows = list[tuple[str, ...]]
"""A table as text, its head first."""
SHOWN_FROM = 0.001
"""Share of what a stage holds above the weights from which on a term is shown in the short table."""
ALIKE = 0.005
"""Share of it up to which two regimes are one line there."""


def coefficients(artifact: Artifact) -> list[dict[str, Any]]:
    """Every coefficient with its 95 % bounds, as plain values [the unit is a field]; an open bound is None."""
    found = []
    for key, stage in artifact.stages.items():
        for row, values in enumerate(stage["coef"]):
            for i, name in enumerate(stage["terms"]):
                known = name not in stage["unidentified"]
                found.append(
                    {
                        "stage": key,
                        "regime": _regime(stage, row),
                        "term": name,
                        "coefficient": values[i] if known else None,
                        "low": stage["low"][row][i] if known else None,
                        "high": stage["high"][row][i] if known else None,
                        "unit": TERMS[name].unit,
                        "unidentified": stage["unidentified"].get(name),
                    }
                    | ({"whose": whose.whose(artifact, key, row, name)} if artifact.prior else {})
                )
    return found


def short_rows(artifact: Artifact) -> Rows:
    """A line for each stage and regime that differs, with the terms that matter there.

    Of the default dtype, where weights are on the card as a whole and kernels are chosen as usual. A regime differs from
    another that gives `ALIKE` of the sum more or less at some size of the two; those that do not are one line, with the numbers of
    the first. A term matters that is `SHOWN_FROM` of the sum at the smallest or at the largest size that was swept.
    """
    lines: Rows = [("stage", "regime", "peak above the weights [B]")]
    for key in usual_stages(artifact):
        stage = artifact.stages[key]
        columns = design_matrix(tuple(key.split("|")), _ends(stage["domain"]))
        for rows in _alike(key, stage):
            values = stage["coef"][rows[0]]
            shares = columns * np.array(values)
            matter = (shares >= SHOWN_FROM * shares.sum(axis=1, keepdims=True)).any(axis=0)
            parts = [
                _number(value) + (f"·{name}" if name != "1" else "")
                for name, value, shown in zip(stage["terms"], values, matter, strict=True)
                if value and shown
            ]
            lines.append((" ".join(key.split("|")), _regimes(key, stage, rows), " + ".join(parts)))
    return lines


def usual_stages(artifact: Artifact) -> list[str]:
    """The stages of the default dtype that only the fields reach which reach them always; all where there are none."""
    usual = str(CHOICES["dtype"][0])
    parts = {key: key.split("|") for key in artifact.stages}
    found = [key for key, (name, *rest) in parts.items() if usual in rest and len(rest) == len(STAGE[name].fields)]
    return found or list(artifact.stages)


def _alike(key: str, stage: dict[str, Any]) -> list[list[int]]:
    """The rows of a stage's coefficients, those together that give the same at all swept sizes of their regimes."""
    name, sizes = key.partition("|")[0], _sizes(stage["domain"])
    design = design_matrix(tuple(key.split("|")), sizes)
    row_of = np.asarray(stage["regimes"])[regime(name, sizes)]
    every = design @ np.array(stage["coef"]).T
    groups: list[list[int]] = []
    for row in range(len(stage["coef"])):
        for group in groups:
            mine = every[np.isin(row_of, [*group, row])]
            if np.all(np.abs(mine[:, row] - mine[:, group[0]]) <= ALIKE * mine[:, group[0]]):
                group.append(row)
                break
        else:
            groups.append([row])
    return groups


def _sizes(domain: dict[str, Any]) -> Sizes:
    """Sizes all over a swept domain, guided and not, in one VAE pass; the smallest always."""
    most = max(domain["B·A"][1], domain["B"][0] * domain["A"][0])
    found = [
        (B, B * guided, A, L)
        for B in np.unique(_between(domain["B"]).round())
        for A in _between(domain["A"])
        if most >= B * A
        for guided in (1, 2)
        for L in domain["L"]
    ]
    B, n, A, L = np.array(found, dtype=float).T
    return Sizes(B, n, A, L, B, A, 0 * A)


def _between(ends: list[int]) -> Array:
    return np.geomspace(ends[0], ends[1], 9)


def _regimes(key: str, stage: dict[str, Any], rows: list[int]) -> str:
    """Where some sets of coefficients hold, in words; of a stage that no number of elements divides only by its images."""
    if len(_alike(key, stage)) == 1:
        return "all"
    divided = STAGE[key.partition("|")[0]].widest_channels > 0
    found = [one for one, row in zip(REGIMES, stage["regimes"], strict=True) if row in rows]
    return "; ".join(one.words for one in found if divided or not one.elements[0])


def _ends(domain: dict[str, Any]) -> Sizes:
    """The smallest and the largest sizes of a swept domain, guided, in one VAE pass."""
    A, L = np.array(domain["A"], dtype=float), np.array(domain["L"], dtype=float)
    B = np.array([domain["B"][0], max(domain["B·A"][1] // domain["A"][1], 1)], dtype=float)
    return Sizes(B, 2 * B, A, L, B, A, 0 * A)


def _regime(stage: dict[str, Any], row: int) -> str:
    """Where a set of coefficients holds, in words."""
    if len(stage["coef"]) == 1:
        return "all"
    return "; ".join(REGIMES[i].words for i, index in enumerate(stage["regimes"]) if index == row)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def fit_summary(artifact: Artifact) -> str:
    """What a fit achieved, on a screen: errors of the stages beside those of the baseline, and of each metric."""
    ev = artifact.evaluation
    lines = [
        f"{artifact.name}: {artifact.provenance} ({RESTS_ON[artifact.provenance]})",
        f"rows: {ev['rows']} succeeded, {ev['oom_rows']} out of memory, {ev['crashed_rows']} crashed; "
        f"{len(artifact.swept)} variants, {len(artifact.stages)} sets of coefficients",
        _errors("stages, fitted", ev["fitted"]),
    ]
    if artifact.prior:
        head, *stages = whose.summary(artifact)
        lines[2:2] = [head, *(f"  {line}" for line in stages)]
    if "cross_validated" in ev:
        lines.append(_errors(f"stages, {_unseen(artifact)}", ev["cross_validated"]))
    for metric, found in ev.get("metrics", {}).items():
        lines.append(_errors(f"{metric}, on unseen resolutions", found))
    plain = list(artifact.baseline["variants"].values())
    medians = sorted(found["median"] for found in plain)
    lines.append(
        f"plain four-term baseline of {len(plain)} variants, fitted: median {percent(medians[len(medians) // 2], 3)}, worst "
        f"{percent(max(found['worst'] for found in plain), 3)}"
    )
    return "\n".join(lines)


def _unseen(artifact: Artifact) -> str:
    """What the cross-validated errors are of."""
    return "each run by the others" if artifact.prior else f"unseen resolutions ({artifact.evaluation['folds']} folds)"


def _errors(title: str, found: dict[str, Any]) -> str:
    return (
        f"{title}: median {percent(found['median'], 3)}, 95th percentile {percent(found['p95'], 3)}, "
        f"worst {percent(found['worst'], 3)}"
    )


def environment_rows(artifact: Artifact) -> Rows:
    """What the records were made under."""
    known = [(name, str(value)) for name, value in artifact.environment.items() if value is not None]
    return [("fact", "value"), *known]


def source_rows(artifact: Artifact) -> Rows:
    """The records files that a model was fitted to."""
    rows: Rows = [("records", "sha256", "rows", "out of memory")]
    for source in artifact.sources:
        rows.append((source["name"], source["sha256"][:16], str(source["rows"]), str(source["oom"])))
    return rows


def accuracy_rows(artifact: Artifact) -> Rows:
    """Relative errors of the fit, on its own rows and on resolutions that it did not see."""
    ev = artifact.evaluation
    rows: Rows = [("model", "rows", "median", "95th percentile", "worst")]

    def add(title: str, found: dict[str, Any], count: int) -> None:
        rows.append((title, f"{count:,}", *(percent(found[k], 3) for k in ("median", "p95", "worst"))))

    add("allocated, by stages, fitted", ev["fitted"], ev["rows"])
    if "cross_validated" in ev:
        found = ev["cross_validated"]
        add(f"allocated, by stages, {_unseen(artifact)}", found, found["rows"])
        if "regime_known" in ev:
            add(
                "the same, where other resolutions of the regime were left in",
                ev["regime_known"],
                ev["regime_known"]["rows"],
            )
    for metric, found in ev.get("metrics", {}).items():
        if metric != "allocated" or "cross_validated" not in ev:
            add(f"{metric}, unseen resolutions", found, found["rows"])
    rows.append(("plain four-term baseline, one for each variant, fitted", *_baseline(artifact)))
    return rows


def _baseline(artifact: Artifact) -> tuple[str, ...]:
    """The plain regressions of all variants in one line: rows, the middle one's median, the highest of the others."""
    plain = list(artifact.baseline["variants"].values())
    median = sorted(found["median"] for found in plain)[len(plain) // 2]
    highest = (percent(max(found[k] for found in plain), 3) for k in ("p95", "worst"))
    return f"{sum(found['rows'] for found in plain):,}", percent(median, 3), *highest


def swept_rows(artifact: Artifact) -> Rows:
    """What was swept of each dtype and attention: how many combinations, and the options that occur in them."""
    groups: dict[str, list[list[str]]] = defaultdict(list)
    for name in artifact.swept:
        dtype, attention, *options = name.split(" ")
        groups[f"{dtype} {attention}"].append(options)
    lines: Rows = [("variant", "combinations", "of")]
    for name, combinations in groups.items():
        values: dict[str, list[str]] = defaultdict(list)
        for field, value in (option.split("=") for options in combinations for option in options):
            if value not in values[field]:
                values[field].append(value)
        ordered = sorted(values, key=list(CHOICES).index)
        words = "; ".join(f"{field}={', '.join(values[field])}" for field in ordered)
        lines.append((name, str(len(combinations)), words or "as it is"))
    return lines


def model_card(artifact: Artifact) -> str:
    """The model card in Markdown, all of it from the artifact."""
    lines = [
        f"# {artifact.name}",
        "",
        f"Provenance: **{artifact.provenance}**, {RESTS_ON[artifact.provenance]}.",
        "Made by `sdfit fit`; do not edit.",
        "",
        "## What it rests on",
        "",
        *_markdown(environment_rows(artifact)),
        "",
        *_markdown(source_rows(artifact)),
        "",
        "## How good it is",
        "",
        "Relative errors.",
        "",
        *_markdown(accuracy_rows(artifact)),
    ]
    if "published" in artifact.evaluation:
        lines += ["", *published_lines(artifact)]
    if artifact.prior:
        head, *stages = whose.summary(artifact)
        lines += ["", "## Whose the coefficients are", "", f"{head}.", "", *(f"- {line}" for line in stages)]
        lines += ["", *_markdown(whose.moved_rows(artifact))]
    lines += ["", "## What the intervals rest on", "", *(f"- {line}" for line in evidence_lines(artifact))]
    lines += ["", "## Variants swept", "", "Each by name: `sdfit report --json`.", "", *_markdown(swept_rows(artifact))]
    lines += ["", "## Coefficients", ""]
    lines += [
        f"Of {CHOICES['dtype'][0]}, and of each stage the terms that matter, regimes that agree within {percent(ALIKE, 1)} in one line; terms are explained in README.md beside this file. "
        "All of them, with bounds: `sdfit report --json`.",
        "",
        *_markdown(short_rows(artifact)),
    ]
    return "\n".join(lines) + "\n"


def evidence_lines(artifact: Artifact) -> list[str]:
    """What each metric's interval rests on, a sentence each."""
    counts = {metric: table[""]["count"] for metric, table in artifact.scores.items()}
    if artifact.prior:
        return [f"{metric}: {whose.EVIDENCE[metric != 'allocated']}" for metric in counts]
    if artifact.provenance != "published":
        return [f"{metric}: {count} runs on resolutions that the fit did not see" for metric, count in counts.items()]
    lines = []
    for metric, count in counts.items():
        if metric == "allocated":
            lines.append(f"{metric}: {count} published whole runs beside their traces")
        else:
            caps = REPLAYED_FAMILY in artifact.scores[metric]
            without = " (but for one whose excess is likeliest an optional workspace)" * caps
            scored = artifact.scores[metric][REPLAYED_FAMILY] if caps else artifact.scores["allocated"][""]
            kinds = artifact.scores[metric].get(UNSEEN)
            unseen = f", or of a kind never swept what packing added in {kinds['count']} others" if kinds else ""
            lines.append(
                f"{metric}: by the equation, every sum of one published error of allocated memory{without} and one error of the "
                f"regression against the simulated allocator{unseen}; of a simulated run, those {scored['count']} published errors alone, "
                "the furthest of them at a level that so few do not reach; nobody has published this metric of whole runs"
            )
    return lines


def published_lines(artifact: Artifact) -> list[str]:
    """How the trace compares with what others measured on cards with the same kernels."""
    found = artifact.evaluation["published"]
    if not found["rows"]:
        return ["No whole run on a card with these kernels was published; its intervals come from other cards' rows."]
    cards = ", ".join(f"{card} {count}" for card, count in found["cards"].items())
    lines = [
        f"Beside {found['rows']} published whole runs on cards with these kernels the trace is off by "
        f"{percent(found['median'], 3)} in the median and {percent(found['worst'], 3)} at worst (published rows of allocated "
        f"memory, the VAE alone among them: {cards})."
    ]
    lines += [
        f"- {miss['id']} ({miss['size']}) is off by {percent(miss['error'], 2)}: {miss['reason']}."
        for miss in found["misses"]
    ]
    return lines


def _markdown(rows: Rows) -> list[str]:
    head, *body = rows
    return [_cells(head), _cells(("---",) * len(head)), *(_cells(row) for row in body)]


def _cells(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def models_table(models: dict[str, Predictor]) -> str:
    """The models that can be loaded: name, what each rests on, how good, where."""
    lines = [("model", "provenance", "rows", "variants", "median error", "worst error", "file")]
    for name, predictor in models.items():
        a = predictor.artifact
        errors = a.evaluation.get("cross_validated", a.evaluation["fitted"])
        lines.append(
            (
                name,
                a.provenance,
                str(a.evaluation["rows"]),
                str(len(a.swept)),
                percent(errors["median"], 3),
                percent(errors["worst"], 3),
                str(predictor.path),
            )
        )
    return aligned(lines, left=2)
