"""Records to an Artifact.

Each stage's coefficients are fitted on every record that shares them; what is left over is judged on resolutions that
the fit did not see (grouped cross-validation), and those errors become the conformal scores. The plain four-term
regression over whole runs is fitted beside it, as the baseline that the stages have to beat.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import sdfit
from sdfit.equation.sizes import Array, domain_columns
from sdfit.equation.stages import StageKey, told_by
from sdfit.equation.weights import baseline_label, weights_table
from sdfit.errors import FitError
from sdfit.fit.baseline import baseline
from sdfit.fit.folds import error_summary
from sdfit.fit.held_out import Mask, counted, cross_validate, fit_stages, own_rows, predict_stages
from sdfit.fit.metric_models import fit_metrics
from sdfit.fit.observations import Observations, Runs, observe
from sdfit.fit.scores import PublishedRow, kept, published_scores
from sdfit.fit.stage_model import StageModel
from sdfit.predict.artifact import Artifact, canonical
from sdfit.predict.cards import kernels_of
from sdfit.records import Record, RecordsFile
from sdfit.workload import variant_name

FEWEST_SIZES = 3
"""Sizes that constant, H·W and (H·W)² need."""
LISTED_ERROR = 0.01
"""A published row that the trace misses by more is named in the model's card."""
FEWEST_PUBLISHED = 19
"""Published whole runs on cards with the same kernels, from which on those of other cards say nothing about a model: so
many support a bound at level 0.95."""
WHOLE = 10_000
"""Coefficients from here on are rounded to whole bytes: those of what does not grow with the pixels."""


def fit(
    data: RecordsFile,
    name: str | None = None,
    sources: Sequence[Mapping[str, Any]] = (),
    published: Sequence[PublishedRow] = (),
) -> Artifact:
    """Fit the equation to records of one environment.

    Parameters
    ----------
    data : RecordsFile
        As `sdfit.records.read` or `sdfit.records.pool` gives it.
    name : str, optional
        The card; None takes the environment's.
    sources : list of mapping
        Where the records come from: name, sha256, rows.
    published : sequence of PublishedRow
        Published measurements beside their traces: what the intervals of a trace with kernel workspaces rest on. Without
        them its intervals only say how well the equation follows the trace.

    Returns
    -------
    Artifact

    Raises
    ------
    FitError
        If no run succeeded, or the sizes are too few for the terms: which term, and how many more it needs.
    """
    ok = [r for r in data.records if r.outcome == "ok"]
    if not ok:
        counts = {o: sum(r.outcome == o for r in data.records) for o in ("oom", "crash")}
        raise FitError(
            f"none of the {len(data.records)} runs succeeded ({counts['oom']} out of memory, {counts['crash']} crashed); "
            "sweep smaller sizes",
            **counts,
        )
    runs = Runs(data.records)
    seen = observe(runs)
    _enough_sizes(seen)
    models = fit_stages(seen)
    held_out, borrowed, folds = cross_validate(runs, seen, models)
    fitted = predict_stages(models, runs)
    metrics, scores, errors = fit_metrics(runs, fitted, held_out)
    environment = dict(data.environment)
    rests_on = provenance(environment)
    evaluation = _evaluation(runs, fitted, held_out, borrowed, folds)
    evaluation["metrics"] = {
        metric: error_summary(found).to_dict() | {"rows": len(found)} for metric, found in errors.items() if len(found)
    }
    if rests_on == "published" and published:
        alike = _same_kernels(str(environment.get("name")), published)
        evaluation["published"] = _published_rows(alike)
        own, every = _whole_runs(alike), _whole_runs(published)
        scores = published_scores(scores, own if len(own) >= FEWEST_PUBLISHED else every)
    return Artifact(
        **canonical(
            {
                "name": name or str(environment.get("name", "unnamed")),
                "provenance": rests_on,
                "environment": environment | {"sdfit": sdfit.__version__},
                "sources": list(sources),
                "components": components_of(ok),
                "stages": stages_facts(models, seen),
                "metrics": metrics,
                "scores": kept(scores),
                "swept": sorted({variant_name(v) for v in {r.workload.variant for r in ok}}),
                "baseline": baseline(ok),
                "evaluation": evaluation,
            }
        )
    )


def provenance(environment: Mapping[str, Any]) -> str:
    """What records made in this environment rest on.

    Examples
    --------
    >>> provenance({"backend": "trace", "workspaces": None})
    'traced'
    """
    backend = environment.get("backend")
    if backend == "cuda":
        return "measured"
    if backend == "trace":
        return "published" if environment.get("workspaces") else "traced"
    return "fake"


def _enough_sizes(seen: Mapping[StageKey, Observations]) -> None:
    """The UNet of each swept kind must have been seen at enough sizes for its terms."""
    for key, obs in seen.items():
        if key[0] != "unet":
            continue
        sizes = np.unique(np.prod(obs.X[~obs.at_least, :2], axis=1))
        if len(sizes) < FEWEST_SIZES:
            term = ("constant", "H·W", "(H·W)²")[len(sizes)]
            raise FitError(
                f"{len(sizes)} size(s) of {' '.join(key[1:])} cannot determine the term {term}: constant, H·W and (H·W)² "
                f"need {FEWEST_SIZES} sizes; sweep {FEWEST_SIZES - len(sizes)} more",
                term=term,
                more=FEWEST_SIZES - len(sizes),
            )


def _same_kernels(name: str, published: Sequence[PublishedRow]) -> list[PublishedRow]:
    """The published rows of cards whose kernels hold the same memory."""
    kernels = kernels_of(name)
    return [row for row in published if kernels is not None and kernels_of(row.card) == kernels]


def _whole_runs(published: Sequence[PublishedRow]) -> list[PublishedRow]:
    """Rows of whole runs: of the VAE alone the trace is closer, since no order of loading matters, and nobody asks that."""
    return [row for row in published if row.pipeline in ("img2img", "txt2img")]


def _published_rows(published: Sequence[PublishedRow]) -> dict[str, Any]:
    """The trace beside published rows: how many of each card, and its errors on whole runs.

    A whole run that is off by more than 1 % is listed, with the reason.
    """
    cards = {card: sum(row.card == card for row in published) for card in sorted({row.card for row in published})}
    rows = _whole_runs(published)
    if not rows:
        return {"rows": 0, "cards": cards}
    misses = [
        {"id": r.id, "size": f"{r.height}x{r.width}", "error": r.error, "reason": r.reason}
        for r in rows
        if abs(r.error) > LISTED_ERROR
    ]
    return {"rows": len(rows), "cards": cards, **error_summary([r.error for r in rows]).to_dict(), "misses": misses}


def components_of(ok: Sequence[Record]) -> dict[str, dict[str, int]]:
    """Bytes of the weights by dtype: each component's, and what each combination held before a run."""
    found: dict[str, dict[str, int]] = {}
    for record in ok:
        w = record.workload
        table = found.setdefault(weights_table(w.dtype, w.execution), {})
        for component, size in record.component_bytes.items():
            label = f"vae/{w.vae}" if component == "vae" else component
            if table.setdefault(label, size) != size:
                raise FitError(
                    f"the weights of {label} in {w.dtype} take {table[label]} B in one record and {size} B in record "
                    f"{record.index}; these are not records of one pipeline"
                )
        if w.offload == "none" and record.baseline_bytes is not None:
            label = baseline_label(w.vae, w.safety_checker)
            table[label] = max(record.baseline_bytes, table.get(label, 0))
    return found


def stages_facts(models: Mapping[StageKey, StageModel], seen: Mapping[StageKey, Observations]) -> dict[str, Any]:
    """The fitted stages, and what stands beside them, as `sdfit.predict.artifact.Artifact` has them."""
    found = {}
    for key, obs in seen.items():
        for model, mine in own_rows(models[key], obs).items():
            if model.key == key or key == told_by(key):
                found["|".join(model.key)] = stage_facts(model, obs, mine)
    return found


def stage_facts(model: StageModel, seen: Observations, mine: Any = slice(None)) -> dict[str, Any]:
    """A fitted stage; ``mine``: the rows that its coefficients are fitted on, of all that were swept."""
    own = seen.where(mine)
    rows = own.where(counted(model, own))
    low, high = model.bounds(rows.X, rows.activation_bytes, rows.peak_bytes, rows.weight, groups=rows.groups)
    certain = seen.X if seen.at_least.all() else seen.X[~seen.at_least]
    columns = domain_columns(certain[:, 0] * certain[:, 1], certain[:, 3], certain[:, 2])
    return {
        "terms": list(model.terms_),
        "regimes": model.regimes_,
        "coef": _short(model.coef_),
        "low": _short(low),
        "high": [[bound if math.isfinite(bound) else None for bound in row] for row in _short(high)],
        "unidentified": model.unidentified_,
        "condition": model.condition_,
        "domain": {name: [int(v.min()), int(v.max())] for name, v in columns.items()},
        "rows": int(np.sum(~own.at_least)) if not seen.at_least.all() else len(own),
    }


def _short(rows: Array) -> list[list[float]]:
    """Rows of numbers; a zero, and a large number to the byte, is a whole number, which takes half of the room in the file."""
    return [[_short_number(value) for value in row] for row in rows.tolist()]


def _short_number(value: float) -> float:
    return round(value) if value == 0 or WHOLE <= value < math.inf else value


def _evaluation(runs: Runs, fitted: Array, held_out: Array, borrowed: Mask, folds: int) -> dict[str, Any]:
    ok = np.flatnonzero(runs.ok)
    outcomes = Counter(r.outcome for r in runs.records)
    actual = np.array([float(runs.records[i].allocated_bytes or 0) for i in ok.tolist()])
    inside = np.nanmax(fitted[ok], axis=1)
    known = np.flatnonzero(~np.isnan(held_out[ok]).all(axis=1))
    result: dict[str, Any] = {
        "rows": len(ok),
        "oom_rows": outcomes["oom"],
        "crashed_rows": outcomes["crash"],
        "folds": folds,
        "fitted": error_summary((inside - actual) / actual).to_dict(),
    }
    if len(known):
        outside = np.nanmax(held_out[ok[known]], axis=1)
        relative = (outside - actual[known]) / actual[known]
        found = error_summary(relative)
        result["cross_validated"] = found.to_dict() | {"rows": len(known)}
        at = found.worst_at
        own = ~borrowed[ok[known]]
        if own.any() and not own.all():
            result["regime_known"] = error_summary(relative[own]).to_dict() | {"rows": int(own.sum())}
        result["worst_row"] = runs.workloads[ok[known[at]]].to_dict() | {"error": float(relative[at])}
    return result
