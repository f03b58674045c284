"""The main job in one go: sweep a small grid, fit it, and judge it on runs that it never saw."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from sdfit.cli.progress import Reporter
from sdfit.errors import RecordsError, SdfitError, SimulatedModelWarning
from sdfit.files import fingerprint
from sdfit.fit.card import fit_summary
from sdfit.fit.files import fit_files
from sdfit.predict.artifact import Artifact
from sdfit.predict.library import load
from sdfit.predict.prediction import Prediction
from sdfit.records import RECORDS, Record, read, read_rows
from sdfit.sweep import grid
from sdfit.sweep.grid import Plan
from sdfit.sweep.run import sweep
from sdfit.units import aligned, format_bytes, percent
from sdfit.workload import Workload

CARD = "t4"
"""What a trace stands for where there is no card."""
MEMORY, LEVEL = "16 GB", 0.95
"""What a run is asked to fit in, and how sure; the quick grid has too few scores for 0.99."""
UNSEEN = (
    Workload(384, 384),
    Workload(640, 640),
    Workload(380, 396, guidance_scale=5.0),
    Workload(534, 800, guidance_scale=5.0),
    Workload(600, 904, batch_size=2),
    Workload(1088, 1000, prompt_length=154),
    Workload(1352, 1352, batch_size=2),
    Workload(1792, 1792),
    Workload(448, 448, attention="eager"),
    Workload(696, 520, attention="eager", batch_size=2, guidance_scale=1.0),
    Workload(960, 832, attention="eager"),
)
"""Runs whose sizes are not in the quick grid."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A run that the fit never saw: what was estimated, what came of it, and whether it was said to fit."""

    record: Record
    peak: Prediction
    fits: bool

    @property
    def error(self) -> float | None:
        """Relative; None for a run out of memory."""
        actual = self.record.allocated_bytes if self.record.outcome == "ok" else None
        return None if actual is None else (float(self.peak) - actual) / actual

    def cells(self) -> tuple[str, ...]:
        """Its line of the table."""
        w, (low, high) = self.record.workload, self.peak.interval
        against: tuple[str, ...] = ("out of memory", "", "")
        if self.error is not None and self.record.allocated_bytes is not None:
            actual = self.record.allocated_bytes
            holds = "yes" if low <= actual <= high else "no"
            against = (format_bytes(actual), percent(self.error, 3), holds)
        return f"{w.height}x{w.width}", _kind(w), format_bytes(self.peak), *against, "yes" if self.fits else "no"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, amounts in bytes."""
        low, high = self.peak.interval
        return {
            "workload": self.record.workload.to_dict(),
            "estimated_bytes": round(self.peak),
            "interval_bytes": [round(low), round(high)] if math.isfinite(high) else None,
            "outcome": self.record.outcome,
            "actual_bytes": self.record.allocated_bytes,
            "error": self.error,
            "fits": self.fits,
        }


@dataclass(frozen=True, slots=True)
class Demo:
    """What a demonstration found.

    Parameters
    ----------
    artifact : Artifact
    rows : tuple of Compared
    folder : Path
        Where the records, the model and its card are.
    seconds : float
    """

    artifact: Artifact
    rows: tuple[Compared, ...]
    folder: Path
    seconds: float

    def text(self) -> str:
        """The report for a terminal."""
        heading = (
            "measured on this card"
            if self.artifact.provenance == "measured"
            else f"simulated: a trace for '{self.artifact.name}', no card was used"
        )
        head = ("resolution", "run", "estimated", "actual", "error", "interval holds", f"fits on {MEMORY}")
        table = aligned([head, *(row.cells() for row in self.rows)], left=2)
        end = f"records, model and card are in {self.folder}/; took {self.seconds:.0f} s"
        return "\n".join([fit_summary(self.artifact), "", heading, table, "", end])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, amounts in bytes."""
        return {
            "name": self.artifact.name,
            "provenance": self.artifact.provenance,
            "level": LEVEL,
            "memory": MEMORY,
            "evaluation": self.artifact.evaluation,
            "unseen": [row.to_dict() for row in self.rows],
            "folder": str(self.folder),
            "seconds": round(self.seconds, 1),
        }


def run_demo(folder: Path) -> Demo:
    """Sweep, fit, save, load, predict, compare.

    Parameters
    ----------
    folder : Path
        The records, the model and its card are left there; those of an earlier demo are replaced.

    Raises
    ------
    SdfitError
        If there are other records, or another model, of that name.
    """
    started = time.monotonic()
    plan = replace(grid.load("quick"), name="demo")
    unseen = Plan("unseen", "not in the grid", 0, 2, UNSEEN, fingerprint([w.to_dict() for w in UNSEEN]), ())
    parts = ((plan, folder / "records.jsonl"), (unseen, folder / "unseen.jsonl"))
    earlier = [path for part, path in parts if _is_there(path, part)]
    for path in earlier:
        path.unlink()
    backend, options = _backend()
    for part, path in parts:
        with Reporter(f"{backend} {part.name}", len(part.workloads)) as reporter:
            sweep(part, backend, options, path, report=reporter)
    fitted = fit_files([folder / "records.jsonl"], None, folder / "model.joblib")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SimulatedModelWarning)  # the heading says it
        f = load(folder / "model.joblib")
    rows = []
    for record in read(folder / "unseen.jsonl").records:
        w = record.workload
        fits = f.fits(**w.to_dict(), memory=MEMORY, level=LEVEL)
        rows.append(Compared(record, f.predict_workload(w, level=LEVEL), bool(fits)))
    return Demo(fitted.artifact, tuple(rows), folder, time.monotonic() - started)


def _is_there(path: Path, plan: Plan) -> bool:
    """Whether an earlier demonstration left its records there; those of anything else are not touched."""
    try:
        grid_of_it = read_rows(path, RECORDS)[0].get("grid")
    except RecordsError:
        return False  # not there, cut short, or none: whoever writes there says so
    if grid_of_it != plan.name:
        raise SdfitError(f"'{path}' is there and is not of a demo; choose another folder with --out", path=str(path))
    return True


def _backend() -> tuple[str, dict[str, object]]:
    """The card that is there, otherwise a trace; says which."""
    import torch

    if torch.cuda.is_available():
        click.echo("measuring on the CUDA card", err=True)
        return "cuda", {"gpu": "auto"}
    click.echo(f"no CUDA card here: the sweep is simulated, a trace for '{CARD}'", err=True)
    return "trace", {"gpu": CARD, "workspaces": True}


def _kind(w: Workload) -> str:
    guided = "CFG" if w.guided else "no CFG"
    return f"{w.attention}, {w.batch_size} image{'s' * (w.batch_size > 1)}, {guided}, {w.prompt_length} tokens"
