"""Predict many workloads at once: columns in, arrays out.

Rows are grouped by variant; within one, the terms are evaluated in blocks that stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sdfit.equation.sizes import Sizes
from sdfit.errors import InvalidWorkload, NeverSwept
from sdfit.workload import (
    LIMITS,
    VARIANT_FIELDS,
    VariantKey,
    Workload,
    check_keywords,
    effective,
    one_of,
)

if TYPE_CHECKING:
    from sdfit.predict.prediction import Prediction
    from sdfit.predict.variant import Variant

Array = np.ndarray[Any, np.dtype[Any]]
BLOCK_ROWS = 16_384
_DEFAULTS = Workload(512, 512).to_dict()


def predict_table(
    find: Callable[[VariantKey], Variant],
    table: Any,
    metric: str,
    level: float | None = None,
    *,
    alone: Callable[..., Prediction] | None = None,
    own: bool = False,
) -> tuple[Array, Array]:
    """Predict each row; with a level also how far below and above the ends of its interval lie.

    ``find`` gives the `Variant` of a key (`sdfit.predict.predictor.Predictor.variant`); where it was never swept,
    ``alone(workload, metric=, level=)`` predicts its rows one by one, if it is given; ``own`` as in `Variant.margin`.

    Returns
    -------
    value : array, shape (rows,)
        [bytes]
    margins : array, shape (2, rows)
        Below and above [bytes]; zero without a level.
    """
    columns, rows = _columns(table)
    numbers = {name: _numbers(name, columns[name], rows) for name in (*LIMITS, "guidance_scale")}
    value, margins = np.empty(rows), np.zeros((2, rows))
    for key, where in _groups(columns, rows):
        part = {name: v if where is None else v[where] for name, v in numbers.items()}
        try:
            got = _one_variant(find(key), part, metric, level, own)
        except NeverSwept:
            if alone is None:
                raise
            got = _row_by_row(alone, key, part, metric, level)
        if where is None:
            value, margins = got
        else:
            value[where], margins[:, where] = got
    return value, margins


def _one_variant(
    found: Variant, part: dict[str, Array], metric: str, level: float | None, own: bool
) -> tuple[Array, Array]:
    rows = len(part["height"])
    value, margins = np.empty(rows), np.zeros((2, rows))
    for start in range(0, rows, BLOCK_ROWS):
        cut = slice(start, start + BLOCK_ROWS)
        block = {name: column[cut] for name, column in part.items()}
        height, width, tokens, batch, samples = (np.asarray(c, dtype=np.float64) for c in effective(**block))
        sizes = Sizes.of(height, width, tokens, batch, samples, found.slicing, found.tiling)
        peaks = found.stage_arrays(sizes)
        value[cut] = found.metric(peaks, metric, sizes)
        if level is not None:
            for end in (0, 1):
                each = (1 + level) / 2
                margins[end, cut] = found.margins(value[cut], peaks, sizes, metric, each, upper=bool(end), own=own)
    return value, margins


def _row_by_row(
    alone: Callable[..., Prediction], key: VariantKey, part: dict[str, Array], metric: str, level: float | None
) -> tuple[Array, Array]:
    rows = len(part["height"])
    value, margins = np.empty(rows), np.zeros((2, rows))
    known: dict[Workload, Prediction] = {}
    for row, numbers in enumerate(zip(*(column.tolist() for column in part.values()), strict=True)):
        fields: tuple[Any, ...] = (*numbers, *key)
        workload = Workload(*fields)
        if workload not in known:
            known[workload] = (
                alone(workload, metric=metric) if level is None else alone(workload, metric=metric, level=level)
            )
        found = known[workload]
        value[row] = found
        if level is not None:
            each = (1 + level) / 2
            margins[:, row] = found._margin(each, upper=False), found._margin(each, upper=True)
    return value, margins


def _columns(table: Any) -> tuple[dict[str, Any], int]:
    given = {str(name): table[name] for name in (table.columns if hasattr(table, "columns") else _mapping(table))}
    check_keywords(given)
    missing = [name for name in ("height", "width") if name not in given]
    if missing:
        raise InvalidWorkload(f"the table has no column '{missing[0]}'; it must have height and width")
    columns = {name: given.get(name, default) for name, default in _DEFAULTS.items()}
    lengths = {name: len(v) for name, v in columns.items() if _dimensions(name, v)}
    rows = max(lengths.values(), default=1)
    for name, length in lengths.items():
        if length != rows:
            raise InvalidWorkload(f"column '{name}' has {length} rows, another has {rows}; they must be equal")
    return columns, rows


def _dimensions(name: str, column: Any) -> int:
    """0 of one value for all rows, 1 of a column; nothing else is one."""
    try:
        found = np.ndim(column)
    except np.ma.MaskError:  # of a list of masked values
        raise _masked(name) from None
    except Exception:  # rows of several lengths, or what no array can be made of
        found = 2
    if found > 1:
        kind = "options" if name in VARIANT_FIELDS else "numbers"
        raise InvalidWorkload(f"column '{name}' must hold {kind}, one value or one for each row, and not lists")
    if np.ma.is_masked(column):
        raise _masked(name)
    return found


def _masked(name: str) -> InvalidWorkload:
    return InvalidWorkload(f"column '{name}' has masked values; fill them in or leave these rows out", field=name)


def _mapping(table: Any) -> Mapping[str, Any]:
    if not isinstance(table, Mapping):
        raise InvalidWorkload(f"a table is a mapping of columns or a DataFrame, not {type(table).__name__}")
    return table


def _numbers(name: str, column: Any, rows: int) -> Array:
    try:
        values = np.asarray(column)
        if values.dtype.kind == "O":  # pandas' nullable columns; a missing value leaves it an object array
            values = np.asarray(values.tolist())
        if values.dtype.kind not in "iuf":
            raise TypeError
        values = np.broadcast_to(values, rows).astype(np.float64)
    except Exception:  # whatever a value says when it is made a number
        raise InvalidWorkload(f"column '{name}' must hold numbers", field=name) from None
    low, high = LIMITS.get(name, (0, np.inf))
    wrong = ~((values >= low) & (values <= high) & np.isfinite(values))
    if name in LIMITS and values.size and np.asarray(column).dtype.kind == "f":
        wrong |= values != np.floor(values)
    if wrong.any():
        row = int(np.argmax(wrong))
        kind = "a whole number" if name in LIMITS else "a finite number"
        raise InvalidWorkload(
            f"row {row}: {name} is {values[row]:g}; it must be {kind} from {low} to {high}", field=name, row=row
        )
    return values.astype(np.int64) if name in LIMITS else values


def _groups(columns: dict[str, Any], rows: int) -> list[tuple[VariantKey, Array | None]]:
    """Rows by variant; None stands for all rows. Every option is checked, so a found key is a valid one."""
    code = np.zeros(rows, dtype=np.int64)
    levels: list[list[Any]] = []
    for name in VARIANT_FIELDS:
        column = columns[name]
        if np.ndim(column) == 0:
            levels.append([one_of(name, column)])
            continue
        values = np.asarray(column)
        try:
            names, inverse = np.unique(values, return_inverse=True)
        except Exception:  # a missing value among text, or what cannot be compared at all
            names, inverse = values, np.arange(rows)
        levels.append([one_of(name, v) for v in names])
        code = code * len(names) + inverse
    if not rows:
        return []
    if not code.any():
        return [(tuple(level[0] for level in levels), None)]
    groups: list[tuple[VariantKey, Array | None]] = []
    for value in np.unique(code):
        rest, key = int(value), []
        for level in reversed(levels):
            rest, at = divmod(rest, len(level))
            key.append(level[at])
        groups.append((tuple(reversed(key)), np.flatnonzero(code == value)))
    return groups
