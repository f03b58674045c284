"""How well other systems, and sdfit, predict a list of runs whose peaks are known.

Three questions to each system: how far off is it, how often would a run have died if its number had been the cap, and
how much does it set aside for nothing when the run lives. `compare` takes any cases; `sdfit.study.comparison.cases` makes
them from published rows and from records. Every case counts alike: a workload that was measured five times counts five times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from sdfit.errors import RecordsError, UnknownModel
from sdfit.fit.folds import error_summary
from sdfit.study.comparison.cases import Case
from sdfit.study.comparison.peers import PEERS, Peer, peer
from sdfit.units import aligned, format_bytes

OWN = {"sdfit": "sdfit", "sdfit_upper": "sdfit, upper bound"}
"""What a case may carry itself, by name, and how it is printed."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one system says of one case."""

    system: str
    label: str
    predicted_bytes: int
    actual_bytes: int

    @property
    def error(self) -> float:
        """Signed relative error: predicted / actual - 1."""
        return self.predicted_bytes / self.actual_bytes - 1

    @property
    def out_of_memory(self) -> bool:
        """Whether the run would have run out of memory with the prediction as its cap."""
        return self.predicted_bytes < self.actual_bytes


@dataclass(frozen=True, slots=True)
class Summary:
    """One system over the cases that all have a formula for.

    Parameters
    ----------
    system, title : str
    cases : int
        Cases it was asked about.
    skipped : int
        Cases left out, because some system has no formula for them.
    median_error, median_absolute_error, worst_error : float
        Relative to the actual peak; ``worst_error`` is the one largest in size, with its sign.
    worst_label : str
        The case it belongs to.
    out_of_memory : int
        Cases with a prediction below the peak.
    over_reserved, over_reserved_bytes : float or None
        Mean of (predicted - actual), relative and in bytes, over the other cases; None if there are none.
    """

    system: str
    title: str
    cases: int
    skipped: int
    median_error: float
    median_absolute_error: float
    worst_error: float
    worst_label: str
    out_of_memory: int
    over_reserved: float | None
    over_reserved_bytes: int | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The answer of `compare`: the cases, a row per system and case, a summary per system.

    Parameters
    ----------
    cases, rows, summary : tuple
        Every system is summed up over the same cases.
    common : tuple of str
        The labels of those: the cases for which all systems of the summary have a formula.
    few : dict
        Systems that have a formula for less than half of the cases, and for how many: they are not summed up.
    source : str
        What the truth is: ``published``, ``measured``, ``simulated``, or ``given``.
    """

    cases: tuple[Case, ...]
    rows: tuple[Row, ...]
    summary: tuple[Summary, ...]
    common: tuple[str, ...]
    few: dict[str, int]
    source: str = "given"

    @property
    def heading(self) -> str:
        """What was compared with what."""
        return f"{len(self.common)} of {len(self.cases)} cases, for which all of these have a formula; truth: {TRUTHS[self.source]}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values: amounts in bytes, errors as fractions."""
        return {
            "cases": [asdict(case) for case in self.cases],
            "summary": [asdict(line) for line in self.summary],
            "common": list(self.common),
            "few": self.few,
            "source": self.source,
            "rows": [asdict(row) | {"error": row.error, "out_of_memory": row.out_of_memory} for row in self.rows],
        }

    def table(self) -> str:
        """The summaries as aligned text, one line per system."""
        head = ("system", "cases", "median", "median |error|", "worst", "at", "out of memory", "over-reserves")
        lines = [self.heading, aligned([head, *(_cells(line) for line in self.summary)])]
        lines += [f"left out: {title}, with a formula for {count} of the cases" for title, count in self.few.items()]
        lines.append(
            "out of memory: runs that need more than the prediction; over-reserves: the mean of what the others would not have used"
        )
        return "\n".join(lines)

    def cases_table(self) -> str:
        """Every case as aligned text: its peak, then what each system says, relative to it."""
        systems = list(dict.fromkeys(row.system for row in self.rows))
        said = {(row.label, row.system): row for row in self.rows}
        lines = [("case", "actual", *systems)]
        for case in self.cases:
            found = (said.get((case.label, system)) for system in systems)
            errors = (_percent(row.error) if row else "-" for row in found)
            lines.append((case.label, format_bytes(case.actual_bytes), *errors))
        return aligned(lines)


def compare(cases: Iterable[Case], systems: Sequence[str | Peer] | None = None, *, source: str = "given") -> Comparison:
    """Ask each system about each case.

    Parameters
    ----------
    cases : iterable of Case
    systems : sequence of str or Peer, optional
        Names from `sdfit.study.comparison.peers.PEERS`, ``sdfit`` or ``sdfit_upper``, or peers of your own; by default sdfit, where the
        cases carry its estimates, and all of `PEERS`.

    Returns
    -------
    Comparison
        A system without a formula for any of the cases is left out.

    Raises
    ------
    RecordsError
        If there is no case, or two have one label, or no system has a formula for any.
    UnknownModel
        If a system is not known.

    Examples
    --------
    >>> from sdfit.workload import Workload
    >>> case = Case("512x512", Workload(512, 512), 3_294_239_916, predicted_bytes=3_300_000_000)
    >>> print(compare([case], ["sdfit", "accelerate"]).table())
    1 of 1 cases, for which all of these have a formula; truth: as given
    system            cases  median  median |error|   worst       at  out of memory        over-reserves
    sdfit                 1  +0.2 %           0.2 %  +0.2 %  512x512            0/1  0.2 % =     5.5 MiB
    accelerate x 1.2      1  -0.2 %           0.2 %  -0.2 %  512x512            1/1                    -
    out of memory: runs that need more than the prediction; over-reserves: the mean of what the others would not have used
    """
    cases = list(cases)
    _check(cases)
    answers: dict[str, list[Row]] = {}
    for name, title, predict in _asked(cases, systems):
        said = [(case, predict(case)) for case in cases]
        found = [Row(name, case.label, value, case.actual_bytes) for case, value in said if value is not None]
        if found:
            answers[title] = found
    if not answers:
        raise RecordsError(f"none of the systems asked has a formula for any of the {len(cases)} cases; ask others")
    most = max(len(found) for found in answers.values())
    few = {title: len(found) for title, found in answers.items() if 2 * len(found) < most}
    many = {title: found for title, found in answers.items() if title not in few}
    common = [c.label for c in cases if all(any(row.label == c.label for row in found) for found in many.values())]
    if not common:
        raise RecordsError("no case is one that all of the systems asked have a formula for; ask fewer of them")
    same = {title: [row for row in found if row.label in set(common)] for title, found in many.items()}
    rows = tuple(row for found in answers.values() for row in found)
    summary = tuple(_summarise(title, found, len(cases)) for title, found in same.items())
    return Comparison(tuple(cases), rows, summary, tuple(common), few, source)


TRUTHS = {
    "published": "published measurements",
    "measured": "measured records",
    "simulated": "records that are SIMULATED (a trace): nobody measured them",
    "given": "as given",
}
"""What each source of the truth is called."""


_Predict = Callable[[Case], int | None]


def _asked(cases: list[Case], systems: Sequence[str | Peer] | None) -> list[tuple[str, str, _Predict]]:
    """Name, title and prediction of each system; a prediction is None where the system has no formula."""
    chosen: Sequence[str | Peer] = [*OWN, *PEERS] if systems is None else systems
    asked: list[tuple[str, str, _Predict]] = []
    for system in chosen:
        if isinstance(system, str) and system in OWN:
            asked.append((system, OWN[system], _own(system)))
            continue
        try:
            one = peer(system) if isinstance(system, str) else system
        except UnknownModel as error:
            raise UnknownModel(f"{error}; sdfit and sdfit_upper are known too", given=system) from None
        asked.append((one.name, one.title, _of(one)))
    return asked


def _own(system: str) -> _Predict:
    return lambda case: case.predicted_bytes if system == "sdfit" else case.upper_bytes


def _of(one: Peer) -> _Predict:
    return lambda case: one.predict(case.workload) if one.applies(case.workload) else None


def _check(cases: list[Case]) -> None:
    if not cases:
        raise RecordsError("there is no case to compare on; give records of successful runs, or the published rows")
    seen: set[str] = set()
    for case in cases:
        if case.label in seen:
            raise RecordsError(f"two cases are named '{case.label}'; give each run its own label", given=case.label)
        seen.add(case.label)


def _summarise(title: str, found: list[Row], cases: int) -> Summary:
    errors = error_summary([row.error for row in found])
    worst = found[errors.worst_at]
    lived = [row for row in found if not row.out_of_memory]
    return Summary(
        system=found[0].system,
        title=title,
        cases=len(found),
        skipped=cases - len(found),
        median_error=errors.bias,
        median_absolute_error=errors.median,
        worst_error=worst.error,
        worst_label=worst.label,
        out_of_memory=len(found) - len(lived),
        over_reserved=fmean(row.error for row in lived) if lived else None,
        over_reserved_bytes=round(fmean(row.predicted_bytes - row.actual_bytes for row in lived)) if lived else None,
    )


def _percent(fraction: float) -> str:
    return f"{100 * fraction:+.1f} %"


def _cells(line: Summary) -> tuple[str, ...]:
    over = "-"
    if line.over_reserved is not None and line.over_reserved_bytes is not None:
        over = f"{100 * line.over_reserved:.1f} % = {format_bytes(line.over_reserved_bytes):>11}"
    return (
        line.title,
        str(line.cases),
        _percent(line.median_error),
        f"{100 * line.median_absolute_error:.1f} %",
        _percent(line.worst_error),
        line.worst_label,
        f"{line.out_of_memory}/{line.cases}",
        over,
    )
