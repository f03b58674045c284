"""From records files to a model file: read, pool, fit, save, write the card."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdfit.errors import RecordsError, listed
from sdfit.files import CARD, MODEL, Output, file_name, write
from sdfit.fit.card import model_card
from sdfit.fit.scores import PublishedRow
from sdfit.predict.artifact import Artifact
from sdfit.records import Record, RecordsFile, content_of, pool, read

JUDGES = ("holdout", "decisions")
"""Records of the grids of these names judge models, and are never fitted."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fit that was saved."""

    artifact: Artifact
    path: Path
    notes: list[str]
    records: list[Record]


def swept_files(folder: Path, gpu: str | None = None) -> dict[str, list[Path]]:
    """The records under ``data``, by card: measured ones where there are any, otherwise simulated ones.

    Files of the grids that judge are left out.

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
        for path in sorted(home.glob("*.jsonl*")):
            environment = _environment(path)
            if environment is not None and environment.get("grid") not in JUDGES:
                kinds[str(environment.get("backend"))].append(path)
        if kinds:
            found[home.name] = kinds["cuda"] if "cuda" in kinds else next(iter(kinds.values()))
    if not found:
        where = f"data/{gpu}" if gpu else "data"
        raise RecordsError(f"there are no records to fit under ./{where}; type: sdfit sweep --gpu {gpu or 'auto'}")
    return found


def judging_files(home: Path) -> list[Path]:
    """The records in a card's folder that are of the grid ``holdout``: random sizes, which no fit saw."""
    return [path for path in sorted(home.glob("*.jsonl*")) if (_environment(path) or {}).get("grid") == JUDGES[0]]


def _environment(path: Path) -> dict[str, object] | None:
    """The environment in a file's first line; None for a file of another kind, such as a proof."""
    try:
        head = json.loads(content_of(path).split(b"\n", 1)[0])
    except (ValueError, OSError, EOFError, zlib.error):
        return None
    return head.get("environment") if isinstance(head, dict) and "sdfit_records" in head else None


def fit_files(
    paths: Sequence[Path],
    name: str | None = None,
    out: Path | None = None,
    published: Sequence[PublishedRow] = (),
    prior: str = "none",
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
    prior : str
        The model that few records correct, as `sdfit.fit.priors.prior_of` takes it; ``none``: every coefficient is fitted.

    Raises
    ------
    RecordsError, FitError, UnknownModel
    SdfitError
        If the model or its card cannot be written; see `sdfit.files.write`.
    """
    from sdfit.fit.fit import fit
    from sdfit.fit.priors import prior_of

    files = [read(path) for path in paths]
    grids = [str(f.environment.get("grid")) for f in files]
    for path, grid in zip(paths, grids, strict=True):
        if grid in JUDGES:
            raise RecordsError(f"'{path}' is of the grid '{grid}', which judges models and is never fitted")
    data = pool(files).undisturbed()
    sources = [_source(p, f) for p, f in zip(paths, files, strict=True)]
    known = prior_of(prior, data)
    if known is None:
        artifact = fit(data, name, sources, published)
    else:
        from sdfit.fit.few import fit_few

        artifact = fit_few(data, known, name, sources)
    path = out or Path("models", f"{file_name(artifact.name)}.joblib")
    card = Output(path.parent / f"{path.stem}.md", model_card(artifact).encode(), CARD)
    write(Output(path, artifact.to_bytes(), MODEL), card, inputs=paths)
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


def fitted_on(artifact: Artifact, paths: Sequence[Path], data: RecordsFile) -> list[str]:
    """What a judgement of a model on these records should say first: that it was fitted on them, or is of other cards.

    Parameters
    ----------
    artifact : Artifact
    paths : sequence of Path
    data : RecordsFile
        What they hold, pooled.
    """
    fitted = {source["sha256"] for source in artifact.sources}
    own = [path.name for path in paths if hashlib.sha256(path.read_bytes()).hexdigest() in fitted]
    found = (
        [f"'{artifact.name}' was fitted on {listed(own)}: these errors say nothing of runs that it never saw"]
        if own
        else []
    )
    theirs, mine = data.environment, artifact.environment
    if theirs.get("name") != mine.get("name") and theirs.get("workspaces") != mine.get("workspaces"):
        found.append(f"these records are of '{theirs.get('name')}', and the model is of '{mine.get('name')}'")
    if theirs.get("backend") != mine.get("backend"):
        found.append(
            f"these records come from the backend '{theirs.get('backend')}', and the model from '{mine.get('backend')}'"
        )
    return found
