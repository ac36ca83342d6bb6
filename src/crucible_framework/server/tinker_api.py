"""The Tinker protocol's routes for sessions, training and sampling. This file knows no files and no keys."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, cast

import orjson
from starlette.requests import Request
from starlette.responses import Response

from ..errors import ConfigError, DataError, FormatError
from .desk import Desk, Model, SamplerCard, json_answer
from .hosts import is_loopback
from .http import Endpoint, body_of, json_response, parsed
from .ledger import PROTO, Answer, Entry
from .passes import adam_config, start_pass
from .sampling import sample
from .shelf import Kind, Stored

if TYPE_CHECKING:
    from tinker import types

__all__ = ["TinkerApi"]

STEPS = "optimizer_steps"
"""Not "step": clients write these metrics into rows of their own, which have a "step" that counts otherwise."""


class TinkerApi:
    """One method per route.

    Args:
        desk: does the work.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    @property
    def routes(self) -> dict[str, Endpoint]:
        """POST routes below /api/v1."""
        return {
            "client/config": self.client_config,
            "client/dynamic_config": self.dynamic_config,
            "create_session": self.create_session,
            "session_heartbeat": self.heartbeat,
            "create_model": self.create_model,
            "get_info": self.get_info,
            "forward_backward": self.forward_backward,
            "optim_step": self.optim_step,
            "save_weights": partial(self.save, kind="weights"),
            "save_weights_for_sampler": self.save_for_sampler,
            "save_weights_external": partial(self.save, kind="external_weights"),
            "load_weights": self.load_weights,
            "create_sampling_session": self.create_sampling_session,
            "join_sampling_session": self.join_sampling_session,
            "asample": self.asample,
            "retrieve_future": self.retrieve_future,
            "cancel_future": self.cancel_future,
            "create_custom_loss": self.create_custom_loss,
            "telemetry": self.telemetry,
        }

    async def _body(self, request: Request) -> bytes:
        return await body_of(request, self._desk.config.body_bytes)

    # -------------------------------------------------------------------------------------------------------- sessions
    async def client_config(self, request: Request, tenant: str) -> Response:
        """What the SDK switches on: clones of a sampler ask for their number; nothing else beyond its defaults."""
        del tenant
        await self._body(request)
        response = json_response({"sample_join_sampling_session": True, "fwdbwd_max_chunk_bytes_count": min(5_000_000, self._desk.config.body_bytes // 4)})
        response.headers["Connection"] = "close"  # the SDK asks this once, on a connection that it then forgets
        return response

    async def dynamic_config(self, request: Request, tenant: str) -> Response:
        """Cancelling samples is possible."""
        del tenant
        await self._body(request)
        return json_response({"refresh_interval_sec": 300, "sample_cancel_enabled": True, "sample_cancel_max_batch_size": 64})

    async def create_session(self, request: Request, tenant: str) -> Response:
        """A new client."""
        from tinker import types

        asked = parsed(types.CreateSessionRequest, await self._body(request))
        metadata = {str(key): str(value) for key, value in (asked.user_metadata or {}).items()}
        session = self._desk.open(tenant, metadata or None, asked.display_name)
        return json_response({"type": "create_session", "session_id": session.id})

    async def heartbeat(self, request: Request, tenant: str) -> Response:
        """The client is alive."""
        from tinker import types

        self._desk.session(parsed(types.SessionHeartbeatRequest, await self._body(request)).session_id, tenant)
        return json_response({"type": "session_heartbeat"})

    async def finish_session(self, request: Request, tenant: str) -> Response:
        """The client is done; a second call does nothing."""
        await self._body(request)
        session = self._desk.sessions.get(request.path_params["session"])
        if session is not None and session.owner == tenant:
            self._desk.end(session, "finished")
        return Response(status_code=204)

    async def telemetry(self, request: Request, tenant: str) -> Response:
        """Taken and thrown away."""
        del tenant
        await self._body(request)
        return json_response({"status": "accepted"})

    # -------------------------------------------------------------------------------------------------------- training
    async def create_model(self, request: Request, tenant: str) -> Response:
        """A fresh adapter."""
        from tinker import types

        asked = parsed(types.CreateModelRequest, await self._body(request))
        return _future(self._desk.create(self._desk.session(asked.session_id, tenant), asked))

    async def load_weights(self, request: Request, tenant: str) -> Response:
        """A checkpoint into a model, or into a new one."""
        from tinker import types

        return _future(self._desk.load(tenant, parsed(types.LoadWeightsRequest, await self._body(request))))

    async def get_info(self, request: Request, tenant: str) -> Response:
        """What a model is."""
        from tinker import types

        model = self._desk.model(parsed(types.GetInfoRequest, await self._body(request)).model_id, tenant)
        run = model.run
        near = request.client is not None and is_loopback(request.client.host)
        data = {"arch": "lora", "model_name": run.base_model, "tokenizer_id": await self._desk.tokenizer_id(run.base_model, near=near)}
        fields: dict[str, object] = {"type": "get_info", "model_id": run.id, "model_name": run.base_model, "is_lora": True, "lora_rank": run.lora.rank}
        return json_response(fields | {"model_data": data, "optimizer_config": {"type": "adamw"}})

    async def forward_backward(self, request: Request, tenant: str) -> Response:
        """A pass, in protobuf."""
        from google.protobuf.message import DecodeError
        from tinker.proto import tinker_public_pb2 as pb

        raw = await self._body(request)
        message = pb.ForwardBackwardRequest()
        try:
            await asyncio.to_thread(message.ParseFromString, raw)
        except DecodeError as error:
            raise FormatError(f"The body is no ForwardBackwardRequest in protobuf: {error}. SDK 0.38.0 sends one.") from error
        model = self._desk.model(message.model_id, tenant)

        async def begin() -> Awaitable[Answer]:
            return _proto(await start_pass(model.live, message))

        self._desk.count("tokens_total:trained", sum(len(chunk.encoded_text.tokens) // 4 for datum in message.data for chunk in datum.model_input))
        return _future(self._desk.submit(model, message.seq_id, "forward" if message.forward_only else "forward_backward", begin))

    async def optim_step(self, request: Request, tenant: str) -> Response:
        """One step of the optimizer."""
        from tinker import types

        asked = parsed(types.OptimStepRequest, await self._body(request))
        model = self._desk.model(asked.model_id, tenant)

        async def begin() -> Awaitable[Answer]:
            given = asked.optim_params
            if not isinstance(given, types.AdamParams):
                raise ConfigError("optim_step asks for another optimizer than AdamW, which is the only one here. Use types.AdamParams.")
            fields = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm")
            future = model.live.optim_step(adam_config(**{name: getattr(given, name) for name in fields}))

            async def finish() -> Answer:
                made = await asyncio.wrap_future(future)
                self._desk.count("steps_total")
                return json_answer(type="optim_step", metrics={"grad_norm": made.grad_norm, STEPS: float(made.step), **made.metrics})

            return finish()

        return _future(self._desk.submit(model, _seq(asked.seq_id), "optim_step", begin))

    # ----------------------------------------------------------------------------------------------------- checkpoints
    def _saving(
        self, model: Model, kind: Kind, name: str, *, ttl_s: float | None, metadata: dict[str, str] | None, overwrite: bool
    ) -> Callable[[], Awaitable[Awaitable[Stored]]]:
        async def begin() -> Awaitable[Stored]:
            await asyncio.to_thread(self._desk.shelf.check_free, model.run.id, kind, name, overwrite=overwrite)
            if ttl_s is not None and ttl_s <= 0:
                raise DataError(f"ttl_seconds is {ttl_s}; expected a positive number of seconds, or none.")
            future = model.live.save(name, "state" if kind == "weights" else "sampler")

            async def finish() -> Stored:
                made = await asyncio.wrap_future(future)
                self._desk.count("checkpoints_total")
                return await asyncio.to_thread(self._desk.keeper.put, model.run, kind, name, made, ttl_s=ttl_s, user_metadata=metadata, overwrite=overwrite)

            return finish()

        return begin

    async def save(self, request: Request, tenant: str, *, kind: Kind) -> Response:
        """A checkpoint to train on from, or the adapter's files."""
        from tinker import types

        raw = await self._body(request)
        asked = parsed(types.SaveWeightsRequest, raw) if kind == "weights" else parsed(types.SaveWeightsExternalRequest, raw)
        model, seq = self._desk.model(asked.model_id, tenant), _seq(asked.seq_id)
        name = asked.path or f"checkpoint-{seq:06}"
        if getattr(asked, "age_encryption_recipients", None):
            raise ConfigError("age_encryption_recipients is given; this server writes files as they are. Leave it out.")
        saving = self._saving(
            model, kind, name, ttl_s=asked.ttl_seconds, metadata=getattr(asked, "user_metadata", None), overwrite=bool(getattr(asked, "overwrite", False))
        )

        async def begin() -> Awaitable[Answer]:
            work = await saving()

            async def finish() -> Answer:
                stored = await work
                return json_answer(type="save_weights" if kind == "weights" else "save_weights_external", path=stored.path, size_bytes=stored.size_bytes)

            return finish()

        return _future(self._desk.submit(model, seq, f"save_{kind}", begin))

    async def save_for_sampler(self, request: Request, tenant: str) -> Response:
        """Weights to sample from: a checkpoint with a name, or a sampler that lives as long as its session."""
        from tinker import types

        asked = parsed(types.SaveWeightsForSamplerRequest, await self._body(request))
        model, seq = self._desk.model(asked.model_id, tenant), _seq(asked.seq_id)
        number = asked.sampling_session_seq_id
        saving = None
        if asked.path is not None:
            saving = self._saving(model, "sampler_weights", asked.path, ttl_s=asked.ttl_seconds, metadata=asked.user_metadata, overwrite=False)
        elif number is None:
            raise DataError("save_weights_for_sampler has neither path nor sampling_session_seq_id; expected one of them.")

        async def begin() -> Awaitable[Answer]:
            work = await saving() if saving is not None else None
            card: SamplerCard | None = None
            if number is not None:
                sampler = model.live.sampler()
                card = self._desk.add_sampler(model.session, number, lambda name: SamplerCard(name, sampler, model.run.base_model, model.model))

            async def finish() -> Answer:
                fields: dict[str, object] = {} if work is None else {"path": (await work).path}
                if card is not None:
                    card.path = cast("str | None", fields.get("path"))
                    fields["sampling_session_id"] = card.id
                return json_answer(type="save_weights_for_sampler", **fields)

            return finish()

        return _future(self._desk.submit(model, seq, "save_weights_for_sampler", begin))

    # -------------------------------------------------------------------------------------------------------- sampling
    async def create_sampling_session(self, request: Request, tenant: str) -> Response:
        """A sampler of a base model or a checkpoint."""
        from tinker import types

        asked = parsed(types.CreateSamplingSessionRequest, await self._body(request))
        session = self._desk.session(asked.session_id, tenant)
        name = f"{session.id}:sample:{asked.sampling_session_seq_id}"
        if name not in session.samplers:
            sampler, base, model = await self._desk.open_sampler(tenant, base_model=asked.base_model, path=asked.model_path)
            self._desk.add_sampler(session, asked.sampling_session_seq_id, lambda name: SamplerCard(name, sampler, base, model, asked.model_path))
        return json_response({"type": "create_sampling_session", "sampling_session_id": name})

    async def join_sampling_session(self, request: Request, tenant: str) -> Response:
        """A number for another client of the same sampler."""
        from tinker import types

        card = self._desk.sampler(parsed(types.JoinSamplingSessionRequest, await self._body(request)).sampling_session_id, tenant)
        card.clones += 1
        return json_response({"client_counter": card.clones})

    async def get_sampler(self, request: Request, tenant: str) -> Response:
        """What a sampler samples."""
        card = self._desk.sampler(request.path_params["sampler"], tenant)
        fields = {"sampler_id": card.id, "base_model": card.base_model}
        return json_response(fields | ({"model_path": card.path} if card.path else {}))

    async def asample(self, request: Request, tenant: str) -> Response:
        """Samples of a prompt."""
        from tinker import types

        asked: types.SampleRequest = parsed(types.SampleRequest, await self._body(request))
        if asked.seq_id is None or asked.sampling_session_id is None:
            raise DataError("asample needs sampling_session_id and seq_id; got none. SDK 0.38.0 sends both.")
        card = self._desk.sampler(asked.sampling_session_id, tenant)
        if not 1 <= asked.num_samples <= 1024:
            raise DataError(f"num_samples is {asked.num_samples}; expected 1 to 1024.")
        entry = self._desk.submit_sample(card, tenant, asked.seq_id, partial(self._sampled, card, asked))
        ids = [f"{entry.id}:{place}" for place in range(asked.num_samples)]
        return json_response({"request_id": entry.id, "sample_sequence_ids": ids})

    async def _sampled(self, card: SamplerCard, asked: types.SampleRequest) -> Answer:
        body, drawn = await sample(self._desk.backend, card, asked, longest=self._desk.config.max_tokens)
        self._desk.count("tokens_total:sampled", drawn)
        return Answer(body, PROTO)

    # --------------------------------------------------------------------------------------------------------- results
    async def retrieve_future(self, request: Request, tenant: str) -> Response:
        """A result, where it comes within the poll's time; else "try again"."""
        from tinker.types.future_retrieve_request import FutureRetrieveRequest

        asked = parsed(FutureRetrieveRequest, await self._body(request))
        entry = self._desk.ledger.find(asked.request_id, tenant)
        if (session := self._desk.sessions.get(entry.group)) is not None:
            self._desk.session(session.id, tenant)
        await asyncio.wait([entry.answer], timeout=self._desk.config.poll_s)
        if not entry.answer.done():
            return json_response({"type": "try_again", "request_id": entry.id, "queue_state": "active"}, 408)
        answer = entry.answer.result()
        self._desk.ledger.retrieved(entry)
        return Response(answer.body, media_type=answer.type)

    async def cancel_future(self, request: Request, tenant: str) -> Response:
        """Drops samples that nobody waits for."""
        raw = await self._body(request)
        try:
            asked = orjson.loads(raw)
            single = [asked["request_id"]] if "request_id" in asked else []
            wanted = [str(one) for one in (*single, *asked.get("request_ids", ()))]
        except (orjson.JSONDecodeError, TypeError, AttributeError) as error:
            raise FormatError(f"The body names no requests to cancel: {error}.") from error
        for one in wanted:
            entry = self._desk.ledger.known(one, tenant)
            if entry is not None and entry.kind == "sample":
                entry.cancel()
        return Response(status_code=204)

    async def create_custom_loss(self, request: Request, tenant: str) -> Response:
        """Refused: custom losses run in the client, as the SDK does by itself when the server does not offer this."""
        del tenant
        await self._body(request)
        raise ConfigError("This server runs no uploaded losses. Pass the function itself to forward_backward_custom: the SDK then runs it on the client.")


def _seq(seq: int | None) -> int:
    if seq is None:
        raise DataError("The request has no seq_id; expected the number of its turn. SDK 0.38.0 sends one.")
    return seq


def _future(entry: Entry) -> Response:
    return json_response({"request_id": entry.id} | ({"model_id": entry.model} if entry.model else {}))


async def _proto(work: Awaitable[bytes]) -> Answer:
    return Answer(await work, PROTO)
