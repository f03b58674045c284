"""Run pictures and hold what they took against what a model said: on a card, or, said so, by a trace.

Each pair is written down before the next run starts, as a record that `sdfit fit` takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdfit.backends import Backend
from sdfit.errors import InvalidWorkload
from sdfit.predict.pictures import Picture
from sdfit.predict.predictor import Predictor
from sdfit.predict.verdict import DOES_NOT_FIT, verdict
from sdfit.records import RECORDS, Record
from sdfit.sweep.journal import Journal
from sdfit.units import format_bytes
from sdfit.workload import Workload

METRIC = "allocated"
"""What is compared: every backend counts it, in every run."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A picture's run beside its prediction.

    Parameters
    ----------
    picture : Picture
    estimated_bytes : float or None
        Allocated memory as predicted [bytes]; None where the run was skipped.
    actual_bytes : int or None
        As it was counted [bytes]; None where it did not succeed.
    inside : bool or None
        Whether that lies in the prediction's interval.
    device_bytes : int or None
        What the driver showed as used, where the backend can ask it [bytes].
    outcome : str
        ``ok``, ``oom``, ``crash``, or ``skipped``.
    reason : str
        Why it was skipped, or failed.
    """

    picture: Picture
    estimated_bytes: float | None = None
    actual_bytes: int | None = None
    inside: bool | None = None
    device_bytes: int | None = None
    outcome: str = "skipped"
    reason: str = ""

    @property
    def error(self) -> float | None:
        """(estimated - actual) / actual."""
        if self.estimated_bytes is None or self.actual_bytes is None:
            return None
        return self.estimated_bytes / self.actual_bytes - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values, amounts in bytes."""
        return {
            "image": str(self.picture.path),
            "height": self.picture.height or None,
            "width": self.picture.width or None,
            "estimated_bytes": None if self.estimated_bytes is None else round(self.estimated_bytes),
            "actual_bytes": self.actual_bytes,
            "error": self.error,
            "inside": self.inside,
            "device_bytes": self.device_bytes,
            "outcome": self.outcome,
            "reason": self.reason or None,
        }


def validate(
    model: Predictor,
    backend: Backend,
    pictures: Iterable[Picture],
    path: Path,
    *,
    memory: float,
    level: float,
    **options: Any,
) -> Iterator[Pair]:
    """Run each picture that may fit and compare.

    Parameters
    ----------
    path : Path
        The records file that the runs are appended to.
    memory : float
        What PyTorch may take [bytes]; a run that does not fit is skipped.
    level : float
        Of the interval.
    **options
        The workload's fields but height and width.

    Raises
    ------
    RecordsError
        If the file is of another kind or environment.
    """
    facts = backend.environment() | {"grid": "pictures"}
    with Journal(path, facts, RECORDS) as journal:
        for picture in pictures:
            if picture.problem:
                yield Pair(picture, reason=picture.problem)
                continue
            try:
                workload = Workload(picture.height, picture.width, **options)
            except InvalidWorkload as error:
                yield Pair(picture, reason=str(error))
                continue
            said = verdict(model, workload, memory=memory)
            if said.answer == DOES_NOT_FIT:
                yield Pair(picture, reason=f"{DOES_NOT_FIT}: it would need {format_bytes(said.prediction)}")
                continue
            record = Record(len(journal.rows), workload, **backend.measure(workload))
            journal.append(record)
            estimate = model.predict_workload(workload, metric=METRIC, level=level)
            if record.outcome != "ok" or record.allocated_bytes is None:
                reason = record.message or record.oom_stage or ""
                yield Pair(picture, float(estimate), outcome=record.outcome, reason=reason)
                continue
            low, high = estimate.interval
            inside = low <= record.allocated_bytes <= high
            yield Pair(picture, float(estimate), record.allocated_bytes, inside, record.device_bytes, "ok")
