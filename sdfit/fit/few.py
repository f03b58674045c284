"""A few records and a prior to an Artifact: the prior's model, corrected by what the runs tell.

Sixteen runs cannot tell a model's some four hundred coefficients. They do tell how a card departs from a model of its kernels
in two ways. Which operands its kernels copy is discrete: `sdfit.fit.kernels` tries tables until a simulation gives what the runs
show, and the prior's equation is fitted again to runs that are simulated so. What is left over is corrected
(`sdfit.fit.correction`): two coefficients of each stage and regime, as far as runs reach them. The artifact says of each how much
of it is the card's (``prior`` in `sdfit.predict.artifact.Artifact`).

Where the intervals come from
-----------------------------
Runs that a plan chose are too few, and too far from random, for conformal scores of their own. So the scores are drawn: what
the runs leave open of the corrections (a draw from their posterior, with Student's tails and the spread that the runs
themselves show, and as far as workspaces may go where no table gives what they show), what a simulation has beside the equation, with the
kernels found or others that the runs match as well, what no term of the equation tells where images run
one by one, and on top an error of the prior's equation on resolutions that it had not seen, over the workloads of the default grid
that the card holds. Kernels that are found make them no narrower: that a table holds where no run was is not shown by runs. They
hold as far as the card departs from its prior in the ways that the corrections allow; tests and ``python -m sdfit.study.lab few``
hold them against made-up cards that depart in others too. Errors that each run has by the others are with the kernels that all of
them show. Metrics beside allocated
memory keep the prior's regressions, moved by what the runs show, and the prior's scores are added to those drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import sdfit
from sdfit.equation.metrics import REPLAYED_FAMILY, Place, place_codes, place_of
from sdfit.equation.regimes import REGIMES
from sdfit.equation.sizes import Array, Sizes
from sdfit.equation.stages import StageKey, stage_key, stages_of
from sdfit.fit.baseline import baseline
from sdfit.fit.correction import MAIN_TERM, Posterior, Prior, correct, regimes_of
from sdfit.fit.few_metrics import correct_metrics, sample
from sdfit.fit.fit import components_of, provenance
from sdfit.fit.folds import Indices, error_summary
from sdfit.fit.kernels import Kernels
from sdfit.fit.remade import model_of
from sdfit.fit.scores import by_family, kept
from sdfit.predict.artifact import Artifact, canonical
from sdfit.predict.conformal import scale
from sdfit.records import Record, RecordsFile
from sdfit.sweep import grid
from sdfit.workload import Workload, variant_name

DRAWS = 40
"""Of the corrections; each gives a score for every workload of the reference."""
AS_FOUND = 0.4
"""Share of draws in which the kernels are those found; in the others any that the runs match as well, that one too."""
REFERENCE = "default"
"""The grid over whose workloads scores are drawn."""
REPACKED = {"required": 0.5, "minimum": 0.5, "reserved": 1.0, "device": 1.0}
"""Share of a change of the peak by which each metric may change otherwise, either way: assumed. Segments that are there anyway may hold
all of a change, and then reserved memory stays as it was."""
MOST_SUMMED = 250
"""Scores of each kind of which all sums are made."""
SEED = 20261125


def fit_few(
    data: RecordsFile,
    prior: Artifact,
    name: str | None = None,
    sources: Sequence[Mapping[str, Any]] = (),
) -> Artifact:
    """Correct a prior by a few records of one environment.

    Parameters
    ----------
    data : RecordsFile
    prior : Artifact
        The model of the card's kernels, as `sdfit.fit.priors.prior_of` finds it.
    name : str, optional
        The card; None takes the environment's.
    sources : list of mapping
        Where the records come from: name, sha256, rows.

    Raises
    ------
    FitError
        If no run succeeded, or the prior lacks a variant that ran.
    """
    memory = float(data.environment.get("total_memory_bytes") or math.inf)
    given = correct(Prior(prior), data.records)
    posterior = with_kernels(given, memory)
    ok = [r for r in data.records if r.outcome == "ok"]
    stages, told = _stages(posterior, prior, ok)
    environment = dict(data.environment)
    components = {dtype: dict(table) for dtype, table in prior.components.items()}
    for dtype, table in components_of(ok).items():
        components.setdefault(dtype, {}).update(table)
    rests_on = provenance(environment)
    corrected = Artifact(
        name=name or str(environment.get("name", "unnamed")),
        provenance="corrected" if rests_on == "measured" else rests_on,
        environment=environment | {"sdfit": sdfit.__version__},
        sources=list(map(dict, sources)),
        components=components,
        stages=stages,
        metrics=prior.metrics,
        scores=prior.scores,
        swept=sorted({*prior.swept, *(variant_name(r.workload.variant) for r in ok)}),
        baseline=baseline(ok),
        evaluation=_evaluation(data.records, ok, posterior, stages),
        prior={
            "name": prior.name,
            "provenance": prior.provenance,
            "rows": len(ok),
            "scale": posterior.scale,
            "stages": told,
        }
        | _kernels(posterior.found),
    )
    metrics, stretched = correct_metrics(corrected, ok)
    drawn, repacked = drawn_scores(posterior, corrected, given.prior, stretched)
    scores = {"allocated": drawn} | _beside(prior, repacked, stretched)
    fields = {name: getattr(corrected, name) for name in Artifact.__dataclass_fields__}
    return Artifact(**canonical(fields | {"metrics": metrics, "scores": kept(scores)}))


def with_kernels(posterior: Posterior, memory_bytes: float = math.inf) -> Posterior:
    """The same corrections, on top of the prior with the kernels that the runs show, on a card of so much memory."""
    if posterior.found is None:
        return posterior
    base = posterior.prior
    return replace(posterior, prior=base.with_stages_of(model_of(base.artifact, posterior.found, memory_bytes)))


def _kernels(found: Kernels | None) -> dict[str, Any]:
    return {"kernels": found.words, "constant_bytes": found.constant_bytes} if found is not None else {}


def _stages(posterior: Posterior, given: Artifact, ok: Sequence[Record]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Corrected stages; and of each the coefficients of the prior that was given, and the share that the runs told."""
    prior = posterior.prior
    rows = [(stage_key(s, r.workload.variant)) for r in ok for s in stages_of(r.workload.variant)]
    stages, told = {}, {}
    for name, stage in prior.artifact.stages.items():
        key: StageKey = tuple(name.split("|"))
        before_it = given.stages.get(name, stage)  # what stands beside the UNet's line may have come with the kernels
        terms = ("1", MAIN_TERM[key[0]])
        at = [stage["terms"].index(term) for term in terms]
        found: dict[tuple[Any, ...], int] = {}
        regimes, of_prior, shares = [], [], []
        for which in range(len(REGIMES)):
            own = min(which, len(regimes_of(key)) - 1)
            before, of_given = stage["regimes"][own], before_it["regimes"][own]
            values, low, high = (list(stage[part][before]) for part in ("coef", "low", "high"))
            share = []
            for column, term in zip(at, terms, strict=True):
                effects = prior.effects_on(key, own, term)
                move, effects = float(effects @ posterior.mean), effects * prior.sd
                sd = float(np.sqrt(max(effects @ posterior.covariance @ effects, 0.0)))
                values[column] = max(values[column] + move, 0.0) or 0
                low[column] = max(values[column] - 1.96 * sd * posterior.scale, 0.0) or 0
                high[column] = values[column] + 1.96 * sd * posterior.scale
                possible = float(effects @ effects)
                share.append(round(1 - sd**2 / possible, 4) if possible else 0.0)
            row = (tuple(values), tuple(low), tuple(high), tuple(share), before, of_given)
            if row not in found:
                found[row] = len(found)
                of_prior.append([before_it["coef"][of_given][column] for column in at])
                shares.append(share)
            regimes.append(found[row])
        stages[name] = stage | {
            "regimes": regimes,
            "coef": [list(row[0]) for row in found],
            "low": [list(row[1]) for row in found],
            "high": [list(row[2]) for row in found],
            "rows": rows.count(key),
        }
        told[name] = {"terms": list(terms), "prior": of_prior, "told": shares}
    return stages, told


def _evaluation(
    records: Sequence[Record], ok: Sequence[Record], posterior: Posterior, stages: Mapping[str, Any]
) -> dict[str, Any]:
    """Errors on the runs: as corrected by all, and as the other runs predict each."""
    rows, prior = posterior.prior.rows([r.workload for r in ok]), posterior.prior
    peaks = rows.highest(rows.prior_bytes + (rows.X * prior.kept) @ posterior.mean)
    actual = np.array([r.allocated_bytes for r in ok], dtype=float)
    weights = np.array([r.baseline_bytes or 0 for r in ok]) - _baselines(prior, ok)
    moved = np.concatenate([posterior.left_out[i] for i in range(len(ok))])
    left_out = rows.highest(np.where(np.isfinite(moved), rows.prior_bytes + moved, -np.inf)) + weights
    relative = left_out / actual - 1
    worst = int(np.argmax(np.abs(relative)))
    return {
        "rows": len(ok),
        "oom_rows": sum(r.outcome == "oom" for r in records),
        "crashed_rows": sum(r.outcome == "crash" for r in records),
        "folds": len(ok),
        "fitted": error_summary((peaks + weights) / actual - 1).to_dict(),
        "cross_validated": error_summary(relative).to_dict() | {"rows": len(ok)},
        "worst_row": ok[worst].workload.to_dict() | {"error": float(relative[worst])},
    }


def _baselines(prior: Prior, ok: Sequence[Record]) -> Array:
    """What the prior takes to be there before each run, where the records say what was [bytes]."""
    return np.array(
        [
            max(prior.variant(r.workload).weights.values())
            if r.baseline_bytes is not None and r.workload.offload == "none"
            else r.baseline_bytes or 0
            for r in ok
        ],
        dtype=float,
    )


def drawn_scores(
    posterior: Posterior, corrected: Artifact, given: Prior, metrics: Iterable[str] = ()
) -> tuple[dict[str, Array], dict[str, dict[str, Array]]]:
    """Scores by family: draws of what is open of the corrections, and errors of the equation.

    The second are those of ``metrics`` that packing decides: with other workspaces blocks pack otherwise, by up to `REPACKED` of
    what the kernels found and the corrections changed of the prior that was ``given``.
    """
    prior, rng = posterior.prior, np.random.default_rng(SEED)
    memory = corrected.environment.get("total_memory_bytes") or math.inf
    workloads = [w for w in grid.load(REFERENCE).workloads if prior.knows(w) and _within(prior, w, memory)]
    rows = prior.rows(workloads)
    plain = rows.prior_bytes + (rows.X * prior.kept) @ posterior.mean
    peaks, before = rows.highest(plain), (first := given.rows(workloads)).highest(first.prior_bytes)
    units, places = _units(prior, workloads, rows.place, plain)
    root = prior.sd[:, None] * _root(posterior.covariance)
    unshown = prior.unshown * np.sqrt(np.maximum(np.diag(posterior.covariance), 0.0))
    known = prior.artifact.evaluation.get("cross_validated", prior.artifact.evaluation["fitted"])
    changed = np.abs(peaks - before) / units
    expected = rows.prior_bytes - rows.weights_bytes
    bent = _bent(posterior.found, workloads, expected, rng)
    drawn = np.empty((DRAWS, len(workloads)))
    for row in drawn:
        tail = posterior.scale / np.sqrt(rng.chisquare(posterior.degrees) / posterior.degrees)
        effects = posterior.mean + root @ rng.standard_normal(root.shape[1]) * tail
        effects += unshown * rng.standard_normal(len(unshown))
        apart = rows.apart_bytes * rng.standard_normal(rows.apart_bytes.size)
        misses = sum(some[0 if rng.random() < AS_FOUND else rng.integers(len(some))] for some in bent)
        real = rows.highest(rows.prior_bytes + misses + rows.X @ effects + apart)
        row[:] = (real - peaks + peaks * _equation_errors(known, len(workloads), rng)) / units
    otherwise = changed * rng.uniform(-1, 1, drawn.shape)
    repacked = {metric: drawn + REPACKED[metric] * otherwise for metric in metrics}
    beside = {metric: by_family(zip(places, scores.T, strict=True)) for metric, scores in repacked.items()}
    return by_family(zip(places, drawn.T, strict=True)), beside


def _bent(
    found: Kernels | None, workloads: Sequence[Workload], expected: Array, rng: np.random.Generator
) -> list[list[Array]]:
    """For each group of dtypes what a simulation has beside the equation: with the table found, then with others [bytes]."""
    if found is None:
        return [[0 * expected]]
    bent = []
    for dtypes, tables in found.alternatives(rng).items():
        mine = np.concatenate([np.full(len(stages_of(w.variant)), w.dtype in dtypes) for w in workloads])
        held = [np.concatenate(found.held_bytes(workloads, {dtypes: table})) for table in tables]
        bent.append([np.where(mine, np.nan_to_num(some - expected), 0.0) for some in held])
    return bent or [[0 * expected]]


def _within(prior: Prior, workload: Workload, memory_bytes: float) -> bool:
    return max(prior.variant(workload).stage_peaks(Sizes.of_workload(workload)).values()) <= memory_bytes


def _units(prior: Prior, workloads: Sequence[Workload], place: Indices, peaks: Array) -> tuple[Array, list[Place]]:
    """What a score is in units of, and where each workload stands."""
    units, places = np.empty(len(workloads)), []
    for i, w in enumerate(workloads):
        variant = prior.variant(w)
        mine = dict(zip(stages_of(w.variant), peaks[place == i].tolist(), strict=True))
        units[i] = float(scale(mine, variant.weights))
        places.append(place_of(w.variant, int(place_codes(mine, Sizes.of_workload(w)))))
    return units, places


def _root(covariance: Array) -> Array:
    """A root of a covariance matrix, whatever its rank."""
    values, vectors = np.linalg.eigh(covariance)
    root: Array = vectors * np.sqrt(np.maximum(values, 0.0))
    return root


def _equation_errors(found: Mapping[str, float], count: int, rng: np.random.Generator) -> Array:
    """Relative errors of an equation of which the median, the 95th percentile and the worst are known."""
    size = np.interp(rng.random(count), (0, 0.5, 0.95, 1), (0, found["median"], found["p95"], found["worst"]))
    signed: Array = size * rng.choice((-1.0, 1.0), count)
    return signed


def _beside(
    prior: Artifact, drawn: Mapping[str, Mapping[str, Array]], stretched: Mapping[str, float]
) -> dict[str, dict[str, Array]]:
    """Scores of the metrics beside allocated memory: every sum of one that was drawn and one of the prior's."""
    found: dict[str, dict[str, Array]] = {}
    for metric, factor in stretched.items():
        basis = metric if metric in prior.scores else "reserved"
        found[metric] = {}
        for family, own in prior.scores.get(basis, {}).items():
            if family == REPLAYED_FAMILY:  # a replay is of the prior's workspaces, not of the card's
                continue
            some = np.quantile(drawn[metric].get(family, drawn[metric][""]), np.linspace(0, 1, MOST_SUMMED))
            found[metric][family] = np.add.outer(some, factor * sample(own, MOST_SUMMED)).ravel()
    return found
