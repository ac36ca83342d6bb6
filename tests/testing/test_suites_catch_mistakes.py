"""The contract suites fail where an implementation is wrong: each mistake is made on purpose and must be caught."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from crucible_framework.backends import bigram, fake
from crucible_framework.losses import resolve
from crucible_framework.losses.tokenwise import cross_entropy
from crucible_framework.protocols import Loss
from crucible_framework.records import AdamConfig, Batch, Datum, LoraConfig, SamplingParams
from crucible_framework.testing import BackendContract, LossContract, make_data, text_datum

torch.set_num_threads(1)
Made = tuple[Tensor, dict[str, float]]


# ---------------------------------------------------------------------------------------------------------------- losses
def mean(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> Made:
    value, _ = cross_entropy(data, logprobs)
    return value / sum(float(datum.weights.sum()) for datum in data), {}


def unweighted(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> Made:
    return -torch.stack([values.sum() for values in logprobs]).sum(), {}


def half_detached(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> Made:
    value, _ = cross_entropy(data, logprobs)
    return value * value.detach(), {}


def first_only(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> Made:
    return cross_entropy(data[:1], logprobs[:1])


def vector(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> Made:
    return logprobs[0], {}


def constant(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> Made:
    return cross_entropy(data, logprobs)[0] * 0, {}


def growing(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> Made:
    calls.append(1)
    return cross_entropy(data, logprobs)[0] * len(calls), {}


calls: list[int] = []


@pytest.mark.parametrize(
    ("fn", "test"),
    [
        (mean, "test_batch_is_the_sum_of_its_data"),
        (unweighted, "test_weight_zero_means_nothing"),
        (half_detached, "test_gradient_is_that_of_the_value"),
        (first_only, "test_order_of_data_does_not_matter"),
        (vector, "test_value_is_one_finite_number"),
        (constant, "test_gradient_is_finite_and_not_zero"),
        (growing, "test_same_call_gives_the_same_number"),
    ],
)
def test_loss_suite_catches(fn: Callable[[Sequence[Datum], Sequence[Tensor]], Made], test: str) -> None:
    data = make_data((6, 3, 5), vocab_size=16)
    inputs = [(-torch.rand(len(datum), dtype=torch.float64) - 0.1).requires_grad_() for datum in data]
    check = cast("Callable[[Loss, tuple[Datum, ...], list[Tensor]], None]", getattr(LossContract(), test))
    check(resolve("cross_entropy"), data, inputs)
    with pytest.raises((AssertionError, RuntimeError)):
        check(resolve(fn), data, inputs)


# -------------------------------------------------------------------------------------------------------------- backends
def run(test: str, tmp_path: Path, **more: object) -> None:
    """One test of the suite on a fake backend, with its fixtures made by hand."""
    with fake.FakeBackend() as backend:
        lora, tokenizer = LoraConfig(rank=4, alpha=8.0, dropout=0.0), backend.tokenizer("tiny")
        pairs = (("Which colour has grass?", "Green."), ("Two and two?", "Four, of course."), ("Capital of France?", "Paris"))
        batch = Batch(data=tuple(text_datum(prompt, target, tokenizer) for prompt, target in pairs))
        have: dict[str, object] = {"backend": backend, "base_model": "tiny", "lora": lora, "tokenizer": tokenizer, "batch": batch, "tmp_path": tmp_path}
        method = cast("Callable[..., None]", getattr(BackendContract(), test))
        names = inspect.signature(method).parameters
        have |= {name: backend.train("tiny", lora) for name in ("session", "clean") if name in names} | more
        if "sampler" in names:
            session = cast("fake.FakeSession", have.get("session", backend.train("tiny", lora)))
            for _ in range(3):
                session.forward_backward(batch, resolve("cross_entropy"))
                session.optim_step(AdamConfig(lr=1e-2)).result()
            have["sampler"] = session.sampler()
        method(**{name: have[name] for name in names})


def forget_failures(patch: pytest.MonkeyPatch) -> None:
    real = fake.FakeSession._optim_step

    def step(self: fake.FakeSession, adam: AdamConfig, hook: object) -> object:
        self._failure = None
        return real(self, adam, hook)  # type: ignore[arg-type]

    patch.setattr(fake.FakeSession, "_optim_step", step)


def keep_gradients(patch: pytest.MonkeyPatch) -> None:
    real = fake.FakeSession._optim_step

    def step(self: fake.FakeSession, adam: AdamConfig, hook: object) -> object:
        kept = self._gradients
        try:
            return real(self, adam, hook)  # type: ignore[arg-type]
        finally:
            self._gradients = kept

    patch.setattr(fake.FakeSession, "_optim_step", step)


def forget_bias_correction(patch: pytest.MonkeyPatch) -> None:
    real = fake._adamw
    patch.setattr(fake, "_adamw", lambda adam, step, name, gradient, old: real(adam, 1000, name, gradient, old))


def forget_passes(patch: pytest.MonkeyPatch) -> None:
    real = fake.FakeBackend.resume

    def resume(self: fake.FakeBackend, checkpoint: object) -> fake.FakeSession:
        session = real(self, checkpoint)  # type: ignore[arg-type]
        session._passes = 0
        return session

    patch.setattr(fake.FakeBackend, "resume", resume)


def drop_in_forward(patch: pytest.MonkeyPatch) -> None:
    real = fake.FakeSession._run
    patch.setattr(
        fake.FakeSession, "_run", lambda self, batch, loss, tensors, dropout=None: real(self, batch, loss, tensors, bigram.generator_of(id(object())))
    )


def late_snapshot(patch: pytest.MonkeyPatch) -> None:
    def sampler(self: fake.FakeSession) -> fake.FakeSampler:
        return fake.FakeSampler(self._backend, "late", lambda: lambda tokens: self._base.logits(self._tensors, self._lora, tokens))

    patch.setattr(fake.FakeSession, "sampler", sampler)


def ignore_temperature(patch: pytest.MonkeyPatch) -> None:
    real = fake._draw
    patch.setattr(fake, "_draw", lambda logits, params, generator: real(logits, replace(params, temperature=1.0) if params.temperature else params, generator))


def always_likeliest(patch: pytest.MonkeyPatch) -> None:
    real = fake._draw
    patch.setattr(fake, "_draw", lambda logits, params, generator: real(logits, replace(params, top_k=1), generator))


def ignore_top_k(patch: pytest.MonkeyPatch) -> None:
    real = fake._draw
    patch.setattr(fake, "_draw", lambda logits, params, generator: real(logits, replace(params, top_k=0), generator))


def ignore_seed(patch: pytest.MonkeyPatch) -> None:
    real = fake.FakeSampler.sample

    def sample(self: fake.FakeSampler, prompt: str, params: SamplingParams, n: int = 1) -> object:
        return real(self, prompt, replace(params, seed=None), n)

    patch.setattr(fake.FakeSampler, "sample", sample)


def seed_of_torch(patch: pytest.MonkeyPatch) -> None:
    for module in (fake, bigram):
        patch.setattr(module, "generator_of", lambda *_: torch.default_generator)


ADAM = AdamConfig(lr=0.01)


@pytest.mark.parametrize(
    ("mistake", "test", "more"),
    [
        (forget_failures, "test_loss_that_is_not_finite", {}),
        (keep_gradients, "test_step_without_a_gradient", {}),
        (keep_gradients, "test_gradients_add_up", {}),
        (forget_bias_correction, "test_step_is_that_of_torch", {"adam": ADAM}),
        (forget_passes, "test_resume_is_bit_exact", {"where": "files"}),
        (drop_in_forward, "test_dropout_is_for_training_only", {}),
        (late_snapshot, "test_snapshot_stays", {}),
        (ignore_temperature, "test_logprobs_are_after_temperature", {}),
        (always_likeliest, "test_draws_follow_the_distribution", {}),
        (always_likeliest, "test_same_seed_same_samples", {}),
        (ignore_top_k, "test_top_k_and_top_p_cut", {}),
        (ignore_top_k, "test_greedy", {}),
        (ignore_seed, "test_same_seed_same_samples", {}),
        (seed_of_torch, "test_sampling_does_not_disturb_training", {}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_backend_suite_catches(
    mistake: Callable[[pytest.MonkeyPatch], None], test: str, more: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run(test, tmp_path / "right", **more)
    mistake(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run(test, tmp_path / "wrong", **more)
