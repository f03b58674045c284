"""Records as arrays, made once, and what they say of each set of coefficients: the rows that it is fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from sdfit.equation.sizes import Array, resolution, size_columns
from sdfit.equation.stages import STAGES, StageKey, resident, stage_key, stages_of
from sdfit.fit.folds import Indices
from sdfit.records import Record
from sdfit.workload import VARIANT_FIELDS, VariantKey, Workload

LEAST_WEIGHT = 0.01
"""A stage counts at least this much in its fit, however small it is beside the run's peak."""


class Runs:
    """Records as arrays: one row each.

    Parameters
    ----------
    records : sequence of Record

    Attributes
    ----------
    X : array, shape (rows, 7)
        `sdfit.equation.sizes.SIZE_COLUMNS`.
    variants : dict
        Variant -> its rows, ascending.
    names, groups : list of str, array
        The resolutions in the order of their names, and which of them each row has.
    ok : array of bool
        Which runs succeeded.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.workloads = [r.workload for r in records]
        self.X = size_columns(self.workloads)
        self.ok = np.array([r.outcome == "ok" for r in records], dtype=bool)
        names = np.array([resolution(w) for w in self.workloads], dtype=np.str_)
        found, self.groups = np.unique(names, return_inverse=True)
        self.names: list[str] = found.tolist()
        rows: dict[VariantKey, list[int]] = {}
        for row, w in enumerate(self.workloads):
            rows.setdefault(w.variant, []).append(row)
        self.variants: dict[VariantKey, Indices] = {v: np.array(r, dtype=np.intp) for v, r in rows.items()}

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def stages(self) -> dict[StageKey, tuple[int, Indices]]:
        """Of each set of coefficients that some run needs: which of `STAGES` it is of, and the rows that need it."""
        found: dict[StageKey, list[Indices]] = {}
        for variant, rows in self.variants.items():
            for stage in stages_of(variant):
                found.setdefault(stage_key(stage, variant), []).append(rows)
        return {key: (STAGES.index(key[0]), np.sort(np.concatenate(rows))) for key, rows in found.items()}

    @cached_property
    def runs_through(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of `STAGES` each run's variant has."""
        found = np.zeros((len(self), len(STAGES)), dtype=bool)
        for column, rows in self.stages.values():
            found[rows, column] = True
        return found

    @cached_property
    def weights_bytes(self) -> Array:
        """What `Record.weights_bytes` says, a column for each of `STAGES`."""
        found = np.empty((len(self), len(STAGES)))
        for variant, rows in self.variants.items():
            offload = str(variant[VARIANT_FIELDS.index("offload")])
            parts = {stage: resident(stage, offload) for stage in STAGES}
            for row in rows.tolist():
                record = self.records[row]
                if offload == "none" and record.baseline_bytes is not None:
                    found[row] = record.baseline_bytes
                else:
                    there = record.component_bytes
                    found[row] = [sum(there.get(c, 0) for c in parts[stage]) for stage in STAGES]
        return found

    @cached_property
    def peaks_bytes(self) -> Array:
        """What each run says of the peaks of `STAGES`, a column each; NaN where it says nothing.

        A run that ran out of memory still tells the peaks of the stages that it finished, and a lower bound of the one
        in which it failed.
        """
        found = np.array([[r.stage_peaks_bytes.get(stage, np.nan) for stage in STAGES] for r in self.records])
        for row, record in enumerate(self.records):
            if record.outcome == "crash" or not record.component_bytes:
                found[row] = np.nan
            elif record.outcome == "oom":
                peaks = _finished(record)
                found[row] = [peaks.get(stage, np.nan) for stage in STAGES]
        return found.reshape(-1, len(STAGES))


@dataclass(frozen=True, slots=True)
class Observations:
    """The rows of one set of coefficients, as arrays of equal length.

    Attributes
    ----------
    runs : Runs
    places : array
        Which of the runs each row is of.
    X : array, shape (rows, 7)
        `sdfit.equation.sizes.SIZE_COLUMNS`.
    activation_bytes : array
        The stage's peak less the weights that are on the card in it.
    weights_bytes : array
        Those weights.
    peak_bytes : array
        The peak of the whole run: what an error is relative to.
    weight : array
        How much a row counts: the stage's share of the run's activations, `LEAST_WEIGHT` to 1. An error in a stage
        that is far below the run's peak spoils little.
    groups : array
        Its resolution, a place in `Runs.names`.
    at_least : array of bool
        Whether the activation is a lower bound (a run that ran out of memory there).
    """

    runs: Runs
    places: Indices
    X: Array
    activation_bytes: Array
    weights_bytes: Array
    peak_bytes: Array
    weight: Array
    groups: Indices
    at_least: np.ndarray[Any, np.dtype[np.bool_]]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def workloads(self) -> list[Workload]:
        """The workload of each row."""
        return [self.runs.workloads[i] for i in self.places.tolist()]

    def where(self, use: Any) -> Observations:
        """Some of the rows."""
        return Observations(self.runs, *(getattr(self, one.name)[use] for one in fields(Observations)[1:]))


def observe(records: Sequence[Record] | Runs) -> dict[StageKey, Observations]:
    """Sort what the records say by the coefficients it is evidence for."""
    runs = records if isinstance(records, Runs) else Runs(records)
    peaks, weights = runs.peaks_bytes, runs.weights_bytes
    there = ~np.isnan(peaks)
    above = np.where(there, peaks - weights, 0.0)
    top = np.maximum(np.max(peaks, axis=1, where=there, initial=0.0), 1.0)
    activation = np.maximum(np.max(peaks - weights, axis=1, where=there, initial=-np.inf), 1.0)
    failed = np.array([STAGES.index(r.oom_stage) if r.outcome == "oom" and r.oom_stage else -1 for r in runs.records])
    found: dict[StageKey, list[tuple[int, Indices]]] = {}
    for variant, rows in runs.variants.items():
        for column, stage in enumerate(STAGES):
            mine = rows[there[rows, column]]
            if len(mine):
                found.setdefault(stage_key(stage, variant), []).append((column, mine))
    seen = {}
    for key, parts in found.items():
        column, places = parts[0][0], np.sort(np.concatenate([mine for _, mine in parts]))
        own = above[places, column]
        share = np.maximum(own, 1.0) / activation[places]
        seen[key] = Observations(
            runs,
            places,
            runs.X[places],
            np.maximum(own, 0.0),
            weights[places, column],
            top[places],
            np.clip(share, LEAST_WEIGHT, 1.0),
            runs.groups[places],
            failed[places] == column,
        )
    return dict(sorted(seen.items(), key=lambda one: (one[1].places[0], STAGES.index(one[0][0]))))


def _finished(record: Record) -> dict[str, int]:
    """The peaks of the stages that a run out of memory finished, and what was reached in the one in which it failed [bytes]."""
    peaks, failed = dict(record.stage_peaks_bytes), record.oom_stage
    if failed is None:
        return peaks
    peaks[failed] = max(peaks.get(failed, 0), record.oom_bytes or 0)
    if record.workload.vae_tiling or record.workload.vae_slicing:  # its visits to the VAE's stages are unfinished
        peaks = {s: p for s, p in peaks.items() if s == failed or s[:5] != failed[:5]}
    return peaks
