"""What records say of each set of coefficients: the rows that it is fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from sdfit.equation.sizes import Array, resolution, size_columns
from sdfit.equation.stages import StageKey, stage_key
from sdfit.records import Record
from sdfit.workload import Workload

LEAST_WEIGHT = 0.01
"""A stage counts at least this much in its fit, however small it is beside the run's peak."""


@dataclass(slots=True)
class Observations:
    """The rows of one set of coefficients, as lists of equal length.

    Attributes
    ----------
    workloads : list of Workload
    places : list of int
        Which record each row is of.
    activation_bytes : list of float
        The stage's peak less the weights that are on the card in it.
    weights_bytes : list of int
        Those weights.
    peak_bytes : list of float
        The peak of the whole run: what an error is relative to.
    weight : list of float
        How much a row counts: the stage's share of the run's activations, `LEAST_WEIGHT` to 1. An error in a stage
        that is far below the run's peak spoils little.
    at_least : list of bool
        Whether the activation is a lower bound (a run that ran out of memory there).
    """

    workloads: list[Workload] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    activation_bytes: list[float] = field(default_factory=list)
    weights_bytes: list[int] = field(default_factory=list)
    peak_bytes: list[float] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    at_least: list[bool] = field(default_factory=list)
    _whole: Rows | None = None

    def rows(self, use: Any = None) -> Rows:
        """The rows as arrays, made once; or some of them."""
        if self._whole is None or len(self._whole.X) != len(self.workloads):
            self._whole = Rows(
                size_columns(self.workloads),
                np.array(self.activation_bytes),
                np.array(self.peak_bytes),
                np.array(self.weight),
                np.array([resolution(w) for w in self.workloads]),
                np.array(self.places, dtype=np.intp),
                np.array(self.at_least, dtype=bool),
            )
        if use is None:
            return self._whole
        return Rows(*(getattr(self._whole, one.name)[use] for one in fields(Rows)))


@dataclass(frozen=True, slots=True)
class Rows:
    """Observations as arrays: rows of `sdfit.equation.sizes.SIZE_COLUMNS`, activations and run peaks [bytes], weights,
    resolutions, which record each is of, whether its activation is a lower bound."""

    X: Array
    activation_bytes: Array
    peak_bytes: Array
    weight: Array
    groups: np.ndarray[Any, np.dtype[np.str_]]
    places: np.ndarray[Any, np.dtype[np.intp]]
    at_least: np.ndarray[Any, np.dtype[np.bool_]]


def observe(records: Sequence[Record]) -> dict[StageKey, Observations]:
    """Sort what the records say by the coefficients it is evidence for.

    A run that ran out of memory still tells the peaks of the stages that it finished, and a lower bound of the one in
    which it failed.
    """
    found: dict[StageKey, Observations] = {}
    for place, record in enumerate(records):
        if record.outcome == "crash" or not record.component_bytes:
            continue
        failed = record.oom_stage if record.outcome == "oom" else None
        peaks = _finished(record, failed)
        weights = {stage: record.weights_bytes(stage) for stage in peaks}
        top = float(max(peaks.values(), default=0))
        activation = max((p - weights[s] for s, p in peaks.items()), default=0.0)
        for stage, peak in peaks.items():
            rows = found.setdefault(stage_key(stage, record.workload.variant), Observations())
            share = max(peak - weights[stage], 1.0) / max(activation, 1.0)
            rows.workloads.append(record.workload)
            rows.places.append(place)
            rows.activation_bytes.append(max(float(peak - weights[stage]), 0.0))
            rows.weights_bytes.append(weights[stage])
            rows.peak_bytes.append(max(top, 1.0))
            rows.weight.append(min(max(share, LEAST_WEIGHT), 1.0))
            rows.at_least.append(stage == failed)
    return found


def _finished(record: Record, failed: str | None) -> dict[str, int]:
    """The peaks of the stages that a run finished, and what was reached in the one in which it failed [bytes]."""
    peaks = dict(record.stage_peaks_bytes)
    if failed is None:
        return peaks
    peaks[failed] = max(peaks.get(failed, 0), record.oom_bytes or 0)
    if record.workload.vae_tiling or record.workload.vae_slicing:  # its visits to the VAE's stages are unfinished
        peaks = {s: p for s, p in peaks.items() if s == failed or s[:5] != failed[:5]}
    return peaks
