"""What runs a Workload and says how much memory it took: a card, a trace, or a made-up card.

A backend is made in the process that runs it, from plain options, so that a worker can be started anywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Protocol

from sdfit.backends.environment import a_card_is_there
from sdfit.errors import InvalidWorkload, listed, missing
from sdfit.workload import Workload

BACKENDS = ("cuda", "trace", "fake")
FAKE_OPTIONS = "SDFIT_FAKE"
"""Environment variable: options of the made-up card as a JSON table, for tests that go through the command line."""


class Backend(Protocol):
    """Runs workloads one after the other."""

    tainted: bool
    """Whether this process can no longer be trusted and must be replaced by a fresh one."""

    def environment(self) -> dict[str, Any]:
        """The facts that every number of this backend depends on (see `sdfit.records.MATTERS`)."""
        ...

    def measure(self, workload: Workload) -> dict[str, Any]:
        """Run one workload; returns the fields of a `sdfit.records.Record` but index and workload."""
        ...


def open_backend(name: str, options: Mapping[str, Any]) -> Backend:
    """Make a backend in this process.

    Raises
    ------
    InvalidWorkload
        If there is no backend of that name.
    DeviceError, DependencyError
        If it needs a card, or packages, that are not there.
    """
    try:
        return _opened(name, options)
    except ModuleNotFoundError as error:
        lacking = missing(error)
        if lacking is None:
            raise
        raise lacking from error


def _opened(name: str, options: Mapping[str, Any]) -> Backend:
    if name == "trace":
        from sdfit.backends.trace.backend import TraceBackend

        return TraceBackend(**options)
    if name == "cuda":
        if "counters" not in options:
            a_card_is_there(options.get("gpu", "auto"))  # before the imports that take seconds
        from sdfit.backends.cuda import CudaBackend

        return CudaBackend(**options)
    if name == "fake":
        from sdfit.backends.fake import FakeBackend

        return FakeBackend(**options, **json.loads(os.environ.get(FAKE_OPTIONS, "{}")))
    raise InvalidWorkload(f"backend is {name!r}; it must be one of {listed(BACKENDS)}", given=name)
