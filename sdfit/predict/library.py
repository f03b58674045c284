"""Find and load models: by path, by the name of a card or of an architecture, or for the card in this machine."""

from __future__ import annotations

import os
import warnings
from collections.abc import Container
from difflib import get_close_matches
from pathlib import Path

from sdfit.errors import LocalModelWarning, SimulatedModelWarning, UnknownModel, listed, shown
from sdfit.files import shipped
from sdfit.predict.cards import KERNELS, UNNAMED, Card, architecture_of, card_slug, find_card, no_cuda, table
from sdfit.predict.loading import load_artifact
from sdfit.predict.nvml import Here, here
from sdfit.predict.predictor import Predictor
from sdfit.predict.replayed import replaying
from sdfit.units import GIB

AUTO = "auto"
LOCAL = Path("models")
"""Models of the current folder."""
_warned: set[str] = set()


def model_folders() -> list[Path]:
    """Where artifacts are looked for by name: ``SDFIT_MODELS``, ``./models``, the shipped ones."""
    chosen = os.environ.get("SDFIT_MODELS")
    return [*([Path(chosen)] if chosen else []), LOCAL, shipped("models")]


def available() -> dict[str, Path]:
    """The models that `load` finds by name, and the file that each name gives."""
    found: dict[str, Path] = {}
    for folder in model_folders():
        for path in sorted(folder.glob("*.joblib")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def find_model(name: str | Path) -> tuple[Path, str | None, Card | None]:
    """Find the model that answers for a name.

    Parameters
    ----------
    name : str or Path
        A path; a model's own name; a card's, as the driver writes it or people do; an architecture's, as ``sm86``; or
        ``auto`` for the card in this machine. A card's own model comes before its architecture's.

    Returns
    -------
    path : Path
    short : str or None
        What to call it: the card, the architecture, or the model's own name; None for a path: the name in the file.
    card : Card or None
        None where it is no card of the table.

    Raises
    ------
    UnknownModel
        Naming those that exist and the command that measures the one asked for.
    """
    if not isinstance(name, str | os.PathLike):
        raise UnknownModel(f"a model is a name or a path, not {shown(name)}", given=name)
    text = str(name)
    if text.endswith(".joblib") or "/" in text or os.sep in text:
        return Path(name), None, None
    known = available()
    if text.lower() == AUTO:
        return _model_of(_card_here(known), known)
    own = next((t for t in (text, text.lower(), card_slug(text)) if t in known), None)
    if own is not None:
        return known[own], own, _row_of(text)
    architecture = architecture_of(text)
    if architecture is not None:
        model = KERNELS[architecture]
        if model in known:
            return known[model], architecture, None
    card = find_card(text)
    if card is None:
        raise _unknown(text, known)
    return _model_of(card, known)


def answering(card: Card, known: Container[str]) -> str | None:
    """The model that answers for a card: its own, else that of its architecture, else one with the same kernels."""
    architecture = architecture_of(card.architecture) or ""
    return next((m for m in (card.slug, architecture, KERNELS.get(architecture)) if m and m in known), None)


def _model_of(card: Card, known: dict[str, Path]) -> tuple[Path, str, Card]:
    model = answering(card, known)
    if model is None:
        raise _unknown(card.slug, known, f"the {card.name} is of the architecture {card.architecture}; ")
    return known[model], card.slug, card


def _row_of(name: str) -> Card | None:
    """The card that a model is named after, if it is named after one."""
    try:
        return None if architecture_of(name) else find_card(name)
    except UnknownModel:  # fits several
        return None


def _card_here(known: dict[str, Path]) -> Card:
    """The card in this machine: its row of the table, by name and memory, or one made of what the driver says."""
    found = here()
    if found is None:
        raise UnknownModel(
            "there is no card in this machine that can be asked (nvidia-ml-py or torch would); name one, as "
            "--gpu rtx3060, or another of: sdfit cards",
            given=AUTO,
            known=list(known),
        )
    return card_of(found)


def card_of(found: Here) -> Card:
    """The row of the table that a card in this machine has, or one made of what the driver says of it."""
    rows = [card for card in table() if card.slug == card_slug(found.name)]
    if not rows:
        total = found.total_bytes
        return Card(found.name, found.compute_capability, round(total / GIB), total)
    return min(rows, key=lambda card: abs(card.memory_gib * GIB - found.total_bytes))


def _unknown(text: str, known: dict[str, Path], why: str = "") -> UnknownModel:
    slug = card_slug(text)
    if no_cuda(text):
        return UnknownModel(
            f"'{text}' runs no CUDA, and sdfit knows no other kernels' memory; it answers for the cards that sdfit cards lists",
            given=text,
            known=list(known),
        )
    if slug == UNNAMED or slug.startswith("cuda") or slug.isdigit():
        return UnknownModel(
            f"'{text}' names no card; write its name as nvidia-smi prints it, as 'RTX 3060' or 4090 (sdfit cards lists them), "
            f"or {AUTO} for the card in this machine",
            given=text,
            known=list(known),
        )
    close = get_close_matches(slug, [*known, *dict.fromkeys(card.slug for card in table())], n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close and close[0] != slug else ""
    return UnknownModel(
        f"no model for '{text}'; {why}there are: {listed(known)}, and those of the cards that sdfit cards lists.{hint} Measure "
        f"one: sdfit sweep --gpu {slug}, then sdfit fit",
        given=text,
        known=list(known),
    )


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
    LocalModelWarning
        Once per name, if the model is of the current folder and one that ships would have answered.
    """
    path, short, card = find_model(name)
    artifact = load_artifact(path)
    predictor = replaying(Predictor(artifact, path, short, card if short is not None else _row_of(artifact.name)))
    once = f"{predictor.name} {path.absolute()}"
    if once not in _warned:
        _warned.add(once)
        if short is not None and path.parent == LOCAL and _ships(path.stem, short, card):
            words = f"{short}: the model is {path} of this folder, not the one that ships with sdfit"
            warnings.warn(words, LocalModelWarning, stacklevel=2)
        if predictor.provenance != "measured":
            warnings.warn(predictor.rests_on, SimulatedModelWarning, stacklevel=2)
    return predictor


def _ships(model: str, short: str, card: Card | None) -> bool:
    """Whether a model that ships, and is not the same file, would have answered."""
    folder = shipped("models")
    if LOCAL.resolve() == folder.resolve():
        return False
    names = {path.stem for path in folder.glob("*.joblib")}
    return model in names or short in names or bool(card and answering(card, names))
