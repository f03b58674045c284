"""Files: where those that ship with sdfit lie, and the one way in which files are read and written.

What is read is a regular file of a bounded size. What is written replaces only what sdfit made, is never what it was
made of, and is there whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sdfit.errors import SdfitError

PACKAGE = Path(__file__).resolve().parent
LONGEST_NAME = 100


def shipped(kind: str) -> Path:
    """The folder of shipped files: ``models``, ``sweeps`` or ``data/published``.

    A wheel carries them inside the package; an editable install does not see them there and takes the checkout's.
    """
    inside = PACKAGE / "_shipped" / kind
    return inside if inside.is_dir() else PACKAGE.parent / kind


def read_bytes(path: Path | str, most_bytes: int) -> bytes:
    """Read a regular file: no pipe that nobody writes to, no device without an end.

    Raises
    ------
    OSError
        If it is not there, no regular file, or has more than ``most_bytes``; its ``strerror`` says which.
    """
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise OSError(errno.EFBIG, f"it has {size} bytes, and may have {most_bytes} at most", str(path))
        return file.read(size)  # and no more, where it grows meanwhile


def open_regular(path: Path | str, flags: int) -> int:
    """Open a regular file, which never waits; returns its descriptor.

    Raises
    ------
    OSError
        If it is none.
    """
    with suppress(FileNotFoundError):  # some devices act when they are opened
        _must_be_regular(Path(path).stat(), path)
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0), 0o666)
    try:
        _must_be_regular(os.fstat(handle), path)
    except OSError:
        os.close(handle)
        raise
    return handle


def _must_be_regular(there: os.stat_result, path: Path | str) -> None:
    if stat.S_ISDIR(there.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a directory", str(path))
    if not stat.S_ISREG(there.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))


class Kind(NamedTuple):
    """A kind of file that sdfit makes.

    Parameters
    ----------
    noun : str
        For messages.
    suffixes : tuple of str
        How its name may end.
    mark : bytes
        What every such file holds: a file without it is not ours to replace.
    """

    noun: str
    suffixes: tuple[str, ...]
    mark: bytes


class Output(NamedTuple):
    """A file to be written: where, what, and what it is."""

    path: Path
    content: bytes
    kind: Kind


MODEL = Kind("model", (".joblib",), b"}\x94(\x8c\x08baseline\x94}\x94(\x8c\x05terms\x94")  # how the pickle begins
CARD = Kind("card", (".md",), b"Made by `sdfit fit`; do not edit.")
FIGURE = Kind("figure", (".png", ".svg", ".pdf"), b"Matplotlib")  # matplotlib signs what it draws


def file_name(name: str) -> str:
    """Check a name that becomes that of a file or a folder: one step of a path, printable.

    Raises
    ------
    SdfitError
        If it would lead elsewhere.

    Examples
    --------
    >>> file_name("rtx3060")
    'rtx3060'
    >>> file_name("../../x")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    sdfit.errors.SdfitError: '../../x' cannot be the name of a file; ...
    """
    plain = 0 < len(name) <= LONGEST_NAME and name.isprintable() and name == name.strip()
    if not plain or name.startswith(".") or any(c in name for c in "/\\:"):
        shown = ascii(name[:LONGEST_NAME])
        raise SdfitError(
            f"{shown} cannot be the name of a file; a name has no / or \\, no leading dot and at most "
            f"{LONGEST_NAME} printable characters",
            given=name,
        )
    return name


def write(*outputs: Output, inputs: Iterable[Path] = ()) -> None:
    """Write files, all of them or none; the folder is made if it is not there.

    A link stays, and what it leads to is written. Who reads meanwhile sees the old file or the new one, never half.

    Parameters
    ----------
    outputs : Output
    inputs : iterable of Path
        Files that they are made of, which must stay.

    Raises
    ------
    SdfitError
        If one of them may not be replaced, or cannot be written: all are on the disk before the first takes its place.
    """
    targets = [_target(output) for output in outputs]
    sources = {path.resolve() for path in inputs}
    for output, target in zip(outputs, targets, strict=True):
        if target in sources:
            raise _refused(output, "it is what this is made of")
        _replaceable(output, target)
    if len(set(targets)) < len(targets):
        raise _refused(outputs[-1], "two outputs cannot be one file")
    partial: list[Path] = []
    try:
        for output, target in zip(outputs, targets, strict=True):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                partial.append(target.with_name(f".{target.name[:LONGEST_NAME]}.{os.getpid()}.part"))
                _write_new(partial[-1], target, output.content)
            except OSError as error:
                raise _refused(output, error.strerror or str(error)) from error
        for output, part, target in zip(outputs, partial, targets, strict=True):
            try:
                part.replace(target)
            except OSError as error:
                raise _refused(output, error.strerror or str(error)) from error
    finally:
        for part in partial:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def _target(output: Output) -> Path:
    """The file that an output really goes to, if it has a name that it may have."""
    path, _, kind = output
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links, before Python 3.13
        raise _refused(output, getattr(error, "strerror", None) or str(error)) from error
    if {path.suffix.lower(), target.suffix.lower()} - set(kind.suffixes):
        raise _refused(output, f"the name of a {kind.noun} ends in {' or '.join(kind.suffixes)}")
    return target


def _replaceable(output: Output, target: Path) -> None:
    """Refuse what is there and may not be replaced."""
    kind = output.kind
    try:
        with os.fdopen(open_regular(target, os.O_RDONLY), "rb") as file:
            ours = not os.fstat(file.fileno()).st_size or _holds(file, kind.mark)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # ValueError: a zero in the name
        raise _refused(output, getattr(error, "strerror", None) or str(error)) from error
    if not os.access(target, os.W_OK):
        raise _refused(output, "it is write-protected")
    if not ours:
        raise _refused(output, f"there is a file of that name which is no {kind.noun} of sdfit's")


def _holds(file: BinaryIO, mark: bytes) -> bool:
    """Whether a file has some bytes in it; read in pieces, for it may be of any size."""
    before = b""
    while piece := file.read(1 << 20):
        if mark in before + piece:
            return True
        before = piece[1 - len(mark) :]
    return False


def _write_new(partial: Path, target: Path, content: bytes) -> None:
    """Write a file beside its place, down to the disk, with the permissions of the one that it will replace."""
    partial.unlink(missing_ok=True)  # of a process of the same number that was killed
    with partial.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if target.exists():
        partial.chmod(stat.S_IMODE(target.stat().st_mode))


def _refused(output: Output, why: str) -> SdfitError:
    return SdfitError(
        f"cannot write the {output.kind.noun} to '{output.path}': {why}; choose another file",
        path=str(output.path),
    )


def fingerprint(value: Any) -> str:
    """Hash plain values: the first 16 hex digits of the sha256 of their canonical JSON.

    Examples
    --------
    >>> fingerprint({"a": 1}) == fingerprint({"a": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]
