"""Read an artifact without executing anything in it, and check that it is one.

Only those pickle instructions that make plain values are let through, before any of them runs; then the file is read by
an unpickler that refuses every global. What is read is checked field by field against this sdfit's equation.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from pathlib import Path
from typing import Any

from sdfit.equation.metrics import METRIC_FEATURES
from sdfit.equation.regimes import REGIMES
from sdfit.equation.sizes import domain_columns
from sdfit.equation.stages import is_stage_key
from sdfit.equation.terms import terms_of
from sdfit.errors import ArtifactError
from sdfit.predict.artifact import FORMAT, RESTS_ON, Artifact
from sdfit.predict.conformal import kept_ranks

LARGEST_BYTES = 16 << 20
PLAIN = frozenset({
    "PROTO", "FRAME", "MEMOIZE", "BINGET", "LONG_BINGET", "MARK", "STOP", "NONE", "NEWTRUE", "NEWFALSE", "BININT",
    "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "EMPTY_LIST", "APPEND", "APPENDS",
    "EMPTY_DICT", "SETITEM", "SETITEMS",
})  # fmt: skip
"""Pickle instructions that make plain values, as joblib writes them.

Others import and call (GLOBAL, REDUCE, ...), or, like BYTEARRAY8 and LONG_BINPUT, ask for memory by a number in the file.
"""


def _check_instructions(content: bytes) -> None:
    for instruction, _, _ in pickletools.genops(content):
        if instruction.name not in PLAIN:
            raise ArtifactError(
                f"it holds the pickle instruction {instruction.name}; an artifact holds plain values only"
            )


class _NoGlobals(pickle.Unpickler):
    """Reads plain values; a pickle that names any class or function is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        raise ArtifactError(f"it asks for {module}.{name}; an artifact holds plain values only")

    def persistent_load(self, pid: Any) -> Any:
        raise ArtifactError("it refers to an outside object; an artifact holds plain values only")


def load_artifact(path: Path | str) -> Artifact:
    """Read an artifact without executing anything in it.

    Raises
    ------
    ArtifactError
        If the file cannot be read, is truncated, foreign or hostile, is of another format, or has a field that is
        missing or of the wrong kind.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > LARGEST_BYTES:
            raise ArtifactError(f"it has {size} bytes; an artifact has at most {LARGEST_BYTES}")
        content = path.read_bytes()
        _check_instructions(content)
        value = _NoGlobals(io.BytesIO(content)).load()
        return _checked(value)
    except ArtifactError as error:
        reason = str(error)
    except OSError as error:
        reason = error.strerror or str(error)
    except RecursionError:
        reason = "it is nested too deeply"
    except Exception as error:  # a corrupt pickle can raise nearly anything; none of it may escape unexplained
        reason = f"it is not an sdfit artifact, or a damaged one ({type(error).__name__})"
    raise ArtifactError(f"cannot load '{path}': {reason}; make it again: sdfit fit", path=str(path))


_FIELD_TYPES: dict[str, type] = {
    "name": str,
    "provenance": str,
    "environment": dict,
    "sources": list,
    "components": dict,
    "stages": dict,
    "metrics": dict,
    "scores": dict,
    "swept": list,
    "baseline": dict,
    "evaluation": dict,
    "format": int,
}


MOST_SCORES = 10**9
"""Of one family."""


def _checked(value: Any) -> Artifact:
    if type(value) is not dict or not all(type(key) is str for key in value):
        raise ArtifactError("it is not an sdfit artifact: it holds no table of fields")
    found = value.get("format")
    if found != FORMAT:
        raise ArtifactError(f"its format is {found!r}; this sdfit reads format {FORMAT}")
    for name, kind in _FIELD_TYPES.items():
        if type(value.get(name)) is not kind:
            raise ArtifactError(f"its field '{name}' is missing or no {kind.__name__}")
    if type(value.get("prior", {})) is not dict:
        raise ArtifactError("its field 'prior' is no dict")
    unknown = set(value) - set(_FIELD_TYPES) - {"prior"}
    if unknown:
        raise ArtifactError(f"it has an unknown field '{sorted(unknown)[0]}'")
    if value["provenance"] not in RESTS_ON:
        raise ArtifactError(f"its provenance is '{value['provenance']}'")
    _check_plain(value, set())
    for key, stage in value["stages"].items():
        _check_stage(key, stage)
    _check_tables(value)
    if value.get("prior"):
        _check_prior(value["prior"], value["stages"])
    return Artifact(**value)


def _check_stage(key: str, stage: Any) -> None:
    parts = tuple(key.split("|"))
    if not is_stage_key(parts):
        raise ArtifactError(f"it has an unknown stage '{key}'")
    try:
        fits = (
            tuple(stage["terms"]) == terms_of(parts)
            and stage["coef"]
            and all(len(row) == len(stage["terms"]) for row in stage["coef"])
            and len(stage["regimes"]) == len(REGIMES)
            and all(type(index) is int and 0 <= index < len(stage["coef"]) for index in stage["regimes"])
            and set(stage["domain"]) == set(domain_columns(1, 1, 1))
            and all(0 < low <= high for low, high in stage["domain"].values())
            and all(c >= 0 for row in stage["coef"] for c in row)
        )
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ArtifactError(f"its stage '{key}' is damaged") from error
    if not fits:
        raise ArtifactError(f"its stage '{key}' does not fit this sdfit's equation")


def _check_tables(value: dict[str, Any]) -> None:
    """Check what a prediction computes with, beside the stages: weights, metrics, scores."""
    try:
        sizes = [size for table in value["components"].values() for size in table.values()]
        groups = [found for table in value["metrics"].values() for found in table.values()]
        scores = [found for families in value["scores"].values() for found in families.values()]
        if not all(type(size) is int and size >= 0 for size in sizes):
            raise ArtifactError("its field 'components' holds what are no sizes in bytes")
        if not all(_is_group(found) for found in groups):
            raise ArtifactError("its field 'metrics' does not fit this sdfit's equation")
        if not all(_are_scores(found) for found in scores):
            raise ArtifactError("its field 'scores' does not hold order statistics in ascending order")
    except ArtifactError:
        raise
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ArtifactError("its field 'components', 'metrics' or 'scores' is damaged") from error


def _check_prior(prior: dict[str, Any], stages: dict[str, Any]) -> None:
    """Check what is said of the model that a few runs corrected: a share of every corrected coefficient."""
    try:
        fits = (
            type(prior["name"]) is str
            and prior["provenance"] in RESTS_ON
            and type(prior["rows"]) is int
            and prior["rows"] > 0
            and prior["scale"] >= 1
            and set(prior["stages"]) == set(stages)
            and all(_is_told(found, stages[key]) for key, found in prior["stages"].items())
        )
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ArtifactError("its field 'prior' is damaged") from error
    if not fits:
        raise ArtifactError("its field 'prior' does not fit its stages")


def _is_told(found: Any, stage: dict[str, Any]) -> bool:
    terms, shares = found["terms"], found["told"]
    return (
        set(terms) <= set(stage["terms"])
        and len(found["prior"]) == len(shares) == len(stage["coef"])
        and all(len(row) == len(terms) for row in (*found["prior"], *shares))
        and all(0 <= share <= 1 for row in shares for share in row)
        and all(c >= 0 for row in found["prior"] for c in row)
    )


def _is_group(found: Any) -> bool:
    """Whether a table holds a metric's coefficients as `sdfit.equation.metrics.metric_value` takes them."""
    edges, coef = found["edges"], found["coef"]
    return (
        type(edges) is list
        and edges == sorted(float(edge) for edge in edges)
        and type(coef) is list
        and len(coef) == len(edges) + 1
        and all(type(row) is list and len(row) == len(METRIC_FEATURES) and min(row) >= 0 for row in coef)
    )


def _are_scores(found: Any) -> bool:
    """Whether a table holds the order statistics that `sdfit.predict.conformal.Scores` keeps of so many."""
    count, values = found["count"], found["values"]
    return (
        len(found) == 2
        and type(count) is int
        and 1 <= count <= MOST_SCORES
        and type(values) is list
        and len(values) == len(kept_ranks(count))
        and values == sorted(float(value) for value in values)
    )


def _check_plain(value: Any, seen: set[int]) -> None:
    """Check that there are only plain values and finite numbers, and that nothing is shared (`canonical` shares nothing).

    Sharing would let a small file stand for a tree without end.
    """
    if isinstance(value, dict | list):
        if id(value) in seen:
            raise ArtifactError("it holds a table twice; an artifact holds plain values only")
        seen.add(id(value))
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_plain(part, seen)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ArtifactError("it holds a number that is not finite")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise ArtifactError(f"it holds a {type(value).__name__}; an artifact holds plain values only")
