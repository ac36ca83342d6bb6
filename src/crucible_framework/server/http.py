"""Bodies in, errors out, and who asks: what every route shares. This file does not know what any route does."""

from __future__ import annotations

import re
import time
import uuid
import zlib
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TypeAlias, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from .. import events
from ..errors import AuthError, CapabilityError, ConfigError, CrucibleError, DataError, LockedError, NotFoundError, ServiceError, StoreError, UnsafeError
from .badges import Badges
from .hosts import is_loopback
from .keys import Keys
from .ledger import BusyError, GoneError, TooLargeError

__all__ = ["Door", "Endpoint", "body_of", "error_object", "json_response", "parsed"]

M = TypeVar("M", bound=BaseModel)
Endpoint: TypeAlias = Callable[[Request, str], Awaitable[Response]]
"""(request, tenant) → response."""


def json_response(value: object, status: int = 200) -> Response:
    """A JSON document."""
    return Response(orjson.dumps(value, option=orjson.OPT_NAIVE_UTC), status, media_type="application/json")


def _decompress(raw: bytes, encoding: str, most: int) -> bytes:
    """The body's own bytes.

    Raises:
        TooLargeError: more than `most`.
        DataError: it is not what the header says.
        CapabilityError: an unknown encoding.
    """
    if encoding not in ("zstd", "gzip", "deflate"):
        raise CapabilityError(f"The body has the encoding {encoding!r}; expected zstd, gzip, deflate or none.")
    try:
        if encoding == "zstd":
            import zstandard

            with zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(raw) as reader:
                found = reader.read(most + 1)
        else:
            found = zlib.decompressobj(47 if encoding == "gzip" else 15).decompress(raw, most + 1)
    except Exception as error:  # zlib and zstandard raise their own
        raise DataError(f"The body is no valid {encoding}: {error}.") from error
    if len(found) > most:
        raise TooLargeError(f"The body has more than {most} bytes after decompression. Send less at once.")
    return found


async def body_of(request: Request, most: int) -> bytes:
    """The request's body, decompressed, read no further than the limit.

    Raises:
        TooLargeError: it is larger than `most` bytes.
        DataError: it cannot be decompressed.
    """
    parts, size = list[bytes](), 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise TooLargeError(f"The body has more than {most} bytes. Send less at once.")
        parts.append(part)
    raw = b"".join(parts)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    return raw if encoding in ("identity", "") else _decompress(raw, encoding, most)


def when(seconds: float) -> str:
    """A moment as the protocol writes it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def parsed(model: type[M], raw: bytes) -> M:
    """A JSON body as the SDK's own type; no number stands for a text, no text for a number.

    Raises:
        DataError: it is no such thing; the message names the first field.
    """
    try:
        return model.model_validate_json(raw, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise DataError(f"The request does not parse as {model.__name__}: {where}: {first['msg']}.") from error


_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (TooLargeError, 413),
    (BusyError, 429),
    (GoneError, 410),
    (AuthError, 401),
    (UnsafeError, 403),
    (NotFoundError, 404),
    (LockedError, 503),
    (StoreError, 507),
    (DataError, 400),
    (ConfigError, 400),
    (CapabilityError, 400),
    (ServiceError, 502),
    (CrucibleError, 400),
)


def error_object(error: Exception) -> dict[str, str | int]:
    """An error's sentence, class and status where we raised it, nothing of its inside where we did not."""
    if isinstance(error, CrucibleError):
        return {"message": str(error), "type": type(error).__name__, "code": next(code for kind, code in _STATUS if isinstance(error, kind))}
    return {"message": "internal error", "type": "InternalError", "code": 500}


def error_response(error: Exception) -> Response:
    """An error as HTTP."""
    told = error_object(error)
    status = int(told["code"])
    if isinstance(error, CrucibleError):
        response = json_response({"detail": str(error), "error": told}, status)
        if status == 429:
            response.headers["Retry-After"] = "1"
        if status == 401:
            response.headers["WWW-Authenticate"] = 'Bearer error="invalid_token"'
            response.headers["Connection"] = "close"
        return response
    return json_response({"detail": "An internal error; see the server's log.", "error": told}, status)


class Door:
    """Lets known callers in, and turns errors into responses.

    Without any key the server is open to programs on this machine: they must name a key, whatever it is, and a loopback host, which no web
    page of another site can do.

    Args:
        keys: who may ask.
        badges: tokens that stand for keys.
    """

    def __init__(self, keys: Keys, badges: Badges) -> None:
        self._keys, self._badges = keys, badges

    def tenant(self, request: Request) -> str:
        """Who asks.

        Raises:
            AuthError: no key, or a wrong one.
            UnsafeError: an open server was called under a name that is not this machine's.
        """
        bearer = request.headers.get("authorization", "")
        secret = request.headers.get("x-api-key") or (bearer[7:].strip() if bearer.lower().startswith("bearer ") else "")
        if not secret:
            raise AuthError("The request has no key. Send one as X-API-Key, or as 'Authorization: Bearer'; on an open server any will do.")
        badge = self._badges.tenant(secret) if secret.startswith("eyJ") else ""
        if self._keys.list():
            return self._keys.known(badge) if badge else self._keys.tenant(secret)
        if not is_loopback(request.url.hostname or ""):
            raise UnsafeError(
                f"This server is open to its own machine only; {request.url.hostname!r} is another name. Make keys with `crucible serve keys add`."
            )
        return "local"

    def guard(self, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint behind this door."""

        async def guarded(request: Request) -> Response:
            started, tenant, problem = time.perf_counter(), "", ""
            try:
                tenant = self.tenant(request)
                with events.continued(request.headers.get("traceparent", "")):  # what the caller's span caused hangs below it
                    response = await endpoint(request, tenant)
            except ClientDisconnect:
                response, problem = Response(status_code=499), "the client left"
            except Exception as error:
                response, problem = error_response(error), f"{type(error).__name__}: {error}"
            given = request.headers.get("x-request-id", "")
            known = given if _ID.fullmatch(given) else uuid.uuid4().hex
            response.headers["X-Request-Id"] = known
            events.emit(
                "server.error" if response.status_code >= 500 else "server.http", request_id=known, tenant=tenant, method=request.method,
                path=request.url.path, status=response.status_code, duration_s=time.perf_counter() - started, **({"error": problem} if problem else {}),
            )  # fmt: skip
            return response

        return guarded
