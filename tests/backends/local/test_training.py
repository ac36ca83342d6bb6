"""A session: order, accumulation, dropout, failures that never reach the weights, hooks, and bit-exact resumption."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from crucible_framework import events
from crucible_framework.backends.local import LocalBackend, engine, layout
from crucible_framework.errors import BackendError, ConfigError, DataError, NumericError, UnknownNameError
from crucible_framework.protocols import Gradients, Loss, Report
from crucible_framework.records import AdamConfig, Batch, Datum, LoraConfig, OptimOutput, StepOutput

from .models_for_tests import CE, batch, datum

LORA = LoraConfig(rank=4, dropout=0.2, seed=1)
ADAM = AdamConfig(lr=0.01)


def weights(backend: LocalBackend, session: object) -> dict[str, Tensor]:
    from crucible_framework.backends.local.session import LocalSession

    assert isinstance(session, LocalSession)
    return dict(session._adapter)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def run(backend: LocalBackend, base: str = "tiny", lora: LoraConfig = LORA, steps: int = 3) -> list[tuple[float, float]]:
    """Losses and norms of a few steps submitted ahead."""
    session = backend.train(base, lora)
    outputs: list[tuple[Future[StepOutput], Future[OptimOutput]]] = []
    for step in range(steps):
        outputs.append((session.forward_backward(batch(7, 12, 9, seed=step), CE), session.optim_step(ADAM)))
    return [(output.result().loss, optim.result().grad_norm) for output, optim in outputs]


# ------------------------------------------------------------------------------------------------------------- training
def test_requests_run_in_the_order_of_submission(backend: LocalBackend) -> None:
    session, seen = backend.train("tiny", LORA), list[str]()
    gate = threading.Event()

    def noting(name: str) -> Loss:
        def fn(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
            gate.wait(10)
            seen.append(name)
            return CE.fn(data, logprobs)

        return replace(CE, fn=fn)

    def hook(gradients: Gradients, _report: Report) -> Gradients:
        seen.append("step")
        return gradients

    futures: list[Future[StepOutput] | Future[OptimOutput]] = []
    for number in range(3):
        futures += [session.forward_backward(batch(4), noting(f"fb{number}")), session.forward(batch(4), noting(f"f{number}")), session.optim_step(ADAM, hook)]
    assert not seen
    gate.set()
    for future in futures:
        future.result()
    assert seen == [item for number in range(3) for item in (f"fb{number}", f"f{number}", "step")]


def test_training_learns_and_repeats_bit_for_bit(backend: LocalBackend) -> None:
    first = run(backend)
    assert first == run(backend)
    assert first != run(backend, lora=replace(LORA, seed=2))
    session, data = backend.train("tiny", LORA), batch(10, 14)
    losses = []
    for _ in range(12):
        losses.append(session.forward_backward(data, CE).result().loss)
        session.optim_step(ADAM)
    assert losses[-1] < losses[0] - 1


def test_gradients_accumulate_by_addition(backend: LocalBackend) -> None:
    lora = replace(LORA, dropout=0.0)
    one, two = backend.train("tiny", lora), backend.train("tiny", lora)
    whole = batch(6, 9, 5)
    one.forward_backward(whole, CE)
    for part in whole.data:
        two.forward_backward(Batch(data=(part,)), CE)
    norms = [session.optim_step(replace(ADAM, max_grad_norm=None)).result().grad_norm for session in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    losses = [session.forward(whole, CE).result().loss for session in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_forward_has_no_dropout_and_changes_nothing(backend: LocalBackend) -> None:
    data = batch(8, 8)
    asked, plain = backend.train("tiny", LORA), backend.train("tiny", LORA)
    for session in (asked, plain):
        session.forward_backward(data, CE)
        session.optim_step(ADAM).result()
    assert asked.forward(data, CE).result().loss == asked.forward(data, CE).result().loss
    dropped = [session.forward_backward(data, CE).result().loss for session in (asked, plain)]
    assert dropped[0] == dropped[1] != asked.forward(data, CE).result().loss
    assert asked.optim_step(ADAM).result().grad_norm == plain.optim_step(ADAM).result().grad_norm


def small_passes(sequences: Sequence[Sequence[int]], device: torch.device, *, share: bool, pack: bool = False, limit: int = 16) -> list[layout.Pass]:
    """The same small passes whatever the limit, so that both runs draw the same masks."""
    return layout.lay_out(sequences, device, share=share, pack=pack, limit=min(limit, 16))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_two_passes_give_the_numbers_of_one(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch, dropout: float) -> None:
    found = []
    last: tuple[tuple[float, float], dict[str, Tensor]] = ((0.0, 0.0), {})
    for limit in (2048, 20):
        base = backend._base("tiny")
        monkeypatch.setitem(backend._bases, "tiny", replace(base, limit=limit, keeps=limit))
        monkeypatch.setattr(engine, "lay_out", small_passes)
        session = backend.train("tiny", replace(LORA, dropout=dropout))
        for step in range(2):
            output, optim = session.forward_backward(batch(12, 30, 11, 5, seed=step), CE), session.optim_step(ADAM)
            numbers = output.result().loss, optim.result().grad_norm
            last = (numbers, weights(backend, session))
        found.append(last)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(tensor, found[1][1][name], rtol=1e-4, atol=1e-5)


def test_the_base_is_frozen_and_shared(backend: LocalBackend) -> None:
    one, two = backend.train("tiny", LORA), backend.train("tiny", LORA)
    assert one.base is two.base
    before = {name: parameter.clone() for name, parameter in one.base.model.named_parameters()}
    one.forward_backward(batch(9), CE)
    one.optim_step(ADAM).result()
    assert all(torch.equal(before[name], parameter) and parameter.grad is None for name, parameter in one.base.model.named_parameters())


def test_bfloat16_base(tmp_path: Path) -> None:
    with LocalBackend(threads=1, dtype="bfloat16") as backend:
        session = backend.train("tiny", LORA)
        losses = []
        for _ in range(6):
            losses.append(session.forward_backward(batch(10, 14), CE).result().loss)
            session.optim_step(ADAM)
        assert losses[-1] < losses[0]
        assert all(tensor.dtype == torch.float32 for tensor in weights(backend, session).values())
        assert session.sampler().compute_logprobs("a", "bcd").result()[0] < 0


# -------------------------------------------------------------------------------------------------------------- failures
def poisoned(kind: str) -> Loss:
    def fn(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        total, metrics = CE.fn(data, logprobs)
        if kind == "nan loss":
            return total * float("nan"), metrics
        if kind == "infinite loss":
            return total + float("inf"), metrics
        if kind == "nan gradient":
            return total + (logprobs[0] * 0).sum().sqrt(), metrics  # the derivative of √0
        if kind == "raises":
            raise RuntimeError("a bug of the user")
        if kind == "vector":
            return torch.stack([total, total]), metrics
        return total.detach(), metrics

    return replace(CE, name=kind, fn=fn)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("nan loss", NumericError, "is nan on examples 'd0', 'd1'; expected a finite number"),
        ("infinite loss", NumericError, "is inf on examples"),
        ("nan gradient", NumericError, "gradient of the loss 'nan gradient' is not finite on example 'd0'"),
        ("raises", RuntimeError, "a bug of the user"),
        ("vector", BackendError, "gave a tensor of shape"),
        ("detached", BackendError, "does not depend on the logprobs"),
    ],
)
def test_a_failed_pass_never_reaches_the_weights(backend: LocalBackend, kind: str, error: type[Exception], message: str) -> None:
    session, clean = backend.train("tiny", LORA), backend.train("tiny", LORA)
    for each in (session, clean):
        each.forward_backward(batch(8, 6), CE)
        each.optim_step(ADAM).result()
    session.forward_backward(batch(8, 6), CE)
    failed, stepped = session.forward_backward(batch(5, 9), poisoned(kind)), session.optim_step(ADAM)
    with pytest.raises(error, match=message) as caught:
        failed.result()
    with pytest.raises(NumericError if error is NumericError else BackendError, match="step was not taken because a forward_backward before it failed"):
        stepped.result()
    if isinstance(caught.value, NumericError):
        assert caught.value.tensor
        assert caught.value.examples
    assert same(weights(backend, session), weights(backend, clean))
    clean.forward_backward(batch(8, 6), CE)  # its masks are drawn, its gradient is thrown away
    with pytest.raises(RuntimeError):
        clean.forward_backward(batch(3), poisoned("raises")).result()
    with pytest.raises(BackendError):
        clean.optim_step(ADAM).result()
    for each in (session, clean):  # what had accumulated is gone, and training goes on where it was
        each.forward_backward(batch(7, 7, seed=9), CE)
        assert each.optim_step(ADAM).result().step == 2
    assert same(weights(backend, session), weights(backend, clean))


def test_step_without_gradient(backend: LocalBackend) -> None:
    session = backend.train("tiny", LORA)
    with pytest.raises(BackendError, match="found no gradient"):
        session.optim_step(ADAM).result()
    session.forward(batch(4), CE)
    with pytest.raises(BackendError, match="found no gradient"):
        session.optim_step(ADAM).result()


def bad_hooks() -> dict[str, tuple[Callable[[Gradients, Report], Gradients], type[Exception], str]]:
    def nan(gradients: Gradients, _report: Report) -> Gradients:
        return {name: gradient * float("nan") for name, gradient in gradients.items()}

    def fewer(gradients: Gradients, _report: Report) -> Gradients:
        return dict(list(gradients.items())[1:])

    def reshaped(gradients: Gradients, _report: Report) -> Gradients:
        return {name: gradient.T for name, gradient in gradients.items()}

    def reports(gradients: Gradients, report: Report) -> Gradients:
        report("ratio", float("nan"))
        return gradients

    def huge(gradients: Gradients, _report: Report) -> Gradients:
        return {name: torch.full_like(gradient, 3e38) for name, gradient in gradients.items()}

    return {
        "nan": (nan, NumericError, "The gradient of 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight' is not finite"),
        "fewer": (fewer, BackendError, "hook gave tensors"),
        "reshaped": (reshaped, BackendError, "hook gave tensors"),
        "reports": (reports, NumericError, "hook reported 'ratio' = nan"),
        "huge": (huge, NumericError, "'global norm' is not finite"),
    }


@pytest.mark.parametrize("kind", sorted(bad_hooks()))
def test_bad_hooks_leave_the_weights(backend: LocalBackend, kind: str) -> None:
    hook, error, message = bad_hooks()[kind]
    session = backend.train("tiny", LORA)
    before = weights(backend, session)
    session.forward_backward(batch(8), CE)
    with pytest.raises(error, match=message):
        session.optim_step(ADAM, hook).result()
    assert same(weights(backend, session), before)
    with pytest.raises(BackendError, match="no gradient"):
        session.optim_step(ADAM).result()


@pytest.mark.parametrize(
    ("adam", "message"),
    [
        (AdamConfig(lr=1e300), r"learning rate 1e\+300 gives a step that no float32 holds"),
        (AdamConfig(lr=3e37, eps=1e-12, beta1=0.99, weight_decay=10.0, max_grad_norm=None), "learning rate|new value"),
        (AdamConfig(lr=1e38, beta1=0.0, beta2=0.0, weight_decay=3.0, max_grad_norm=None), "The new value of 'base_model"),
    ],
)
def test_a_learning_rate_that_overflows_leaves_the_weights(backend: LocalBackend, adam: AdamConfig, message: str) -> None:
    session = backend.train("tiny", LORA)
    before = weights(backend, session)
    session.forward_backward(batch(8), CE)
    with pytest.raises(NumericError, match=message):
        session.optim_step(adam).result()
    assert same(weights(backend, session), before)


def test_hooks_see_and_change_the_gradient(backend: LocalBackend) -> None:
    session = backend.train("tiny", LORA)

    def hook(gradients: Gradients, report: Report) -> Gradients:
        report("tensors", len(gradients))
        return {name: gradient * 2 for name, gradient in gradients.items()}

    plain = backend.train("tiny", LORA)
    outputs = []
    for each, given_hook in ((session, hook), (plain, None)):
        each.forward_backward(batch(8), CE)
        outputs.append(each.optim_step(ADAM, given_hook).result())
    assert outputs[0].metrics == {"tensors": 8.0}
    assert outputs[0].grad_norm == pytest.approx(2 * outputs[1].grad_norm, rel=1e-5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Batch(data=()), "The batch is empty"),
        (Batch(data=(datum("long", 2049, seed=0),)), r"Datum 'long' has 2049 tokens; 'tiny' reads at most 2048"),
        (Batch(data=(replace(datum("x", 4, seed=0), tokens=np.array([1, 2, 261, 3], dtype=np.int32)),)), "has token 261; expected 0 to 260"),
        (Batch(data=(replace(datum("x", 4, seed=0), tokens=np.array([1, -2, 6, 3], dtype=np.int32)),)), "has token -2"),
        (Batch(data=(replace(datum("x", 4, seed=0), targets=np.array([1, 2, 999, 3])),)), "has target 999"),
    ],
    ids=["empty", "long", "token", "negative", "target"],
)
def test_bad_data(backend: LocalBackend, data: Batch, message: str) -> None:
    with pytest.raises(DataError, match=message):
        backend.train("tiny", LORA).forward_backward(data, CE).result()


def test_a_target_that_does_not_count_may_be_anything(backend: LocalBackend) -> None:
    plain = datum("x", 6, seed=0, weighted=2)
    odd = replace(plain, targets=np.where(plain.weights == 0, -100, plain.targets))
    session = backend.train("tiny", LORA)
    assert session.forward(Batch(data=(odd,)), CE).result().loss == session.forward(Batch(data=(plain,)), CE).result().loss


def test_missing_extra(backend: LocalBackend) -> None:
    with pytest.raises(DataError, match="'advantages'"):
        backend.train("tiny", LORA).forward(batch(5), replace(CE, extras=("advantages",))).result()


def test_bad_names(backend: LocalBackend) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'q_proj'"):
        backend.train("tiny", LoraConfig(target_modules=("q_prj",)))
    with pytest.raises(UnknownNameError, match="Did you mean 'tiny'"):
        backend.train("tinny", LoraConfig())
    with pytest.raises(ConfigError, match="cannot be called ''"):
        backend.train("tiny", LORA).save("")


# --------------------------------------------------------------------------------------------------------------- events
def test_events_carry_the_run_of_their_caller(backend: LocalBackend) -> None:
    with events.collect() as seen, events.in_run("r1"):
        session = backend.train("tiny", LORA)
        session.forward_backward(batch(6), CE)
        session.optim_step(ADAM)
        session.save("x").result()
        session.forward(batch(6), CE).result()
    found = {str(event["name"]): event for event in seen}
    assert {"model.loaded", "training.forward_backward", "training.optim_step", "checkpoint.saved", "training.forward"} <= found.keys()
    assert {event["run"] for event in seen} == {"r1"}
    assert found["training.optim_step"]["step"] == 1
    assert found["training.forward_backward"]["tokens"] == 6


# --------------------------------------------------------------------------------------------------------- concurrency
def test_interleaved_sessions_are_as_alone(backend: LocalBackend, qwen: Path) -> None:
    other = LoraConfig(rank=2, dropout=0.1, target_modules=("all-linear",), seed=5)
    jobs: list[tuple[str, LoraConfig]] = [("tiny", LORA), ("tiny", other), (str(qwen), LORA)]
    alone = [run(backend, base, lora, 4) for base, lora in jobs]
    together: dict[int, list[tuple[float, float]]] = {}

    def work(index: int) -> None:
        together[index] = run(backend, *jobs[index], 4)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[index] for index in range(len(jobs))] == alone
