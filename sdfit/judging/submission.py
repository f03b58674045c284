"""Whether somebody's records can become a shipped card's: what a reviewer would look at, as findings.

Six things: the *environment* says what the numbers depend on; the rows stand in the *order* of their grid; *duplicates*
agree; the amounts are *physically* possible; *others* had no memory on the card; and the rows agree with each other and with the model of the card's kernels. The
last two rest on `sdfit.judging.judge` and its checks.

What it does not know: whether the records were made up; nothing tells of that but another's measurement. Other programs
on the card show in the driver's count: before the sweep (``idle_bytes``) and, where rows have it, during each run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sdfit.equation.stages import COMPONENTS, STAGES
from sdfit.equation.weights import component_bytes
from sdfit.errors import GridError, UnknownVariant, listed
from sdfit.fit.priors import model_of_kernels
from sdfit.judging.findings import Finding, Verdict, label, verdict
from sdfit.judging.judge import judge
from sdfit.predict.cards import card_slug, table
from sdfit.predict.predictor import Predictor
from sdfit.records import RECORDS, Record, RecordsFile, latest, read_rows
from sdfit.sweep import grid
from sdfit.units import GIB, format_bytes
from sdfit.workload import variant_name

NEEDED = (
    "gpu", "name", "compute_capability", "total_memory_bytes", "driver", "cuda", "cudnn", "torch", "diffusers", "transformers",
    "grid", "grid_sha256", "seed", "num_inference_steps",
)  # fmt: skip
"""Facts that a card's records must state."""
IDLE_BYTES = 1 * GIB
"""So much in use before the first run is another program's, not the driver's."""
WEIGHTS = 0.01
"""By which share the weights may differ from those of Stable Diffusion v1.5: rounding and buffers."""
SLACK_BYTES = 64 << 20
"""By which one counter may exceed another that holds it: they are read one after the other."""
FAR = 0.5
"""A run this far from the model of the card's kernels is likelier a mistake than a kernel."""
MOST_SHOWN = 12
"""Findings that are printed, the gravest first; every error is."""
MOST_NAMED = 5
"""Rows of one kind that are named; the others are counted."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found of a file."""

    path: Path
    environment: dict[str, Any]
    rows: int
    verdict: Verdict

    @property
    def accepted(self) -> bool:
        """Whether nothing is an error."""
        return all(finding.severity != "error" for finding in self.verdict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "file": str(self.path),
            "accepted": self.accepted,
            "rows": self.rows,
            "card": self.environment.get("name"),
            "backend": self.environment.get("backend"),
            "findings": [finding.to_dict() for finding in self.verdict],
        }

    def text(self) -> str:
        """Lines: what it is, the findings, the answer."""
        env = self.environment
        head = f"{self.path}: {self.rows} rows of {env.get('gpu') or 'no card'}, backend {env.get('backend')}, grid {env.get('grid')}"
        errors = sum(finding.severity == "error" for finding in self.verdict)
        shown = Verdict(self.verdict.findings[: max(errors, MOST_SHOWN)]).table().splitlines() if self.verdict else []
        more = len(self.verdict) - len(shown)
        end = "can be sent" if self.accepted else f"cannot be sent as it is: {errors} error(s)"
        return "\n".join([head, *shown, *([f"and {more} findings of less weight: --json"] if more else []), end])


def check_submission(path: Path) -> Checked:
    """Check a records file for a pull request.

    Parameters
    ----------
    path : Path
        A file of `sdfit sweep`; ``.jsonl``, or compressed ``.jsonl.gz``.

    Raises
    ------
    RecordsError
        If it cannot be read at all.
    """
    environment, every, notes = read_rows(path, RECORDS)
    rows = list(latest(every).values())
    findings = [Finding("warning", "order", path.name, None, None, words) for words in notes]
    findings += check_environment(environment)
    findings += check_order(environment, every)
    findings += check_physics(rows)
    findings += check_others(rows)
    rows = [r for r in rows if not r.disturbed]
    ok = [r for r in rows if r.outcome == "ok"]
    if ok:
        findings += map(_softened, judge(sorted(rows, key=lambda r: r.index)))
        findings += _beside_model(RecordsFile(environment, ok, []))
    else:
        findings.append(Finding("error", "physics", path.name, None, None, f"none of the {len(rows)} runs succeeded"))
    return Checked(path, environment, len(rows), verdict(findings))


def _softened(finding: Finding) -> Finding:
    """A row that lies off the equation may be the card's own way: that is looked at, and no reason to refuse it."""
    grave = finding.severity == "error" and finding.kind not in ("duplicate", "censored")
    return replace(finding, severity="warning") if grave else finding


def check_environment(environment: Mapping[str, Any]) -> list[Finding]:
    """Name what an environment does not say, or says wrongly of its card.

    Examples
    --------
    >>> [f.message for f in check_environment({"backend": "trace"})]
    ["the backend is 'trace': a simulation, which is no record of a card"]
    """
    backend = environment.get("backend")
    if backend != "cuda":
        words = f"the backend is '{backend}': a simulation, which is no record of a card"
        return [_environment("error", words)]
    missing = [name for name in NEEDED if environment.get(name) in (None, "")]
    found = (
        [_environment("error", f"it does not say {listed(missing)}; sweep again with this sdfit")] if missing else []
    )
    slug = card_slug(str(environment.get("gpu")))
    if environment.get("name") != slug:
        found.append(
            _environment("error", f"its name is '{environment.get('name')}', and the driver's name means '{slug}'")
        )
    cards = [card for card in table() if card.slug == slug]
    known = {card.compute_capability for card in cards}
    if not cards:
        found.append(
            _environment("note", f"'{slug}' is not in the table of cards: add a row to sdfit/predict/cards.csv")
        )
    elif environment.get("compute_capability") not in known:
        words = (
            f"compute capability {environment.get('compute_capability')}, where a {slug} has {listed(sorted(known))}"
        )
        found.append(_environment("error", words))
    total = environment.get("total_memory_bytes") or 0
    if cards and total and not any(0.85 * c.memory_gib * GIB <= total <= 1.02 * c.memory_gib * GIB for c in cards):
        sold = listed(sorted({c.memory_gib for c in cards}))
        found.append(
            _environment("warning", f"{format_bytes(total)} of memory, where a {slug} is sold with {sold} GiB")
        )
    if environment.get("cudnn_benchmark"):
        found.append(
            _environment("error", "cudnn.benchmark was on: plans, and with them workspaces, were searched for")
        )
    if environment.get("allocator_settings"):
        found.append(
            _environment(
                "warning", f"allocator settings '{environment['allocator_settings']}': it cannot pool with others"
            )
        )
    idle = environment.get("idle_bytes")
    if idle is not None and idle > IDLE_BYTES:
        found.append(
            _environment("warning", f"{format_bytes(idle)} were in use before: another program was on the card")
        )
    return found


def _environment(severity: str, words: str) -> Finding:
    return Finding(severity, "environment", "environment", None, None, words)


def check_order(environment: Mapping[str, Any], rows: Sequence[Record]) -> list[Finding]:
    """Name rows that do not stand where their grid has them, and repeats of a row that disagree."""
    found = []
    name = str(environment.get("grid"))
    try:
        plan = grid.load(name)
    except GridError:
        found.append(Finding("warning", "order", name, None, None, f"there is no shipped grid '{name}': send it along"))
    else:
        plan = plan.for_the_trace() if environment.get("backend") == "trace" else plan
        if plan.sha256 != environment.get("grid_sha256"):
            words = f"it was swept with another version of the grid '{name}': the places of its rows cannot be checked"
            found.append(Finding("warning", "order", name, None, None, words))
        else:
            wrong = [r for r in rows if r.index >= len(plan.workloads) or r.workload != plan.workloads[r.index]]
            found += _named(
                wrong, "error", "order", lambda r: f"{label(r)} is not what the grid '{name}' has at that place"
            )
    seen: dict[int, Record] = {}
    for row in rows:
        before = seen.get(row.index)
        if (
            before is not None
            and not (before.disturbed or row.disturbed)
            and before.outcome == row.outcome == "ok"
            and before.allocated_bytes != row.allocated_bytes
        ):
            off = (row.allocated_bytes or 0) / (before.allocated_bytes or 1) - 1
            words = f"{label(row)} ran twice, with {format_bytes(before.allocated_bytes or 0)} and {off:+.2%}"
            found.append(Finding("error", "duplicate", variant_name(row.workload.variant), label(row), off, words))
        seen[row.index] = row
    return found


def check_others(rows: Sequence[Record]) -> list[Finding]:
    """Name rows during which other programs had memory on the card.

    Examples
    --------
    >>> from sdfit.workload import Workload
    >>> row = Record(0, Workload(512, 512), "crash", others_bytes=5 << 30, others_change_bytes=2 << 30)
    >>> check_others([row])[0].message
    'row 0 (512x512 float16 sdpa): 2.000 GiB of another program came or went while it ran; no fit uses it, sweep it again'
    """
    disturbed = [r for r in rows if r.disturbed]
    shared = [r for r in rows if not r.disturbed and (r.others_bytes or 0) > IDLE_BYTES]
    return _named(
        disturbed,
        "warning",
        "others",
        lambda r: (
            f"{label(r)}: {format_bytes(r.others_change_bytes or 0)} of another program came or went while it ran; "
            "no fit uses it, sweep it again"
        ),
    ) + _named(
        shared, "warning", "others", lambda r: f"{label(r)} ran beside {format_bytes(r.others_bytes or 0)} of others"
    )


def check_physics(rows: Sequence[Record]) -> list[Finding]:
    """Name rows whose amounts cannot be: parts larger than their whole, or weights that are not the model's.

    Examples
    --------
    >>> from sdfit.workload import Workload
    >>> row = Record(0, Workload(512, 512), "ok", {"unet": 5 * 10**9}, allocated_bytes=4 * 10**9)
    >>> check_physics([row])[0].message
    'row 0 (512x512 float16 sdpa): its stages reach 4.657 GiB, and the run 3.725 GiB'
    """
    wrong: list[tuple[Record, str]] = []
    for r in rows:
        if r.outcome != "ok":
            continue
        wrong += [(r, words) for words in _impossible(r)]
    messages = {id(r): words for r, words in reversed(wrong)}
    bad = list({id(r): r for r, _ in wrong}.values())
    return _named(bad, "error", "physics", lambda r: f"{label(r)}: {messages[id(r)]}")


def _impossible(r: Record) -> list[str]:
    found = []
    top, allocated = max(r.stage_peaks_bytes.values()), r.allocated_bytes or 0
    if abs(top - allocated) > SLACK_BYTES:
        found.append(f"its stages reach {format_bytes(top)}, and the run {format_bytes(allocated)}")
    for stage in (s for s in STAGES if s in r.stage_peaks_bytes):
        if r.workload.offload == "none" and r.stage_peaks_bytes[stage] < r.weights_bytes(stage):
            found.append(f"less is live in {stage} than the weights take")
            break
    order = [("allocated", allocated), ("reserved", r.reserved_bytes), ("device", r.device_bytes)]
    there = [(name, value) for name, value in order if value is not None]
    for (small, less), (large, more) in pairwise(there):
        if more + SLACK_BYTES < less:
            found.append(f"{large} memory is {format_bytes(more)}, less than {small}, {format_bytes(less)}")
    expected = component_bytes(r.workload)
    for component in (c for c in COMPONENTS if c in r.component_bytes and c in expected):
        off = r.component_bytes[component] / expected[component] - 1
        if abs(off) > WEIGHTS:
            found.append(f"its {component} weighs {off:+.1%} beside Stable Diffusion v1.5's: another model ran")
    return found


def _beside_model(data: RecordsFile) -> list[Finding]:
    """Set runs beside the model of the card's kernels: far from it is a mistake, or news."""
    artifact = model_of_kernels(data.environment)
    if artifact is None:
        return []
    predictor, off = Predictor(artifact), []
    for r in data.records:
        try:
            off.append((r, (r.allocated_bytes or 0) / float(predictor.predict_workload(r.workload)) - 1))
        except UnknownVariant:
            continue
    if not off:
        return []
    far = {r.index: error for r, error in off if abs(error) > FAR}
    found = _named(
        [r for r, _ in off if r.index in far],
        "error",
        "physics",
        lambda r: f"{label(r)} is {far[r.index]:+.0%} beside the model '{artifact.name}'",
    )
    sizes = np.abs([error for _, error in off])
    words = f"beside the model '{artifact.name}': {np.median(sizes):.2%} off in the median, {sizes.max():.2%} at worst"
    return [*found, Finding("note", "physics", f"{len(off)} runs", None, None, words)]


def _named(rows: Sequence[Record], severity: str, kind: str, words: Any) -> list[Finding]:
    """A finding for each of the first rows, and one for how many more there are."""
    found = [
        Finding(severity, kind, variant_name(r.workload.variant), label(r), None, words(r)) for r in rows[:MOST_NAMED]
    ]
    if len(rows) > MOST_NAMED:
        more = f"and so are {len(rows) - MOST_NAMED} more rows"
        found.append(Finding(severity, kind, "rows", None, None, more))
    return found
