"""Records: one row per workload that was run, kept as JSON Lines.

The first line of a file is its environment (what every number in it depends on), each further line one `Record`. A
record is appended and fsynced before the next workload starts, so the file is the progress of a sweep. Amounts are
integers of bytes; a missing value is null; a run that failed is a row too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdfit.equation.metrics import METRICS
from sdfit.equation.stages import COMPONENTS, STAGES, resident
from sdfit.errors import RecordsError, listed
from sdfit.workload import Workload

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
_HEAD = b'{"sdfit_records":'
"""How a records file begins."""
OUTCOMES = ("ok", "oom", "crash")

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
    allocated_bytes, reserved_bytes, device_bytes, required_bytes : int or None
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
    baseline_bytes: int | None = None
    oom_bytes: int | None = None
    oom_stage: str | None = None
    cap_bytes: int | None = None
    retries: int | None = None
    stage_s: dict[str, float] = field(default_factory=dict)
    attention_kernel: str | None = None
    message: str | None = None

    def weights_bytes(self, stage: str) -> int:
        """The weights that are on the card in a stage of this run.

        Without offload this is what was allocated before the run: the weights and what the allocator holds around them.
        """
        if self.workload.offload == "none" and self.baseline_bytes is not None:
            return self.baseline_bytes
        return sum(self.component_bytes.get(c, 0) for c in resident(stage, self.workload.offload))

    def to_json(self) -> str:
        """One line, keys in the order of the fields."""
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """Check a parsed line and make a Record of it.

        Raises
        ------
        ValueError
            If a key is unknown, a workload invalid, an amount negative or not a whole number.
        """
        if not isinstance(values, dict):
            raise ValueError("it is not a table of fields")
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown key '{sorted(unknown)[0]}'")
        if values.get("outcome") not in OUTCOMES:
            raise ValueError(f"outcome is {values.get('outcome')!r}; it must be one of {listed(OUTCOMES)}")
        index = values.get("index")
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(f"index is {index!r}; it must be a whole number >= 0")
        tables = {"stage_peaks_bytes": STAGES, "component_bytes": COMPONENTS}
        amounts = [(k, v) for k, v in values.items() if k.endswith("_bytes") and k not in tables and v is not None]
        for name, known in tables.items():
            table = values.get(name, {})
            if not isinstance(table, dict) or not set(table) <= set(known):
                raise ValueError(f"{name} must be a table of {listed(known)}")
            amounts += [(f"{name} of {part}", v) for part, v in table.items()]
        if values.get("oom_stage") not in (None, *STAGES):
            raise ValueError(f"oom_stage is {values['oom_stage']!r}; it must be one of {listed(STAGES)}")
        for name, amount in amounts:
            if isinstance(amount, bool) or not isinstance(amount, int) or amount < 0:
                raise ValueError(f"{name} is {amount!r}; it must be a whole number of bytes")
        if values["outcome"] == "ok" and not (values.get("stage_peaks_bytes") and values.get("allocated_bytes")):
            raise ValueError("an 'ok' row without peaks")
        return cls(**{**values, "workload": Workload.from_dict(values.get("workload"))})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class RecordsFile:
    """What a records file holds: its environment, its rows in plan order, and notes of the reading."""

    environment: dict[str, Any]
    records: list[Record]
    notes: list[str]


def fingerprint(value: Any) -> str:
    """Hash plain values: the first 16 hex digits of the sha256 of their canonical JSON.

    Examples
    --------
    >>> fingerprint({"a": 1}) == fingerprint({"a": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def read(path: Path | str) -> RecordsFile:
    """Read a records file.

    A torn last line (a sweep was killed while it wrote) is dropped with a note; a broken line elsewhere is refused.

    Raises
    ------
    RecordsError
        With the file, the line number and what is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise RecordsError(f"cannot read records from '{path}': {reason}", path=str(path)) from error
    lines = text.split("\n")
    notes: list[str] = []
    torn = lines.pop()  # what follows the last newline: nothing, unless the writer was killed
    if torn:
        notes.append(f"{path.name}: the last line is torn and was dropped; the sweep will run that workload again")
    if not lines:
        raise RecordsError(f"'{path}' holds no records; type: sdfit sweep --gpu auto", path=str(path))
    environment = _environment(path, lines[0])
    records: dict[int, Record] = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            record = Record.from_dict(json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            raise RecordsError(
                f"{path}, line {number} is no record ({error}); mend or delete that line", path=str(path), line=number
            ) from error
        records[record.index] = record  # a workload that was run again replaces its earlier row
    return RecordsFile(environment, [records[i] for i in sorted(records)], notes)


def _environment(path: Path, line: str) -> dict[str, Any]:
    try:
        head = json.loads(line)
        if head["sdfit_records"] != FORMAT:
            raise RecordsError(
                f"'{path}' has records of format {head['sdfit_records']}; this sdfit reads format {FORMAT}",
                path=str(path),
            )
        environment = head["environment"]
        assert isinstance(environment, dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        if isinstance(error, RecordsError):
            raise
        raise RecordsError(
            f"{path}, line 1 is not the environment of an sdfit records file", path=str(path), line=1
        ) from error
    return environment


class Writer:
    """Appends records to a file, each one on the disk before `append` returns.

    Opening an existing file checks that its environment agrees, and cuts off a torn last line. A second writer of
    the same file is refused.
    """

    def __init__(self, path: Path | str, environment: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.done: list[Record] = []
        self.notes: list[str] = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise RecordsError(f"cannot write records to '{path}': {error.strerror}", path=str(path)) from error
        try:
            self._lock()
            self._take_up(environment)
        except BaseException:
            self._file.close()
            raise

    def _take_up(self, environment: Mapping[str, Any]) -> None:
        """Read what is there; only a file that proves to be one of ours is touched."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if not whole and not (content.startswith(_HEAD) or _HEAD.startswith(content)):
            raise RecordsError(
                f"'{self.path}' is there and is no records file; choose another file with --out", path=str(self.path)
            )
        if whole:
            known = read(self.path)
            self.notes = known.notes
            differ = differences(known.environment, environment, (*MATTERS, "grid_sha256", "num_inference_steps"))
            if differ:
                raise RecordsError(
                    f"'{self.path}' was swept under other conditions ({'; '.join(differ)}); choose another file with --out",
                    path=str(self.path),
                )
            self.done = known.records
        if len(whole) < len(content):
            self._file.truncate(len(whole))
        if not whole:
            self._put({"sdfit_records": FORMAT, "environment": dict(environment)})

    def append(self, record: Record) -> None:
        """Write one record and wait until it is on the disk."""
        self._file.write(record.to_json().encode() + b"\n")
        self._sync()

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n")
        self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # not on this system: then two writers are the user's business
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RecordsError(
                f"another sweep is writing '{self.path}'; wait for it, or choose another --out"
            ) from error


def differences(one: Mapping[str, Any], other: Mapping[str, Any], names: Sequence[str] = MATTERS) -> list[str]:
    """Name the facts in which two environments differ, with both values.

    Examples
    --------
    >>> differences({"gpu": "T4"}, {"gpu": "L4"}, ("gpu", "torch"))
    ['gpu: T4 / L4']
    """
    return [f"{n}: {one.get(n)} / {other.get(n)}" for n in names if one.get(n) != other.get(n)]


def pool(files: Iterable[RecordsFile]) -> RecordsFile:
    """Put files together, if the facts that matter agree.

    Raises
    ------
    RecordsError
        If there are no files, or with the facts that differ.
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
