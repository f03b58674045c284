"""Whether the file of a picture ends before the picture does, by its structure: no pixel is decoded.

What is wrong inside the compressed data is not seen; Pillow finds it when it decodes. Of WebP, AVIF and the like Pillow's own
readers check the length when they open a file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

TAIL_BYTES = 4096
"""Where the end of a whole file is looked for before all of it is read."""
_BYTES = ("L", "RGB", "RGBA", "CMYK")
"""Modes with a byte for each channel of a pixel."""
_STRIPS, _TILES = (273, 279), (324, 325)
"""Tags of a TIFF: where its pieces begin, and how many bytes each has."""


def torn(path: Path, image: Any) -> bool:
    """Whether the end of a file is missing; bytes behind the end do not matter.

    Parameters
    ----------
    path : Path
    image : PIL.Image.Image
        The same file, opened and not loaded.
    """
    size, check = path.stat().st_size, _CHECKS.get(image.format or "")
    with path.open("rb") as file:
        return (check is not None and not check(file, size)) or not _raw_is_there(image, size)


def _png(file: BinaryIO, size: int) -> bool:
    file.seek(-min(size, TAIL_BYTES), os.SEEK_END)
    if b"IEND\xaeB`\x82" in file.read():
        return True
    at = 8  # behind the signature, chunks: length, name, content, sum
    while at + 12 <= size:
        file.seek(at)
        head = file.read(8)
        if head[4:] == b"IEND":
            return True
        at += 12 + int.from_bytes(head[:4], "big")
    return False


def _jpeg(file: BinaryIO, size: int) -> bool:
    """Segments up to the scan, in whose data the end marker stands once: a thumbnail in a segment has one of its own."""
    at = 2
    while at + 4 <= size:
        file.seek(at)
        head = file.read(4)
        if head[0] != 0xFF:
            return True  # not as it should be: Pillow may read it all the same
        if head[1] == 0xFF:  # padding before a marker
            at += 1
            continue
        at += 2 + int.from_bytes(head[2:], "big")
        if head[1] == 0xDA:
            for start in dict.fromkeys((max(at, size - TAIL_BYTES), at)):
                file.seek(start)
                if b"\xff\xd9" in file.read():
                    return True
            return False
    return False


def _gif(file: BinaryIO, size: int) -> bool:
    """Blocks up to the end of the first frame, which is the one that is taken."""

    def skip_blocks() -> bool:
        while length := file.read(1):
            if length == b"\0":
                return True
            file.seek(length[0], os.SEEK_CUR)
        return False

    def skip_colours(flags: int) -> None:
        file.seek(3 << ((flags & 7) + 1) if flags & 0x80 else 0, os.SEEK_CUR)

    file.seek(10)
    skip_colours(file.read(3)[0])
    while kind := file.read(1):
        if kind == b"!":
            file.seek(1, os.SEEK_CUR)
            if not skip_blocks():
                return False
        elif kind == b",":
            place = file.read(9)
            if len(place) < 9:
                return False
            skip_colours(place[8])
            file.seek(1, os.SEEK_CUR)
            return skip_blocks()
        else:
            break
    return False


_CHECKS = {"PNG": _png, "JPEG": _jpeg, "MPO": _jpeg, "GIF": _gif}


def _raw_is_there(image: Any, size: int) -> bool:
    """Whether what is stored without compression, or in pieces of a stated length, lies within the file."""
    tags = getattr(image, "tag_v2", {})
    for begins, lengths in (_STRIPS, _TILES):
        if begins in tags and lengths in tags:
            pairs = zip(_numbers(tags[begins]), _numbers(tags[lengths]), strict=False)
            return all(begin + length <= size for begin, length in pairs)
    for tile in getattr(image, "tile", ()):
        name, box, offset, given = tile[:4]
        stride = given[1] if isinstance(given, tuple) and len(given) > 1 and isinstance(given[1], int) else 0
        if name == "raw" and box:
            least = stride or (box[2] - box[0]) * len(image.getbands()) * (image.mode in _BYTES)
            if least * (box[3] - box[1]) + offset > size:
                return False
    return True


def _numbers(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)
