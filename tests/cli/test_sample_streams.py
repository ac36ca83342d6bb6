"""`crucible sample` tells tokens as they come on a terminal, and whole documents elsewhere."""

from __future__ import annotations

import io
import json
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from rich.control import strip_control_codes

from crucible_framework.backends import fake
from crucible_framework.cli import run
from crucible_framework.cli.live import ask_aloud
from crucible_framework.records import SamplingParams

ASK = ["sample", "tiny", "Hello", "--backend", "fake", "--max-tokens", "30", "--seed", "3"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CRUCIBLE_RUNS", str(tmp_path / "runs"))


def said(monkeypatch: pytest.MonkeyPatch, out: io.StringIO, *words: str) -> str:
    monkeypatch.setattr("sys.stdout", out)
    assert run([*ASK, *words]) == 0
    return out.getvalue()


@pytest.mark.parametrize("more", [[], ["-n", "3"]])
def test_streamed_and_whole_say_the_same(monkeypatch: pytest.MonkeyPatch, more: list[str]) -> None:
    whole = said(monkeypatch, io.StringIO(), *more)
    assert whole.strip()
    assert whole.count("\n---\n") == max(0, len(more) and 2)
    for out, words in ((io.StringIO(), ["--stream"]), (Terminal(), []), (Terminal(), ["--no-stream"])):
        assert said(monkeypatch, out, *more, *words) == whole


def test_hedged_and_routed_answers_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = said(monkeypatch, io.StringIO(), "--hedge", "--route", "fake", "--router", "round_robin")
    told = said(monkeypatch, io.StringIO(), "--hedge", "--route", "fake", "--router", "round_robin", "--stream")
    assert "0 sent again" in told
    assert told.split() == whole.split()


def test_json_is_one_document(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert run([*ASK, "--stream", "--json"]) == 0
    (answer,) = json.loads(capfdbinary.readouterr().out)
    assert len(answer["tokens"]) <= 30


def test_a_token_is_written_before_the_next_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    written, number, real = threading.Semaphore(0), [0], fake._draw

    class Watched(io.StringIO):
        def flush(self) -> None:
            written.release()

    def draw(*given: Any) -> tuple[int, float]:
        number[0] += 1
        assert number[0] == 1 or written.acquire(timeout=60), "the token before was not written"
        return real(*given)

    monkeypatch.setattr(fake, "_draw", draw)
    with fake.FakeBackend() as backend:
        out = Watched()
        (one,) = ask_aloud(backend.sampler("tiny"), "Hello", SamplingParams(max_tokens=8, seed=1), out=out)
    assert out.getvalue() == f"{strip_control_codes(one.text)}\n"
    assert number[0] == len(one.tokens)


def test_an_interruption_ends_the_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    future: Any = Future()

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    future.result = interrupted
    with fake.FakeBackend() as backend:
        sampler = backend.sampler("tiny")
        monkeypatch.setattr(sampler, "sample", lambda *_: future)
        with pytest.raises(KeyboardInterrupt):
            ask_aloud(sampler, "Hello", SamplingParams(), out=None)
    assert future.cancelled()
