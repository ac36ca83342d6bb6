"""Structure losses: golden graphs, an independent graph library, closed forms, and that training with them does what they say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crucible_framework.backends import connect
from crucible_framework.data import ByteTokenizer, render
from crucible_framework.errors import ConfigError, DataError
from crucible_framework.losses import combine, resolve
from crucible_framework.losses.apply import apply_loss
from crucible_framework.losses.claims import annotate_claims, closing_targets
from crucible_framework.losses.structure import Variant, acyclicity, chirality, soft_adjacency, topological
from crucible_framework.protocols import Loss, Tokenizer
from crucible_framework.records import AdamConfig, Batch, Datum, Example, LoraConfig
from crucible_framework.testing import LossContract, make_datum

torch.set_num_threads(1)
V = 16
SOFT: tuple[Variant, ...] = ("expm", "notears", "polynomial", "dagma")


def marked(length: int, seed: int, k: int = 5) -> Datum:
    """Random candidates and marks on the second half; every marked position has good and bad ones."""
    rng = np.random.default_rng(seed)
    datum = make_datum(length, seed=seed, vocab_size=V)
    targets = rng.integers(0, V, (length, k))
    targets[:, 0] = datum.targets
    weights = np.zeros((length, k), dtype=np.float32)
    weights[:, 0] = datum.weights * rng.uniform(0.5, 2, length)
    signs = rng.choice([-1.0, 0.0, 1.0], (length, k)).astype(np.float32)
    signs[:, :3] = [0, 1, -1]
    nodes = np.where(signs != 0, rng.integers(1, 4, (length, k)), 0).astype(np.float32)
    flat = {"source": rng.integers(1, 4, length).astype(np.float32), "evidence": rng.uniform(0, 1, length).astype(np.float32)}
    return replace(
        datum, targets=targets.astype(np.int64), weights=weights, extras={"closure": signs, "citation": signs, "polarity": signs, "nodes": nodes, **flat}
    )


class TestStructure(LossContract):
    @pytest.fixture(params=["topological", "citation_validity", "chirality", *(f"topological(variant={name})" for name in SOFT)])
    def loss(self, request: pytest.FixtureRequest) -> Loss:
        return resolve(request.param)

    @pytest.fixture
    def data(self) -> tuple[Datum, ...]:
        return marked(6, 0), marked(3, 1), marked(5, 2)


class TestWithCrossEntropy(TestStructure):
    @pytest.fixture
    def loss(self) -> Loss:
        return combine({"cross_entropy": 1.0, "topological": 0.5, "citation_validity": 0.1, "chirality": 0.1})


def decision(logprobs: Sequence[float], targets: Sequence[int], **extras: Sequence[float] | float) -> tuple[Datum, Tensor]:
    """One position with these candidates."""
    width = len(targets)
    datum = Datum(
        id="one",
        tokens=np.zeros(1, dtype=np.int32),
        targets=np.array([targets], dtype=np.int64),
        weights=np.array([[1.0] + [0.0] * (width - 1)], dtype=np.float32),
        extras={name: np.array([values], dtype=np.float32) for name, values in extras.items()},
    )
    return datum, torch.tensor([logprobs], dtype=torch.float64, requires_grad=True)


# --------------------------------------------------------------------------------------------------------------- closure
def test_closure_by_hand() -> None:
    p = [0.5, 0.2, 0.1, 0.05]
    datum, lp = decision([math.log(x) for x in p], [3, 4, 5, 6], closure=[1, -1, 1, -1])
    value, metrics = topological().fn([datum], [lp])
    assert float(value.detach()) == pytest.approx(-math.log(1 - 0.25 / 0.85), rel=1e-9)
    assert metrics == pytest.approx({"events": 1, "bad_mass": 0.25 / 0.85})
    (gradient,) = torch.autograd.grad(value, lp)
    assert (gradient[0].sign().tolist()) == [-1, 1, -1, 1]  # good up, bad down
    assert float(gradient.sum()) == pytest.approx(0.0, abs=1e-12)  # leaving the valid ids gains nothing


def test_ids_that_share_a_token_share_its_mass() -> None:
    single, lp = decision([math.log(0.5), math.log(0.2)], [3, 4], closure=[1, -1])
    shared, more = decision([math.log(0.5), math.log(0.2), math.log(0.2)], [3, 4, 4], closure=[1, -1, -1])
    assert float(topological().fn([shared], [more])[0].detach()) == pytest.approx(float(topological().fn([single], [lp])[0].detach()), rel=1e-12)


def test_nothing_to_avoid_is_zero_and_has_no_gradient() -> None:
    datum, lp = decision([-1.0, -2.0], [3, 4], closure=[1, 1])
    value, metrics = topological().fn([datum], [lp])
    assert float(value.detach()) == 0.0
    assert metrics["events"] == 0
    assert not bool(torch.autograd.grad(value, lp)[0].any())


def test_only_bad_candidates_is_an_error() -> None:
    datum, lp = decision([-1.0, -2.0], [3, 4], closure=[-1, -1])
    with pytest.raises(DataError, match="every candidate is bad"):
        topological().fn([datum], [lp])


def test_extremes_stay_finite() -> None:
    for values in ([-80.0, 0.0], [0.0, -80.0], [-1e4, -1e-7]):
        datum, lp = decision(values, [3, 4], closure=[1, -1])
        applied = apply_loss(topological(), [datum], [lp], grad=True)
        assert math.isfinite(applied.value)


@given(seed=st.integers(0, 10_000))
def test_closing_targets_against_networkx(seed: int) -> None:
    rng = np.random.default_rng(seed)
    nodes = [f"c{i}" for i in range(int(rng.integers(1, 8)))]
    edges = [(str(a), str(b)) for a, b in rng.choice(nodes, (int(rng.integers(0, 12)), 2))]
    graph = nx.DiGraph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from(edges)
    source = str(rng.choice(nodes))
    assert closing_targets(edges, source, nodes) == {node for node in nodes if nx.has_path(graph, node, source)}


# ---------------------------------------------------------------------------------------------------------- soft variants
GRAPHS: dict[str, tuple[int, list[tuple[int, int]], float]] = {
    "star": (4, [(1, 0), (2, 0), (3, 0)], 0.0),
    "diamond": (4, [(0, 1), (0, 2), (1, 3), (2, 3)], 0.0),
    "2-cycle": (2, [(0, 1), (1, 0)], 1.086),
    "3-cycle": (3, [(0, 1), (1, 2), (2, 0)], 0.504),
    "self-loop": (1, [(0, 0)], 1.718),
    "two 2-cycles and one alone": (5, [(0, 1), (1, 0), (2, 3), (3, 2)], 2.172),
    "3-cycle and back": (3, [(0, 1), (1, 2), (2, 0), (2, 1)], 1.634),
}


def adjacency(name: str) -> Tensor:
    size, edges, _ = GRAPHS[name]
    found = torch.zeros(size, size, dtype=torch.float64)
    for a, b in edges:
        found[a, b] = 1
    return found


@pytest.mark.parametrize("name", GRAPHS)
def test_golden_graphs(name: str) -> None:
    matrix = adjacency(name)
    assert float(acyclicity(matrix, "notears")) == pytest.approx(GRAPHS[name][2], abs=1e-3)
    for variant in SOFT:
        assert (float(acyclicity(matrix, variant)) > 1e-9) == (GRAPHS[name][2] > 0)


@given(seed=st.integers(0, 10_000), variant=st.sampled_from(SOFT))
def test_acyclicity_against_networkx(seed: int, variant: Variant) -> None:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 7))
    matrix = rng.uniform(0.3, 1, (size, size)) * (rng.uniform(size=(size, size)) < rng.uniform(0, 0.6))
    value = float(acyclicity(torch.tensor(matrix), variant))
    assert (value > 1e-9) == (not nx.is_directed_acyclic_graph(nx.from_numpy_array(matrix, create_using=nx.DiGraph)))
    order = rng.permutation(size)
    assert float(acyclicity(torch.tensor(matrix[order][:, order]), variant)) == pytest.approx(value, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("variant", SOFT)
def test_gradient_is_zero_off_cycles_and_right_on_them(variant: Variant) -> None:
    matrix = 0.5 * adjacency("two 2-cycles and one alone")
    matrix[4, 0] = 0.7  # leads into a cycle and lies on none
    matrix.requires_grad_()
    (gradient,) = torch.autograd.grad(acyclicity(matrix, variant), matrix)
    assert float(gradient[4, 0]) == pytest.approx(0.0, abs=1e-12)
    assert float(gradient[0, 1]) > 0
    assert torch.autograd.gradcheck(lambda a: acyclicity(a, variant), (matrix,))


def test_soft_adjacency_by_hand() -> None:
    choices = torch.log(torch.tensor([[0.3, 0.1, 0.6], [0.5, 0.5, 0.9]], dtype=torch.float64))
    nodes = torch.tensor([[1.0, 2.0, 0.0], [2.0, 3.0, 0.0]])
    found = soft_adjacency(choices, nodes, torch.tensor([3.0, 3.0]), 3)
    assert found[:2].abs().sum() == 0
    assert found[2].tolist() == pytest.approx([0.75, 1 - 0.75 * 0.5, 0.5])


def test_certain_choices_give_the_hard_graphs_value() -> None:
    """c1 → c2 and c2 → c1, each with all mass: tr e^A − d of a 2-cycle."""
    datum = Datum(
        id="two", tokens=np.zeros(2, dtype=np.int32), targets=np.array([[3, 4], [3, 4]]), weights=np.array([[1, 0], [1, 0]], dtype=np.float32),
        extras={"nodes": np.array([[1, 2], [1, 2]], dtype=np.float32), "source": np.array([1, 2], dtype=np.float32)},
    )  # fmt: skip
    lp = torch.tensor([[-60.0, 0.0], [0.0, -60.0]], dtype=torch.float64)
    value, metrics = topological("notears").fn([datum], [lp])
    assert float(value) == pytest.approx(2 * 1.0862, abs=1e-3)  # Σ w = 2
    assert metrics["cyclicity"] == pytest.approx(1.0862, abs=1e-3)


def test_variants_that_do_not_exist() -> None:
    for call in (lambda: topological("cubic"), lambda: acyclicity(torch.zeros(1, 1), "cubic")):  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="'cubic'"):
            call()


# ------------------------------------------------------------------------------------------------------------- chirality
def test_chirality_by_hand() -> None:
    datum, lp = decision([math.log(0.6), math.log(0.2)], [3, 4], polarity=[1, -1], evidence=0.5)
    datum = replace(datum, extras={**datum.extras, "evidence": np.array([0.5], dtype=np.float32)})
    value, metrics = chirality().fn([datum], [lp])
    assert float(value.detach()) == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert metrics == pytest.approx({"graphs": 1, "support_gap": 0.25})


def test_chirality_of_one_certain_relation_is_its_cross_entropy_and_balance_is_zero() -> None:
    datum, lp = decision([math.log(0.6), math.log(0.2)], [3, 4], polarity=[1, -1], evidence=0.0)
    datum = replace(datum, extras={**datum.extras, "evidence": np.array([0.0], dtype=np.float32)})
    value, _ = chirality().fn([datum], [lp])
    assert float(value.detach()) == pytest.approx(-math.log(0.25))
    assert bool(torch.autograd.grad(value, lp)[0].isfinite().all())
    even = replace(datum, extras={**datum.extras, "evidence": np.array([0.75], dtype=np.float32)})
    assert float(chirality().fn([even], [lp])[0].detach()) == pytest.approx(0.0, abs=1e-7)


# -------------------------------------------------------------------------------------------------------- from the text
PROMPT = "Document 123: A\n\nText.\n\nDocument 129: B\n\nText."
HEAD = "CLAIM[c1]: one\nCLAIM[c2] (Document 123): two\nCLAIM[c3] (Document 129): three\n"


def annotated(target: str, tokenizer: Tokenizer | None = None, prompt: str = PROMPT, documents: Sequence[str] | None = None) -> Datum:
    used = tokenizer or ByteTokenizer()
    return annotate_claims(render(Example(id="x", prompt=prompt, target=target), used), used, documents=documents)


def events(datum: Datum, name: str, tokenizer: Tokenizer | None = None) -> list[dict[str, float]]:
    """Per position the marks by the candidate's text."""
    used = tokenizer or ByteTokenizer()
    marks = datum.extras[name]
    return [{used.decode([int(t)]): float(m) for t, m in zip(datum.targets[i], marks[i], strict=True) if m} for i in np.flatnonzero((marks != 0).any(1))]


def test_star_forbids_only_the_source_itself() -> None:
    datum = annotated(HEAD + "RELATION: c2 supports c1\nRELATION: c3 refutes c1")
    assert events(datum, "closure") == [{"1": 1, "2": -1, "3": 1}]
    assert events(datum, "polarity") == [{"s": 1, "r": -1}, {"r": -1, "s": 1}]
    at = np.flatnonzero((datum.extras["polarity"] != 0).any(1))
    assert datum.extras["evidence"][at].tolist() == [1, 0]
    np.testing.assert_array_equal(
        datum.weights[:, 0], render(Example(id="x", prompt=PROMPT, target=HEAD + "RELATION: c2 supports c1\nRELATION: c3 refutes c1"), ByteTokenizer()).weights
    )
    assert not datum.weights[:, 1:].any()


def test_cycle_in_the_text_is_not_learned() -> None:
    datum = annotated(HEAD + "RELATION: c2 supports c1\nRELATION: c1 supports c2")
    assert events(datum, "closure")[1] == {"1": -1, "2": -1, "3": 1}
    (place,) = np.flatnonzero((datum.weights < 0).any(1))
    assert datum.weights[place].sum() == 0
    lp = torch.log_softmax(torch.randn(datum.targets.shape, dtype=torch.float64), -1)
    lp[:, -1] = lp[:, 0]  # the same token
    (gradient,) = apply_loss(resolve("cross_entropy"), [datum], [lp], grad=True).gradients
    assert float(gradient[place].sum()) == 0


def test_reachability_over_several_lines() -> None:
    datum = annotated(HEAD + "RELATION: c3 supports c2\nRELATION: c2 supports c1\nRELATION: c1 supports c3")
    assert events(datum, "closure") == [{"1": 1, "2": 1, "3": -1}, {"1": 1, "2": -1, "3": -1}, {"s": -1, "r": 1}]  # the last has no way out but its kind
    kind, target = np.flatnonzero((datum.weights < 0).any(1))  # neither is learned
    assert datum.targets[kind, 0] == ord("s")
    assert datum.targets[target, 0] == ord("3")


def test_sources_without_a_way_out_where_no_kind_may_close_a_circle() -> None:
    text = HEAD + "RELATION: c3 refutes c2\nRELATION: c2 supports c1\nRELATION: c1 refutes c3"
    rendered = render(Example(id="x", prompt=PROMPT, target=text), ByteTokenizer())
    datum = annotate_claims(rendered, ByteTokenizer(), acyclic=("supports", "refutes"))
    found = events(datum, "closure")
    assert found[2:] == [{"1": -1, "2": 1, "3": 1}]  # whoever starts at c1 is lost, so it must not start there; kind and target are no choices any more
    only = annotate_claims(rendered, ByteTokenizer(), acyclic=("refutes",))
    assert events(only, "closure") == [{"1": 1, "2": 1, "3": -1}, {"1": -1, "2": 1, "3": 1}]


def test_ids_of_several_tokens() -> None:
    head = "CLAIM[c1]: a\nCLAIM[c2]: b\nCLAIM[c12]: c\nCLAIM[c13]: d\n"
    datum = annotated(head + "RELATION: c12 supports c13")
    assert events(datum, "closure") == [{"1": 1, "2": 1}, {"3": 1, "2": -1, "": 1}][1:] or events(datum, "closure") == [{"3": 1, "2": -1, "\n": 1}]
    assert [set(found) for found in events(datum, "nodes")] == [{"1", "2"}]
    assert sorted(datum.extras["nodes"][datum.extras["nodes"].any(1)][0].tolist())[-4:] == [1, 2, 3, 4]


def test_relations_that_are_left_out() -> None:
    assert events(annotated(HEAD + "RELATION: c9 supports c1\nRELATION: c2 supports c9\nRELATION: c2 contrasts c1"), "closure") == []
    assert events(annotated("no graph at all"), "closure") == []
    assert annotated("no graph at all").targets.shape[1] == 1
    loss = combine({"cross_entropy": 1.0, "topological": 1.0, "citation_validity": 1.0, "chirality": 1.0, "topological(variant=expm)": 1.0})
    datum = annotated("no graph at all")
    applied = apply_loss(loss, [datum], [torch.full(datum.targets.shape, -1.0)], grad=True)
    assert applied.metrics["grad_norm/topological"] == 0.0  # a dead term is seen


def test_case_of_ids_and_words() -> None:
    datum = annotated("CLAIM[C1]: a\nclaim[c2]: b\nrelation - C2 SUPPORTS c1")
    assert len(events(datum, "closure")) == 1
    assert events(datum, "polarity") == [{"S": 1, "R": -1}]


def test_citations_follow_the_digits() -> None:
    found = events(annotated(HEAD), "citation")
    assert [{k for k, v in event.items() if v > 0} for event in found] == [{"1"}, {"2"}, {"3", "9"}] * 2
    assert all(len(event) == 10 for event in found)


def test_invented_citation_is_judged_where_it_leaves() -> None:
    datum = annotated("CLAIM[c2] (Document 129456): x")
    found = events(datum, "citation")
    assert [{k for k, v in event.items() if v > 0} for event in found][:3] == [{"1"}, {"2"}, {"3", "9"}]
    assert found[3]["4"] == -1
    assert found[3][")"] == 1 if ")" in found[3] else 1 in found[3].values()
    assert (datum.weights < 0).any()
    assert events(annotated("CLAIM[c2] (Document 777): x", prompt="no documents"), "citation") == []
    assert events(annotated("CLAIM[c2] (Document 777): x", prompt="no documents", documents=("777",)), "citation")[0]["7"] == 1


def test_other_tokenizers_and_characters_of_several_bytes() -> None:
    datum = annotated("CLAIM[c1]: naïve — ünïcode 🙂\nCLAIM[c2]: b\nRELATION: c2 supports c1")
    assert events(datum, "closure") == [{"1": 1, "2": -1}]


class _Merging(ByteTokenizer):
    """Encodes " c1" as one token, as large vocabularies do."""

    words = (" c1", " c2", " c3")

    def encode(self, text: str) -> list[int]:
        found: list[int] = []
        while text:
            word = next((i for i, word in enumerate(self.words) if text.startswith(word)), None)
            found += [300 + word] if word is not None else super().encode(text[0])
            text = text[3:] if word is not None else text[1:]
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.words[token - 300] if token >= 300 else super(_Merging, self).decode([token]) for token in tokens)


def test_whole_ids_as_tokens() -> None:
    tokenizer = _Merging(chat=False)
    datum = annotated(HEAD + "RELATION: c2 supports c1", tokenizer)
    assert events(datum, "closure", tokenizer) == [{" c1": 1, " c2": -1, " c3": 1}]


def test_tokens_that_no_encoder_makes_are_left_out() -> None:
    tokenizer = _Merging(chat=False)
    apart = render(Example(id="x", prompt="p", target=HEAD + "RELATION: c2 supports c1"), ByteTokenizer(chat=False))
    assert events(annotate_claims(apart, tokenizer), "closure", tokenizer) == []


def test_text_cut_after_an_id() -> None:
    whole = render(Example(id="x", prompt="p", target="CLAIM[c1]: a\nCLAIM[c12]: b\nRELATION: c12 supports c1"), ByteTokenizer())
    cut = replace(whole, tokens=whole.tokens[:-1], targets=whole.targets[:-1], weights=whole.weights[:-1])
    assert len(events(annotate_claims(whole, ByteTokenizer()), "closure")) == 1
    assert events(annotate_claims(cut, ByteTokenizer()), "closure") == []


def test_wrong_inputs() -> None:
    with pytest.raises(DataError, match="as rendered"):
        annotate_claims(make_datum(3, candidates=2, vocab_size=V), ByteTokenizer())
    with pytest.raises(DataError, match=r"annotate_claims"):
        topological().fn([replace(make_datum(3, vocab_size=V), extras={"closure": np.zeros(3, np.float32)})], [torch.zeros(3)])
    with pytest.raises(DataError, match="0 data"):
        topological().fn([], [])
    datum, lp = decision([-1.0, -2.0], [3, 4], nodes=[1, 2], source=0.0)
    with pytest.raises(DataError, match="without its source"):
        topological("expm").fn([replace(datum, extras={**datum.extras, "source": np.zeros(1, np.float32)})], [lp])


@pytest.mark.parametrize(("name", "metric"), [("topological", "bad_mass"), ("topological(variant=expm)", "cyclicity"), ("citation_validity", "bad_mass")])
def test_training_lowers_what_the_loss_names(name: str, metric: str) -> None:
    """On a real model with the whole way of preparation; cross-entropy beside it."""
    loss = combine({"cross_entropy": 0.1, name: 10.0})
    assert loss.prepare is not None
    texts = [HEAD + "RELATION: c2 supports c1\nRELATION: c1 supports c2"]
    with connect("fake") as backend:
        tokenizer = backend.tokenizer("tiny")
        batch = Batch(data=tuple(loss.prepare(render(Example(id=str(i), prompt=PROMPT, target=text), tokenizer), tokenizer) for i, text in enumerate(texts)))
        session = backend.train("tiny", LoraConfig(dropout=0.0))
        before = session.forward(batch, loss).result().metrics[f"{name}/{metric}"]
        for _ in range(20):
            session.forward_backward(batch, loss).result()
            session.optim_step(AdamConfig(lr=1e-2)).result()
        after = session.forward(batch, loss).result().metrics[f"{name}/{metric}"]
    assert after < 0.7 * before


@pytest.mark.parametrize(("name", "marks"), [("topological", "closure"), ("citation_validity", "citation")])
def test_valid_makes_it_the_probability_of_a_valid_choice(name: str, marks: str) -> None:
    """With valid=1 the loss is −log P(good), over the whole vocabulary; by hand on three candidates and mass elsewhere."""
    datum, lp = decision([math.log(0.2), math.log(0.3), math.log(0.1)], [3, 4, 5], **{marks: [1, -1, 1]})
    found = {valid: float(resolve(f"{name}(valid={valid})").fn([datum], [lp])[0].detach()) for valid in (0.0, 0.5, 1.0)}
    assert found[0.0] == pytest.approx(-math.log(0.3 / 0.6))
    assert found[1.0] == pytest.approx(-math.log(0.3))
    assert found[0.5] == pytest.approx((found[0.0] + found[1.0]) / 2)


def test_valid_is_checked() -> None:
    for wrong in ("topological(valid=-1.0)", "topological(valid=nan)", "topological(valid=1.0, variant=expm)"):
        with pytest.raises(ConfigError, match="valid="):
            resolve(wrong)
