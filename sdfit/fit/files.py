"""From records files to a model file: read, pool, fit, save, write the card."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdfit.errors import RecordsError, listed
from sdfit.fit.card import write_card
from sdfit.fit.scores import PublishedRow
from sdfit.predict.artifact import Artifact
from sdfit.records import Record, RecordsFile, pool, read

HOLDOUT = "holdout"
"""Records of the grid of this name are never fitted."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fit that was saved."""

    artifact: Artifact
    path: Path
    notes: list[str]
    records: list[Record]


def swept_files(folder: Path, gpu: str | None = None) -> dict[str, list[Path]]:
    """The records under ``data``, by card: measured ones where there are any, otherwise simulated ones.

    Files of the holdout grid are left out.

    Raises
    ------
    RecordsError
        If there are none.
    """
    found: dict[str, list[Path]] = {}
    for home in sorted(p for p in folder.glob("*") if p.is_dir() and p.name != "published"):
        if gpu is not None and home.name != gpu:
            continue
        kinds: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(home.glob("*.jsonl")):
            environment = _environment(path)
            if environment is not None and environment.get("grid") != HOLDOUT:
                kinds[str(environment.get("backend"))].append(path)
        if kinds:
            found[home.name] = kinds["cuda"] if "cuda" in kinds else next(iter(kinds.values()))
    if not found:
        where = f"data/{gpu}" if gpu else "data"
        raise RecordsError(f"there are no records to fit under ./{where}; type: sdfit sweep --gpu {gpu or 'auto'}")
    return found


def _environment(path: Path) -> dict[str, object] | None:
    """The environment in a file's first line; None for a file of another kind, such as a proof."""
    with path.open(encoding="utf-8") as file:
        try:
            head = json.loads(file.readline())
        except ValueError:
            return None
    return head.get("environment") if isinstance(head, dict) and "sdfit_records" in head else None


def fit_files(
    paths: Sequence[Path],
    name: str | None = None,
    out: Path | None = None,
    published: Sequence[PublishedRow] = (),
) -> Fitted:
    """Fit records files and save the model with its card.

    Parameters
    ----------
    paths : sequence of Path
    name : str, optional
        The card; None takes it from the records.
    out : Path, optional
        None: ``models/<name>.joblib`` under the current folder.
    published : sequence of PublishedRow
        See `sdfit.fit.fit.fit`.

    Raises
    ------
    RecordsError, FitError
    """
    from sdfit.fit.fit import fit

    files = [read(path) for path in paths]
    grids = [str(f.environment.get("grid")) for f in files]
    if HOLDOUT in grids:
        raise RecordsError(f"'{paths[grids.index(HOLDOUT)]}' is a holdout: it judges models and is never fitted")
    data = pool(files)
    artifact = fit(data, name, [_source(p, f) for p, f in zip(paths, files, strict=True)], published)
    path = out or Path("models", f"{artifact.name}.joblib")
    artifact.save(path)
    write_card(artifact, path)
    return Fitted(artifact, path, data.notes, data.records)


def _source(path: Path, file: RecordsFile) -> dict[str, object]:
    outcomes = [r.outcome for r in file.records]
    return {
        "name": "/".join(path.parts[-2:]),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "rows": len(outcomes),
        "oom": outcomes.count("oom"),
        "grid": str(file.environment.get("grid")),
    }


def read_pooled(paths: Sequence[Path]) -> RecordsFile:
    """Read records files and pool them.

    Raises
    ------
    RecordsError
        If there are none, or they do not agree.
    """
    if not paths:
        raise RecordsError(f"give records files, for example {listed(['data/t4/*.jsonl'])}")
    return pool([read(path) for path in paths])
