"""The backend ``trace`` simulates what is covered, checks a tenth, and traces all once a check fails."""

from dataclasses import replace

import pytest

pytest.importorskip("diffusers")

from sdfit.backends.trace.backend import TraceBackend, is_checked
from sdfit.errors import SweepWarning
from sdfit.workload import Workload

CHECKED = next(w for w in (Workload(256, width) for width in range(256, 1256, 8)) if is_checked(w))
UNCHECKED = next(w for w in (Workload(256, width) for width in range(256, 1256, 8)) if not is_checked(w))


@pytest.fixture
def backend(monkeypatch):
    """One that notes what it traces."""
    backend, traced = TraceBackend("t4", workspaces=True), []
    run = backend._tracer.run

    def noted(workload, **options):
        traced.append(workload)
        return run(workload, **options)

    monkeypatch.setattr(backend._tracer, "run", noted)
    backend.traced = traced
    return backend


def test_a_tenth_is_traced_as_well(backend):
    """And what is not covered is traced alone; all rows are what a trace gives."""
    smallest = Workload(64, 64)
    rows = {workload: backend.measure(workload) for workload in (CHECKED, UNCHECKED, smallest)}
    assert backend.traced == [CHECKED, smallest]
    backend._trusted = False
    assert rows == {workload: backend.measure(workload) for workload in rows}


def test_one_that_differs_ends_the_simulating(backend, monkeypatch):
    """One block more is enough: it is said, and from then on all is traced."""
    run = backend._simulator.run

    def wrong(workload, **options):
        simulated = run(workload, **options)
        return replace(simulated, events=[*simulated.events, (10**6, 512)])

    monkeypatch.setattr(backend._simulator, "run", wrong)
    with pytest.warns(SweepWarning, match="is not what its trace is"):
        row = backend.measure(CHECKED)
    assert backend.measure(UNCHECKED)["outcome"] == row["outcome"] == "ok"
    assert backend.traced == [CHECKED, UNCHECKED]


def test_without_a_card_nothing_is_replayed():
    """The bare trace has no allocator; its peaks are the same, simulated or not."""
    backend = TraceBackend("none")
    row = backend.measure(UNCHECKED)
    assert row["reserved_bytes"] is row["required_bytes"] is None
    assert row["stage_peaks_bytes"] == backend._tracer.run(UNCHECKED).stage_peaks


def test_under_another_release_all_is_traced(backend, monkeypatch):
    """As `make matrix` asks of each release: the programs are another's, and tell nothing of it."""
    import sdfit.backends.environment as environment

    monkeypatch.setattr(environment, "version", lambda package: "0.1")
    other = TraceBackend("t4", workspaces=True)
    monkeypatch.setattr(other, "_tracer", backend._tracer)
    row = other.measure(UNCHECKED)
    assert backend.traced == [UNCHECKED]
    assert row == backend.measure(UNCHECKED)
    assert backend.traced == [UNCHECKED]
