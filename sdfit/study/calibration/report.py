"""Calibrations of a card, its new workspace table, and how the trace does with it: as text, and as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sdfit.backends.trace.tracer import Tracer
from sdfit.predict.simulation.replay import replay
from sdfit.predict.simulation.shapes import Shapes
from sdfit.predict.simulation.workspaces import Architecture, Measured, Workspaces
from sdfit.study.calibration.calibrate import CONVOLUTIONS, PRODUCTS
from sdfit.study.calibration.calibration import Calibration, Kernel
from sdfit.study.calibration.operations import TracedRun
from sdfit.study.calibration.rules import Form, architecture_of, explained, followed, predicted
from sdfit.units import aligned, format_bytes, percent
from sdfit.workload import variant_name

MOST_LINES = 16
"""Kernels, and partings, that the text lists; all are in the plain values."""


@dataclass(frozen=True)
class Beside:
    """One run: the most that was live in each stage, and reserved, on the card and in the trace [bytes].

    ``before`` is a trace with the kernels known so far, ``after`` one with the new table.
    """

    card: dict[str, int]
    before: dict[str, int]
    after: dict[str, int]
    reserved: tuple[int, int, int]


@dataclass(frozen=True)
class Report:
    """What the recorded runs of a card tell together.

    Attributes
    ----------
    calibrations : tuple of Calibration
    besides : tuple of Beside
        One for each.
    architecture : Architecture
        The new table.
    base : Architecture, optional
        The kernels known so far.
    word : str
        What the snapshots' own numbers are: measured, recorded (by others) or simulated.
    """

    calibrations: tuple[Calibration, ...]
    besides: tuple[Beside, ...]
    architecture: Architecture
    base: Architecture | None
    word: str

    def kernels(self) -> dict[Shapes, Kernel]:
        """Every kernel once, with the most that it held in any run."""
        found: dict[Shapes, Kernel] = {}
        for calibration in self.calibrations:
            for kernel in calibration.kernels:
                known = found.get(kernel.shapes)
                if known is None or kernel.held_bytes > known.held_bytes:
                    found[kernel.shapes] = kernel
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, amounts in bytes."""
        return {
            "card": self.architecture.name,
            "source": self.word,
            "runs": [
                {
                    "workload": c.workload.to_dict(),
                    "allocations_found": c.found,
                    "allocations_traced": c.of,
                    "frames": c.frames,
                    "allocations_placed_as_modelled": list(c.placed),
                    "failed_requests": c.failures,
                    "weights_bytes": c.weights_bytes,
                    "unsplit_bytes": c.unsplit_bytes,
                    "cublas_bytes": c.cublas_bytes,
                    "standing": [s._asdict() for s in c.standing],
                    "stage_peaks_bytes": {"card": b.card, "trace_before": b.before, "trace_after": b.after},
                    "reserved_bytes": dict(zip(("card", "trace_before", "trace_after"), b.reserved, strict=True)),
                    "segments": {str(size): count for size, count in c.segments.items()},
                    "kernels": [
                        {**k._asdict(), "shapes": k.shapes._asdict(), "table_bytes": self._says(k)} for k in c.kernels
                    ],
                    "partings": [p._asdict() for p in c.partings],
                }
                for c, b in zip(self.calibrations, self.besides, strict=True)
            ],
            "table": {
                "name": self.architecture.name,
                "cublas_bytes": self.architecture.cublas_bytes,
                "products": dict(self.architecture.products),
                "rules": [asdict(rule) for rule in self.architecture.rules],
                "measured": len(self.architecture.measured),
                "given_by_rules": followed(self.architecture)[0],
            },
        }

    def _says(self, kernel: Kernel) -> int | None:
        return None if self.base is None else predicted(self.base, kernel.shapes)

    def to_text(self) -> str:
        """For a terminal: runs, kernels, the table, partings."""
        lines: list[str] = []
        for calibration, beside in zip(self.calibrations, self.besides, strict=True):
            lines += [*self._run_lines(calibration, beside), ""]
        lines += [*self._kernel_lines(), "", *self._table_lines(), *self._parting_lines()]
        return "\n".join(lines)

    def _run_lines(self, c: Calibration, b: Beside) -> list[str]:
        w = c.workload
        how = "frames, sizes and order" if c.frames else "sizes and order; no frames were recorded"
        lines = [
            f"{w.effective_height}x{w.effective_width}, batch {w.batch_size}, guidance {w.guidance_scale:g}, "
            f"{variant_name(w.variant)}, on {c.card} ({self.word})",
            f"  {c.found:,} of the trace's {c.of:,} allocations found, by {how}",
            f"  weights {c.weights_bytes:,} B, {c.unsplit_bytes:,} B of blocks not split",
        ]
        lines += [f"  stays beside them: {s.blocks} block(s), {s.counted_bytes:,} B, {s.what}" for s in c.standing]
        if c.failures:
            lines.append(f"  {c.failures} request(s) found no memory: kernels may have taken smaller plans than usual")
        known = f"trace as {self.base.name}" if self.base else "bare trace"
        rows = [("  live at most", self.word, known, "", "with this table", "")]
        for stage, peak in b.card.items():
            before, after = b.before.get(stage, 0), b.after.get(stage, 0)
            rows.append((f"  {stage}", _full(peak), _full(before), _off(before, peak), _full(after), _off(after, peak)))
        card, before, after = b.reserved
        rows.append(("  reserved", _full(card), _full(before), _off(before, card), _full(after), _off(after, card)))
        lines += aligned(rows).split("\n")
        sizes = sorted(c.segments.items(), reverse=True)
        shown = ", ".join(f"{count} x {format_bytes(size)}" for size, count in sizes[:6])
        rest = sum(count for _, count in sizes[6:])
        lines.append(f"  segments at the end: {shown}" + (f", and {rest} smaller" if rest else ""))
        equal, of = c.placed
        return lines + (
            [f"  {equal:,} of {of:,} allocations lie where the model of the allocator puts them"] if of else []
        )

    def _kernel_lines(self) -> list[str]:
        kernels = sorted(self.kernels().values(), key=lambda k: (-k.held_bytes, k.shapes))
        holding = [k for k in kernels if k.held_bytes]
        forms = explained(Measured(k.shapes, k.held_bytes) for k in kernels)
        says = f"{self.base.name} says" if self.base else "known so far"
        rows = [("kernel", "operands", "dtype", "holds", says, "which is")]
        for k in holding[:MOST_LINES]:
            base = self._says(k)
            rows.append((k.shapes.operation, _operands(k.shapes), k.shapes.dtype, _full(k.held_bytes),
                         "-" if base is None else _full(base), _words(k, forms)))  # fmt: skip
        lines = aligned(rows, left=3).split("\n")
        rest = len(holding) - MOST_LINES
        if rest > 0:
            lines.append(f"and {rest} more that hold something; --json lists all")
        kinds = (("convolutions", CONVOLUTIONS), ("matrix products", PRODUCTS))
        return lines + [
            f"{len(these)} different {name}: {sum(k.held_bytes > 0 for k in these)} hold something"
            + (f", {differ} not always the same" if (differ := sum(not k.always for k in these)) else "")
            for name, operations in kinds
            if (these := [k for k in kernels if k.shapes.operation in operations])
        ]

    def _table_lines(self) -> list[str]:
        right, of = followed(self.architecture)
        lines = [
            f"table '{self.architecture.name}': cuBLAS keeps {self.architecture.cublas_bytes:,} B; "
            f"{len(self.architecture.rules)} rules give {right} of {of} measured convolutions to the byte"
            + (", the others stand by their shapes" if right < of else "")
        ]
        return lines + [f"  {operation} holds {held:,} B" for operation, held in self.architecture.products if held]

    def _parting_lines(self) -> list[str]:
        found = sorted(
            {p[:3]: p for c in self.calibrations for p in c.partings}.values(), key=lambda p: -p.largest_bytes
        )
        if not found:
            return ["card and trace part nowhere else"]
        rows = [("where else they part", "operation", "place", "times", "at most")]
        rows += [(f"only the {p.whose} has", p.operation, p.place, str(p.times), _full(p.largest_bytes))
                 for p in found[:MOST_LINES]]  # fmt: skip
        rest = len(found) - MOST_LINES
        return ["", *aligned(rows, left=3).split("\n"), *([f"and {rest} more; --json lists all"] if rest > 0 else [])]


def report(
    calibrations: Sequence[tuple[Calibration, TracedRun]],
    *,
    name: str,
    base: Architecture | None,
    evidence: str,
    tracer: Tracer | None = None,
    word: str = "recorded",
) -> Report:
    """Make the table of some calibrations and set the trace with it beside them.

    Parameters
    ----------
    calibrations : sequence of (Calibration, TracedRun)
        Of one card.
    name : str
        The card.
    base : Architecture, optional
        The kernels known so far: for dtypes that did not run, and for comparison.
    evidence : str
        What the new rules rest on, in words.
    tracer : Tracer, optional
        Whose settings the traces take; for tests.
    word : str
        See `Report`.
    """
    tracer = tracer or Tracer()
    found = [c for c, _ in calibrations]
    most: dict[Shapes, int] = {}
    for kernel in (k for c in found for k in c.kernels):
        most[kernel.shapes] = max(kernel.held_bytes, most.get(kernel.shapes, 0))
    cublas = max(c.cublas_bytes for c in found) or (base.cublas_bytes if base else 0)
    measured = [Measured(*row) for row in most.items()]
    table = architecture_of(measured, name=name, cublas_bytes=cublas, evidence=evidence, base=base)
    besides = []
    for c in found:
        peaks, reserved = [], []
        for architecture in (base, table):
            workspaces = Workspaces(architecture) if architecture is not None else None
            traced = _like(tracer, workspaces).run(c.workload, keep_events=True)
            assert traced.events is not None
            peaks.append(traced.stage_peaks)
            reserved.append(replay(traced.events).reserved_bytes)
        besides.append(Beside(c.card_peaks, peaks[0], peaks[1], (c.reserved_bytes, reserved[0], reserved[1])))
    return Report(tuple(found), tuple(besides), table, base, word)


def _like(tracer: Tracer, workspaces: Workspaces | None) -> Tracer:
    return Tracer(workspaces, num_inference_steps=tracer.num_inference_steps, settings=tracer.settings)


def _operands(shapes: Shapes) -> str:
    return " ".join("x".join(map(str, shape)) for shape in (shapes.inputs or (shapes.out,)) if len(shape) > 1)


def _words(kernel: Kernel, forms: dict[Shapes, Form | None]) -> str:
    """What a workspace is made of, in words."""
    form = forms.get(kernel.shapes)
    if form is None:
        asked = " + ".join(f"{size:,}" for size in kernel.requested[:4]) + (
            " + ..." if len(kernel.requested) > 4 else ""
        )
        return f"asked for {asked} B"
    wide = " in float32" if form.element_bytes == 4 else ""
    pad = f" + {form.pad_bytes} B" if form.pad_bytes and form.copies != ("winograd",) else ""
    return " + ".join(form.copies) + wide + pad


def _full(amount_bytes: int) -> str:
    return f"{amount_bytes:,} B"


def _off(traced: int, card: int) -> str:
    return "to the byte" if traced == card else percent(traced / card - 1) if card else ""
