"""Choices of OpenAI's answers: whole, or as server-sent events while they are drawn. Knows no backends and no tenants."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import field
from typing import Literal, TypeVar

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ..protocols import Tokenizer
from ..records import Piece, record
from .http import error_object

__all__ = ["Choice", "Head", "at_once", "chat_logprobs", "parts", "streamed", "text_logprobs", "while_here"]

T = TypeVar("T")


@record
class Choice:
    """A choice, or what is new of it: `drawn` counts its tokens, `finish` is None where it goes on."""

    index: int
    text: str
    logprobs: Mapping[str, object] | None = None
    finish: Literal["stop", "length"] | None = None
    drawn: int = 0


@record
class Head:
    """What all choices of an answer share. `usage`: a stream's last event counts tokens."""

    model: str
    chat: bool
    prompt_tokens: int
    usage: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice], drawn: int) -> dict[str, object]:
        """The answer as one object."""
        return self._object(stream=False) | {"choices": [self._whole(one) for one in choices], "usage": self.counts(drawn)}

    def chunk(self, *choices: Mapping[str, object], drawn: int | None = None) -> bytes:
        """One event of a stream; with `drawn` the one that counts."""
        usage = {"usage": None if drawn is None else self.counts(drawn)} if self.usage else {}
        return event(self._object(stream=True) | {"choices": choices} | usage)

    def counts(self, drawn: int) -> dict[str, int]:
        """The tokens of prompts and answers."""
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": drawn, "total_tokens": self.prompt_tokens + drawn}

    def _object(self, *, stream: bool) -> dict[str, object]:
        kind = f"chat.completion{'.chunk' if stream else ''}" if self.chat else "text_completion"
        return {"id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def _whole(self, one: Choice) -> dict[str, object]:
        said: dict[str, object] = {"message": {"role": "assistant", "content": one.text}} if self.chat else {"text": one.text}
        return {"index": one.index, **said, "finish_reason": one.finish, "logprobs": one.logprobs}


def event(value: object) -> bytes:
    """A server-sent event."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


def chat_logprobs(tokens: Sequence[int], values: Sequence[float], rivals: Sequence[Sequence[tuple[str, float]]], tokenizer: Tokenizer) -> dict[str, object]:
    """The log-probs of tokens, each with its rivals, as chats have them."""

    def told(text: str, value: float) -> dict[str, object]:
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    content = [
        {**told(tokenizer.decode([token]), value), "top_logprobs": [told(*other) for other in others]}
        for token, value, others in zip(tokens, values, rivals, strict=True)
    ]
    return {"content": content, "refusal": None}


def text_logprobs(
    ids: Sequence[int], values: Sequence[float | None], rivals: Sequence[Mapping[str, float]], tokenizer: Tokenizer, start: int = 0
) -> dict[str, object]:
    """The same as texts have them; `start` characters stand before the first token."""
    tokens = [tokenizer.decode([token]) for token in ids]
    offsets = [start + sum(map(len, tokens[:place])) for place in range(len(tokens))]
    tops = [None if value is None else {**others, token: value} for token, value, others in zip(tokens, values, rivals, strict=True)]
    return {"tokens": tokens, "token_logprobs": list(values), "top_logprobs": tops, "text_offset": offsets}


async def parts(pieces: AsyncGenerator[Piece, None], tokenizer: Tokenizer, *, logprobs: Literal["text", "chat"] | None) -> AsyncGenerator[Choice, None]:
    """Pieces as parts of choices."""
    offsets: dict[int, int] = {}
    async with aclosing(pieces):
        async for piece in pieces:
            told: dict[str, object] | None = None
            if logprobs == "chat":
                told = chat_logprobs(piece.tokens, piece.logprobs, [()] * len(piece.tokens), tokenizer)
            elif logprobs == "text":
                start = offsets.get(piece.index, 0)
                told = text_logprobs(piece.tokens, piece.logprobs, [{}] * len(piece.tokens), tokenizer, start)
                offsets[piece.index] = start + sum(len(tokenizer.decode([token])) for token in piece.tokens)
            yield Choice(index=piece.index, text=piece.text, logprobs=told, finish=piece.stop_reason, drawn=len(piece.tokens))


async def at_once(choices: Sequence[Choice], drawn: int) -> AsyncGenerator[Choice, None]:
    """Whole choices as parts; the first counts the tokens of all."""
    for place, one in enumerate(choices):
        yield Choice(index=one.index, text=one.text, logprobs=one.logprobs, finish=one.finish, drawn=0 if place else drawn)


async def while_here(request: Request, work: Awaitable[T]) -> T:
    """The work's result; where the client leaves before it is done, it is cancelled.

    Raises:
        ClientDisconnect: the client left.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for one in (working, leaving):
            one.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def streamed(request: Request, head: Head, choices: AsyncGenerator[Choice, None]) -> Response:
    """Parts of choices as server-sent events. What goes wrong before the first is an answer with a status; later it is an event."""
    return _Events(_lines(head, await while_here(request, anext(choices)), choices))


class _Events(StreamingResponse):
    """Ends what it is made of however it ends itself."""

    def __init__(self, lines: AsyncGenerator[bytes, None]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._lines.aclose()


async def _lines(head: Head, first: Choice, choices: AsyncGenerator[Choice, None]) -> AsyncGenerator[bytes, None]:
    begun, drawn, one = set[int](), 0, first
    async with aclosing(choices):
        try:
            while True:
                drawn += one.drawn
                role = {"role": "assistant"} if head.chat and one.index not in begun else {}
                begun.add(one.index)
                if one.text or one.logprobs is not None or role:
                    said: dict[str, object] = {"delta": {**role, "content": one.text}} if head.chat else {"text": one.text}
                    yield head.chunk({"index": one.index, **said, "logprobs": one.logprobs, "finish_reason": None})
                if one.finish is not None:
                    last: dict[str, object] = {"delta": {}} if head.chat else {"text": ""}
                    yield head.chunk({"index": one.index, **last, "logprobs": None, "finish_reason": one.finish})
                one = await anext(choices)
        except StopAsyncIteration:
            if head.usage:
                yield head.chunk(drawn=drawn)
            yield b"data: [DONE]\n\n"
        except Exception as error:
            yield event({"error": error_object(error)})
