"""How figures are written: three significant digits, units that people read, and a dash for what is not known."""

from __future__ import annotations

import math

__all__ = ["MINUS", "NONE", "compact", "fixed", "mb", "ms", "percent", "points", "signed", "significant", "times"]

NONE = "–"
MINUS = "−"
NBSP = "\u00a0"


def fixed(value: float, decimals: int) -> str:
    """Fixed decimals, thousands with commas, and a real minus sign (none before a zero)."""
    text = f"{value:,.{decimals}f}"
    if text.startswith("-"):
        text = text[1:] if float(text.replace(",", "")) == 0 else MINUS + text[1:]
    return text


def signed(value: float, decimals: int) -> str:
    text = fixed(value, decimals)
    return text if text.startswith(MINUS) or float(text.replace(",", "")) == 0 else f"+{text}"


def significant(value: float, digits: int = 3) -> str:
    """So many significant digits, never in scientific notation: 1.21, 0.397, 1,234."""
    return fixed(value, decimals(value, digits))


def decimals(value: float, digits: int = 3) -> int:
    """The decimals that show `digits` significant digits of `value`."""
    if not value or not math.isfinite(value):
        return 0 if not value else 2
    return max(0, min(6, digits - 1 - math.floor(math.log10(abs(value)))))


def percent(value: float, decimals: int = 1) -> str:
    return f"{fixed(100 * value, decimals)}{NBSP}%"


def points(value: float, decimals: int = 1) -> str:
    """A difference of fractions in percentage points, without the unit."""
    return fixed(100 * value, decimals)


def ms(value: float) -> str:
    return significant(value)


def mb(value: float) -> str:
    """10^6 bytes, given in 10^6 bytes."""
    return significant(value) if value >= 0.1 else fixed(value, 3)


def times(ratio: float) -> str:
    return f"{significant(ratio)}×"


def compact(count: float) -> str:
    """1,234 -> 1.23 k; 41,000,000 -> 41.0 M."""
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= scale:
            return f"{significant(count / scale)}{NBSP}{suffix}"
    return fixed(count, 0)
