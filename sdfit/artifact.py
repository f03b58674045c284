"""The artifact: a fitted model as plain values in a ``.joblib`` file.

The file holds nothing but dict, list, str, int, float, bool and None, brought to one canonical form through JSON with
sorted keys, so the same model is the same bytes and the pickle inside needs no global. `load` reads it through an
unpickler that refuses every global, so a hostile file executes nothing; `joblib.load` reads it too.

Format history
--------------
1  components, stages, metrics, scores, baseline, domain, environment, provenance
"""

from __future__ import annotations

import io
import json
import math
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdfit.errors import ArtifactError

FORMAT = 1
LARGEST_BYTES = 16 << 20
RESTS_ON = {
    "measured": "a sweep of that card",
    "published": "a simulated trace, its kernel workspaces calibrated on published measurements",
    "traced": "a simulated trace without any kernel workspace, which predicts too little",
    "fake": "a made-up card, for tests",
}
"""Each provenance, and what the numbers then rest on."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A fitted model. Every field is made of plain values.

    Parameters
    ----------
    name : str
        The card, as in ``models/<name>.joblib``.
    provenance : str
        A key of `RESTS_ON`.
    environment : dict
        What the records were made under (see `sdfit.records.MATTERS`).
    sources : list of dict
        The records files: name, sha256, rows by outcome; for ``published`` also the citations.
    components : dict
        dtype -> component -> bytes of its weights; the VAE as ``vae/kl`` and ``vae/tiny``; what was allocated before a
        run of a whole pipeline as ``all/<vae>/checked`` and ``all/<vae>/unchecked``.
    stages : dict
        ``"<stage>|<fields>"`` -> ``terms``, ``regimes`` (regime index -> row of ``coef``), ``coef``, ``low``, ``high``
        (95 % bounds), ``unidentified`` (term -> why), ``domain`` (column -> [least, most]), ``rows``.
    metrics : dict
        reserved, device, required -> family -> coefficients on `sdfit.predictor.METRIC_FEATURES`.
    scores : dict
        metric -> family -> conformal scores in ascending order; the family ``""`` holds all.
    swept : list of str
        The variants that were swept, in words.
    baseline : dict
        The plain four-term regression over whole runs, kept for comparison.
    evaluation : dict
        Cross-validated errors, relative.
    """

    name: str
    provenance: str
    environment: dict[str, Any]
    sources: list[dict[str, Any]]
    components: dict[str, dict[str, int]]
    stages: dict[str, dict[str, Any]]
    metrics: dict[str, dict[str, Any]]
    scores: dict[str, dict[str, list[float]]]
    swept: list[str]
    baseline: dict[str, Any]
    evaluation: dict[str, Any]
    format: int = FORMAT

    def save(self, path: Path | str) -> Path:
        """Write the artifact; the same model gives the same bytes."""
        import joblib

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        joblib.dump(canonical(asdict(self)), buffer, compress=0, protocol=4)
        partial = path.with_name(path.name + ".part")
        partial.write_bytes(buffer.getvalue())
        partial.replace(path)  # a reader sees the old file or the new one, never half of it
        return path


def canonical(value: dict[str, Any]) -> dict[str, Any]:
    """Bring plain values to one form: keys sorted, tuples as lists, nothing shared.

    Raises
    ------
    ValueError
        If a number is not finite.
    """
    plain: dict[str, Any] = json.loads(json.dumps(value, sort_keys=True, allow_nan=False))
    return plain


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
        value = _NoGlobals(io.BytesIO(path.read_bytes())).load()
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


def _checked(value: Any) -> Artifact:
    if type(value) is not dict or not all(type(key) is str for key in value):
        raise ArtifactError("it is not an sdfit artifact: it holds no table of fields")
    found = value.get("format")
    if found != FORMAT:
        raise ArtifactError(f"its format is {found!r}; this sdfit reads format {FORMAT}")
    for name, kind in _FIELD_TYPES.items():
        if type(value.get(name)) is not kind:
            raise ArtifactError(f"its field '{name}' is missing or no {kind.__name__}")
    unknown = set(value) - set(_FIELD_TYPES)
    if unknown:
        raise ArtifactError(f"it has an unknown field '{sorted(unknown)[0]}'")
    if value["provenance"] not in RESTS_ON:
        raise ArtifactError(f"its provenance is '{value['provenance']}'")
    _check_numbers(value)
    for key, stage in value["stages"].items():
        _check_stage(key, stage)
    return Artifact(**value)


def _check_stage(key: str, stage: Any) -> None:
    from sdfit.basis import STAGE_FIELDS, terms_of

    parts = tuple(key.split("|"))
    if parts[0] not in STAGE_FIELDS or len(parts) != 1 + len(STAGE_FIELDS[parts[0]]):
        raise ArtifactError(f"it has an unknown stage '{key}'")
    try:
        fits = (
            tuple(stage["terms"]) == terms_of(parts)
            and stage["coef"]
            and all(len(row) == len(stage["terms"]) for row in stage["coef"])
            and len(stage["regimes"]) == 4
            and all(0 <= index < len(stage["coef"]) for index in stage["regimes"])
            and all(len(bounds) == 2 for bounds in stage["domain"].values())
            and all(c >= 0 for row in stage["coef"] for c in row)
        )
    except (TypeError, KeyError) as error:
        raise ArtifactError(f"its stage '{key}' is damaged") from error
    if not fits:
        raise ArtifactError(f"its stage '{key}' does not fit this sdfit's equation")


def _check_numbers(value: Any) -> None:
    if isinstance(value, dict):
        for part in value.values():
            _check_numbers(part)
    elif isinstance(value, list):
        for part in value:
            _check_numbers(part)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ArtifactError("it holds a number that is not finite")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise ArtifactError(f"it holds a {type(value).__name__}; an artifact holds plain values only")
