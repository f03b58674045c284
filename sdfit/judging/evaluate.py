"""How well an artifact predicts records: errors, coverage of its intervals, and what its bounds would reserve for nothing.

Give it records that the artifact was not fitted to (another grid, another day); on its own records it only says how well
the equation fits. Runs that ran out of memory count too: the artifact should have said that they do not fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, median
from typing import Any

import numpy as np

from sdfit.equation.metrics import METRICS
from sdfit.errors import RecordsError, UnknownVariant, listed
from sdfit.fit.baseline import predict_baseline
from sdfit.fit.folds import error_summary
from sdfit.judging.evaluation import BASELINE, UPPER_LEVEL, Evaluation, Line, OomPoint, Point, StageLine
from sdfit.predict import conformal
from sdfit.predict.prediction import Prediction
from sdfit.predict.predictor import Predictor
from sdfit.records import Record, RecordsFile
from sdfit.workload import Workload, variant_name

SIZE_CLASSES = ((512 * 512, "to 512²"), (768 * 768, "to 768²"), (1024 * 1024, "to 1024²"), (None, "above 1024²"))
"""Pixels of one image, largest of each class [pixels]."""


def evaluate(predictor: Predictor, records: RecordsFile | Iterable[Record], level: float = 0.95) -> Evaluation:
    """Hold an artifact against records.

    Parameters
    ----------
    predictor : Predictor
    records : RecordsFile, or iterable of Record
        Crashed rows, and variants that the artifact does not have, are counted and skipped. Only the file says
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
        if record.disturbed:
            skipped["another program's memory came or went"] += 1
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
        if not actual or (metric != "allocated" and metric not in predictor.artifact.metrics):
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
    metric = "required" if "required" in predictor.artifact.metrics else "allocated"
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
    errors = [error for error, _ in found]
    summary = error_summary(errors)
    return {
        "median_error": summary.median,
        "p95_error": summary.p95,
        "worst_error": errors[summary.worst_at],
        "bias": summary.bias,
        "worst_row": found[summary.worst_at][1],
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


def _why(skipped: Counter[str]) -> str:
    return "; ".join(f"{count} {reason}" for reason, count in skipped.items()) or "there are none"
