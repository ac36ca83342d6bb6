"""What is the fake backend's own: its model by hand, its files, its latency. The rest is the backend contract's."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from safetensors.torch import save_file

from crucible_framework.backends import connect
from crucible_framework.backends.fake import FakeBackend, FakeSession
from crucible_framework.errors import BackendError, ConfigError, CorruptError, DataError, NotFoundError, NumericError, UnknownNameError
from crucible_framework.losses import resolve
from crucible_framework.protocols import Gradients, Report
from crucible_framework.records import AdamConfig, Batch, Checkpoint, LoraConfig, SamplingParams
from crucible_framework.testing import make_batch, make_datum, text_datum

torch.set_num_threads(1)
CE = resolve("cross_entropy")
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0)
BATCH = make_batch((6, 4), seed=3)


@pytest.fixture
def backend() -> Iterator[FakeBackend]:
    with FakeBackend() as backend:
        yield backend


def steps(session: FakeSession, count: int, batch: Batch = BATCH) -> list[float]:
    losses = []
    for _ in range(count):
        losses.append(session.forward_backward(batch, CE))
        session.optim_step(AdamConfig(lr=0.01)).result()
    return [output.result().loss for output in losses]


def adapter(backend: FakeBackend, session: FakeSession, folder: Path) -> dict[str, NDArray[np.float32]]:
    where = backend.download(session.save("look").result(), folder).local_path
    assert where is not None
    return dict(load_file(where / "adapter_model.safetensors"))


# ------------------------------------------------------------------------------------------------------- model by hand
def test_logits_and_gradient_by_hand(backend: FakeBackend, tmp_path: Path) -> None:
    """(W + 2 B A) x per token, in float64; the gradient of B is 2 Σ (p − y) (A x)ᵀ over weighted tokens, of A 2 Σ Bᵀ (p − y) xᵀ."""
    session, base = backend.train("tiny", replace(LORA, target_modules=("v_proj",))), backend.base("tiny")
    steps(session, 3)
    tensors = {name.split(".")[-2]: values.astype(np.float64) for name, values in adapter(backend, session, tmp_path).items()}
    a, b = tensors["lora_A"], tensors["lora_B"]
    features, head = base.features.double().numpy(), base.head.double().numpy()
    grad_a, grad_b = np.zeros_like(a), np.zeros_like(b)
    found: dict[str, NDArray[np.float32]] = {}

    def hook(gradients: Gradients, report: Report) -> Gradients:
        found.update({name.split(".")[-2]: gradient.numpy().copy() for name, gradient in gradients.items()})
        return gradients

    output = session.forward_backward(BATCH, CE).result()
    session.optim_step(AdamConfig(lr=0.0), hook).result()
    for datum, logprobs in zip(BATCH.data, output.logprobs, strict=True):
        for place in np.flatnonzero(datum.weights):
            x, target = features[datum.tokens[place]], datum.targets[place]
            logits = head @ x + 2.0 * (b @ (a @ x))
            logp = logits - np.logaddexp.reduce(logits)
            assert logprobs[place] == pytest.approx(logp[target], rel=1e-4)
            error = np.exp(logp) - np.eye(len(logp))[target]
            grad_a += 2.0 * np.outer(b.T @ error, x)
            grad_b += 2.0 * np.outer(error, a @ x)
        assert not logprobs[datum.weights == 0].any()
    np.testing.assert_allclose(found["lora_A"], grad_a, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found["lora_B"], grad_b, rtol=1e-3, atol=1e-5)


def test_same_requests_give_the_same_bits_in_every_backend() -> None:
    losses = []
    for _ in range(2):
        with FakeBackend() as backend:
            losses.append(steps(backend.train("tiny", LoraConfig(dropout=0.2)), 4))
    assert losses[0] == losses[1]


def test_base_models_differ(backend: FakeBackend) -> None:
    seen = [backend.sampler(name).compute_logprobs("A", "b").result() for name in ("tiny", "fake")]
    assert seen[0] != seen[1]
    assert [backend.sampler(name).model for name in ("tiny", "fake")] == ["tiny", "fake"]


@pytest.mark.parametrize(("targets", "layers"), [(("q_proj",), 1), (("v_proj", "embed_proj"), 2), (("all-linear",), 3)])
def test_adapter_has_the_layers_that_are_named(backend: FakeBackend, tmp_path: Path, targets: tuple[str, ...], layers: int) -> None:
    tensors = adapter(backend, backend.train("tiny", replace(LORA, target_modules=targets)), tmp_path)
    assert len(tensors) == 2 * layers
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == layers
    assert all(not values.any() for name, values in tensors.items() if ".lora_B." in name)
    assert all(0 < np.abs(values).max() <= 1 / 8 for name, values in tensors.items() if ".lora_A." in name)


def test_unknown_names_give_the_nearest(backend: FakeBackend) -> None:
    with pytest.raises(UnknownNameError, match=r"No base model is called 'tinny'. Did you mean 'tiny'"):
        backend.sampler("tinny")
    with pytest.raises(UnknownNameError, match="No base model"):
        backend.tokenizer("gpt")
    with pytest.raises(UnknownNameError, match=r"No target module is called 'v_prj'. Did you mean 'v_proj'"):
        backend.train("tiny", replace(LORA, target_modules=("q_proj", "v_prj")))


def test_dropout_keeps_the_mean(backend: FakeBackend) -> None:
    """Masks scale what they leave: over many passes the mean log-prob is near that without dropout, and each pass has its own mask."""
    session = backend.train("tiny", replace(LORA, dropout=0.2))
    steps(session, 10)
    still = session.forward(BATCH, CE).result().loss
    passes = [session.forward_backward(BATCH, CE).result().loss for _ in range(60)]
    assert len(set(passes)) == 60
    assert np.mean(passes) == pytest.approx(still, rel=0.25)


# --------------------------------------------------------------------------------------------------------------- a step
def test_step_that_overflows_is_not_taken(backend: FakeBackend, tmp_path: Path) -> None:
    session = backend.train("tiny", LORA)
    steps(session, 1)
    before = adapter(backend, session, tmp_path / "before")
    session.forward_backward(BATCH, CE)
    with pytest.raises(NumericError, match=r"new value of .*lora_A.* is not finite; expected finite numbers. The weights were not touched"):
        session.optim_step(AdamConfig(lr=1e39)).result()
    after = adapter(backend, session, tmp_path / "after")
    assert all((before[name] == after[name]).all() for name in before)
    assert session.save("x").result().step == 1


def test_gradient_norm_that_overflows_is_not_taken(backend: FakeBackend) -> None:
    session = backend.train("tiny", LORA)
    session.forward_backward(BATCH, CE)
    with pytest.raises(NumericError, match="global norm"):
        session.optim_step(AdamConfig(), lambda gradients, _: {name: values * 0 + 3e38 for name, values in gradients.items()}).result()


def test_hook_must_keep_names_and_shapes(backend: FakeBackend) -> None:
    session = backend.train("tiny", LORA)
    session.forward_backward(BATCH, CE)
    with pytest.raises(BackendError, match=r"gradient hook gave tensors .* expected those it got"):
        session.optim_step(AdamConfig(), lambda gradients, _: {name: values.T for name, values in gradients.items()}).result()


def test_failed_pass_draws_its_masks_again(backend: FakeBackend) -> None:
    """A failure between two steps does not move the dropout generator."""
    clean, failing = (backend.train("tiny", replace(LORA, dropout=0.3)) for _ in range(2))
    expected = steps(clean, 3)
    found = steps(failing, 1)
    with pytest.raises(DataError):
        failing.forward_backward(Batch(data=()), CE).result()
    with pytest.raises(BackendError, match="not taken because a forward_backward before it failed: The batch is empty"):
        failing.optim_step(AdamConfig()).result()
    assert found + steps(failing, 2) == expected


# --------------------------------------------------------------------------------------------------------------- files
@pytest.fixture
def saved(backend: FakeBackend, tmp_path: Path) -> Checkpoint:
    session = backend.train("tiny", LORA)
    steps(session, 2)
    return backend.download(session.save("saved").result(), tmp_path / "files")


def test_files(saved: Checkpoint) -> None:
    folder = saved.local_path
    assert folder is not None
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json"]
    assert json.loads((folder / "state.json").read_text()) == {"step": 2, "passes": 2}
    moments = load_file(folder / "optimizer.safetensors")
    weights = load_file(folder / "adapter_model.safetensors")
    assert {name: values.shape for name, values in moments.items()} == {p + n: v.shape for n, v in weights.items() for p in ("exp_avg.", "exp_avg_sq.")}


@pytest.mark.parametrize("content", ["{", "[]", '{"step": 1}', '{"step": "x", "passes": 1}', "null"])
def test_state_that_does_not_parse(backend: FakeBackend, saved: Checkpoint, content: str) -> None:
    assert saved.local_path is not None
    (saved.local_path / "state.json").write_text(content)
    with pytest.raises(CorruptError, match=r"state\.json of checkpoint 'saved' does not parse"):
        backend.resume(saved)


def test_tensors_of_another_adapter(backend: FakeBackend, saved: Checkpoint) -> None:
    with pytest.raises(CorruptError, match="holds other tensors"):
        backend.resume(replace(saved, lora=replace(LORA, rank=8)))
    with pytest.raises(CorruptError, match="holds other tensors"):
        backend.sampler(replace(saved, lora=replace(LORA, target_modules=("q_proj",))))
    assert saved.local_path is not None
    save_file({"other": torch.zeros(2)}, saved.local_path / "optimizer.safetensors")
    with pytest.raises(CorruptError, match=r"optimizer\.safetensors"):
        backend.resume(saved)


def test_checkpoint_of_another_backend_needs_its_files(backend: FakeBackend, saved: Checkpoint, tmp_path: Path) -> None:
    with FakeBackend() as other:
        assert steps(other.resume(saved), 2) == steps(backend.resume(saved), 2)
        with pytest.raises(NotFoundError, match="this backend's memory"):
            other.resume(replace(saved, local_path=None))
        with pytest.raises(NotFoundError, match="nowhere"):
            other.download(replace(saved, local_path=tmp_path / "nowhere"), tmp_path / "copy")
        assert other.download(saved, tmp_path / "copy").size_bytes == saved.size_bytes


@pytest.mark.parametrize(("name", "kind"), [("", "state"), ("x", "weights")])
def test_checkpoint_needs_name_and_kind(backend: FakeBackend, name: str, kind: str) -> None:
    with pytest.raises(ConfigError, match="expected a name and 'state' or 'sampler'"):
        backend.train("tiny", LORA).save(name, kind).result()  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- sampling
def test_earliest_of_several_stops_wins(backend: FakeBackend) -> None:
    tokenizer = backend.tokenizer("tiny")
    session = backend.train("tiny", replace(LORA, rank=16, alpha=32.0))
    steps(session, 80, Batch(data=(text_datum("Say it.", "abcdefg", tokenizer),)))
    sampler, params = session.sampler(), SamplingParams(max_tokens=20, temperature=0.0)
    whole = sampler.sample("Say it.", params).result()[0]
    assert (whole.text, whole.stop_reason, whole.tokens[-1]) == ("abcdefg", "stop", tokenizer.eos_ids[0])
    cut = sampler.sample("Say it.", replace(params, stop=("f", "cd", "zz", ord("e")))).result()[0]
    assert (cut.text, cut.stop_reason, cut.tokens) == ("ab", "stop", tuple(b"abcd"))
    by_token = sampler.sample("Say it.", replace(params, stop=(ord("c"),))).result()[0]
    assert (by_token.text, by_token.tokens) == ("ab", tuple(b"abc"))
    short = sampler.sample("Say it.", replace(params, max_tokens=3)).result()[0]
    assert (short.text, short.stop_reason) == ("abc", "length")


def test_n_is_at_least_one(backend: FakeBackend) -> None:
    with pytest.raises(ConfigError, match="n is 0; expected a whole number of at least 1"):
        backend.sampler("tiny").sample("A", SamplingParams(), 0)


# ------------------------------------------------------------------------------------------------------------ connection
def test_connect_finds_it() -> None:
    with connect("fake", latency_s=0.0) as backend:
        assert isinstance(backend, FakeBackend)
        assert (backend.capabilities.name, backend.capabilities.gradients) == ("fake", "parameters")
    with pytest.raises(BackendError, match="closed"):
        backend.sampler("tiny")


def test_latency_delays_every_request() -> None:
    with FakeBackend(latency_s=0.02) as backend:
        session, start = backend.train("tiny", LORA), time.monotonic()
        futures = [session.forward(Batch(data=(make_datum(3),)), CE) for _ in range(3)]
        for future in futures:
            future.result()
        assert time.monotonic() - start >= 0.06


@pytest.mark.parametrize("latency_s", [-1.0, float("nan"), float("inf")])
def test_latency_is_a_time(latency_s: float) -> None:
    with pytest.raises(ConfigError, match="expected a finite number of seconds of at least 0"):
        FakeBackend(latency_s=latency_s)
