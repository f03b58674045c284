"""Workspace tables as files: what `sdfit calibrate` found on a card, for a trace to use.

A file is JSON: ``{"sdfit_workspaces": 1, ...}`` with the fields of `sdfit.predict.simulation.workspaces.Architecture`, its rules
and what was measured, each with its evidence.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from sdfit.errors import SdfitError
from sdfit.files import Kind, Output, read_bytes, write
from sdfit.predict.simulation.shapes import Shapes
from sdfit.predict.simulation.workspaces import Architecture, Measured, Rule, Workspaces, workspaces_for

FORMAT = 1
KEY = "sdfit_workspaces"
SUFFIX = ".json"
TABLE = Kind("workspace table", (SUFFIX,), KEY.encode())
LARGEST_BYTES = 64 << 20
_RULE = {f.name for f in fields(Rule)}


def workspaces_of(name: str) -> Workspaces:
    """Get the workspaces of an architecture, of a card, or of a file that ``sdfit calibrate --out`` wrote.

    Raises
    ------
    SdfitError
        If there is no such card, or the file is no workspace table.
    """
    return Workspaces(read_table(name)) if name.endswith(SUFFIX) else workspaces_for(name)


def write_table(architecture: Architecture, path: Path | str, *, inputs: Iterable[Path] = ()) -> Path:
    """Write a table, one rule and one measured kernel a line.

    Raises
    ------
    SdfitError
        If the file cannot be written, or is one of ``inputs``.
    """
    plain = Rule((), (), "")
    rules = [{k: v for k, v in asdict(r).items() if k in ("dtypes", "copies", "evidence") or v != getattr(plain, k)}
             for r in architecture.rules]  # fmt: skip
    head = {
        KEY: FORMAT,
        "name": architecture.name,
        "gpus": architecture.gpus,
        "cublas_bytes": architecture.cublas_bytes,
        "note": architecture.note,
        "products": dict(architecture.products),
    }
    rows = [[m.shapes.operation, m.shapes.dtype, m.shapes.inputs, m.shapes.out, m.held_bytes]
            for m in architecture.measured]  # fmt: skip
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    lines += [f"{json.dumps(key)}: [\n  " + ",\n  ".join(map(json.dumps, values)) + "\n]" if values else f'"{key}": []'
              for key, values in (("rules", rules), ("measured", rows))]  # fmt: skip
    write(Output(Path(path), ("{\n" + ",\n".join(lines) + "\n}\n").encode(), TABLE), inputs=inputs)
    return Path(path)


def read_table(path: Path | str) -> Architecture:
    """Read a table; the twin of `write_table`.

    Raises
    ------
    SdfitError
        With the file and what is wrong.
    """
    path = Path(path)
    try:
        values = json.loads(read_bytes(path, LARGEST_BYTES))
        if not isinstance(values, dict) or KEY not in values:
            raise ValueError("it is none")
        if values[KEY] != FORMAT:
            raise ValueError(f"its format is {values[KEY]!r}, and this sdfit reads format {FORMAT}")
        return Architecture(
            _text(values["name"]),
            tuple(map(_text, values["gpus"])),
            tuple(_rule(rule) for rule in values["rules"]),
            _whole(values["cublas_bytes"]),
            _text(values["note"]),
            tuple(sorted((_text(k), _whole(v)) for k, v in values["products"].items())),
            tuple(_measured(row) for row in values["measured"]),
        )
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
    raise SdfitError(f"cannot read the workspace table '{path}': {reason}; make one: sdfit calibrate SNAPSHOT --out {path}",
                     path=str(path))  # fmt: skip


def _rule(values: dict[str, Any]) -> Rule:
    unknown = set(values) - _RULE
    if unknown:
        raise ValueError(f"a rule has the unknown field '{min(unknown)}'")
    for key in ("min_batch", "max_batch", "max_pixels", "pad_bytes", "element_bytes", "side"):
        if values.get(key) is not None:
            _whole(values[key])
    lists = {key: tuple(map(_text, values[key])) for key in ("dtypes", "copies")}
    if set(lists["copies"]) - {"input", "output", "weight", "winograd"}:
        raise ValueError(f"a rule copies {lists['copies']}")
    channels = values.get("channels")
    pair = None if channels is None else (_whole(channels[0]), _whole(channels[1]))
    return Rule(**{**values, **lists, "channels": pair})


def _measured(row: Any) -> Measured:
    operation, dtype, inputs, out, held = row
    shapes = Shapes(_text(operation), _text(dtype), tuple(_shape(s) for s in inputs), _shape(out))
    return Measured(shapes, _whole(held))


def _shape(values: Any) -> tuple[int, ...]:
    return tuple(map(_whole, values))


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no whole number, 0 or more")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{value!r} is no text")
    return value
