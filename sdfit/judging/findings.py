"""What a check says: a finding, and the verdict that they make together.

Nothing is decided here. `sdfit.judging.judge` looks at rows, `sdfit.judging.checks` at equations and at runs that failed; both report in
these words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sdfit.records import Record
from sdfit.workload import variant_name

SEVERITIES = ("error", "warning", "note")
KINDS = (
    "environment",
    "order",
    "physics",
    "others",
    "outlier",
    "term",
    "regime",
    "sign",
    "monotone",
    "duplicate",
    "censored",
    "held out",
    "too few",
)
GRAVE = 0.05
"""A row, or a held-out resolution, that is off by more than this share is an error; below it, a warning."""
DUPLICATES = 0.001
"""Two peaks of one workload disagree if they differ by more than this share; the counters are deterministic."""
MOST_NAMED = 0.25
"""If a larger share of a stage's rows is far off, the equation is wrong there and the rows are not."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the data or the equation has to answer for.

    Parameters
    ----------
    severity : {'error', 'warning', 'note'}
    kind : str
        One of `KINDS`.
    where : str
        The stage and its fields, a variant, or ``table``.
    row : str or None
        The row that it is about.
    off : float or None
        How far: what was measured over what the other rows say, minus one.
    message : str
    """

    severity: str
    kind: str
    where: str
    row: str | None
    off: float | None
    message: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A resolution, predicted by fits that never saw it.

    Parameters
    ----------
    resolution : str
    rows : int
    worst : float
        Signed relative error of the run's peak, the one largest in size.
    edge : bool
        Whether no other resolution is smaller, or none larger: then it was an extrapolation.
    """

    resolution: str
    rows: int
    worst: float
    edge: bool


@dataclass(frozen=True, slots=True)
class Verdict(Sequence[Finding]):
    """What `judge` found, gravest first; a sequence of its findings.

    Parameters
    ----------
    findings : tuple of Finding
    held_out : tuple of HeldOut
    coef : dict
        For a plain table: term -> coefficient [bytes per unit of the term], fitted without the rows that were named.
    """

    findings: tuple[Finding, ...]
    held_out: tuple[HeldOut, ...] = ()
    coef: Mapping[str, float] | None = None

    def __len__(self) -> int:
        return len(self.findings)

    def __getitem__(self, index: Any) -> Any:
        return self.findings[index]

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    @property
    def sound(self) -> bool:
        """Whether nothing graver than a note was found."""
        return all(finding.severity == "note" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; errors as fractions."""
        return {
            "sound": self.sound,
            "findings": [finding.to_dict() for finding in self.findings],
            "held_out": [asdict(line) for line in self.held_out],
            "coef": dict(self.coef) if self.coef is not None else None,
        }

    def table(self) -> str:
        """One line per finding."""
        lines = [f"{f.severity:<7}  {f.kind:<9}  {f.where}: {f.message}" for f in self.findings]
        return "\n".join(lines) or "nothing to report"


def verdict(findings: Sequence[Finding], **more: Any) -> Verdict:
    """Put findings in order: errors before warnings before notes, the furthest off first."""
    order = sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), KINDS.index(f.kind), -abs(f.off or 0.0)))
    return Verdict(tuple(order), **more)


def label(record: Record) -> str:
    """Name a record's row: its index and its workload.

    Examples
    --------
    >>> from sdfit.workload import Workload
    >>> label(Record(3, Workload(512, 768, batch_size=2), "crash"))
    'row 3 (512x768 x2 float16 sdpa)'
    """
    w = record.workload
    batch = f" x{w.batch_size}" if w.batch_size > 1 else ""
    more = [f" {w.tokens} tokens"] if w.prompt_length > 77 else []
    more += [" no guidance"] if not w.guided else []
    return f"row {record.index} ({w.height}x{w.width}{batch} {variant_name(w.variant)}{''.join(more)})"
