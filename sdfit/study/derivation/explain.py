"""Explain one workload: what is on the card at the peak, tensor by tensor.

One run of the tracer with every step, slice and tile, watched. What is listed at the peak (weights, live tensors,
kernel workspaces) adds up to it to the byte.

What it does not know: memory inside kernels, unless the tracer is given workspaces; and it is a simulation, so it says
where the memory goes, and a measured model says how much there is of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sdfit.backends.trace.observe import LiveTensor, observed
from sdfit.backends.trace.tracer import Tracer, Workspace
from sdfit.equation.stages import STAGES, resident
from sdfit.predict.simulation.workspaces import Workspaces
from sdfit.study.derivation.closed_form import Derivation, tensor_lines
from sdfit.units import format_bytes
from sdfit.workload import Workload, variant_name


@dataclass(frozen=True, slots=True)
class Component:
    """A part of the pipeline with weights: how many, their bytes, and whether they are on the card at the peak."""

    name: str
    parameters: int
    size_bytes: int
    resident: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """Where the memory of one workload goes. All amounts in bytes.

    Parameters
    ----------
    workload : Workload
    components : tuple of Component
    stage_peaks : dict of str to int
        In the order in which the stages run.
    stage, path, operation : str
        Where the peak is: the stage, the module and the aten operation in it.
    peak_bytes : int
    tensors : tuple of LiveTensor
        What is live at the peak besides the weights.
    workspace_bytes : int
        What the kernel of that operation holds while it runs, as far as the tracer was told.
    standing_bytes : int
        What the libraries hold all the time (cuBLAS), as far as the tracer was told.
    terms_bytes : dict of str to float, optional
        The terms of an equation at this workload.
    terms_of : str, optional
        Whose they are, if not the closed form's.
    formula : str, optional
        That equation, if it is a closed form.
    history : tuple of (str, int)
        Stage and live bytes at every operation, in order.
    peak_index : int
        The peak's place in the history.
    kernels : str
        Whose kernel workspaces are in it; empty: none, so a card takes more.
    """

    workload: Workload
    components: tuple[Component, ...]
    stage_peaks: dict[str, int]
    stage: str
    path: str
    operation: str
    peak_bytes: int
    tensors: tuple[LiveTensor, ...]
    workspace_bytes: int
    standing_bytes: int
    terms_bytes: dict[str, float] | None = None
    terms_of: str | None = None
    formula: str | None = None
    history: tuple[tuple[str, int], ...] = field(default=(), repr=False)
    peak_index: int = 0
    kernels: str = ""

    @property
    def made_by(self) -> str:
        """How the peak came about, in words."""
        return f"simulated, kernels of {self.kernels}" if self.kernels else "simulated without kernel workspaces"

    @property
    def weights_bytes(self) -> int:
        """The weights that are on the card at the peak, as the allocator counts them."""
        return sum(component.size_bytes for component in self.components if component.resident)

    @property
    def tensors_bytes(self) -> int:
        """The live tensors together."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def accounted_bytes(self) -> int:
        """Weights, live tensors and workspaces together; equal to ``peak_bytes``."""
        return self.weights_bytes + self.tensors_bytes + self.workspace_bytes + self.standing_bytes

    def to_dict(self) -> dict[str, Any]:
        """Everything but the history as plain values for JSON, amounts in bytes."""
        return {
            "workload": self.workload.to_dict(),
            "simulated": True,
            "kernels": self.kernels or None,
            "components": [asdict(component) for component in self.components],
            "stage_peaks_bytes": self.stage_peaks,
            "peak": {
                "stage": self.stage,
                "module": self.path,
                "operation": self.operation,
                "peak_bytes": self.peak_bytes,
                "weights_bytes": self.weights_bytes,
                "tensors_bytes": self.tensors_bytes,
                "workspace_bytes": self.workspace_bytes,
                "standing_bytes": self.standing_bytes,
                "tensors": [asdict(tensor) for tensor in self.tensors],
            },
            "formula": self.formula,
            "terms_of": self.terms_of,
            "terms_bytes": self.terms_bytes,
        }

    def to_text(self, *, tensors: int = 12) -> str:
        """The explanation for a terminal; of the live tensors the ``tensors`` largest."""
        w = self.workload
        lines = [
            f"{w.effective_height}x{w.effective_width}, batch {w.batch_size}, {w.prompt_length} tokens, guidance "
            f"{w.guidance_scale:g}, {variant_name(w.variant)}: {format_bytes(self.peak_bytes)} ({self.made_by})",
            "",
            "components",
        ]
        for c in self.components:
            note = "" if c.resident else "  not on the card at the peak"
            lines.append(f"  {c.name:16} {c.parameters:>13,} parameters  {format_bytes(c.size_bytes):>11}{note}")
        lines += ["", "stages"]
        for stage, peak in self.stage_peaks.items():
            lines.append(f"  {stage:20} {format_bytes(peak):>11}{'  <- the peak' if stage == self.stage else ''}")
        lines += [
            "",
            f"at the peak: {self.operation} in {self.path}",
            f"  {format_bytes(self.weights_bytes):>11}  weights",
        ]
        if self.standing_bytes:
            lines.append(
                f"  {format_bytes(self.standing_bytes):>11}  held all the time: by libraries, and as the allocator's remainders"
            )
        if self.workspace_bytes:
            lines.append(f"  {format_bytes(self.workspace_bytes):>11}  workspace of the kernel")
        lines += [f"  {line}" for line in tensor_lines(tuple(asdict(t) for t in self.tensors), tensors)]
        lines.append(f"  {format_bytes(self.accounted_bytes):>11}  together: {self.accounted_bytes:,} bytes")
        if self.terms_bytes is not None:
            whose = f" of {self.terms_of}" if self.terms_of else ""
            lines += ["", f"terms{whose}" + (f": {self.formula}" if self.formula else "")]
            lines += [f"  {name:10} {format_bytes(amount):>11}" for name, amount in self.terms_bytes.items()]
        return "\n".join(lines)


def explain(
    workload: Workload,
    *,
    tracer: Tracer | None = None,
    equation: Derivation | Mapping[str, float] | None = None,
    terms_of: str | None = None,
) -> Explanation:
    """Explain where the memory of a workload goes.

    Parameters
    ----------
    workload : Workload
    tracer : Tracer, optional
        One with ``workspace`` lists kernel workspaces as a part of their own. By default a bare one.
    equation : Derivation or mapping of str to float, optional
        What to take the terms from: the closed form of `sdfit.study.derivation.derive`, or terms in bytes that are worked
        out already (a fitted model's breakdown). None leaves them out.
    terms_of : str, optional
        Whose terms those of a mapping are.

    Returns
    -------
    Explanation

    Raises
    ------
    FitError
        If the closed form is of another variant.

    Examples
    --------
    >>> e = explain(Workload(512, 512, safety_checker=False))  # doctest: +SKIP
    >>> e.operation, e.accounted_bytes == e.peak_bytes  # doctest: +SKIP
    ('silu', True)
    """
    tracer = tracer or Tracer()
    traced, observer = observed(tracer, workload, full=True, tensors=True)
    peak = observer.peaks["run"]
    terms: Mapping[str, float] | None
    terms, formula = None, None
    if isinstance(equation, Derivation):
        polynomial = equation.binding(workload)
        terms, formula = polynomial.terms_bytes(workload), polynomial.formula()
    elif equation is not None:
        terms = equation
    on_card = resident(peak.name.stage, workload.offload)
    pipe = tracer.pipeline(workload)
    components = tuple(
        Component(name, sum(p.numel() for p in getattr(pipe, name).parameters()), size, name in on_card)
        for name, size in traced.component_bytes.items()
    )
    history = tuple(
        (name.stage, live) for one in observer.passes for name, live in zip(one.names, one.live_bytes, strict=True)
    )
    return Explanation(
        workload,
        components,
        {stage: traced.stage_peaks[stage] for stage in STAGES if stage in traced.stage_peaks},
        peak.name.stage,
        peak.name.path,
        peak.name.operation,
        peak.live_bytes,
        peak.tensors,
        peak.workspace_bytes,
        traced.standing_bytes,
        None if terms is None else dict(terms),
        terms_of,
        formula,
        history,
        peak.ordinal,
        _kernels(tracer.workspace),
    )


def _kernels(workspace: Workspace | None) -> str:
    return workspace.architecture.name if isinstance(workspace, Workspaces) else "a table of its own" * bool(workspace)
