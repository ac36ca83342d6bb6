"""Numbers as people and models write them, exactly: words, separators, fractions, LaTeX, percent, units. Knows no ballots and no models.

A number becomes a `Fraction`, so that 0.1 + 0.2 is 3/10 and 4, 4.0 and "four" are one answer. What is not wholly a number is None here:
which part of a long text is the answer is decided in `answers.py`.
"""

from __future__ import annotations

import re
from fractions import Fraction

from ..records import record

__all__ = ["Quantity", "last_quantity", "quantity", "show_number"]

_SMALL = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = {word: i for i, word in enumerate(_SMALL)} | {word: 10 * (i + 2) for i, word in enumerate(_TENS)} | {"dozen": 12}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {"half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10}
_PARTS |= {f"{word}s": n for word, n in _PARTS.items() if not word.endswith("s")}
_UNITS: dict[str, tuple[str, Fraction]] = {}


def _unit(base: str, **names: str) -> None:
    for factor, spelled in names.items():
        for name in spelled.split("|"):
            _UNITS[name] = (base, Fraction(factor[1:].replace("_", "/")))


_unit("m", x1="m|meter|meters|metre|metres", x1000="km|kilometer|kilometers|kilometre|kilometres", x1_100="cm|centimeter|centimeters|centimetre|centimetres",
      x1_1000="mm|millimeter|millimeters|millimetre|millimetres", x201168_125="mi|mile|miles", x381_1250="ft|foot|feet", x127_5000="inch|inches")  # fmt: skip
_unit("g", x1="g|gram|grams", x1000="kg|kilogram|kilograms|kilo|kilos", x1_1000="mg|milligram|milligrams", x1000000="tonne|tonnes")
_unit("s", x1="s|sec|secs|second|seconds", x60="min|mins|minute|minutes", x3600="h|hr|hrs|hour|hours", x86400="day|days", x604800="week|weeks",
      x1_1000="ms|millisecond|milliseconds")  # fmt: skip
_unit("l", x1="l|liter|liters|litre|litres", x1_1000="ml|milliliter|milliliters|millilitre|millilitres")
_unit("usd", x1="$|usd|dollar|dollars", x1_100="cent|cents")
_unit("eur", x1="€|eur|euro|euros")
_unit("gbp", x1="£|gbp|pound sterling|pounds sterling")
_unit("jpy", x1="¥|jpy|yen")
_unit("deg", x1="°|degree|degrees")
_unit("degc", x1="°c|degrees celsius|celsius")
_unit("degf", x1="°f|degrees fahrenheit|fahrenheit")
_unit("m2", x1="m²|m2|m^2|square meters|square metres")
_unit("km/h", x1="km/h|kmh|kph|kilometers per hour|kilometres per hour")
_unit("mi/h", x1="mph|miles per hour")
_NUMBER = r"(?:\d{1,3}(?:[,\u00a0\u202f ]\d{3})+(?:\.\d+)?|\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?|\d{1,3}(?:\.\d{3})+,\d+|\d+(?:[.,]\d+)?|[.,]\d+|\d+\.)"
_PLAIN = re.compile(rf"(?P<sign>[-+]?)\s*(?P<currency>[$€£¥]?)\s*(?P<sign2>[-+]?)(?P<digits>{_NUMBER})(?P<exponent>e[-+]?\d{{1,4}})?")
_POWER = re.compile(rf"(?P<sign>[-+]?)(?:(?P<digits>{_NUMBER})\s*(?:[×x*·]|\\times|\\cdot)\s*)?10\s*\^\s*\{{?\s*(?P<power>[-+]?\d{{1,4}})\s*\}}?")
_RATIO = re.compile(r"(?P<sign>[-+]?)\s*(?:(?P<whole>\d+)\s+)?(?P<top>[-+]?\d+)\s*/\s*(?P<bottom>\d+)")
_FRAC = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_FIND = re.compile(
    rf"(?<![\w.])[-+]?\s?[$€£¥]?(?:\d+\s*/\s*\d+|{_NUMBER}(?:e[-+]?\d+)?)(?:\s*(?:%|percent\b|thousand\b|million\b|billion\b|trillion\b))?", re.IGNORECASE
)


@record
class Quantity:
    """A number with the base unit that it is in ("" for none): 5 km is 5000 m, 50 % is 1/2."""

    value: Fraction
    unit: str = ""


def show_number(value: Fraction) -> str:
    """A decimal where it ends within twelve places, else a fraction: 42, -0.5, 1/3."""
    if value.denominator == 1:
        return str(value.numerator)
    for places in range(1, 13):
        if 10**places % value.denominator == 0:
            digits = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}d}"
            return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"
    return f"{value.numerator}/{value.denominator}"


def _decimal(digits: str) -> Fraction:
    """Separators read: the last of two kinds is the decimal one; one comma followed by exactly three digits groups thousands."""
    digits = re.sub(r"[\u00a0\u202f ]", "", digits)
    comma, point = digits.rfind(","), digits.rfind(".")
    if comma >= 0 and point >= 0:
        digits = digits.replace(".", "").replace(",", ".") if comma > point else digits.replace(",", "")
    elif comma >= 0:
        grouped = re.fullmatch(r"[1-9]\d{0,2}(?:,\d{3})+", digits)
        digits = digits.replace(",", "" if grouped else ".")
    elif digits.count(".") > 1:
        digits = digits.replace(".", "")
    return Fraction(digits.rstrip(".") or "0")


def _tidy(text: str) -> str:
    text = re.sub(r"[−–‐‑]", "-", text.strip())
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r" \1 ", text)
    text = _FRAC.sub(lambda m: f"({m[1] or m[2]})/({m[3] or m[4]})", text)
    text = re.sub(r"\(\s*([-+]?[\d.]+)\s*\)", r"\1", text)
    text = re.sub(r"\\(?:left|right|displaystyle|quad|[,;! ])|\\(?=[%$])|\^\s*\{?\\circ\}?", lambda m: "°" if "circ" in m[0] else "", text)
    text = re.sub(r"(?<=\d)\{,\}(?=\d)", ",", text)
    text = text.replace("½", " 1/2").replace("¼", " 1/4").replace("¾", " 3/4")
    return " ".join(text.strip(" .;:!*_`~≈=").split())


def _in_words(text: str) -> Fraction | None:
    """ "minus forty-two", "one hundred and five", "two thirds", "three and a half", "2.5 million"."""
    words = text.lower().replace("-", " ").split()
    sign = -1 if words and words[0] in ("minus", "negative") else 1
    words = words[1:] if sign < 0 else words
    if not words:
        return None
    if words[-1] in _PARTS:
        whole = Fraction(0)
        if "and" in words[:-1]:
            cut = len(words) - 1 - words[::-1].index("and")
            before = _in_words(" ".join(words[:cut]))
            if before is None:
                return None
            whole, words = before, words[cut + 1 :]
        top = Fraction(1) if words[:-1] in ([], ["a"], ["an"]) else _in_words(" ".join(words[:-1]))
        return None if top is None else sign * (whole + top / _PARTS[words[-1]])
    whole_number = _counted(words)
    return None if whole_number is None else sign * whole_number


def _counted(words: list[str]) -> Fraction | None:
    """A number without sign and parts."""
    total, part, seen = Fraction(0), Fraction(0), False
    for i, word in enumerate(words):
        if word == "and" and seen:
            continue
        if word in ("a", "an") and i == 0 and len(words) > 1:
            part = Fraction(1)
        elif word in _WORDS:
            value = _WORDS[word]
            if part % 100 and not (word == "dozen" or (part % 100 >= 20 and part % 10 == 0 and value < 10)):
                return None  # "one two" and "one and two" are two numbers
            part = part * value if word == "dozen" and part else part + value
        elif word == "hundred":
            part = (part or Fraction(1)) * 100
        elif word in _SCALES:
            total, part = total + (part or Fraction(1)) * _SCALES[word], Fraction(0)
        elif re.fullmatch(_NUMBER, word) and not seen and len(words) > 1:
            part = _decimal(word)
        else:
            return None
        seen = True
    return total + part


def _ten(power: int) -> Fraction:
    return Fraction(10**power) if power >= 0 else Fraction(1, 10**-power)


def _bare(text: str) -> tuple[Fraction, str] | None:
    """A number without unit words; with the currency sign that it bears."""
    if match := _RATIO.fullmatch(text):
        if int(match["bottom"]) == 0:
            return None
        value = Fraction(match["whole"] or 0) + Fraction(int(match["top"]), int(match["bottom"]))
        return (-value if match["sign"] == "-" else value), ""
    if match := _POWER.fullmatch(text):
        value = (_decimal(match["digits"]) if match["digits"] else Fraction(1)) * _ten(int(match["power"]))
        return (-value if match["sign"] == "-" else value), ""
    if match := _PLAIN.fullmatch(text.lower()):
        value = _decimal(match["digits"])
        if match["exponent"]:
            value *= _ten(int(match["exponent"][1:]))
        return (-value if "-" in (match["sign"], match["sign2"]) else value), match["currency"]
    words = _in_words(text)
    return None if words is None else (words, "")


def _suffixes(text: str) -> list[tuple[str, str, Fraction]]:
    """(rest, base unit, factor) for each unit that the text may end with, the longest first, and for none."""
    low = text.lower()
    found = [("", text, "", Fraction(1))]
    for name, (base, factor) in _UNITS.items():
        if low.endswith(name) and (not name[0].isalpha() or re.search(r"[\d\s)]$", low[: -len(name)])):
            found.append((name, text[: -len(name)].strip(), base, factor))
    return [(rest, base, factor) for name, rest, base, factor in sorted(found, key=lambda one: -len(one[0])) if rest]


def quantity(text: str, unit: str = "") -> Quantity | None:
    """The number that a text wholly is, None where it is anything else.

    Args:
        text: "forty-two", "$1,234.56", "1 1/2 km", "50 %", r"\\frac{1}{2}", "3 × 10^8".
        unit: what a number without a unit is taken in ("km").
    """
    text = _tidy(text)
    if not text or len(text) > 80:
        return None
    percent = re.search(r"\s*(?:%|percent|per cent)$", text, re.IGNORECASE)
    if percent:
        found = _bare(text[: percent.start()].strip())
        return None if found is None else Quantity(value=found[0] / 100)
    if text[0] in "$€£¥" and " " in text:  # "$1.5 million"
        amount = _in_words(text[1:])
        if amount is not None:
            return Quantity(value=amount, unit=_UNITS[text[0]][0])
    for rest, base, factor in _suffixes(text):
        found = _bare(rest)
        if found is None:
            continue
        value, currency = found
        if currency and base:
            continue
        of_currency = (_UNITS[currency][0], Fraction(1)) if currency else (base, factor)
        found_unit, times = of_currency if of_currency[0] or not unit else _UNITS.get(unit.lower(), (unit.lower(), Fraction(1)))
        return Quantity(value=value * times, unit=found_unit)
    return None


def last_quantity(text: str, unit: str = "") -> Quantity | None:
    """The last number in a text, None where there is none: the usual reading of a worked solution without an announced answer."""
    found = [quantity(match.group(), unit) for match in _FIND.finditer(re.sub(r"[−–]", "-", text))]
    return next((one for one in reversed(found) if one is not None), None)
