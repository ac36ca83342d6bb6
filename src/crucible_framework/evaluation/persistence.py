"""Persistent homology of a claim graph: which parts and holes it has as ever weaker links are let in. Needs `crucible-framework[topology]`.

This file knows distances and claims' links only. Holes are no circular argument: directions are not seen here. For those see `claims.directed_circuit_rank`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from types import ModuleType
from typing import Literal, Protocol, TypeVar, cast

from ..errors import ConfigError, DataError
from ..protocols import Scorer
from ..records import Completion, Example, Score, record
from .claims import Claims, parse_claims
from .entailment import LexicalSimilarity, Similarity

__all__ = ["Bar", "Persistence", "claim_persistence", "longest_hole", "persistence", "persistence_scorers", "total_persistence"]

N = TypeVar("N", bound=Hashable)


@record
class Bar:
    """A part (dimension 0) or a hole (dimension 1): the distance at which it appears, and that at which it is gone, infinite where it stays."""

    dimension: Literal[0, 1]
    birth: float
    death: float

    @property
    def length(self) -> float:
        """death − birth, in the unit of the distances."""
        return self.death - self.birth


@record
class Persistence:
    """A persistence diagram of dimensions 0 and 1.

    Attributes:
        bars: parts first, each dimension by birth and death; those of length 0 are left out.
    """

    bars: tuple[Bar, ...]

    @property
    def betti(self) -> tuple[int, int]:
        """β₀ and β₁ with all links in: the parts and the holes that stay."""
        return self.betti_at(math.inf)

    def betti_at(self, distance: float) -> tuple[int, int]:
        """How many parts and holes there are with the links of at most this distance."""
        there = [bar.dimension for bar in self.bars if bar.birth <= distance and (bar.death > distance or math.isinf(bar.death))]
        return there.count(0), there.count(1)

    @property
    def total(self) -> float:
        """The sum of all finite lengths; those of dimension 0 are together the weight of a minimum spanning forest."""
        return math.fsum(bar.length for bar in self.bars if math.isfinite(bar.death))

    @property
    def longest_hole(self) -> Bar | None:
        """The hole that stays longest, the earlier of two alike; None without one."""
        return max((bar for bar in self.bars if bar.dimension == 1), key=lambda bar: bar.length, default=None)


class _Tree(Protocol):
    """What is used of gudhi's simplex tree; the package need not be installed."""

    def insert(self, simplex: Sequence[int], filtration: float) -> bool: ...
    def expansion(self, max_dim: int) -> None: ...
    def persistence(self, homology_coeff_field: int, min_persistence: float, persistence_dim_max: bool) -> Sequence[tuple[int, tuple[float, float]]]: ...


def _gudhi() -> ModuleType:
    try:
        return importlib.import_module("gudhi")
    except ImportError as error:
        raise ConfigError("Persistent homology needs gudhi. Install it: pip install 'crucible-framework[topology]'.") from error


def persistence(nodes: Iterable[N], distances: Mapping[tuple[N, N], float]) -> Persistence:
    """The diagram of the Vietoris–Rips filtration of a graph: all nodes are there at 0, each link from its distance on, a triangle from its longest side on.

    So three nodes that are linked in pairs enclose no hole, and a ring of four or more does until something closes it. Coefficients in Z/2.

    Args:
        nodes: different.
        distances: of links between them, at least 0; directions do not matter, of several the least counts. A link that is not there is never let in.

    Raises:
        ConfigError: gudhi is not installed.
        DataError: a distance is negative or not a number, or a link names an unknown node.

    Source: Edelsbrunner, Letscher & Zomorodian 2002, "Topological persistence and simplification"; computed by GUDHI, gudhi.inria.fr.
    """
    place = {node: number for number, node in enumerate(dict.fromkeys(nodes))}
    links: dict[tuple[int, int], float] = {}
    for (a, b), distance in distances.items():
        if a not in place or b not in place or not distance >= 0:
            raise DataError(f"The link of {a!r} and {b!r} has the distance {distance!r}; expected known nodes and a number of at least 0.")
        if a != b and math.isfinite(distance):
            ends = (min(place[a], place[b]), max(place[a], place[b]))
            links[ends] = min(distance, links.get(ends, math.inf))
    tree = cast("_Tree", _gudhi().SimplexTree())
    for number in place.values():
        tree.insert([number], 0.0)
    for ends, distance in links.items():
        tree.insert(ends, distance)
    tree.expansion(2)
    found = tree.persistence(homology_coeff_field=2, min_persistence=0.0, persistence_dim_max=True)
    dimensions: tuple[Literal[0, 1], ...] = (0, 1)
    return Persistence(
        bars=tuple(Bar(dimension=d, birth=birth, death=death) for d in dimensions for birth, death in sorted(bar for dim, bar in found if dim == d))
    )


def claim_persistence(
    claims: Claims,
    *,
    confidence: Mapping[tuple[str, str], float] | None = None,
    similarity: Similarity | None = None,
    every_pair: bool = False,
) -> Persistence:
    """The diagram of a claim graph: its links are its relations, at the distance 1 − confidence, or 1 − similarity of the two claims' texts.

    Args:
        claims: parsed; relations with unknown ids are left out.
        confidence: in [0, 1], by (source, target) of each relation, from whatever judged them; None takes similarity.
        similarity: a judge; None takes the word-count baseline. Values below 0 count as 0.
        every_pair: link all claims with each other, whatever they relate to: the shape of what is said instead of the argument's.

    Raises:
        ConfigError: gudhi is not installed.
        DataError: a relation has no confidence or one outside [0, 1], or `every_pair` was asked together with confidences.
    """
    edges = tuple(combinations(claims.by_id, 2)) if every_pair else claims.edges()
    if confidence is None:
        known = claims.by_id
        alike = (similarity or LexicalSimilarity())([(known[a].text, known[b].text) for a, b in edges]) if edges else ()
        return persistence(known, {edge: 1 - min(1.0, max(0.0, value)) for edge, value in zip(edges, alike, strict=True)})
    if every_pair:
        raise DataError("Confidences are of relations, and every pair of claims was asked for; expected one or the other. Leave every_pair out.")
    for edge in edges:
        if not 0 <= confidence.get(edge, math.nan) <= 1:
            raise DataError(f"The relation {edge[0]!r} → {edge[1]!r} has the confidence {confidence.get(edge)!r}; expected one in [0, 1] for each relation.")
    return persistence(claims.by_id, {edge: 1 - confidence[edge] for edge in edges})


# -------------------------------------------------------------------------------------------------------------- scorers
def longest_hole(example: Example, completion: Completion, *, similarity: Similarity | None = None) -> Score:
    """How long the longest hole of the completion's claim graph stays, by word counts or a judge, in [0, 1]; 0 without one, None without a claim.

    One that stays to the end counts up to the greatest distance, 1.
    """
    del example
    found = parse_claims(completion.text)
    if not found.claims:
        return Score(name="longest_hole", value=None, detail="no claim")
    hole = claim_persistence(found, similarity=similarity).longest_hole
    return Score(name="longest_hole", value=0.0 if hole is None else min(1.0, hole.death) - hole.birth)


def total_persistence(example: Example, completion: Completion, *, similarity: Similarity | None = None) -> Score:
    """`Persistence.total` of the completion's claim graph, by word counts or a judge: how far its relations reach; None without a claim."""
    del example
    found = parse_claims(completion.text)
    if not found.claims:
        return Score(name="total_persistence", value=None, detail="no claim")
    shape = claim_persistence(found, similarity=similarity)
    return Score(name="total_persistence", value=shape.total, detail=f"{shape.betti[0]} parts, {shape.betti[1]} holes")


def persistence_scorers(similarity: Similarity) -> tuple[Scorer, Scorer]:
    """Scorers "longest_hole" and "total_persistence" by a judge's similarity, for `evaluate`."""

    def judged(scorer: Callable[..., Score]) -> Scorer:
        def score(example: Example, completion: Completion) -> Score:
            return scorer(example, completion, similarity=similarity)

        score.__name__, score.__qualname__ = scorer.__name__, f"{scorer.__name__} ({similarity.name})"  # the plan of an evaluation knows it by this
        return score

    return judged(longest_hole), judged(total_persistence)
