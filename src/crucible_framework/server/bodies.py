"""Bodies of requests that the SDK has no type for. This file does not know what is done with them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Cancel", "Empty", "Finish", "Path", "Project", "Telemetry", "Ttl"]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Empty(BaseModel):
    """Whatever object; nothing of it is read."""

    model_config = ConfigDict(extra="allow")


class Reason(_Body):
    """Why a session ends."""

    type: Literal["success", "errored", "interrupted"]


class Finish(_Body):
    """The end of a session."""

    reason: Reason = Reason(type="success")
    detail: str | None = None


class Path(_Body):
    """A checkpoint by its address."""

    tinker_path: str


class Ttl(_Body):
    """How long a checkpoint shall live; null: for ever."""

    ttl_seconds: Annotated[float, Field(gt=0, lt=10**10)] | None


class Project(_Body):
    """Where a session shall belong."""

    project_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,100}$")]


class Cancel(_Body):
    """Requests that nobody waits for."""

    request_id: str | None = None
    request_ids: list[str] = []
    type: str | None = None


class Telemetry(BaseModel):
    """What a client tells about itself; it is not kept."""

    model_config = ConfigDict(extra="allow", strict=True)

    events: list[dict[str, object]] = []
