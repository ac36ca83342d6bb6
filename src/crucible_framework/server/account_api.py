"""The Tinker protocol's routes about an account: its key, its tokens, its use, its audit log, and which project a session is in.

A server of one's own asks no money, so no cost is stated. This file does not know weights or training.
"""

from __future__ import annotations

import asyncio
import zlib
from dataclasses import replace
from datetime import UTC, date, datetime
from typing import cast

from starlette.requests import Request
from starlette.responses import Response

from ..errors import ConfigError, DataError, NotFoundError
from ..files import read_lines
from ..records import Json
from .badges import Badges
from .bodies import Project
from .desk import Desk
from .http import Endpoint, body_of, json_response, parsed, when
from .keys import Keys

__all__ = ["AccountApi"]

LONGEST_S = 14 * 86400
AUDITED = {"checkpoints": "checkpoint", "projects": "project", "teams": "team", "organizations": "organization"}


def _instant(request: Request, name: str) -> float:
    text = request.query_params.get(name, "")
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise DataError(f"{name} is {text[:40]!r}; expected a time such as 2026-07-13T00:00:00Z.") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


class AccountApi:
    """One method per route.

    Args:
        desk: knows who used what.
        keys: who may ask.
        badges: makes tokens.
    """

    def __init__(self, desk: Desk, keys: Keys, badges: Badges) -> None:
        self._desk, self._keys, self._badges = desk, keys, badges

    @property
    def routes(self) -> list[tuple[str, str, Endpoint]]:
        """(method, path, endpoint) below /api/v1."""
        return [
            ("POST", "/auth/token", self.token),
            ("GET", "/auth/apikey/me", self.key),
            ("DELETE", "/auth/apikey/me", self.delete_key),
            ("GET", "/billing/usage/events", self.used),
            ("GET", "/billing/usage/checkpoints/current", self.stored),
            ("GET", "/audit", self.audit),
            ("PUT", "/sessions/{session}/project", self.project),
        ]

    async def token(self, request: Request, tenant: str) -> Response:
        """A token for an hour that stands for the key."""
        await body_of(request, self._desk.config.body_bytes)
        return json_response({"jwt": self._badges.make(tenant)})

    async def key(self, request: Request, tenant: str) -> Response:
        """The key that was sent, without its secret."""
        del request
        user = {"user_urn": f"crucible:user:{tenant}", "email": f"{tenant}@localhost", "name": tenant}
        details: dict[str, Json] = {"user_details": cast("Json", user), "org_details": {"org_urn": "crucible:organization:local", "name": "this server"}}
        return json_response({"key_id": zlib.crc32(tenant.encode()), "name": tenant, "note": "", "details": details})

    async def delete_key(self, request: Request, tenant: str) -> Response:
        """Revokes the key that was sent."""
        del request
        if not self._keys.list():
            raise ConfigError("This server is open to its own machine and has no keys; there is none to delete.")
        await asyncio.to_thread(self._keys.revoke, tenant)
        return Response(status_code=204)

    async def used(self, request: Request, tenant: str) -> Response:
        """The tenant's use by the hour."""
        start, end = _instant(request, "starting_on"), _instant(request, "ending_before")
        if not start < end <= start + LONGEST_S:
            raise DataError("ending_before must lie after starting_on, by 14 days at the most.")
        data = list[dict[str, Json]]()
        for row in self._desk.usage.rows(tenant, start, end):
            info: dict[str, Json] = {"type": row.what, "count" if row.what == "checkpoint" else "token_count": row.amount}
            if row.what == "sampling_prefill":
                info["cached"] = False
            data.append({"bucket_start": when(row.hour), "bucket_end": when(row.hour + 3600), "base_model": row.base_model, "user_id": tenant,
                         "session_id": row.session, "event_info": info})  # fmt: skip
        live = {session.id: session.user_metadata for session in self._desk.sessions.values() if session.owner == tenant}
        sessions = {str(row["session_id"]): {"user_metadata": dict(live.get(str(row["session_id"])) or {}) or None} for row in data}
        return json_response({"data": data, "sessions": sessions, "cost_data_through": None})

    async def stored(self, request: Request, tenant: str) -> Response:
        """How much the tenant's checkpoints hold, by project."""
        wanted = request.query_params.get("project_id")

        def read() -> list[dict[str, Json]]:
            sums = dict[str, list[int]]()
            for run in self._desk.shelf.runs(tenant):
                if wanted in (None, run.project):
                    sizes = [one.size_bytes for one in self._desk.shelf.checkpoints(run.id)]
                    count, size = sums.get(run.project, [0, 0])
                    sums[run.project] = [count + len(sizes), size + sum(sizes)]
            return [
                {"project_id": project or None, "org_user_urn": f"crucible:user:{tenant}", "user_name": tenant, "checkpoint_count": count,
                 "size_bytes": size, "size_gigabytes": size / 1e9}
                for project, (count, size) in sums.items()
            ]  # fmt: skip

        return json_response({"data": await asyncio.to_thread(read)})

    async def audit(self, request: Request, tenant: str) -> Response:
        """What the tenant did to checkpoints and projects on a day, today where none is named."""
        kind, text = request.query_params.get("event_type", "all"), request.query_params.get("day")
        try:
            day = datetime.now(UTC).date() if text is None else date.fromisoformat(text)
        except ValueError:
            raise DataError(f"day is {text!r}; expected one such as 2026-07-13.") from None
        if kind != "all" and kind not in AUDITED:
            raise DataError(f"event_type is {kind[:40]!r}; expected one of all, {', '.join(AUDITED)}.")
        rows = await asyncio.to_thread(read_lines, self._desk.config.folder / "audit.jsonl")
        wanted = AUDITED.get(kind, "")
        found = [
            {"timestamp": row["at"], "event": row["event"], "tinker_path": row.get("path"), "event_details": row.get("details", {})}
            for row in rows
            if row["owner"] == tenant and str(row["at"])[:10] == day.isoformat() and str(row["event"]).startswith(wanted)
        ]
        return json_response({"entries": found})

    async def project(self, request: Request, tenant: str) -> Response:
        """Puts a session and its runs into a project, which is a name."""
        asked = parsed(Project, await body_of(request, self._desk.config.body_bytes))
        name = request.path_params["session"]
        session = self._desk.sessions.get(name)
        runs = [run for run in await asyncio.to_thread(self._desk.shelf.runs, tenant) if run.id.partition(":")[0] == name]
        if not runs and (session is None or session.owner != tenant):
            raise NotFoundError(f"There is no session {name[:140]!r}.")
        if session is not None and session.owner == tenant:
            session.project = asked.project_id
            for model in session.models.values():
                model.run = replace(model.run, project=asked.project_id)
        for run in runs:
            await asyncio.to_thread(self._desk.shelf.put_run, replace(run, project=asked.project_id))
        await asyncio.to_thread(self._desk.audit, tenant, "project.session_assigned", details={"session_id": name, "project_id": asked.project_id})
        return Response(status_code=204)
