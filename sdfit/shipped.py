"""Where the files that ship with sdfit are: in the wheel, or at the top of an editable checkout."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def shipped(kind: str) -> Path:
    """The folder of shipped files: ``models``, ``sweeps`` or ``data/published``.

    A wheel carries them inside the package; an editable install does not see them there and takes the checkout's.
    """
    inside = PACKAGE / "_shipped" / kind
    return inside if inside.is_dir() else PACKAGE.parent / kind
