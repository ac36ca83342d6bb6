"""Regularizers and distillation: the loss contract, and divergences against scipy and torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import rel_entr
from torch import Tensor

from crucible_framework.errors import ConfigError, DataError
from crucible_framework.losses import combine, resolve
from crucible_framework.losses.distillation import distillation, log1mexp
from crucible_framework.protocols import Loss
from crucible_framework.records import Datum
from crucible_framework.testing import LossContract, make_data, make_datum

torch.set_num_threads(1)
V = 16
REFERENCE = "reference_logprobs"


def with_extra(data: tuple[Datum, ...], name: str) -> tuple[Datum, ...]:
    rng = np.random.default_rng(0)

    def values(shape: tuple[int, ...]) -> NDArray[np.float32]:
        found = np.log(rng.uniform(0.01, 0.9, shape)) if len(shape) == 1 else np.log(0.9 * rng.dirichlet(np.ones(shape[1]), shape[0]))
        return found.astype(np.float32)

    return tuple(replace(datum, extras={name: values(datum.targets.shape)}) for datum in data)


class TestOnTargets(LossContract):
    @pytest.fixture(params=["reverse_kl", "symmetric_kl", "forward_kl", "entropy", "negative_entropy"])
    def loss(self, request: pytest.FixtureRequest) -> Loss:
        return resolve(request.param)

    @pytest.fixture
    def data(self) -> tuple[Datum, ...]:
        return with_extra(make_data((6, 3, 5), vocab_size=V), REFERENCE)


class TestOnCandidates(TestOnTargets):
    @pytest.fixture
    def data(self) -> tuple[Datum, ...]:
        return with_extra(tuple(make_datum(length, candidates=3, seed=length, vocab_size=V) for length in (4, 6)), REFERENCE)


class TestConsistency(LossContract):
    additive = False

    @pytest.fixture
    def loss(self) -> Loss:
        return resolve("consistency")

    @pytest.fixture(params=[None, 3])
    def data(self, request: pytest.FixtureRequest) -> tuple[Datum, ...]:
        made = []
        for name in ("a", "b"):
            one = make_datum(6, candidates=request.param, seed=ord(name), vocab_size=V, name=f"{name}#view1")
            two = make_datum(8, candidates=request.param, seed=7, vocab_size=V, name=f"{name}#view2")
            targets, weights = two.targets.copy(), np.zeros_like(two.weights)
            targets[-3:], weights[-3:] = one.targets[-3:], one.weights[-3:]
            made += [one, replace(two, targets=targets, weights=weights)]
        return tuple(made)


def distinct(length: int, k: int) -> Datum:
    """Candidates that are different tokens, as a teacher's likeliest are."""
    datum = make_datum(length, candidates=k, seed=length, vocab_size=V)
    rng = np.random.default_rng(length)
    return replace(datum, targets=np.stack([rng.permutation(V)[:k] for _ in range(length)]))


class TestDistillation(LossContract):
    @pytest.fixture(params=["forward", "reverse", "jensen_shannon"])
    def direction(self, request: pytest.FixtureRequest) -> Literal["forward", "reverse", "jensen_shannon"]:
        return request.param  # type: ignore[no-any-return]

    @pytest.fixture
    def loss(self, direction: Literal["forward", "reverse", "jensen_shannon"]) -> Loss:
        return distillation(direction)

    @pytest.fixture
    def data(self) -> tuple[Datum, ...]:
        return with_extra((distinct(4, 3), distinct(6, 5)), "teacher_logprobs")


class TestDistillationWithoutTail(TestDistillation):
    @pytest.fixture
    def loss(self, direction: Literal["forward", "reverse", "jensen_shannon"]) -> Loss:
        return distillation(direction, temperature=2.0, tail=False)


# --------------------------------------------------------------------------------------------------------------- numbers
def whole(seed: int, name: str = REFERENCE) -> tuple[Datum, Tensor, NDArray[np.float64], NDArray[np.float64]]:
    """One position with all of the vocabulary as candidates: datum, log-probs, p and q."""
    p, q = np.random.default_rng(seed).dirichlet(np.ones(V), 2)
    datum = make_datum(1, candidates=V, weights=np.full((1, V), 1.0), vocab_size=V)
    datum = replace(datum, targets=np.arange(V)[None], extras={name: np.log(q).astype(np.float32)[None]})
    return datum, torch.tensor(np.log(p))[None], p, q


@pytest.mark.parametrize("seed", range(3))
def test_divergences_over_the_vocabulary(seed: int) -> None:
    datum, lp, p, q = whole(seed)
    forward, reverse = float(rel_entr(q, p).sum()), float(rel_entr(p, q).sum())
    for name, expected in (("forward_kl", forward), ("reverse_kl", reverse), ("symmetric_kl", (forward + reverse) / 2)):
        assert float(resolve(name).fn([datum], [lp])[0]) == pytest.approx(expected, rel=1e-5), name


def test_reverse_kl_on_samples_has_the_gradient_of_the_divergence() -> None:
    logits = torch.randn(V, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    q = torch.log_softmax(torch.randn(V, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), -1)
    lp = torch.log_softmax(logits, -1)
    datum = replace(make_datum(V, weights=lp.detach().exp().numpy(), vocab_size=V), extras={REFERENCE: q.float().numpy()})
    (found,) = torch.autograd.grad(resolve("reverse_kl").fn([datum], [lp])[0], logits, retain_graph=True)
    (expected,) = torch.autograd.grad((lp.exp() * (lp - q)).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_candidates_without_reference_do_not_count() -> None:
    datum = replace(make_datum(1, candidates=2, weights=[[1.0, 1.0]], vocab_size=V), extras={REFERENCE: np.array([[math.log(0.5), -np.inf]], dtype=np.float32)})
    lp = torch.tensor([[math.log(0.25), -3.0]], dtype=torch.float64, requires_grad=True)
    value, _ = resolve("reverse_kl").fn([datum], [lp])
    assert float(value.detach()) == pytest.approx(0.25 * math.log(0.5))
    (gradient,) = torch.autograd.grad(value, lp)
    assert bool(gradient.isfinite().all())
    assert float(gradient[0, 1]) == 0


def test_entropy_of_known_distributions() -> None:
    datum = make_datum(3, weights=[0.0, 1.0, 2.0], vocab_size=V)
    logits = torch.zeros(3, V)
    logits[2, 3] = 1000.0  # certain
    assert float(resolve("entropy").fn([datum], [logits])[0]) == pytest.approx(math.log(V), rel=1e-6)
    assert float(resolve("negative_entropy").fn([datum], [logits])[0]) == pytest.approx(-math.log(V), rel=1e-6)
    with pytest.raises(DataError, match="0 data"):
        resolve("entropy").fn([], [])


def views(left: list[float], right: list[float], names: tuple[str, str] = ("a#view1", "a#view2")) -> tuple[list[Datum], list[Tensor]]:
    data = [replace(make_datum(2, weights=[1.0, 1.0], vocab_size=V, name=name), targets=np.array([3, 4])) for name in names]
    return data, [torch.tensor(values, dtype=torch.float64) for values in (left, right)]


def test_consistency_by_hand() -> None:
    value, metrics = resolve("consistency").fn(*views([-1.0, -2.0], [-1.5, -2.0]))
    assert float(value) / 4 == pytest.approx((0.5 * 0.25) / 2)  # the mean over the answer's tokens
    assert metrics == {"views": 1.0}


def test_views_that_cannot_be_compared() -> None:
    loss = resolve("consistency").fn
    data, lp = views([-1.0, -2.0], [-1.5, -2.0])
    with pytest.raises(DataError, match="cannot be compared"):
        loss(data[:1], lp[:1])
    with pytest.raises(DataError, match="cannot be compared"):
        loss([data[0], replace(data[1], targets=np.array([3, 5]))], lp)
    with pytest.raises(DataError, match="'b' is no view"):
        loss([data[0], replace(data[1], id="b")], lp)


# ---------------------------------------------------------------------------------------------------------- distillation
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_distillation_over_the_vocabulary_is_the_divergence(seed: int, tail: bool) -> None:
    datum, lp, p, q = whole(seed, "teacher_logprobs")
    middle = (p + q) / 2
    expected = {
        "forward": rel_entr(q, p).sum(),
        "reverse": rel_entr(p, q).sum(),
        "jensen_shannon": (rel_entr(p, middle).sum() + rel_entr(q, middle).sum()) / 2,
    }
    for direction, value in expected.items():
        found, metrics = distillation(direction, tail=tail).fn([datum], [lp])  # type: ignore[arg-type]
        assert float(found) / V == pytest.approx(float(value), rel=1e-3, abs=1e-6)  # w_t is Σ_k weights = V
        assert metrics["teacher_mass"] == pytest.approx(1.0, rel=1e-5)


def test_distillation_has_the_soft_cross_entropys_gradient_without_a_tail_mass() -> None:
    datum, _, _, q = whole(0, "teacher_logprobs")
    datum = replace(datum, weights=q.astype(np.float32)[None])
    logits = torch.randn(1, V, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    lp = torch.log_softmax(logits, -1)
    found = [torch.autograd.grad(loss.fn([datum], [lp])[0], logits, retain_graph=True)[0] for loss in (distillation(tail=False), resolve("cross_entropy"))]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_the_tail_teaches_how_much_mass_the_candidates_have() -> None:
    datum = replace(make_datum(1, candidates=2, weights=[[0.5, 0.5]], vocab_size=V), targets=np.array([[3, 4]]))
    datum = replace(datum, extras={"teacher_logprobs": np.log([[0.6, 0.2]]).astype(np.float32)})
    lp = torch.log(torch.tensor([[0.3, 0.1]], dtype=torch.float64))  # the same odds, half of the mass
    assert float(distillation(tail=False).fn([datum], [lp])[0]) == pytest.approx(0.0, abs=1e-6)
    expected = 0.6 * math.log(2) + 0.2 * math.log(2) + 0.2 * math.log(0.2 / 0.6)
    assert float(distillation().fn([datum], [lp])[0]) == pytest.approx(expected, rel=1e-5)


def test_temperature_by_hand_and_padding() -> None:
    datum = replace(make_datum(1, candidates=3, weights=[[0.5, 0.5, 0.0]], vocab_size=V), targets=np.array([[3, 4, 4]]))
    datum = replace(datum, extras={"teacher_logprobs": np.array([[math.log(0.8), math.log(0.2), -np.inf]], dtype=np.float32)})
    lp = torch.log(torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)).requires_grad_()
    for loss in (distillation(temperature=2.0, tail=False), distillation("jensen_shannon", tail=False), distillation("reverse")):
        value, _ = loss.fn([datum], [lp])
        assert float(value.detach()) > 0
        assert bool(torch.autograd.grad(value, lp)[0].isfinite().all())
    teacher, student = (np.sqrt(x) / np.sqrt(x).sum() for x in (np.array([0.8, 0.2]), np.array([0.5, 0.25])))
    found = float(distillation(temperature=2.0, tail=False).fn([datum], [lp])[0].detach())
    assert found == pytest.approx(4 * float(rel_entr(teacher, student).sum()), rel=1e-5)


@pytest.mark.parametrize("make", [lambda: distillation("sideways"), lambda: distillation(temperature=2.0), lambda: distillation(temperature=0.0, tail=False)])  # type: ignore[arg-type]
def test_settings_out_of_range(make: Callable[[], Loss]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        make()


def test_shapes_that_do_not_fit() -> None:
    (datum,) = with_extra((make_datum(3, vocab_size=V),), "teacher_logprobs")
    with pytest.raises(DataError, match=r"expected \[T, K\] for all"):
        distillation().fn([datum], [torch.zeros(3)])


def test_log1mexp_is_exact_at_both_ends() -> None:
    values = torch.tensor([-1e-8, -0.1, -1.0, -40.0], dtype=torch.float64)
    expected = [math.log(-math.expm1(x)) for x in values.tolist()]
    assert log1mexp(values).tolist() == pytest.approx(expected, rel=1e-12)


def test_all_together() -> None:
    """Several terms on the same data, with a norm for each."""
    (datum,) = with_extra((make_datum(5, vocab_size=V),), REFERENCE)
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(0), requires_grad=True)
    _, metrics = combine({"cross_entropy": 1.0, "negative_entropy": 0.01, "reverse_kl": 0.1}).fn([datum], [logits])
    assert {f"grad_norm/{name}" for name in ("cross_entropy", "negative_entropy", "reverse_kl")} <= metrics.keys()
    assert all(metrics[f"grad_norm/{name}"] > 0 for name in ("cross_entropy", "negative_entropy", "reverse_kl"))
