"""What an evaluation found, as values and as a table; `sdfit.judging.evaluate` works it out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sdfit.predict.verdict import SAFE_LEVEL
from sdfit.units import aligned, format_bytes
from sdfit.workload import Workload

UPPER_LEVEL = SAFE_LEVEL
"""Level of the one-sided bound that `sdfit fits` compares with the memory at hand."""
BASELINE = "baseline"
"""Name of the plain four-term regression over whole runs, fitted to the same records as the artifact."""


@dataclass(frozen=True, slots=True)
class Point:
    """One metric of one run, predicted and recorded.

    Parameters
    ----------
    index : int
        Of the record.
    workload : Workload
    metric : str
    actual_bytes : int
        [bytes]
    predicted_bytes, low_bytes, high_bytes, upper_bytes : float
        Estimate, two-sided interval at the evaluation's level, one-sided bound at `UPPER_LEVEL` [bytes]; a bound is
        infinite where the scores cannot support its level.
    stage : str
        The stage that set the recorded peak.
    extrapolated : bool
        Whether the workload lies outside the swept domain.
    baseline_bytes : float or None
        What the plain regression says of ``allocated`` [bytes].
    """

    index: int
    workload: Workload
    metric: str
    actual_bytes: int
    predicted_bytes: float
    low_bytes: float
    high_bytes: float
    upper_bytes: float
    stage: str
    extrapolated: bool
    baseline_bytes: float | None

    @property
    def error(self) -> float:
        """Signed relative error: predicted / actual - 1."""
        return self.predicted_bytes / self.actual_bytes - 1

    @property
    def inside(self) -> bool:
        """Whether the interval holds the recorded peak."""
        return self.low_bytes <= self.actual_bytes <= self.high_bytes

    @property
    def exceeds(self) -> bool:
        """Whether the recorded peak lies above the one-sided bound: a run that was called safe and was not."""
        return self.actual_bytes > self.upper_bytes


@dataclass(frozen=True, slots=True)
class Line:
    """Errors of a group of points.

    Parameters
    ----------
    metric, group, name : str
        ``group`` is what the points were sorted by: all, stage, variant, size, domain, or `BASELINE`.
    rows : int
    median_error, p95_error, worst_error : float
        Of the absolute relative error; ``worst_error`` keeps its sign.
    bias : float
        Median of the signed relative error.
    worst_row : int
        Index of the record with the worst error.
    coverage, width : float or None
        Share of points inside their interval; mean half-width of the finite intervals over the prediction.
    unbounded, upper_unbounded : int
        Points whose interval, or whose one-sided bound, is infinite.
    above_upper : float or None
        Share of points above their one-sided bound.
    over_reserved, over_reserved_bytes : float or None
        Mean of (bound - actual), relative and [bytes], over the points with a finite bound that holds.
    """

    metric: str
    group: str
    name: str
    rows: int
    median_error: float
    p95_error: float
    worst_error: float
    bias: float
    worst_row: int
    coverage: float | None = None
    width: float | None = None
    unbounded: int = 0
    upper_unbounded: int = 0
    above_upper: float | None = None
    over_reserved: float | None = None
    over_reserved_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class OomPoint:
    """A run that ran out of memory, and whether the artifact says so.

    Parameters
    ----------
    index : int
    workload : Workload
    cap_bytes : int
        What it could have [bytes].
    predicted_bytes : float
        Estimate of ``required`` where the artifact has it, else of ``allocated`` [bytes].
    said_so : bool
        Whether the estimate lies above the cap.
    upper_said_so : bool
        Whether the one-sided bound does: then `sdfit fits` answers no.
    """

    index: int
    workload: Workload
    cap_bytes: int
    predicted_bytes: float
    said_so: bool
    upper_said_so: bool


@dataclass(frozen=True, slots=True)
class StageLine:
    """Errors of one stage's own peak, over all runs in which it was recorded."""

    stage: str
    rows: int
    median_error: float
    worst_error: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` found.

    Parameters
    ----------
    artifact, provenance : str
        Name of the artifact and what it rests on.
    backend : str
        Of the records: ``cuda``, ``trace`` or ``fake`` (then what predictions are held against is simulated), or
        ``unknown``.
    level : float
        Of the two-sided intervals.
    points : tuple of Point
    lines : tuple of Line
    stages : tuple of StageLine
    oom : tuple of OomPoint
    skipped : dict
        Why rows were skipped, and how many.
    """

    artifact: str
    provenance: str
    backend: str
    level: float
    points: tuple[Point, ...]
    lines: tuple[Line, ...]
    stages: tuple[StageLine, ...]
    oom: tuple[OomPoint, ...]
    skipped: dict[str, int]

    @property
    def simulated(self) -> bool:
        """Whether what predictions are held against comes from a trace or a made-up card."""
        return self.backend in ("trace", "fake")

    @property
    def source(self) -> str:
        """What the records are, in a word: ``measured``, ``simulated``, or ``recorded`` where nobody said which."""
        return "simulated" if self.simulated else "measured" if self.backend == "cuda" else "recorded"

    def line(self, metric: str = "allocated", group: str = "all", name: str = "all") -> Line:
        """One line by its names.

        Raises
        ------
        KeyError
            If there is none.
        """
        for line in self.lines:
            if (line.metric, line.group, line.name) == (metric, group, name):
                return line
        raise KeyError((metric, group, name))

    def to_dict(self) -> dict[str, Any]:
        """Plain values: amounts in bytes, errors as fractions; an infinite bound is None."""
        return {
            "artifact": self.artifact,
            "provenance": self.provenance,
            "backend": self.backend,
            "simulated": self.simulated,
            "level": self.level,
            "upper_level": UPPER_LEVEL,
            "lines": [asdict(line) for line in self.lines],
            "stages": [asdict(line) for line in self.stages],
            "oom": [_plain(asdict(point)) for point in self.oom],
            "points": [_plain(asdict(point)) for point in self.points],
            "skipped": dict(self.skipped),
        }

    def table(self) -> str:
        """The lines as aligned text, then stages, runs out of memory and rows skipped."""
        return _text(self)


_HEAD = (
    "metric",
    "by",
    "",
    "rows",
    "median",
    "95 %",
    "worst",
    "bias",
    "inside",
    "half-width",
    "above bound",
    "over-reserves",
)


def _text(evaluation: Evaluation) -> str:
    """Write the lines, then stages, runs out of memory and rows skipped."""
    parts = [
        f"{evaluation.artifact} ({evaluation.provenance}) against {evaluation.source} records; intervals at {evaluation.level:g}, "
        "bounds at 0.99"
    ]
    if evaluation.lines:
        parts.append(aligned([_HEAD, *(_cells(line) for line in evaluation.lines)], left=3))
    if evaluation.stages:
        rows = [("stage's own peak", "rows", "median", "worst")]
        rows += [
            (s.stage, str(s.rows), _percent(s.median_error), _percent(s.worst_error, sign=True))
            for s in evaluation.stages
        ]
        parts.append(aligned(rows, left=1))
    if evaluation.oom:
        said, bound = (sum(getattr(p, name) for p in evaluation.oom) for name in ("said_so", "upper_said_so"))
        parts.append(
            f"out of memory: {len(evaluation.oom)} runs; the estimate lies above the cap for {said}, the bound for {bound}"
        )
    parts += [f"skipped: {count} rows, {reason}" for reason, count in evaluation.skipped.items()]
    return "\n\n".join(parts)


def _percent(fraction: float | None, sign: bool = False) -> str:
    if fraction is None:
        return "-"
    digits = 3 if abs(fraction) < 0.001 else 2 if abs(fraction) < 0.1 else 1
    return f"{100 * fraction:{'+' if sign else ''}.{digits}f} %"


def _share(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def _cells(line: Line) -> tuple[str, ...]:
    over = "unbounded" if line.upper_unbounded else "-"
    if line.over_reserved is not None and line.over_reserved_bytes is not None:
        over = f"{_percent(line.over_reserved)} = {format_bytes(line.over_reserved_bytes)}"
    width = "unbounded" if line.width is None and line.unbounded else _percent(line.width)
    return (
        line.metric,
        line.group,
        "" if line.name == "all" else line.name,
        str(line.rows),
        _percent(line.median_error),
        _percent(line.p95_error),
        _percent(line.worst_error, sign=True),
        _percent(line.bias, sign=True),
        _share(line.coverage),
        width,
        _share(line.above_upper),
        over,
    )


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in values.items()}
