"""The backend ``trace``: records from meta tensors, on any machine.

Allocated memory is traced; reserved and required memory come from replaying the traced allocations through a model of
the caching allocator (`sdfit.predict.simulation.replay`). Runs that `sdfit.predict.simulation.simulate` covers are simulated, which gives
the same events in a hundredth of the time; a tenth of them, drawn by what they are, is traced as well and compared. Under other
releases of PyTorch or diffusers than those in which its programs were found, all are traced.
Nothing here is measured, and the records say so.
"""

from __future__ import annotations

import warnings
import zlib
from contextlib import suppress
from typing import Any

import torch

from sdfit.backends.environment import releases, software
from sdfit.backends.trace.tables import workspaces_of
from sdfit.backends.trace.tracer import Tracer
from sdfit.errors import InvalidWorkload, SdfitError, SweepWarning
from sdfit.predict.simulation.card import Traced
from sdfit.predict.simulation.library import NotSimulated, shipped_library
from sdfit.predict.simulation.replay import replay, smallest_cap, without
from sdfit.predict.simulation.simulate import Simulator, uncollected
from sdfit.predict.simulation.workspaces import Workspaces, workspaces_for
from sdfit.workload import CARD_ALONE, ON_A_CARD, Workload

SEED = 20261128
"""Of the workloads whose simulation is checked."""


class TraceBackend:
    """Traces workloads as a card would run them.

    Parameters
    ----------
    gpu : str
        The card or architecture that the trace stands for; ``auto`` and ``none`` stand for no card. The records are named
        after the architecture, which is all that a trace knows of a card.
    workspaces : bool
        Add the kernel workspaces known for that card's architecture; a card without an entry gets the bare trace.
    kernels : str, optional
        Take the workspaces of another card, or of a file that ``sdfit calibrate`` wrote, instead.
    num_inference_steps : int
    """

    def __init__(
        self, gpu: str = "none", *, workspaces: bool = False, kernels: str | None = None, num_inference_steps: int = 2
    ) -> None:
        torch.set_num_threads(1)
        self.gpu = "none" if gpu == "auto" else gpu.lower()
        self.num_inference_steps = num_inference_steps
        self.tainted = False
        self.kernels: Workspaces | None = None
        if kernels is not None:
            self.kernels = workspaces_of(kernels)
        elif workspaces and self.gpu != "none":
            try:
                self.kernels = workspaces_for(self.gpu)
            except SdfitError:
                self.kernels = None  # the environment then says that no workspaces were added
        self._tracer = Tracer(self.kernels, num_inference_steps=num_inference_steps)
        self._simulator = Simulator(self.kernels, num_inference_steps=num_inference_steps)
        self._trusted = shipped_library().found_in == releases()

    def environment(self) -> dict[str, Any]:
        """See `sdfit.backends.Backend.environment`."""
        table = None
        if self.kernels is not None:
            table = self.kernels.label
        return {
            "backend": "trace",
            "gpu": f"none (a trace for '{self.gpu}')",
            "name": self.gpu if self.kernels is None else self.kernels.architecture.name,
            "workspaces": table,
            "num_inference_steps": self.num_inference_steps,
            **software(),
        }

    def measure(self, workload: Workload) -> dict[str, Any]:
        """See `sdfit.backends.Backend.measure`.

        Raises
        ------
        InvalidWorkload
            If only a card can tell.
        """
        if workload.execution in ON_A_CARD:
            raise InvalidWorkload(f"execution={workload.execution}: {CARD_ALONE}", given=workload.execution)
        with uncollected():
            traced = self._run(workload)
            # without workspaces the trace is of no card, and what an allocator would do with it says little
            reserved = required = minimum = None
            if traced.events is not None:
                reserved = replay(traced.events).reserved_bytes
                required = smallest_cap(traced.events)
                minimum = smallest_cap(without(traced.events, traced.workspaces))
        return {
            "outcome": "ok",
            "stage_peaks_bytes": traced.stage_peaks,
            "component_bytes": traced.component_bytes,
            "allocated_bytes": traced.peak_bytes,
            "reserved_bytes": reserved,
            "required_bytes": required,
            "minimum_bytes": minimum,
            "baseline_bytes": traced.weights_bytes + traced.unsplit_bytes,
        }

    def _run(self, workload: Workload) -> Traced:
        """Simulate a workload, or trace it: with its events, where there is an allocator to replay them."""
        keep_events = self.kernels is not None
        simulated = None
        if self._trusted:
            with suppress(NotSimulated):
                simulated = self._simulator.run(workload, keep_events=keep_events)
        if simulated is not None and not is_checked(workload):
            return simulated
        traced = self._tracer.run(workload, keep_events=keep_events)
        if simulated is not None and not traced.is_like(simulated):
            self._trusted = False
            warnings.warn(
                f"a simulated run is not what its trace is ({workload}): from here on all are traced; rows that were "
                "simulated before may differ too, since diffusers or PyTorch is not as sdfit's programs were found in it: "
                "python -m sdfit.study.lab programs",
                SweepWarning,
                stacklevel=3,
            )
        return traced


def is_checked(workload: Workload) -> bool:
    """Whether a workload is of the tenth that is traced beside its simulation; the same ones in every sweep.

    Examples
    --------
    >>> sum(is_checked(Workload(512, width)) for width in range(512, 1512))
    92
    """
    return zlib.crc32(repr((SEED, workload)).encode()) % 10 == 0
