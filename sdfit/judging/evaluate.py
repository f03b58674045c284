"""How well an artifact predicts records: errors, coverage of its intervals, and what its bounds would reserve for nothing.

Give it records that the artifact was not fitted to (another grid, another day); on its own records it only says how well
the equation fits. Runs that ran out of memory count too: the artifact should have said that they do not fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

import numpy as np

from sdfit.equation.metrics import METRICS
from sdfit.errors import RecordsError, UnknownVariant, listed
from sdfit.fit.baseline import predict_baseline
from sdfit.predict import conformal
from sdfit.predict.advise import SAFE_LEVEL
from sdfit.predict.prediction import Prediction
from sdfit.predict.predictor import Predictor
from sdfit.records import Record, RecordsFile
from sdfit.workload import Workload, variant_name

UPPER_LEVEL = SAFE_LEVEL
"""Level of the one-sided bound that `sdfit fits` compares with the memory at hand."""
SIZE_CLASSES = ((512 * 512, "to 512²"), (768 * 768, "to 768²"), (1024 * 1024, "to 1024²"), (None, "above 1024²"))
"""Pixels of one image, largest of each class [pixels]."""
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
        Why rows were passed over, and how many.
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
        """The lines as aligned text, then stages, runs out of memory and rows passed over."""
        from sdfit.judging.evaluate_text import text

        return text(self)


def evaluate(predictor: Predictor, records: RecordsFile | Iterable[Record], level: float = 0.95) -> Evaluation:
    """Hold an artifact against records.

    Parameters
    ----------
    predictor : Predictor
    records : RecordsFile, or iterable of Record
        Crashed rows, and variants that the artifact does not have, are counted and passed over. Only the file says
        whether its rows were measured.
    level : float
        Of the two-sided intervals; the one-sided bounds are at `UPPER_LEVEL`.

    Returns
    -------
    Evaluation

    Raises
    ------
    RecordsError
        If there is no row that the artifact can be held against.
    InvalidWorkload
        If the level does not lie between 0 and 1.
    """
    conformal.check_level(level)
    backend = "unknown"
    if isinstance(records, RecordsFile):
        backend, records = str(records.environment.get("backend", backend)), records.records
    points: list[Point] = []
    failed: list[OomPoint] = []
    stage_errors: dict[str, list[float]] = {}
    skipped: Counter[str] = Counter()
    for record in records:
        if record.outcome == "crash":
            skipped["crashed"] += 1
            continue
        try:
            predictor.variant(record.workload.variant)
        except UnknownVariant:
            skipped[f"never swept: {variant_name(record.workload.variant)}"] += 1
            continue
        if record.outcome == "oom":
            found = _oom(predictor, record)
            if found is None:
                skipped["out of memory, without a cap"] += 1
            else:
                failed.append(found)
            continue
        points += _points(predictor, record, level)
        predicted = predictor.predict_workload(record.workload).stage_peaks
        for stage, actual in record.stage_peaks_bytes.items():
            if stage in predicted and actual:
                stage_errors.setdefault(stage, []).append(predicted[stage] / actual - 1)
    if not points and not failed:
        raise RecordsError(
            f"'{predictor.name}' can be held against none of these rows ({_why(skipped)}); "
            f"it knows: {listed(predictor.artifact.swept)}"
        )
    return Evaluation(
        artifact=predictor.name,
        provenance=predictor.provenance,
        backend=backend,
        level=level,
        points=tuple(points),
        lines=tuple(_lines(points)),
        stages=tuple(StageLine(s, len(e), median(map(abs, e)), max(e, key=abs)) for s, e in stage_errors.items()),
        oom=tuple(failed),
        skipped=dict(skipped),
    )


def size_class(workload: Workload) -> str:
    """The size class of a workload's images.

    Examples
    --------
    >>> size_class(Workload(768, 512)), size_class(Workload(1200, 1800))
    ('to 768²', 'above 1024²')
    """
    return next(name for most, name in SIZE_CLASSES if most is None or workload.pixels <= most)


def _points(predictor: Predictor, record: Record, level: float) -> list[Point]:
    points = []
    stage = max(record.stage_peaks_bytes, key=record.stage_peaks_bytes.__getitem__)
    for metric in METRICS:
        actual = getattr(record, f"{metric}_bytes")
        if not actual or (metric != "allocated" and not predictor.artifact.metrics.get(metric)):
            continue
        value: Prediction = predictor.predict_workload(record.workload, metric=metric, level=level)
        bound = predictor.predict_workload(record.workload, metric=metric, level=UPPER_LEVEL).upper
        plain = predict_baseline(predictor, record.workload) if metric == "allocated" else None
        low, high = value.interval
        points.append(
            Point(
                record.index,
                record.workload,
                metric,
                actual,
                float(value),
                low,
                high,
                bound,
                stage,
                value.extrapolated,
                plain,
            )
        )
    return points


def _oom(predictor: Predictor, record: Record) -> OomPoint | None:
    cap = record.cap_bytes or predictor.artifact.environment.get("total_memory_bytes")
    if not cap:
        return None
    metric = "required" if predictor.artifact.metrics.get("required") else "allocated"
    value = predictor.predict_workload(record.workload, metric=metric, level=UPPER_LEVEL)
    return OomPoint(record.index, record.workload, int(cap), float(value), float(value) > cap, value.upper > cap)


def _lines(points: Sequence[Point]) -> list[Line]:
    sorts: tuple[tuple[str, Callable[[Point], str]], ...] = (
        ("all", lambda p: "all"),
        ("stage", lambda p: p.stage),
        ("variant", lambda p: variant_name(p.workload.variant)),
        ("size", lambda p: size_class(p.workload)),
        ("domain", lambda p: "outside" if p.extrapolated else "inside"),
    )
    lines = []
    for metric in METRICS:
        mine = [p for p in points if p.metric == metric]
        for group, name_of in sorts:
            names = sorted({name_of(p) for p in mine}, key=_order)
            lines += [_line(metric, group, name, [p for p in mine if name_of(p) == name]) for name in names]
        plain = [(p.baseline_bytes / p.actual_bytes - 1, p.index) for p in mine if p.baseline_bytes is not None]
        if plain:
            lines.append(Line(metric, BASELINE, "plain four terms", len(plain), **_errors(plain)))
    return lines


def _order(name: str) -> tuple[int, str]:
    classes = [label for _, label in SIZE_CLASSES]
    return (classes.index(name) if name in classes else 0, name)


def _errors(found: Sequence[tuple[float, int]]) -> dict[str, Any]:
    size = [abs(error) for error, _ in found]
    worst, row = max(found, key=lambda pair: abs(pair[0]))
    return {
        "median_error": median(size),
        "p95_error": float(np.quantile(size, 0.95)),
        "worst_error": worst,
        "bias": median(error for error, _ in found),
        "worst_row": row,
    }


def _line(metric: str, group: str, name: str, points: Sequence[Point]) -> Line:
    finite = [p for p in points if np.isfinite(p.high_bytes)]
    held = [p for p in points if np.isfinite(p.upper_bytes) and not p.exceeds]
    return Line(
        metric,
        group,
        name,
        len(points),
        **_errors([(p.error, p.index) for p in points]),
        coverage=fmean(p.inside for p in points),
        # from the prediction up: the lower end stops at zero
        width=fmean((p.high_bytes - p.predicted_bytes) / p.predicted_bytes for p in finite) if finite else None,
        unbounded=len(points) - len(finite),
        upper_unbounded=sum(not np.isfinite(p.upper_bytes) for p in points),
        above_upper=fmean(p.exceeds for p in points),
        over_reserved=fmean(p.upper_bytes / p.actual_bytes - 1 for p in held) if held else None,
        over_reserved_bytes=round(fmean(p.upper_bytes - p.actual_bytes for p in held)) if held else None,
    )


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in values.items()}


def _why(skipped: Counter[str]) -> str:
    return "; ".join(f"{count} {reason}" for reason, count in skipped.items()) or "there are none"
