"""The artifact: a fitted model as plain values in a ``.joblib`` file.

The file holds nothing but dict, list, str, int, float, bool and None, brought to one canonical form through JSON with
sorted keys, so the same model is the same bytes and the pickle inside needs no global. `sdfit.predict.loading` reads it
without executing anything, `sdfit.predict.schema` says what each field may be; `joblib.load` reads it too.

Format history
--------------
1  components, stages, metrics, scores, baseline, domain, environment, provenance
2  metrics by place, on `sdfit.equation.metrics.METRIC_FEATURES`; scores as order statistics
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sdfit.errors import ArtifactError
from sdfit.files import MODEL, Output, write
from sdfit.predict import schema
from sdfit.predict.schema import FORMAT

LARGEST_BYTES = 1 << 20
"""Of an artifact's file; the largest that ships has a tenth of it."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A fitted model. Every field is made of plain values.

    Parameters
    ----------
    name : str
        The card, as in ``models/<name>.joblib``.
    provenance : str
        A key of `sdfit.predict.schema.RESTS_ON`.
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
        reserved, device, required, minimum -> group of places -> ``edges`` of ranges of `sdfit.equation.metrics.extent`,
        for each range a row of ``coef`` on `sdfit.equation.metrics.METRIC_FEATURES`.
    scores : dict
        metric -> family -> ``count`` and ``values``, as `sdfit.predict.conformal.Scores` keeps them; the family ``""``
        holds all.
    swept : list of str
        The variants that were swept, in words.
    baseline : dict
        The plain four-term regression over whole runs, kept for comparison.
    evaluation : dict
        Cross-validated errors, relative.
    prior : dict
        Empty, unless few runs corrected another model: its ``name`` and ``provenance``, the ``rows`` that did, the ``scale`` of
        `sdfit.fit.correction.Posterior`, and ``stages``: as in that field -> ``terms`` that were corrected, and for each
        row of ``coef`` the ``prior``'s coefficients of these terms and ``told``, the share of each one's variance that the runs
        removed. If the prior could be simulated, also ``kernels``: dtype -> in words what the runs show of them, and
        ``constant_bytes`` that are held all the time besides. The other terms follow from these kernels, without any they are the
        prior's. Left out of the file where it is empty.
    """

    name: str
    provenance: str
    environment: dict[str, Any]
    sources: list[dict[str, Any]]
    components: dict[str, dict[str, int]]
    stages: dict[str, dict[str, Any]]
    metrics: dict[str, dict[str, Any]]
    scores: dict[str, dict[str, dict[str, Any]]]
    swept: list[str]
    baseline: dict[str, Any]
    evaluation: dict[str, Any]
    format: int = FORMAT
    prior: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The content of its file; the same model gives the same bytes.

        Raises
        ------
        ArtifactError
            If a field holds what no artifact may, or it is too large: it could not be loaded again.
        """
        import joblib

        buffer = io.BytesIO()
        plain = canonical({name: value for name, value in asdict(self).items() if name != "prior" or value})
        schema.check(plain)
        joblib.dump(plain, buffer, compress=0, protocol=4)
        if buffer.tell() > LARGEST_BYTES:
            raise ArtifactError(f"'{self.name}' has {buffer.tell()} bytes; an artifact has at most {LARGEST_BYTES}")
        return buffer.getvalue()

    def save(self, path: Path | str) -> Path:
        """Write the artifact, as `sdfit.files.write` does.

        Raises
        ------
        SdfitError
            If the file cannot be written, or is there and no model.
        """
        write(Output(Path(path), self.to_bytes(), MODEL))
        return Path(path)


def canonical(value: dict[str, Any]) -> dict[str, Any]:
    """Bring plain values to one form: keys sorted, tuples as lists, nothing shared.

    Raises
    ------
    ValueError
        If a number is not finite.
    """
    plain: dict[str, Any] = json.loads(json.dumps(value, sort_keys=True, allow_nan=False))
    return plain
