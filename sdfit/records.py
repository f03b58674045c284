"""Records: one row per workload that was run, kept as JSON Lines.

The first line of a file is its environment (what every number in it depends on), each further line one `Record`, which
is valid from its birth. Amounts are integers of bytes; a missing value is null; a run that failed is a row too. What
appends them is `sdfit.sweep.journal`; other rows that are kept the same way are other `Kind` s.
"""

from __future__ import annotations

import errno
import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sdfit.equation.metrics import METRICS
from sdfit.equation.stages import COMPONENTS, STAGES, resident
from sdfit.errors import RecordsError, listed
from sdfit.files import fingerprint, read_bytes
from sdfit.workload import Workload

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
GZIP = b"\x1f\x8b"
MOST_BYTES = 256 << 20
"""Of a file of records, decompressed: some 400,000 rows."""
OUTCOMES = ("ok", "oom", "crash")
DISTURBED_BYTES = 128 << 20
"""A change of what is not this process's that is another program's: the context of a CUDA process alone takes more."""

MATTERS = (
    "backend", "gpu", "compute_capability", "total_memory_bytes", "cuda", "cudnn", "torch", "diffusers", "transformers",
    "allocator_settings", "cudnn_benchmark", "workspaces",
)  # fmt: skip
"""Facts of the environment that numbers depend on; files pool only where these agree."""


@dataclass(frozen=True, slots=True)
class Record:
    """One workload and what it took.

    Parameters
    ----------
    index : int
        Place in the plan of the grid.
    workload : Workload
    outcome : {'ok', 'oom', 'crash'}
    stage_peaks_bytes : dict
        Highest live bytes in each stage that was reached, weights included.
    component_bytes : dict
        Bytes of each component's weights, every tensor rounded up as the allocator rounds it.
    allocated_bytes, reserved_bytes, device_bytes, required_bytes, minimum_bytes : int or None
        Peaks of the run (see the README's glossary); for an ``oom`` row what was known when it failed.
    baseline_bytes : int or None
        Allocated before the run: the weights and what a warm process holds.
    oom_bytes : int or None
        For an ``oom`` row a lower bound of the peak: what was live plus the request that failed.
    oom_stage : str or None
        The stage in which an ``oom`` row failed.
    cap_bytes : int or None
        The capacity the run was given, where one was set.
    retries : int or None
        Times the allocator had to give its cache back and try again.
    others_bytes : int or None
        Most that was in use on the card during the run and was not this process's (see `sdfit.backends.counters`).
    others_change_bytes : int or None
        That, less the least of it from the end of the run before to the end of this one.
    stage_s : dict
        Seconds spent in each stage.
    attention_kernel : str or None
        The kernels that really ran for the UNet's and the VAE's self-attention.
    message : str or None
        Why it failed.
    """

    index: int
    workload: Workload
    outcome: str
    stage_peaks_bytes: dict[str, int] = field(default_factory=dict)
    component_bytes: dict[str, int] = field(default_factory=dict)
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    device_bytes: int | None = None
    required_bytes: int | None = None
    minimum_bytes: int | None = None
    baseline_bytes: int | None = None
    oom_bytes: int | None = None
    oom_stage: str | None = None
    cap_bytes: int | None = None
    retries: int | None = None
    others_bytes: int | None = None
    others_change_bytes: int | None = None
    stage_s: dict[str, float] = field(default_factory=dict)
    attention_kernel: str | None = None
    message: str | None = None

    def __post_init__(self) -> None:
        """Check every value.

        Raises
        ------
        RecordsError
            If an amount is negative or not a whole number, a stage or outcome unknown, an ``ok`` row without peaks.
        """
        if not isinstance(self.workload, Workload):
            raise RecordsError(f"workload is {self.workload!r}; it must be a Workload")
        if self.outcome not in OUTCOMES:
            raise RecordsError(f"outcome is {self.outcome!r}; it must be one of {listed(OUTCOMES)}")
        if type(self.index) is not int or self.index < 0:
            raise RecordsError(f"index is {self.index!r}; it must be a whole number >= 0")
        for name, known in _TABLES:
            table = getattr(self, name)
            if not isinstance(table, dict) or not known.issuperset(table):
                raise RecordsError(f"{name} must be a table of {listed(STAGES if 'stage' in name else COMPONENTS)}")
            of_bytes = name.endswith("_bytes")
            for part, value in table.items():
                if of_bytes:
                    if type(value) is not int or value < 0:
                        raise _no_amount(f"{name} of {part}", value)
                elif type(value) not in (int, float) or not 0 <= value < math.inf:
                    raise RecordsError(f"{name} of {part} is {value!r}; it must be a number of seconds")
        for name in _AMOUNTS:
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                raise _no_amount(name, value)
        for name in _TEXTS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise RecordsError(f"{name} is {value!r}; it must be text")
        if self.oom_stage is not None and self.oom_stage not in STAGES:
            raise RecordsError(f"oom_stage is {self.oom_stage!r}; it must be one of {listed(STAGES)}")
        if self.outcome == "ok" and not (self.stage_peaks_bytes and self.allocated_bytes):
            raise RecordsError("an 'ok' row without peaks")

    @property
    def disturbed(self) -> bool:
        """Whether another program's memory came or went while it ran, which may have changed any of its numbers."""
        return (self.others_change_bytes or 0) > DISTURBED_BYTES

    @property
    def is_answer(self) -> bool:
        """Whether it says what the workload takes, and need not run again."""
        return self.outcome != "crash" and not self.disturbed

    def weights_bytes(self, stage: str) -> int:
        """The weights that are on the card in a stage of this run.

        Without offload this is what was allocated before the run: the weights and what the allocator holds around them.
        """
        if self.workload.offload == "none" and self.baseline_bytes is not None:
            return self.baseline_bytes
        return sum(self.component_bytes.get(c, 0) for c in resident(stage, self.workload.offload))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """Make a Record of a parsed line.

        Raises
        ------
        ValueError
            If it is no table, a key is unknown, or a value wrong.
        """
        if not isinstance(values, dict):
            raise RecordsError("it is not a table of fields")
        for key in values:
            if key not in _FIELDS:
                raise RecordsError(f"unknown key '{key}'")
        workload = Workload.from_dict(values.get("workload"))  # type: ignore[arg-type]
        return cls(**{"index": None, "outcome": None, **values, "workload": workload})


_FIELDS = frozenset(f.name for f in fields(Record))
_TABLES = (
    ("stage_peaks_bytes", frozenset(STAGES)),
    ("component_bytes", frozenset(COMPONENTS)),
    ("stage_s", frozenset(STAGES)),
)
_AMOUNTS = (*(n for n in sorted(_FIELDS - dict(_TABLES).keys()) if n.endswith("_bytes")), "retries")
_TEXTS = ("attention_kernel", "message")


def _no_amount(name: str, amount: Any) -> RecordsError:
    unit = " of bytes" * ("bytes" in name)
    return RecordsError(f"{name} is {amount!r}; it must be a whole number{unit}, 0 or more")


Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Kind(Generic[Row]):
    """What the rows of a JSON Lines file are.

    Parameters
    ----------
    noun : str
        One row, for messages; the first line's key is ``sdfit_<noun>s``.
    parse : callable
        ``parse(values) -> row`` of one parsed line; raises ValueError or TypeError where it is none.
    dump : callable
        ``dump(row) -> values``, its twin.
    hint : str
        What to type where there is no row yet.
    """

    noun: str
    parse: Callable[[Any], Row]
    dump: Callable[[Row], dict[str, Any]]
    hint: str

    @property
    def key(self) -> str:
        """The first line's key."""
        return f"sdfit_{self.noun}s"


RECORDS = Kind("record", Record.from_dict, asdict, "sdfit sweep --gpu auto")


@dataclass(frozen=True, slots=True)
class RecordsFile:
    """What a records file holds: its environment, its rows in plan order, and notes of the reading."""

    environment: dict[str, Any]
    records: list[Record]
    notes: list[str]

    def undisturbed(self) -> RecordsFile:
        """Without the rows that another program's memory disturbed; a note says how many."""
        kept = [row for row in self.records if not row.disturbed]
        left_out = len(self.records) - len(kept)
        words = f"{left_out} rows are left out: another program's memory came or went while they ran; sweep them again"
        return RecordsFile(self.environment, kept, [*self.notes, *([words] if left_out else [])])


def read(path: Path | str) -> RecordsFile:
    """Read a records file, plain or compressed by gzip.

    A torn last line (a sweep was killed while it wrote) is dropped with a note; a broken line elsewhere is refused.

    Raises
    ------
    RecordsError
        With the file, the line number and what is wrong.
    """
    environment, rows, notes = read_rows(path, RECORDS)
    records = latest(rows)
    return RecordsFile(environment, [records[i] for i in sorted(records)], notes)


def latest(rows: Iterable[Record]) -> dict[int, Record]:
    """Of several rows of one workload the last, unless an earlier one says more: an answer, or one under disturbance."""
    found: dict[int, Record] = {}
    for row in rows:
        before = found.get(row.index)
        if before is None or _says(row) >= _says(before):
            found[row.index] = row
    return found


def _says(row: Record) -> int:
    return 2 if row.is_answer else 0 if row.outcome == "crash" else 1


def content_of(path: Path) -> bytes:
    """What a file of records holds: itself, or what was compressed by gzip, as large sweeps are kept.

    Raises
    ------
    OSError, EOFError, zlib.error
        If it cannot be read, is damaged, or is larger than any sweep.
    """
    content = read_bytes(path, MOST_BYTES)
    if not content.startswith(GZIP):
        return content
    with gzip.open(io.BytesIO(content)) as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {MOST_BYTES} bytes", str(path))
    return content


def read_rows(path: Path | str, kind: Kind[Row]) -> tuple[dict[str, Any], list[Row], list[str]]:
    """Read a JSON Lines file of any kind, as `read` does: its environment, all its rows in order, notes."""
    path = Path(path)
    try:
        text = content_of(path).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "it is not text, or damaged"
        raise RecordsError(f"cannot read {kind.noun}s from '{path}': {reason}", path=str(path)) from error
    lines = text.split("\n")
    notes: list[str] = []
    torn = lines.pop()  # what follows the last newline: nothing, unless the writer was killed
    if torn:
        notes.append(f"{path.name}: the last line is torn and was dropped; run the same command to have it again")
    if not lines:
        raise RecordsError(f"'{path}' holds no {kind.noun}s; type: {kind.hint}", path=str(path))
    environment = _environment(path, lines[0], kind)
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            rows.append(kind.parse(json.loads(line)))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise RecordsError(
                f"{path}, line {number} is no {kind.noun} ({error}); mend or delete that line",
                path=str(path),
                line=number,
            ) from error
    return environment, rows, notes


def _environment(path: Path, line: str, kind: Kind[Any]) -> dict[str, Any]:
    try:
        head = json.loads(line)
        version, environment = head[kind.key], head["environment"] if head[kind.key] == FORMAT else {}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _no_environment(path, kind) from error
    if version != FORMAT:
        raise RecordsError(
            f"'{path}' has {kind.noun}s of format {version}; this sdfit reads format {FORMAT}", path=str(path)
        )
    if not isinstance(environment, dict):
        raise _no_environment(path, kind)
    return environment


def _no_environment(path: Path, kind: Kind[Any]) -> RecordsError:
    return RecordsError(f"{path}, line 1 is not the environment of an sdfit {kind.noun}s file", path=str(path), line=1)


def differences(one: Mapping[str, Any], other: Mapping[str, Any], names: Sequence[str] = MATTERS) -> list[str]:
    """Name the facts in which two environments differ, with both values.

    Examples
    --------
    >>> differences({"gpu": "T4"}, {"gpu": "L4"}, ("gpu", "torch"))
    ['gpu: T4 / L4']
    """
    return [f"{n}: {one.get(n)} / {other.get(n)}" for n in names if one.get(n) != other.get(n)]


def kind_of(environment: Mapping[str, Any]) -> str:
    """What two environments have in common if their rows go to one file."""
    return fingerprint([environment.get(name) for name in MATTERS])


def pool(files: Iterable[RecordsFile]) -> RecordsFile:
    """Put files together, if the facts that matter agree.

    Raises
    ------
    RecordsError
        If there are no files, if one is given twice, or with the facts that differ.
    """
    files = list(files)
    if not files:
        raise RecordsError("no records to read; type: sdfit sweep --gpu auto")
    first = files[0]
    for other in files[1:]:
        differ = differences(first.environment, other.environment)
        if differ:
            raise RecordsError(
                f"these records cannot be pooled, they differ in {'; '.join(differ)}; fit them apart", differ=differ
            )
    if any(f.records and f.records == other.records for f, other in combinations(files, 2)):
        raise RecordsError("two of these files hold the same records, which would count twice; give each once")
    environment = dict(first.environment)
    environment["grid"] = listed(dict.fromkeys(str(f.environment.get("grid")) for f in files))
    records = [record for f in files for record in f.records]
    return RecordsFile(environment, records, [note for f in files for note in f.notes])


def to_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per record: the workload's fields, its derived sizes, the peaks and ``peak_<stage>_bytes``.

    All sizes as in `Workload` and `Record` [pixels, tokens, bytes]; missing values are NaN.
    """
    import pandas as pd

    rows = []
    for r in records:
        w = r.workload
        row: dict[str, Any] = {"index": r.index, **w.to_dict(), "outcome": r.outcome}
        row |= {"pixels": w.pixels, "tokens": w.tokens, "unet_batch": w.unet_batch}
        row |= {f"{m}_bytes": getattr(r, f"{m}_bytes") for m in METRICS}
        row |= {"baseline_bytes": r.baseline_bytes, "oom_bytes": r.oom_bytes}
        row |= {f"peak_{stage}_bytes": peak for stage, peak in r.stage_peaks_bytes.items()}
        rows.append(row)
    return pd.DataFrame(rows)
