"""Records to an Artifact.

Each stage's coefficients are fitted on every record that shares them; what is left over is judged on resolutions that
the fit did not see (grouped cross-validation), and those errors become the conformal scores. The plain four-term
regression over whole runs is fitted beside it, as the baseline that the stages have to beat.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import sdfit
from sdfit.equation.regimes import regime
from sdfit.equation.sizes import Array, Sizes, domain_columns, resolution, size_columns
from sdfit.equation.stages import StageKey, stage_key, stages_of
from sdfit.equation.weights import baseline_label
from sdfit.errors import FitError
from sdfit.fit.baseline import baseline
from sdfit.fit.folds import FOLDS, error_summary, left_out
from sdfit.fit.metric_models import fit_metrics
from sdfit.fit.observations import Observations, observe
from sdfit.fit.scores import PublishedRow, kept, published_scores
from sdfit.fit.stage_model import StageModel
from sdfit.predict.artifact import Artifact, canonical
from sdfit.predict.cards import kernels_of
from sdfit.records import Record, RecordsFile
from sdfit.workload import variant_name

Mask = np.ndarray[Any, np.dtype[np.bool_]]

FEWEST_SIZES = 3
"""Sizes that constant, H·W and (H·W)² need."""
LISTED_ERROR = 0.01
"""A published row that the trace misses by more is named in the model's card."""
FEWEST_PUBLISHED = 19
"""Published whole runs on cards with the same kernels, from which on those of other cards say nothing about a model: so
many support a bound at level 0.95."""
WHOLE = 10_000
"""Coefficients from here on are rounded to whole bytes: those of what does not grow with the pixels."""
MOST_ROUNDS = 20
"""Fits of one stage until the lower bounds that count are settled."""


def fit_stage(key: StageKey, seen: Observations, some: Any = None) -> StageModel:
    """Fit one set of coefficients to all rows, or some; a lower bound counts only where the fit lies below it."""
    rows = seen.rows(some)
    bound = rows.at_least
    use = ~bound if not bound.all() else bound
    for _ in range(MOST_ROUNDS):
        model = StageModel(key).fit(rows.X[use], rows.activation_bytes[use], rows.peak_bytes[use], rows.weight[use])
        # a bound that the fit has come to exceed must leave again, or it would pull the fit down
        violated = bound & (model.predict(rows.X) < rows.activation_bytes)
        wanted = ~bound | violated if not bound.all() else bound
        if (wanted == use).all():
            break
        use = wanted
    return model


def predict_stages(models: Mapping[StageKey, StageModel], records: Sequence[Record]) -> list[dict[str, float]]:
    """Each record's stage peaks [bytes], weights included; a stage without a model is left out."""
    peaks: list[dict[str, float]] = [{} for _ in records]
    wanted: dict[StageKey, list[tuple[int, str]]] = {}
    for i, record in enumerate(records):
        for stage in stages_of(record.workload.variant):
            wanted.setdefault(stage_key(stage, record.workload.variant), []).append((i, stage))
    for key, places in wanted.items():
        if key not in models:
            continue
        predicted = models[key].predict(size_columns([records[i].workload for i, _ in places]))
        for (i, stage), value in zip(places, predicted, strict=True):
            peaks[i][stage] = float(value) + records[i].weights_bytes(stage)
    return peaks


def cross_validate(
    records: Sequence[Record], seen: Mapping[StageKey, Observations]
) -> tuple[list[dict[str, float]], Mask, int]:
    """Predict each run that succeeded by models that never saw its resolution.

    Runs out of memory help to fit, as in `fit`, and are not predicted. ``seen`` is what `observe` finds in the records.

    Returns
    -------
    peaks : list of dict of str to float
        Stage peaks [bytes] of each run.
    borrowed : array of bool
        Whether the stage that sets its peak has coefficients that no other row of its regime told: all of them were left out
        with it, and a neighbouring regime's stood in.
    folds : int
    """
    ok = [r for r in records if r.outcome == "ok"]
    out: list[dict[str, float]] = [{} for _ in ok]
    borrowed = np.zeros(len(ok), dtype=bool)
    sizes, folds = [resolution(r.workload) for r in records], 0
    for _, left in left_out([s for s, r in zip(sizes, records, strict=True) if r.outcome == "ok"], FOLDS):
        folds += 1
        held = {resolution(ok[i].workload) for i in left}
        stays = np.array([size not in held for size in sizes])
        models, told = {}, {}
        for key, obs in seen.items():
            rows = obs.rows()
            use = np.flatnonzero(stays[rows.places])
            if not rows.at_least[use].all():
                models[key] = fit_stage(key, obs, use)
                told[key] = set(np.ravel(regime(key[0], Sizes.of(*rows.X[use].T))).tolist())
        for i, peaks in zip(left, predict_stages(models, [ok[i] for i in left]), strict=True):
            # a stage that no training fold saw makes the whole prediction unknown, not small
            complete = set(peaks) == set(stages_of(ok[i].workload.variant))
            out[i] = peaks if complete else {}
            if complete:
                w = ok[i].workload
                top = max(peaks, key=peaks.__getitem__)
                borrowed[i] = regime(top, Sizes.of_workload(w)) not in told[stage_key(top, w.variant)]
    return out, borrowed, folds


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
    seen = observe(data.records)
    _enough_sizes(seen, ok)
    models = {key: fit_stage(key, obs) for key, obs in seen.items()}
    held_out, borrowed, folds = cross_validate(data.records, seen)
    fitted = predict_stages(models, ok)
    metrics, scores, errors = fit_metrics(ok, fitted, held_out)
    environment = dict(data.environment)
    rests_on = provenance(environment)
    evaluation = _evaluation(ok, fitted, held_out, borrowed, folds, data.records)
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
                "stages": {"|".join(key): _stage(models[key], obs) for key, obs in seen.items()},
                "metrics": metrics,
                "scores": kept(scores),
                "swept": sorted({variant_name(r.workload.variant) for r in ok}),
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


def _enough_sizes(seen: Mapping[StageKey, Observations], ok: Sequence[Record]) -> None:
    """The UNet of each swept kind must have been seen at enough sizes for its terms."""
    for key, obs in seen.items():
        if key[0] != "unet":
            continue
        sizes = {w.pixels for w, bound in zip(obs.workloads, obs.at_least, strict=True) if not bound}
        if len(sizes) < FEWEST_SIZES:
            term = ("constant", "H·W", "(H·W)²")[len(sizes)] if len(sizes) < FEWEST_SIZES else ""
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
        table = found.setdefault(w.dtype, {})
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


def _stage(model: StageModel, seen: Observations) -> dict[str, Any]:
    rows = seen.rows()
    bound = rows.at_least
    # a lower bound that the fit exceeds is no observation of the peak
    use = ~bound | (model.predict(rows.X) < rows.activation_bytes) if not bound.all() else bound
    low, high = model.bounds(
        rows.X[use], rows.activation_bytes[use], rows.peak_bytes[use], rows.weight[use], groups=rows.groups[use]
    )
    certain = [w for w, unsure in zip(seen.workloads, bound, strict=True) if not unsure] or seen.workloads
    columns = domain_columns(*(np.array([getattr(w, n) for w in certain]) for n in ("pixels", "batch_size", "tokens")))
    return {
        "terms": list(model.terms_),
        "regimes": model.regimes_,
        "coef": _short(model.coef_),
        "low": _short(low),
        "high": [[bound if math.isfinite(bound) else None for bound in row] for row in _short(high)],
        "unidentified": model.unidentified_,
        "condition": model.condition_,
        "domain": {name: [int(v.min()), int(v.max())] for name, v in columns.items()},
        "rows": len(certain),
    }


def _short(rows: Array) -> list[list[float]]:
    """Rows of numbers; a zero, and a large number to the byte, is a whole number, which takes half of the room in the file."""
    return [[_short_number(value) for value in row] for row in rows.tolist()]


def _short_number(value: float) -> float:
    return round(value) if value == 0 or WHOLE <= value < math.inf else value


def _evaluation(
    ok: Sequence[Record],
    fitted: Sequence[Mapping[str, float]],
    held_out: Sequence[Mapping[str, float]],
    borrowed: Mask,
    folds: int,
    records: Sequence[Record],
) -> dict[str, Any]:
    actual = np.array([r.allocated_bytes for r in ok], dtype=float)
    inside = np.array([max(p.values()) for p in fitted])
    known = [i for i, p in enumerate(held_out) if p]
    result: dict[str, Any] = {
        "rows": len(ok),
        "oom_rows": sum(r.outcome == "oom" for r in records),
        "crashed_rows": sum(r.outcome == "crash" for r in records),
        "folds": folds,
        "fitted": error_summary((inside - actual) / actual).to_dict(),
    }
    if known:
        outside = np.array([max(held_out[i].values()) for i in known])
        relative = (outside - actual[known]) / actual[known]
        found = error_summary(relative)
        result["cross_validated"] = found.to_dict() | {"rows": len(known)}
        at = found.worst_at
        own = ~borrowed[known]
        if own.any() and not own.all():
            result["regime_known"] = error_summary(relative[own]).to_dict() | {"rows": int(own.sum())}
        result["worst_row"] = ok[known[at]].workload.to_dict() | {"error": float(relative[at])}
    return result
