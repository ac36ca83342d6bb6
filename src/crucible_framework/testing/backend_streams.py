"""Streams: what is told piece by piece is what `sample` gives, readers wait for nobody and nobody waits for them."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from .. import events
from ..errors import CrucibleError
from ..protocols import Sampler, StreamSampler
from ..records import Completion, Piece, SamplingParams
from .backend_parts import WAIT_S, done

__all__ = ["StreamContract"]

PROMPT = "Say a word."
SEEDED = SamplingParams(max_tokens=12, seed=7, temperature=1.5)


class _Slow:
    """A reader that stays with its first piece until it is let go."""

    def __init__(self) -> None:
        self.pieces, self.began, self.free = list[Piece](), threading.Event(), threading.Event()

    def __call__(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.began.set()
        assert self.free.wait(WAIT_S)


def _same(pieces: list[Piece], whole: tuple[Completion, ...]) -> None:
    """The pieces of each sample make it, and its last one alone says why it ended."""
    assert {piece.index for piece in pieces} == set(range(len(whole)))
    for index, one in enumerate(whole):
        mine = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in mine) == one.text
        assert tuple(token for piece in mine for token in piece.tokens) == one.tokens
        assert tuple(logp for piece in mine for logp in piece.logprobs) == one.logprobs
        assert [piece.stop_reason for piece in mine] == [*[None] * (len(mine) - 1), one.stop_reason]


class StreamContract:
    """What a sampler with `stream` tells; for one without it the tests are skipped. Override the fixture `sampler`."""

    @pytest.fixture
    def stream(self, sampler: Sampler) -> StreamSampler:
        """The sampler, where it streams."""
        if not isinstance(sampler, StreamSampler):
            pytest.skip(f"{sampler.model} does not stream")
        return sampler

    @pytest.mark.parametrize("n", [1, 3])
    def test_pieces_make_what_sample_gives(self, stream: StreamSampler, n: int) -> None:
        """For the same seed: text, tokens, log-probs and reason, in more than one piece; all are told when the future resolves."""
        pieces = list[Piece]()
        whole = done(stream.stream(PROMPT, SEEDED, pieces.append, n))
        _same(list(pieces), whole)
        assert len(pieces) > n
        sampled_whole = done(stream.sample(PROMPT, SEEDED, n))
        for streamed, sampled in zip(whole, sampled_whole, strict=True):
            assert (streamed.tokens, streamed.text, streamed.stop_reason) == (sampled.tokens, sampled.text, sampled.stop_reason)
            assert streamed.prompt_tokens == sampled.prompt_tokens

    def test_a_stop_is_never_told(self, stream: StreamSampler) -> None:
        """Not its beginning either, wherever in the text it stands."""
        text = done(stream.sample(PROMPT, replace(SEEDED, max_tokens=40)))[0].text
        stops = [text[at : at + size] for size in (1, 2, 3) for at in range(0, max(1, len(text) - 3), 5) if "\ufffd" not in text[at : at + size]]
        assert stops, "the model writes something"
        for stop in stops:
            pieces = list[Piece]()
            whole = done(stream.stream(PROMPT, replace(SEEDED, max_tokens=40, stop=(stop,)), pieces.append))
            _same(pieces, whole)
            assert whole[0].stop_reason == "stop"
            assert whole[0].text == text[: text.index(stop)]

    def test_a_slow_reader_holds_up_nobody(self, stream: StreamSampler) -> None:
        """Other requests are answered, and other streams told, while one reader does not read; it misses nothing."""
        slow, quick = _Slow(), list[Piece]()
        late = stream.stream(PROMPT, SEEDED, slow)
        try:
            assert slow.began.wait(WAIT_S)
            _same(quick, done(stream.stream(PROMPT, SEEDED, quick.append)))
            assert done(stream.sample(PROMPT, SEEDED))
            assert len(slow.pieces) == 1
            assert not late.done()
        finally:
            slow.free.set()
        _same(slow.pieces, done(late))

    def test_cancelling_ends_the_pieces(self, stream: StreamSampler) -> None:
        """Also in the middle; what comes after is served."""
        slow = _Slow()
        given_up = stream.stream(PROMPT, replace(SEEDED, max_tokens=500), slow)
        try:
            assert slow.began.wait(WAIT_S)
            assert given_up.cancel()
        finally:
            slow.free.set()
        quick = list[Piece]()
        _same(quick, done(stream.stream(PROMPT, SEEDED, quick.append)))
        assert len(slow.pieces) == 1
        assert given_up.cancelled()

    def test_a_reader_that_raises_fails_its_stream(self, stream: StreamSampler) -> None:
        """Alone."""

        def broken(piece: Piece) -> None:
            raise LookupError(f"no place for {piece.tokens}")

        failing = stream.stream(PROMPT, SEEDED, broken, 2)
        with pytest.raises(LookupError, match="no place"):
            done(failing)
        assert done(stream.sample(PROMPT, SEEDED))

    def test_wrong_requests_of_streams(self, stream: StreamSampler) -> None:
        """As those of samples."""
        pieces = list[Piece]()
        with pytest.raises(CrucibleError):
            done(stream.stream("", SEEDED, pieces.append))
        with pytest.raises(CrucibleError):
            done(stream.stream((10**8,), SEEDED, pieces.append))
        with pytest.raises(CrucibleError):
            done(stream.stream(PROMPT, SEEDED, pieces.append, 0))
        assert not pieces

    def test_a_stream_emits_the_event_of_a_sample(self, stream: StreamSampler) -> None:
        """In the run of who asked, where the reader is called too."""
        runs = list[str]()
        with events.collect() as seen, events.in_run("streamed"):
            whole = done(stream.stream(PROMPT, SEEDED, lambda _: runs.append(events.current_run()), 2))
        (event,) = [event for event in seen if event["name"] == "inference.sample"]
        assert (event["run"], event["n"]) == ("streamed", 2)
        assert event["completion_tokens"] == sum(len(one.tokens) for one in whole)
        assert set(runs) == {"streamed"}
