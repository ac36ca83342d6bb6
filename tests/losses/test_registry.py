"""Losses by name, of one's own, and combined."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crucible_framework.errors import BackendError, ConfigError, UnknownNameError
from crucible_framework.losses import combine, losses, register, resolve
from crucible_framework.losses.tokenwise import CROSS_ENTROPY, cross_entropy
from crucible_framework.protocols import Loss
from crucible_framework.records import Datum
from crucible_framework.testing import make_data

torch.set_num_threads(1)
Made = tuple[Tensor, dict[str, float]]


def length(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> Made:
    """−Σ log p over all tokens, and how many there are."""
    return -torch.stack([values.sum() for values in logprobs]).sum(), {"tokens": float(sum(map(len, data)))}


def inputs(seed: int = 0) -> tuple[tuple[Datum, ...], list[Tensor]]:
    data = make_data((4, 3), vocab_size=16)
    generator = torch.Generator().manual_seed(seed)
    return data, [-torch.rand(len(datum), generator=generator, dtype=torch.float64).requires_grad_() for datum in data]


# ---------------------------------------------------------------------------------------------------------------- names
def test_importing_loads_no_torch() -> None:
    code = "import sys, crucible_framework.losses as l\nl.losses.names()\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]})
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", ["cross_entropy", "kl", "mse"])
def test_every_name_in_the_table_is_a_loss_of_that_name(name: str) -> None:
    assert name in losses.names()
    found = resolve(name)
    assert found.name == name
    assert found.source
    assert resolve(found) is found


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"No loss is called 'cross_entropi'. Did you mean 'cross_entropy'.*module:attribute"):
        resolve("cross_entropi")
    with pytest.raises(UnknownNameError, match="'mse'"):
        combine({"cross_entropy": 1.0, "mze": 1.0})


def test_name_may_be_a_path() -> None:
    assert resolve("crucible_framework.losses.tokenwise:CROSS_ENTROPY") is CROSS_ENTROPY
    made = resolve("crucible_framework.losses.tokenwise:cross_entropy")
    assert (made.name, made.fn, made.source) == ("cross_entropy", cross_entropy, "user")


def test_function_is_a_loss() -> None:
    made = resolve(length)
    assert (made.name, made.fn, made.needs, made.extras) == ("length", length, "logprobs", ())


@pytest.mark.parametrize("wrong", [3, None, "math:pi"])
def test_other_things_are_no_losses(wrong: object) -> None:
    with pytest.raises(ConfigError, match="expected a loss: a name, weights over names, a Loss or a function"):
        resolve(wrong)  # type: ignore[arg-type]


def test_registered_function_is_found_by_name() -> None:
    made = register("test_length", source="this test", extras=("advantages",), needs="logits")(length)
    assert resolve("test_length") is made
    assert (made.name, made.source, made.extras, made.needs) == ("test_length", "this test", ("advantages",), "logits")
    for taken in ("test_length", "kl"):
        with pytest.raises(ConfigError, match=f"A loss called '{taken}' exists already"):
            register(taken)(cross_entropy)


# -------------------------------------------------------------------------------------------------------------- combine
@given(first=st.floats(0, 10), second=st.floats(1e-3, 10), seed=st.integers(0, 50))
def test_combined_loss_is_the_weighted_sum(first: float, second: float, seed: int) -> None:
    data, logprobs = inputs(seed)
    names = ("cross_entropy", "mse")
    parts = [resolve(name).fn(data, logprobs)[0] for name in names]
    value, metrics = combine(dict(zip(names, (first, second), strict=True))).fn(data, logprobs)
    torch.testing.assert_close(value, first * parts[0] + second * parts[1])
    weight = sum(float(datum.weights.sum()) for datum in data)
    norms = [math.hypot(*(float(part.norm()) for part in torch.autograd.grad(one, logprobs, retain_graph=True))) for one in parts]
    expected = {f"loss/{name}": float(part.detach()) / weight for name, part in zip(names, parts, strict=True)}
    assert metrics == pytest.approx(expected | {f"grad_norm/{name}": norm / weight for name, norm in zip(names, norms, strict=True)})
    with torch.no_grad():
        _, quiet = combine(dict(zip(names, (first, second), strict=True))).fn(data, logprobs)
    assert quiet == pytest.approx(expected)
    gradients = torch.autograd.grad(first * parts[0] + second * parts[1], logprobs)
    for found, wanted in zip(torch.autograd.grad(value, logprobs), gradients, strict=True):
        torch.testing.assert_close(found, wanted)


def test_mapping_is_combined_and_named_after_its_parts() -> None:
    made = resolve({"cross_entropy": 0.8, "kl": 0.2})
    assert made.name == "0.8*cross_entropy+0.2*kl"
    assert made.extras == ("reference_logprobs",)
    assert "Shannon" in made.source
    assert "Schulman" in made.source


def test_own_functions_combine_and_report() -> None:
    data, logprobs = inputs()
    value, metrics = combine({length: 2.0, CROSS_ENTROPY: 0.0}).fn(data, logprobs)
    assert float(value.detach()) == pytest.approx(2 * float(length(data, logprobs)[0].detach()))
    assert metrics.keys() == {"length/tokens", "loss/length", "loss/cross_entropy", "grad_norm/length", "grad_norm/cross_entropy"}
    assert metrics["length/tokens"] == 7.0


def test_term_with_factor_zero_cannot_spoil_the_sum() -> None:
    broken = Loss(name="broken", fn=lambda _, logprobs: (logprobs[0].sum() * float("nan"), {}), source="test")
    data, logprobs = inputs()
    value, metrics = combine({broken: 0.0, "cross_entropy": 1.0}).fn(data, logprobs)
    assert math.isfinite(float(value.detach()))
    assert math.isnan(metrics["loss/broken"])


def test_term_of_one_element_may_have_any_shape() -> None:
    shaped = Loss(name="shaped", fn=lambda data, logprobs: (cross_entropy(data, logprobs)[0].reshape(1, 1), {}), source="test")
    data, logprobs = inputs()
    assert float(combine({shaped: 1.0, "mse": 0.5}).fn(data, logprobs)[0].detach()) > 0


def test_term_that_is_no_number_is_named() -> None:
    vector = Loss(name="vector", fn=lambda _, logprobs: (logprobs[0], {}), source="test")
    data, logprobs = inputs()
    with pytest.raises(BackendError, match=r"'vector' gave a tensor of shape \(4,\)"):
        combine({vector: 1.0, "mse": 1.0}).fn(data, logprobs)


@pytest.mark.parametrize("factor", [-1.0, math.nan, math.inf, True, "0.5", None])
def test_factors_are_finite_numbers_of_at_least_zero(factor: object) -> None:
    with pytest.raises(ConfigError, match=r"The weight of loss 'mse' is .*; expected a finite number of at least 0"):
        combine({"cross_entropy": 1.0, "mse": factor})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="'length'"):
        combine({length: factor})  # type: ignore[dict-item]


@pytest.mark.parametrize("weights", [{}, {"mse": 0.0}, {"mse": 0.0, "kl": 0}])
def test_something_must_count(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="no positive one"):
        combine(weights)


def test_one_name_stands_for_one_loss() -> None:
    with pytest.raises(ConfigError, match="expected each name once"):
        combine({"cross_entropy": 1.0, cross_entropy: 1.0})


def test_logits_are_shared_where_one_term_needs_them() -> None:
    seen: list[tuple[int, ...]] = []

    def on_logits(data: Sequence[Datum], logits: Sequence[Tensor]) -> Made:
        seen.extend(tuple(values.shape) for values in logits)
        return torch.stack([values.logsumexp(-1).sum() for values in logits]).sum(), {}

    made = combine({Loss(name="z", fn=on_logits, source="test", needs="logits"): 1e-4, "cross_entropy": 1.0})
    assert made.needs == "logits"
    data, _ = inputs()
    logits = [torch.tensor(np.random.default_rng(0).normal(size=(len(datum), 16))) for datum in data]
    _, metrics = made.fn(data, logits)
    assert seen == [(4, 16), (3, 16)]
    picked = [torch.log_softmax(values, -1).gather(1, torch.tensor(datum.targets)[:, None])[:, 0] for datum, values in zip(data, logits, strict=True)]
    weight = sum(float(datum.weights.sum()) for datum in data)
    assert metrics["loss/cross_entropy"] == pytest.approx(float(cross_entropy(data, picked)[0]) / weight)
