"""Preference losses against closed forms, the loss contract, and the whole way through the trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from crucible_framework.backends import connect
from crucible_framework.data import Batches, preference_examples, render
from crucible_framework.data.tokens import ByteTokenizer
from crucible_framework.errors import ConfigError, DataError
from crucible_framework.losses import combine, resolve
from crucible_framework.losses.apply import apply_loss, total_weight
from crucible_framework.losses.preference import dpo, ipo, kto, orpo, simpo
from crucible_framework.protocols import Loss
from crucible_framework.records import AdamConfig, Datum, LoraConfig, answer_id, split_answer_id
from crucible_framework.testing import LossContract, make_datum

torch.set_num_threads(1)
V = 16
PAIRED = ("dpo", "ipo", "simpo", "orpo")


def answers(names: Sequence[str], lengths: Sequence[int], seed: int = 0) -> tuple[Datum, ...]:
    rng = np.random.default_rng(seed)
    made = []
    for place, (name, length) in enumerate(zip(names, lengths, strict=True)):
        reference = np.log(rng.uniform(0.02, 0.3, length)).astype(np.float32)
        made.append(make_datum(length, seed=place, vocab_size=V, name=name, extras={"reference_logprobs": reference}))
    return tuple(made)


def pair(chosen: Sequence[float], rejected: Sequence[float], reference: Sequence[Sequence[float]] | None = None) -> tuple[tuple[Datum, ...], list[Tensor]]:
    data = []
    for role, values, ref in zip(("chosen", "rejected"), (chosen, rejected), reference or (chosen, rejected), strict=True):
        datum = make_datum(len(values), weights=np.ones(len(values)), vocab_size=V, name=f"a#{role}")
        data.append(replace(datum, extras={"reference_logprobs": np.array(ref, dtype=np.float32)}))
    return tuple(data), [torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in (chosen, rejected)]


def mean_loss(loss: Loss, data: Sequence[Datum], logprobs: Sequence[Tensor]) -> float:
    return float(loss.fn(data, logprobs)[0].detach()) / total_weight(data)


class PairContract(LossContract):
    additive = False  # a pair's weight depends on the others'

    @pytest.fixture(params=PAIRED)
    def loss(self, request: pytest.FixtureRequest) -> Loss:
        return resolve(request.param)

    @pytest.fixture
    def data(self) -> tuple[Datum, ...]:
        return answers(["a#chosen", "b#rejected", "a#rejected", "b#chosen"], [6, 3, 5, 4])


class TestPairs(PairContract):
    pass


class TestVariants(PairContract):
    @pytest.fixture(params=["dpo(smoothing=0.1,sft=0.5,beta=1)", "ipo(average=0,tau=1)", "simpo(gamma=0)"])
    def loss(self, request: pytest.FixtureRequest) -> Loss:
        return resolve(request.param)


class TestKto(PairContract):
    @pytest.fixture
    def loss(self) -> Loss:
        return resolve("kto")

    @pytest.fixture
    def data(self) -> tuple[Datum, ...]:
        return answers(["a#chosen", "b#rejected", "c#chosen"], [6, 3, 5])


# --------------------------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize(("name", "start"), [("dpo", math.log(2)), ("ipo", 25.0), ("kto", 0.5)])
def test_where_they_start(name: str, start: float) -> None:
    data = answers(["a#chosen", "a#rejected", "b#chosen", "b#rejected"], [6, 3, 4, 9])
    logprobs = [torch.tensor(datum.extras["reference_logprobs"]) for datum in data]
    assert mean_loss(resolve(name), data, logprobs) == pytest.approx(start, rel=1e-6)


def test_dpo_by_hand() -> None:
    data, logprobs = pair([-1.0, -2.0], [-3.0], [[-1.5, -2.5], [-2.4]])
    h = (-3.0 - -4.0) - (-3.0 - -2.4)
    assert mean_loss(dpo(), data, logprobs) == pytest.approx(math.log1p(math.exp(-0.1 * h)), rel=1e-6)
    assert h == pytest.approx(1.6)
    assert mean_loss(dpo(), data, logprobs) == pytest.approx(0.616, abs=1e-3)  # the value that an earlier system's test gives for this margin
    _, metrics = dpo().fn(data, logprobs)
    assert metrics == pytest.approx({"pairs": 1, "margin": 0.16, "accuracy": 1, "chosen_logratio": 1.0, "rejected_logratio": -0.6}, rel=1e-6)
    smooth = 0.8 * math.log1p(math.exp(-0.16)) + 0.2 * math.log1p(math.exp(0.16)) + 0.5 * 1.5
    assert mean_loss(dpo(smoothing=0.2, sft=0.5), data, logprobs) == pytest.approx(smooth, rel=1e-6)


def test_dpo_gradient_by_hand() -> None:
    data, logprobs = pair([-1.0, -2.0], [-3.0])
    gradients = torch.autograd.grad(dpo(beta=0.4).fn(data, logprobs)[0], logprobs)
    scale = 3 * 0.4 * 0.5  # Σ w · β · σ(−0)
    assert gradients[0].tolist() == pytest.approx([-scale, -scale])
    assert gradients[1].tolist() == pytest.approx([scale])


def test_ipo_by_hand() -> None:
    data, logprobs = pair([-1.0, -2.0], [-3.0], [[-1.5, -2.5], [-2.4]])
    assert mean_loss(ipo(), data, logprobs) == pytest.approx((0.5 + 0.6 - 5) ** 2, rel=1e-6)
    assert mean_loss(ipo(tau=0.5, average=0), data, logprobs) == pytest.approx((1.6 - 1) ** 2, rel=1e-5)


def test_simpo_by_hand() -> None:
    data, logprobs = pair([-1.0, -2.0], [-3.0])
    assert mean_loss(simpo(), data, logprobs) == pytest.approx(math.log1p(math.exp(-(2 * 1.5 - 1))), rel=1e-9)


def test_orpo_by_hand() -> None:
    data, logprobs = pair([-1.0, -2.0], [-3.0])
    odds = [p / (1 - p) for p in (math.exp(-1.5), math.exp(-3.0))]
    expected = 1.5 - 0.3 * math.log(1 / (1 + odds[1] / odds[0]))
    assert mean_loss(orpo(weight=0.3), data, logprobs) == pytest.approx(expected, rel=1e-9)
    sure, values = pair([0.0, 0.0], [-1.0])
    assert math.isfinite(mean_loss(orpo(), sure, values))  # a probability of 1 has infinite odds
    assert all(bool(g.isfinite().all()) for g in apply_loss(orpo(), sure, values, grad=True).gradients)


def test_kto_by_hand() -> None:
    data, logprobs = pair([-1.0, -2.0], [-3.0], [[-1.5, -2.5], [-2.4]])
    sigma = [1 / (1 + math.exp(-x)) for x in (0.1 * 1.0, 0.1 * 0.6)]
    assert mean_loss(kto(rejected=2.0), data, logprobs) == pytest.approx(((1 - sigma[0]) + 2 * (1 - sigma[1])) / 2, rel=1e-6)
    base = replace(make_datum(1, weights=[1.0], vocab_size=V, name="a#baseline"), extras={"reference_logprobs": np.array([-2.0], dtype=np.float32)})
    more, values = (*data, base), [*logprobs, torch.tensor([-1.5], dtype=torch.float64, requires_grad=True)]
    value, metrics = kto().fn(more, values)
    sigma = [1 / (1 + math.exp(-x)) for x in (0.1 * 0.5, 0.1 * 1.1)]
    assert float(value.detach()) / 4 == pytest.approx(1 - sum(sigma) / 2, rel=1e-6)
    assert metrics == pytest.approx({"answers": 2, "accuracy": 1, "zero_point": 0.5})
    assert not bool(torch.autograd.grad(value, values, allow_unused=True, materialize_grads=True)[2].any())  # the zero point has no gradient


def test_long_pairs_weigh_no_more_and_scale_is_linear() -> None:
    data = answers(["a#chosen", "a#rejected", "b#chosen", "b#rejected"], [40, 30, 2, 3])
    logprobs = [torch.tensor(datum.extras["reference_logprobs"]).double() + 0.1 * i for i, datum in enumerate(data)]
    alone = [mean_loss(dpo(), data[i : i + 2], logprobs[i : i + 2]) for i in (0, 2)]
    assert mean_loss(dpo(), data, logprobs) == pytest.approx(sum(alone) / 2, rel=1e-6)
    scaled = [replace(datum, weights=0.01 * datum.weights) for datum in data]
    assert float(dpo().fn(scaled, logprobs)[0]) == pytest.approx(0.01 * float(dpo().fn(data, logprobs)[0]), rel=1e-5)
    double = [replace(datum, weights=datum.weights * (3 if "a#" in datum.id else 1)) for datum in data]
    assert mean_loss(dpo(), double, logprobs) == pytest.approx((3 * alone[0] + alone[1]) / 4, rel=1e-6)


def test_no_weight_no_loss() -> None:
    data, logprobs = pair([-1.0], [-2.0])
    silent = [replace(datum, weights=np.zeros_like(datum.weights)) for datum in data]
    value, metrics = dpo().fn(silent, logprobs)
    assert float(value.detach()) == 0.0
    assert value.requires_grad
    assert metrics["pairs"] == 0


# ---------------------------------------------------------------------------------------------------------------- errors
def test_batches_that_cannot_be_compared() -> None:
    data, logprobs = pair([-1.0], [-2.0])
    with pytest.raises(DataError, match="'a#chosen' is in a batch without 'a#rejected'"):
        dpo().fn(data[:1], logprobs[:1])
    with pytest.raises(DataError, match="'plain' is neither chosen nor rejected"):
        dpo().fn([replace(data[0], id="plain")], logprobs[:1])
    with pytest.raises(DataError, match="in the batch twice"):
        dpo().fn([data[0], data[0]], [logprobs[0], logprobs[0]])
    with pytest.raises(DataError, match=r"expected \[T\]"):
        simpo().fn([make_datum(3, candidates=2, vocab_size=V, name="a#chosen")], [torch.zeros(3, 2)])
    with pytest.raises(DataError, match="no extra 'reference_logprobs', which the loss 'dpo' needs"):
        dpo().fn([replace(data[0], extras={})], logprobs[:1])


def test_settings_out_of_range() -> None:
    makes: list[Callable[[], Loss]] = [lambda: dpo(beta=0.0), lambda: dpo(smoothing=0.5), lambda: ipo(tau=-1), lambda: simpo(gamma=math.nan)]
    makes += [lambda: kto(beta=-1), lambda: kto(chosen=-1)]
    for make in makes:
        with pytest.raises(ConfigError, match="expected"):
            make()


def test_ids() -> None:
    assert split_answer_id(answer_id("q#7", "chosen")) == ("q#7", "chosen")
    assert split_answer_id("q#other") == ("q#other", "")
    assert split_answer_id("#chosen") == ("#chosen", "")
    assert split_answer_id("plain") == ("plain", "")


# ------------------------------------------------------------------------------------------------------------ whole way
ROWS = [{"id": f"q{i}", "prompt": f"Say {i}.", "chosen": "Yes, sir.", "rejected": "No!"} for i in range(6)]


@pytest.mark.parametrize("name", [*PAIRED, "kto"])
def test_pairs_are_learned(name: str) -> None:
    """Batches hold pairs whole, and training makes the chosen answers likelier than the rejected ones."""
    tokenizer = ByteTokenizer()
    data = [render(example, tokenizer) for example in preference_examples(ROWS)]
    with connect("fake") as backend:
        session = backend.train("tiny", LoraConfig(dropout=0.0, rank=4))
        loss = resolve(name)
        if "reference_logprobs" in loss.extras:
            outputs = [session.forward(Batches([datum], 1, seed=0).at(0), resolve("cross_entropy")).result() for datum in data]
            data = [replace(datum, extras={"reference_logprobs": output.logprobs[0]}) for datum, output in zip(data, outputs, strict=True)]
        batches = Batches(data, 4, seed=0)
        first = session.forward(batches.at(0), loss).result()
        for step in range(12):
            session.forward_backward(batches.at(step), loss).result()
            session.optim_step(AdamConfig(lr=1e-2)).result()
        last = session.forward(batches.at(0), loss).result()
    assert last.loss < first.loss
    assert last.metrics["accuracy"] == 1.0


def test_combined_with_a_pull_to_the_reference() -> None:
    data = answers(["a#chosen", "a#rejected"], [4, 5])
    logprobs = [torch.tensor(datum.extras["reference_logprobs"]).double().requires_grad_() for datum in data]
    _, metrics = combine({"dpo": 1.0, "kl": 0.1}).fn(data, logprobs)
    assert metrics["loss/dpo"] == pytest.approx(math.log(2), rel=1e-6)
    assert metrics["grad_norm/dpo"] > 0
    assert metrics["grad_norm/kl"] == pytest.approx(0.0, abs=1e-9)
