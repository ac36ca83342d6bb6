"""From the text of a claim graph to what the structure losses need: which candidates stand at which token. No torch.

Reads lines `CLAIM[c2] (Document 123): …` and `RELATION: c2 supports c1` in the completion of a rendered datum. The text is found by decoding the
datum's own tokens, so any renderer and any sampled completion will do; a candidate's tokens are those that the tokenizer gives the line with that
candidate in it. Where they do not begin as the datum's tokens do (a tokenization that no encoder makes), that place is left out.

This file does not know losses, models or what a good graph is beyond directed cycles.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..protocols import Tokenizer
from ..records import Datum, record

__all__ = ["CITATION", "CLOSURE", "EVIDENCE", "NODES", "POLARITY", "SOURCE", "annotate_claims", "closing_targets"]

CLOSURE, NODES, SOURCE = "closure", "nodes", "source"
CITATION, POLARITY, EVIDENCE = "citation", "polarity", "evidence"
_CLAIM = re.compile(r"^[ \t]*CLAIM\[([^\]\n]+)\]", re.IGNORECASE | re.MULTILINE)
_RELATION = re.compile(r"^[ \t]*RELATION[ \t]*[:\-]?[ \t]*(\S+)[ \t]+(supports|refutes|contrasts)[ \t]+(\S+)[ \t]*$", re.IGNORECASE | re.MULTILINE)
_CITED = re.compile(r"\(Document[ \t]+(\d+)\)")
_GIVEN = re.compile(r"\bDocument[ \t]+(\d+)\s*:")
_KINDS = frozenset(["supports", "refutes"])
"""What a relation may always be; "contrasts" counts where it is written."""
_CUT = -1
"""Stands for the end of a text that was cut right after an id."""


@record
class _Text:
    """A completion: its text, the token at which each character begins, its first position in the datum, and its tokens."""

    text: str
    owner: tuple[int, ...]
    first: int
    tokens: tuple[int, ...]


@record
class _Choice:
    """One token at which candidates part: the position in the datum, and per candidate its token."""

    position: int
    tokens: Mapping[str, int]
    taken: int


def closing_targets(edges: Iterable[tuple[str, str]], source: str, nodes: Iterable[str]) -> frozenset[str]:
    """The nodes j for which an edge source → j would close a directed cycle: those that reach `source`, itself included."""
    before: dict[str, set[str]] = {}
    for start, end in edges:
        before.setdefault(end, set()).add(start)
    reached, todo = {source}, [source]
    while todo:
        for node in before.get(todo.pop(), set()) - reached:
            reached.add(node)
            todo.append(node)
    return frozenset(reached.intersection(nodes))


def _read(datum: Datum, tokenizer: Tokenizer) -> tuple[str, _Text]:
    """The prompt's text and the completion, decoded."""
    used = np.flatnonzero(datum.weights)
    first = int(used[0]) if used.size else len(datum)
    prompt = tokenizer.decode([int(token) for token in datum.tokens[: first + 1]])
    tokens = [int(token) for token in datum.targets[first:]]
    pieces = [tokenizer.decode([token]) for token in tokens]
    text = tokenizer.decode(tokens)
    if "".join(pieces) == text:
        ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    else:  # characters of several tokens, or spaces that depend on what stands before
        ends = np.array([len(tokenizer.decode(tokens[: i + 1])) for i in range(len(tokens))], dtype=np.int64)
    owner = np.searchsorted(ends, np.arange(len(text)), side="right")
    return prompt, _Text(text=text, owner=tuple(int(place) for place in owner), first=first, tokens=tuple(tokens))


def _choices(text: _Text, span: tuple[int, int], candidates: Iterable[str], tokenizer: Tokenizer) -> list[_Choice]:
    """Where on the text's path through `span` the candidates part; the first candidates are those that are written there."""
    start = text.text.rfind("\n", 0, span[0]) + 1
    written = text.text[span[0] : span[1]]
    if not text.text or start >= len(text.owner):
        return []
    begin = text.owner[start]
    path = tokenizer.encode(text.text[start : span[1]])
    if tuple(path) != text.tokens[begin : begin + len(path)]:
        return []
    end = text.tokens[begin + len(path)] if begin + len(path) < len(text.tokens) else _CUT  # what the text has after an id
    follows = {name: [*tokenizer.encode(text.text[start : span[0]] + name), end] for name in dict.fromkeys((written, *candidates))}
    known = [*path, end]
    alive = dict(follows)
    found = list[_Choice]()
    for i, token in enumerate(known):
        heads = {name: tokens[i] for name, tokens in alive.items()}
        if len(set(heads.values())) > 1:
            if _CUT in heads.values():
                break
            found.append(_Choice(position=text.first + begin + i, tokens=heads, taken=token))
        alive = {name: tokens for name, tokens in alive.items() if tokens[i] == token and len(tokens) > i + 1}
    return found


def _marks(choice: _Choice, bad: frozenset[str]) -> dict[str, int] | None:
    """+1 or −1 per candidate, by its token: bad where every id that it may become is; None where there is nothing to choose."""
    good = {token for name, token in choice.tokens.items() if name not in bad}
    marks = {name: 1 if token in good else -1 for name, token in choice.tokens.items()}
    return marks if len(set(marks.values())) == 2 else None


class _Table:
    """Columns per position, filled one by one."""

    def __init__(self, datum: Datum) -> None:
        self.datum = datum
        self.columns: dict[int, list[tuple[int, dict[str, float]]]] = {}
        self.flat: dict[str, NDArray[np.float32]] = {name: np.zeros(len(datum), dtype=np.float32) for name in (SOURCE, EVIDENCE)}
        self.cancelled: set[int] = set()

    def add(self, choice: _Choice, values: Mapping[str, Mapping[str, float]]) -> None:
        """`values`: per candidate what to mark it with, by extra."""
        cells = self.columns.setdefault(choice.position, [])
        cells += [(choice.tokens[name], dict(marks)) for name, marks in values.items()]

    def mark(self, choice: _Choice, name: str, marks: Mapping[str, int], also: Mapping[str, float] | None = None) -> None:
        """Marks of one extra, and `nodes` beside them; the text's own token no longer counts in cross-entropy where it is bad."""
        self.add(choice, {key: {name: value} | ({NODES: also[key]} if also else {}) for key, value in marks.items()})
        if any(value < 0 and choice.tokens[key] == choice.taken for key, value in marks.items()):
            self.cancelled.add(choice.position)

    def datum_with(self) -> Datum:
        """The datum with targets [T, K] and the extras."""
        datum = self.datum
        width = 1 + max(map(len, self.columns.values()), default=0) + bool(self.cancelled)
        targets = np.repeat(datum.targets[:, None], width, axis=1)
        weights = np.zeros(targets.shape, dtype=np.float32)
        weights[:, 0] = datum.weights
        extras = {name: np.zeros(targets.shape, dtype=np.float32) for name in (CLOSURE, NODES, CITATION, POLARITY)}
        for position, cells in self.columns.items():
            for column, (token, marks) in enumerate(cells, 1):
                targets[position, column] = token
                for name, value in marks.items():
                    extras[name][position, column] = value
        for position in self.cancelled:
            weights[position, -1] = -weights[position, 0]  # +w and −w on one token: computed, and nothing to learn for cross-entropy
        return replace(datum, targets=targets, weights=weights, extras={**datum.extras, **extras, **self.flat})


def _relations(text: _Text, table: _Table, tokenizer: Tokenizer, acyclic: frozenset[str]) -> None:
    declared = [(match.start(), match[1].lower()) for match in _CLAIM.finditer(text.text)]
    written: dict[str, str] = {}
    for match in _CLAIM.finditer(text.text):
        written.setdefault(match[1].lower(), match[1])
    number = {name: float(i) for i, name in enumerate(written, 1)}
    edges = list[tuple[str, str]]()
    for match in _RELATION.finditer(text.text):
        source, kind, target = match[1].lower(), match[2].lower(), match[3].lower()
        valid = dict.fromkeys(name for place, name in declared if place < match.start())
        if source in number and target in valid:
            every = acyclic.issuperset(_KINDS | {kind})  # no kind of relation may close a circle: then a source may be a mistake too
            closing = {name: closing_targets(edges, name, valid) for name in ([*valid, source] if every else [source])}
            lost = frozenset(name for name, bad in closing.items() if len(bad) == len(valid))  # whatever these support goes in a circle
            _openings(text, match, table, tokenizer, acyclic=acyclic, lost=lost, sources=[written[name] for name in valid] if every else ())
            if kind in acyclic:
                names = {written[name] if name != target else match[3]: name for name in valid}
                _targets(text, match.span(3), names, table, tokenizer, bad=closing[source], number=number, source=number[source])
                edges.append((source, target))
        if kind in ("supports", "refutes"):
            _polarity(text, match.span(2), kind, table, tokenizer)


def _openings(
    text: _Text, match: re.Match[str], table: _Table, tokenizer: Tokenizer, *, acyclic: frozenset[str], lost: frozenset[str], sources: Sequence[str]
) -> None:
    """Marks a relation's source and kind where they leave no target that does not close a cycle."""
    if sources and lost:
        _mark_all(_choices(text, match.span(1), sources, tokenizer), frozenset(name for name in (match[1], *sources) if name.lower() in lost), table)
    if match[1].lower() in lost:
        kinds = {name.upper() if match[2].isupper() else name: name for name in sorted(_KINDS)} | {match[2]: match[2].lower()}
        _mark_all(_choices(text, match.span(2), kinds, tokenizer), frozenset(shown for shown, name in kinds.items() if name in acyclic), table)


def _mark_all(choices: Iterable[_Choice], wrong: frozenset[str], table: _Table) -> None:
    for choice in choices:
        if (marks := _marks(choice, wrong)) is not None:
            table.mark(choice, CLOSURE, marks)


def _targets(
    text: _Text,
    span: tuple[int, int],
    names: Mapping[str, str],
    table: _Table,
    tokenizer: Tokenizer,
    *,
    bad: frozenset[str],
    number: Mapping[str, float],
    source: float,
) -> None:
    """Marks the candidates of a relation's target, and names their nodes at the token where they first part.

    Args:
        names: ids as they may be written, and as they compare.
    """
    wrong = frozenset(shown for shown, name in names.items() if name in bad)
    for i, choice in enumerate(_choices(text, span, names, tokenizer)):
        marks = _marks(choice, wrong)
        nodes = {shown: number[names[shown]] for shown in choice.tokens} if i == 0 else None
        if marks is not None:
            table.mark(choice, CLOSURE, marks, nodes)
        elif nodes is not None:
            table.add(choice, {shown: {NODES: node} for shown, node in nodes.items()})
        if wrong.issuperset(choice.tokens):
            table.cancelled.add(choice.position)
        if nodes is not None:
            table.flat[SOURCE][choice.position] = source


def _polarity(text: _Text, span: tuple[int, int], kind: str, table: _Table, tokenizer: Tokenizer) -> None:
    shown = text.text[span[0] : span[1]]
    other = "refutes" if kind == "supports" else "supports"
    choices = _choices(text, span, (other.upper() if shown.isupper() else other,), tokenizer)
    if choices:
        choice = choices[0]
        table.add(choice, {name: {POLARITY: 1.0 if name.lower() == "supports" else -1.0} for name in choice.tokens})
        table.flat[EVIDENCE][choice.position] = float(kind == "supports")


def _neighbours(documents: Iterable[str]) -> list[str]:
    """Every id that differs from one of these in one digit."""
    return [name[:i] + digit + name[i + 1 :] for name in documents for i in range(len(name)) for digit in "0123456789" if digit != name[i]]


def _citations(text: _Text, documents: Sequence[str], table: _Table, tokenizer: Tokenizer) -> None:
    for match in _CITED.finditer(text.text):
        candidates = [*documents, *_neighbours(documents)]
        wrong = frozenset({*candidates, match[1]}.difference(documents))
        for choice in _choices(text, match.span(1), candidates, tokenizer):
            marks = _marks(choice, wrong)
            if marks is not None:
                one_each = {choice.tokens[name]: name for name in marks}
                table.mark(choice, CITATION, {name: marks[name] for name in one_each.values()})


def annotate_claims(datum: Datum, tokenizer: Tokenizer, *, documents: Sequence[str] | None = None, acyclic: Sequence[str] = ("supports",)) -> Datum:
    """The datum with candidates [T, K] and extras for `topological`, `citation_validity` and `chirality`.

    Column 0 is the datum's own target with its weight. Where the text itself closes a cycle or cites an invented document, that token's weight is
    cancelled by a second column with the opposite weight: the position is computed, but cross-entropy does not learn the mistake.

    Valid targets of a relation are the claims declared before it; an id that is not declared, and everything after it on that line, is left out.
    Where every target would close a cycle, the kind before it is what closes it ("supports" is bad, "refutes" is not); where every kind would, the
    source is. Ids compare without case.

    Args:
        datum: rendered, with targets [T]; its completion are the positions from the first weight that is not 0.
        tokenizer: that it was rendered with.
        documents: ids that may be cited; those of "Document <id>:" in the prompt where None. Without any, citations are left out.
        acyclic: kinds of relation that must not close a cycle, among "supports", "refutes" and "contrasts".

    Raises:
        DataError: the datum's targets are not [T].
    """
    if datum.targets.ndim != 1:
        raise DataError(f"Datum {datum.id!r} has targets of shape {datum.targets.shape}; annotate_claims expected [T]. Give it the datum as rendered.")
    prompt, text = _read(datum, tokenizer)
    table = _Table(datum)
    if text.text:
        _relations(text, table, tokenizer, frozenset(acyclic))
        known = tuple(dict.fromkeys(_GIVEN.findall(prompt) if documents is None else documents))
        if known:
            _citations(text, known, table, tokenizer)
    return table.datum_with()
