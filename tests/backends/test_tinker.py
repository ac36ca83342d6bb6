"""The tinker backend's own: what it refuses before any work, one pass and two, errors, files."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import tinker
import torch

from crucible_framework import events
from crucible_framework.backends import connect
from crucible_framework.backends.fake import FakeBackend
from crucible_framework.backends.tinker import TinkerBackend
from crucible_framework.backends.tinker.wire import explain, native_form, sampling_params, train_parts
from crucible_framework.errors import (
    AuthError,
    BackendError,
    CapabilityError,
    ConfigError,
    CorruptError,
    DataError,
    NotFoundError,
    NumericError,
    ServiceError,
    SessionClosedError,
)
from crucible_framework.losses import resolve
from crucible_framework.losses.policy import cispo, dro, gspo, importance_sampling, ppo
from crucible_framework.protocols import Backend, Loss
from crucible_framework.records import AdamConfig, Batch, Checkpoint, LoraConfig, SamplingParams
from crucible_framework.server import ServeConfig, keys_of, serve
from crucible_framework.testing import make_batch

torch.set_num_threads(1)
LORA = LoraConfig(rank=4, dropout=0.0)


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    with (
        FakeBackend() as engine,
        serve(engine, ServeConfig(folder=tmp_path / "serve", port=0, poll_s=2.0)) as server,
        connect("tinker", base_url=server.url) as made,
    ):
        yield made


@pytest.mark.parametrize(
    "lora", [LoraConfig(alpha=8.0), LoraConfig(dropout=0.2), LoraConfig(target_modules=("q_proj",)), LoraConfig(target_modules=("q_proj", "other"))]
)
def test_what_no_service_honours_is_refused(lora: LoraConfig) -> None:
    with pytest.raises(CapabilityError, match="default"):
        train_parts(lora)


def test_layers() -> None:
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert train_parts(LoraConfig()) == {"train_attn": True, "train_mlp": True, "train_unembed": True}
    assert train_parts(LoraConfig(target_modules=attention)) == {"train_attn": True, "train_mlp": False, "train_unembed": False}
    assert train_parts(LoraConfig(target_modules=("all-linear",))) == {"train_attn": True, "train_mlp": True, "train_unembed": False}
    with pytest.raises(CapabilityError, match="not both"):
        sampling_params(SamplingParams(stop=("a", 3)))


def sampled() -> Batch:
    """A batch as a policy loss wants it, prompts without weight."""
    rng = np.random.default_rng(0)
    data = []
    for datum in make_batch().data:
        extras = {"logprobs": rng.uniform(-6, -4, len(datum)).astype(np.float32), "advantages": rng.normal(size=len(datum)).astype(np.float32)}
        data.append(replace(datum, extras=extras))
    return Batch(data=tuple(data))


@pytest.mark.parametrize("loss", [importance_sampling(), ppo(), ppo(0.5, 3.0), cispo(0.1, 2.0), dro(0.1), gspo(0.5, 2.0)], ids=lambda loss: loss.name)
def test_one_pass_and_two_train_to_the_same_weights(backend: Backend, loss: Loss) -> None:
    """The service's own loss, and the same function through its gradient; and what the engine itself gives without a service."""
    batch = sampled()
    if loss.native == "dro":
        assert native_form(loss, batch) is None, "its quadratic term has no weight at the service"
        batch = Batch(data=tuple(replace(datum, weights=np.ones_like(datum.weights)) for datum in batch.data))
    assert native_form(loss, batch) is not None
    twin = replace(loss, native=None)
    with FakeBackend() as engine:
        sessions = [backend.train("tiny", LORA), backend.train("tiny", LORA), engine.train("tiny", LORA)]
        seen: list[list[float]] = []
        for session, used in zip(sessions, (loss, twin, twin), strict=True):
            values = []
            for _ in range(3):
                values.append(session.forward_backward(batch, used).result().loss)
                session.optim_step(AdamConfig(lr=0.01)).result()
            seen.append(values)
    assert len(set(seen[0])) == 3
    np.testing.assert_allclose(seen[0], seen[1], rtol=1e-4)
    np.testing.assert_allclose(seen[0], seen[2], rtol=1e-4)


def odd(_: Sequence[object], logprobs: Sequence[torch.Tensor], *, other: int) -> tuple[torch.Tensor, dict[str, float]]:
    return logprobs[0].sum() * other, {}


def test_when_a_loss_takes_two_passes() -> None:
    batch = sampled()
    negative = Batch(data=tuple(replace(datum, weights=-datum.weights) for datum in batch.data))
    assert native_form(ppo(), negative) is None
    assert native_form(ppo(), make_batch()) is None
    assert native_form(resolve("kl"), batch) is None
    assert native_form(replace(ppo(), fn=functools.partial(odd, other=3)), batch) is None
    found = native_form(resolve("cross_entropy"), batch)
    assert found is not None
    assert found.name == "cross_entropy"


def test_a_failed_pass_is_taken_back(backend: Backend) -> None:
    """After native and two-pass gradients, a loss that is not finite leaves nothing behind but rounding."""

    def broken(_: Sequence[object], logprobs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return logprobs[0].sum() * float("nan"), {}

    batch = sampled()
    session, clean = backend.train("tiny", LORA), backend.train("tiny", LORA)
    session.forward_backward(batch, ppo(0.5, 3.0))
    session.forward_backward(batch, resolve({"cross_entropy": 1.0, "mse": 0.5}))
    failed, step = session.forward_backward(batch, resolve(broken)), session.optim_step(AdamConfig())
    with pytest.raises(NumericError):
        failed.result()
    with pytest.raises(NumericError, match="not taken"):
        step.result()
    values = []
    for one in (session, clean):
        one.forward_backward(batch, resolve("cross_entropy"))
        one.optim_step(AdamConfig(lr=0.01)).result()
        values.append(one.forward(batch, resolve("cross_entropy")).result().loss)
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_tokens_are_counted(backend: Backend) -> None:
    assert isinstance(backend, TinkerBackend)
    session = backend.train("tiny", LORA)
    session.forward_backward(make_batch(), resolve("cross_entropy")).result()
    drawn = session.sampler().sample("Hi", SamplingParams(max_tokens=5, seed=1), 2).result()
    assert backend.trained_tokens == make_batch().tokens
    assert backend.sampled_tokens == sum(len(one.tokens) for one in drawn)


def test_state_can_be_sampled(backend: Backend) -> None:
    session = backend.train("tiny", LORA)
    session.forward_backward(make_batch(), resolve("cross_entropy"))
    session.optim_step(AdamConfig(lr=0.05))
    saved, score = session.save("a/odd name").result(), session.sampler().compute_logprobs("Hi", "there").result()
    assert saved.uri.endswith("/weights/a-odd-name")
    assert backend.sampler(saved).compute_logprobs("Hi", "there").result() == score


def test_files_of_another_checkpoint(backend: Backend, tmp_path: Path) -> None:
    session = backend.train("tiny", LORA)
    saved = backend.download(session.save("one").result(), tmp_path / "files")
    with pytest.raises(CorruptError, match="another"):
        backend.resume(replace(saved, step=7))
    (tmp_path / "files" / "state.json").write_text("{}")
    with pytest.raises(CorruptError):
        backend.resume(saved)
    with pytest.raises(NotFoundError, match="no Tinker service"):
        backend.resume(Checkpoint(name="x", uri="local://x", kind="state", step=0, base_model="tiny", lora=LORA))
    with FakeBackend() as other:
        foreign = other.download(other.train("tiny", LORA).save("x").result(), tmp_path / "foreign")
        with pytest.raises(NotFoundError, match="not downloaded from"):
            backend.resume(foreign)


def test_keys_come_from_the_environment_and_stay_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong key is said so, without it; without any, nothing is tried elsewhere."""
    config = ServeConfig(folder=tmp_path / "serve", port=0)
    keys_of(config).add("ann")
    secret = "tml-" + "z" * 40
    monkeypatch.setenv("TINKER_API_KEY", secret)
    with FakeBackend() as engine, serve(engine, config) as server, pytest.raises(AuthError) as caught, connect("tinker", base_url=server.url) as wrong:
        wrong.train("tiny", LORA)
    assert secret not in str(caught.value)
    assert caught.value.__cause__ is not None
    monkeypatch.delenv("TINKER_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(AuthError, match="TINKER_API_KEY"):
        connect("tinker", base_url="https://service.invalid")


def test_a_key_is_told_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Not in events, logs at any level, errors, the backend's or server's attributes that are shown, files of the server, or a command line."""
    config = ServeConfig(folder=tmp_path / "serve", port=0, poll_s=2.0)
    secret = keys_of(config).add("ann")
    monkeypatch.setenv("TINKER_API_KEY", secret)
    caplog.set_level("DEBUG")
    said: list[str] = []
    with events.collect() as seen, FakeBackend() as engine, serve(engine, config) as server, connect("tinker", base_url=server.url) as backend:
        session = backend.train("tiny", LORA)
        session.forward_backward(make_batch(), resolve("cross_entropy")).result()
        for call in (lambda: session.save("x").result(), lambda: backend.sampler("nowhere"), lambda: session.optim_step(AdamConfig(lr=1e9)).result()):
            try:
                call()
            except Exception as error:
                said += [repr(error), repr(error.__cause__), "".join(traceback.format_exception(error))]
        said += [repr(backend), repr(server), repr(vars(session)), server.status()]
        said.append(Path("/proc/self/cmdline").read_text())
    said += [repr(event) for event in seen] + [f"{record.getMessage()} {record.args}" for record in caplog.records]
    assert len(said) > 20
    assert not [text for text in said if secret in text or secret[4:] in text]
    for path in (tmp_path / "serve").rglob("*"):
        assert not path.is_file() or secret.encode()[4:] not in path.read_bytes()


def test_closed(backend: Backend) -> None:
    sampler = backend.sampler("tiny")
    with pytest.raises(ConfigError):
        sampler.sample("Hi", SamplingParams(), 0)
    with pytest.raises(ConfigError):
        backend.train("tiny", LORA).save("x", "other")  # type: ignore[arg-type]
    backend.close()
    for call in (lambda: sampler.compute_logprobs("Hi", "x"), lambda: backend.sampler("tiny"), lambda: backend.tokenizer("nowhere/none")):
        with pytest.raises((SessionClosedError, ServiceError)):
            call()


REQUEST = httpx.Request("POST", "http://127.0.0.1/x")


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, {"detail": "no"}, BackendError),
        (400, {"error": {"type": "DataError", "message": "bad"}}, DataError),
        (400, {"error": {"type": "UnknownNameError", "message": "No x."}}, ConfigError),
        (401, {}, AuthError),
        (404, {"detail": "none"}, NotFoundError),
        (410, {"detail": "gone"}, SessionClosedError),
        (429, {}, ServiceError),
        (500, {}, ServiceError),
    ],
)
def test_http_errors_become_ours(status: int, body: dict[str, object], kind: type[Exception]) -> None:
    classes = {
        400: tinker.BadRequestError,
        401: tinker.AuthenticationError,
        404: tinker.NotFoundError,
        429: tinker.RateLimitError,
        500: tinker.InternalServerError,
    }
    error = classes.get(status, tinker.APIStatusError)("HTTP", response=httpx.Response(status, request=REQUEST), body=body)
    assert type(explain(error, "the request x")) is kind


def test_other_errors_become_ours() -> None:
    lost = explain(tinker.APIConnectionError(request=REQUEST), "the request x")
    assert isinstance(lost, ServiceError)
    assert lost.retryable
    category = tinker.types.RequestErrorCategory
    numeric = explain(tinker.RequestFailedError("Request failed: NumericError: It is nan. for self.request_id='r' and more", "r", category.User), "x", ["a"])
    assert isinstance(numeric, NumericError)
    assert (str(numeric), numeric.examples) == ("It is nan.", ("a",))
    strange = explain(tinker.RequestFailedError("Request failed: out of luck", "r", category.Server), "x")
    assert type(strange) is BackendError
    assert "server" in str(strange)
    assert isinstance(explain(ValueError("odd"), "x"), ServiceError)
    assert isinstance(explain(KeyError("mine"), "x"), KeyError)
