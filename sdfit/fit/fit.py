"""Records to an Artifact.

Each stage's coefficients are fitted on every record that shares them; what is left over is judged on resolutions that
the fit did not see (grouped cross-validation), and those errors become the conformal scores. The plain four-term
regression over whole runs is fitted beside it, as the baseline that the stages have to beat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.model_selection import GroupKFold

import sdfit
from sdfit.equation.terms import StageKey, domain_columns, size_columns, stage_key, stages_of
from sdfit.errors import FitError
from sdfit.fit.baseline import baseline
from sdfit.fit.metric_models import FOLDS, fit_metrics
from sdfit.fit.scores import error_summary, published_scores
from sdfit.fit.stage_model import StageModel
from sdfit.predict.artifact import Artifact, canonical
from sdfit.predict.variant import baseline_label
from sdfit.records import Record, RecordsFile
from sdfit.study.comparison import residuals
from sdfit.workload import Workload, variant_name

Array = np.ndarray[Any, np.dtype[np.float64]]
FEWEST_SIZES = 3
"""Sizes that constant, H·W and (H·W)² need."""
LISTED_ERROR = 0.01
"""A published row that the trace misses by more is named in the model's card."""
LEAST_SHARE = 0.01
"""A stage counts at least this much in its fit, however small it is beside the run's peak."""
MOST_ROUNDS = 20
"""Fits of one stage until the lower bounds that count are settled."""


@dataclass
class Observations:
    """What one set of coefficients is fitted on: rows of `sdfit.equation.terms.SIZE_COLUMNS` and what they took [bytes]."""

    workloads: list[Workload] = field(default_factory=list)
    activation_bytes: list[float] = field(default_factory=list)
    scale_bytes: list[float] = field(default_factory=list)
    at_least: list[bool] = field(default_factory=list)

    def add(self, workload: Workload, activation_bytes: float, scale_bytes: float, at_least: bool) -> None:
        """Add one; ``at_least`` marks a lower bound (a run that ran out of memory there)."""
        self.workloads.append(workload)
        self.activation_bytes.append(max(activation_bytes, 0.0))
        self.scale_bytes.append(scale_bytes)
        self.at_least.append(at_least)


def observe(records: Sequence[Record]) -> dict[StageKey, Observations]:
    """Sort what the records say by the coefficients it is evidence for.

    A run that ran out of memory still tells the peaks of the stages that it finished, and a lower bound of the one in
    which it failed.
    """
    found: dict[StageKey, Observations] = {}
    for record in records:
        if record.outcome == "crash" or not record.component_bytes:
            continue
        failed = record.oom_stage if record.outcome == "oom" else None
        peaks = dict(record.stage_peaks_bytes)
        if failed:
            peaks[failed] = max(peaks.get(failed, 0), record.oom_bytes or 0)
            if (
                record.workload.vae_tiling or record.workload.vae_slicing
            ):  # its visits to the VAE's stages are unfinished
                peaks = {s: p for s, p in peaks.items() if s == failed or s[:5] != failed[:5]}
        top = float(max(peaks.values(), default=0))
        activation = max((p - record.weights_bytes(s) for s, p in peaks.items()), default=0.0)
        for stage, peak in peaks.items():
            key = stage_key(stage, record.workload.variant)
            # an error of a stage that is far below the run's peak spoils little: it counts by its share of the peak
            share = max(peak - record.weights_bytes(stage), 1.0) / max(activation, 1.0)
            scale = top / min(max(share, LEAST_SHARE), 1.0)
            found.setdefault(key, Observations()).add(
                record.workload, peak - record.weights_bytes(stage), scale, stage == failed
            )
    return found


def fit_stage(key: StageKey, seen: Observations) -> StageModel:
    """Fit one set of coefficients; a lower bound counts only where the fit lies below it, and pulls upwards only."""
    X, y, scale = size_columns(seen.workloads), np.array(seen.activation_bytes), np.array(seen.scale_bytes)
    bound = np.array(seen.at_least)
    use = ~bound if not bound.all() else bound
    for _ in range(MOST_ROUNDS):
        model = StageModel(key).fit(X[use], y[use], scale[use])
        # a bound that the fit has come to exceed must leave again, or it would pull the fit down
        violated = bound & (model.predict(X) < y)
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


def resolutions(records: Sequence[Record]) -> list[tuple[int, int]]:
    """The effective size of each record's images: the groups of the cross-validation."""
    return [(r.workload.effective_height, r.workload.effective_width) for r in records]


def cross_validate(records: Sequence[Record], failed: Sequence[Record] = ()) -> tuple[list[dict[str, float]], int]:
    """Predict each record by models that never saw its resolution; returns stage peaks and the number of folds.

    ``failed`` are runs out of memory: they help to fit, as in `fit`, and are not predicted.
    """
    groups = np.unique(np.array([f"{h}x{w}" for h, w in resolutions(records)]), return_inverse=True)[1]
    folds = min(FOLDS, int(groups.max()) + 1)
    out: list[dict[str, float]] = [{} for _ in records]
    if folds < 2:
        return out, 0
    sizes, rest = resolutions(records), list(zip(failed, resolutions(failed), strict=True))
    for train, test in GroupKFold(folds).split(groups, groups=groups):
        held = {sizes[i] for i in test}
        seen = observe([*(records[i] for i in train), *(r for r, size in rest if size not in held)])
        models = {key: fit_stage(key, obs) for key, obs in seen.items() if not all(obs.at_least)}
        for i, peaks in zip(test, predict_stages(models, [records[i] for i in test]), strict=True):
            # a stage that no training fold saw makes the whole prediction unknown, not small
            complete = set(peaks) == set(stages_of(records[i].workload.variant))
            out[i] = peaks if complete else {}
    return out, folds


def fit(data: RecordsFile, name: str | None = None, sources: Sequence[Mapping[str, Any]] = ()) -> Artifact:
    """Fit the equation to records of one environment.

    Parameters
    ----------
    data : RecordsFile
        As `sdfit.records.read` or `sdfit.records.pool` gives it.
    name : str, optional
        The card; None takes the environment's.
    sources : list of mapping
        Where the records come from: name, sha256, rows.

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
    held_out, folds = cross_validate(ok, [r for r in data.records if r.outcome == "oom"])
    metrics, scores = fit_metrics(ok, predict_stages(models, ok), held_out)
    environment = dict(data.environment)
    rests_on = provenance(environment)
    evaluation = _evaluation(ok, models, held_out, folds, data.records)
    if rests_on == "published":
        scores = published_scores(scores)
        evaluation["published"] = _published_rows(str(environment.get("name")))
    return Artifact(
        **canonical(
            {
                "name": name or str(environment.get("name", "unnamed")),
                "provenance": rests_on,
                "environment": environment | {"sdfit": sdfit.__version__},
                "sources": list(sources),
                "components": _components(ok),
                "stages": {"|".join(key): _stage(models[key], obs) for key, obs in seen.items()},
                "metrics": metrics,
                "scores": scores,
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


def _published_rows(card: str) -> dict[str, Any]:
    """The trace beside the published whole runs of a card; a row off by more than 1 % is listed."""
    rows = [r for r in residuals.read() if r.card == card and r.pipeline in ("img2img", "txt2img")]
    if not rows:
        return {"rows": 0}
    misses = [
        {"id": r.id, "size": f"{r.height}x{r.width}", "error": r.error} for r in rows if abs(r.error) > LISTED_ERROR
    ]
    return {"rows": len(rows), **error_summary([r.error for r in rows]), "misses": misses}


def _components(ok: Sequence[Record]) -> dict[str, dict[str, int]]:
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


def _stage(model: StageModel, obs: Observations) -> dict[str, Any]:
    X, y, bound = size_columns(obs.workloads), np.array(obs.activation_bytes), np.array(obs.at_least)
    # a lower bound that the fit exceeds is no observation of the peak
    use = ~bound | (model.predict(X) < y) if not bound.all() else bound
    groups = np.array([f"{w.effective_height}x{w.effective_width}" for w in obs.workloads])
    low, high = model.bounds(X[use], y[use], np.array(obs.scale_bytes)[use], groups[use])
    certain = [w for w, unsure in zip(obs.workloads, bound, strict=True) if not unsure] or obs.workloads
    return {
        "terms": list(model.terms_),
        "regimes": model.regimes_,
        "coef": model.coef_.tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "unidentified": model.unidentified_,
        "condition": model.condition_,
        "domain": {name: [min(v), max(v)] for name, v in domain_columns(certain).items()},
        "rows": len(certain),
    }


def _evaluation(
    ok: Sequence[Record],
    models: Mapping[StageKey, StageModel],
    held_out: Sequence[Mapping[str, float]],
    folds: int,
    records: Sequence[Record],
) -> dict[str, Any]:
    fitted = predict_stages(models, ok)
    actual = np.array([r.allocated_bytes for r in ok], dtype=float)
    inside = np.array([max(p.values()) for p in fitted])
    known = [i for i, p in enumerate(held_out) if p]
    result: dict[str, Any] = {
        "rows": len(ok),
        "oom_rows": sum(r.outcome == "oom" for r in records),
        "crashed_rows": sum(r.outcome == "crash" for r in records),
        "folds": folds,
        "fitted": error_summary((inside - actual) / actual),
    }
    if known:
        outside = np.array([max(held_out[i].values()) for i in known])
        relative = (outside - actual[known]) / actual[known]
        result["cross_validated"] = error_summary(relative) | {"rows": len(known)}
        worst = int(np.argmax(np.abs(relative)))
        result["worst_row"] = ok[known[worst]].workload.to_dict() | {"error": float(relative[worst])}
    return result
