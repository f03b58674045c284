"""Published measurements of others: the rows of ``data/published/measurements.csv``, typed.

They calibrate and check the artifacts of cards that were not swept. What each column means, its unit and where each
row comes from is written in ``data/published/README.md``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

from sdfit.errors import RecordsError, listed
from sdfit.files import shipped
from sdfit.study.comparison.csv_files import read_csv
from sdfit.workload import Workload

PIPELINES = ("txt2img", "img2img")
"""What ran as a whole; the other rows (``vae_encode``, ``vae_decode``) are the VAE alone."""
CARDS = (
    ("a100", r"\bA100\b"),
    ("a10", r"\bA10\b|\bA10G/"),
    ("v100", r"\bV100\b"),
    ("rtx4090", r"\bRTX 4090\b"),
    ("t4", r"\bT4\b"),
    ("gtx1070", r"\bGTX 1070\b"),
    ("p100", r"\bP100\b"),
)
"""Short name of a card, and what its publisher's name for it looks like."""


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One published peak.

    Parameters
    ----------
    id : str
        Names the row; the letters name its source.
    gpu : str
        The card as its publisher named it; `card` is its short name.
    pipeline : {'txt2img', 'img2img', 'vae_encode', 'vae_decode'}
    height, width : int
        Sides of the image as given [pixels].
    batch_size : int
    guidance_scale : float or None
        None for the VAE alone.
    dtype, attention : str
        As in `Workload`.
    vae_tiling, safety_checker : bool
    offload : {'none', 'model', 'sequential'}
    metric : {'allocated', 'reserved'}
        Which counter of PyTorch's allocator.
    scope : {'total', 'above_weights'}
        ``above_weights``: what was there before the call is subtracted.
    peak_bytes : int
        [bytes]; as fine as it was published, which may be 0.01 GiB.
    confidence : {'high', 'medium'}
    source : str
    """

    id: str
    gpu: str
    pipeline: str
    height: int
    width: int
    batch_size: int
    guidance_scale: float | None
    dtype: str
    attention: str
    vae_tiling: bool
    offload: str
    safety_checker: bool
    metric: str
    scope: str
    peak_bytes: int
    confidence: str
    source: str

    @property
    def card(self) -> str:
        """Short name of the card: a100, a10, v100, rtx4090, t4, gtx1070 or p100."""
        for card, pattern in CARDS:
            if re.search(pattern, self.gpu):
                return card
        known = listed(card for card, _ in CARDS)
        raise RecordsError(f"published row {self.id}: '{self.gpu}' is none of the cards {known}", given=self.gpu)

    @property
    def whole_pipeline(self) -> bool:
        """Whether it is a whole run, not the VAE alone."""
        return self.pipeline in PIPELINES

    def workload(self) -> Workload:
        """Say the row as a Workload.

        A txt2img run becomes the img2img run of the same size: it has the same text encoder, UNet, VAE decoder and
        safety checker, but no VAE encode, whose peak is below that of the decode; so its peak is the same.

        Raises
        ------
        RecordsError
            For the VAE alone, which is no img2img call.

        Examples
        --------
        >>> row(id="COL-001").workload().effective_width
        392
        """
        if not self.whole_pipeline or self.guidance_scale is None:
            raise RecordsError(
                f"published row {self.id} is a {self.pipeline} alone, not a whole run; take rows with whole_pipeline",
                row=self.id,
            )
        return Workload(
            self.height,
            self.width,
            batch_size=self.batch_size,
            guidance_scale=self.guidance_scale,
            dtype=self.dtype,
            attention=self.attention,
            vae_tiling=self.vae_tiling,
            offload=self.offload,
            safety_checker=self.safety_checker,
        )


COLUMNS = [field.name for field in fields(PublishedRow)]


def path() -> Path:
    """Where the published rows are: in the wheel, or in an editable checkout."""
    return shipped("data/published") / "measurements.csv"


def read(file: Path | str) -> tuple[PublishedRow, ...]:
    """Read published rows from a CSV file with the columns of `COLUMNS`.

    Raises
    ------
    RecordsError
        If the file is not there, has other columns, or holds a value of the wrong kind; the message names the line.
    """
    return read_csv(file, "published rows", COLUMNS, _typed)


@lru_cache(maxsize=1)
def rows() -> tuple[PublishedRow, ...]:
    """Get the published rows that ship with sdfit.

    Examples
    --------
    >>> len(rows())
    70
    """
    return read(path())


def row(id: str) -> PublishedRow:
    """Get one published row by its id.

    Examples
    --------
    >>> row("COL-003").peak_bytes
    9728100925
    """
    for candidate in rows():
        if candidate.id == id:
            return candidate
    raise RecordsError(f"no published row '{id}'; the ids are the first column of {path()}", given=id)


def _typed(values: Mapping[str, str]) -> PublishedRow:
    return PublishedRow(
        id=values["id"],
        gpu=values["gpu"],
        pipeline=values["pipeline"],
        height=int(values["height"]),
        width=int(values["width"]),
        batch_size=int(values["batch_size"]),
        guidance_scale=float(values["guidance_scale"]) if values["guidance_scale"] else None,
        dtype=values["dtype"],
        attention=values["attention"],
        vae_tiling={"yes": True, "no": False}[values["vae_tiling"]],
        offload=values["offload"],
        safety_checker={"yes": True, "no": False}[values["safety_checker"]],
        metric=values["metric"],
        scope=values["scope"],
        peak_bytes=int(values["peak_bytes"]),
        confidence=values["confidence"],
        source=values["source"],
    )
