"""Claims: the layout, the graph's numbers against networkx and by hand, distances, and real rows where they are there."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible_framework.data import load_dataset
from crucible_framework.errors import DataError
from crucible_framework.evaluation import (
    Claim,
    Claims,
    Relation,
    betti1,
    chirality_score,
    circuit_rank,
    cited_documents,
    cyclic,
    directed_circuit_rank,
    fisher_rao,
    format_claims,
    parse_claims,
    polarity_conflict,
    schema_compliance,
    scorers,
    topology,
)
from crucible_framework.evaluation.claims import strong_components, word_distribution
from crucible_framework.records import Example

from .samplers_for_tests import said

NAMES = [f"c{i}" for i in range(1, 9)]
EDGES = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=24)
EXAMPLE = Example(id="e", prompt="Document 1: water", target="")


def text_of(edges: list[tuple[str, str]], names: list[str] = NAMES, kind: str = "supports") -> str:
    return "\n".join([*(f"CLAIM[{name}]: text of {name}" for name in names), *(f"RELATION: {a} {kind} {b}" for a, b in edges)])


# --------------------------------------------------------------------------------------------------------------- layout
@pytest.mark.parametrize(
    ("line", "claim"),
    [
        ("CLAIM[c1]: Water is wet.", Claim(id="c1", text="Water is wet.")),
        ("CLAIM[c2] (Document 12345): Supporting claim", Claim(id="c2", text="Supporting claim", document="12345")),
        ("CLAIM[c1]  :   Text with spaces   ", Claim(id="c1", text="Text with spaces")),
        ("claim[C1]: x", Claim(id="c1", text="x")),
        ("CLAIM[claim_1_final]: Test: yes", Claim(id="claim_1_final", text="Test: yes")),
    ],
)
def test_lines_that_are_claims(line: str, claim: Claim) -> None:
    assert parse_claims(line).claims == (claim,)


@pytest.mark.parametrize(
    "line", ["CLAIM[]: missing", "CLAIM[c1]:", "CLAIM c1: x", "RELATION c2 -> c1", "RELATION: c2 contrasts c1", "RELATION: c2 supports", "Sure!"]
)
def test_lines_that_are_not_are_faults_with_their_number(line: str) -> None:
    found = parse_claims(f"CLAIM[c1]: a\n\n{line}\nCLAIM[c2]: b")
    assert [(fault.kind, fault.line) for fault in found.faults] == [("line", 3)]
    assert [claim.id for claim in found.claims] == ["c1", "c2"], "garbage does not hide the claims beside it"
    assert found.lines == 3


def test_every_kind_of_fault_is_named() -> None:
    found = parse_claims("CLAIM[c2]: a\nCLAIM[C2]: b\nrelation: c2 SUPPORTS c9\nhello")
    assert [(fault.kind, fault.line) for fault in found.faults] == [("repeated", 2), ("line", 4), ("first", 0), ("unknown", 3)]
    assert found.claims == (Claim(id="c2", text="a"),), "the first of two claims with one id stays"
    assert found.relations == (Relation(source="c2", kind="supports", target="c9"),)
    assert [fault.text for fault in parse_claims("").faults] == ["no claim"]


LINE = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp", "Zs")), min_size=1, max_size=12).map(str.strip).filter(bool)
CLAIMS = st.builds(
    lambda rows, links: Claims(
        claims=tuple(Claim(id=f"c{i + 1}", text=text, document=document) for i, (text, document) in enumerate(rows)),
        relations=tuple(Relation(source=f"c{a % len(rows) + 1}", kind=kind, target=f"c{b % len(rows) + 1}") for a, kind, b in links),
        lines=len(rows) + len(links),
    ),
    st.lists(st.tuples(LINE, st.none() | st.integers(0, 99999).map(str)), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["supports", "refutes"]), st.integers(0, 9)), max_size=6),
)


@given(CLAIMS)
def test_what_is_written_is_read_back(claims: Claims) -> None:
    found = parse_claims(format_claims(claims))
    assert (found.claims, found.faults, found.lines) == (claims.claims, (), claims.lines)
    assert Counter(found.relations) == Counter(claims.relations)
    assert parse_claims(format_claims(found)) == found
    assert schema_compliance(EXAMPLE, said(format_claims(claims))).value == 1


@given(st.text(max_size=200))
def test_any_text_is_read_without_an_error(text: str) -> None:
    found = parse_claims(text)
    assert bool(found.faults) == (schema_compliance(EXAMPLE, said(text)).value == 0)
    topology(found)


def test_cited_documents_come_once_in_order() -> None:
    assert cited_documents("Document 7 and document #3, Document 7; Documents 9, MyDocument 8") == ("7", "3")


# ---------------------------------------------------------------------------------------------------------------- graphs
@pytest.mark.parametrize(
    ("edges", "rank", "beta", "components"),
    [
        ([("c2", "c1"), ("c3", "c1"), ("c4", "c1")], 0, 0, 1),
        ([("c1", "c2"), ("c1", "c3"), ("c2", "c4"), ("c3", "c4")], 0, 1, 1),
        ([("c1", "c2"), ("c2", "c1")], 1, 0, 3),
        ([("c1", "c2"), ("c2", "c3"), ("c3", "c1")], 1, 1, 2),
        ([("c1", "c1")], 1, 1, 4),
        ([("c1", "c2"), ("c2", "c1"), ("c3", "c4"), ("c4", "c3")], 2, 0, 2),
        ([("c1", "c2"), ("c2", "c3"), ("c3", "c1"), ("c3", "c2")], 2, 1, 2),
        ([], 0, 0, 4),
    ],
    ids=["star", "diamond", "2-cycle", "3-cycle", "loop", "two 2-cycles", "two nested", "no relation"],
)
def test_known_graphs(edges: list[tuple[str, str]], rank: int, beta: int, components: int) -> None:
    shape = topology(parse_claims(text_of(edges, NAMES[:4])))
    assert (shape.circuit_rank, shape.support_rank, shape.betti1, shape.components) == (rank, rank, beta, components)
    assert (shape.claims, shape.relations) == (4, len(edges))
    assert bool(shape.circles) == (rank > 0)


def oracle(edges: list[tuple[int, int]]) -> int:
    graph = nx.DiGraph(edges)
    return sum(graph.subgraph(part).number_of_edges() - len(part) + 1 for part in nx.strongly_connected_components(graph))


@given(EDGES)
@settings(max_examples=150)
def test_the_circuit_rank_is_networkx_own_and_zero_exactly_without_cycles(edges: list[tuple[int, int]]) -> None:
    rank = directed_circuit_rank(edges)
    assert rank == oracle(edges)
    assert (rank == 0) == nx.is_directed_acyclic_graph(nx.DiGraph(edges))
    assert rank == directed_circuit_rank(edges * 2), "an edge counts once"


@given(EDGES, st.permutations(range(8)), st.tuples(st.integers(0, 7), st.integers(0, 7)))
@settings(max_examples=150)
def test_the_circuit_rank_knows_no_names_and_never_falls(edges: list[tuple[int, int]], names: list[int], extra: tuple[int, int]) -> None:
    rank = directed_circuit_rank(edges)
    assert directed_circuit_rank([(names[a], names[b]) for a, b in edges]) == rank
    assert rank <= directed_circuit_rank([*edges, extra]) <= rank + len({*edges, extra})


def test_three_thousand_random_graphs_against_networkx() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        n = rng.randint(1, 9)
        edges = [(rng.randrange(n), rng.randrange(n)) for _ in range(rng.randint(0, 2 * n))]
        rank = directed_circuit_rank(edges)
        assert rank == oracle(edges)
        assert (rank == 0) == nx.is_directed_acyclic_graph(nx.DiGraph(edges))
        assert rank <= directed_circuit_rank([*edges, (rng.randrange(n), rng.randrange(n))])
        shuffled = rng.sample(range(n), n)
        assert rank == directed_circuit_rank([(shuffled[a], shuffled[b]) for a, b in edges])


@given(EDGES)
def test_betti_and_components_are_networkx_own(edges: list[tuple[int, int]]) -> None:
    graph = nx.Graph()
    graph.add_nodes_from(range(8))
    graph.add_edges_from(edges)
    assert betti1(range(8), edges) == graph.number_of_edges() - 8 + nx.number_connected_components(graph)
    digraph = nx.DiGraph(edges)
    assert {frozenset(part) for part in strong_components((), edges)} == {frozenset(part) for part in nx.strongly_connected_components(digraph)}
    named = [(NAMES[a], NAMES[b]) for a, b in edges]
    assert topology(parse_claims(text_of(named))).components == nx.number_connected_components(graph)


def test_a_ring_of_ten_thousand_needs_no_recursion() -> None:
    ring = [(i, (i + 1) % 10_000) for i in range(10_000)]
    assert directed_circuit_rank(ring) == 1
    assert directed_circuit_rank(ring[:-1]) == 0


def test_circles_of_support_are_kept_apart_from_attack() -> None:
    text = "CLAIM[c1]: a\nCLAIM[c2]: b\nCLAIM[c3]: c\nRELATION: c1 supports c2\nRELATION: c2 refutes c1\nRELATION: c3 supports c3\nRELATION: c9 supports c1"
    shape = topology(parse_claims(text))
    assert (shape.circuit_rank, shape.support_rank, shape.circles) == (2, 1, (("c3",),))


def test_a_claim_both_supported_and_refuted_is_a_conflict() -> None:
    both = text_of([("c2", "c5")], NAMES[:5]) + "\nRELATION: c3 refutes c5"
    assert topology(parse_claims(both)).conflicts == ("c5",)
    assert topology(parse_claims(text_of([("c2", "c1"), ("c3", "c1")]))).conflicts == ()
    assert topology(parse_claims(both.replace("c3 refutes c5", "c9 refutes c5"))).conflicts == (), "an unknown claim refutes nothing"
    assert topology(parse_claims(both.replace("c3 refutes c5", "c3 refutes c4"))).conflicts == ()


# ------------------------------------------------------------------------------------------------------------- distances
MASSES = st.lists(st.floats(0, 10), min_size=3, max_size=3).filter(lambda masses: sum(masses) > 1e-3)


@given(MASSES, MASSES, MASSES)
def test_fisher_rao_is_a_metric_between_0_and_pi(p: list[float], q: list[float], r: list[float]) -> None:
    pq, qr, pr = fisher_rao(p, q), fisher_rao(q, r), fisher_rao(p, r)
    assert 0 <= pq <= math.pi + 1e-9
    assert pq == pytest.approx(fisher_rao(q, p))
    assert pr <= pq + qr + 1e-6
    assert fisher_rao(p, p) == pytest.approx(0, abs=1e-7)
    assert fisher_rao(p, [5 * mass for mass in p]) == pytest.approx(0, abs=1e-7)


def test_fisher_rao_is_the_length_of_the_arc_on_the_sphere() -> None:
    """Oracle: the length of the shortest path under the Fisher metric ds² = Σ dp²/p, summed over small pieces of the great circle."""
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.3, 0.5])
    angle = math.acos(float(np.sqrt(p) @ np.sqrt(q)))
    t = np.linspace(0, 1, 20001)[:, None]
    path = ((np.sin((1 - t) * angle) * np.sqrt(p) + np.sin(t * angle) * np.sqrt(q)) / math.sin(angle)) ** 2
    steps, middle = np.diff(path, axis=0), (path[1:] + path[:-1]) / 2
    assert fisher_rao(p.tolist(), q.tolist()) == pytest.approx(float(np.sqrt((steps**2 / middle).sum(1)).sum()), rel=1e-6)
    assert fisher_rao({"a": 1}, {"b": 2}) == pytest.approx(math.pi)
    assert fisher_rao({"a": 1, "b": 1}, {"b": 1, "a": 1, "c": 0}) == pytest.approx(0, abs=1e-7)
    for bad in (([1, 2], [1]), ([0, 0], [1, 1]), ([-1, 2], [1, 1]), ([math.nan, 1], [1, 1])):
        with pytest.raises(DataError):
            fisher_rao(*bad)


def test_chirality_on_the_published_cases() -> None:
    assert chirality_score(distance=1, overlap=0.5, conflict=False) == pytest.approx(0.4)
    assert chirality_score(distance=100, overlap=0, conflict=True) == 1
    assert chirality_score(distance=0, overlap=1, conflict=False) == 0
    assert chirality_score(distance=math.inf, overlap=1, conflict=False) == pytest.approx(0.6)
    for bad in ((-1.0, 0.5), (1.0, 1.5), (math.nan, 0.5)):
        with pytest.raises(DataError, match="distance ≥ 0"):
            chirality_score(distance=bad[0], overlap=bad[1], conflict=False)
    assert word_distribution("A b a, A") == {"a": 0.75, "b": 0.25}
    assert word_distribution("…") == {}


# -------------------------------------------------------------------------------------------------------------- scorers
def test_scorers_of_the_graph() -> None:
    ring = said(text_of([("c1", "c2"), ("c2", "c1")], NAMES[:2]))
    attack = said(text_of([("c1", "c2"), ("c2", "c1")], NAMES[:2], "refutes"))
    assert [scorer(EXAMPLE, ring).value for scorer in (circuit_rank, cyclic, polarity_conflict)] == [1, 1, 0]
    assert circuit_rank(EXAMPLE, ring).detail == "c1 ↔ c2"
    assert [scorer(EXAMPLE, attack).value for scorer in (circuit_rank, cyclic)] == [0, 0]
    conflict = said(text_of([("c2", "c1")], NAMES[:3]) + "\nRELATION: c3 refutes c1")
    assert (polarity_conflict(EXAMPLE, conflict).value, polarity_conflict(EXAMPLE, conflict).detail) == (1, "c1")
    for scorer in (circuit_rank, cyclic, polarity_conflict):
        assert scorer(EXAMPLE, said("no claims here")).value is None
        assert scorers.get(scorer.__name__) is scorer


def test_scifact_targets_are_stars_without_a_fault(real_data: Path) -> None:
    rows = load_dataset("scifact", split="train", task="extract", data=real_data)
    assert len(rows) > 100
    for example in rows:
        found = parse_claims(example.target)
        assert found.faults == ()
        assert format_claims(found) == example.target
        shape = topology(found)
        assert (shape.circuit_rank, shape.betti1, shape.components, shape.relations) == (0, 0, 1, shape.claims - 1)
