"""An evaluation as aligned text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdfit.units import format_bytes

if TYPE_CHECKING:
    from sdfit.judging.evaluate import Evaluation, Line

HEAD = (
    "metric",
    "by",
    "",
    "rows",
    "median",
    "95 %",
    "worst",
    "bias",
    "inside",
    "half-width",
    "above bound",
    "over-reserves",
)


def text(evaluation: Evaluation) -> str:
    """Write the lines, then stages, runs out of memory and rows passed over."""
    parts = [
        f"{evaluation.artifact} ({evaluation.provenance}) against {evaluation.source} records; intervals at {evaluation.level:g}, "
        "bounds at 0.99"
    ]
    if evaluation.lines:
        parts.append(aligned([HEAD, *(_cells(line) for line in evaluation.lines)]))
    if evaluation.stages:
        rows = [("stage's own peak", "rows", "median", "worst")]
        rows += [
            (s.stage, str(s.rows), _percent(s.median_error), _percent(s.worst_error, sign=True))
            for s in evaluation.stages
        ]
        parts.append(aligned(rows, left=1))
    if evaluation.oom:
        said, bound = (sum(getattr(p, name) for p in evaluation.oom) for name in ("said_so", "upper_said_so"))
        parts.append(
            f"out of memory: {len(evaluation.oom)} runs; the estimate lies above the cap for {said}, the bound for {bound}"
        )
    parts += [f"passed over: {count} rows, {reason}" for reason, count in evaluation.skipped.items()]
    return "\n\n".join(parts)


def aligned(rows: Sequence[Sequence[str]], left: int = 3) -> str:
    """Columns of text, the first few flush left, the others flush right.

    Examples
    --------
    >>> print(aligned([("a", "rows"), ("bcd", "7")], left=1))
    a    rows
    bcd     7
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _percent(fraction: float | None, sign: bool = False) -> str:
    if fraction is None:
        return "-"
    digits = 3 if abs(fraction) < 0.001 else 2 if abs(fraction) < 0.1 else 1
    return f"{100 * fraction:{'+' if sign else ''}.{digits}f} %"


def _share(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def _cells(line: Line) -> tuple[str, ...]:
    over = "unbounded" if line.upper_unbounded else "-"
    if line.over_reserved is not None and line.over_reserved_bytes is not None:
        over = f"{_percent(line.over_reserved)} = {format_bytes(line.over_reserved_bytes)}"
    width = "unbounded" if line.width is None and line.unbounded else _percent(line.width)
    return (
        line.metric,
        line.group,
        "" if line.name == "all" else line.name,
        str(line.rows),
        _percent(line.median_error),
        _percent(line.p95_error),
        _percent(line.worst_error, sign=True),
        _percent(line.bias, sign=True),
        _share(line.coverage),
        width,
        _share(line.above_upper),
        over,
    )
