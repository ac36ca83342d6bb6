"""Small batches of several adapters in one pass: the numbers of each alone."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from crucible_framework import events
from crucible_framework.backends.local import LocalBackend
from crucible_framework.backends.local.bases import Base, load_base
from crucible_framework.backends.local.engine import Asked, evaluate, evaluate_together, few
from crucible_framework.backends.local.lora import Active, init_adapter, layer_names, tensor_shapes
from crucible_framework.errors import BackendError, DataError, NumericError
from crucible_framework.losses import resolve
from crucible_framework.protocols import Loss
from crucible_framework.records import AdamConfig, Batch, Datum, LoraConfig

from .models_for_tests import CE, batch, make_qwen

CPU = torch.device("cpu")
TARGETS = (("all-linear",), ("q_proj", "v_proj"), ("down_proj",), ("k_proj", "up_proj"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("models")
    return load_base(str(make_qwen(folder / "qwen")), cache=folder, dtype=torch.float32, device=CPU)


def active(base: Base, number: int, dropout: float = 0.0) -> Active:
    """Adapters of other ranks, layers, scales and values."""
    config = LoraConfig(rank=2 + number, target_modules=TARGETS[number % len(TARGETS)])
    shapes = tensor_shapes(base.layers, layer_names(base.layers, config, base.head), config.rank)
    generator = torch.Generator().manual_seed(number)
    adapter = {name: torch.randn(tensor.shape, generator=generator) * 0.1 for name, tensor in init_adapter(shapes, 1, CPU).items()}
    return Active(adapter, 0.5 + number, dropout, torch.Generator().manual_seed(number + 10))


def same(ours: object, theirs: object) -> None:
    assert isinstance(ours, tuple)
    assert isinstance(theirs, tuple)
    assert ours[0].loss == pytest.approx(theirs[0].loss, rel=1e-5)
    for mine, other in zip(ours[0].logprobs, theirs[0].logprobs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()) + 1e-8)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_each_has_the_numbers_that_it_has_alone(base: Base, dropout: float) -> None:
    batches = [batch(9, 14), batch(20), batch(5, 5, 7, seed=3), batch(30, seed=4), batch(12, seed=5)]
    losses = [CE, resolve("cross_entropy"), CE, CE, CE]
    made = [Asked(given, loss, active(base, number, dropout)) for number, (given, loss) in enumerate(zip(batches, losses, strict=True))]
    assert all(few(base, one) for one in made)
    alone = [evaluate(base, given, loss, active(base, number, dropout), train=True) for number, (given, loss) in enumerate(zip(batches, losses, strict=True))]
    for ours, theirs in zip(evaluate_together(base, made), alone, strict=True):
        same(ours, theirs)
    for one, number in zip(made, range(5), strict=True):
        generator, other = one.active.generator, active(base, number, dropout).generator
        assert generator is not None
        assert other is not None
        moved = generator.get_state().equal(other.get_state())
        assert moved == (dropout == 0.0)


def test_one_that_fails_harms_no_other(base: Base) -> None:
    def bad(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        del data
        return sum((part.sum() for part in logprobs), torch.zeros(())) * float("nan"), {}

    wrong = replace(batch(6).data[0], tokens=np.array([1, 9999], np.int32), targets=np.array([1, 2], np.int64), weights=np.ones(2, np.float32))
    good = Asked(batch(9, 14), CE, active(base, 0))
    asked = [
        Asked(batch(8), Loss(name="bad", fn=bad, source="here"), active(base, 1)),
        good,
        Asked(Batch(data=(wrong,)), CE, active(base, 2)),
        Asked(batch(11, seed=2), CE, active(base, 3)),
    ]
    found = evaluate_together(base, asked)
    assert isinstance(found[0], NumericError)
    assert isinstance(found[2], DataError)
    same(found[1], evaluate(base, good.batch, CE, active(base, 0), train=True))
    same(found[3], evaluate(base, asked[3].batch, CE, active(base, 3), train=True))


def test_a_batch_without_weights_and_a_single_one_go_alone(base: Base) -> None:
    zero = Batch(data=tuple(replace(datum, weights=np.zeros_like(datum.weights)) for datum in batch(9, 4).data))
    asked = [Asked(zero, CE, active(base, 0)), Asked(batch(7), CE, active(base, 1))]
    for ours, one, number in zip(evaluate_together(base, asked), asked, range(2), strict=True):
        same(ours, evaluate(base, one.batch, one.loss, active(base, number), train=True))


def test_what_may_not_share(base: Base, tmp_path: Path) -> None:
    one = Asked(batch(20), CE, active(base, 0))
    assert few(base, one)
    assert not few(base, replace(one, batch=batch(60, 41)))
    assert not few(base, replace(one, batch=batch(9, candidates=3)))
    assert not few(base, replace(one, loss=replace(CE, needs="logits")))
    head = LoraConfig(target_modules=("lm_head",), rank=2)
    shapes = tensor_shapes(base.layers, layer_names(base.layers, head, base.head), 2)
    assert not few(base, replace(one, active=Active(init_adapter(shapes, 0, CPU), 1.0)))
    assert not few(load_base(base.name, cache=tmp_path, dtype=torch.float32, device=CPU, engine="plain"), one)


# ------------------------------------------------------------------------------------------------------------ in sessions
def test_sessions_share_a_pass_and_keep_their_order(tmp_path: Path) -> None:
    adam, loras = AdamConfig(lr=1e-3), [LoraConfig(rank=2 + i, dropout=0.2, seed=i, target_modules=TARGETS[i]) for i in range(4)]

    def trained(*, share: bool) -> tuple[list[list[float]], list[int]]:
        with LocalBackend(cache=tmp_path, share_passes=share) as backend, events.collect() as seen:
            sessions, gate = [backend.train("tiny", lora) for lora in loras], threading.Event()
            backend.submit(gate.wait, 10)
            futures = []
            for step in range(3):
                for number, session in enumerate(sessions):
                    futures.append((session.forward_backward(batch(6 + number, 9, seed=step), CE), session.optim_step(adam)))
            gate.set()
            losses = [[one.result().loss, other.result().grad_norm] for one, other in futures]
        return losses, [int(str(event.get("shared", 1))) for event in seen if event["name"] == "training.forward_backward"]

    alone, ones = trained(share=False)
    together, counts = trained(share=True)
    assert set(ones) == {1}
    assert counts == [4] * 12
    np.testing.assert_allclose(np.array(together), np.array(alone), rtol=1e-4)


def test_a_shared_failure_stays_with_its_session(tmp_path: Path) -> None:
    with LocalBackend(cache=tmp_path, share_passes=True) as backend:
        sessions, gate = [backend.train("tiny", LoraConfig(rank=2, seed=i)) for i in range(3)], threading.Event()
        backend.submit(gate.wait, 10)
        wrong = replace(batch(6).data[0], tokens=np.array([1, 99999], np.int32), targets=np.array([1, 2], np.int64), weights=np.ones(2, np.float32))
        futures = [session.forward_backward(Batch(data=(wrong,)) if i == 1 else batch(9), CE) for i, session in enumerate(sessions)]
        steps = [session.optim_step(AdamConfig()) for session in sessions]
        cancelled = sessions[0].forward_backward(batch(5), CE)
        assert cancelled.cancel()
        gate.set()
        assert futures[0].result().loss == futures[2].result().loss
        with pytest.raises(DataError):
            futures[1].result()
        with pytest.raises(BackendError, match="was not taken"):
            steps[1].result()
        assert steps[0].result().step == steps[2].result().step == 1
