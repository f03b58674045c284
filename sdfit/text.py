"""Plain aligned text: the one way in which sdfit prints a table."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Align cells in columns two spaces apart.

    Parameters
    ----------
    lines : sequence of equally long sequences of text
        The first is the head.
    left : int
        This many columns are flush left, the others flush right.

    Examples
    --------
    >>> print(aligned([("size", "bytes"), ("512x512", "3")]))
    size     bytes
    512x512      3
    """
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = (
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return "\n".join(row.rstrip() for row in rows)


def percent(fraction: float, digits: int = 2) -> str:
    """A fraction as a percentage.

    Examples
    --------
    >>> percent(0.0123), percent(-0.5, 0)
    ('1.23 %', '-50 %')
    """
    return f"{100 * fraction:.{digits}f} %"
