"""Numbers, times and foreign text as words: the only place that decides how a value looks on a page.

Knows no run, no file and no format. Foreign text (model output, ids, settings) passes through `visible` before it is shown.
"""

from __future__ import annotations

import json
import math
import unicodedata
from datetime import UTC, datetime

from ..records import Json

__all__ = [
    "NOTHING",
    "clip",
    "counted",
    "duration",
    "interval",
    "level",
    "number",
    "percent",
    "points",
    "setting",
    "share_digits",
    "signed",
    "size",
    "visible",
    "when",
]

NOTHING = "–"
_NBSP = "\u00a0"
_KEPT = frozenset("\n\t\ufe0e\ufe0f")
_HIDDEN_CATEGORIES = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
_IGNORABLE = ((0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x3164, 0x3164), (0xFE00, 0xFE0D), (0xFFA0, 0xFFA0), (0xE0100, 0xE01EF))
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _shown(char: str) -> str:
    code = ord(char)
    if char in _KEPT:
        return char
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    hidden = unicodedata.category(char) in _HIDDEN_CATEGORIES or any(low <= code <= high for low, high in _IGNORABLE)
    return f"⟨U+{code:04X}⟩" if hidden else char


def visible(text: str) -> str:
    """Text whose control, bidirectional, invisible and unassigned characters are shown as signs; newlines and tabs stay.

    An escape character becomes ␛, a right-to-left override ⟨U+202E⟩: nothing can hide, reorder or repaint what stands beside it.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_shown, text))


def clip(text: str, limit: int) -> str:
    """The first `limit` characters; what is left out is counted."""
    return text if len(text) <= limit else f"{text[:limit].rstrip()} … [{len(text) - limit:,} more characters]"


def number(value: float | None, digits: int = 3) -> str:
    """At least `digits` significant digits: 0.613, 12,345, 2×10⁻⁴; the minus is a minus sign."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:,.0f}".replace("-", "−")
    exponent = math.floor(math.log10(abs(value)))
    if not -4 < exponent < 9:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa.replace('-', '−')}×10{str(int(power)).translate(_SUPERSCRIPTS)}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}".replace("-", "−")


def signed(value: float, digits: int = 3) -> str:
    """`number` with its sign, a plus included."""
    return f"+{number(value, digits)}" if value > 0 else number(value, digits)


def share_digits(*values: float) -> int:
    """Decimals of a percentage that keep every value other than zero from being rounded to zero: 0 to 3."""
    return next((d for d in range(3) if all(value == 0 or round(100 * value, d) != 0 for value in values if math.isfinite(value))), 3)


def percent(value: float, digits: int = 0) -> str:
    """A share of one as "61 %"."""
    return f"{points(value, digits)}{_NBSP}%" if math.isfinite(value) else NOTHING


def points(value: float, digits: int = 0, *, plus: bool = False) -> str:
    """A share of one in percentage points, without a unit."""
    if not math.isfinite(value):
        return NOTHING
    rounded = round(100 * value, digits) + 0.0
    return f"{rounded:{'+' if plus and rounded else ''}.{digits}f}".replace("-", "−")


def interval(low: float, high: float, *, share: bool) -> str:
    """Both ends of an interval: "53 to 68 %" of a share, else plain numbers."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return NOTHING
    if share:
        digits = max(1, share_digits(low, high))
        return f"{points(low, digits)} to {points(high, digits)}{_NBSP}%"
    return f"{number(low)} to {number(high)}"


def counted(count: int, noun: str) -> str:
    """ "1 step", "1,200 steps"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def setting(value: Json) -> str:
    """A setting with every digit that it has; a list with commas, a table as JSON."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) and not any(char in value for char in "\n\t"):
        return value or NOTHING
    if isinstance(value, list) and not any(isinstance(item, (dict, list)) for item in value):
        return ", ".join(map(setting, value)) or NOTHING
    return json.dumps(value, ensure_ascii=False)


def level(share: float) -> str:
    """A confidence level: "95 %"."""
    return f"{100 * share:g}{_NBSP}%"


def size(count: float | None) -> str:
    """Bytes in decimal units: "4.9 MB"."""
    if count is None or not math.isfinite(count):
        return NOTHING
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds as "0.42 s", "12.3 s", "4 min 05 s" or "2 h 07 min"."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def when(value: object) -> str:
    """A moment in UTC; seconds since the epoch or a text, which is given back as it is."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e11:
        return datetime.fromtimestamp(value, UTC).strftime("%-d %B %Y, %H:%M UTC")
    return value if isinstance(value, str) and value else NOTHING
