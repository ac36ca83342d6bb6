"""Persistence of claim graphs: by hand, and against union-find and a reduction of the boundary matrix written out here."""

from __future__ import annotations

import math
import sys
from importlib.util import find_spec
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible_framework.errors import ConfigError, DataError
from crucible_framework.evaluation import (
    Bar,
    Persistence,
    claim_persistence,
    format_claims,
    longest_hole,
    parse_claims,
    persistence,
    persistence_scorers,
    scorers,
    topology,
    total_persistence,
    usual_scorers,
)
from crucible_framework.records import Dataset, DatasetCard, Example

from .samplers_for_tests import said

needs_gudhi = pytest.mark.skipif(find_spec("gudhi") is None, reason="crucible-framework[topology] is not installed")
EXAMPLE = Example(id="e", prompt="", target="")
SQUARE = {("a", "b"): 0.1, ("b", "c"): 0.2, ("c", "d"): 0.3, ("d", "a"): 0.4}
RING = """CLAIM[c1]: one two
CLAIM[c2]: two three
CLAIM[c3]: three four
CLAIM[c4]: four one
RELATION: c1 supports c2
RELATION: c2 supports c3
RELATION: c3 refutes c4
RELATION: c4 supports c1"""
Links = dict[tuple[int, int], float]
GRAPHS = st.dictionaries(st.sampled_from(list(combinations(range(6), 2))), st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 1.0]), max_size=15)


def told(found: Persistence) -> list[tuple[int, float, float]]:
    return [(bar.dimension, bar.birth, bar.death) for bar in found.bars]


def deaths_by_union(n: int, links: Links) -> list[float]:
    """When parts end, by Kruskal's way through the links; infinite for those that stay."""
    parent, deaths = list(range(n)), list[float]()

    def root(node: int) -> int:
        return node if parent[node] == node else root(parent[node])

    for (a, b), distance in sorted(links.items(), key=lambda link: link[1]):
        if root(a) != root(b):
            parent[root(a)] = root(b)
            deaths.append(distance)
    return sorted([*deaths, *[math.inf] * (n - len(deaths))])


def bars_by_reduction(n: int, links: Links) -> list[tuple[int, float, float]]:
    """The standard algorithm: columns of the boundary matrix over Z/2, as sets, reduced from left to right."""
    simplices: list[tuple[float, tuple[int, ...]]] = [(0.0, (i,)) for i in range(n)] + [(distance, ends) for ends, distance in links.items()]
    for a, b, c in combinations(range(n), 3):
        sides = [links.get(pair) for pair in ((a, b), (a, c), (b, c))]
        if None not in sides:
            simplices.append((max(side for side in sides if side is not None), (a, b, c)))
    simplices.sort(key=lambda simplex: (simplex[0], len(simplex[1]), simplex[1]))
    place = {simplex: number for number, (_, simplex) in enumerate(simplices)}
    owner, paired, bars = dict[int, set[int]](), set[int](), list[tuple[int, float, float]]()
    for number, (value, simplex) in enumerate(simplices):
        column = {place[side] for side in combinations(simplex, len(simplex) - 1)} if len(simplex) > 1 else set[int]()
        while column and max(column) in owner:
            column ^= owner[max(column)]
        if column:
            low = max(column)
            owner[low] = column
            paired |= {low, number}
            birth, creator = simplices[low]
            bars.append((len(creator) - 1, birth, value))
    bars += [(len(simplex) - 1, value, math.inf) for number, (value, simplex) in enumerate(simplices) if number not in paired and len(simplex) < 3]
    return sorted(bar for bar in bars if bar[1] != bar[2])


@needs_gudhi
def test_a_square_has_one_hole_from_its_longest_side_on() -> None:
    found = persistence("abcd", SQUARE)
    assert told(found) == [(0, 0.0, 0.1), (0, 0.0, 0.2), (0, 0.0, 0.3), (0, 0.0, math.inf), (1, 0.4, math.inf)]
    assert found.betti == (1, 1)
    assert [found.betti_at(distance) for distance in (0.0, 0.1, 0.25, 0.3, 0.4, 9.0)] == [(4, 0), (3, 0), (2, 0), (1, 0), (1, 1), (1, 1)]
    assert found.total == pytest.approx(0.6)
    assert found.longest_hole == Bar(dimension=1, birth=0.4, death=math.inf)


@needs_gudhi
def test_diagonals_close_the_square_and_triangles_enclose_nothing() -> None:
    found = persistence("abcd", {**SQUARE, ("a", "c"): 0.9, ("b", "d"): 1.0})
    hole = found.longest_hole
    assert hole is not None
    assert (hole.birth, hole.death) == (0.4, 0.9)
    assert found.total == pytest.approx(0.6 + 0.5)
    assert found.betti == (1, 0)
    assert persistence("abc", {("a", "b"): 0.5, ("b", "c"): 0.5, ("a", "c"): 0.5}).longest_hole is None


@needs_gudhi
def test_of_several_links_the_least_counts_and_loops_do_not() -> None:
    assert persistence("ab", {("a", "b"): 0.7, ("b", "a"): 0.2, ("a", "a"): 0.0}).bars == persistence("ab", {("a", "b"): 0.2}).bars
    assert persistence("ab", {("a", "b"): math.inf}).betti == (2, 0)
    assert persistence("", {}).bars == ()


@needs_gudhi
@settings(max_examples=80, deadline=None)
@given(GRAPHS)
def test_bars_are_those_of_union_find_and_of_the_reduction(links: Links) -> None:
    found = persistence(range(6), links)
    assert sorted(told(found)) == bars_by_reduction(6, links)
    assert sorted(bar.death for bar in found.bars if bar.dimension == 0) == [death for death in deaths_by_union(6, links) if death > 0]
    assert found.betti[0] == sum(math.isinf(death) for death in deaths_by_union(6, links))


@needs_gudhi
def test_relations_come_in_as_they_are_trusted() -> None:
    claims = parse_claims(RING)
    trust = {("c1", "c2"): 0.9, ("c2", "c3"): 0.75, ("c3", "c4"): 0.5, ("c4", "c1"): 0.25}
    found = claim_persistence(claims, confidence=trust)
    assert [round(bar.death, 9) for bar in found.bars if bar.dimension == 0] == [0.1, 0.25, 0.5, math.inf]
    assert found.longest_hole == Bar(dimension=1, birth=0.75, death=math.inf)
    assert found.betti == (topology(claims).components, topology(claims).betti1)
    with pytest.raises(DataError, match=r"'c4' → 'c1' has the confidence None"):
        claim_persistence(claims, confidence=dict.fromkeys(list(trust)[:3], 1.0))
    with pytest.raises(DataError, match="confidence nan"):
        claim_persistence(claims, confidence={**trust, ("c1", "c2"): math.nan})
    with pytest.raises(DataError, match="every_pair"):
        claim_persistence(claims, confidence=trust, every_pair=True)


@needs_gudhi
def test_without_trust_the_words_decide_and_every_pair_closes_the_ring() -> None:
    claims = parse_claims(RING)  # neighbours share one word of two: similarity ½; opposite claims none
    assert claim_persistence(claims).longest_hole == Bar(dimension=1, birth=0.5, death=math.inf)
    assert claim_persistence(claims, every_pair=True).longest_hole == Bar(dimension=1, birth=0.5, death=1.0)

    class Same:
        name = "same"

        def __call__(self, pairs: object) -> list[float]:
            assert isinstance(pairs, list)
            return [1.5] * len(pairs)  # a judge may go a little over 1

    assert claim_persistence(claims, similarity=Same()).longest_hole == Bar(dimension=1, birth=0.0, death=math.inf)
    hole, total = persistence_scorers(Same())
    found = [score(EXAMPLE, said(RING)) for score in (hole, total)]
    assert [(score.name, score.value) for score in found] == [("longest_hole", 1.0), ("total_persistence", 0.0)]


@needs_gudhi
def test_scorers_are_finite_and_none_without_claims() -> None:
    assert longest_hole(EXAMPLE, said(RING)).value == 0.5
    assert total_persistence(EXAMPLE, said(RING)).value == 1.5
    assert total_persistence(EXAMPLE, said(RING)).detail == "1 parts, 1 holes"
    star = format_claims(parse_claims(RING.replace("c2 supports c3", "c3 supports c1").replace("RELATION: c3 refutes c4\n", "")))
    assert longest_hole(EXAMPLE, said(star)).value == 0.0
    for score in (longest_hole, total_persistence):
        assert score(EXAMPLE, said("nothing")).value is None
        assert scorers.get(score.__name__) is score


def test_without_gudhi_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gudhi", None)
    with pytest.raises(ConfigError, match=r"pip install 'crucible-framework\[topology\]'"):
        persistence("ab", {("a", "b"): 0.5})


@pytest.mark.parametrize("distance", [-0.1, math.nan])
def test_a_distance_that_is_none_is_refused(distance: float) -> None:
    with pytest.raises(DataError, match="expected known nodes and a number of at least 0"):
        persistence("ab", {("a", "b"): distance})
    with pytest.raises(DataError, match="'z'"):
        persistence("ab", {("a", "z"): 0.1})


@pytest.mark.parametrize("there", [True, False])
def test_extraction_is_asked_for_persistence_where_gudhi_is(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    card = DatasetCard(name="d", split="test", task="extract", rows=1, sha256="", licence="", source="")
    monkeypatch.setattr("crucible_framework.evaluation.scoring.find_spec", lambda name: name if there else None)
    names = usual_scorers(Dataset(examples=(EXAMPLE,), card=card))
    assert {"cyclic", "validation_lexical"} < set(names)
    assert ({"longest_hole", "total_persistence"} <= set(names)) == there
