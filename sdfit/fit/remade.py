"""The model of a card whose kernels are known by a table: the prior's equation, fitted again to grids that are simulated with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from sdfit.equation.stages import beside, told_by
from sdfit.fit.fit import stages_facts
from sdfit.fit.held_out import fit_stages
from sdfit.fit.kernels import Kernels
from sdfit.fit.live import skeleton
from sdfit.fit.observations import Runs, observe
from sdfit.fit.search import shown_of
from sdfit.fit.shown import record_of
from sdfit.fit.tables import Table
from sdfit.predict.artifact import Artifact, canonical
from sdfit.predict.simulation.workspaces import Architecture
from sdfit.records import Record
from sdfit.sweep import grid

GRIDS = ("default", "breadth", "strategies")
"""That a card is swept with."""


def model_of(prior: Artifact, kernels: Kernels, memory_bytes: float = math.inf) -> Artifact:
    """The prior with the coefficients of a card with these kernels, where they are other than its own.

    Parameters
    ----------
    prior : Artifact
    kernels : Kernels
    memory_bytes : float
        Of the card; infinite where it is not known.
    """
    stages = {name: _raised(stage, kernels.constant_bytes) for name, stage in prior.stages.items()}
    for dtypes, table in kernels.found.items():
        by_default, by_all = _fitted(kernels.own, dtypes, table, kernels.constant_bytes, memory_bytes)
        for name, stage in prior.stages.items():
            if name.split("|")[1] in dtypes:
                told = by_default
                if name not in told or not set(told[name]["unidentified"]) <= set(stage["unidentified"]):
                    told = by_all
                stages[name] = told.get(name, stages[name])
                key = tuple(name.split("|"))
                other = "|".join(beside(key) or ())
                if name in told and other and key == told_by(key):  # what stands beside comes and goes with the kernels
                    stages.pop(other, None)
                    stages |= {other: told[other]} if other in told else {}
    return replace(prior, stages=stages)


@lru_cache(64)
def _fitted(
    own: Architecture, dtypes: tuple[str, ...], table: Table, constant_bytes: int, memory_bytes: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The stages of a card with these kernels: by the first of `GRIDS`, and by all."""
    every = [w for name in GRIDS for w in grid.load(name).for_the_trace().workloads if w.dtype in dtypes]
    every = [w for w in dict.fromkeys(every) if skeleton(w, own.cublas_bytes) is not None]
    if not every:
        return {}, {}
    first = {w for w in grid.load(GRIDS[0]).for_the_trace().workloads if w.dtype in dtypes}
    peaks = (shown_of(tuple(every), dtypes, own).peaks(table) + constant_bytes).clip(min=0).tolist()
    records: list[Record] = []
    at = 0
    for i, w in enumerate(every):
        run = skeleton(w, own.cublas_bytes)
        assert run is not None
        mine, at = peaks[at : at + len(run.bare_bytes)], at + len(run.bare_bytes)
        if max(mine) <= memory_bytes:
            records.append(record_of(i, run, mine))
    return _stages([r for r in records if r.workload in first]), _stages(records)


def _stages(records: Sequence[Record]) -> dict[str, Any]:
    seen = observe(Runs(records)) if records else {}
    return canonical(stages_facts(fit_stages(seen), seen))


def _raised(stage: Mapping[str, Any], more_bytes: int) -> dict[str, Any]:
    """A stage that holds so many bytes more, whatever the sizes."""
    at, moved = stage["terms"].index("1"), {}
    for part in ("coef", "low", "high"):
        moved[part] = [list(row) for row in stage[part]]
        for row in moved[part]:
            row[at] = None if row[at] is None else max(row[at] + more_bytes, 0)
    return dict(stage) | moved
