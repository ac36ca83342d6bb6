"""The Tinker protocol's routes for what lies on the shelf: runs, checkpoints, sessions, files. This file does not know weights."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path as FilePath
from typing import TypeVar, cast

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from ..errors import DataError, NotFoundError
from ..files import read_manifest, verify
from ..records import Json
from .bodies import Path, Ttl
from .desk import Desk, Session
from .http import Endpoint, body_of, json_response, parsed, when
from .shelf import KINDS, Kind, Run, Stored, own_run

__all__ = ["RestApi"]

T = TypeVar("T")
LINK_S = 3600
"""How long a link to a file works."""
CHECKPOINT = "/training_runs/{run}/checkpoints/{kind}/{name}"


def _checkpoint(stored: Stored) -> dict[str, Json]:
    return {
        "checkpoint_id": f"{stored.kind}/{stored.name}",
        "checkpoint_type": KINDS[stored.kind],
        "time": when(stored.created_at),
        "tinker_path": stored.path,
        "size_bytes": stored.size_bytes,
        "public": stored.public,
        "user_metadata": dict(stored.user_metadata) if stored.user_metadata else None,
        "expires_at": None if stored.expires_at is None else when(stored.expires_at),
    }


def _number(request: Request, name: str, default: int, least: int, most: int) -> int:
    text = request.query_params.get(name, str(default))
    if not text.isdecimal() or not text.isascii() or not least <= int(text[:9]) <= most or len(text) > 9:
        raise DataError(f"{name} is {text[:20]!r}; expected a whole number from {least} to {most}.")
    return int(text)


class RestApi:
    """One method per route.

    Args:
        desk: holds sessions and the shelf.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk, self._shelf = desk, desk.shelf
        self._secret = secrets.token_bytes(32)

    @property
    def routes(self) -> list[tuple[str, str, Endpoint]]:
        """(method, path, endpoint) below /api/v1."""
        return [
            ("GET", "/get_server_capabilities", self.capabilities),
            ("POST", "/weights_info", self.weights_info),
            ("GET", "/training_runs", self.training_runs),
            ("GET", "/training_runs/{run}", self.training_run),
            ("GET", "/training_runs/{run}/checkpoints", self.run_checkpoints),
            ("GET", "/checkpoints", self.checkpoints),
            ("DELETE", CHECKPOINT, self.delete),
            ("POST", CHECKPOINT + "/publish", self.publish),
            ("DELETE", CHECKPOINT + "/publish", self.publish),
            ("PUT", CHECKPOINT + "/ttl", self.ttl),
            ("GET", CHECKPOINT + "/external_weights_urls", self.urls),
            ("GET", "/sessions", self.sessions),
            ("GET", "/sessions/{session}", self.session),
            ("POST", "/sessions/search", self.search_sessions),
            ("GET", "/sessions/{session}/trace_export", self.trace),
            ("POST", "/copy_weights", self.copy),
        ]

    async def _body(self, request: Request) -> bytes:
        return await body_of(request, self._desk.config.body_bytes)

    async def capabilities(self, request: Request, tenant: str) -> Response:
        """The models that are listed."""
        del request, tenant
        models = [{"model_name": name, "trainable": True, "sampleable": True} for name in self._desk.config.listed]
        return json_response({"supported_models": models})

    # ------------------------------------------------------------------------------------------------------------ runs
    def _run(self, run: Run) -> dict[str, Json]:
        stored = self._shelf.checkpoints(run.id)
        last = {kind: next((_checkpoint(one) for one in stored if one.kind == kind), None) for kind in KINDS}
        return {
            "training_run_id": run.id,
            "base_model": run.base_model,
            "model_owner": run.owner,
            "is_lora": True,
            "corrupted": run.corrupted,
            "lora_rank": run.lora.rank,
            "last_request_time": when(run.last_request_at),
            "last_checkpoint": cast("Json", last["weights"]),
            "last_sampler_checkpoint": cast("Json", last["sampler_weights"]),
            "user_metadata": dict(run.user_metadata) if run.user_metadata else None,
        }

    async def training_runs(self, request: Request, tenant: str) -> Response:
        """A page of the tenant's runs."""
        project = request.query_params.get("project_id")

        def find() -> list[Run]:
            return [run for run in self._shelf.runs(tenant) if project in (None, run.project)]

        return json_response(await self._page(request, "training_runs", find, self._run, 20))

    async def _page(self, request: Request, name: str, find: Callable[[], list[T]], show: Callable[[T], dict[str, Json]], usual: int) -> dict[str, object]:
        limit, offset = _number(request, "limit", usual, 0, 1000), _number(request, "offset", 0, 0, 10**8)

        def read() -> dict[str, object]:
            found = find()
            page = [show(one) for one in found[offset : offset + limit]]
            return {name: page, "cursor": {"offset": offset, "limit": limit, "total_count": len(found)}}

        return await asyncio.to_thread(read)

    async def training_run(self, request: Request, tenant: str) -> Response:
        """One run."""
        run = request.path_params["run"]
        return json_response(await asyncio.to_thread(lambda: self._run(own_run(self._shelf, run, tenant))))

    async def run_checkpoints(self, request: Request, tenant: str) -> Response:
        """A run's checkpoints."""
        run = request.path_params["run"]
        own_run(self._shelf, run, tenant)
        return json_response({"checkpoints": await asyncio.to_thread(lambda: [_checkpoint(one) for one in self._shelf.checkpoints(run)])})

    async def checkpoints(self, request: Request, tenant: str) -> Response:
        """A page of the tenant's checkpoints, the newest first."""

        def find() -> list[Stored]:
            found = [one for run in self._shelf.runs(tenant) for one in self._shelf.checkpoints(run.id)]
            return sorted(found, key=lambda one: -one.created_at)

        return json_response(await self._page(request, "checkpoints", find, _checkpoint, 100))

    # ----------------------------------------------------------------------------------------------------- checkpoints
    async def _own(self, request: Request, tenant: str) -> Stored:
        run, kind, name = (request.path_params[part] for part in ("run", "kind", "name"))
        if kind not in KINDS:
            raise NotFoundError(f"There is no kind of checkpoint {kind!r}; expected one of {', '.join(KINDS)}.")
        own_run(self._shelf, run, tenant)
        return await asyncio.to_thread(self._shelf.get, run, cast("Kind", kind), name)

    async def weights_info(self, request: Request, tenant: str) -> Response:
        """What is needed to load a checkpoint."""
        asked = parsed(Path, await self._body(request))
        stored = await asyncio.to_thread(self._desk.readable, asked.tinker_path, tenant)
        train = {f"train_{part}": stored.run.train.get(part, True) for part in ("attn", "mlp", "unembed")}
        fields: dict[str, Json] = {"base_model": stored.run.base_model, "is_lora": True, "lora_rank": stored.run.lora.rank, **train}
        return json_response(fields | {"optimizer_config": {"type": "adamw"}})

    async def delete(self, request: Request, tenant: str) -> Response:
        """Removes a checkpoint."""
        stored = await self._own(request, tenant)
        await asyncio.to_thread(self._shelf.delete, stored.run.id, stored.kind, stored.name)
        await asyncio.to_thread(self._desk.audit, tenant, "checkpoint.deleted", path=stored.path)
        return Response(status_code=204)

    async def publish(self, request: Request, tenant: str) -> Response:
        """Lets every tenant read a checkpoint, or no longer; twice is as once."""
        stored = await self._own(request, tenant)
        await asyncio.to_thread(self._shelf.change, stored, public=request.method == "POST", expires_at=stored.expires_at)
        await asyncio.to_thread(self._desk.audit, tenant, f"checkpoint.{'published' if request.method == 'POST' else 'unpublished'}", path=stored.path)
        return Response(status_code=204)

    async def ttl(self, request: Request, tenant: str) -> Response:
        """Sets or removes a checkpoint's end."""
        ttl = parsed(Ttl, await self._body(request)).ttl_seconds
        stored = await self._own(request, tenant)
        await asyncio.to_thread(self._shelf.change, stored, public=stored.public, expires_at=None if ttl is None else time.time() + ttl)
        return Response(status_code=204)

    # ----------------------------------------------------------------------------------------------------------- files
    def _sign(self, path: str, until: int) -> str:
        return hmac.new(self._secret, f"{path}|{until}".encode(), hashlib.sha256).hexdigest()

    def _permits(self, request: Request, path: str) -> bool:
        """Whether the request carries the signature of a link to the path that still works."""
        until, key = request.query_params.get("until", ""), request.query_params.get("key", "")
        valid = until.isascii() and until.isdecimal() and len(until) < 15
        expected = self._sign(path, int(until) if valid else 0)
        return valid and hmac.compare_digest(expected.encode(), key.encode()) and int(until) >= time.time()

    async def urls(self, request: Request, tenant: str) -> Response:
        """A signed link to each file of the adapter, which works for an hour without a key."""
        stored = await self._own(request, tenant)
        if stored.kind != "external_weights":
            raise DataError(f"{stored.path!r} has no files to download; expected …/external_weights/…, which save_weights_external makes.")
        until = int(time.time()) + LINK_S
        base = str(request.base_url).rstrip("/")
        names = [card.name for card in (await asyncio.to_thread(read_manifest, stored.folder)).files]
        links = {
            name: f"{base}/api/v1/files/{stored.run.id}/{stored.name}/{name}?until={until}&key={self._sign(f'{stored.path}/{name}', until)}" for name in names
        }
        return json_response({"urls": links, "expires": when(until)})

    async def file(self, request: Request) -> Response:
        """A file behind a signed link; the link is the permission."""
        run, name, file = (request.path_params[part] for part in ("run", "name", "file"))
        if not self._permits(request, f"tinker://{run}/external_weights/{name}/{file}"):
            return json_response({"detail": "The link is not valid, or no longer. Ask for a new one."}, 403)
        try:
            stored = await asyncio.to_thread(self._shelf.get, run, "external_weights", name)
        except NotFoundError as error:
            return json_response({"detail": str(error)}, 404)
        if file not in {card.name for card in read_manifest(stored.folder).files}:
            return json_response({"detail": "There is no such file."}, 404)
        return FileResponse(stored.folder / file, media_type="application/octet-stream")

    # -------------------------------------------------------------------------------------------------------- sessions
    async def sessions(self, request: Request, tenant: str) -> Response:
        """The tenant's live sessions, the newest first."""
        limit, offset = _number(request, "limit", 20, 0, 1000), _number(request, "offset", 0, 0, 10**8)
        mine = sorted((one for one in self._desk.sessions.values() if one.owner == tenant), key=lambda one: -one.created_at)
        return json_response({"sessions": [one.id for one in mine[offset : offset + limit]]})

    async def session(self, request: Request, tenant: str) -> Response:
        """A live session's models and samplers."""
        session = self._desk.sessions.get(request.path_params["session"])
        if session is None or session.owner != tenant:
            raise NotFoundError(f"There is no session {request.path_params['session'][:140]!r}; it has ended.")
        fields = {"training_run_ids": list(session.models), "sampler_ids": list(session.samplers), "display_name": session.display_name}
        return json_response(fields | {"user_metadata": dict(session.user_metadata) if session.user_metadata else None})

    async def search_sessions(self, request: Request, tenant: str) -> Response:
        """The tenant's live sessions that fit the filters, the newest first."""
        from tinker import types

        asked = parsed(types.SessionSearchRequest, await self._body(request))
        words = (asked.display_name or "").lower().split()

        def fits(one: Session) -> bool:
            known, name = dict(one.user_metadata or {}), (one.display_name or "").lower()
            return (
                one.owner == tenant and asked.session_id in (None, one.id) and (asked.project_ids is None or one.project in asked.project_ids)
                and all(known.get(key) == value for key, value in asked.user_metadata.items()) and all(word in name for word in words)
            )  # fmt: skip

        mine = sorted(filter(fits, list(self._desk.sessions.values())), key=lambda one: -one.created_at)[: asked.limit]
        found = [
            {"session_id": one.id, "created_at": when(one.created_at), "owner": one.owner, "project_id": one.project, "status": {"type": "active"},
             "checkpoints_count": sum(len(self._shelf.checkpoints(run)) for run in one.models), "display_name": one.display_name,
             "user_metadata": dict(one.user_metadata) if one.user_metadata else None}
            for one in mine
        ]  # fmt: skip
        return json_response({"sessions": found, "next_cursor": None})

    # ---------------------------------------------------------------------------------------------------------- traces
    async def trace(self, request: Request, tenant: str) -> Response:
        """A signed link to a live session's requests over time."""
        session = self._desk.sessions.get(name := request.path_params["session"])
        if session is None or session.owner != tenant:
            raise NotFoundError(f"There is no session {name[:140]!r}; it has ended. Export a trace while its client lives.")
        until = int(time.time()) + LINK_S
        base = str(request.base_url).rstrip("/")
        return json_response({"status": "ready", "url": f"{base}/api/v1/traces/{name}?until={until}&key={self._sign(f'trace:{name}', until)}", "error": None})

    async def trace_file(self, request: Request) -> Response:
        """A session's requests as a trace for ui.perfetto.dev, in Chrome's JSON form; the link is the permission."""
        name = request.path_params["session"]
        if not self._permits(request, f"trace:{name}"):
            return json_response({"detail": "The link is not valid, or no longer. Ask for a new one."}, 403)
        rows = [
            {"name": row.kind, "ph": "X", "pid": 1, "tid": row.track, "ts": row.started_s * 1e6, "dur": row.duration_s * 1e6, "args": {"request": row.request}}
            for row in self._desk.turns.traces.get(name, ())
        ]
        return json_response({"traceEvents": rows, "displayTimeUnit": "ms"})

    # ------------------------------------------------------------------------------------------------------------ copy
    async def copy(self, request: Request, tenant: str) -> Response:
        """A checkpoint that the tenant may read, as one of its own, in a session or a project. The same idempotency key copies once."""
        from tinker import types

        asked = parsed(types.CopyWeightsRequest, await self._body(request))
        stored = await asyncio.to_thread(self._desk.readable, asked.source_path, tenant)
        if asked.session_id is not None and asked.model_seq_id is not None:
            session = self._desk.session(asked.session_id, tenant)
            if f"{session.id}:train:{asked.model_seq_id}" in session.models:
                raise DataError(f"model_seq_id {asked.model_seq_id} is a model in training already; a copy needs a number of its own.")
            run, project = f"{session.id}:train:{asked.model_seq_id}", session.project
        elif asked.destination_project_id is not None:
            given = request.headers.get("x-idempotency-key") or secrets.token_hex(8)
            name = hashlib.sha256(f"{tenant}|{given}|{asked.source_path}".encode()).hexdigest()[:12]
            run, project = f"copy-{name}:train:0", asked.destination_project_id
        else:
            raise DataError("copy_weights names no place; expected destination_project_id, or session_id and model_seq_id.")
        if asked.ttl_seconds is not None and asked.ttl_seconds <= 0:
            raise DataError(f"ttl_seconds is {asked.ttl_seconds}; expected a positive number of seconds, or null.")
        made = await asyncio.to_thread(self._copied, stored, replace(stored.run, id=run, owner=tenant, project=project), asked.ttl_seconds)
        await asyncio.to_thread(self._desk.audit, tenant, "checkpoint.copied", path=made.path, details={"from": stored.path})
        return json_response({"tinker_path": made.path})

    def _copied(self, stored: Stored, run: Run, ttl_s: float | None) -> Stored:
        def write(folder: FilePath) -> None:
            for card in verify(stored.folder).files:
                shutil.copyfile(stored.folder / card.name, folder / card.name)

        try:
            return self._shelf.get(run.id, stored.kind, stored.name)
        except NotFoundError:
            self._shelf.put_run(run)
            return self._shelf.put(run, stored.kind, stored.name, write, model=stored.model, step=stored.step, ttl_s=ttl_s, user_metadata=stored.user_metadata)
