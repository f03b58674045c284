"""Which model few records correct, and what a plan for few runs starts from: the model of the card's kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdfit.errors import FitError, InvalidWorkload, UnknownModel
from sdfit.fit.correction import Prior
from sdfit.fit.planning import MOST_RUNS, NARROW, Few
from sdfit.predict.artifact import Artifact
from sdfit.predict.cards import Card, find_card, kernels_of
from sdfit.predict.library import card_of, find_model, model_folders
from sdfit.predict.loading import load_artifact
from sdfit.predict.memory import available as memory_of
from sdfit.predict.nvml import here
from sdfit.records import RecordsFile
from sdfit.workload import Workload

AUTO, NONE = "auto", "none"
FEW = 40
"""With fewer successful runs than this `sdfit fit` corrects a prior, if it finds one."""


def prior_of(wanted: str, data: RecordsFile) -> Artifact | None:
    """The prior that records are to correct, if they are to correct one.

    Parameters
    ----------
    wanted : str
        ``none``; the name or path of a model; or ``auto``: with fewer than `FEW` runs that succeeded, on a card or in its
        trace, the model of its kernels.
    data : RecordsFile

    Raises
    ------
    UnknownModel, ArtifactError
        If there is no model of that name, or it cannot be read.
    """
    few = sum(r.outcome == "ok" for r in data.records) < FEW and data.environment.get("backend") in ("cuda", "trace")
    if wanted == NONE or (wanted == AUTO and not few):
        return None
    if wanted != AUTO:
        return load_artifact(find_model(wanted)[0])
    return model_of_kernels(data.environment)


def model_of_kernels(environment: Mapping[str, Any]) -> Artifact | None:
    """The model whose kernels the card of an environment has, by its name or compute capability; None if there is none.

    A card's own model, which was fitted to earlier runs of it, is no prior; nor is one that was itself corrected.
    """
    capability = str(environment.get("compute_capability") or "").replace(".", "")
    for name in (str(environment.get("name")), f"sm{capability}"):
        try:
            kernels = kernels_of(name)
        except UnknownModel:  # the name fits several cards
            kernels = None
        for path in (folder / f"{kernels}.joblib" for folder in model_folders() if kernels):
            found = load_artifact(path) if path.is_file() else None
            if found is not None and not found.prior:
                return found
    return None


def few_for(
    gpu: str,
    workloads: Sequence[Workload],
    *,
    prior: str = AUTO,
    runs: int = MOST_RUNS,
    narrow: float = NARROW,
) -> Few:
    """Plan few runs of a card.

    Parameters
    ----------
    gpu : str
        A card or an architecture; ``auto``: the card in this machine.
    workloads : sequence of Workload
        To choose from. Those that need more memory than the card leaves are neither run nor asked about; of an
        architecture it is not known.
    prior : str
        ``auto``: the model of its kernels; or the name or path of a model.
    runs, narrow
        As in `Few`.

    Raises
    ------
    FitError
        If there is no prior.
    """
    card = _card(gpu)
    if prior != AUTO:
        found = load_artifact(find_model(prior)[0])
    else:
        facts = {"name": gpu} if card is None else {"name": card.slug, "compute_capability": card.compute_capability}
        known = model_of_kernels(facts)
        if known is None:
            raise FitError(
                f"few runs correct a prior, and no model is of the kernels of '{gpu}'; name one with --prior, as sm75, or "
                "sweep the whole grid",
                gpu=gpu,
            )
        found = known
    memory = None
    if card is not None:
        try:
            memory = memory_of(None, card).memory_bytes
        except InvalidWorkload:
            memory = None
    return Few(Prior(found), workloads, runs, memory, narrow)


def _card(gpu: str) -> Card | None:
    if gpu == AUTO:
        there = here()
        return card_of(there) if there is not None else None
    try:
        return find_card(gpu)
    except UnknownModel:
        return None
