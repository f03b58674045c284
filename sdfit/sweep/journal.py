"""The journal: what appends rows to a JSON Lines file, so that no row that was there is ever lost.

Each row is on the disk before `Journal.append` returns. A file is never written again from its beginning: a kill, or a
full disk, costs at most the line under way, and that torn line is cut off by the next writer. What stands in the file,
and how it is read, is in `sdfit.records`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic

from sdfit.errors import RecordsError
from sdfit.files import open_regular
from sdfit.records import FORMAT, GZIP, MATTERS, MOST_BYTES, Kind, Row, differences, read_rows

SUFFIX = ".jsonl"


class Journal(Generic[Row]):
    """Appends rows to a file; opening one that is there resumes it.

    Parameters
    ----------
    path : Path or str
    environment : mapping
        For the first line. It must agree with that of a file that is there.
    kind : Kind
        What the rows are, as `sdfit.records.RECORDS`.

    Attributes
    ----------
    rows : list
        All rows, those of the file and those appended.
    notes : list of str
        Of the reading.

    Raises
    ------
    RecordsError
        If the file is of another kind or environment, is compressed, has a broken line, cannot be written, or another
        process has it open. Then no byte of it was changed.
    """

    def __init__(self, path: Path | str, environment: Mapping[str, Any], kind: Kind[Row]) -> None:
        self.path, self.kind = Path(path), kind
        if self.path.suffix != SUFFIX:
            raise RecordsError(
                f"'{self.path}' cannot hold {kind.noun}s: their files end in {SUFFIX}; choose another file with --out",
                path=str(self.path),
            )
        self.rows: list[Row] = []
        self.notes: list[str] = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.fdopen(open_regular(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT), "r+b", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._lock()
            self._resume(environment)
        except BaseException:
            self._file.close()
            raise

    def append(self, row: Row) -> None:
        """Write one row and wait until it is on the disk."""
        self._put(self.kind.dump(row))
        self.rows.append(row)

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def __enter__(self) -> Journal[Row]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _resume(self, environment: Mapping[str, Any]) -> None:
        """Read what is there; only a file that proves to be one of ours is touched."""
        self._file.seek(0)
        content = self._file.read(min(os.fstat(self._file.fileno()).st_size, MOST_BYTES + 1))
        whole = content.rfind(b"\n") + 1
        if not whole or content.startswith(GZIP):  # nothing can be appended to a compressed file
            head = f'{{"{self.kind.key}":'.encode()
            if not (content.startswith(head) or head.startswith(content)):
                raise RecordsError(
                    f"'{self.path}' is there and is no {self.kind.noun}s file; choose another file with --out",
                    path=str(self.path),
                )
        else:
            there, self.rows, self.notes = read_rows(self.path, self.kind)
            differ = differences(there, environment, (*MATTERS, "grid_sha256", "num_inference_steps"))
            if differ:
                raise RecordsError(
                    f"'{self.path}' was swept under other conditions ({'; '.join(differ)}); "
                    "choose another file with --out",
                    path=str(self.path),
                )
        if whole < len(content):
            self._file.truncate(whole)
        self._end = whole  # where the next row goes
        if not whole:
            self._put({self.kind.key: FORMAT, "environment": dict(environment)})

    def _put(self, values: dict[str, Any]) -> None:
        line = json.dumps(values, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        try:
            self._is_there()
            rest = line
            while rest:  # what is taken of it only in part: to write the rest says why
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
            self._end += len(line)
        except OSError as error:
            self._file.close()  # a further row would stand behind half of this one
            raise self._unwritable(error) from error

    def _is_there(self) -> None:
        """See that what was recorded is still where it was put: else every further row would be lost unseen."""
        mine, named = os.fstat(self._file.fileno()), self.path.stat()
        if (mine.st_dev, mine.st_ino) != (named.st_dev, named.st_ino) or mine.st_size != self._end:
            raise OSError(None, "the file was replaced or changed while this sweep wrote it")

    def _unwritable(self, error: OSError) -> RecordsError:
        return RecordsError(f"cannot write {self.kind.noun}s to '{self.path}': {error.strerror}", path=str(self.path))

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
