"""Which model answers for a name: a card's own, its architecture's, the one for the card in this machine."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest

import sdfit
from sdfit.errors import SimulatedModelWarning, UnknownModel
from sdfit.predict import library
from sdfit.predict.cards import KERNELS, architecture_of, table
from sdfit.predict.library import load
from sdfit.predict.nvml import Here
from sdfit.predict.predictor import Predictor
from sdfit.units import GIB


@pytest.fixture(autouse=True)
def models(fake_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model for each group of architectures, no others in reach, and no card in the machine."""
    for name in set(KERNELS.values()):
        shutil.copy(fake_model, tmp_path / f"{name}.joblib")
    monkeypatch.setattr(library, "model_folders", lambda: [tmp_path])
    monkeypatch.setattr(library, "here", lambda slug=None: None)
    return tmp_path


def loaded(name: str | Path = "auto") -> Predictor:
    """A model, its warning left aside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SimulatedModelWarning)
        return load(name)


@pytest.mark.parametrize(
    ("text", "model", "name", "gib"),
    [
        ("rtx3060", "sm75", "rtx3060", 8),
        ("RTX 3060", "sm75", "rtx3060", 8),
        ("RTX 3060 12GB", "sm75", "rtx3060", 12),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", "sm75", "rtx3060laptop", 6),
        ("Tesla T4", "sm75", "t4", 16),
        ("4090", "sm75", "rtx4090", 24),
        ("P100", "sm61", "p100", 12),
        ("v100", "sm70", "v100", 16),
        ("H100", "sm90", "h100", 80),
        ("NVIDIA GeForce RTX 5090", "sm90", "rtx5090", 32),
    ],
)
def test_a_card_gets_the_model_of_its_architecture(text: str, model: str, name: str, gib: int) -> None:
    """By any of its names; the model says which card it answers for, and what its memory is."""
    f = loaded(text)
    assert f.path is not None and (f.path.stem, f.name) == (model, name)
    assert f.card is not None and f.card.memory_gib == gib and f.card.slug == name
    assert f.context_bytes == f.card.context_bytes


@pytest.mark.parametrize("architecture", [*KERNELS, "sm87", "sm121", "SM_86"])
def test_an_architecture_is_answered_too(architecture: str) -> None:
    """Without a card; one that the table lacks by the highest below it."""
    f = loaded(architecture)
    known = architecture_of(architecture)
    assert known and f.path and f.path.stem == KERNELS[known] and f.card is None and f.name == known


@pytest.mark.parametrize("name", ["t4", "sm86"])
def test_a_model_of_its_own_comes_first(name: str, models: Path, fake_model: Path) -> None:
    """A sweep of that card, or of that architecture alone, is better than what its group shares."""
    shutil.copy(fake_model, models / f"{name}.joblib")
    for text in ("Tesla T4", "t4") if name == "t4" else ("sm86", "rtx3060", "A10G"):
        f = loaded(text)
        assert f.path == models / f"{name}.joblib"


def test_every_card_of_the_table_has_a_model() -> None:
    """By its short name."""
    for slug in dict.fromkeys(card.slug for card in table()):
        f = loaded(slug)
        assert f.name == slug and f.card is not None and f.card.slug == slug


@pytest.mark.parametrize(
    ("found", "model", "name", "gib"),
    [
        (Here("Tesla T4", "7.5", 14913 << 20, 14 * GIB), "sm75", "t4", 16),
        (Here("NVIDIA GeForce RTX 3060", "8.6", 12036 << 20, 11 * GIB), "sm75", "rtx3060", 12),
        (Here("NVIDIA Unheard Of", "9.3", 64 * GIB, 60 * GIB), "sm90", "unheardof", 64),
    ],
)
def test_auto_is_the_card_in_this_machine(
    found: Here, model: str, name: str, gib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row of the table by name and memory; one that the table does not know by its compute capability."""
    monkeypatch.setattr(library, "here", lambda slug=None: found)
    for f in (loaded(), loaded("auto")):
        assert f.path and f.path.stem == model and f.name == name and f.card and f.card.memory_gib == gib


def test_without_a_card_auto_says_what_to_type() -> None:
    """And a name that is no card's names those that are close."""
    with pytest.raises(
        UnknownModel, match=r"no card in this machine .* name one, as --gpu rtx3060, or another of: sdfit cards"
    ):
        load()
    with pytest.raises(UnknownModel, match=r"no model for 'rtx3065'; .* Did you mean rtx30\d\d"):
        load("rtx3065")
    for name in ("nvidia", "cuda:0", "0"):
        with pytest.raises(UnknownModel, match=f"'{name}' names no card; .* or auto for the card in this machine"):
            load(name)
    with pytest.raises(UnknownModel, match="'MI210' runs no CUDA"):
        load("MI210")
    with pytest.raises(UnknownModel, match="'6000' fits several cards: "):
        load("6000")


def test_a_card_without_a_model_says_its_architecture(models: Path) -> None:
    """So that one knows what would have to be swept."""
    (models / "sm90.joblib").unlink()
    with pytest.raises(
        UnknownModel, match=r"no model for 'h200'; the NVIDIA H200 is of the architecture sm90; there are: sm61"
    ):
        load("H200")


def test_a_path_keeps_the_name_in_the_file(fake_model: Path) -> None:
    """Whatever the file is called."""
    assert loaded(fake_model).name == "fake"


def test_a_card_that_computes_half_precision_wrongly_says_so() -> None:
    """GeForce 16 gives black images in float16."""
    assert "float16 wrongly" in loaded("gtx 1660").rests_on and "float16" not in loaded("rtx2060").rests_on


def test_device_memory_counts_the_context_of_the_card() -> None:
    """Where the records hold none, a stated one comes on top of reserved memory: more of it on a larger card."""
    made = {name: loaded(name) for name in ("t4", "h100")}
    for f in made.values():
        f.artifact.metrics.pop("device", None)
    above = {n: f(512, 512, metric="device") - f(512, 512, metric="reserved") for n, f in made.items()}
    assert above == pytest.approx({n: f.context_bytes for n, f in made.items()}) and above["t4"] < above["h100"]
    assert sdfit.load is load
