"""An artifact in words: the model card, and the table of coefficients that a fit prints."""

from __future__ import annotations

from typing import Any

from sdfit.equation.regimes import REGIMES
from sdfit.equation.terms import TERMS
from sdfit.predict.artifact import RESTS_ON, Artifact
from sdfit.predict.predictor import Predictor
from sdfit.units import aligned, percent


def coefficient_rows(artifact: Artifact) -> list[tuple[str, ...]]:
    """Each stage's coefficients with their 95 % bounds and units, as text; the head first."""
    lines: list[tuple[str, ...]] = [("stage", "regime", "term", "coefficient", "95 % low", "95 % high", "unit")]
    for key, stage in artifact.stages.items():
        for row, values in enumerate(stage["coef"]):
            members = [REGIMES[i].words for i, index in enumerate(stage["regimes"]) if index == row]
            label = "all" if len(stage["coef"]) == 1 else "; ".join(members)
            for i, name in enumerate(stage["terms"]):
                if name in stage["unidentified"]:
                    lines.append((key, label, name, "not identified", "", "", TERMS[name].unit))
                    continue
                found = (values[i], stage["low"][row][i], stage["high"][row][i])
                numbers = ("open" if v is None else f"{v:.6g}" for v in found)
                lines.append((key, label, name, *numbers, TERMS[name].unit))
    return lines


def short_rows(artifact: Artifact) -> list[tuple[str, ...]]:
    """A line for each stage and regime that has coefficients of its own, the zero ones left out; the head first."""
    lines: list[tuple[str, ...]] = [("stage", "regime", "peak above the weights")]
    for key, stage in artifact.stages.items():
        for row, values in enumerate(stage["coef"]):
            members = [REGIMES[i].words for i, index in enumerate(stage["regimes"]) if index == row]
            label = "all" if len(stage["coef"]) == 1 else "; ".join(members)
            parts = [
                f"{value:.6g} {TERMS[name].unit} · {name}"
                for name, value in zip(stage["terms"], values, strict=True)
                if value
            ]
            lines.append((key, label, " + ".join(parts).replace("B · 1", "B")))
    return lines


def fit_summary(artifact: Artifact) -> str:
    """What a fit achieved, on a screen: errors of the stages beside those of the baseline, and of each metric."""
    ev = artifact.evaluation
    lines = [
        f"{artifact.name}: {artifact.provenance} ({RESTS_ON[artifact.provenance]})",
        f"rows: {ev['rows']} succeeded, {ev['oom_rows']} out of memory, {ev['crashed_rows']} crashed; "
        f"{len(artifact.swept)} variants, {len(artifact.stages)} sets of coefficients",
        _errors("stages, fitted", ev["fitted"]),
    ]
    if "cross_validated" in ev:
        lines.append(_errors(f"stages, on unseen resolutions ({ev['folds']} folds)", ev["cross_validated"]))
    for metric, found in ev.get("metrics", {}).items():
        lines.append(_errors(f"{metric}, on unseen resolutions", found))
    plain = list(artifact.baseline["variants"].values())
    medians = sorted(found["median"] for found in plain)
    lines.append(
        f"plain four-term baseline of {len(plain)} variants, fitted: median {percent(medians[len(medians) // 2], 3)}, worst "
        f"{percent(max(found['worst'] for found in plain), 3)}"
    )
    return "\n".join(lines)


def _errors(title: str, found: dict[str, Any]) -> str:
    return (
        f"{title}: median {percent(found['median'], 3)}, 95th percentile {percent(found['p95'], 3)}, "
        f"worst {percent(found['worst'], 3)}"
    )


def model_card(artifact: Artifact) -> str:
    """The model card in Markdown, all of it from the artifact."""
    ev, env = artifact.evaluation, artifact.environment
    lines = [
        f"# {artifact.name}",
        "",
        f"Provenance: **{artifact.provenance}**, {RESTS_ON[artifact.provenance]}.",
        "Made by `sdfit fit`; do not edit.",
        "",
        "## What it rests on",
        "",
        "| fact | value |",
        "| --- | --- |",
    ]
    lines += [f"| {name} | {_shown(value)} |" for name, value in env.items() if value is not None]
    lines += ["", "| records | sha256 | rows | out of memory |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {s.get('name')} | {str(s.get('sha256', ''))[:16]} | {s.get('rows', '')} | {s.get('oom', '')} |"
        for s in artifact.sources
    ]
    lines += ["", "## How good it is", "", "Relative errors of allocated memory.", ""]
    lines += ["| model | rows | median | 95th percentile | worst |", "| --- | --- | --- | --- | --- |"]
    lines.append(_row("stages, fitted", ev["fitted"], ev["rows"]))
    if "cross_validated" in ev:
        lines.append(
            _row(
                f"stages, unseen resolutions, {ev['folds']} folds", ev["cross_validated"], ev["cross_validated"]["rows"]
            )
        )
    for metric, found in ev.get("metrics", {}).items():
        lines.append(_row(f"{metric}, unseen resolutions", found, found["rows"]))
    for name, found in artifact.baseline["variants"].items():
        lines.append(_row(f"plain four-term baseline, {name}, fitted", found, found["rows"]))
    if "published" in ev:
        lines += ["", *_published(ev["published"])]
    lines += ["", "## What the intervals rest on", "", *_evidence(artifact)]
    lines += ["", "## Variants swept", "", *(f"- {name}" for name in artifact.swept)]
    lines += ["", "## Coefficients", ""]
    lines += ["The terms are explained in README.md beside this file; `sdfit fit --json` prints their bounds too.", ""]
    head, *rows = short_rows(artifact)
    lines += [_cells(head), _cells(("---",) * len(head)), *(_cells(row) for row in rows)]
    return "\n".join(lines) + "\n"


def _evidence(artifact: Artifact) -> list[str]:
    """Lines on what each metric's interval rests on."""
    counts = {metric: table[""]["count"] for metric, table in artifact.scores.items() if "" in table}
    if artifact.provenance != "published":
        return [f"- {metric}: {count} runs on resolutions that the fit did not see" for metric, count in counts.items()]
    lines = []
    for metric, count in counts.items():
        if metric == "allocated":
            lines.append(f"- {metric}: {count} published whole runs beside their traces")
        else:
            without = " (but for one whose excess is likeliest an optional workspace)" * (
                metric in ("required", "minimum")
            )
            lines.append(
                f"- {metric}: every sum of one published error of allocated memory{without} and one error of the regression "
                "against the simulated allocator; nobody has published this metric of whole runs"
            )
    return lines


def _published(found: dict[str, Any]) -> list[str]:
    """Lines on how the trace compares with what others measured on cards with the same kernels."""
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


def _row(title: str, found: dict[str, Any], rows: int) -> str:
    return _cells((title, str(rows), *(percent(found[k], 3) for k in ("median", "p95", "worst"))))


def _cells(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"


def _shown(value: Any) -> str:
    return str(value).replace("|", "\\|")


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
