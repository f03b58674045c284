"""A snapshot file and what ran in it, as far as the file says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdfit.errors import SdfitError, SnapshotError, listed
from sdfit.predict.cards import card_slug
from sdfit.study.calibration.snapshot import Snapshot, read
from sdfit.workload import Workload

if TYPE_CHECKING:
    from sdfit.backends.trace.tracer import Tracer
    from sdfit.study.calibration.calibration import Calibration
    from sdfit.study.calibration.operations import TracedRun


@dataclass
class Told:
    """A snapshot with its workload; None until somebody says it."""

    path: Path
    snapshot: Snapshot
    workload: Workload | None
    num_inference_steps: int
    card: str | None
    source: str
    """``measured`` by sdfit on a card, ``recorded`` by somebody who says nothing of it, or ``simulated``."""


def told(path: Path, device: int | None = None) -> Told:
    """Read a file and what `sdfit sweep --history` wrote into it, if it did.

    Raises
    ------
    SnapshotError
        If the file cannot be read, or says of its workload what no workload is.
    """
    snapshot = read(path, device=device)
    about = dict(snapshot.about or {})
    if not about:
        return Told(path, snapshot, None, 0, None, "recorded")
    environment = about.get("environment")
    environment = environment if isinstance(environment, dict) else {}
    steps = environment.get("num_inference_steps", 2)
    try:
        workload = Workload.from_dict(about.get("workload"))  # type: ignore[arg-type]
        if type(steps) is not int or steps < 1:
            raise ValueError(f"num_inference_steps is {steps!r}")
    except (SdfitError, ValueError, TypeError) as error:
        raise SnapshotError(f"'{path}' says of its run what cannot be: {error}; record it again: sdfit sweep --history",
                            path=str(path)) from error  # fmt: skip
    name = environment.get("name")
    return Told(path, snapshot, workload, steps, name if isinstance(name, str) else None,
                "measured" if environment.get("backend") == "cuda" else "simulated")  # fmt: skip


def named(runs: Sequence[Told], gpu: str | None) -> str:
    """The card that the runs are of.

    Raises
    ------
    SnapshotError
        If the files name several.
    """
    cards = sorted({run.card for run in runs if run.card})
    if len(cards) > 1:
        raise SnapshotError(f"these snapshots are of several cards: {listed(cards)}; calibrate each alone")
    return card_slug(gpu) if gpu else cards[0] if cards else "card"


def calibrated(run: Told, card: str, tracer: Tracer | None = None) -> tuple[Calibration, TracedRun]:
    """Trace what ran and set the snapshot beside it.

    Raises
    ------
    SnapshotError
        If something else ran.
    """
    from sdfit.backends.trace.tracer import Tracer  # PyTorch: not before the files were read
    from sdfit.study.calibration.calibrate import calibrate
    from sdfit.study.calibration.operations import operations_of

    assert run.workload is not None
    tracer = tracer or Tracer(num_inference_steps=run.num_inference_steps)
    traced = operations_of(tracer, run.workload)
    try:
        return calibrate(run.snapshot, traced, card=card), traced
    except SnapshotError as error:
        raise SnapshotError(f"'{run.path}': {error}", path=str(run.path)) from error
