"""Terms on the adapter's tensors: values by hand, gradients against autograd and differences, and what backends make of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from crucible_framework.backends import connect
from crucible_framework.data import ByteTokenizer, render
from crucible_framework.errors import ConfigError, NumericError
from crucible_framework.losses import combine, resolve
from crucible_framework.losses.penalties import gradient_penalty, l1, l2, orthogonality, penalise
from crucible_framework.protocols import Loss, Penalty, PenaltyFn
from crucible_framework.records import AdamConfig, Batch, Example, LoraConfig, StepOutput
from crucible_framework.training import gradient_of

A, B = "base_model.model.layers.0.q_proj.lora_A.weight", "base_model.model.layers.0.q_proj.lora_B.weight"
CE = resolve("cross_entropy")


def adapter(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {A: torch.randn(3, 5, generator=generator, dtype=torch.float64), B: torch.randn(4, 3, generator=generator, dtype=torch.float64)}


def no_slope(values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    raise AssertionError(values)


def written_out(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The definitions, entry by entry."""
    if name == "l1":
        return torch.stack([tensor.abs().sum() for tensor in tensors.values()]).sum()
    if name == "l2":
        return torch.stack([tensor.square().sum() for tensor in tensors.values()]).sum() / 2
    pairs = [(tensors[A][i], tensors[A][j]) for i in range(3) for j in range(3) if i != j]
    pairs += [(tensors[B][:, i], tensors[B][:, j]) for i in range(3) for j in range(3) if i != j]
    return torch.stack([(a @ b).square() for a, b in pairs]).sum() / 4


@pytest.mark.parametrize(("name", "fn"), [("l1", l1), ("l2", l2), ("orthogonality", orthogonality)])
def test_value_and_gradient_are_those_of_the_definition(name: str, fn: PenaltyFn) -> None:
    tensors = {key: value.requires_grad_() for key, value in adapter().items()}
    wanted = written_out(name, tensors)
    slopes = dict(zip(tensors, torch.autograd.grad(wanted, list(tensors.values())), strict=True))
    value, found = fn({key: tensor.detach() for key, tensor in tensors.items()}, no_slope)
    assert value == pytest.approx(float(wanted.detach()), rel=1e-12)
    for key, slope in slopes.items():
        torch.testing.assert_close(found[key], slope)


def test_orthogonal_directions_cost_nothing_whatever_their_length() -> None:
    value, found = orthogonality({A: torch.eye(3, 5) * 7, B: torch.zeros(4, 3)}, no_slope)
    assert value == 0
    assert not any(bool(tensor.any()) for tensor in found.values())


def test_gradient_penalty_is_the_norm_and_the_curvature_along_the_gradient() -> None:
    matrix = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    (penalty,) = gradient_penalty(1e-4).penalties
    at = torch.tensor([0.5, -1.0], dtype=torch.float64)
    value, found = penalty.fn({"x": at}, lambda values: {"x": matrix @ values["x"]})  # of ½ xᵀ M x, whose norm's gradient is Mᵀ M x / ‖M x‖
    assert value == pytest.approx(float((matrix @ at).norm()))
    torch.testing.assert_close(found["x"], matrix.T @ matrix @ at / (matrix @ at).norm())
    value, found = penalty.fn({"x": torch.zeros(2)}, lambda _: {"x": torch.zeros(2)})
    assert value == 0
    assert not found["x"].any()


@pytest.mark.parametrize("radius", [0.0, -1.0, math.inf, math.nan])
def test_radius_must_be_positive(radius: float) -> None:
    with pytest.raises(ConfigError, match="radius"):
        gradient_penalty(radius)


def test_settings_and_combination() -> None:
    loss = combine({"cross_entropy": 1.0, "l2": 0.5, "gradient_penalty(radius=0.5)": 0.25})
    assert [(penalty.name, penalty.factor) for penalty in loss.penalties] == [("l2", 0.5), ("gradient_penalty", 0.25)]
    nested = combine({loss: 2.0, "l1": 1.0})
    assert [(penalty.name, penalty.factor) for penalty in nested.penalties] == [("l2", 1.0), ("gradient_penalty", 0.5), ("l1", 1.0)]


def test_value_that_is_not_finite_stops() -> None:
    loss = Loss(name="x", fn=CE.fn, source="test", penalties=(Penalty(name="bad", fn=lambda a, _: (math.nan, a)),))
    output = StepOutput(loss=1.0, weight=1.0, logprobs=(), metrics={})
    with pytest.raises(NumericError, match="'bad'"):
        penalise(loss, output, adapter(), adapter(), no_slope)


# ------------------------------------------------------------------------------------------------------------- backends
def batch(scale: float = 1.0) -> Batch:
    rows = [render(Example(id=str(i), prompt="Which?", target=text), ByteTokenizer()) for i, text in enumerate(("yes", "no, never"))]
    return Batch(data=tuple(replace(row, weights=(scale * row.weights).astype(np.float32)) for row in rows))


@pytest.mark.parametrize("name", ["fake", "local"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_pass_adds_factor_times_penalty_per_weight(name: str, dropout: float) -> None:
    lora = LoraConfig(rank=3, dropout=dropout)
    with connect(name) as backend:
        one, two = backend.train("tiny", lora), backend.train("tiny", lora)
        for session in (one, two):  # one step in, so that B is not zero
            session.forward_backward(batch(), CE)
            session.optim_step(AdamConfig(lr=0.05)).result()
        plain = gradient_of(one, batch(0.5), CE)
        penalised = gradient_of(two, batch(0.5), combine({"cross_entropy": 1.0, "l2": 3.0}))
        weight = sum(float(datum.weights.sum()) for datum in batch(0.5).data)
        values = {key: (penalised[key] - plain[key]) / (3.0 * weight) for key in plain}
    assert any(bool(value.any()) for value in values.values())
    expected, _ = l2(values, no_slope)  # the gradient of l2 is the adapter itself
    with connect(name) as backend:
        session = backend.train("tiny", lora)
        session.forward_backward(batch(), CE)
        session.optim_step(AdamConfig(lr=0.05)).result()
        output = session.forward_backward(batch(0.5), combine({"cross_entropy": 1.0, "l2": 3.0})).result()
    assert output.metrics["loss/l2"] == pytest.approx(expected, rel=1e-3)
    assert output.loss == pytest.approx(output.metrics["loss/cross_entropy"] + 3 * output.metrics["loss/l2"], rel=1e-5)
    assert output.metrics["grad_norm/l2"] == pytest.approx(math.sqrt(2 * expected), rel=1e-3)


@pytest.mark.parametrize("name", ["fake", "local"])
def test_gradient_penalty_reports_the_norm_and_leaves_the_masks(name: str) -> None:
    """Two sessions with dropout draw the same masks, whether a penalty looks at other weights in between or not."""
    norms: list[float] = []
    reported: list[float] = []
    with connect(name) as backend:
        for loss in (CE, combine({"cross_entropy": 1.0, "gradient_penalty": 0.0})):
            session = backend.train("tiny", LoraConfig(rank=3, dropout=0.5))
            outputs = []
            for _ in range(3):
                outputs.append(session.forward_backward(batch(), loss).result())
                norms.append(session.optim_step(AdamConfig(lr=0.05, max_grad_norm=None)).result().grad_norm)
            reported = [output.metrics.get("loss/gradient_penalty", 0.0) * output.weight for output in outputs]
    assert norms[:3] == pytest.approx(norms[3:], rel=1e-5)
    assert reported == pytest.approx(norms[3:], rel=1e-5)


@pytest.mark.parametrize("name", ["l1", "orthogonality"])
def test_training_lowers_what_the_term_names(name: str) -> None:
    with connect("fake") as backend:
        session = backend.train("tiny", LoraConfig(rank=4, dropout=0.0))
        loss = combine({"cross_entropy": 0.1, name: 1.0})
        found = []
        for _ in range(30):
            found.append(session.forward_backward(batch(), loss).result().metrics[f"loss/{name}"])
            session.optim_step(AdamConfig(lr=1e-2)).result()
    assert found[-1] < 0.7 * found[0]


def test_a_penalty_alone_is_a_loss_and_forward_leaves_it_out() -> None:
    with connect("local") as backend:
        session = backend.train("tiny", LoraConfig(dropout=0.0))
        assert session.forward(batch(), resolve("l1")).result().loss == 0
        output = session.forward_backward(batch(), resolve("l1")).result()
        assert output.loss == output.metrics["loss/l1"] > 0
        assert session.optim_step(AdamConfig()).result().grad_norm > 0
