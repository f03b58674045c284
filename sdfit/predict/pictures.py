"""Sizes of pictures, from their headers alone, and what a model says of each.

Pillow reads the headers; no pixel is decoded. A picture is taken as diffusers' `load_image` gives it: its first frame, turned as
the camera noted (EXIF), ``.convert("RGB")``; and what `load_image` fails on is told, but for damage inside the compressed data.
Given to a pipeline as it is, without `load_image`, a picture of another mode than RGB fails or runs as latents.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from sdfit.errors import InvalidWorkload, SdfitError, needs
from sdfit.predict.advise import largest_sure
from sdfit.predict.conformal import check_level
from sdfit.predict.torn import torn
from sdfit.predict.verdict import FITS, Model, Verdict, verdict
from sdfit.workload import Workload

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm")
"""What counts as a picture in a folder; a file that is named counts whatever it is called."""
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture's size, or why it has none.

    Parameters
    ----------
    path : Path
    height, width : int
        [pixels], turned as it is shown; 0 where it could not be read.
    problem : str
        Why it cannot be run; empty if it can.
    remark : str
        What happens to it on the way: only its first frame is taken, and the like.
    """

    path: Path
    height: int = 0
    width: int = 0
    problem: str = ""
    remark: str = ""


def find(paths: Iterable[Path]) -> list[Path]:
    """The pictures that some files and folders hold: folders with all below them, in order, hidden files left out.

    Raises
    ------
    SdfitError
        If a path does not exist, or there is no picture at all.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            for folder, names, files in os.walk(path):  # which does not follow links to folders
                names[:] = sorted(name for name in names if not name.startswith("."))
                pictures = (name for name in sorted(files) if not name.startswith("."))
                found |= dict.fromkeys(Path(folder, name) for name in pictures if name.lower().endswith(SUFFIXES))
        elif path.exists():
            found[path] = None
        else:
            raise SdfitError(f"there is no '{path}'; give pictures, or folders that hold some", path=str(path))
    if not found:
        raise SdfitError(f"no picture was found; pictures end in {', '.join(SUFFIXES[:5])} and the like")
    return list(found)


def look(path: Path) -> Picture:
    """Read a picture's header.

    Raises
    ------
    DependencyError
        If Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise needs("sweep", "pillow") from error
    try:
        if not path.is_file():
            return Picture(path, problem="not a file")
        if not path.stat().st_size:
            return Picture(path, problem="an empty file")
        with _any_size(Image) as limit, Image.open(path) as image:
            width, height = image.size
            # of a PNG without a note in its header Pillow would decode the pixels to look behind them
            noted = image.format != "PNG" or "exif" in image.info
            if noted and image.getexif().get(_ORIENTATION) in _TURNED and not _turned_already(image):
                width, height = height, width
            mode, frames = image.mode, getattr(image, "n_frames", 1)
            image.seek(0)
            if torn(path, image):
                return Picture(path, height, width, "truncated: the end of the file is missing")
        if limit is not None and width * height > 2 * limit:  # where Pillow raises; from the limit on it warns
            most = f"{width * height / 1e6:.0f} megapixels, and Pillow opens {2 * limit / 1e6:.0f} at most"
            return Picture(path, height, width, f"{most} (PIL.Image.MAX_IMAGE_PIXELS)")
    except Exception as error:  # Pillow's readers raise of every kind on damaged files
        return Picture(path, problem=f"not a picture that can be read ({_reason(error)})")
    remarks = [f"animated, {frames} frames: the first is taken"] * (frames > 1)
    remarks += [f"{mode}: taken as RGB"] * (mode != "RGB")
    return Picture(path, height, width, remark="; ".join(remarks))


@contextmanager
def _any_size(library: Any) -> Iterator[int | None]:
    """Headers of any size are read; gives the limit that there is for those who decode [pixels]."""
    before = library.MAX_IMAGE_PIXELS
    library.MAX_IMAGE_PIXELS = None
    try:
        yield before
    finally:
        library.MAX_IMAGE_PIXELS = before


def _turned_already(image: Any) -> bool:
    """Whether the size is that of the turned picture: so Pillow has it for a TIFF."""
    tags = getattr(image, "tag_v2", {})
    return bool(tags) and image.size != (tags.get(256), tags.get(257))


def _reason(error: Exception) -> str:
    name = type(error).__name__
    return "unknown format" if name == "UnidentifiedImageError" else str(error).splitlines()[0] if str(error) else name


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says of a picture.

    Parameters
    ----------
    picture : Picture
    verdict : Verdict or None
        None where the picture has a problem.
    largest : (int, int) or None
        Height and width [pixels] of the largest size of the same shape that is sure to fit; None where none is, or the
        picture has a problem.
    """

    picture: Picture
    verdict: Verdict | None = None
    largest: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, amounts in bytes; ``answer`` is null where there is a problem."""
        p, v = self.picture, self.verdict
        return {
            "image": str(p.path),
            "height": p.height or None,
            "width": p.width or None,
            "required_bytes": round(v.prediction) if v else None,
            "upper_bytes": round(v.prediction.upper) if v else None,
            "answer": v.answer if v else None,
            "chance": v.chance if v else None,
            "slower": v.slower if v else None,
            "margin_bytes": round(v.margin_bytes) if v else None,
            "largest_height": self.largest[0] if self.largest else None,
            "largest_width": self.largest[1] if self.largest else None,
            "problem": p.problem or None,
            "remark": p.remark or None,
        }


def check(
    model: Model, pictures: Iterable[Picture], *, memory: float, level: float | None = None, **options: Any
) -> list[Answer]:
    """Say of each picture whether its run fits, and of one that is not sure to, which size of its shape is.

    Parameters
    ----------
    model : Predictor
    pictures : iterable of Picture
    memory : float
        [bytes]
    level : float, optional
        As in `sdfit.predict.verdict.verdict`.
    **options
        The workload's fields but height and width.
    """
    if level is not None:
        check_level(level)  # else it would be said of each picture, or of none
    quick = model.within(memory)

    @cache
    def said(height: int, width: int) -> tuple[Verdict, tuple[int, int] | None]:
        workload = Workload(height, width, **options)
        found = verdict(quick, workload, memory=memory, level=level)
        return found, (workload.effective_height, workload.effective_width) if found.answer == FITS else None

    def answer(picture: Picture) -> Answer:
        if picture.problem:
            return Answer(picture)
        try:
            return Answer(picture, *said(picture.height, picture.width))
        except InvalidWorkload as error:
            return Answer(Picture(picture.path, picture.height, picture.width, str(error)))

    answers = [answer(picture) for picture in pictures]
    less = [a for a in answers if a.verdict is not None and a.largest is None]
    known = largest_sure(model, {_shape(a.picture) for a in less}, memory=memory, level=level, **options)
    return [a if a.largest or a.verdict is None else replace(a, largest=known[_shape(a.picture)]) for a in answers]


def _shape(picture: Picture) -> tuple[int, int]:
    """Width to height in whole numbers up to 100, as near as they come."""
    ratio = Fraction(picture.width, picture.height)
    near = (1 / (1 / ratio).limit_denominator(100)) if ratio > 1 else ratio.limit_denominator(100)
    return min(max(near.numerator, 1), 100), min(max(near.denominator, 1), 100)
