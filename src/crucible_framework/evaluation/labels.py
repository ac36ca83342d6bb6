"""Reading a label out of free text, by rules that favour neither a model that answers with the bare label nor one that answers in prose.

The rules are fixed and few, and `docs/statistics.md` shows them with examples. They read words, not meaning: this file knows no model.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence

from ..records import Example, record

__all__ = ["DEFAULT_LABELS", "labels_of", "stated_label", "target_label"]

DEFAULT_LABELS = ("SUPPORT", "CONTRADICT", "NOT_ENOUGH_INFO")
_S = r"support(?:s|ed|ing)?"
_C = r"(?:contradict(?:s|ed|ing|ion|ory)?|refute(?:s|d)?|refuting)"
_NOT = r"(?:not|cannot|[a-z]{2,8}n['’]t)"
_FORMS = {
    "SUPPORT": _S,
    "CONTRADICT": _C,
    "NOT_ENOUGH_INFO": (
        r"not?[\s_-]*(?:enough|sufficient)[\s_-]*(?:info(?:rmation)?|evidence)|(?:insufficient|inadequate)[\s_-]+(?:info(?:rmation)?|evidence)|nei"
        rf"|{_NOT}(?:\s+\w+){{0,3}}\s+(?:enough|sufficient)\s+(?:info(?:rmation)?|evidence)"
        r"|(?:cannot|can['’]t|can\s+not)\s+be\s+(?:determined|decided)"
        rf"|(?:neither|{_NOT})(?:\s+\w+){{0,2}}\s+(?:{_S}\s+n?or\s+(?:\w+\s+)?{_C}|{_C}\s+n?or\s+(?:\w+\s+)?{_S})"
    ),
}
_GAP = r"(?:[ \t_*\"']|-(?![ \t]))+"
_DENIED = re.compile(
    rf"(?:\b(?:not(?!\s+only)|never|no|nor|neither|cannot|without|unable|fails?|failed|lacks?|non|un)|n['’]t)"
    rf"(?:{_GAP}(?!(?:but|rather|instead)\b)\w+){{0,3}}{_GAP}$",
    re.IGNORECASE,
)
_OPEN = re.compile(r"\b(?:if|whether)\b[^.;!?\n]{0,80}$", re.IGNORECASE)
_ANNOUNCED = re.compile(r"\b(?:answer|label|verdict|conclusion)\b(?:\s+is\b)?[\s:*_\"'`([=-]*$", re.IGNORECASE)
_ALSO = re.compile(r"(?:[ \t]+\w+){0,3}?\W*\b(?:or|nor)\W+(?:to\s+)?(?:\w+\s+)?", re.IGNORECASE)
_BETWEEN = re.compile(r"(?:[\W_]|\b(?:or|and)\b|\b[0-9a-c]\b)*", re.IGNORECASE)
_CLAUSE_END = re.compile(r"[.;:!?\n(—–]|\s-+\s|\b(?:because|since)\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?\n]|$")


@record
class _Mention:
    """A label's form in the text."""

    label: str
    start: int
    end: int
    denied: bool


def labels_of(example: Example) -> tuple[str, ...]:
    """The labels that the example may have: `meta["labels"]`, else SUPPORT, CONTRADICT and NOT_ENOUGH_INFO."""
    given = example.meta.get("labels")
    named = tuple(str(label) for label in given if str(label).strip()) if isinstance(given, list) else ()
    return named or DEFAULT_LABELS


def target_label(example: Example) -> str | None:
    """The label that the example's target is, None where the target is another text."""
    text = example.target.strip()
    return next((label for label, pattern in _patterns(labels_of(example)).items() if pattern.fullmatch(text)), None)


def _family(label: str) -> str | None:
    return next((name for name, forms in _FORMS.items() if re.fullmatch(forms, " ".join(re.split(r"[\s_-]+", label.strip())), re.IGNORECASE)), None)


@functools.lru_cache(maxsize=256)
def _patterns(labels: tuple[str, ...]) -> dict[str, re.Pattern[str]]:
    families = Counter(_family(label) for label in labels)
    patterns: dict[str, re.Pattern[str]] = {}
    for label in labels:
        family = _family(label)
        literal = r"[\s_-]*".join(re.escape(part) for part in re.split(r"[\s_-]+", label.strip()) if part) or re.escape(label.strip())
        forms = f"{literal}|{_FORMS[family]}" if family is not None and families[family] == 1 else literal
        flags = re.NOFLAG if len(label.strip()) == 1 else re.IGNORECASE
        article = r"(?!\s+(?!is\b)[a-z])" if label.strip() in ("A", "I") else ""  # "A study found" states no label
        patterns[label] = re.compile(rf"(?<![^\W_])(?:{forms})(?![^\W_]){article}", flags)
    return patterns


def _mentions(text: str, labels: tuple[str, ...]) -> list[_Mention]:
    """Every label form in order, the longest first where two start together, each with whether something denies it."""
    spans = sorted((match.start(), -match.end(), label) for label, pattern in _patterns(labels).items() for match in pattern.finditer(text))
    found: list[_Mention] = []
    for start, minus_end, label in spans:
        if found and start < found[-1].end:  # inside a longer form ("neither supports nor contradicts")
            continue
        before = max(found[-1].end if found else 0, start - 100)
        denied = (
            _DENIED.search(text, before, start) is not None
            or _OPEN.search(text, before, start) is not None
            or _is_question(text, -minus_end)
            or (bool(found) and found[-1].denied and _ALSO.fullmatch(text, found[-1].end, start) is not None)
        )
        found.append(_Mention(label=label, start=start, end=-minus_end, denied=denied))
    return found


def _is_question(text: str, end: int) -> bool:
    stop = _SENTENCE_END.search(text, end, min(len(text), end + 300))
    return stop is not None and stop.group() == "?"


def stated_label(text: str, labels: Sequence[str] = DEFAULT_LABELS) -> tuple[str | None, str]:
    """The label that a text states, with a word on why where there is none.

    1. Forms: case, and spaces, underscores or hyphens between words, do not matter (a label of one letter must have its case). Of support,
       contradict (refute) and not enough info the natural forms count too: "supported", "refutes", "insufficient evidence", "neither
       supports nor contradicts".
    2. Not stated is what the same clause denies ("not supported", "fails to support"), leaves open ("whether it supports …") or asks
       ("Does the passage support the claim?").
    3. The first stated label counts; where one is announced ("Answer: …", "the label is …"), the first announced one.
    4. Ambiguous, hence none: another label in the same clause ("supports or maybe contradicts"), or with only separators, "or" or "and"
       between (a list of the labels). Words after "because", a colon or a full stop explain and are not looked at; nor is what follows
       "not enough information" in its clause ("… to support the claim").

    Returns:
        (label, "") or (None, reason).
    """
    mentions = _mentions(text, tuple(labels))
    stated = [mention for mention in mentions if not mention.denied]
    if not stated:
        return None, f"not stated, only denied, left open or asked: {text[mentions[0].start : mentions[0].end]!r}" if mentions else "no label"
    first = next((mention for mention in stated if _ANNOUNCED.search(text, max(0, mention.start - 60), mention.start)), stated[0])
    other = next((mention for mention in stated if mention.start >= first.end and mention.label != first.label), None)
    if other is not None:
        listed = _BETWEEN.fullmatch(text, first.end, other.start) is not None
        same_clause = _family(first.label) != "NOT_ENOUGH_INFO" and _CLAUSE_END.search(text, first.end, other.start) is None
        if listed or same_clause:
            return None, f"ambiguous: {text[first.start : first.end]!r} and {text[other.start : other.end]!r}"
    return first.label, ""
