"""Files of comma-separated values, as published figures are kept."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from sdfit.errors import RecordsError
from sdfit.files import read_bytes

MOST_BYTES = 16 << 20
Row = TypeVar("Row")


def read_csv(
    file: Path | str, noun: str, columns: Sequence[str], parse: Callable[[Mapping[str, str]], Row]
) -> tuple[Row, ...]:
    """Read the rows of a file with a line of names.

    Parameters
    ----------
    file : Path or str
    noun : str
        What the rows are, for messages.
    columns : sequence of str
        Their names, in order.
    parse : callable
        ``parse(values) -> row`` of one line.

    Raises
    ------
    RecordsError
        If the file cannot be read, has other columns, or holds a value of the wrong kind; the message names the line.
    """
    try:
        text = io.StringIO(read_bytes(file, MOST_BYTES).decode("utf-8"), newline="")
    except OSError as error:
        raise RecordsError(f"cannot read the {noun} at {file}: {error.strerror}; reinstall sdfit") from error
    except ValueError as error:
        raise RecordsError(f"{file} is not a CSV file of {noun}: {error}", file=str(file)) from error
    reader = csv.reader(text, strict=True)
    found: list[Row] = []
    try:
        given = next(reader, [])
        lines = list(reader)
    except csv.Error as error:
        raise RecordsError(f"{file} is not a CSV file of {noun}: {error}", file=str(file)) from error
    if given != list(columns):
        raise RecordsError(f"{file} has the columns {','.join(given)}; {noun} have {','.join(columns)}", file=str(file))
    for number, line in enumerate(lines, start=2):
        try:
            if len(line) != len(given):
                raise ValueError(f"a line of {len(line)} values")
            found.append(parse(dict(zip(given, line, strict=True))))
        except (KeyError, TypeError, ValueError) as error:
            raise RecordsError(
                f"{file} line {number}: {error} is not a value of that column; see data/published/README.md",
                file=str(file),
            ) from error
    return tuple(found)
