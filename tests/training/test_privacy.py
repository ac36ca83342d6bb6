"""Gradients of single examples against autograd and whole batches; DP-SGD's noise, clipping and ε against exact oracles."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats
from torch import Tensor

from crucible_framework.backends import connect
from crucible_framework.data import render_all
from crucible_framework.errors import BackendError, CapabilityError, ConfigError, DataError, NumericError
from crucible_framework.losses import resolve
from crucible_framework.protocols import Backend, Gradients, Loss, Report, TrainingSession
from crucible_framework.records import AdamConfig, Batch, Dataset, Datum, LoraConfig, OptimOutput, StepOutput
from crucible_framework.training import (
    PrivacyConfig,
    epsilon,
    example_gradients,
    example_norms,
    gradient_of,
    measure_noise_scale,
    noise_multiplier,
    pcgrad,
    train_privately,
)
from crucible_framework.training.examplewise import unit_weights
from crucible_framework.training.gradients import dot
from crucible_framework.training.privacy import _log_moment

LORA = LoraConfig(rank=2, dropout=0.0)
CE = resolve("cross_entropy")


@pytest.fixture
def data(backend: Backend, claims: Dataset) -> tuple[Datum, ...]:
    return render_all(claims, backend.tokenizer("fake"), 2048).data[:12]


@pytest.fixture
def session(backend: Backend, data: tuple[Datum, ...]) -> TrainingSession:
    """One step in, so that B is not zero and every tensor has a gradient."""
    made = backend.train("fake", LORA)
    step(made, data, AdamConfig(lr=0.05))
    return made


def step(session: TrainingSession, data: Sequence[Datum], adam: AdamConfig) -> int:
    session.forward_backward(Batch(data=tuple(data)), CE)
    return session.optim_step(adam).result().step


def logprobs(session: TrainingSession, data: Sequence[Datum]) -> list[bytes]:
    return [array.tobytes() for array in session.forward(Batch(data=tuple(data)), CE).result().logprobs]


# ------------------------------------------------------------------------------------------------------------- examples
def test_examples_gradients_sum_to_that_of_the_batch(session: TrainingSession, data: tuple[Datum, ...]) -> None:
    whole = gradient_of(session, Batch(data=data))
    total: dict[str, Tensor] = {}
    for part in example_gradients(session, data):
        total = {name: total[name] + tensor if total else tensor for name, tensor in part.items()}
    assert whole.keys() == total.keys()
    for name, tensor in whole.items():
        assert tensor.any()
        assert torch.allclose(tensor, total[name], rtol=1e-4, atol=1e-6)


def test_taking_gradients_changes_nothing(session: TrainingSession, data: tuple[Datum, ...]) -> None:
    before = logprobs(session, data)
    first = example_norms(session, data)
    assert first.shape == (12,)
    assert (first > 0).all()
    assert logprobs(session, data) == before
    assert np.array_equal(first, example_norms(session, data))
    assert step(session, data, AdamConfig(lr=0.0)) == 2, "the step number counts only steps"


@pytest.mark.parametrize("kind", ["fake", "local"])
def test_gradients_are_those_that_a_step_would_use(kind: str, claims: Dataset) -> None:
    torch.set_num_threads(1)
    with connect(kind) as engine:
        data = render_all(claims, engine.tokenizer("tiny"), 512).data[:3]
        made = engine.train("tiny", LORA)
        seen: list[dict[str, Tensor]] = []

        def keep(gradients: Gradients, report: Report) -> Gradients:
            seen.append({name: gradient.clone() for name, gradient in gradients.items()})
            return gradients

        taken = gradient_of(made, Batch(data=data))
        made.forward_backward(Batch(data=data), CE)
        made.optim_step(AdamConfig(lr=0.0), keep).result()
    assert all(torch.equal(taken[name], seen[0][name]) for name in taken)


def test_errors_of_the_pass_come_through_and_leave_the_session_usable(session: TrainingSession, data: tuple[Datum, ...]) -> None:
    def broken(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        return torch.stack([one.sum() for one in logprobs]).sum() * math.nan, {}

    with pytest.raises(NumericError):
        gradient_of(session, Batch(data=data[:2]), broken)
    with pytest.raises(NumericError):
        list(example_gradients(session, data[:3], broken))
    assert example_norms(session, data[:1])[0] > 0


class _Answers:
    """A session whose steps end in a given way, whatever the hook does."""

    def __init__(self, inner: TrainingSession, error: Exception | None) -> None:
        self.inner, self.error = inner, error

    def forward_backward(self, batch: Batch, loss: Loss) -> Future[StepOutput]:
        return self.inner.forward_backward(batch, loss)

    def optim_step(self, adam: AdamConfig, hook: object) -> Future[OptimOutput]:
        del hook
        if self.error is None:
            return self.inner.optim_step(adam)
        failed: Future[OptimOutput] = Future()
        failed.set_exception(self.error)
        return failed


def test_backends_without_gradients_say_so_and_one_that_steps_anyway_is_caught(session: TrainingSession, data: tuple[Datum, ...]) -> None:
    with pytest.raises(CapabilityError, match="logprobs only"):
        gradient_of(_Answers(session, CapabilityError("logprobs only")), Batch(data=data[:1]))  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="stepped although its gradient hook raised"):
        gradient_of(_Answers(session, None), Batch(data=data[:1]))  # type: ignore[arg-type]


def test_two_tasks_train_with_pcgrad_through_a_session(session: TrainingSession, data: tuple[Datum, ...]) -> None:
    first, second = Batch(data=data[:4]), Batch(data=data[4:8])
    other = gradient_of(session, second)
    session.forward_backward(first, CE)
    output = session.optim_step(AdamConfig(lr=0.01), pcgrad(other)).result()
    assert output.step == 2
    assert "conflicts" in output.metrics


def test_unit_weights_make_examples_count_alike(data: tuple[Datum, ...]) -> None:
    scaled = dataclasses.replace(data[0], weights=data[0].weights * 7)
    assert float(unit_weights(scaled).weights.sum()) == pytest.approx(1)
    with pytest.raises(DataError, match="positive number"):
        unit_weights(dataclasses.replace(data[0], weights=data[0].weights * 0))


def test_the_noise_scale_is_that_of_the_examples_own_gradients(session: TrainingSession, data: tuple[Datum, ...]) -> None:
    """Oracle: the unbiased sample covariance of all examples' gradients, held in memory at once."""
    rows = np.stack([np.concatenate([g[n].numpy().ravel() for n in sorted(g)]) for g in example_gradients(session, [unit_weights(d) for d in data])])
    rows = rows.astype(np.float64)
    found = measure_noise_scale(session, data)
    trace = rows.var(axis=0, ddof=1).sum()
    signal = (rows.mean(axis=0) ** 2).sum() - trace / len(rows)
    assert found.trace == pytest.approx(trace, rel=1e-4)
    assert found.signal == pytest.approx(signal, rel=1e-3, abs=1e-6)
    assert found.value == (pytest.approx(trace / signal, rel=1e-3) if signal > 0 else None)
    assert found.examples == 12
    with pytest.raises(DataError, match="at least 2"):
        measure_noise_scale(session, data[:1])


# ------------------------------------------------------------------------------------------------------------ accounting
@pytest.mark.parametrize(("order", "rate", "noise"), [(2, 0.1, 1.0), (5, 0.01, 0.8), (16, 0.05, 2.0), (3, 1.0, 1.5)])
def test_moments_are_the_renyi_divergence_by_numerical_integration(order: int, rate: float, noise: float) -> None:
    """E over N(0, σ²) of ((1 − q) + q · N(1, σ²)/N(0, σ²))^α, integrated."""

    def density(x: float) -> float:
        ratio = (1 - rate) + rate * math.exp((2 * x - 1) / (2 * noise * noise))
        return float(stats.norm.pdf(x, scale=noise)) * ratio**order

    top = order + 12 * noise
    oracle, _ = integrate.quad(density, -12 * noise, top, limit=400, points=[0, 1, order])
    assert _log_moment(order, rate, noise) == pytest.approx(math.log(oracle), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("noise", [0.7, 1.0, 3.0])
def test_epsilon_bounds_the_exact_one_of_the_gaussian_mechanism(noise: float) -> None:
    """Without sampling one step is the Gaussian mechanism, whose ε is known exactly (Balle & Wang 2018, theorem 8)."""
    delta = 1e-5

    def excess(eps: float) -> float:
        return float(stats.norm.cdf(0.5 / noise - eps * noise) - math.exp(eps) * stats.norm.cdf(-0.5 / noise - eps * noise)) - delta

    exact = optimize.brentq(excess, 0, 60)
    bound = epsilon(noise=noise, sampling_rate=1.0, steps=1, delta=delta)
    assert exact <= bound <= 1.15 * exact + 0.05


@given(st.floats(0.5, 4), st.floats(0.001, 0.5), st.integers(1, 500), st.sampled_from([1e-3, 1e-5, 1e-7]))
@settings(max_examples=25)
def test_epsilon_moves_as_it_must(noise: float, rate: float, steps: int, delta: float) -> None:
    base = epsilon(noise=noise, sampling_rate=rate, steps=steps, delta=delta)
    assert base >= 0
    assert epsilon(noise=noise * 1.5, sampling_rate=rate, steps=steps, delta=delta) <= base
    assert epsilon(noise=noise, sampling_rate=rate, steps=2 * steps, delta=delta) >= base
    assert epsilon(noise=noise, sampling_rate=min(1.0, 2 * rate), steps=steps, delta=delta) >= base - 1e-9
    assert epsilon(noise=noise, sampling_rate=rate, steps=steps, delta=delta / 10) >= base


def test_the_noise_for_a_target_is_the_least() -> None:
    found = noise_multiplier(target=3.0, sampling_rate=0.02, steps=300, delta=1e-5)
    assert epsilon(noise=found, sampling_rate=0.02, steps=300, delta=1e-5) <= 3.0
    assert epsilon(noise=found * 0.995, sampling_rate=0.02, steps=300, delta=1e-5) > 3.0
    assert epsilon(noise=0.0, sampling_rate=0.02, steps=1, delta=1e-5) == math.inf
    with pytest.raises(ConfigError, match="positive number"):
        noise_multiplier(target=0.0, sampling_rate=0.1, steps=1, delta=1e-5)
    with pytest.raises(ConfigError, match="No noise below"):
        noise_multiplier(target=1e-9, sampling_rate=1.0, steps=1000, delta=1e-9)


@pytest.mark.parametrize("bad", [{"clip": 0.0}, {"noise": -1.0}, {"sampling_rate": 0.0}, {"sampling_rate": 1.1}, {"steps": 0}, {"delta": 0.0}])
def test_privacy_settings_are_checked(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"PrivacyConfig.{next(iter(bad))}"):
        PrivacyConfig(**bad)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- DP-SGD
class _Spy:
    """A session that keeps what each step used."""

    def __init__(self, inner: TrainingSession) -> None:
        self.inner, self.used = inner, list[dict[str, Tensor]]()

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def optim_step(self, adam: AdamConfig, hook: object = None) -> object:
        def spy(gradients: Gradients, report: Report) -> Gradients:
            changed = hook(gradients, report)  # type: ignore[operator]
            self.used.append(dict(changed))
            return changed  # type: ignore[no-any-return]

        return self.inner.optim_step(adam, spy)


def spied(session: TrainingSession, data: Sequence[Datum], config: PrivacyConfig) -> list[dict[str, Tensor]]:
    spy = _Spy(session)
    train_privately(spy, data, config, adam=AdamConfig(lr=0.0))  # type: ignore[arg-type]
    return spy.used


def test_without_noise_a_step_is_the_mean_of_clipped_gradients(session: TrainingSession, data: tuple[Datum, ...]) -> None:
    parts = list(example_gradients(session, [unit_weights(datum) for datum in data]))
    sizes = [math.sqrt(dot(part, part)) for part in parts]
    clip = float(np.median(sizes))
    used = spied(session, data, PrivacyConfig(clip=clip, noise=0.0, sampling_rate=1.0, steps=1, seed=0))
    for name, tensor in used[0].items():
        oracle = torch.stack([part[name] * min(1.0, clip / size) for part, size in zip(parts, sizes, strict=True)]).sum(0) / len(data)
        assert torch.allclose(tensor, oracle, rtol=1e-4, atol=1e-7)


def test_no_example_moves_a_step_by_more_than_the_clip(session: TrainingSession, data: tuple[Datum, ...]) -> None:
    """The promise that ε rests on, tried by putting another example in the place of one."""
    other = dataclasses.replace(data[0], targets=data[0].targets[::-1].copy())
    config = PrivacyConfig(clip=1e-3, noise=0.0, sampling_rate=1.0, steps=1, seed=0)
    first, second = (spied(session, (one, *data[1:]), config)[0] for one in (data[0], other))
    difference = {name: second[name] - first[name] for name in first}
    assert 0 < math.sqrt(dot(difference, difference)) * len(data) <= 2 * config.clip * (1 + 1e-4)


def test_noise_has_the_size_that_the_accountant_counts_on(session: TrainingSession, data: tuple[Datum, ...]) -> None:
    """At a sampling rate near 0 batches are empty: what remains is noise of σ C / (q n) an entry."""
    config = PrivacyConfig(clip=0.5, noise=2.0, sampling_rate=1e-9, steps=20, seed=7)
    entries = torch.cat([tensor.flatten() for used in spied(session, data, config) for tensor in used.values()])
    assert float(entries.std()) * (1e-9 * len(data)) == pytest.approx(1.0, rel=0.03)
    steps = spied(session, data, PrivacyConfig(noise=1.0, sampling_rate=1e-9, steps=2, seed=7))
    assert not any(torch.equal(steps[0][name], steps[1][name]) for name in steps[0]), "fresh noise each step"


def test_private_training_learns_and_says_what_it_cost(backend: Backend, data: tuple[Datum, ...]) -> None:
    made = backend.train("fake", LORA)
    batch = Batch(data=data)
    before = made.forward(batch, CE).result().loss
    config = PrivacyConfig(clip=1.0, noise=0.1, sampling_rate=0.8, steps=30, delta=1e-3, seed=1)
    result = train_privately(made, data, config, adam=AdamConfig(lr=0.05, max_grad_norm=None))
    assert made.forward(batch, CE).result().loss < before
    assert result.epsilon == epsilon(noise=0.1, sampling_rate=0.8, steps=30, delta=1e-3)
    assert (result.steps, result.delta) == (30, 1e-3)
    assert made.optim_step(AdamConfig()).exception() is not None, "no gradient of one example is left behind"


def test_a_seed_repeats_a_private_run_and_none_does_not(backend: Backend, data: tuple[Datum, ...]) -> None:
    def outcome(seed: int | None) -> list[bytes]:
        made = backend.train("fake", LORA)
        train_privately(made, data[:4], PrivacyConfig(steps=2, sampling_rate=0.5, seed=seed))
        return logprobs(made, data[:2])

    assert outcome(3) == outcome(3)
    assert outcome(None) != outcome(None)
    with pytest.raises(DataError, match="no examples"):
        train_privately(backend.train("fake", LORA), (), PrivacyConfig())
