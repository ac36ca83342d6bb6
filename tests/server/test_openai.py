"""The official `openai` client asks base models and adapters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tinker

from crucible_framework.backends.fake import FakeBackend
from crucible_framework.files import publish, read_manifest
from crucible_framework.losses import resolve
from crucible_framework.records import AdamConfig, LoraConfig
from crucible_framework.server import Serving
from crucible_framework.store import Models
from crucible_framework.testing import make_batch

from .conftest import Raw, Start
from .test_sdk import losses


@pytest.fixture
def client(serving: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{serving.url}/v1", api_key="any", max_retries=0) as made:
        yield made


def test_texts(client: openai.OpenAI) -> None:
    """The same seed gives the same; n, stop, logprobs, echo and several prompts."""
    ask: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 12, "seed": 1}
    first, again = (client.completions.create(**ask, n=3, logprobs=1) for _ in range(2))
    assert [one.text for one in first.choices] == [one.text for one in again.choices]
    assert len({one.text for one in first.choices}) == 3
    for one in first.choices:
        assert len(one.logprobs.tokens) == len(one.logprobs.token_logprobs) <= 12
        assert all(value <= 0 for value in one.logprobs.token_logprobs)
    assert first.usage.prompt_tokens == 6
    assert first.usage.completion_tokens == sum(len(one.logprobs.tokens) for one in first.choices)
    letter = next(text for text in first.choices[0].text if text.isprintable() and text != "\ufffd")
    cut = client.completions.create(**ask, stop=letter)
    assert cut.choices[0].text == first.choices[0].text.partition(letter)[0]
    assert cut.choices[0].finish_reason == "stop"
    echoed = client.completions.create(**ask | {"max_tokens": 1}, echo=True, logprobs=1).choices[0]
    assert echoed.text.startswith("hello")
    assert echoed.logprobs.token_logprobs[0] is None
    assert len(echoed.logprobs.token_logprobs) == 7
    many = client.completions.create(**ask | {"prompt": ["a", "b"]}, n=2)
    assert [one.index for one in many.choices] == [0, 1, 2, 3]
    assert client.completions.create(**ask | {"prompt": [104, 105]}).usage.prompt_tokens == 2


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "max_tokens": 10,
        "seed": 2,
    }
    whole = client.chat.completions.create(**ask, n=2, logprobs=True)
    assert whole.choices[0].message.role == "assistant"
    assert len(whole.choices[0].logprobs.content) <= 10
    pieces = list(client.chat.completions.create(**ask, n=2, stream=True))
    texts = ["", ""]
    for piece in pieces:
        for choice in piece.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [one.message.content for one in whole.choices]
    assert {choice.finish_reason for piece in pieces for choice in piece.choices} >= {None}
    streamed = list(client.completions.create(model="tiny", prompt="x", max_tokens=4, seed=1, stream=True))
    assert "".join(choice.text for piece in streamed for choice in piece.choices) == client.completions.create(
        model="tiny", prompt="x", max_tokens=4, seed=1
    ).choices[0].text  # fmt: skip


def test_adapters_are_models(client: openai.OpenAI, service: tinker.ServiceClient) -> None:
    """A checkpoint's path is listed and can be asked; a deleted one no longer."""
    training = service.create_lora_training_client("tiny", rank=4, seed=1).result()
    losses(training, 8)
    path = training.save_weights_for_sampler("mine").result().path
    assert {one.id for one in client.models.list()} == {"tiny", "fake", path}
    ask: dict[str, Any] = {"prompt": "hello", "max_tokens": 1, "temperature": 0.0, "logprobs": 1}
    values = [client.completions.create(model=model, **ask).choices[0].logprobs.token_logprobs[0] for model in (path, "tiny")]
    assert values[0] != values[1]
    run = path.removeprefix("tinker://").split("/")[0]
    tinker.RestClient(base_url=str(client.base_url).removesuffix("/v1/"), api_key="tml-local").delete_checkpoint(run, "sampler_weights/mine").result()
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model=path, **ask)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "no-such-model"},
        {"prompt": []},
        {"prompt": [10**8]},
        {"temperature": -1},
        {"n": 0},
        {"logprobs": 99},
        {"suffix": "x"},
        {"prompt": ["a"] * 300},
    ],
)
def test_wrong_requests(client: openai.OpenAI, change: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 2, **change}
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**settings)


def test_rivals(client: openai.OpenAI) -> None:
    """The likeliest tokens at each place, with echo of the prompt's too, as harnesses read whether an answer is greedy."""
    asked: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 3, "seed": 1}
    drawn = client.completions.create(**asked, temperature=0.0, logprobs=2, echo=True).choices[0].logprobs
    assert drawn.top_logprobs[0] is None
    assert len(drawn.top_logprobs) == len(drawn.tokens) == 9
    for token, value, rivals in list(zip(drawn.tokens, drawn.token_logprobs, drawn.top_logprobs, strict=True))[1:]:
        assert 2 <= len(rivals) <= 3
        assert rivals[token] == pytest.approx(value, abs=1e-4)
    for token, rivals in list(zip(drawn.tokens, drawn.top_logprobs, strict=True))[6:]:
        assert rivals[token] == max(rivals.values()), "greedy"
    chat = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=3, seed=1, logprobs=True, top_logprobs=4)
    scores = chat.choices[0].logprobs
    assert scores is not None
    for one in scores.content or ():
        values = [other.logprob for other in one.top_logprobs]
        assert len(values) == 4
        assert values == sorted(values, reverse=True)


def test_registered_adapters_are_models(start: Start, tmp_path: Path) -> None:
    """By name, version or stage; listed for everybody; no registry, no such model."""
    with FakeBackend() as engine:
        session = engine.train("tiny", LoraConfig(rank=4, dropout=0.0))
        for _ in range(5):
            session.forward_backward(make_batch(), resolve("cross_entropy"))
            session.optim_step(AdamConfig(lr=0.1)).result()
        made = session.save("first").result()
        folder = tmp_path / "files"
        publish(folder, lambda into: engine.download(made, into))
        models = Models(tmp_path / "registry")
        models.register(replace(made, local_path=folder, sha256=read_manifest(folder).sha256), "mine")
        models.promote("mine:1")
    serving = start(registry=tmp_path / "registry")
    with openai.OpenAI(base_url=f"{serving.url}/v1", api_key="any", max_retries=0) as client:
        assert "mine:1" in {one.id for one in client.models.list()}
        ask: dict[str, Any] = {"prompt": "hello", "max_tokens": 1, "temperature": 0.0, "logprobs": 0}
        names = ("mine", "mine:1", "mine@production", "tiny")
        values = [client.completions.create(model=name, **ask).choices[0].logprobs.token_logprobs[0] for name in names]
        assert values[0] == values[1] == values[2] != values[3]
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="mine:7", **ask)


def test_chat_refusals(raw: Raw) -> None:
    for body in ({"model": "tiny", "messages": []}, {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "top_logprobs": 3}):
        found: httpx.Response = raw.http.post("/v1/chat/completions", json=body)
        assert found.status_code == 400
        assert found.json()["error"]["message"]
