"""Numbers to text and back: bytes, durations, shares, aligned tables; the only place that knows what a GiB is."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from sdfit.errors import InvalidWorkload, shown

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_UNITS = {
    "b": 1,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": GIB << 10,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "k": KIB,
    "m": MIB,
    "g": GIB,
}
_AMOUNT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)
_DURATION = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(s|m|h|)\s*", re.IGNORECASE | re.ASCII)


def format_bytes(amount_bytes: float) -> str:
    """Show an amount of bytes in the largest binary unit that keeps it above one.

    Parameters
    ----------
    amount_bytes : float
        Any finite amount [bytes].

    Examples
    --------
    >>> format_bytes(2_809_300_992)
    '2.616 GiB'
    >>> format_bytes(1536)
    '1.5 KiB'
    >>> format_bytes(512)
    '512 B'
    """
    for size, name, digits in ((GIB, "GiB", 3), (MIB, "MiB", 1), (KIB, "KiB", 1)):
        if abs(amount_bytes) >= size:
            return f"{amount_bytes / size:,.{digits}f} {name}"
    return f"{amount_bytes:.0f} B"


def parse_bytes(text: str | float) -> int:
    """Read an amount of memory: ``"15 GiB"``, ``"15GB"``, ``"8g"``, ``"800 MiB"``, or, as a number, bytes.

    Raises
    ------
    InvalidWorkload
        If it is not a positive, finite amount with a known unit; text without a unit is asked for one.

    Examples
    --------
    >>> parse_bytes("15 GiB")
    16106127360
    >>> parse_bytes("1.5e3 MB")
    1500000000
    """
    if isinstance(text, str):
        match = _AMOUNT.fullmatch(text)
        if match and not match[2]:
            bare = text.strip()
            raise InvalidWorkload(f"'{bare}' has no unit; write {bare}GiB, {bare}MiB or {bare}B", given=text)
        scale = _UNITS.get(match[2].lower()) if match else None
        value = float(match[1]) * scale if match and scale else math.nan
    else:
        try:
            value = math.nan if isinstance(text, bool) else float(text)
        except Exception:  # whatever anybody's __float__ raises
            value = math.nan
    if not (math.isfinite(value) and value >= 1):
        raise InvalidWorkload(
            f"{shown(text)} is not an amount of memory; write for example 15GiB, 800 MiB or 16e9 B", given=text
        )
    return int(value)


def parse_duration(text: str) -> float:
    """Read a time span in seconds: ``"90"``, ``"90s"``, ``"5m"``, ``"1.5h"``.

    Examples
    --------
    >>> parse_duration("5m")
    300.0
    """
    match = _DURATION.fullmatch(text)
    value = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2].lower()] if match else 0.0
    if not value > 0:
        raise InvalidWorkload(f"'{text}' is not a time span; write for example 90s, 5m or 1h", given=text)
    return value


def parse_share(text: str) -> float:
    """Read a share of one: ``2%`` or ``0.02``.

    Raises
    ------
    InvalidWorkload
        If it is none, or is not above 0 and below 1.

    Examples
    --------
    >>> parse_share("2 %"), parse_share("0.5")
    (0.02, 0.5)
    """
    bare = text.strip()
    try:
        share = float(bare.removesuffix("%")) / (100 if bare.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise InvalidWorkload(f"'{text}' is not a share between 0 and 1; write for example 2% or 0.02", given=text)
    return share


def format_duration(seconds: float) -> str:
    """Write a time span as a person would say it.

    Examples
    --------
    >>> format_duration(42.4), format_duration(300), format_duration(5400)
    ('42 s', '5 min', '1 h 30 min')
    """
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


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
