"""Answers told while they are drawn, and hedging on the first token."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import pytest

from crucible_framework.backends import connect
from crucible_framework.data import ByteTokenizer
from crucible_framework.errors import AllMembersFailedError, BackendError, CapabilityError, ConfigError
from crucible_framework.inference import Fixed, HedgedSampler, Member, Never, Pool, Price, Streamed
from crucible_framework.protocols import Backend, Sampler
from crucible_framework.records import Completion, Piece, Prompt, SamplingParams
from crucible_framework.testing import VirtualClock

from .simulated import Ready, Talking

PARAMS = SamplingParams(max_tokens=8)
BROKEN = BackendError("the leg broke")


class Heard:
    """Keeps the pieces and when they came."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock, self.pieces = clock, list[tuple[float, str]]()

    def __call__(self, piece: Piece) -> None:
        assert piece.tokens
        self.pieces.append((self.clock.now(), piece.text))


def test_the_first_token_decides_and_its_leg_gives_the_whole_answer() -> None:
    clock = VirtualClock()
    slow, quick = Talking(clock, first_s=(5.0,), word="slow"), Talking(clock, first_s=(0.1,), word="quick", each_s=1.0)
    sampler = HedgedSampler([slow, quick], Fixed(0.2), budget=1.0, clock=clock)
    heard = Heard(clock)
    future = sampler.stream("?", SamplingParams(max_tokens=3), heard)
    clock.advance(0.31)
    assert [at for at, _ in heard.pieces] == pytest.approx([0.3])
    assert not future.done()
    assert slow.given_up == 1
    clock.advance(10.0)  # longer than the slow leg would have needed: the quick one goes on and is not hedged again
    assert future.result(0)[0].text == "quick quick quick "
    assert "".join(text for _, text in heard.pieces) == future.result(0)[0].text
    stats = sampler.stats
    assert (stats.calls, stats.wins, stats.cancelled, stats.drawn, stats.wasted_drawn, stats.in_flight) == (2, 1, 1, 3, 0, 0)
    assert clock.pending == 0


def test_a_long_answer_is_not_a_slow_one() -> None:
    clock = VirtualClock()
    long = Talking(clock, first_s=(0.1,), each_s=1.0)
    by_token = HedgedSampler([long, long], Fixed(0.5), budget=1.0, first_token=True, clock=clock)
    by_answer = HedgedSampler([long, long], Fixed(0.5), budget=1.0, clock=clock)
    for sampler in (by_token, by_answer):
        future = sampler.sample("?", SamplingParams(max_tokens=5))
        clock.advance(20.0)
        assert future.result(0)[0].text == "w " * 5
    assert (by_token.stats.fired, by_answer.stats.fired) == (0, 1)


def test_a_loser_that_does_not_stop_is_booked_as_waste() -> None:
    clock = VirtualClock()
    deaf, quick = Talking(clock, first_s=(1.0,), stops=False), Talking(clock, first_s=(0.1,))
    price = Price(input_per_million=0.0, output_per_million=1e6)
    pool = Pool([Member(name="deaf", sampler=deaf, price=price), Member(name="quick", sampler=quick, price=price)])
    sampler = HedgedSampler(pool, Fixed(0.2), budget=1.0, clock=clock)
    heard = Heard(clock)
    future = sampler.stream("?", SamplingParams(max_tokens=4), heard)
    clock.advance(10.0)
    assert len(heard.pieces) == 4
    assert future.result(0)[0].text == "w " * 4
    stats = sampler.stats
    assert (stats.drawn, stats.wasted_drawn, stats.in_flight) == (8, 4, 0)
    assert (stats.cost, stats.wasted_cost) == (8.0, 4.0)
    assert stats.cost_at_most == 8.0


def test_failures_before_the_first_token_are_rescued_and_after_it_are_given() -> None:
    clock = VirtualClock()
    for broken_after, texts in ((0, ["w "] * 3), (2, ["w "] * 2)):
        first = Talking(clock, first_s=(0.1,), fails_after=broken_after)
        sampler = HedgedSampler([first, Talking(clock, first_s=(0.1,))], Fixed(9.0), budget=1.0, clock=clock)
        heard = Heard(clock)
        future = sampler.stream("?", SamplingParams(max_tokens=3), heard)
        clock.advance(5.0)
        assert [text for _, text in heard.pieces] == texts
        if broken_after:
            with pytest.raises(BackendError, match="broke off"):
                future.result(0)
            assert (sampler.stats.calls, sampler.stats.wasted_drawn) == (1, 2)
        else:
            assert future.result(0)[0].text == "w w w "
            assert sampler.stats.rescued == 1
    both = [Talking(clock, first_s=(0.1,), fails_after=0) for _ in range(2)]
    future = HedgedSampler(both, Fixed(9.0), budget=1.0, clock=clock).stream("?", PARAMS, Heard(clock))
    clock.advance(1.0)
    with pytest.raises(AllMembersFailedError):
        future.result(0)


@pytest.mark.parametrize("after_s", [0.05, 0.25, 1.5])
def test_cancelling_a_stream_ends_every_leg(after_s: float) -> None:
    clock = VirtualClock()
    legs = [Talking(clock, first_s=(1.0,)), Talking(clock, first_s=(1.0,))]
    sampler = HedgedSampler(legs, Fixed(0.1), budget=1.0, clock=clock)
    heard = Heard(clock)
    future = sampler.stream("?", PARAMS, heard)
    clock.advance(after_s)
    told = len(heard.pieces)
    assert future.cancel()
    clock.advance(30.0)
    assert (len(heard.pieces), sampler.stats.in_flight, clock.pending) == (told, 0, 0)
    assert sampler.stats.wasted_drawn == sampler.stats.drawn == told


def test_a_listener_that_raises_fails_the_answer_and_ends_the_drawing() -> None:
    clock = VirtualClock()
    leg = Talking(clock, first_s=(0.1,))

    def listener(piece: Piece) -> None:
        raise ValueError("mine")

    future = HedgedSampler(leg, Never(), clock=clock).stream("?", PARAMS, listener)
    clock.advance(5.0)
    with pytest.raises(ValueError, match="mine"):
        future.result(0)
    assert leg.given_up == 1


def test_what_cannot_stream_says_so() -> None:
    with pytest.raises(CapabilityError, match="ready cannot stream"):
        HedgedSampler(Ready("a")).stream("?", PARAMS, lambda piece: None)
    with pytest.raises(CapabilityError):
        HedgedSampler(Ready("a"), first_token=True)
    leg = Talking(VirtualClock())
    with pytest.raises(ConfigError, match="accept and first_token"):
        HedgedSampler(leg, first_token=True, accept=lambda answer: True)
    with pytest.raises(ConfigError, match="every=0"):
        Streamed(Ready("a"), ByteTokenizer(), every=0)


def test_the_tail_of_the_first_token_falls_by_seventy_percent() -> None:
    """Where fewer start late than the budget can mend; the knife edge of 5 % is in `benchmarks/inference.py`."""
    rng, n, warm = np.random.default_rng(1), 5000, 1500
    clock = VirtualClock()
    firsts = [0.2 * rng.lognormal(0, 0.15, n) * np.where(rng.random(n) < 0.04, 10, 1) for _ in range(2)]
    legs = [Talking(clock, first_s=times.tolist(), each_s=0.02) for times in firsts]
    sampler = HedgedSampler(legs, budget=0.05, clock=clock)
    seen = np.zeros(n)

    def ask(i: int) -> None:
        began_s = clock.now()

        def told(piece: Piece) -> None:
            seen[i] = seen[i] or clock.now() - began_s

        sampler.stream("?", SamplingParams(max_tokens=10), told)
        if i + 1 < n:
            clock.call_later(0.5, lambda: ask(i + 1))

    ask(0)
    clock.advance(0.5 * n + 100)
    stats = sampler.stats
    assert 1 - np.quantile(seen[warm:], 0.99) / np.quantile(firsts[0][warm:], 0.99) >= 0.70
    assert stats.extra <= 0.05
    assert stats.wasted_drawn <= 0.005 * stats.drawn


# ------------------------------------------------------------------------------------------------- any sampler in pieces
@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with connect("local") as engine:
        yield engine


def pieces(sampler: Sampler, backend: Backend, prompt: Prompt, params: SamplingParams, every: int) -> tuple[list[str], Completion]:
    texts: list[str] = []
    done = Streamed(sampler, backend.tokenizer("tiny"), every=every).stream(prompt, params, lambda piece: texts.append(piece.text)).result(60)[0]
    return texts, done


@pytest.mark.parametrize("every", [1, 3, 50])
def test_pieces_make_the_answer_of_one_request(backend: Backend, every: int) -> None:
    sampler = backend.sampler("tiny")
    params = SamplingParams(max_tokens=12, temperature=0.0)
    (whole,) = sampler.sample("Say a word.", params).result(60)
    texts, done = pieces(sampler, backend, "Say a word.", params, every)
    assert (done.tokens, done.text, done.stop_reason, done.prompt_tokens) == (whole.tokens, whole.text, whole.stop_reason, whole.prompt_tokens)
    assert done.logprobs == pytest.approx(whole.logprobs, abs=1e-4)
    assert "".join(texts) == whole.text
    assert len(texts) == 1 + -(-(len(done.tokens) - 1) // every)


class Script:
    """Draws the bytes of a text, then ends."""

    model = "script"

    def __init__(self, text: str, ended: bool = True) -> None:
        self.ids, self.ended, self.prompt = tuple(ByteTokenizer().encode(text)), ended, 0

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        assert isinstance(prompt, tuple)
        self.prompt = self.prompt or len(prompt)
        at = len(prompt) - self.prompt
        tokens = self.ids[at : at + params.max_tokens]
        stop = self.ended and at + params.max_tokens > len(self.ids)
        tokens = (*tokens, ByteTokenizer().eos_ids[0]) if stop else tokens
        future: Future[tuple[Completion, ...]] = Future()
        text = ByteTokenizer().decode(tokens[:-1] if stop else tokens)
        future.set_result((Completion(text=text, tokens=tokens, logprobs=(-0.1,) * len(tokens), stop_reason="stop" if stop else "length", prompt_tokens=at),))
        return future

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        raise NotImplementedError


@pytest.mark.parametrize("every", [1, 2, 3, 7])
@pytest.mark.parametrize(("written", "stop", "said"), [("one two END three", ("END",), "one two "), ("héllo ☃ wörld", (), "héllo ☃ wörld"),
                                                       ("EN EN END", ("END",), "EN EN "), ("aab", ("ab",), "a"), ("EN", ("END",), "EN")])  # fmt: skip
def test_stops_and_characters_across_pieces(written: str, stop: tuple[str, ...], said: str, every: int) -> None:
    texts: list[str] = []
    done = Streamed(Script(written), ByteTokenizer(), every=every).stream("?", SamplingParams(max_tokens=64, stop=stop), lambda piece: texts.append(piece.text))
    assert done.result(0)[0].text == said == "".join(texts)
    assert done.result(0)[0].stop_reason == "stop"
    assert "\ufffd" not in "".join(texts)


def test_a_stream_of_pieces_fails_and_is_cancelled() -> None:
    failing = Streamed(Ready(BROKEN), ByteTokenizer()).stream("?", PARAMS, lambda piece: None)
    with pytest.raises(BackendError):
        failing.result(0)
    waiting: list[Future[tuple[Completion, ...]]] = []

    class Waiting(Script):
        def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
            waiting.append(Future())
            return waiting[-1]

    streaming = Streamed(Waiting("abc"), ByteTokenizer()).stream("?", PARAMS, lambda piece: None)
    assert streaming.cancel()
    assert waiting[0].cancelled()
