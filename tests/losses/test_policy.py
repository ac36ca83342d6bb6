"""Policy losses against the service's formulas in plain Python, the loss contract, and advantages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from torch import Tensor

from crucible_framework.errors import ConfigError, DataError, UnknownNameError
from crucible_framework.losses import losses, resolve
from crucible_framework.losses.advantages import group_advantages, sampled_datum
from crucible_framework.losses.apply import apply_loss
from crucible_framework.losses.policy import cispo, dro, gspo, on_policy_distillation, ppo
from crucible_framework.protocols import Loss
from crucible_framework.records import Completion, Datum
from crucible_framework.testing import LossContract, make_data, make_datum

torch.set_num_threads(1)
V = 16
NAMES = ("importance_sampling", "ppo", "cispo", "dro", "gspo")


def sampled(data: Sequence[Datum], seed: int = 0) -> tuple[Datum, ...]:
    rng = np.random.default_rng(seed)

    def extras(n: int) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float32]]]:
        return {
            "logprobs": np.log(rng.uniform(0.01, 0.5, n)).astype(np.float32),
            "advantages": rng.normal(size=n).astype(np.float32),
            "teacher_logprobs": np.log(rng.uniform(0.01, 0.5, n)).astype(np.float32),
        }

    return tuple(replace(datum, extras=extras(len(datum))) for datum in data)


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def by_hand(name: str, lp: Sequence[float], q: Sequence[float], a: Sequence[float], w: Sequence[float]) -> float:
    rows = list(zip(lp, q, a, w, strict=True))
    if name == "importance_sampling":
        return -sum(w * math.exp(p - q) * a for p, q, a, w in rows)
    if name == "ppo":
        return -sum(w * min(math.exp(p - q) * a, clip(math.exp(p - q), 0.8, 1.2) * a) for p, q, a, w in rows)
    if name == "cispo":
        return -sum(w * clip(math.exp(p - q), 0.8, 1.2) * p * a for p, q, a, w in rows)
    if name == "dro":
        return -sum(w * (p * a - 0.5 * 0.05 * (p - q) ** 2) for p, q, a, w in rows)
    used = [p - q for p, q, _, w in rows if w]
    s = math.exp(sum(used) / len(used))
    return -sum(w * min(s * a, clip(s, 0.8, 1.2) * a) for _, _, a, w in rows)


class PolicyContract(LossContract):
    @pytest.fixture
    def data(self) -> tuple[Datum, ...]:
        return sampled(make_data((6, 3, 5), vocab_size=V))


class TestImportanceSampling(PolicyContract):
    @pytest.fixture
    def loss(self) -> Loss:
        return resolve("importance_sampling")


class TestPpo(PolicyContract):
    @pytest.fixture
    def loss(self) -> Loss:
        return ppo(0.1, 20.0)  # wide, so that some tokens have a gradient


class TestDro(PolicyContract):
    @pytest.fixture
    def loss(self) -> Loss:
        return resolve("dro")


class TestOnPolicyDistillation(PolicyContract):
    @pytest.fixture
    def loss(self) -> Loss:
        return resolve("on_policy_distillation")


class TestCispo(PolicyContract):
    @pytest.fixture
    def loss(self) -> Loss:
        return resolve("cispo")

    def test_gradient_is_that_of_the_value(self, loss: Loss, data: tuple[Datum, ...], inputs: list[Tensor]) -> None:
        """By design it is not (sg): −w · clip(r) · A."""
        for datum, values, gradient in zip(data, inputs, self._gradient(loss, data, inputs), strict=True):
            ratio = (values.detach() - torch.tensor(datum.extras["logprobs"]).double()).exp().clamp(0.8, 1.2)
            expected = -torch.tensor(datum.weights) * ratio * torch.tensor(datum.extras["advantages"])
            torch.testing.assert_close(gradient, expected.double())


class TestGspo(PolicyContract):
    @pytest.fixture
    def loss(self) -> Loss:
        return gspo(0.0, 100.0)

    def test_gradient_is_that_of_the_value(self, loss: Loss, data: tuple[Datum, ...], inputs: list[Tensor]) -> None:
        """By design it is not (the mean has no gradient): −w · s · A where s is within its bounds."""
        for datum, values, gradient in zip(data, inputs, self._gradient(loss, data, inputs), strict=True):
            used = datum.weights != 0
            s = math.exp(float((values.detach().numpy() - datum.extras["logprobs"])[used].mean()))
            np.testing.assert_allclose(gradient.numpy(), -datum.weights * s * datum.extras["advantages"], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10_000))
def test_values_are_the_services(name: str, seed: int) -> None:
    (datum,) = sampled([make_datum(7, seed=seed, vocab_size=V)], seed)
    lp = np.log(np.random.default_rng(seed + 1).uniform(0.01, 0.5, 7))
    found, metrics = resolve(name).fn([datum], [torch.tensor(lp)])
    expected = by_hand(name, lp, datum.extras["logprobs"].astype(float), datum.extras["advantages"].astype(float), datum.weights.astype(float))  # type: ignore[arg-type]
    assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert 0 <= metrics.get("clipped", 0.0) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_native_names_are_the_services(name: str) -> None:
    assert resolve(name).native == name
    assert resolve(name).extras == ("logprobs", "advantages")


def test_at_the_sampler_all_but_dro_and_cispo_give_minus_the_advantages() -> None:
    (datum,) = sampled([make_datum(6, vocab_size=V)])
    lp = torch.tensor(datum.extras["logprobs"]).double()
    expected = -float((datum.weights * datum.extras["advantages"]).sum())
    for name in ("importance_sampling", "ppo", "gspo"):
        value, metrics = resolve(name).fn([datum], [lp])
        assert float(value) == pytest.approx(expected, rel=1e-6)
        assert metrics["ratio"] == pytest.approx(1.0)
        assert metrics["kl_sampler"] == pytest.approx(0.0)
    for name in NAMES:  # and all have REINFORCE's gradient there
        (gradient,) = apply_loss(resolve(name), [datum], [lp], grad=True).gradients
        np.testing.assert_allclose(gradient.numpy(), -datum.weights * datum.extras["advantages"], rtol=1e-6, err_msg=name)


def test_thresholds_per_token_replace_the_defaults() -> None:
    datum = make_datum(2, weights=[1.0, 1.0], vocab_size=V)
    extras = {"logprobs": [-2.0, -2.0], "advantages": [1.0, -1.0], "clip_low_threshold": [0.9, 0.9], "clip_high_threshold": [1.05, 1.5]}
    datum = replace(datum, extras={name: np.array(values, dtype=np.float32) for name, values in extras.items()})
    lp = torch.tensor([-2.0 + math.log(1.4), -2.0 + math.log(0.5)], dtype=torch.float64, requires_grad=True)
    value, metrics = ppo().fn([datum], [lp])
    assert float(value.detach()) == pytest.approx(-(1.05 - 0.9), rel=1e-6)
    assert metrics["clipped"] == 1.0
    assert not bool(torch.autograd.grad(value, lp)[0].any())


def test_gspo_mask_says_what_is_averaged() -> None:
    datum = make_datum(3, weights=[1.0, 1.0, 1.0], vocab_size=V)
    extras = {"logprobs": [-1.0, -1.0, -1.0], "advantages": [1.0, 1.0, 1.0], "sequence_ratio_mask": [1.0, 1.0, 0.0]}
    datum = replace(datum, extras={name: np.array(values, dtype=np.float32) for name, values in extras.items()})
    value, _ = gspo(0.0, 10.0).fn([datum], [torch.tensor([-0.9, -0.7, 5.0], dtype=torch.float64)])
    assert float(value) == pytest.approx(-3 * math.exp(0.2), rel=1e-6)


def test_on_policy_distillation_is_importance_sampling_with_the_teachers_view() -> None:
    (datum,) = sampled([make_datum(6, vocab_size=V)])
    rewarded = replace(datum, extras={**datum.extras, "advantages": datum.extras["teacher_logprobs"] - datum.extras["logprobs"]})
    lp = torch.log(torch.rand(6, dtype=torch.float64))
    value, metrics = on_policy_distillation().fn([datum], [lp])
    assert float(value) == pytest.approx(float(resolve("importance_sampling").fn([rewarded], [lp])[0]), rel=1e-6)
    held = datum.weights > 0
    assert metrics["reverse_kl"] == pytest.approx(float((datum.extras["logprobs"] - datum.extras["teacher_logprobs"])[held].mean()), rel=1e-5)


def test_on_policy_distillation_in_expectation_is_the_reverse_kl() -> None:
    """Each token once with weight p: the gradient with respect to the logits is that of KL(p ‖ teacher)."""
    logits = torch.randn(V, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    teacher = torch.log_softmax(torch.randn(V, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), -1)
    lp = torch.log_softmax(logits, -1)
    datum = make_datum(V, weights=lp.detach().exp().numpy(), vocab_size=V)
    datum = replace(datum, extras={"logprobs": lp.detach().float().numpy(), "teacher_logprobs": teacher.float().numpy()})
    (found,) = torch.autograd.grad(on_policy_distillation().fn([datum], [lp])[0], logits, retain_graph=True)
    (expected,) = torch.autograd.grad((lp.exp() * (lp - teacher)).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [lambda: ppo(1.2, 0.8), lambda: cispo(0.8, 0.9), lambda: gspo(-0.1, 2), lambda: dro(-1.0)])
def test_settings_out_of_range(make: Callable[[], Loss]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        make()


def test_settings_in_the_name() -> None:
    assert resolve("ppo(low=0.9, high=1.1)").name == "ppo(low=0.9, high=1.1)"
    assert resolve("ppo()").name == "ppo"
    assert resolve("distillation(direction=reverse,tail=false,temperature=2)").name == "distillation(direction=reverse,temperature=2,tail=False)"
    with pytest.raises(UnknownNameError, match="Did you mean 'low'"):
        resolve("ppo(lo=0.9)")
    with pytest.raises(UnknownNameError, match="loss with settings"):
        resolve("cross_entropy(x=1)")
    with pytest.raises(ConfigError, match=r"a value like 0\.8"):
        resolve("ppo(low=much)")
    with pytest.raises(ConfigError, match="expected 'low='"):
        resolve("ppo(low)")


@pytest.mark.parametrize("name", losses.names())
def test_every_loss_says_what_it_is(name: str) -> None:
    found = resolve(name)
    assert found.name == name
    assert len(found.source) > 8


def test_candidates_are_refused() -> None:
    datum = make_datum(3, candidates=2, vocab_size=V)
    for name in (*NAMES, "on_policy_distillation"):
        with pytest.raises(DataError, match=r"expected \[T\]"):
            resolve(name).fn([datum], [torch.zeros(3, 2)])


# ------------------------------------------------------------------------------------------------------------ advantages
def test_advantages_by_hand() -> None:
    assert group_advantages([1, 0, 0, 1]) == pytest.approx(np.array([0.5, -0.5, -0.5, 0.5]) / math.sqrt(1 / 3))
    assert group_advantages([3.0, 1.0, 2.0], "leave_one_out") == pytest.approx([1.5, -1.5, 0.0])
    assert group_advantages([3.0, 1.0, 2.0], "centred") == pytest.approx([1.0, -1.0, 0.0])


@given(rewards=st.lists(st.floats(-100, 100), min_size=2, max_size=8), shift=st.floats(-10, 10))
def test_advantages_of_a_group(rewards: list[float], shift: float) -> None:
    for kind in ("normalised", "leave_one_out", "centred"):
        found = group_advantages(rewards, kind)
        assert found.sum() == pytest.approx(0.0, abs=1e-6)
        assert np.isfinite(found).all()
    loo = [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards]
    assert group_advantages(rewards, "leave_one_out") == pytest.approx(loo, abs=1e-9)
    assert group_advantages(np.add(rewards, shift), "centred") == pytest.approx(group_advantages(rewards, "centred"), abs=1e-9)


def test_groups_are_apart_and_equal_rewards_teach_nothing() -> None:
    found = group_advantages([[1.0, 0.0], [0.1, 0.1]])
    assert found[0] == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)])
    assert not found[1].any()


@pytest.mark.parametrize("rewards", [[1.0], 3.0, [math.nan, 1.0]])
def test_rewards_that_do_not_fit(rewards: ArrayLike) -> None:
    with pytest.raises(DataError):
        group_advantages(rewards)


def test_unknown_kind_of_advantage() -> None:
    with pytest.raises(ConfigError, match="'mean'"):
        group_advantages([1.0, 2.0], "mean")  # type: ignore[arg-type]


def test_sampled_datum_is_aligned() -> None:
    completion = Completion(text="xy", tokens=(7, 8), logprobs=(-0.5, -0.25), stop_reason="stop", prompt_tokens=3)
    datum = sampled_datum("a", [1, 2, 3], completion, 2.0)
    assert datum.tokens.tolist() == [1, 2, 3, 7]
    assert datum.targets.tolist() == [2, 3, 7, 8]
    assert datum.weights.tolist() == [0, 0, 1, 1]
    assert datum.extras["logprobs"].tolist() == [0, 0, -0.5, -0.25]
    assert datum.extras["advantages"].tolist() == [0, 0, 2, 2]
    assert sampled_datum("a", [1], completion, [1.0, -1.0]).extras["advantages"].tolist() == [0 + 1.0, -1.0]
    with pytest.raises(DataError, match="0 prompt tokens"):
        sampled_datum("a", [], completion, 1.0)
    with pytest.raises(DataError, match=r"advantages of shape \(3,\)"):
        sampled_datum("a", [1], completion, [1.0, 2.0, 3.0])
