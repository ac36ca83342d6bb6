"""Who may ask: only this machine's own pages. Pure ASGI, in front of every route.

Against DNS rebinding the Host must be on a list; against other sites' pages the Origin must be our own; against scripts in model text a
content security policy allows no inline script and no other origin. What changes or computes something also needs a token that only our
own pages hold.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, TypeAlias

from ..errors import ConfigError

__all__ = ["LOCAL_HOSTS", "POLICY", "Guard", "host_name"]

_Scope: TypeAlias = MutableMapping[str, Any]
_Message: TypeAlias = MutableMapping[str, Any]
_Receive: TypeAlias = Callable[[], Awaitable[_Message]]
_Send: TypeAlias = Callable[[_Message], Awaitable[None]]
_App: TypeAlias = Callable[[_Scope, _Receive, _Send], Awaitable[None]]

LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types crucible"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_MOST_BODY = 256 * 1024


def host_name(host: str) -> str:
    """The name in a Host header, without the port, in lower case."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[: name.find("]") + 1]
    return name.rpartition(":")[0] if name.count(":") == 1 else name


class Guard:
    """Refuses foreign hosts and origins, asks for the token where something is posted, and adds the security headers."""

    def __init__(self, app: _App, *, token: str, hosts: Iterable[str] = LOCAL_HOSTS) -> None:
        if not token:
            raise ConfigError("The dashboard's token is empty; expected a random text. Leave it out to get one.")
        self._app = app
        self._token = token
        self._hosts = frozenset(host_name(host) for host in hosts)

    def _refusal(self, scope: _Scope) -> tuple[int, str] | None:
        headers = scope["headers"]
        found: dict[str, list[str]] = {}
        for key, value in headers:
            found.setdefault(key.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        hosts = found.get("host", [])
        if len(hosts) != 1 or host_name(hosts[0]) not in self._hosts:
            return 421, f"This dashboard answers to {', '.join(sorted(self._hosts))} only."
        origin = found.get("origin", [""])[0]
        if origin and origin not in (f"http://{hosts[0]}", f"https://{hosts[0]}"):
            return 403, "This page belongs to another site."
        if found.get("sec-fetch-site", ["none"])[0] in ("cross-site", "same-site") and found.get("sec-fetch-mode", [""])[0] != "navigate":
            return 403, "The request comes from another site's page."
        if scope["method"] in ("GET", "HEAD"):
            return None
        if scope["method"] != "POST":
            return 405, "Only GET, HEAD and POST are known here."
        if not hmac.compare_digest(found.get("x-crucible-token", [""])[0].encode(), self._token.encode()):
            return 403, "The token is missing or old. Load the page again."
        if not found.get("content-type", [""])[0].startswith("application/json"):
            return 415, "Expected application/json."
        length = found.get("content-length", [""])[0]
        if not length.isdecimal() or int(length) > _MOST_BODY:
            return 413, f"Expected a body of at most {_MOST_BODY} bytes with its length."
        return None

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Passes the request on, or answers that it is refused."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no web sockets here
            await send({"type": "websocket.close", "code": 1008})
            return

        async def guarded(message: _Message) -> None:
            if message["type"] == "http.response.start":
                own = {key.lower() for key, _ in message.get("headers", [])}
                extra = [(k.encode(), v.encode()) for k, v in _HEADERS.items() if k.encode() not in own]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, guarded)
            return
        body = refusal[1].encode()
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
        await guarded({"type": "http.response.start", "status": refusal[0], "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
