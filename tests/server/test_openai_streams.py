"""Streams of the OpenAI door, read by the official client: token by token, interleaved, and ended by whoever leaves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tinker

from crucible_framework import events
from crucible_framework.backends import connect, fake
from crucible_framework.backends.fake import FakeBackend
from crucible_framework.errors import NumericError
from crucible_framework.records import Completion
from crucible_framework.server import ServeConfig, Serving, serve

from .test_sdk import losses

WAIT_S = 60.0
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "seed": 4}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "hello", "seed": 4}
BeforeDraw = Callable[[Callable[[int], None]], None]


@pytest.fixture
def client(serving: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{serving.url}/v1", api_key="any", max_retries=0) as made:
        yield made


@pytest.fixture
def before_draw(monkeypatch: pytest.MonkeyPatch) -> BeforeDraw:
    """Has a function called on the backend's thread before each token, with its number from 1."""

    def install(hook: Callable[[int], None]) -> None:
        real, number = fake._draw, [0]

        def draw(*given: Any) -> tuple[int, float]:
            number[0] += 1
            hook(number[0])
            return real(*given)

        monkeypatch.setattr(fake, "_draw", draw)

    return install


def wait(event: threading.Event) -> None:
    assert event.wait(WAIT_S)


@pytest.mark.parametrize("chat", [True, False])
def test_the_first_chunk_is_read_before_the_second_token_is_drawn(client: openai.OpenAI, before_draw: BeforeDraw, chat: bool) -> None:
    read = threading.Event()
    before_draw(lambda number: wait(read) if number > 1 else None)
    ask: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0, "stream": True}
    stream: Any = client.chat.completions.create(**CHAT, **ask, logprobs=True) if chat else client.completions.create(**TEXT, **ask, logprobs=0)
    first = next(iter(stream))
    read.set()
    rest = list(stream)
    count = [len(one.logprobs.content if chat else one.logprobs.tokens) for chunk in (first, *rest) for one in chunk.choices if one.logprobs]
    assert count == [1] * 6
    assert [one.finish_reason for chunk in (first, *rest) for one in chunk.choices] == [None] * 6 + ["length"]


def test_choices_are_interleaved_and_equal_to_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT, max_tokens=20, n=3, logprobs=True)
    chunks = list(client.chat.completions.create(**CHAT, max_tokens=20, n=3, logprobs=True, stream=True, stream_options={"include_usage": True}))
    *body, last = chunks
    assert (last.choices, last.usage) == ([], whole.usage)
    assert all(chunk.usage is None for chunk in body)
    order = [choice.index for chunk in body for choice in chunk.choices if choice.finish_reason is None]
    assert order[:6] == [0, 1, 2, 0, 1, 2]
    for one in whole.choices:
        mine = [choice for chunk in body for choice in chunk.choices if choice.index == one.index]
        assert "".join(choice.delta.content or "" for choice in mine) == one.message.content
        assert [choice.delta.role for choice in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert [token.logprob for choice in mine if choice.logprobs for token in choice.logprobs.content or ()] == [
            token.logprob for token in (one.logprobs.content if one.logprobs else None) or ()
        ]  # fmt: skip
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + [one.finish_reason]


def test_texts_of_several_prompts(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {**TEXT, "prompt": ["one", "two"], "n": 2, "max_tokens": 9, "logprobs": 0}
    whole, chunks = client.completions.create(**ask), list(client.completions.create(**ask, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    for one in whole.choices:
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == one.index]
        assert "".join(choice.text for choice in mine) == one.text
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            assert [value for choice in mine if choice.logprobs for value in getattr(choice.logprobs, name)] == getattr(one.logprobs, name)


def test_rivals_and_echo_come_when_the_answer_is_whole(client: openai.OpenAI) -> None:
    for ask in ({"logprobs": 2}, {"echo": True, "logprobs": 0}, {"echo": True}):
        given: dict[str, Any] = {**TEXT, "max_tokens": 4, **ask}
        whole, chunks = client.completions.create(**given), list(client.completions.create(**given, stream=True, stream_options={"include_usage": True}))
        assert [choice.text for chunk in chunks for choice in chunk.choices] == [whole.choices[0].text, ""]
        assert chunks[0].choices[0].logprobs == whole.choices[0].logprobs
        assert chunks[-1].usage == whole.usage


def test_a_stop_is_not_sent(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {**TEXT, "seed": 8, "max_tokens": 60}
    whole = client.completions.create(**ask).choices[0].text
    stop = next(whole[at : at + 2] for at in range(3, len(whole) - 1) if whole[at : at + 2].isascii())
    chunks = list(client.completions.create(**ask, stop=stop, stream=True))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


# ------------------------------------------------------------------------------------------------------------ leaving
@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_ends_the_drawing(serving: Serving, before_draw: BeforeDraw, monkeypatch: pytest.MonkeyPatch, streamed: bool) -> None:
    begun, cancelled = threading.Event(), threading.Event()
    name = "stream" if streamed else "sample"
    real = getattr(fake.FakeSampler, name)

    def asked(self: fake.FakeSampler, *given: Any) -> Future[tuple[Completion, ...]]:
        future: Future[tuple[Completion, ...]] = Future() if not streamed else real(self, *given)
        future.add_done_callback(lambda done: cancelled.set() if done.cancelled() else None)
        begun.set()
        return future

    monkeypatch.setattr(fake.FakeSampler, name, asked)
    before_draw(lambda number: wait(cancelled) if number > 2 else None)
    ask = {**TEXT, "max_tokens": 1000, "stream": streamed}
    with events.collect() as seen, httpx.Client(base_url=serving.url, headers={"X-API-Key": "any"}) as http:
        if streamed:
            with http.stream("POST", "/v1/completions", json=ask) as answer:
                next(answer.iter_lines())
        else:
            leaving = threading.Thread(target=lambda: _impatient(http, ask, begun))
            leaving.start()
            leaving.join(WAIT_S)
        wait(cancelled)
        assert http.post("/v1/completions", json={**TEXT, "max_tokens": 1, "stream": True}).status_code == 200
    if streamed:
        drawn = [event["completion_tokens"] for event in seen if event["name"] == "inference.sample"]
        assert drawn[0] == 3, "the token under way, and none after it"


def _impatient(http: httpx.Client, ask: dict[str, Any], begun: threading.Event) -> None:
    """Leaves once its request is being served."""
    import socket

    url = http.base_url
    body = httpx.Request("POST", f"{url}/v1/completions", json=ask)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {url.host}:{url.port}\r\nX-API-Key: any\r\nContent-Length: {len(body.content)}\r\n\r\n"
    with socket.create_connection((url.host, url.port or 80)) as line:
        line.sendall(head.encode() + body.content)
        wait(begun)


def test_errors_before_the_first_chunk_have_a_status_and_later_ones_are_events(client: openai.OpenAI, before_draw: BeforeDraw) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**{**TEXT, "prompt": [10**8]}, stream=True)
    with pytest.raises(openai.BadRequestError, match="stream_options"):
        client.completions.create(**TEXT, stream_options={"include_usage": True})

    def broken(number: int) -> None:
        if number > 2:
            raise NumericError("The logits are not finite.")

    before_draw(broken)
    stream = client.completions.create(**TEXT, max_tokens=9, temperature=0.0, logprobs=0, stream=True)
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(openai.APIError, match="not finite"):
        next(stream)


# -------------------------------------------------------------------------------------------------------- local engine
def test_base_and_adapter_of_the_local_engine(tmp_path: Path) -> None:
    with connect("local", engine="torch") as backend, serve(backend, ServeConfig(folder=tmp_path / "serve", port=0, models=("tiny",))) as serving:
        service = tinker.ServiceClient(base_url=serving.url, api_key="tml-local")
        training = service.create_lora_training_client("tiny", rank=4, seed=1).result()
        losses(training, 3)
        path = training.save_weights_for_sampler("mine").result().path
        with openai.OpenAI(base_url=f"{serving.url}/v1", api_key="any", max_retries=0) as client:
            for model in ("tiny", path):
                ask: dict[str, Any] = {**CHAT, "model": model, "max_tokens": 12, "n": 2, "logprobs": True}
                whole, chunks = client.chat.completions.create(**ask), list(client.chat.completions.create(**ask, stream=True))
                for one in whole.choices:
                    mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == one.index]
                    assert "".join(choice.delta.content or "" for choice in mine) == one.message.content
                    assert sum(choice.logprobs is not None for choice in mine) == len((one.logprobs.content if one.logprobs else None) or ())
        service.close("success").result()


def test_a_backend_that_does_not_stream_is_told_whole(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fake.FakeSampler, "stream")
    assert not hasattr(FakeBackend().sampler("tiny"), "stream")
    with openai.OpenAI(base_url=f"{start().url}/v1", api_key="any", max_retries=0) as client:
        whole = client.completions.create(**TEXT, max_tokens=6).choices[0].text
        chunks = list(client.completions.create(**TEXT, max_tokens=6, stream=True))
        assert [choice.text for chunk in chunks for choice in chunk.choices] == [whole, ""]
