"""The ASGI application: routes, and the life of the desk behind them. This file knows no protocol."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from importlib import metadata

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .account_api import AccountApi
from .badges import Badges
from .desk import Desk
from .http import Door, Endpoint, json_response
from .keys import Keys
from .metrics import prometheus
from .openai_api import OpenAiApi
from .openapi import document
from .rest_api import RestApi
from .revival import revive
from .tinker_api import TinkerApi

__all__ = ["make_app"]

V1 = "/api/v1"


async def _health(_: Request) -> Response:
    return json_response({"status": "ok"})


def make_app(desk: Desk, keys: Keys, ready: Callable[[], None] = lambda: None) -> Starlette:
    """The application. It closes the desk, not the backend, when it stops.

    Args:
        desk: does the work.
        keys: who may ask.
        ready: called when requests can be served.
    """
    badges = Badges(keys.path.with_name("badges.key"))
    door, tinker, rest, account = Door(keys, badges), TinkerApi(desk), RestApi(desk), AccountApi(desk, keys, badges)

    def route(path: str, endpoint: Endpoint, method: str = "GET") -> Route:
        return Route(V1 + path, door.guard(endpoint), methods=[method])

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await revive(desk)
        desk.spawn(desk.watch())
        ready()
        yield
        await desk.close()

    async def metrics(request: Request, tenant: str) -> Response:
        del request, tenant
        return Response(prometheus(desk.gauges()), media_type="text/plain; version=0.0.4")

    async def described(request: Request, tenant: str) -> Response:
        del request, tenant
        return json_response(document(routes, "Crucible", metadata.version("crucible-framework")))

    openai = OpenAiApi(desk)
    routes = [
        Route(V1 + "/healthz", _health),
        *(route(f"/{path}", endpoint, "POST") for path, endpoint in tinker.routes.items()),
        Route(V1 + "/files/{run}/{name}/{file}", rest.file),
        Route(V1 + "/traces/{session}", rest.trace_file),
        route("/sessions/{session}/finish", tinker.finish_session, "POST"),
        route("/samplers/{sampler}", tinker.get_sampler),
        *(route(path, endpoint, method) for method, path, endpoint in (*rest.routes, *account.routes)),
        *(Route(path, door.guard(endpoint), methods=[method]) for method, path, endpoint in openai.routes),
        Route("/metrics", door.guard(metrics)),
        Route("/openapi.json", door.guard(described)),
    ]
    return Starlette(lifespan=lifespan, routes=routes)
