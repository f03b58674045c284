"""The main job in one go: sweep a small grid, fit it, and judge it on runs that it never saw."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import click

from sdfit.cli.progress import Reporter
from sdfit.errors import SimulatedModelWarning
from sdfit.fit.card import fit_summary
from sdfit.fit.files import fit_files
from sdfit.predict.library import load
from sdfit.records import Record, fingerprint, read
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


def run_demo(folder: Path) -> str:
    """Sweep, fit, save, load, predict, compare; returns the report.

    Parameters
    ----------
    folder : Path
        The records, the model and its card are left there; those of an earlier demo are replaced.
    """
    started = time.monotonic()
    for old in ("records.jsonl", "unseen.jsonl", "model.joblib", "model.md"):
        (folder / old).unlink(missing_ok=True)
    backend, options = _backend()
    plan = grid.load("quick")
    unseen = Plan("unseen", "not in the grid", 0, 2, UNSEEN, fingerprint([w.to_dict() for w in UNSEEN]), ())
    for part, path in ((plan, folder / "records.jsonl"), (unseen, folder / "unseen.jsonl")):
        with Reporter(f"{backend} {part.name}", len(part.workloads)) as reporter:
            sweep(part, backend, options, path, report=reporter)
    fitted = fit_files([folder / "records.jsonl"], None, folder / "model.joblib")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SimulatedModelWarning)  # the heading says it
        f = load(folder / "model.joblib")
    lines = [("resolution", "run", "estimated", "actual", "error", "interval holds", f"fits on {MEMORY}")]
    for record in read(folder / "unseen.jsonl").records:
        w = record.workload
        peak = f.predict_workload(w, level=LEVEL)
        low, high = peak.interval
        fits = "yes" if f.fits(**w.to_dict(), memory=MEMORY, level=LEVEL) else "no"
        lines.append((f"{w.height}x{w.width}", _kind(w), format_bytes(peak), *_against(record, peak, low, high), fits))
    heading = (
        "measured on this card"
        if f.provenance == "measured"
        else f"simulated: a trace for '{f.name}', no card was used"
    )
    return "\n".join(
        [
            fit_summary(fitted.artifact),
            "",
            heading,
            aligned(lines, left=2),
            "",
            f"records, model and card are in {folder}/; took {time.monotonic() - started:.0f} s",
        ]
    )


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


def _against(record: Record, peak: float, low: float, high: float) -> tuple[str, str, str]:
    if record.outcome != "ok" or record.allocated_bytes is None:
        return "out of memory", "", ""
    actual = record.allocated_bytes
    return format_bytes(actual), percent((peak - actual) / actual, 3), "yes" if low <= actual <= high else "no"
