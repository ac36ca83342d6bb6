"""Scorers: functions from (example, completion) to a `Score`, by name in `scorers`.

A score of None means that the measure does not apply to the example. A scorer sees text only; this file knows no model, no files and no
statistics. Perplexity is no scorer, since it needs the model: see `evaluate(perplexity=True)`.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from decimal import Decimal
from importlib.util import find_spec

from ..plugins import Registry
from ..protocols import Scorer
from ..records import Completion, Dataset, Example, Score
from .claims import cited_documents, parse_claims
from .labels import labels_of, stated_label, target_label

__all__ = [
    "CLAIM_SCORERS",
    "citation_accuracy",
    "contains",
    "exact_match",
    "f1",
    "label_accuracy",
    "numeric",
    "prompt_text",
    "schema_compliance",
    "scorers",
    "usual_scorers",
]

_NAMES = ("exact_match", "label_accuracy", "f1", "numeric", "contains", "schema_compliance", "citation_accuracy")
_CLAIM_NAMES = ("circuit_rank", "cyclic", "polarity_conflict")
_PERSISTENCE_NAMES = ("longest_hole", "total_persistence")
_VALIDATION_NAMES = ("chirality", "invented_documents", "validation_lexical")
scorers: Registry[Scorer] = Registry(
    "scorer",
    {
        **{name: f"crucible_framework.evaluation.scoring:{name}" for name in _NAMES},
        **{name: f"crucible_framework.evaluation.claims:{name}" for name in _CLAIM_NAMES},
        **{name: f"crucible_framework.evaluation.persistence:{name}" for name in _PERSISTENCE_NAMES},
        **{name: f"crucible_framework.evaluation.validation:{name}" for name in _VALIDATION_NAMES},
        "passes_tests": "crucible_framework.evaluation.sandbox:passes_tests",
        "passes_tests_unsafely": "crucible_framework.evaluation.sandbox:passes_tests_unsafely",
    },
)
"""Names to scorers; `scorers.register("mine")` adds one."""


CLAIM_SCORERS = (
    "schema_compliance", "citation_accuracy", "invented_documents", "cyclic", "circuit_rank", "polarity_conflict", "validation_lexical",
)  # fmt: skip
"""What is asked of texts of claims; the last says in its name that no model judged."""


def usual_scorers(rows: Dataset) -> tuple[str, ...]:
    """The scorers for a data set where none are named: those of claims for a task "extract" (of persistence too, with gudhi), else `label_accuracy`."""
    if rows.card.task != "extract":
        return ("label_accuracy",)
    return (*CLAIM_SCORERS, *(_PERSISTENCE_NAMES if find_spec("gudhi") else ()))


def prompt_text(example: Example) -> str:
    """The example's prompt as one text; the turns of a chat are set apart by empty lines."""
    if isinstance(example.prompt, str):
        return example.prompt
    return "\n\n".join(f"{message.role}: {message.content}" for message in example.prompt)


# ---------------------------------------------------------------------------------------------------------------- text
def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def exact_match(example: Example, completion: Completion) -> Score:
    """1 where completion and target are the same text up to white space; case and punctuation count."""
    return Score(name="exact_match", value=float(_plain(completion.text) == _plain(example.target)))


def contains(example: Example, completion: Completion) -> Score:
    """1 where the target occurs in the completion as whole words, whatever the case; None for an empty target."""
    target = _plain(example.target).casefold()
    if not target:
        return Score(name="contains", value=None, detail="the target is empty")
    left, right = (r"(?<!\w)" if target[0].isalnum() else ""), (r"(?!\w)" if target[-1].isalnum() else "")
    found = re.search(left + re.escape(target) + right, _plain(completion.text).casefold())
    return Score(name="contains", value=float(found is not None))


def _squad_tokens(text: str) -> list[str]:
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def f1(example: Example, completion: Completion) -> Score:
    """Token F1 of SQuAD: lower case, without punctuation and articles; where either side is empty, 1 if both are, else 0.

    Source: Rajpurkar et al. 2016, arXiv 1606.05250, with the normalisation of its official script.
    """
    said, target = _squad_tokens(completion.text), _squad_tokens(example.target)
    if not said or not target:
        return Score(name="f1", value=float(said == target))
    common = sum((Counter(said) & Counter(target)).values())
    return Score(name="f1", value=2 * common / (len(said) + len(target)))


_NUMBER = re.compile(
    r"(?:(?<![\w.)\]])(?P<sign>[-\u2212+]))?(?:[$€£]\s?)?"
    r"(?<![0-9A-Za-z_])(?<![0-9A-Za-z_]\.)(?<![0-9],)"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)(?P<exponent>[eE][-+]?[0-9]{1,3}(?![0-9]))?(?P<percent>\s?\\?%)?"
)


def _answer_number(text: str) -> tuple[Decimal, bool] | None:
    """The number after the first `####` on its line, where there is one, else the last of the text; and whether a percent sign follows."""
    _, marker, rest = text.partition("####")
    found = _NUMBER.search(rest.lstrip().split("\n", 1)[0]) if marker else None
    for last in _NUMBER.finditer(text) if found is None else ():
        found = last
    if found is None:
        return None
    value = Decimal(found["digits"].replace(",", "") + (found["exponent"] or ""))
    return (-value if found["sign"] in ("-", "\u2212") else value), found["percent"] is not None


def numeric(example: Example, completion: Completion) -> Score:
    """1 where the number that the completion ends in equals that of the target; None where the target has none.

    A text's number is the first in the line after `####` (the mark of GSM8K), and without that mark the last of the text. Signs that
    touch the number and every decimal count (-5 is not 5, 3.5 is not 35, 3.14 is not 3.1416); commas between thousands, currency signs and
    exponents are read. A percent sign on one side only is either dropped or divides by 100, so 12% answers both 12 and 0.12. Fractions
    (1/2) are not read as one number.

    Source: the answer format of Cobbe et al. 2021, arXiv 2110.14168.
    """
    target, said = _answer_number(example.target), _answer_number(completion.text)
    if target is None:
        return Score(name="numeric", value=None, detail="the target has no number")
    if said is None:
        return Score(name="numeric", value=0.0, detail="no number")
    right = said[0] == target[0]
    if said[1] != target[1]:
        right = right or (said[0].scaleb(-2) == target[0] if said[1] else said[0] == target[0].scaleb(-2))
    return Score(name="numeric", value=float(right), detail=f"{str(said[0])[:40]}{'%' if said[1] else ''}")


# -------------------------------------------------------------------------------------------------------------- labels
def label_accuracy(example: Example, completion: Completion) -> Score:
    """1 where the label that the completion states is the target; none or an ambiguous one is wrong, and `detail` says so.

    None where the target itself is no label of the example. See `stated_label` for what counts as stating, and `labels_of` for the labels.
    """
    labels = labels_of(example)
    target = target_label(example)
    if target is None:
        return Score(name="label_accuracy", value=None, detail=f"the target {example.target[:40]!r} is none of {', '.join(labels)}")
    said, reason = stated_label(completion.text, labels)
    return Score(name="label_accuracy", value=float(said == target), detail=said or reason)


# -------------------------------------------------------------------------------------------------------------- claims
def schema_compliance(example: Example, completion: Completion) -> Score:
    """1 where the whole completion follows the claim layout; `detail` names the first fault.

    Each line that is not empty is `CLAIM[c1]: …`, `CLAIM[c2] (Document 12): …` or `RELATION: c2 supports|refutes c1`; the first claim is
    c1, no claim comes twice, and relations name claims that are there. Relations may be absent.
    """
    del example
    faults = parse_claims(completion.text).faults
    return Score(name="schema_compliance", value=float(not faults), detail=faults[0].text if faults else "")


def citation_accuracy(example: Example, completion: Completion) -> Score:
    """The share of the different document ids that the completion cites ("Document 12") which occur in the prompt.

    0 where it cites none and the target does; None where neither cites. Whether a document bears the claim out is not looked at.
    """
    cited, target = cited_documents(completion.text), cited_documents(example.target)
    if not cited:
        detail = "cites nothing, the target does" if target else "nothing to cite"
        return Score(name="citation_accuracy", value=0.0 if target else None, detail=detail)
    known = cited_documents(prompt_text(example))
    invented = [name for name in cited if name not in known]
    detail = f"not in the prompt: {', '.join(invented)}" if invented else ""
    return Score(name="citation_accuracy", value=1 - len(invented) / len(cited), detail=detail)
