"""The Tinker protocol's routes for sessions, training and sampling. This file knows no files and no keys."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from ..errors import ConfigError, DataError
from .bodies import Cancel, Empty, Finish, Telemetry
from .desk import Desk, SamplerCard
from .hosts import is_loopback
from .http import Endpoint, body_of, json_response, parsed
from .ledger import PROTO, Answer, Entry
from .sampling import sample
from .steps import KINDS, model_for

if TYPE_CHECKING:
    from tinker import types

__all__ = ["TinkerApi"]

LARGE = 2**16
"""Bodies of more bytes are read in a thread."""


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
            "get_info": self.get_info,
            **{name: partial(self._train, name=name) for name in KINDS},
            "create_sampling_session": self.create_sampling_session,
            "join_sampling_session": self.join_sampling_session,
            "asample": self.asample,
            "retrieve_future": self.retrieve_future,
            "retrieve_futures": self.retrieve_futures,
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
        parsed(Empty, await self._body(request) or b"{}")
        flags = {"sample_join_sampling_session": True, "fwdbwd_max_chunk_bytes_count": min(5_000_000, self._desk.config.body_bytes // 4)}
        response = json_response({**flags, **self._desk.config.client})
        response.headers["Connection"] = "close"  # the SDK asks this once, on a connection that it then forgets
        return response

    async def dynamic_config(self, request: Request, tenant: str) -> Response:
        """Cancelling samples is possible."""
        del tenant
        parsed(Empty, await self._body(request) or b"{}")
        return json_response({"refresh_interval_sec": 300, "sample_cancel_enabled": True, "sample_cancel_max_batch_size": 64})

    async def create_session(self, request: Request, tenant: str) -> Response:
        """A new client."""
        from tinker import types

        asked = parsed(types.CreateSessionRequest, await self._body(request))
        metadata = {str(key): str(value) for key, value in (asked.user_metadata or {}).items()}
        session = self._desk.open(tenant, metadata or None, asked.display_name, asked.project_id or "")
        return json_response({"type": "create_session", "session_id": session.id})

    async def heartbeat(self, request: Request, tenant: str) -> Response:
        """The client is alive."""
        from tinker import types

        self._desk.session(parsed(types.SessionHeartbeatRequest, await self._body(request)).session_id, tenant)
        return json_response({"type": "session_heartbeat"})

    async def finish_session(self, request: Request, tenant: str) -> Response:
        """The client is done; a second call does nothing."""
        parsed(Finish, await self._body(request) or b"{}")
        session = self._desk.sessions.get(request.path_params["session"])
        if session is not None and session.owner == tenant:
            self._desk.end(session, "finished")
        return Response(status_code=204)

    async def telemetry(self, request: Request, tenant: str) -> Response:
        """Taken and thrown away."""
        del tenant
        parsed(Telemetry, await self._body(request))
        return json_response({"status": "accepted"})

    # -------------------------------------------------------------------------------------------------------- training
    async def _train(self, request: Request, tenant: str, *, name: str) -> Response:
        """A request to a model, which runs in its turn; the first one makes the model."""
        raw, kind = await self._body(request), KINDS[name]
        asked = await asyncio.to_thread(kind.parse, raw) if len(raw) > LARGE else kind.parse(raw)
        new = getattr(asked, "session_id", None) is not None
        if new:
            model, seq = model_for(self._desk, self._desk.session(asked.session_id, tenant), asked), 0
        elif not asked.model_id:
            raise DataError(f"{name} names no model; expected model_id and seq_id, or session_id and model_seq_id.")
        else:
            model, seq = self._desk.model(asked.model_id, tenant), _seq(asked.seq_id)
        return _future(await self._desk.turns.submit(model, seq, name, kind.begin(self._desk, model, asked), raw))

    async def get_info(self, request: Request, tenant: str) -> Response:
        """What a model is."""
        from tinker import types

        model = self._desk.model(parsed(types.GetInfoRequest, await self._body(request)).model_id, tenant)
        run = model.run
        near = request.client is not None and is_loopback(request.client.host)
        data = {"arch": "lora", "model_name": run.base_model, "tokenizer_id": await self._desk.tokenizer_id(run.base_model, near=near)}
        fields: dict[str, object] = {"type": "get_info", "model_id": run.id, "model_name": run.base_model, "is_lora": True, "lora_rank": run.lora.rank}
        return json_response(fields | {"model_data": data, "optimizer_config": {"type": "adamw"}})

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
            await asyncio.to_thread(self._desk.note_sampler, session, asked.sampling_session_seq_id, base_model=asked.base_model, path=asked.model_path)
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

        raw = await self._body(request)
        asked: types.SampleRequest = parsed(types.SampleRequest, raw)
        if asked.seq_id is None or asked.sampling_session_id is None:
            raise DataError("asample needs sampling_session_id and seq_id; got none. SDK 0.38.0 sends both.")
        card = self._desk.sampler(asked.sampling_session_id, tenant)
        if not 1 <= asked.num_samples <= 1024:
            raise DataError(f"num_samples is {asked.num_samples}; expected 1 to 1024.")
        entry = self._desk.submit_sample(card, tenant, asked.seq_id, partial(self._sampled, card, asked, tenant), len(raw))
        ids = [f"{entry.id}:{place}" for place in range(asked.num_samples)]
        return json_response({"request_id": entry.id, "sample_sequence_ids": ids})

    async def _sampled(self, card: SamplerCard, asked: types.SampleRequest, tenant: str) -> Answer:
        body, drawn = await sample(self._desk.backend, card, asked, longest=self._desk.config.max_tokens)
        session = self._desk.session(card.id.partition(":")[0], tenant)
        self._desk.used(session, card.base_model, "sampling_prefill", asked.prompt.length)
        self._desk.used(session, card.base_model, "sampling_sample", drawn)
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

    async def retrieve_futures(self, request: Request, tenant: str) -> Response:
        """Which of a sampler's requests were answered since the last call; their results are then retrieved one by one."""
        from tinker.types.futures_retrieve_request import FuturesRetrieveRequest

        asked = parsed(FuturesRetrieveRequest, await self._body(request))
        card = self._desk.sampler(asked.target.sampling_session_id, tenant)
        for one in asked.retrieved_request_ids:
            entry = self._desk.ledger.known(one, tenant)
            if entry is not None and entry.answer.done():
                self._desk.ledger.retrieved(entry)
        hold_s = self._desk.config.poll_s if asked.timeout is None else max(0.0, min(asked.timeout, self._desk.config.poll_s))
        rows, cursor = await card.finished.after(asked.target.cloned_sampler_id, asked.prev_cursor, hold_s)
        found = [
            {"state": "failed", "request_id": one} if size is None
            else {"state": "finished", "request_id": one, "response_payload_uncompressed_size": size}
            for one, size in rows
        ]  # fmt: skip
        return json_response({"completions": found, "cursor": cursor})

    async def cancel_future(self, request: Request, tenant: str) -> Response:
        """Drops samples that nobody waits for."""
        asked = parsed(Cancel, await self._body(request))
        for one in ([] if asked.request_id is None else [asked.request_id]) + asked.request_ids:
            entry = self._desk.ledger.known(one, tenant)
            if entry is not None and entry.kind == "sample":
                entry.cancel()
        return Response(status_code=204)

    async def create_custom_loss(self, request: Request, tenant: str) -> Response:
        """Refused: custom losses run in the client, as the SDK does by itself when the server does not offer this."""
        del tenant
        parsed(Empty, await self._body(request))
        raise ConfigError("This server runs no uploaded losses. Pass the function itself to forward_backward_custom: the SDK then runs it on the client.")


def _seq(seq: int | None) -> int:
    if seq is None:
        raise DataError("The request has no seq_id; expected the number of its turn. SDK 0.38.0 sends one.")
    return seq


def _future(entry: Entry) -> Response:
    return json_response({"request_id": entry.id} | ({"model_id": entry.model} if entry.model else {}))
