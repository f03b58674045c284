"""The fake world: a card whose coefficients are known, swept, fitted and saved once for all tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from sdfit.backends.fake import FakeBackend
from sdfit.predict.artifact import load_artifact
from sdfit.predict.predictor import Predictor
from sdfit.records import Record, RecordsFile
from sdfit.workload import Workload


def measured(workloads: Iterable[Workload], **options: Any) -> RecordsFile:
    """Records of the fake card, without a file or a process."""
    card = FakeBackend(**options)
    rows = [Record(i, w, **card.measure(w)) for i, w in enumerate(workloads)]
    return RecordsFile(card.environment(), rows, [])


@pytest.fixture(scope="session")
def fake_records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default grid swept on the fake card by a worker process."""
    from sdfit.sweep import grid
    from sdfit.sweep.run import sweep

    out = tmp_path_factory.mktemp("world") / "data" / "fake" / "2026-01-01-default.jsonl"
    outcome = sweep(grid.load("default"), "fake", {"gpu": "fake"}, out)
    assert outcome.complete and outcome.crashed == 0
    return out


@pytest.fixture(scope="session")
def fake_model(fake_records: Path) -> Path:
    """The model fitted on the default grid of the fake card, and its card beside it."""
    pytest.importorskip("sklearn")
    from sdfit.fit.files import fit_files

    return fit_files([fake_records], None, fake_records.parents[2] / "models" / "fake.joblib").path


@pytest.fixture(scope="session")
def f(fake_model: Path) -> Predictor:
    """The loaded model."""
    return Predictor(load_artifact(fake_model), fake_model)
