"""Figures: made without pyplot, so without global state or a display, and written with one clear error."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from sdfit.errors import needs
from sdfit.files import FIGURE, Output, write

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise needs("plot", "matplotlib") from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def blank(width_inches: float, height_inches: float) -> tuple[Figure, Axes]:
    """Make an empty figure of one plot [inches]."""
    figure = Figure(figsize=(width_inches, height_inches), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def save(figure: Figure, path: Path | str) -> Path:
    """Write a figure; the ending says the format.

    Raises
    ------
    SdfitError
        If the file cannot be written, or the ending names no format; see `sdfit.files.write`.
    """
    path, drawn = Path(path), io.BytesIO()
    kind = path.suffix.lower()
    figure.savefig(drawn, format=kind[1:] if kind in FIGURE.suffixes else "svg")
    write(Output(path, drawn.getvalue(), FIGURE))
    return path
