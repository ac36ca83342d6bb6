"""Cross-entropy, squared error and divergence against numbers from elsewhere, the loss contract, and properties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import ArrayLike, NDArray
from scipy.special import rel_entr
from torch import Tensor
from torch.nn import functional

from crucible_framework.errors import DataError
from crucible_framework.losses import combine, resolve
from crucible_framework.losses.tokenwise import cross_entropy, extra, kl, mse
from crucible_framework.protocols import Loss, LossFn
from crucible_framework.records import Datum
from crucible_framework.testing import LossContract, make_data, make_datum

torch.set_num_threads(1)
V = 16
REFERENCE = "reference_logprobs"


def with_reference(data: Sequence[Datum], seed: int = 0) -> tuple[Datum, ...]:
    rng = np.random.default_rng(seed)
    return tuple(replace(datum, extras={REFERENCE: np.log(rng.uniform(0.01, 0.99, datum.targets.shape)).astype(np.float32)}) for datum in data)


def one(logprobs: ArrayLike, weights: ArrayLike, **extras: ArrayLike) -> tuple[Datum, Tensor]:
    given_extras = {name: np.asarray(values, dtype=np.float32) for name, values in extras.items()}
    values = np.asarray(logprobs, dtype=np.float64)
    datum = make_datum(len(values), weights=weights, extras=given_extras, candidates=None if values.ndim == 1 else values.shape[1])
    return datum, torch.tensor(values, requires_grad=True)


def value(fn: LossFn, datum: Datum, logprobs: Tensor) -> float:
    return float(fn([datum], [logprobs])[0].detach())


# -------------------------------------------------------------------------------------------------------------- contract
class TestCrossEntropy(LossContract):
    @pytest.fixture
    def loss(self) -> Loss:
        return resolve("cross_entropy")


class TestSoftCrossEntropy(TestCrossEntropy):
    @pytest.fixture
    def data(self) -> tuple[Datum, ...]:
        return tuple(make_datum(length, candidates=3, seed=length, vocab_size=V) for length in (4, 6))


class TestMse(LossContract):
    @pytest.fixture
    def loss(self) -> Loss:
        return resolve("mse")


class TestKl(LossContract):
    @pytest.fixture
    def loss(self) -> Loss:
        return resolve("kl")

    @pytest.fixture
    def data(self) -> tuple[Datum, ...]:
        return with_reference(make_data((6, 3, 5), vocab_size=V))


class TestSoftKl(TestKl):
    @pytest.fixture
    def data(self) -> tuple[Datum, ...]:
        return with_reference([make_datum(length, candidates=3, seed=length, vocab_size=V) for length in (4, 6)])


class TestCombined(TestKl):
    @pytest.fixture
    def loss(self) -> Loss:
        return combine({"cross_entropy": 0.8, "kl": 0.2, "mse": 1.5})


def _entropy(data: Sequence[Datum], logits: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    terms = []
    for datum, scores in zip(data, logits, strict=True):
        logp = torch.log_softmax(scores, -1)
        terms.append(((logp.exp() * logp).sum(-1) * torch.tensor(datum.weights).to(logp)).sum())
    return torch.stack(terms).sum(), {}


class TestOnLogits(LossContract):
    """A loss that needs the whole distribution, combined with one that does not."""

    @pytest.fixture
    def loss(self) -> Loss:
        return combine({Loss(name="entropy", fn=_entropy, source="Shannon 1948", needs="logits"): 0.1, "cross_entropy": 1.0})


# --------------------------------------------------------------------------------------------------------------- numbers
def test_cross_entropy_is_that_of_torch() -> None:
    datum = make_datum(9, vocab_size=V)
    logits = torch.randn(9, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logprobs = torch.log_softmax(logits, -1).gather(1, torch.tensor(datum.targets)[:, None])[:, 0]
    each = functional.cross_entropy(logits, torch.tensor(datum.targets), reduction="none")
    assert value(cross_entropy, datum, logprobs) == pytest.approx(float((each * torch.tensor(datum.weights)).sum()), rel=1e-12)


def test_soft_cross_entropy_is_that_of_torch() -> None:
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(V), 5)
    datum = replace(make_datum(5, vocab_size=V, candidates=V, weights=weights.astype(np.float32)), targets=np.tile(np.arange(V), (5, 1)))
    logits = torch.tensor(rng.normal(size=(5, V)))
    expected = functional.cross_entropy(logits, torch.tensor(datum.weights, dtype=torch.float64), reduction="sum")
    assert value(cross_entropy, datum, torch.log_softmax(logits, -1)) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(("p", "expected"), [(1.0, 0.0), (0.5, 0.25), (0.1, 0.81)])
def test_mse_by_hand(p: float, expected: float) -> None:
    assert value(mse, *one([math.log(p)], [1.0])) == pytest.approx(expected)
    assert value(mse, *one([math.log(p)], [3.0])) == pytest.approx(3 * expected)


def test_mse_gradient_by_hand() -> None:
    datum, logprobs = one([math.log(0.3)], [2.0])
    (gradient,) = torch.autograd.grad(mse([datum], [logprobs])[0], logprobs)
    assert float(gradient) == pytest.approx(2.0 * 2 * (0.3 - 1) * 0.3)  # d (1 − p)² / d log p = −2 (1 − p) p


def test_kl_by_hand() -> None:
    assert value(kl, *one([-1.0, -2.0], [1.0, 0.5], reference_logprobs=[-1.0, -1.0])) == pytest.approx(0.5 * (math.e - 2))


def distributions(seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    p, q = np.random.default_rng(seed).dirichlet(np.ones(V), 2).astype(np.float32).astype(np.float64)
    return p, q


@pytest.mark.parametrize("seed", range(3))
def test_soft_kl_over_the_vocabulary_is_the_divergence(seed: int) -> None:
    p, q = distributions(seed)
    q /= q.sum()
    datum, logprobs = one(np.log(p)[None], np.ones((1, V)), reference_logprobs=np.log(q)[None])
    assert value(kl, datum, logprobs) == pytest.approx(float(rel_entr(q, p).sum()), rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_k3_in_expectation(seed: int) -> None:
    """Over targets drawn from the model its value is KL(p ‖ p_ref) and its gradient that of KL(p_ref ‖ p)."""
    _, q = distributions(seed)
    logits = torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)
    logp = torch.log_softmax(logits, -1)
    p = logp.detach().exp().numpy()
    datum, _ = one(np.zeros(V), p, reference_logprobs=np.log(q))  # each token once, weighted by its probability
    found, _ = kl([datum], [logp])
    assert float(found.detach()) == pytest.approx(float(rel_entr(p, q).sum()) + float(q.sum() - p.sum()), rel=1e-4)
    (gradient,) = torch.autograd.grad(found, logits, retain_graph=True)
    (expected,) = torch.autograd.grad((torch.tensor(q) * (torch.tensor(np.log(q)) - logp)).sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_soft_kl_leaves_out_candidates_without_reference() -> None:
    reference = [[math.log(0.5), -math.inf], [math.log(0.25), math.nan]]
    logprobs = np.array([[math.log(0.25), -math.inf], [math.log(0.25), -1.0]])
    datum, values = one(logprobs, [[1.0, 1.0], [1.0, 0.0]], reference_logprobs=reference)
    found, _ = kl([datum], [values])
    assert float(found.detach()) == pytest.approx(0.5 * math.log(2))
    (gradient,) = torch.autograd.grad(found, values)
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, 0.0], [-0.25, 0.0]], dtype=torch.float64))


def test_reference_that_is_no_number_is_not_hidden() -> None:
    datum, values = one([[-1.0]], [[1.0]], reference_logprobs=[[math.nan]])
    assert math.isnan(value(kl, datum, values))


# ------------------------------------------------------------------------------------------------------------ properties
LOGPROBS = hnp.arrays(np.float64, st.integers(1, 8), elements=st.floats(-20, -1 / 1024))
FUNCTIONS = {"cross_entropy": cross_entropy, "mse": mse, "kl": kl}


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Log-probs, weights of at least 0, reference log-probs."""
    logprobs = draw(LOGPROBS)
    weights = draw(hnp.arrays(np.float64, len(logprobs), elements=st.sampled_from([0.0, 0.25, 1.0, 2.0])))
    reference = draw(hnp.arrays(np.float64, len(logprobs), elements=st.floats(-20, -1 / 1024, width=32)))
    return logprobs, weights, reference


@given(case=cases(), name=st.sampled_from(sorted(FUNCTIONS)))
def test_losses_are_linear_in_the_weights(case: tuple[NDArray[np.float64], ...], name: str) -> None:
    logprobs, weights, reference = case
    once, thrice = (value(FUNCTIONS[name], *one(logprobs, factor * weights, reference_logprobs=reference)) for factor in (1, 3))
    assert thrice == pytest.approx(3 * once, rel=1e-9, abs=1e-9)


@given(case=cases(), name=st.sampled_from(sorted(FUNCTIONS)))
def test_losses_are_at_least_zero(case: tuple[NDArray[np.float64], ...], name: str) -> None:
    logprobs, weights, reference = case
    found = value(FUNCTIONS[name], *one(logprobs, weights, reference_logprobs=reference))
    assert found >= -1e-9
    if name == "mse":
        assert found <= weights.sum() + 1e-9


@given(case=cases())
def test_kl_to_itself_is_zero(case: tuple[NDArray[np.float64], ...]) -> None:
    _, weights, reference = case
    datum, logprobs = one(reference, weights, reference_logprobs=reference)
    found, _ = kl([datum], [logprobs])
    (gradient,) = torch.autograd.grad(found, logprobs)
    assert float(found.detach()) == pytest.approx(0.0, abs=1e-9)
    assert torch.allclose(gradient, torch.zeros_like(gradient), atol=1e-6)


@given(case=cases(), name=st.sampled_from(sorted(FUNCTIONS)), bad=st.sampled_from([-math.inf, math.inf, math.nan]))
def test_weight_zero_hides_every_number(case: tuple[NDArray[np.float64], ...], name: str, bad: float) -> None:
    """Infinite and missing log-probs and references at positions of weight 0 reach neither the value nor the gradient."""
    logprobs, weights, reference = case
    clean = value(FUNCTIONS[name], *one(logprobs, weights, reference_logprobs=reference))
    dirty, dirty_reference = np.where(weights == 0, bad, logprobs), np.where(weights == 0, bad, reference)
    datum, values = one(dirty, weights, reference_logprobs=dirty_reference)
    found, _ = FUNCTIONS[name]([datum], [values])
    (gradient,) = torch.autograd.grad(found, values)
    assert float(found.detach()) == clean
    assert not bool(gradient[torch.tensor(weights == 0)].any())
    assert bool(gradient.isfinite().all())


# ---------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_shapes_that_do_not_fit(name: str) -> None:
    datum, logprobs = one([-1.0, -1.0], [1.0, 1.0], reference_logprobs=[0.0, 0.0])
    with pytest.raises(DataError, match=r"log-probs of shape \(1,\); expected that of its targets, \(2,\)"):
        FUNCTIONS[name]([datum], [logprobs[:1]])
    with pytest.raises(DataError, match="0 data and 0 log-prob tensors"):
        FUNCTIONS[name]([], [])
    with pytest.raises(DataError, match="1 data and 2 log-prob tensors"):
        FUNCTIONS[name]([datum], [logprobs, logprobs])


def test_reference_of_another_shape() -> None:
    datum, logprobs = one([-1.0, -1.0], [1.0, 1.0], reference_logprobs=[0.0])
    with pytest.raises(DataError, match=r"'reference_logprobs' of shape \(1,\); expected that of its targets, \(2,\)"):
        kl([datum], [logprobs])


def test_missing_extra_says_how_to_supply_it() -> None:
    datum = make_datum(4, name="row-3")
    with pytest.raises(DataError, match=r"'row-3' has no extra 'advantages', which the loss needs; its extras: none\. Supply it with dataclasses\.replace"):
        extra(datum, "advantages")
    array = np.ones(4, np.float32)
    assert extra(replace(datum, extras={"advantages": array}), "advantages") is array
    with pytest.raises(DataError, match="'row-3' has no extra 'reference_logprobs', which the loss 'kl' needs"):
        kl([datum], [torch.zeros(4)])
