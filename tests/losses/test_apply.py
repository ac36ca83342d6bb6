"""What every backend does with a loss: positions, log-probs, value, gradient, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crucible_framework.errors import BackendError, DataError, NumericError
from crucible_framework.losses import resolve
from crucible_framework.losses.apply import apply_loss, positions, some, spread, step_output, target_logprobs, total_weight
from crucible_framework.protocols import Loss
from crucible_framework.records import Datum
from crucible_framework.testing import make_data, make_datum

torch.set_num_threads(1)
V = 16
CE = resolve("cross_entropy")
LOGITS = Loss(name="on logits", fn=lambda _, logits: (torch.stack([one.square().sum() for one in logits]).sum(), {}), source="test", needs="logits")


def random_logits(data: Sequence[Datum], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(datum), V, generator=generator, dtype=torch.float64) for datum in data]


# ------------------------------------------------------------------------------------------------------------ positions
def test_positions_are_those_with_a_weight() -> None:
    data = (make_datum(6, vocab_size=V, weights=[0, 1, 0, -2, 0, 0.5]), make_datum(3, vocab_size=V, weights=[0, 0, 0]))
    assert [rows.tolist() for rows in positions(CE, data, V)] == [[1, 3, 5], []]
    assert [rows.tolist() for rows in positions(LOGITS, data, V)] == [[0, 1, 2, 3, 4, 5], [0, 1, 2]]


def test_positions_of_soft_targets_need_one_candidate_with_weight() -> None:
    datum = make_datum(3, vocab_size=V, candidates=2, weights=[[0, 0], [0, 1], [1, 1]])
    assert [rows.tolist() for rows in positions(CE, (datum,), V)] == [[1, 2]]


def test_positions_are_all_where_no_weight_is_left() -> None:
    assert [rows.tolist() for rows in positions(CE, (make_datum(3, vocab_size=V, weights=[0, 0, 0]),), V)] == [[0, 1, 2]]


def test_targets_without_weight_may_be_anything() -> None:
    datum = make_datum(4, vocab_size=V, weights=[0, 0, 1, 1])
    free = replace(datum, targets=np.array([-100, 10**9, 0, V - 1]))
    assert [rows.tolist() for rows in positions(CE, (free,), V)] == [[2, 3]]
    with pytest.raises(DataError, match=r"has target -100; expected 0 to 15.*weight 0"):
        positions(LOGITS, (free,), V)


@pytest.mark.parametrize("bad", [-1, V])
def test_what_is_outside_the_vocabulary_is_named(bad: int) -> None:
    datum = make_datum(4, vocab_size=V, name="row-7", weights=[1, 1, 1, 1])
    with pytest.raises(DataError, match=rf"'row-7' has target {bad}; expected 0 to {V - 1}"):
        positions(CE, (replace(datum, targets=np.full(4, bad)),), V)
    with pytest.raises(DataError, match=rf"'row-7' has token {bad}"):
        positions(CE, (replace(datum, tokens=np.full(4, bad, dtype=np.int32)),), V)


def test_no_data_and_no_extras() -> None:
    with pytest.raises(DataError, match="empty"):
        positions(CE, (), V)
    datum = make_datum(4, vocab_size=V, name="row-7", extras={"advantages": np.zeros(4, np.float32)})
    with pytest.raises(
        DataError, match=r"'row-7' has no extra 'reference_logprobs', which the loss 'kl' needs; its extras: 'advantages'\. Supply .*session.forward"
    ):
        positions(resolve("kl"), (datum,), V)


# ------------------------------------------------------------------------------------------------- log-probs and spread
@given(rows=st.integers(1, 5), candidates=st.none() | st.integers(1, 4), seed=st.integers(0, 99))
def test_target_logprobs_are_those_of_log_softmax(rows: int, candidates: int | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, V, generator=generator, dtype=torch.float64) * 10
    targets = torch.randint(0, V, (rows,) if candidates is None else (rows, candidates), generator=generator)
    found = target_logprobs(logits, targets)
    assert found.shape == targets.shape
    torch.testing.assert_close(found, torch.log_softmax(logits, -1).gather(1, targets.reshape(rows, -1)).reshape(targets.shape))


def test_target_logprobs_stand_huge_logits() -> None:
    found = target_logprobs(torch.tensor([[1e4, -1e4], [3e38, 3e38]]), torch.tensor([1, 0]))
    assert found.tolist() == [-2e4, 0.0]  # in fp32 log 2 is lost beside 3e38


@given(length=st.integers(1, 9), seed=st.integers(0, 99))
def test_spread_puts_values_at_their_rows(length: int, seed: int) -> None:
    rows = np.flatnonzero(np.random.default_rng(seed).random(length) < 0.5)
    values = torch.arange(1.0, len(rows) + 1)
    full = spread(values.clone().requires_grad_() * 2, rows, length)
    assert not full.requires_grad
    assert full[torch.from_numpy(rows)].tolist() == (values * 2).tolist()
    assert float(full.sum()) == float((values * 2).sum())


# ----------------------------------------------------------------------------------------------------- value and gradient
def through(loss: Loss, data: Sequence[Datum], logits: Sequence[Tensor]) -> list[Tensor]:
    """The gradient on logits in two passes: the loss on detached log-probs, then back through the model."""
    inputs = logits if loss.needs == "logits" else [target_logprobs(one, torch.tensor(datum.targets)) for datum, one in zip(data, logits, strict=True)]
    applied = apply_loss(loss, data, inputs, grad=True)
    return list(torch.autograd.grad(inputs, logits, applied.gradients))


@pytest.mark.parametrize("loss", [CE, resolve("mse"), LOGITS, resolve({"cross_entropy": 0.3, "mse": 2.0})], ids=lambda loss: loss.name)
def test_gradient_is_that_of_one_pass(loss: Loss) -> None:
    data = make_data((4, 6), vocab_size=V)
    logits = [one.requires_grad_() for one in random_logits(data)]
    inputs = logits if loss.needs == "logits" else [target_logprobs(one, torch.tensor(datum.targets)) for datum, one in zip(data, logits, strict=True)]
    value, _ = loss.fn(data, inputs)
    expected = torch.autograd.grad(value, logits, retain_graph=True)
    for found, wanted in zip(through(loss, data, logits), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert apply_loss(loss, data, inputs, grad=False).value == float(value.detach())
    assert apply_loss(loss, data, inputs, grad=False).gradients == ()


def test_input_that_the_loss_does_not_use_has_gradient_zero() -> None:
    loss = resolve(lambda _, logprobs: (logprobs[0].sum(), {"one": float(len(logprobs))}))
    applied = apply_loss(loss, make_data((2, 3)), [torch.zeros(2), torch.zeros(3)], grad=True)
    assert [gradient.tolist() for gradient in applied.gradients] == [[1, 1], [0, 0, 0]]
    assert applied.metrics == {"one": 2.0}


Fn = Callable[[Sequence[Datum], Sequence[Tensor]], tuple[Tensor, dict[str, float]]]
NUMBER: Fn = lambda _, logprobs: (3.5, {})  # type: ignore[assignment,return-value] # noqa: E731 - what a user may write
CASES: dict[str, tuple[Fn, type[Exception], str]] = {
    "vector": (lambda _, logprobs: (logprobs[0], {}), BackendError, r"gave a tensor of shape \(3,\); expected a tensor with one number. Sum"),
    "float": (NUMBER, BackendError, "gave a float; expected a tensor"),
    "detached": (lambda _, logprobs: (logprobs[0].detach().sum(), {}), BackendError, "does not depend on the logprobs"),
    "nan": (lambda _, logprobs: (logprobs[0].sum() * float("nan"), {}), NumericError, "is nan on examples 'datum-0-0', 'datum-0-1'"),
    "infinite": (lambda _, logprobs: (logprobs[0].sum() + float("inf"), {}), NumericError, "is inf on"),
    "gradient": (lambda _, logprobs: (logprobs[1].abs().sqrt().sum() + logprobs[0].sum(), {}), NumericError, "gradient of the loss .* on example 'datum-0-1'"),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_that_cannot_be_used(case: str) -> None:
    fn, error, message = CASES[case]
    with pytest.raises(error, match=message) as caught:
        apply_loss(resolve(fn), make_data((3, 2)), [torch.zeros(3), torch.zeros(2)], grad=True)
    if isinstance(caught.value, NumericError):
        assert caught.value.examples == (("datum-0-1",) if case == "gradient" else ("datum-0-0", "datum-0-1"))
        assert caught.value.tensor in ("loss", "logprobs")


def test_detached_losses_can_be_looked_at() -> None:
    loss = resolve(lambda _, logprobs: (logprobs[0].detach().sum(), {}))
    assert apply_loss(loss, make_data((3,)), [torch.full((3,), -1.0)], grad=False).value == -3.0


# ------------------------------------------------------------------------------------------------------------- reporting
def test_step_output_is_nats_per_weight() -> None:
    data = (make_datum(3, weights=[0, 1, 1]), make_datum(2, weights=[0.5, 0]))
    logprobs = [torch.tensor([-9.0, -1, -2], dtype=torch.float64, requires_grad=True), torch.tensor([-4.0, -9])]
    output = step_output(data, apply_loss(CE, data, logprobs, grad=False), logprobs)
    assert (output.loss, output.weight) == (5.0 / 2.5, 2.5)
    assert [one.dtype for one in output.logprobs] == [np.float32, np.float32]
    assert output.logprobs[0].tolist() == [-9, -1, -2]


def test_weight_of_nothing_is_one() -> None:
    assert total_weight((make_datum(3, weights=[0, 0, 0]),)) == 1.0
    assert total_weight((make_datum(3, weights=[0, 1, 2.5]), make_datum(2, weights=[1, 0]))) == 4.5


def test_many_ids_are_shortened() -> None:
    assert some(["a", "b"]) == "'a', 'b'"
    assert some([str(number) for number in range(9)]) == "'0', '1', '2', '3' and 5 more"
