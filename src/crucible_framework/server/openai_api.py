"""An OpenAI-compatible door to the same models: /v1/models, /v1/completions and /v1/chat/completions, whole or as server-sent events.

`model` is a base model's name, a `tinker://` path of a sampler's or a training checkpoint, or a version in the registry ("name", "name:2",
"name@production"). A streamed answer is sent token by token where the backend streams; with `echo`, or with the likeliest rivals of each token,
which a second look at the whole answer gives, it is sent when it is whole. A client that leaves ends the drawing. This file does not know
training.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal, cast

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from ..data.tokens import render_prompt
from ..errors import BackendError, CapabilityError, ConfigError, CrucibleError, DataError, NotFoundError, ServiceError
from ..protocols import Sampler, StreamSampler, Tokenizer
from ..records import Completion, Message, ModelVersion, Piece, SamplingParams
from ..store import Models
from .desk import Desk
from .http import Endpoint, body_of, json_response, parsed
from .ledger import JSON, Answer
from .looks import MASKED, Look, Tails
from .openai_choices import Choice, Head, at_once, chat_logprobs, parts, streamed, text_logprobs, while_here
from .sampling import shown
from .wire import TopK

__all__ = ["ChatRequest", "OpenAiApi", "TextRequest"]

KEPT = 16
"""Samplers that stay open."""


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool | None = None


class _Asked(BaseModel):
    model_config = ConfigDict(extra="ignore")

    model: str
    max_tokens: Annotated[int | None, Field(ge=1, le=2**20)] = None
    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    n: Annotated[int | None, Field(ge=1, le=128)] = None
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    def check(self) -> None:
        """Raises DataError where fields do not fit each other."""
        if self.stream_options is not None and not self.stream:
            raise DataError("stream_options is given without stream; expected stream to be true. Set it, or leave stream_options out.")

    @property
    def usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def params(self, longest: int, usual: int) -> SamplingParams:
        """As a sampler takes them."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=min(self.max_tokens or usual, longest),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            stop=tuple(text for text in stop if text),
            seed=None if self.seed is None else self.seed % 2**63,
        )


class TextRequest(_Asked):
    """A /v1/completions request."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int | None, Field(ge=0, le=5)] = None
    echo: bool | None = None
    suffix: str | None = None


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class _Turn(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part]


class ChatRequest(_Asked):
    """A /v1/chat/completions request."""

    messages: Annotated[list[_Turn], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=2**20)] = None


def _messages(turns: Sequence[_Turn]) -> tuple[Message, ...]:
    def text(content: str | list[_Part]) -> str:
        return content if isinstance(content, str) else "".join(part.text for part in content)

    return tuple(Message(role="system" if turn.role == "developer" else turn.role, content=text(turn.content)) for turn in turns)


class OpenAiApi:
    """One method per route.

    Args:
        desk: gives samplers, and takes the requests.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._open: OrderedDict[tuple[str, str], tuple[Sampler, str]] = OrderedDict()

    @property
    def routes(self) -> list[tuple[str, str, Endpoint]]:
        """(method, path, endpoint)."""
        return [
            ("GET", "/v1/models", self.models),
            ("POST", "/v1/completions", self.completions),
            ("POST", "/v1/chat/completions", self.chat),
        ]

    async def models(self, request: Request, tenant: str) -> Response:
        """The listed base models, and the tenant's checkpoints that can be sampled."""
        del request

        def read() -> list[dict[str, object]]:
            bases = [{"id": name, "object": "model", "created": 0, "owned_by": "base"} for name in self._desk.config.listed]
            registered = [] if self._desk.config.registry is None else Models(self._desk.config.registry).list()
            bases += [{"id": f"{one.name}:{one.version}", "object": "model", "created": int(one.created_at), "owned_by": "registry"} for one in registered]
            stored = [one for run in self._desk.shelf.runs(tenant) for one in self._desk.shelf.checkpoints(run.id) if one.kind != "external_weights"]
            return [*bases, *({"id": one.path, "object": "model", "created": int(one.created_at), "owned_by": tenant} for one in stored)]

        return json_response({"object": "list", "data": await asyncio.to_thread(read)})

    def _registered(self, reference: str) -> ModelVersion | None:
        """The registry's version of that name, where there is one."""
        if self._desk.config.registry is None or reference.startswith("tinker://"):
            return None
        try:
            return Models(self._desk.config.registry).get(reference)
        except (NotFoundError, ConfigError):
            return None

    async def _sampler(self, model: str, tenant: str) -> tuple[Sampler, Tokenizer]:
        """The model's sampler and tokenizer; the last few stay open."""
        version = await asyncio.to_thread(self._registered, model)
        path = model if model.startswith("tinker://") else None
        if version is not None:
            key = ("", f"{version.name}:{version.version}")
        else:  # a checkpoint is looked up each time: it may have been deleted, hidden or overwritten
            key = (tenant, model if path is None else f"{path} {(await asyncio.to_thread(self._desk.readable, path, tenant)).sha256}")
        if key not in self._open:
            if version is not None:
                base = version.checkpoint.base_model
                sampler: Sampler = await asyncio.to_thread(self._desk.backend.sampler, version.checkpoint)
            else:
                sampler, _, base = await self._desk.open_sampler(tenant, base_model=None if path else model, path=path)
            self._open[key] = sampler, base
            while len(self._open) > KEPT:
                self._open.popitem(last=False)
        self._open.move_to_end(key)
        sampler, base = self._open[key]
        return sampler, await asyncio.to_thread(self._desk.backend.tokenizer, base)

    async def _tops(self, sampler: Sampler, prompt: tuple[int, ...], found: Sequence[Completion], k: int, params: SamplingParams) -> list[TopK | None]:
        """The k likeliest tokens at each drawn token."""
        if not k:
            return [None] * len(found)
        tails = Tails(len(prompt), k, params.temperature, [len(one.tokens) for one in found])
        await shown(self._desk.backend, sampler, [(*prompt, *one.tokens[:-1]) for one in found], tails)
        return list(tails.tops)

    async def _drawn(self, tenant: str, draw: Callable[[], Future[tuple[Completion, ...]]]) -> tuple[Completion, ...]:
        """The completions that `draw` asks for, in the tenant's turn; cancelling it ends the drawing."""
        found, errors = list[tuple[Completion, ...]](), list[CrucibleError]()

        async def ask() -> Answer:
            try:
                found.append(await asyncio.wrap_future(draw()))
            except CrucibleError as error:
                errors.append(error)
                raise
            self._desk.count("tokens_total:sampled", tenant, sum(len(one.tokens) for one in found[0]))
            return Answer(b"", JSON)

        entry = self._desk.turns.once(tenant, "openai", ask)
        try:
            answer = await entry.answer
        except asyncio.CancelledError:
            entry.cancel()
            raise
        finally:
            self._desk.ledger.forget(entry)
        if errors:
            raise errors[0]
        if answer.failed:
            raise ServiceError("The request was dropped, because the server stops or failed inside; see its log.", status=503)
        return found[0]

    async def _pieces(
        self, tenant: str, sampler: StreamSampler, prompts: Sequence[tuple[int, ...]], params: SamplingParams, n: int
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of all prompts' answers as they come; the index counts all of them. Closing it ends the drawing."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Piece | asyncio.Task[tuple[Completion, ...]]]()

        def asked(place: int) -> Callable[[], Future[tuple[Completion, ...]]]:
            def told(piece: Piece) -> None:
                loop.call_soon_threadsafe(queue.put_nowait, replace(piece, index=place * n + piece.index))

            return lambda: sampler.stream(prompts[place], params, told, n)

        tasks = [asyncio.create_task(self._drawn(tenant, asked(place))) for place in range(len(prompts))]
        for task in tasks:
            task.add_done_callback(queue.put_nowait)
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if isinstance(item, Piece):
                    yield item
                else:
                    left -= 1
                    item.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------------------------------------------------------ text
    async def completions(self, request: Request, tenant: str) -> Response:
        """Continues texts."""
        asked = parsed(TextRequest, await body_of(request, self._desk.config.body_bytes))
        asked.check()
        if asked.suffix:
            raise CapabilityError("suffix is given; this server does not fill gaps. Leave it out.")
        sampler, tokenizer = await self._sampler(asked.model, tenant)
        prompts = _prompts(asked.prompt, tokenizer)
        params, n = asked.params(self._desk.config.max_tokens, 16), asked.n or 1
        head = Head(model=asked.model, chat=False, prompt_tokens=sum(map(len, prompts)), usage=asked.usage)
        if asked.stream and isinstance(sampler, StreamSampler) and not asked.echo and not asked.logprobs:
            pieces = self._pieces(tenant, sampler, prompts, params, n)
            return await streamed(request, head, parts(pieces, tokenizer, logprobs="text" if asked.logprobs is not None else None))
        drawing = asyncio.gather(*(self._drawn(tenant, partial(sampler.sample, ids, params, n)) for ids in prompts))
        choices, drawn = list[Choice](), 0
        for found, ids in zip(await while_here(request, drawing), prompts, strict=True):
            scores: tuple[float, ...] = ()
            look = Look(ids, first=1, top_k=(asked.logprobs or 0) if asked.echo else 0, alternatives=0, params=params, targets=None)
            if asked.echo and asked.logprobs is not None and len(ids) > 1:
                scores = await asyncio.wrap_future(sampler.compute_logprobs(ids[:1], ids[1:]))
                if look.wants:
                    await shown(self._desk.backend, sampler, [ids], look)
            tops = await self._tops(sampler, ids, found, asked.logprobs or 0, params)
            for one, top in zip(found, tops, strict=True):
                drawn += len(one.tokens)
                before = _named(look.top, tokenizer, len(ids)) if asked.echo else []
                rivals = [*before, *_named(top, tokenizer, len(one.tokens))]
                choices.append(_text_choice(len(choices), one, tokenizer, asked=asked, prompt=ids, scores=scores, rivals=rivals))
        return await streamed(request, head, at_once(choices, drawn)) if asked.stream else json_response(head.whole(choices, drawn))

    # ------------------------------------------------------------------------------------------------------------ chat
    async def chat(self, request: Request, tenant: str) -> Response:
        """Answers a conversation."""
        asked = parsed(ChatRequest, await body_of(request, self._desk.config.body_bytes))
        asked.check()
        if asked.top_logprobs and not asked.logprobs:
            raise DataError(f"top_logprobs is {asked.top_logprobs} without logprobs; expected logprobs to be true. Set it.")
        sampler, tokenizer = await self._sampler(asked.model, tenant)
        if tokenizer.chat_template is None:
            raise BackendError(f"The model {asked.model!r} has no chat template. Use /v1/completions.")
        ids = tuple(render_prompt(_messages(asked.messages), tokenizer))
        if asked.max_completion_tokens is not None:
            asked.max_tokens = asked.max_completion_tokens
        params = asked.params(self._desk.config.max_tokens, self._desk.config.max_tokens)
        n, head = asked.n or 1, Head(model=asked.model, chat=True, prompt_tokens=len(ids), usage=asked.usage)
        if asked.stream and isinstance(sampler, StreamSampler) and not asked.top_logprobs:
            return await streamed(request, head, parts(self._pieces(tenant, sampler, [ids], params, n), tokenizer, logprobs="chat" if asked.logprobs else None))
        found = await while_here(request, self._drawn(tenant, partial(sampler.sample, ids, params, n)))
        tops = await self._tops(sampler, ids, found, asked.top_logprobs or 0, params)
        choices = list[Choice]()
        for place, (one, top) in enumerate(zip(found, tops, strict=True)):
            scores = chat_logprobs(one.tokens, one.logprobs, _ranked(top, tokenizer, len(one.tokens)), tokenizer) if asked.logprobs else None
            choices.append(Choice(index=place, text=one.text, logprobs=scores, finish=one.stop_reason))
        drawn = sum(len(one.tokens) for one in found)
        return await streamed(request, head, at_once(choices, drawn)) if asked.stream else json_response(head.whole(choices, drawn))


def _prompts(given: str | list[int] | list[str] | list[list[int]], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Each prompt's tokens: texts are taken as they are, after the beginning-of-text token where the model has one, without a chat template."""

    def ids(one: str | Sequence[int]) -> tuple[int, ...]:
        if isinstance(one, str):
            start = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
            return (*start, *tokenizer.encode(one))
        return tuple(one)

    single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    found = [ids(one) for one in (cast("list[str | list[int]]", [given] if single else given))]
    if not found or not all(found) or len(found) > 256:
        raise DataError("prompt is empty or has more than 256 parts; expected 1 to 256 prompts with at least one token each.")
    return found


def _ranked(top: TopK | None, tokenizer: Tokenizer, count: int) -> list[list[tuple[str, float]]]:
    """Per position the texts and log-probs of its likeliest tokens; a masked row has none."""
    if top is None:
        return [[]] * count
    rows = zip(top.ids.tolist(), top.logprobs.tolist(), strict=True)
    return [[(tokenizer.decode([token]), value) for token, value in zip(ids, values, strict=True) if value > MASKED] for ids, values in rows]


def _named(top: TopK | None, tokenizer: Tokenizer, count: int) -> list[Mapping[str, float]]:
    """The same by text; the likelier of two tokens that read alike."""
    return [dict(reversed(row)) for row in _ranked(top, tokenizer, count)]


def _text_choice(
    index: int,
    one: Completion,
    tokenizer: Tokenizer,
    *,
    asked: TextRequest,
    prompt: tuple[int, ...],
    scores: tuple[float, ...],
    rivals: Sequence[Mapping[str, float]],
) -> Choice:
    text = (tokenizer.decode(prompt) if asked.echo else "") + one.text
    told = None
    if asked.logprobs is not None:
        ids = (*prompt, *one.tokens) if asked.echo else one.tokens
        values: list[float | None] = [*([None, *scores] if asked.echo else []), *one.logprobs]
        told = text_logprobs(ids, values, rivals, tokenizer)
    return Choice(index=index, text=text, logprobs=told, finish=one.stop_reason)
