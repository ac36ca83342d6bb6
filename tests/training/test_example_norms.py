"""Gradient norms of single examples from one pass, against one pass of autograd per example, on every way that the local engine computes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import crucible_framework as cf
from crucible_framework import events
from crucible_framework.backends.local import LocalBackend
from crucible_framework.backends.local.examplewise import ExampleNorms
from crucible_framework.backends.local.session import LocalSession
from crucible_framework.data import ByteTokenizer, load_dataset, render
from crucible_framework.errors import CapabilityError, ConfigError
from crucible_framework.losses import combine, resolve
from crucible_framework.protocols import ExampleSession, TrainingSession
from crucible_framework.records import AdamConfig, Batch, Dataset, Datum, Example, LoraConfig, StepOutput
from crucible_framework.training import PrivacyConfig, Progress, example_gradients, example_norms, measure_noise_scale, train_privately
from crucible_framework.training.examplewise import clipped_sum
from crucible_framework.training.gradients import dot

CE = resolve("cross_entropy")


def data(count: int = 7, seed: int = 0) -> tuple[Datum, ...]:
    """Of very different lengths, some with the same start, one without any weight."""
    rng = np.random.default_rng(seed)
    made = [
        render(Example(id=str(i), prompt="Which?" * int(rng.integers(1, 9)), target="x" * int(rng.integers(1, 50))), ByteTokenizer()) for i in range(count - 1)
    ]
    return (*made, replace(made[0], id="none", weights=np.zeros_like(made[0].weights)))


def one_by_one(session: TrainingSession, examples: tuple[Datum, ...]) -> NDArray[np.float64]:
    """The oracle: each example's gradient by autograd on a pass of its own."""
    return np.array(
        [dot(gradient, gradient) ** 0.5 if any(datum.weights) else 0.0 for datum, gradient in zip(examples, example_gradients(session, examples), strict=True)]
    )


@pytest.fixture(scope="module")
def backend() -> Iterator[LocalBackend]:
    with LocalBackend() as made:
        yield made


def trained(backend: LocalBackend, lora: LoraConfig) -> ExampleSession:
    """One step in, so that B is not zero."""
    session = backend.train("tiny", lora)
    session.forward_backward(Batch(data=data()), CE)
    session.optim_step(AdamConfig(lr=1e-2)).result()
    return session


@pytest.mark.parametrize("name", ["fast", "plain"])
@pytest.mark.parametrize("rank", [2, 48])
@pytest.mark.parametrize("modules", [("q_proj", "v_proj"), ("all-linear", "lm_head")])
def test_norms_are_those_of_a_pass_per_example(name: str, rank: int, modules: tuple[str, ...]) -> None:
    with LocalBackend(engine="fast" if name == "fast" else "plain") as local:
        session = trained(local, LoraConfig(rank=rank, dropout=0.0, target_modules=modules))
        wanted = one_by_one(session, data()[:-1])
        found = session.forward_backward_examples(Batch(data=data()), CE).result()
        assert found.example_norms is not None
        np.testing.assert_allclose(found.example_norms[:-1], wanted, rtol=1e-5)
        assert found.example_norms[-1] == 0
        np.testing.assert_allclose(example_norms(session, data()[:-1]), wanted, rtol=1e-5)


def test_second_passes_and_recomputed_layers() -> None:
    with LocalBackend() as local:
        session = trained(local, LoraConfig(rank=4, dropout=0.0))
        wanted = one_by_one(session, data()[:-1])
        assert isinstance(session, LocalSession)
        assert session.base.decoder is not None
        session.base.decoder.recompute_above = 10
        session.base = replace(session.base, limit=10)
        found = session.forward_backward_examples(Batch(data=data()[:-1]), CE).result().example_norms
    assert found is not None
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_bfloat16_is_near(backend: LocalBackend) -> None:
    with LocalBackend(dtype="bfloat16") as local:
        session = trained(local, LoraConfig(rank=4, dropout=0.0))
        wanted = one_by_one(session, data()[:-1])
        found = session.forward_backward_examples(Batch(data=data()[:-1]), CE).result().example_norms
    assert found is not None
    np.testing.assert_allclose(found, wanted, rtol=0.03)


def test_masks_of_dropout_are_those_of_the_pass(backend: LocalBackend) -> None:
    """With one example the batch's gradient is the example's, in whatever masks."""
    session = trained(backend, LoraConfig(rank=4, dropout=0.5, target_modules=("all-linear",)))
    output = session.forward_backward_examples(Batch(data=data()[:1]), CE).result()
    norm = session.optim_step(AdamConfig(lr=0.0)).result().grad_norm
    assert output.example_norms is not None
    assert output.example_norms[0] == pytest.approx(norm, rel=1e-5)


def test_several_targets_and_logits(backend: LocalBackend) -> None:
    session = trained(backend, LoraConfig(rank=4, dropout=0.0, target_modules=("q_proj", "lm_head")))
    wide = tuple(replace(one, targets=np.stack([one.targets, one.targets], 1), weights=np.stack([one.weights, 0 * one.weights], 1)) for one in data()[:3])
    wanted, loss = one_by_one(session, data()[:3]), resolve("entropy")
    np.testing.assert_allclose(example_norms(session, wide), wanted, rtol=1e-5)
    apart = [dot(gradient, gradient) ** 0.5 for gradient in example_gradients(session, data()[:3], loss)]
    np.testing.assert_allclose(example_norms(session, data()[:3], loss), apart, rtol=1e-4)


def test_the_gradient_itself_is_that_of_a_plain_pass(backend: LocalBackend) -> None:
    one, two = (trained(backend, LoraConfig(rank=4, dropout=0.5)) for _ in range(2))
    apart = tuple(replace(datum, tokens=np.roll(datum.tokens, i)) for i, datum in enumerate(data()))  # no common starts
    one.forward_backward(Batch(data=apart), CE)
    two.forward_backward_examples(Batch(data=apart), CE)
    assert one.optim_step(AdamConfig()).result().grad_norm == pytest.approx(two.optim_step(AdamConfig()).result().grad_norm, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 7), st.integers(1, 7), st.booleans(), st.integers(0, 99))
def test_both_ways_of_a_product(lengths: list[int], p: int, q: int, shuffled: bool, seed: int) -> None:
    """Rows of examples in any order, of any length, against the product written out."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    order = torch.randperm(total, generator=generator).numpy() if shuffled else np.arange(total)
    rows = np.split(order, np.cumsum(lengths)[:-1])
    left, right = torch.randn(total, p, generator=generator), torch.randn(total, q, generator=generator)
    norms = ExampleNorms(len(lengths))
    norms.begin(range(len(lengths)), rows, total, [0] * len(lengths))
    norms.add(left, right, 0.5)
    wanted = [0.5 * float((left[part].mT @ right[part]).norm()) for part in rows]
    np.testing.assert_allclose(norms.norms(), wanted, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- its users
def test_clipped_sum_is_that_of_examples_one_by_one(backend: LocalBackend) -> None:
    session = trained(backend, LoraConfig(rank=4, dropout=0.0))
    examples = data()[:-1]
    norms = one_by_one(session, examples)
    clip = float(np.median(norms))
    wanted: dict[str, torch.Tensor] = {}
    for norm, gradient in zip(norms, example_gradients(session, examples), strict=True):
        wanted = {name: wanted.get(name, 0) + min(1.0, clip / norm) * part for name, part in gradient.items()}
    found = clipped_sum(session, examples, CE, clip)
    for name, part in wanted.items():
        torch.testing.assert_close(found[name], part, rtol=1e-4, atol=1e-4)


class _Counting:
    """A session that counts its passes."""

    def __init__(self, session: ExampleSession) -> None:
        self.session, self.single = session, 0
        self.optim_step = session.optim_step
        self.forward_backward_examples = session.forward_backward_examples

    def forward_backward(self, batch: Batch, loss: cf.Loss) -> Future[StepOutput]:
        self.single += 1
        return self.session.forward_backward(batch, loss)


@pytest.mark.parametrize(("dropout", "alone"), [(0.0, False), (0.5, True)])
def test_dropout_falls_back_to_examples_one_by_one(backend: LocalBackend, dropout: float, alone: bool) -> None:
    """New masks make other norms than those that the factors are from; a bound that does not hold is not used."""
    session = trained(backend, LoraConfig(rank=4, dropout=dropout))
    clip = float(example_norms(session, data()[:-1]).min()) / 2
    counting = _Counting(session)
    for name in ("forward", "save", "sampler", "close"):
        setattr(counting, name, getattr(session, name))
    clipped_sum(counting, data()[:-1], CE, clip)  # type: ignore[arg-type]  # it has all that is used
    assert bool(counting.single) is alone


def test_noise_scale_is_the_same_from_one_pass(backend: LocalBackend) -> None:
    session = trained(backend, LoraConfig(rank=4, dropout=0.0))
    found = measure_noise_scale(session, data()[:-1])
    units = [replace(one, weights=one.weights / one.weights.sum()) for one in data()[:-1]]
    gradients = list(example_gradients(session, units))
    mean = {name: torch.stack([gradient[name] for gradient in gradients]).mean(0) for name in gradients[0]}
    trace = sum(dot(d, d) for d in ({name: gradient[name] - mean[name] for name in mean} for gradient in gradients)) / (len(units) - 1)
    assert found.trace == pytest.approx(trace, rel=1e-4)


def test_private_training_refuses_terms_on_parameters(backend: LocalBackend) -> None:
    session = backend.train("tiny", LoraConfig(dropout=0.0))
    with pytest.raises(ConfigError, match="clipping"):
        train_privately(session, data()[:3], PrivacyConfig(steps=1, sampling_rate=0.5, seed=0), loss=combine({"cross_entropy": 1.0, "l2": 0.1}))


@pytest.fixture
def claims() -> Dataset:
    return load_dataset("minifact", split="train", limit=8)


def test_a_run_records_them(backend: LocalBackend, claims: Dataset) -> None:
    seen: list[dict[str, object]] = []
    config = cf.TrainConfig(base_model="tiny", max_steps=2, accumulate=2, example_norms=True, hooks=("norms",), lora=LoraConfig(dropout=0.0))
    rows: list[dict[str, float]] = []
    end = events.subscribe(lambda event: seen.append(dict(event)))

    def keep(progress: Progress) -> None:
        rows.append(dict(progress.metrics))

    with cf.Trainer(backend, config, callbacks=[keep]) as trainer:
        trainer.train(claims)
    end()
    row = next(row for row in rows if row.get("step") == 1)
    assert row["grad/example_norm/max"] >= row["grad/example_norm/median"] > 0
    assert row["grad/global_norm"] <= 8 * row["grad/example_norm/mean"] * (1 + 1e-6)  # the sum's norm is at most the norms' sum
    assert any(name.startswith("grad/norm/") for name in row)
    (event, _) = [event for event in seen if event["name"] == "training.example_norms"]
    assert event["examples"] == 8
    assert len(event["ids"]) == 3  # type: ignore[arg-type]  # a list


def test_other_backends_say_that_they_cannot(claims: Dataset) -> None:
    config = cf.TrainConfig(base_model="tiny", max_steps=1, example_norms=True)
    with cf.connect("fake") as fake, cf.Trainer(fake, config) as trainer, pytest.raises(CapabilityError, match="example_norms"):
        trainer.train(claims)
