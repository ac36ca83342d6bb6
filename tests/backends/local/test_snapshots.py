"""Samplers are snapshots: training does not move them, sampling does not touch training, and both are told as events."""

from __future__ import annotations

import pytest

from crucible_framework import events
from crucible_framework.backends.local import LocalBackend
from crucible_framework.errors import CrucibleError
from crucible_framework.protocols import Sampler
from crucible_framework.records import AdamConfig, LoraConfig, SamplingParams

from .models_for_tests import CE, batch


def test_a_sampler_is_a_snapshot(shared: LocalBackend) -> None:
    session = shared.train("tiny", LoraConfig(dropout=0.0))
    data, params = batch(9, 12), SamplingParams(max_tokens=10, seed=1)
    samplers: list[Sampler] = []
    for _ in range(3):
        samplers.append(session.sampler())
        for _ in range(3):
            session.forward_backward(data, CE)
            session.optim_step(AdamConfig(lr=0.05))
    futures = [sampler.compute_logprobs("hi", "abc") for sampler in samplers]
    plain = shared.sampler("tiny").compute_logprobs("hi", "abc").result()
    found = [future.result() for future in futures]
    assert found[0] == pytest.approx(plain, abs=1e-5)
    assert len({round(logprobs[0], 3) for logprobs in found}) == 3
    assert [sampler.compute_logprobs("hi", "abc").result() for sampler in samplers] == found
    assert samplers[1].sample("hi", params).result()[0].logprobs != samplers[2].sample("hi", params).result()[0].logprobs
    session.close()
    assert samplers[0].sample("hi", params).result()


def test_sampling_does_not_disturb_training(shared: LocalBackend) -> None:
    def losses(*, ask: bool) -> list[float]:
        session, other = shared.train("tiny", LoraConfig(seed=3)), shared.sampler("tiny")
        futures = []
        for step in range(4):
            futures.append(session.forward_backward(batch(8, 9, seed=step), CE))
            if ask:
                other.sample("hi", SamplingParams(max_tokens=5))
                session.sampler().sample("hi", SamplingParams(max_tokens=5), n=2)
                other.compute_logprobs("hi", "x")
            session.optim_step(AdamConfig(lr=0.01))
        return [future.result().loss for future in futures]

    assert losses(ask=True) == losses(ask=False)


def test_events(shared: LocalBackend) -> None:
    sampler = shared.sampler("tiny")
    with events.collect() as seen, events.in_run("r2"):
        done = sampler.sample("hi", SamplingParams(max_tokens=3, seed=0), n=2).result()
        with pytest.raises(CrucibleError):
            sampler.sample("", SamplingParams()).result()
    found = [event for event in seen if event["name"] == "inference.sample"]
    assert [event["run"] for event in found] == ["r2", "r2"]
    assert found[0]["completion_tokens"] == sum(len(completion.tokens) for completion in done)
    assert found[0]["n"] == 2
    assert found[1]["error"] == "DataError"
    assert all(completion.duration_s > 0 for completion in done)
