"""Routes: an address to a method of `Pages`, its answer to bytes, and the guard before all of them.

`make_app` gives the ASGI application; the web library is loaded when it is called. This file draws nothing and reads no run itself.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import orjson

from ..errors import AuthError, ConfigError, CrucibleError, LockedError, NotFoundError
from .frame import changed_parts
from .guard import LOCAL_HOSTS, Guard
from .pages import Pages
from .playground import Playground

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

__all__ = ["beside", "build", "make_app"]

_MOST_STREAMS = 64


def _route(path: str, make: Callable[[Request], object], kind: str, headers: Mapping[str, str]) -> Route:
    """A page or data that `make` gives, in a thread."""
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import Response
    from starlette.routing import Route

    async def answer(request: Request) -> Response:
        made = await run_in_threadpool(make, request)
        body, media = made if isinstance(made, tuple) else (made, kind)
        data = body if isinstance(body, (str, bytes)) else orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_SERIALIZE_DATACLASS)
        return Response(data, media_type=media, headers={key.replace("_", "-"): value for key, value in headers.items()})

    return Route(path, answer)


def _stream(pages: Pages, path: str, make: Callable[[Request], AsyncIterator[bytes]]) -> Route:
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route

    async def answer(request: Request) -> Response:
        if pages.streams >= _MOST_STREAMS:
            return Response("Too many pages are open.", 503, media_type="text/plain")
        return StreamingResponse(pages.counted(make(request)), media_type="text/event-stream", headers={"x-accel-buffering": "no"})

    return Route(path, answer)


def _growing(path: str, make: Callable[[Request], object]) -> Route:
    """A page of parts. With `?known=` it gives only the parts that the browser has not."""

    def answer(request: Request) -> object:
        known = request.query_params.get("known")
        return make(request) if known is None else (orjson.dumps(changed_parts(lambda: make(request), known)), "application/json")

    return _route(path, answer, "text/html", {})


def _posts(pages: Pages) -> list[object]:
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import Response
    from starlette.routing import Route

    async def ask(request: Request) -> Response:
        answer = await run_in_threadpool(pages.ask, await request.body())
        return Response(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")

    async def change(request: Request) -> Response:
        answer = await run_in_threadpool(pages.change, request, await request.body())
        return Response(orjson.dumps(answer), media_type="application/json")

    return [
        Route("/playground/ask", ask, methods=["POST"]),
        Route("/models/{name}/{version:int}", change, methods=["POST"]),
        Route("/runs/{run}", change, methods=["POST"]),
    ]


def _routes(pages: Pages) -> list[object]:
    def route(path: str, make: Callable[[Request], object], kind: str = "text/html", **headers: str) -> Route:
        return _route(path, make, kind, headers)

    sandboxed = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # a file that a run left: no script in any case
    return [
        route("/", pages.runs),
        route("/compare", pages.compare),
        route("/compare.csv", pages.compare_csv, "text/csv"),
        route("/models", pages.model_list),
        route("/models/{name}/{version:int}", pages.model),
        route("/models/{name}/{version:int}/card.md", pages.card, "text/markdown"),
        route("/traces", pages.traces),
        route("/traces/outside", pages.trace),
        route("/traces/outside/trace.{suffix}", pages.trace_file, content_security_policy=sandboxed),
        _growing("/studies", pages.studies),
        _growing("/studies/{study}", pages.study),
        route("/studies/{study}/report.html", pages.study_report, content_security_policy=sandboxed),
        route("/studies/{study}/plots/{file}", pages.study_plot),
        _growing("/ensembles", pages.votes),
        route("/ensembles/plots/{file}", pages.vote_plot),
        _growing("/requests", pages.requests),
        route("/requests/plots/{file}", pages.request_plot),
        route("/compare/plots/{file}", pages.compare_plot),
        route("/playground", pages.play),
        *_posts(pages),
        route("/runs/{run}", pages.run),
        route("/runs/{run}/trace", pages.trace),
        route("/runs/{run}/trace.{suffix}", pages.trace_file, content_security_policy=sandboxed),
        route("/runs/{run}/report.html", pages.report, content_security_policy=sandboxed),
        route("/runs/{run}/metrics.csv", pages.metrics_csv, "text/csv"),
        route("/runs/{run}/charts/{file}", pages.chart_file),
        route("/api/runs/{run}/charts", pages.charts, "application/json"),
        route("/runs/{run}/plots/{file}", pages.run_plot),
        route("/api/compare", pages.overlay, "application/json"),
        _stream(pages, "/api/runs/{run}/live", pages.run_events),
        _stream(pages, "/api/live", pages.table_events),
        _stream(pages, "/api/studies/{study}/live", pages.study_events),
        _stream(pages, "/api/asked/live", pages.asked_events),
        route("/static/{name}", pages.static, cache_control="no-cache"),
    ]


def _problem(pages: Pages, status: int, text: str) -> Response:
    from starlette.responses import Response

    from ..reports.markup import element
    from .frame import link, page

    body = page(
        "Not there" if status == 404 else "It did not work",
        element("h1", None, str(status)),
        element("p", {"class": "lead"}, text),
        link("All runs", "/"),
        tabs=pages.tabs,
    )
    return Response(body, status, media_type="text/html")


def make_app(
    root: str | Path, *, playground: Playground | None = None, hosts: Iterable[str] = (), token: str = "", every_s: float = 0.5, write: bool = False
) -> Guard:  # fmt: skip
    """The dashboard as an ASGI application; closing is the caller's.

    Args:
        root: the folder of runs; `models` in it is the registry.
        playground: models that may be asked; None switches the page off.
        hosts: names that it may be asked under, besides those of this machine.
        token: what a question must bring along; random where empty.
        every_s: how often files are looked at for live pages.
        write: whether stages and tags of models, and tags and notes of runs, may be changed; else everything but a question is read-only.

    Raises:
        NotFoundError: there is no such folder. ConfigError: starlette is not installed, or `every_s` is not positive.
    """
    return build(Path(root), playground, hosts, token or secrets.token_urlsafe(24), every_s, write=write)[0]


_API = ("/api/v1", "/v1", "/metrics", "/openapi.json")
_App: TypeAlias = Callable[..., Awaitable[None]]


def beside(api: _App, root: str | Path, *, write: bool = False) -> tuple[_App, Callable[[], None]]:
    """A server's application with the dashboard at all addresses that are not the server's own; and what ends the dashboard's live streams.

    For servers on this machine only: the dashboard knows no keys.

    Args:
        api: an ASGI application that serves /api/v1, /v1, /metrics and /openapi.json.
        root: the folder of runs.
        write: as in `make_app`.

    Raises:
        NotFoundError: there is no such folder.
    """
    pages, end = build(Path(root), None, (), secrets.token_urlsafe(24), 0.5, write=write)

    async def both(scope: MutableMapping[str, object], receive: object, send: object) -> None:
        path = str(scope.get("path", ""))
        own = scope["type"] != "http" or any(path == start or path.startswith(f"{start}/") for start in _API)
        await (api if own else cast("_App", pages))(scope, receive, send)

    return both, end


def build(
    root: Path, playground: Playground | None, hosts: Iterable[str], token: str, every_s: float, *, write: bool = False
) -> tuple[Guard, Callable[[], None]]:
    """The application, and what ends its live streams."""
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.responses import Response
    except ImportError as error:
        raise ConfigError("The dashboard needs starlette, which is not installed. Install it: pip install 'crucible-framework[serve]'") from error
    if not root.is_dir():
        raise NotFoundError(f"There is no folder {str(root)!r}. Name the folder that holds the runs, or make one: crucible demo --quick")
    if not every_s > 0:
        raise ConfigError(f"every_s is {every_s!r}; expected a positive number of seconds.")
    pages = Pages(root, playground, token, every_s, write=write)

    async def known(request: Request, error: Exception) -> Response:
        kinds = ((NotFoundError, 404), (LockedError, 409), (AuthError, 403), ((ConfigError, ValueError), 400))
        status = next((code for kind, code in kinds if isinstance(error, kind)), 500)
        if request.method == "POST":
            return Response(orjson.dumps({"error": str(error)}), status, media_type="application/json")
        return _problem(pages, status, str(error))

    async def http(request: Request, error: Exception) -> Response:
        del request
        status = error.status_code if isinstance(error, HTTPException) else 500
        return _problem(pages, status, "There is no such page." if status == 404 else "This address cannot be asked that way.")

    handlers = {CrucibleError: known, orjson.JSONDecodeError: known, HTTPException: http}
    app = Starlette(routes=_routes(pages), exception_handlers=handlers)  # type: ignore[arg-type]
    app.router.redirect_slashes = False
    return Guard(app, token=token, hosts=(*LOCAL_HOSTS, *hosts)), pages.closing.set
