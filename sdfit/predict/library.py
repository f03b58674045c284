"""Find and load models: by path, by the name of a card or of an architecture, or for the card in this machine."""

from __future__ import annotations

import os
import warnings
from difflib import get_close_matches
from pathlib import Path

from sdfit.errors import SimulatedModelWarning, UnknownModel, listed
from sdfit.predict.cards import KERNELS, Card, architecture_of, card_slug, find_card, table
from sdfit.predict.loading import load_artifact
from sdfit.predict.nvml import Nvml
from sdfit.predict.predictor import Predictor
from sdfit.shipped import shipped

AUTO = "auto"
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


def find_model(name: str | Path) -> tuple[Path, str, Card | None]:
    """Find the model that answers for a name.

    Parameters
    ----------
    name : str or Path
        A path; a model's own name; a card's, as the driver writes it or people do; an architecture's, as ``sm86``; or
        ``auto`` for the card in this machine. A card's own model comes before its architecture's.

    Returns
    -------
    path : Path
    short : str
        What to call it: the card, the architecture, or the model's own name.
    card : Card or None
        None where it is no card of the table.

    Raises
    ------
    UnknownModel
        Naming those that exist and the command that measures the one asked for.
    """
    text = str(name)
    if text.endswith(".joblib") or "/" in text or os.sep in text:
        return Path(name), Path(name).stem, find_card(Path(name).stem)
    known = available()
    if text.lower() == AUTO:
        text = _here(known)
    own = next((t for t in (text, text.lower(), card_slug(text)) if t in known), None)
    if own is not None:
        return known[own], own, None if architecture_of(own) else find_card(own)
    architecture, card = architecture_of(text), None
    if architecture is None:
        card = find_card(text)
        architecture = card.architecture if card else None
    if card is not None and card.slug in known:
        return known[card.slug], card.slug, card
    model = KERNELS.get(architecture or "")
    if architecture is None or model not in known:
        slug = card_slug(text)
        close = get_close_matches(slug, [*known, *(one.slug for one in table())], n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise UnknownModel(
            f"no model for '{text}'; there are: {listed(known)}, and those of the cards that sdfit cards lists.{hint} Measure "
            f"one: sdfit sweep --gpu {slug}, then sdfit fit",
            given=text,
            known=list(known),
        )
    return known[model], card.slug if card else architecture, card


def _here(known: dict[str, Path]) -> str:
    card = Nvml.first()
    if card is None:
        raise UnknownModel(
            f"there is no card in this machine (or NVML is not installed); name one: --gpu {next(iter(known), 't4')}, or one "
            "of: sdfit cards",
            given=AUTO,
            known=list(known),
        )
    return card.name


def load(name: str | Path = AUTO) -> Predictor:
    """Load the model that answers for a card.

    Parameters
    ----------
    name : str or Path
        As in `find_model`: ``"rtx3060"``, ``"Tesla T4"``, ``"4090"``, ``"sm86"``, ``"auto"``, or a path.

    Returns
    -------
    Predictor
        ``f.name`` is the card asked for, ``f.card`` its row of the table, ``f.path`` the file, ``f.rests_on`` one line on
        what its numbers rest on.

    Raises
    ------
    UnknownModel, ArtifactError

    Warns
    -----
    SimulatedModelWarning
        Once per name, if the model does not rest on a sweep of that card.
    """
    path, short, card = find_model(name)
    predictor = Predictor(load_artifact(path), path, short, card)
    once = f"{short} {path.absolute()}"
    if predictor.provenance != "measured" and once not in _warned:
        _warned.add(once)
        warnings.warn(predictor.rests_on, SimulatedModelWarning, stacklevel=2)
    return predictor
