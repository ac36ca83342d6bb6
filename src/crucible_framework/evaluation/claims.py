"""Claims and relations as text, and the shape of the graph that they make.

The layout, one statement a line:

    CLAIM[c1]: the central hypothesis
    CLAIM[c2] (Document 12): what that document says of it
    RELATION: c2 supports c1

This file knows text and graphs only: no models, no files, no data sets. Whether a claim is true is `validation.py`'s business.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Literal, TypeVar

from ..errors import DataError
from ..records import Completion, Example, Score, record

__all__ = [
    "Claim",
    "Claims",
    "Fault",
    "Relation",
    "Topology",
    "betti1",
    "chirality_score",
    "circuit_rank",
    "cited_documents",
    "cyclic",
    "directed_circuit_rank",
    "fisher_rao",
    "format_claims",
    "parse_claims",
    "polarity_conflict",
    "strong_components",
    "topology",
    "word_distribution",
]

N = TypeVar("N", bound=Hashable)
Edge = tuple[N, N]
RelationKind = Literal["supports", "refutes"]
FaultKind = Literal["line", "repeated", "first", "unknown"]

_CLAIM = re.compile(r"CLAIM\[(?P<id>[^\]\s]+)\]\s*(?:\(Document\s+(?P<document>[0-9]+)\)\s*)?:\s*(?P<text>\S.*)", re.IGNORECASE)
_RELATION = re.compile(r"RELATION\s*:\s*(?P<source>\S+)\s+(?P<kind>supports|refutes)\s+(?P<target>\S+)", re.IGNORECASE)
_DOCUMENT = re.compile(r"\bDocument\s+#?([0-9]+)\b", re.IGNORECASE)


# ---------------------------------------------------------------------------------------------------------------- text
@record
class Claim:
    """One claim: its id in lower case, its text, and the document that it cites before the colon, None for none."""

    id: str
    text: str
    document: str | None = None


@record
class Relation:
    """`source` supports or refutes `target`; ids in lower case."""

    source: str
    kind: RelationKind
    target: str


@record
class Fault:
    """What breaks the layout: a line that is neither, a claim that comes twice, a first claim that is not c1 (or none), an unknown id.

    `line` counts from 1; 0 where the fault is of no one line.
    """

    kind: FaultKind
    text: str
    line: int = 0


@record
class Claims:
    """What a text says and what is wrong with it.

    Attributes:
        claims: in order; of claims with one id the first.
        relations: in order, as written; those with unknown ids too.
        faults: lines first, in order, then the first claim, then unknown ids.
        lines: how many lines are not empty.
    """

    claims: tuple[Claim, ...]
    relations: tuple[Relation, ...]
    faults: tuple[Fault, ...] = ()
    lines: int = 0

    @property
    def by_id(self) -> dict[str, Claim]:
        """The claims by their id."""
        return {claim.id: claim for claim in self.claims}

    def edges(self, *kinds: RelationKind) -> tuple[Edge[str], ...]:
        """Different (source, target) pairs of these kinds (none given: of both) between claims that are there, in order."""
        known = self.by_id
        found = ((r.source, r.target) for r in self.relations if (not kinds or r.kind in kinds) and r.source in known and r.target in known)
        return tuple(dict.fromkeys(found))


def parse_claims(text: str) -> Claims:
    """Reads a text in the layout above; case does not matter, and what does not fit becomes a `Fault` instead of an error.

    Ids become lower case. A relation may name a claim that comes later. Blank lines mean nothing.
    """
    claims: dict[str, Claim] = {}
    relations: list[tuple[int, Relation]] = []
    faults: list[Fault] = []
    lines = 0
    for number, line in enumerate((line.strip() for line in text.splitlines()), 1):
        lines += bool(line)
        if claim := _CLAIM.fullmatch(line):
            name = claim["id"].lower()
            if name in claims:
                faults.append(Fault(kind="repeated", text=f"claim {name!r} comes twice", line=number))
            else:
                claims[name] = Claim(id=name, text=claim["text"], document=claim["document"])
        elif relation := _RELATION.fullmatch(line):
            kind: RelationKind = "supports" if relation["kind"].lower() == "supports" else "refutes"
            relations.append((number, Relation(source=relation["source"].lower(), kind=kind, target=relation["target"].lower())))
        elif line:
            faults.append(Fault(kind="line", text=f"neither CLAIM nor RELATION: {line[:60]!r}", line=number))
    first = next(iter(claims), None)
    if first != "c1":
        faults.append(Fault(kind="first", text="no claim" if first is None else f"the first claim is {first!r}, not 'c1'"))
    for number, link in relations:
        unknown = [name for name in (link.source, link.target) if name not in claims]
        if unknown:
            faults.append(Fault(kind="unknown", text=f"a relation names {unknown[0]!r}, which no claim has", line=number))
    return Claims(claims=tuple(claims.values()), relations=tuple(link for _, link in relations), faults=tuple(faults), lines=lines)


def format_claims(claims: Claims) -> str:
    """The text, each relation after the later of its two claims, as the targets of SciFact have it; those with unknown ids come last.

    `parse_claims` reads the same claims back, and the same relations in the order of the text.
    """
    place = {claim.id: number for number, claim in enumerate(claims.claims)}
    after: defaultdict[int, list[str]] = defaultdict(list)
    for link in claims.relations:
        last = max(place.get(link.source, len(place)), place.get(link.target, len(place)))
        after[last].append(f"RELATION: {link.source} {link.kind} {link.target}")
    lines: list[str] = []
    for number, claim in enumerate(claims.claims):
        lines += [f"CLAIM[{claim.id}]{f' (Document {claim.document})' if claim.document else ''}: {claim.text}", *after[number]]
    return "\n".join([*lines, *after[len(place)]])


def cited_documents(text: str) -> tuple[str, ...]:
    """The different ids of "Document 12" in a text, in order."""
    return tuple(dict.fromkeys(_DOCUMENT.findall(text)))


# --------------------------------------------------------------------------------------------------------------- graphs
def strong_components(nodes: Iterable[N], edges: Iterable[Edge[N]]) -> tuple[tuple[N, ...], ...]:
    """The strongly connected components, without recursion, so that long chains do no harm. Nodes of edges need not be listed.

    Source: Tarjan 1972, Depth-first search and linear graph algorithms.
    """
    after: dict[N, list[N]] = {node: [] for node in nodes}
    for source, target in edges:
        after.setdefault(source, []).append(target)
        after.setdefault(target, [])
    index: dict[N, int] = {}
    low: dict[N, int] = {}
    stack: list[N] = []
    on_stack: set[N] = set()
    found: list[tuple[N, ...]] = []
    for root, children in after.items():
        if root in index:
            continue
        work = [(root, iter(children))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, rest = work[-1]
            for other in rest:
                if other not in index:
                    index[other] = low[other] = len(index)
                    stack.append(other)
                    on_stack.add(other)
                    work.append((other, iter(after[other])))
                    break
                if other in on_stack:
                    low[node] = min(low[node], index[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    part: list[N] = []
                    while node in on_stack:
                        part.append(stack.pop())
                        on_stack.discard(part[-1])
                    found.append(tuple(part))
    return tuple(found)


def directed_circuit_rank(edges: Iterable[Edge[N]]) -> int:
    """Σ over strongly connected components of E − V + 1: the dimension of the space that directed cycles span.

    0 exactly where there is no directed cycle, never less for one edge more, the same under any naming. An edge that is listed twice counts
    once; a loop from a node to itself is a cycle. (Eggan's "cycle rank" is another number.)
    """
    different = set(edges)
    where: dict[N, int] = {}
    components = strong_components((), different)
    for number, component in enumerate(components):
        where.update(dict.fromkeys(component, number))
    inner = sum(where[source] == where[target] for source, target in different)
    return inner - len(where) + len(components)


def _weak_components(nodes: Iterable[N], edges: Iterable[Edge[N]]) -> int:
    parents: dict[N, N] = {node: node for node in nodes}

    def root(node: N) -> N:
        while parents.setdefault(node, node) != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    for source, target in edges:
        parents[root(source)] = root(target)
    return sum(root(node) == node for node in list(parents))


def betti1(nodes: Iterable[N], edges: Iterable[Edge[N]]) -> int:
    """β₁ = E − V + C of the graph without directions, where both directions between two nodes are one edge; loops count.

    It is no measure of circular argument: a diamond has 1 though nothing goes in a circle, and two claims that support each other have 0.
    """
    pairs = {frozenset(edge) for edge in edges}
    every = set(nodes) | {node for pair in pairs for node in pair}
    ends = [tuple(pair) for pair in pairs]
    return len(pairs) - len(every) + _weak_components(every, [(pair[0], pair[-1]) for pair in ends])


@record
class Topology:
    """The shape of a claim graph.

    Attributes:
        claims: nodes.
        relations: different (source, target) pairs between them.
        components: parts that no relation joins.
        betti1: see `betti1`.
        circuit_rank: directed circuit rank over all relations.
        support_rank: over "supports" alone: circular justification. The rest of `circuit_rank` runs through refutations, as mutual attack may.
        circles: the claims of each set that reach each other by "supports", sorted.
        conflicts: claims that are both supported and refuted, sorted.
    """

    claims: int
    relations: int
    components: int
    betti1: int
    circuit_rank: int
    support_rank: int
    circles: tuple[tuple[str, ...], ...]
    conflicts: tuple[str, ...]


def topology(claims: Claims) -> Topology:
    """The graph's numbers. Relations that name unknown claims are left out; `claims.faults` has them."""
    nodes, edges, support = list(claims.by_id), claims.edges(), claims.edges("supports")
    loops = {source for source, target in support if source == target}
    circles = sorted(tuple(sorted(part)) for part in strong_components((), support) if len(part) > 1 or loops.intersection(part))
    said: defaultdict[str, set[str]] = defaultdict(set)
    for link in claims.relations:
        if link.source in claims.by_id:
            said[link.target].add(link.kind)
    return Topology(
        claims=len(nodes),
        relations=len(edges),
        components=_weak_components(nodes, edges),
        betti1=betti1(nodes, edges),
        circuit_rank=directed_circuit_rank(edges),
        support_rank=directed_circuit_rank(support),
        circles=tuple(circles),
        conflicts=tuple(sorted(name for name, kinds in said.items() if len(kinds) > 1 and name in claims.by_id)),
    )


# ------------------------------------------------------------------------------------------------------------ distances
def fisher_rao(p: Sequence[float] | Mapping[str, float], q: Sequence[float] | Mapping[str, float]) -> float:
    """The Fisher–Rao distance of two discrete distributions, 2 arccos Σ √(p q), in radians: 0 where they agree, π where they share nothing.

    Args:
        p: masses, which are scaled to sum to 1; by name, where what is missing has mass 0, or in order.
        q: likewise.

    Raises:
        DataError: a mass is negative or not finite, all are zero, or two sequences differ in length.

    Source: Rao 1945; Atkinson & Mitchell 1981, Rao's distance measure.
    """
    if not isinstance(p, Mapping) and not isinstance(q, Mapping) and len(p) != len(q):
        raise DataError(f"The distributions have {len(p)} and {len(q)} masses; expected as many. Give them by name where they differ.")
    first, second = (_masses(found) for found in (p, q))
    return 2 * math.acos(min(1.0, math.fsum(math.sqrt(mass * second.get(name, 0.0)) for name, mass in first.items())))


def _masses(given: Sequence[float] | Mapping[str, float]) -> dict[str, float]:
    named = dict(given) if isinstance(given, Mapping) else {str(i): mass for i, mass in enumerate(given)}
    total = math.fsum(named.values())
    if not (math.isfinite(total) and total > 0) or min(named.values()) < 0:
        raise DataError(f"The masses {list(named.values())[:6]} are no distribution; expected numbers of at least 0, not all 0.")
    return {name: mass / total for name, mass in named.items()}


def word_distribution(text: str) -> dict[str, float]:
    """How often each word (letters and digits, lower case) comes, as a share; empty for a text without words."""
    words = re.findall(r"\w+", text.lower())
    return {word: words.count(word) / len(words) for word in dict.fromkeys(words)}


def chirality_score(*, distance: float, overlap: float, conflict: bool) -> float:
    """min(1, 0.6 d / (d + 1) + 0.2 (1 − overlap) + 0.25 conflict): how far two accounts of the same evidence pull apart, in [0, 1].

    The weights are a convention that makes results comparable with earlier work; nothing derives them. Read the three parts too.

    Args:
        distance: between the accounts, at least 0, for example `fisher_rao` of their words.
        overlap: share of evidence that they have in common, in [0, 1].
        conflict: whether a claim is both supported and refuted.

    Raises:
        DataError: a number out of range.

    Source: the CNS project's `Chirality` module (definition by its authors, not published in a paper).
    """
    if not (distance >= 0 and 0 <= overlap <= 1):
        raise DataError(f"The chirality of distance {distance!r} and overlap {overlap!r} was asked; expected a distance ≥ 0 and an overlap in [0, 1].")
    share = 1.0 if math.isinf(distance) else distance / (distance + 1)
    return min(1.0, 0.6 * share + 0.2 * (1 - overlap) + 0.25 * conflict)


# -------------------------------------------------------------------------------------------------------------- scorers
def circuit_rank(example: Example, completion: Completion) -> Score:
    """The directed circuit rank of the completion's "supports": 0 where nothing justifies itself. None where it has no claim."""
    del example
    found = parse_claims(completion.text)
    if not found.claims:
        return Score(name="circuit_rank", value=None, detail="no claim")
    shape = topology(found)
    return Score(name="circuit_rank", value=float(shape.support_rank), detail="; ".join(" ↔ ".join(circle) for circle in shape.circles))


def cyclic(example: Example, completion: Completion) -> Score:
    """1 where claims support each other in a circle, 0 where none do, None where there is no claim; the mean is the cyclic rate."""
    rank = circuit_rank(example, completion)
    return Score(name="cyclic", value=None if rank.value is None else float(rank.value > 0), detail=rank.detail)


def polarity_conflict(example: Example, completion: Completion) -> Score:
    """1 where some claim of the completion is both supported and refuted, else 0; None where there is no claim."""
    del example
    found = parse_claims(completion.text)
    if not found.claims:
        return Score(name="polarity_conflict", value=None, detail="no claim")
    conflicts = topology(found).conflicts
    return Score(name="polarity_conflict", value=float(bool(conflicts)), detail=", ".join(conflicts))
