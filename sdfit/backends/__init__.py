"""What runs a Workload and says how much memory it took: a card, a trace, or a made-up card.

A backend is made in the process that runs it, from plain options, so that a worker can be started anywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Protocol

from sdfit.errors import DeviceError, InvalidWorkload, listed, missing, needs
from sdfit.workload import Workload

BACKENDS = ("cuda", "trace", "fake")
FAKE_OPTIONS = "SDFIT_FAKE"
"""Environment variable: options of the made-up card as a JSON table, for tests that go through the command line."""


class Backend(Protocol):
    """Runs workloads one after the other."""

    spent: bool
    """Whether this process can no longer be trusted and must be replaced by a fresh one."""

    def environment(self) -> dict[str, Any]:
        """The facts that every number of this backend depends on (see `sdfit.records.MATTERS`)."""
        ...

    def measure(self, workload: Workload) -> dict[str, Any]:
        """Run one workload; returns the fields of a `sdfit.records.Record` but index and workload."""
        ...


def a_card_is_there(gpu: str) -> None:
    """Refuse to go on without a CUDA card.

    Raises
    ------
    DeviceError
        Naming both ways on: another machine, or a trace.
    """
    try:
        import torch
    except ImportError as error:
        raise needs("sweep", "torch") from error
    if not torch.cuda.is_available():
        raise DeviceError(
            "there is no CUDA card here; run this on a machine with one, or simulate: --backend trace", gpu=gpu
        )


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
        if options.get("device", "cuda") == "cuda":
            a_card_is_there(options.get("gpu", "auto"))  # before the imports that take seconds
        from sdfit.backends.cuda import CudaBackend

        return CudaBackend(**options)
    if name == "fake":
        from sdfit.backends.fake import FakeBackend

        return FakeBackend(**options, **json.loads(os.environ.get(FAKE_OPTIONS, "{}")))
    raise InvalidWorkload(f"backend is {name!r}; it must be one of {listed(BACKENDS)}", given=name)
