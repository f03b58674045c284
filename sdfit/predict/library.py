"""Find and load models: by path, or by the name of a card."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from sdfit.errors import SimulatedModelWarning, UnknownModel, listed
from sdfit.predict.artifact import RESTS_ON
from sdfit.predict.loading import load_artifact
from sdfit.predict.predictor import Predictor
from sdfit.shipped import shipped

_warned: set[str] = set()


def model_folders() -> list[Path]:
    """Where artifacts are looked for by name: ``SDFIT_MODELS``, ``./models``, the shipped ones."""
    chosen = os.environ.get("SDFIT_MODELS")
    return [*([Path(chosen)] if chosen else []), Path("models"), shipped("models")]


def available() -> dict[str, Path]:
    """The models that `load` finds by name, and the file that each name gives."""
    found: dict[str, Path] = {}
    for folder in model_folders():
        for path in sorted(folder.glob("*.joblib")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def find_model(name: str | Path) -> Path:
    """Find an artifact by path or name.

    Raises
    ------
    UnknownModel
        Naming those that exist and the command that measures the one asked for.
    """
    text = str(name)
    if text.endswith(".joblib") or "/" in text or os.sep in text:
        return Path(name)
    known = available()
    text = text if text in known else text.lower()
    if text not in known:
        raise UnknownModel(
            f"no model for '{text}'; there are: {listed(known)}. Measure one: sdfit sweep --gpu {text}, then sdfit fit",
            given=text,
            known=list(known),
        )
    return known[text]


def load(name: str | Path) -> Predictor:
    """Load a model by the name of its card or by path.

    A name is looked for in ``SDFIT_MODELS``, ``./models`` and the models that ship with sdfit, in this order;
    ``f.path`` says which file it was.

    Raises
    ------
    UnknownModel, ArtifactError

    Warns
    -----
    SimulatedModelWarning
        Once per file, if the model does not rest on a sweep of that card.
    """
    path = find_model(name)
    predictor = Predictor(load_artifact(path), path)
    if predictor.provenance != "measured" and str(path.absolute()) not in _warned:
        _warned.add(str(path.absolute()))
        warnings.warn(
            f"the model '{predictor.name}' ({path}) is not measured; it rests on {RESTS_ON[predictor.provenance]}",
            SimulatedModelWarning,
            stacklevel=2,
        )
    return predictor
