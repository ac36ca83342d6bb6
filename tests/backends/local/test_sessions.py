"""Several adapters on one base: what one session does never reaches another, and the cost is that of the adapters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from crucible_framework.backends.local import LocalBackend
from crucible_framework.backends.local.session import LocalSession
from crucible_framework.records import AdamConfig, Batch, LoraConfig, SamplingParams

from .models_for_tests import CE, batch

LORA = LoraConfig(rank=4, dropout=0.1, seed=1, target_modules=("all-linear",))
ADAM = AdamConfig(lr=0.01)


@pytest.fixture(params=["fast", "plain"])
def engine(request: pytest.FixtureRequest) -> LocalBackend:
    return LocalBackend(threads=1, engine=request.param)


def weights(session: LocalSession) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in session._adapter.items()}


def train(session: LocalSession, steps: int = 3, first: int = 0) -> list[float]:
    outputs = []
    for step in range(first, first + steps):
        outputs.append(session.forward_backward(batch(7, 12, 9, seed=step), CE))
        session.optim_step(ADAM).result()
    return [output.result().loss for output in outputs]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_losses_sum_so_doubled_weights_double_the_gradient(engine: LocalBackend) -> None:
    given = batch(7, 12, 9)
    doubled = Batch(data=tuple(replace(datum, weights=datum.weights * 2) for datum in given.data))
    norms = []
    with engine:
        for one in (given, doubled):
            session = engine.train("tiny", replace(LORA, dropout=0.0))
            session.forward_backward(one, CE).result()
            norms.append(session.optim_step(ADAM).result().grad_norm)
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-5)


def test_weight_decay_stays_in_its_session(engine: LocalBackend) -> None:
    with engine:
        mine, other = (engine.train("tiny", LORA) for _ in range(2))
        train(other)
        before = weights(other)
        mine.forward_backward(batch(9), CE)
        mine.optim_step(AdamConfig(lr=0.01, weight_decay=0.5)).result()
        assert same(weights(other), before)


def test_sessions_in_turn_train_bit_for_bit_as_alone(engine: LocalBackend) -> None:
    """Of different ranks, layers and dropout."""
    settings = [LORA, replace(LORA, rank=8, seed=2), replace(LORA, target_modules=("q_proj", "v_proj")), replace(LORA, dropout=0.0)]
    with engine:
        alone = []
        for lora in settings:
            session = engine.train("tiny", lora)
            alone.append((train(session), weights(session)))
        together = [engine.train("tiny", lora) for lora in settings]
        losses: list[list[float]] = [[] for _ in settings]
        for step in range(3):
            for place, session in enumerate(together):
                losses[place] += train(session, 1, step)
        for (expected, tensors), session, found in zip(alone, together, losses, strict=True):
            assert found == expected
            assert same(weights(session), tensors)


def test_a_snapshot_never_changes_and_never_reaches_the_training(engine: LocalBackend) -> None:
    params = SamplingParams(max_tokens=8, temperature=0)
    with engine:
        session = engine.train("tiny", LORA)
        train(session)
        snapshot, saved = session.sampler(), session.save("early", "sampler").result()
        said = snapshot.sample("hello", params).result()[0]
        scored = snapshot.compute_logprobs("hello", "there").result()
        train(session, 5, 3)
        after = weights(session)
        assert session.sampler().compute_logprobs("hello", "there").result() != scored
        for old in (snapshot, engine.sampler(saved)):
            again = old.sample("hello", params).result()[0]
            assert (again.tokens, again.logprobs) == (said.tokens, said.logprobs)
            assert old.compute_logprobs("hello", "there").result() == scored
        assert same(weights(session), after)
        continued, alone = train(session, 2, 8), engine.train("tiny", LORA)
        assert train(alone, 10)[-2:] == continued


def test_memory_is_that_of_the_adapters(engine: LocalBackend) -> None:
    """32 idle sessions share one base; each holds its adapter and two moments, whatever the others hold."""
    with engine:
        sessions = [engine.train("tiny", replace(LORA, rank=1 + number % 4)) for number in range(32)]
        assert len({id(session.base) for session in sessions}) == 1
        assert len({id(session.base.model) for session in sessions}) == 1
        for session in sessions:
            adapter = sum(tensor.numel() for tensor in session._adapter.values())
            moments = [*session._optimizer.exp_avg.values(), *session._optimizer.exp_avg_sq.values()]
            assert sum(tensor.numel() for tensor in moments) == 2 * adapter
            assert adapter == session.lora.rank * sum(out + into for name, (out, into) in session.base.layers.items() if name != session.base.head)
            assert not session._gradients


def test_prompts_that_begin_alike_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question's start is prefilled for all, and no completion changes by it."""
    from crucible_framework.backends.local.bases import Base

    start = tuple(range(40, 100))
    prompts = [(*start, 5 + number, 6) for number in range(6)]
    params = SamplingParams(max_tokens=6, temperature=0)
    read, hidden = list[int](), Base.read

    def counted(self: Base, one: object, cache: object = None) -> Tensor:
        read.append(one.tokens)  # type: ignore[attr-defined]
        return hidden(self, one, cache)  # type: ignore[arg-type]

    with LocalBackend(threads=1, engine="plain") as plain:
        expected = [plain.sampler("tiny").sample(prompt, params).result()[0] for prompt in prompts]
    monkeypatch.setattr(Base, "read", counted)
    with LocalBackend(threads=1, engine="torch") as backend:
        sampler, hold = backend.sampler("tiny"), backend.submit(__import__("time").sleep, 0.2)
        futures = [sampler.sample(prompt, params) for prompt in prompts]
        hold.result()
        found = [future.result()[0] for future in futures]
    assert sum(read) == len(start) + 2 * len(prompts)
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
