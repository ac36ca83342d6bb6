"""Streams of the local engine: token by token, cancelled at once, and equal to samples."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible_framework import events
from crucible_framework.backends.local import LocalBackend, compiled, torch_steps
from crucible_framework.backends.local.drawing import Batch
from crucible_framework.records import Piece, SamplingParams

WAIT_S = 60.0
Hook = Callable[[int], None]


@pytest.fixture
def before_draw(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Hook], None]]:
    """Has a function called on the engine's thread before each draw, with its number from 1."""

    def install(hook: Hook) -> None:
        number = [0]
        for kind in (compiled.NativeSteps, torch_steps.TorchSteps):
            drawing = kind.draw

            def draw(self: Any, *given: Any, drawing: Any = drawing) -> Any:
                number[0] += 1
                hook(number[0])
                return drawing(self, *given)

            monkeypatch.setattr(kind, "draw", draw)

    yield install
    monkeypatch.undo()


def lanes(backend: LocalBackend) -> Sequence[Batch]:
    return [lane for lane in backend._queue._stepwise._lanes.values() if isinstance(lane, Batch)]  # type: ignore[attr-defined]


def test_a_token_is_told_before_the_next_is_drawn(shared: LocalBackend, before_draw: Callable[[Hook], None]) -> None:
    heard = [threading.Event() for _ in range(5)]
    before_draw(lambda number: None if number == 1 else _wait(heard[number - 2]))
    pieces = list[Piece]()

    def told(piece: Piece) -> None:
        pieces.append(piece)
        heard[len(pieces) - 1].set()

    (whole,) = shared.sampler("tiny").stream("hi", SamplingParams(max_tokens=5, seed=3, temperature=0.0), told).result(WAIT_S)
    assert [piece.tokens for piece in pieces] == [(token,) for token in whole.tokens]


def _wait(event: threading.Event) -> None:
    assert event.wait(WAIT_S), "the token before was not told"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("streamed", [True, False])
def test_cancelling_frees_places_and_pages_at_once(shared: LocalBackend, before_draw: Callable[[Hook], None], streamed: bool, n: int) -> None:
    third, cancelled = threading.Event(), threading.Event()

    def hook(number: int) -> None:
        if number == 3:
            third.set()
            _wait(cancelled)

    before_draw(hook)
    sampler, params = shared.sampler("tiny"), SamplingParams(max_tokens=1500, seed=1, stop=())
    with events.collect() as seen:
        future = sampler.stream("hi", params, lambda _: None, n) if streamed else sampler.sample("hi", params, n)
        _wait(third)
        assert future.cancel()
        cancelled.set()
        assert sampler.sample("hi", SamplingParams(max_tokens=1)).result(WAIT_S)
    assert all(not lane._rows and not lane._waiting and lane._pages.used == 0 for lane in lanes(shared))
    told = [event for event in seen if event["name"] == "inference.sample" and "error" in event]
    assert [(event["error"], event["n"]) for event in told] == [("CancelledError", n)]
    assert told[0]["completion_tokens"] == 2 * n, "the third tokens have nobody who waits for them"


def test_cancelling_one_of_many_leaves_the_others(shared: LocalBackend, before_draw: Callable[[Hook], None]) -> None:
    sampler, params = shared.sampler("tiny"), SamplingParams(max_tokens=20, seed=5)
    alone = sampler.sample("hello", params).result(WAIT_S)
    futures = list[Any]()
    begun = threading.Event()

    def hook(number: int) -> None:
        _wait(begun)
        if number == 4:
            futures[0].cancel()

    before_draw(hook)
    futures.append(sampler.stream("hi", params, lambda _: None))
    futures.append(sampler.stream("hello", params, lambda _: None))
    begun.set()
    assert futures[1].result(WAIT_S)[0].tokens == alone[0].tokens
    assert futures[0].cancelled()


def test_an_engine_failure_reaches_the_reader_after_what_was_drawn(shared: LocalBackend, before_draw: Callable[[Hook], None]) -> None:
    def hook(number: int) -> None:
        if number == 3:
            raise MemoryError("no more")

    before_draw(hook)
    pieces = list[Piece]()
    failing = shared.sampler("tiny").stream("hi", SamplingParams(max_tokens=9, seed=3, temperature=0.0), pieces.append)
    with pytest.raises(MemoryError):
        failing.result(WAIT_S)
    assert len(pieces) == 2


@pytest.mark.parametrize("model", ["tiny", "qwen"])
def test_pieces_make_the_text_of_the_sample(shared: LocalBackend, qwen: Path, model: str) -> None:
    """Hot draws are mostly broken characters; stops are of what such texts hold."""
    sampler = shared.sampler("tiny" if model == "tiny" else str(qwen))

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([0.7, 1.5, 5.0]), st.lists(st.text("aeé \ufffd", min_size=1, max_size=2), max_size=2))
    def check(seed: int, n: int, temperature: float, stops: list[str]) -> None:
        params, pieces = SamplingParams(max_tokens=24, temperature=temperature, seed=seed, stop=tuple(stops)), list[Piece]()
        whole = sampler.sample("hi", params, n).result(WAIT_S)
        streamed = sampler.stream("hi", params, pieces.append, n).result(WAIT_S)
        for index, (one, other) in enumerate(zip(whole, streamed, strict=True)):
            mine = [piece for piece in pieces if piece.index == index]
            assert "".join(piece.text for piece in mine) == one.text == other.text
            assert tuple(token for piece in mine for token in piece.tokens) == one.tokens
            assert tuple(logp for piece in mine for logp in piece.logprobs) == pytest.approx(one.logprobs, abs=1e-4)
            assert mine[-1].stop_reason == one.stop_reason

    check()


def test_no_thread_stays_behind(shared: LocalBackend) -> None:
    sampler = shared.sampler("tiny")
    for turn in range(20):
        future = sampler.stream("hi", SamplingParams(max_tokens=30, seed=turn), lambda _: None)
        if turn % 2:
            future.cancel()
        else:
            future.result(WAIT_S)
    for thread in [one for one in threading.enumerate() if one.name == "crucible-stream"]:
        thread.join(WAIT_S)
        assert not thread.is_alive()
