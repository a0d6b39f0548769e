"""Sizes of memory and storage, as users write and read them."""

from __future__ import annotations

import re
from decimal import Decimal

from neuralink_cli.errors import OptionError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_PATTERN = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmg]?i?b|)", re.IGNORECASE)


def parse_size(text: str, *, examples: str = "64MB or 1.5GiB") -> int:
    """Parse a size in bytes: `64MB`, `1.5GiB`, or a number alone.

    Args:
        examples: Examples for the error message, for callers that accept other forms too.

    Raises:
        OptionError: The text is not a valid size.
    """
    match = _PATTERN.fullmatch(text.strip())
    if match is None or match[2].lower() not in _UNITS:
        raise OptionError(f"{text!r} is not a valid size", fix=f"write it like {examples}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def human_bytes(count: int) -> str:
    """A size with a decimal unit, as disks are sold."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def human_number(value: float, digits: int = 3) -> str:
    """A figure of any size, rounded to some digits and never with an exponent: `2,310`, `0.0123`."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{Decimal(str(rounded)).normalize():f}"


def human_seconds(seconds: float) -> str:
    """A duration, rounded to the precision of an estimate."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
