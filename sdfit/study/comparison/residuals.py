"""How far the calibrated trace lies from what others measured: the scores of models that rest on published numbers.

`python -m sdfit.study.lab published` traces every published row of allocated memory with the workspaces of its card and
writes ``data/published/residuals.csv``; `scores` reads that file. A model of provenance ``published`` takes its intervals
from here and not from how well its equation follows the trace, which is a hundred times better and beside the point.

What it does not know: two thirds of the rows are 512x512; rows that measure the same thing on the same card are not
independent; no published row holds required memory, and reserved memory was published of the VAE alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from sdfit.files import shipped
from sdfit.predict.conformal import scale, scale_beside_trace
from sdfit.study.comparison.csv_files import read_csv

FILE = "residuals.csv"
REASONS = {"COL-003": "see `T4_EXCESS` in sdfit/predict/simulation/workspaces.py"}
"""Why a row is missed, as far as anybody knows; a row that is not here is not explained."""
OPTIONAL = ("COL-003",)
"""Rows whose excess is likeliest an optional convolution workspace: see `T4_EXCESS`. Not shown, only likelier than the rest."""


@dataclass(frozen=True, slots=True)
class Residual:
    """One published row beside its trace.

    Parameters
    ----------
    id, card, pipeline : str
        As in `sdfit.study.comparison.published.PublishedRow`.
    height, width, batch_size : int
    published_bytes, traced_bytes : int
        What was measured by others, and what the trace with kernel workspaces gives.
    activation_bytes : int
        Of the traced bytes, what is not weights.
    """

    id: str
    card: str
    pipeline: str
    height: int
    width: int
    batch_size: int
    published_bytes: int
    traced_bytes: int
    activation_bytes: int

    @property
    def error(self) -> float:
        """The trace's error relative to the published number."""
        return (self.traced_bytes - self.published_bytes) / self.published_bytes

    @property
    def score(self) -> float:
        """The conformal score: how far the published number lies above the trace, in units of the scale."""
        unit = scale({"run": self.traced_bytes}, {"run": self.traced_bytes - self.activation_bytes})
        return (self.published_bytes - self.traced_bytes) / float(unit)

    @property
    def simulated_score(self) -> float:
        """The conformal score of a run that is simulated, in units of `sdfit.predict.conformal.scale_beside_trace`."""
        return (self.published_bytes - self.traced_bytes) / float(scale_beside_trace(self.activation_bytes))

    @property
    def source(self) -> str:
        """Whose measurement it is, from the first two letters of its id: each measures, and rounds, in a way of its own."""
        return self.id[:2]

    @property
    def optional(self) -> bool:
        """Whether what the trace misses is, by the likeliest reading, a workspace that PyTorch does without where it does
        not fit: then it widens the bounds of allocated and reserved memory, and not those of required memory."""
        return self.id in OPTIONAL

    @property
    def reason(self) -> str:
        """Why the trace misses it, as far as anybody knows."""
        return REASONS.get(self.id, "not explained")


def read(file: Path | None = None) -> tuple[Residual, ...]:
    """Read the shipped residuals, or another file of the same columns.

    Raises
    ------
    RecordsError
        As `sdfit.study.comparison.csv_files.read_csv`.

    Examples
    --------
    >>> next(r.error for r in read() if r.id == "OM-020")
    0.0
    """
    path = file or shipped("data/published") / FILE
    return read_csv(path, "residuals", [field.name for field in fields(Residual)], _typed)


GROWTHS = np.concatenate([[0.0], np.geomspace(1e-13, 1e-6, 2000)])
"""Tried, per byte of activations: from none to so much that what is constant no longer matters."""


def growth(rows: Sequence[Residual]) -> tuple[float, float, float]:
    """How what published runs lie beside their traces grows with the activations, if it does.

    Absolute differences of each source as exponential, their mean proportional to one plus a growth times the activations;
    the growth, which the sources share, by maximum likelihood.

    Returns
    -------
    best, most, gain : float
        The likeliest growth and its upper 95 % limit [1/B]; by how much no growth at all is likelier than nothing but growth,
        in natural logarithms.

    Notes
    -----
    One source measured the many sizes (to 14 GiB of activations), another the many releases (at 0.5 to 0.6 GiB); that they grow
    alike is an assumption. A limit by the likelihood ratio is approximate for so few rows.

    Examples
    --------
    >>> best, most, gain = growth([r for r in read() if r.pipeline != "vae_decode" and r.pipeline != "vae_encode" and not r.optional])
    >>> best, round(1 / most / 2**30, 1), round(gain)
    (0.0, 9.8, 15)
    """
    found = np.zeros(len(GROWTHS))
    for source in {row.source for row in rows}:
        mine = [row for row in rows if row.source == source]
        off = np.array([abs(row.published_bytes - row.traced_bytes) for row in mine], dtype=float)
        means = 1 + GROWTHS[:, None] * np.array([row.activation_bytes for row in mine], dtype=float)
        sigma = np.mean(off / means, axis=1)
        found -= len(mine) * np.log(sigma) + np.sum(np.log(means), axis=1)
    likely = found >= found.max() - ONE_SIDED_95
    return float(GROWTHS[found.argmax()]), float(GROWTHS[likely].max()), float(found[0] - found[-1])


ONE_SIDED_95 = 1.3528
"""Half of the 90 % quantile of chi-squared with one degree of freedom: of a likelihood ratio."""


def _typed(values: Mapping[str, str]) -> Residual:
    text, whole = ("id", "card", "pipeline"), ("height", "width", "batch_size")
    amounts = ("published_bytes", "traced_bytes", "activation_bytes")
    numbers = {name: int(values[name]) for name in (*whole, *amounts)}
    if min(numbers.values()) < 1:
        raise ValueError(min(numbers.values()))
    return Residual(**{name: values[name] for name in text}, **numbers)  # type: ignore[arg-type]
