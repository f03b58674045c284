"""Memory over one thing that is varied: height, width, both sides, batch, tokens or steps; several variants or cards at once.

A curve is a model's predictions with its interval. Over the number of steps nothing is predicted: a trace shows that the
peak does not change from five steps on, and a curve over steps says so by being flat.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sdfit.errors import InvalidWorkload, NeverSwept, UnknownVariant, listed
from sdfit.files import Kind
from sdfit.predict.predictor import Predictor
from sdfit.units import aligned, format_bytes
from sdfit.workload import CHOICES, LIMITS, VAE_SCALE, Workload, one_of

OVER: dict[str, tuple[str, ...]] = {
    "height": ("height",),
    "width": ("width",),
    "size": ("height", "width"),
    "batch": ("batch_size",),
    "tokens": ("prompt_length",),
    "steps": (),
}
"""What can be varied, and the fields of `Workload` that it moves."""
UNITS = {
    "height": "pixels",
    "width": "pixels",
    "size": "pixels, both sides",
    "batch": "images",
    "tokens": "tokens",
    "steps": "steps",
}
MOST_POINTS = 4096
TABLE = Kind("table", (".csv",), b"curve,")
"""The file of `Curves.to_csv`."""
STEPS_NOTE = "the number of steps moves the peak by latents only, and by nothing from five steps on (traced)"


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a figure.

    Parameters
    ----------
    name : str
        The card and what of the variant was asked for.
    at : tuple of int
        Where.
    peak_bytes, low_bytes, high_bytes : tuple of float
        The prediction and the ends of its two-sided interval [bytes].
    memory_bytes : int or None
        What PyTorch may take on that card.
    provenance : str
    simulated : bool
        Whether every point is a simulated run, because the equation has no coefficients for the options or, of what hangs on
        packing, no runs of their kind; else it is the equation's.
    """

    name: str
    at: tuple[int, ...]
    peak_bytes: tuple[float, ...]
    low_bytes: tuple[float, ...]
    high_bytes: tuple[float, ...]
    memory_bytes: int | None
    provenance: str
    simulated: bool = False

    @property
    def crosses_at(self) -> int | None:
        """The last place up to which its interval stays within the memory; None where it always does, or nothing is known."""
        if self.memory_bytes is None or self.high_bytes[-1] <= self.memory_bytes:
            return None
        within = [a for a, high in zip(self.at, self.high_bytes, strict=True) if high <= self.memory_bytes]
        return within[-1] if within else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, amounts in bytes."""
        columns = zip(self.at, self.peak_bytes, self.low_bytes, self.high_bytes, strict=True)
        return {
            "name": self.name,
            "provenance": self.provenance,
            "simulated": self.simulated,
            "memory_bytes": self.memory_bytes,
            "points": [
                {"at": at, "peak_bytes": round(p), "low_bytes": round(low), "high_bytes": round(high)}
                for at, p, low, high in columns
            ],
        }


@dataclass(frozen=True, slots=True)
class Curves:
    """Several curves over the same places.

    Parameters
    ----------
    over : str
        A key of `OVER`.
    workload : Workload
        What the rest is.
    metric : str
    level : float
        Of the bands.
    curves : tuple of Curve
    """

    over: str
    workload: Workload
    metric: str
    level: float
    curves: tuple[Curve, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, amounts in bytes."""
        curves = [curve.to_dict() for curve in self.curves]
        head = {"over": self.over, "unit": UNITS[self.over], "metric": self.metric, "level": self.level}
        return head | {"workload": self.workload.to_dict(), "curves": curves}

    def to_csv(self) -> str:
        """A row for each place of each curve, amounts in bytes."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["curve", self.over, "peak_bytes", "low_bytes", "high_bytes", "memory_bytes"])
        for curve in self.curves:
            memory = "" if curve.memory_bytes is None else curve.memory_bytes
            for at, *amounts in zip(curve.at, curve.peak_bytes, curve.low_bytes, curve.high_bytes, strict=True):
                writer.writerow([curve.name, at, *(round(a) for a in amounts), memory])
        return stream.getvalue()

    def table(self, *, rows: int = 12) -> str:
        """The table for a terminal: about so many places, the first and the last among them; the figure and the CSV have all."""
        places = self.curves[0].at
        shown = sorted({round(i) for i in np.linspace(0, len(places) - 1, min(rows, len(places)))})
        lines = [(self.over, *(curve.name for curve in self.curves))]
        for i in shown:
            lines.append((str(places[i]), *(format_bytes(curve.peak_bytes[i]) for curve in self.curves)))
        alone = [curve.name for curve in self.curves if curve.simulated]
        by = "by the equation" if len(alone) < len(self.curves) else "simulated run by run"
        if 0 < len(alone) < len(self.curves):
            by += f", but {listed(alone)} simulated run by run"
        notes = [f"{self.metric} memory {by}; bands of the figure and the CSV: {100 * self.level:g} %"]
        for curve in self.curves:
            if curve.memory_bytes is not None:
                end = curve.crosses_at
                sure = "all of it" if end is None else f"up to {self.over} {end}" if end else "none of it"
                notes.append(f"{curve.name}: {sure} stays within {format_bytes(curve.memory_bytes)}")
        if self.over == "steps":
            notes.append(STEPS_NOTE)
        return "\n".join([aligned(lines), *notes])


def places(over: str, start: int, end: int, step: int | None = None) -> tuple[int, ...]:
    """Where a curve has its points: from ``start`` to ``end``, both included.

    Parameters
    ----------
    step : int, optional
        None: a latent for sides, otherwise 1; so wide that there are at most 256 points.

    Raises
    ------
    InvalidWorkload
        If there is no such thing to vary, or an end is outside of what a workload may have.

    Examples
    --------
    >>> places("height", 256, 272)
    (256, 264, 272)
    >>> places("batch", 1, 4)
    (1, 2, 3, 4)
    """
    if over not in OVER:
        raise InvalidWorkload(f"a curve cannot go over '{over}'; it can over {listed(OVER)}", given=over)
    low, high = LIMITS[OVER[over][0]] if OVER[over] else (1, 1000)
    if not low <= start < end <= high:
        raise InvalidWorkload(
            f"from {start} to {end} is no range of {over}; from must be below to, and both from {low} to {high}",
            given=(start, end),
        )
    finest = VAE_SCALE if over in ("height", "width", "size") else 1
    width = step if step is not None else finest * max(-(-(end - start) // (finest * 256)), 1)
    if width < 1 or (end - start) // width > MOST_POINTS:
        raise InvalidWorkload(
            f"a step of {width} is no step from {start} to {end}; give one from {max((end - start) // MOST_POINTS, 1)} to "
            f"{end - start}",
            given=step,
        )
    found = range(start, end + 1, width)
    return (*found, end) if found[-1] != end else tuple(found)


def curve(
    f: Predictor,
    workload: Workload,
    *,
    over: str,
    at: Sequence[int],
    metric: str,
    level: float,
    name: str,
    memory_bytes: int | None,
) -> Curve:
    """Predict along a line.

    Parameters
    ----------
    f : Predictor
    workload : Workload
        All that is not varied.
    over, at
        As of `places`.
    metric : str
    level : float
        Of the interval.
    name : str
    memory_bytes : int, optional
        To draw as a line.

    Raises
    ------
    UnknownVariant
        If the model has no coefficients for it, or not the metric.
    """
    columns: dict[str, Any] = {k: np.full(len(at), v) for k, v in workload.to_dict().items() if k in LIMITS}
    columns |= {k: v for k, v in workload.to_dict().items() if k not in LIMITS}
    columns |= {field: np.array(at) for field in OVER[over]}
    try:
        f.equation.variant(workload.variant)
        simulated = False
    except NeverSwept:
        simulated = True
    moved: list[dict[str, Any]] = [dict.fromkeys(OVER[over], place) for place in at]
    runs = [replace(workload, **fields) for fields in moved]
    if not simulated and metric != "allocated" and f is not f.equation:
        ends = [f.equation.predict_workload(run, metric=metric) for run in (runs[0], runs[len(runs) // 2], runs[-1])]
        simulated = not all(one.of_its_kind or one.extrapolated for one in ends)
    if simulated:
        found = [f.predict_workload(run, metric=metric, level=level) for run in runs]
        peak, band = np.array(found, dtype=float), np.array([one.interval for one in found])
    else:
        peak = f.predict(columns, metric=metric)
        band = f.predict_interval(columns, metric=metric, level=level)
    low, high = (tuple(float(v) for v in side) for side in band.T)
    return Curve(name, tuple(at), tuple(float(p) for p in peak), low, high, memory_bytes, f.provenance, simulated)


def changed(workload: Workload, text: str) -> Workload:
    """A workload with some of its options changed, as ``attention=eager,vae_tiling=True`` writes them.

    Raises
    ------
    InvalidWorkload, UnknownVariant
        If an option or its value is unknown; with what there is.

    Examples
    --------
    >>> changed(Workload(512, 512), "attention=eager,vae_tiling=True").variant[:5]
    ('float16', 'eager', 'kl', False, True)
    """
    found = workload
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, value = part.partition("=")
        if name not in CHOICES:
            raise UnknownVariant(
                f"'{part}' changes no option; write for example vae_tiling=True; there are {listed(CHOICES)}"
            )
        known: dict[str, Any] = {str(choice): choice for choice in CHOICES[name]}
        found = replace(found, **{name: known[value] if value in known else one_of(name, value)})
    return found
