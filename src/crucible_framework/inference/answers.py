"""When two answers are the same: every text is brought to a normal form, and equal forms are equal answers. Knows no models.

Since sameness is equality of normal forms it is transitive: "42" and "43" can never meet through a third text, which similarity
thresholds allow. Meaning beyond the rules comes in through `merge_by_meaning`, with any embedding or entailment model as a function.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Literal, TypeAlias

from ..errors import ConfigError
from ..records import record
from .quantities import last_quantity, quantity, show_number

__all__ = ["Equal", "Kind", "Reading", "by_embedding", "merge_by_meaning", "read_answer", "read_ranking", "same_answer"]

Kind: TypeAlias = Literal["auto", "text", "number", "choice", "boolean", "date", "json"]
Equal: TypeAlias = Callable[[str, str], bool]
"""Does the second text follow from the first? Asked in both directions."""
_MONTHS = ["january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november", "december"]
_MONTH = r"(?P<month>" + "|".join(f"{name[:3]}(?:{name[3:]})?" for name in _MONTHS) + r")\.?"
_DATES = (
    re.compile(r"(?P<year>\d{4})[-/.](?P<m>\d{1,2})[-/.](?P<day>\d{1,2})"),
    re.compile(rf"{_MONTH}\s+(?P<day>\d{{1,2}})(?:st|nd|rd|th)?,?\s+(?P<year>\d{{4}})", re.IGNORECASE),
    re.compile(rf"(?:the\s+)?(?P<day>\d{{1,2}})(?:st|nd|rd|th)?(?:\s+of)?\s+{_MONTH},?\s+(?P<year>\d{{4}})", re.IGNORECASE),
    re.compile(rf"{_MONTH},?\s+(?P<year>\d{{4}})", re.IGNORECASE),
    re.compile(r"(?P<a>\d{1,2})[-/.](?P<b>\d{1,2})[-/.](?P<year>\d{4})"),
)
_UNKNOWN = re.compile(
    r"(?:(?:i'?m|i am)\s+(?:sorry|afraid)\W+(?:but\s+)?)?(?:i\s+(?:really\s+|just\s+|honestly\s+)?(?:do\s+not|don'?t|cannot|can'?t|could\s+not|couldn'?t)"
    r"\s+(?:know|tell|say|answer|determine|be\s+(?:sure|certain)|help)\b.*|i\s+have\s+no\s+idea\b.*|no\s+idea|i(?:'?m|\s+am)\s+(?:not\s+(?:sure|certain)|unsure|uncertain)\b.*"
    r"|(?:it\s+)?(?:cannot|can'?t|can\s+not)\s+be\s+(?:determined|known|answered)\b.*|(?:it\s+is\s+)?impossible\s+to\s+(?:say|tell|know)\b.*"
    r"|maybe|perhaps|possibly|unsure|uncertain|unclear|unknown|not\s+sure|n/?a|none\s+given|no\s+answer|idk|\?+|-+)",
    re.IGNORECASE | re.DOTALL,
)
_ANNOUNCED = re.compile(
    r"(?:\b(?:final\s+|correct\s+|right\s+)?(?:answer|result|verdict|conclusion|solution)\b\s*(?:\*\*)?\s*(?:is|are|was|would\s+be|should\s+be|:|=)|####)"
    r"\s*:?\s*(?P<answer>[^\n]+)",
    re.IGNORECASE,
)
_YES = r"yes|yeah|yep|yup|y|true|correct|right|affirmative|absolutely|definitely|certainly|indeed|of\s+course|agreed|sure"
_NO = r"no|nope|nah|n|false|incorrect|wrong|untrue|negative|never|disagreed"
_LEADING = re.compile(
    rf"(?P<deny>(?:not|absolutely\s+not|definitely\s+not|certainly\s+not|of\s+course\s+not)\b)?\W*(?:(?P<yes>{_YES})|(?P<no>{_NO}))(?=\W|$)", re.IGNORECASE
)
_STATED = re.compile(
    r"\b(?:is|are|was|were|be|'s|seems?|appears?|that's|it's)\s+(?:\w+ly\s+)?(?P<deny>(?:not|never|n't)\s+)?(?:\w+ly\s+)?(?:(?P<yes>true|correct|right)|(?P<no>false|incorrect|wrong|untrue))\b"
    r"|\b(?:isn't|aren't|wasn't|weren't)\s+(?:\w+ly\s+)?(?:(?P<no2>true|correct|right)|(?P<yes2>false|incorrect|wrong|untrue))\b",
    re.IGNORECASE,
)
_THINK = re.compile(r"\bi\s+(?P<deny>(?:do\s+not|don'?t)\s+)?(?:think|believe)\s+so\b", re.IGNORECASE)
_CHOICE = re.compile(r"(?:\b(?:option|choice|answer|letter)\s*:?\s*)?[(\[*]*(?P<letter>[A-Z])[)\]*]*(?:[.:)]+(?:\s.*)?|\s*[-–]\s.*)?", re.DOTALL)


@record
class Reading:
    """How answers to a question are read.

    Attributes:
        kind: "auto" tries choice, JSON, number, date, yes/no and text, in this order.
        choices: letter → text of a multiple choice; the letter, the text and "B. text" are then one answer.
        unit: what a number without a unit is taken in.
        day_first: whether 03/04/2024 is the third of April; None leaves such dates as text.
    """

    kind: Kind = "auto"
    choices: Mapping[str, str] | None = None
    unit: str = ""
    day_first: bool | None = None


def _boxed(text: str) -> str | None:
    r"""The contents of the last \boxed{…}, braces balanced."""
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        return None
    start = text.index("{", start) + 1
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return text[start:end]
    return None


def _stated(text: str) -> str:
    """The part that states the answer: the last box, else after the last "the answer is", else all."""
    text = text.strip()
    boxed = _boxed(text)
    if boxed is not None:
        return boxed.strip()
    found = [match["answer"].strip() for match in _ANNOUNCED.finditer(text)]
    part = found[-1] if found else text
    if found:
        sentence = re.match(r".*?(?:[^\W\d_]{4}|[\d)%}$])[.!?](?=\s)", part)  # not after "St." or "Dr."
        part = sentence.group() if sentence and not re.match(r"[(\[]?[A-Z][.)\]]", part) else part
    for open_, close in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"), ('"', '"')):
        inner = part.strip().rstrip(".")
        if "```" not in inner and len(inner) > len(open_) + len(close) and inner.startswith(open_) and inner.endswith(close):
            part = inner[len(open_) : -len(close)]
    return part.strip()


def _text(text: str) -> str | None:
    plain = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    plain = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}", r"\1", plain)
    plain = re.sub(r"[*`]+", "", plain).replace("_", " ")
    plain = re.sub(r"^(?:it\s+is|it's|this\s+is)\s+", "", plain.strip())
    plain = re.sub(r"^(?:a|an|the)\s+(?=\S)", "", plain)
    return " ".join(plain.split()).strip(" .,;:!?\"'()[]") or None


def _number(text: str, reading: Reading, *, anywhere: bool) -> str | None:
    whole = text.rsplit("=", 1)[-1] if "=" in text and not re.search(r"[<>!]=", text) else text
    found = quantity(whole, reading.unit) or (last_quantity(text, reading.unit) if anywhere else None)
    return None if found is None else f"{show_number(found.value)} {found.unit}".strip()


def _boolean(text: str, *, anywhere: bool) -> str | None:
    """ "yes" or "no": a leading word decides, else every statement ("is not true") where they agree."""
    text = text.strip(" .!*_\"'`").replace("’", "'")
    lead = _LEADING.match(text)
    if lead and (anywhere or lead.end() == len(text) or re.match(r"\s*[,.;:!—–-]|\s+(?:it|that|this|the|they|he|she|i)\b", text[lead.end() :])):
        return "yes" if (lead["yes"] is not None) != bool(lead["deny"]) else "no"
    found = {"yes" if bool(one["yes"] or one["yes2"]) != bool(one["deny"]) else "no" for one in _STATED.finditer(text)}
    found |= {"no" if one["deny"] else "yes" for one in _THINK.finditer(text)}
    found = found if anywhere or len(text.split()) <= 12 else set()
    return found.pop() if len(found) == 1 else None


def _choice(text: str, reading: Reading) -> str | None:
    if reading.choices:
        plain = _text(text)
        same = [letter for letter, words in reading.choices.items() if plain is not None and plain == _text(words)]
        if len(same) == 1:
            return same[0]
    match = _CHOICE.fullmatch(text.strip(" .*"))
    if match is None or match["letter"] not in (reading.choices or "ABCDEFGH"):
        return None
    return match["letter"]


def _date(text: str, reading: Reading) -> str | None:
    plain = text.strip(" .!*")
    for pattern in _DATES:
        match = pattern.fullmatch(plain)
        if match is None:
            continue
        part = match.groupdict()
        if "a" in part:
            a, b = int(part["a"]), int(part["b"])
            first = True if a > 12 else False if b > 12 else reading.day_first
            if first is None:
                return None
            month, day = (b, a) if first else (a, b)
        else:
            month = int(part["m"]) if part.get("m") else [name[:3] for name in _MONTHS].index(str(part["month"])[:3].lower()) + 1
            day = int(part["day"]) if part.get("day") else 0
        if not (1 <= month <= 12 and day <= 31):
            return None
        return f"{int(part['year']):04d}-{month:02d}" + (f"-{day:02d}" if day else "")
    return None


def _dump(value: object) -> str:
    """JSON with sorted keys and every number in its normal form, so that 1.0 and 1 are one and 1 and "1" are two."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key, ensure_ascii=False)}:{_dump(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_dump, value)) + "]"
    if isinstance(value, Decimal):
        return show_number(Fraction(value)) if value.is_finite() else str(value)
    return json.dumps(value, ensure_ascii=False)


def _json(text: str) -> str | None:
    fenced = re.search(r"```(?:json)?\s*\n(.*?)```", text, re.DOTALL)
    inner = (fenced[1] if fenced else text).strip()
    if not inner.startswith(("{", "[")):
        return None
    try:
        value = json.loads(inner, parse_float=Decimal, parse_int=Decimal, parse_constant=Decimal)
    except (ValueError, RecursionError):
        return None
    return _dump(value)


def read_answer(text: str, reading: Reading | Kind = "auto") -> str | None:
    r"""The normal form of the answer that a text gives; None where it gives none ("I don't know", nothing of the kind that was asked).

    What is read is the last `\boxed{…}`, else what follows "the answer is" or "####", else the whole text. Then, by kind:
    numbers exactly (4, 4.0, "four", 8/2; 50 % = 0.5; 5 km = 5000 m; 1,234.5 = 1.234,5), yes/no with negation ("not true" is "no"),
    dates as 2024-03-05, choices as their letter, JSON without regard to order, anything else as text without case, markup, a leading
    article and punctuation at its ends. Kind "number" takes the last number of a text that announces none.
    """
    how = Reading(kind=reading) if isinstance(reading, str) else reading
    part = _stated(text)
    announced = part != text.strip()
    if how.kind == "json":
        return _json(text) or _json(part)
    if how.kind == "choice" or how.choices or how.kind == "auto":
        found = _choice(part, how)
        if found is not None or how.kind == "choice":
            return found
    if _UNKNOWN.fullmatch(part.strip(" .!*").replace("’", "'")) or not part.strip(" .!?*\"'"):
        return "no" if how.kind in ("auto", "boolean") and _THINK.search(part) else None
    if how.kind == "number":
        return _number(part, how, anywhere=True)
    if how.kind == "boolean":
        return _boolean(part, anywhere=True)
    if how.kind == "date":
        return _date(part, how)
    if how.kind == "text":
        return _text(part)
    return _json(part if announced else text) or _number(part, how, anywhere=False) or _date(part, how) or _boolean(part, anywhere=False) or _text(part)


def read_ranking(text: str, reading: Reading | Kind = "text") -> tuple[str, ...]:
    """Several answers, best first: "A > B > C", one a line (numbered, bulleted or bare), or separated by commas; each in normal form, once."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    listed = [match[1] for line in lines if (match := re.fullmatch(r"(?:\(?\d{1,2}[.):]|[-*•])\s*(.+)", line))]
    if len(listed) < 2:
        part = _stated(text)
        listed = part.split(">") if ">" in part else lines if len(lines) > 1 else part.split(",")
    found = (read_answer(one.strip(), reading) for one in listed)
    return tuple(dict.fromkeys(one for one in found if one is not None))


def same_answer(first: str, second: str, reading: Reading | Kind = "auto") -> bool:
    """Whether two texts give the same answer; two that give none are not the same."""
    one = read_answer(first, reading)
    return one is not None and one == read_answer(second, reading)


def merge_by_meaning(answers: Sequence[str | None], equal: Equal) -> tuple[str | None, ...]:
    """Gives answers of one meaning one name: that of the first of them in sorted order.

    An answer joins a group only where `equal` holds with every member of it in both directions, so chains of small differences do not merge.
    Source: bidirectional entailment clusters of Kuhn et al. 2023, arXiv 2302.09664; complete linkage instead of the first match.
    """
    groups: list[list[str]] = []
    for answer in sorted({answer for answer in answers if answer is not None}):
        home = next((group for group in groups if all(equal(answer, one) and equal(one, answer) for one in group)), None)
        if home is None:
            groups.append([answer])
        else:
            home.append(answer)
    names = {answer: group[0] for group in groups for answer in group}
    return tuple(None if answer is None else names[answer] for answer in answers)


def by_embedding(embed: Callable[[str], Sequence[float]], threshold: float) -> Equal:
    """An `Equal` from an embedding: cosine similarity of at least `threshold`. Each text is embedded once.

    Raises:
        ConfigError: the threshold is not in (-1, 1].
    """
    import numpy as np

    if not -1 < threshold <= 1:
        raise ConfigError(f"The similarity threshold is {threshold!r}; expected a number in (-1, 1]. Choose it on labelled pairs; 0.9 is a start.")
    kept: dict[str, np.ndarray] = {}

    def unit(text: str) -> np.ndarray:
        if text not in kept:
            vector = np.asarray(embed(text), dtype=np.float64)
            kept[text] = vector / (float(np.linalg.norm(vector)) or 1.0)
        return kept[text]

    return lambda first, second: bool(unit(first) @ unit(second) >= threshold)
