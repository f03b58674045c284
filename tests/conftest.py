"""The fake world: a card whose coefficients are known, swept, fitted and saved once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from worlds import drawn, generator, measured

from sdfit.predict.loading import load_artifact
from sdfit.predict.predictor import Predictor


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
    """The loaded model of the fake card: one set of coefficients per stage, intervals of next to nothing."""
    return Predictor(load_artifact(fake_model), fake_model)


@pytest.fixture(scope="session")
def noisy() -> Predictor:
    """A model with real intervals: 150 runs of a fake card with ±2 % misfit."""
    pytest.importorskip("sklearn")
    from sdfit.fit.fit import fit

    workloads = drawn(generator(9), 150, sides=range(256, 1600), batches=(1, 2, 4))
    return Predictor(fit(measured(workloads, noise=0.02)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the fuzz tests counted (``record_property("fuzz", words)``), whichever process they ran in."""
    for report in terminalreporter.stats.get("passed", []):
        for name, words in report.user_properties:
            if name == "fuzz" and report.when == "call":
                terminalreporter.write_line(f"fuzz: {words}")
