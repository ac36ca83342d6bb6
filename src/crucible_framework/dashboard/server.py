"""Routes: an address to a view, a view to bytes. Everything is read-only; the playground, where it is switched on, asks models.

`make_app` gives the ASGI application; the web library is loaded when it is called. This file draws nothing and reads no run itself.
"""

from __future__ import annotations

import csv
import io
import math
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from ..errors import ConfigError, CrucibleError, LockedError, NotFoundError
from ..reports.cards import model_card
from ..store import Models
from ..store.lineage import ancestry
from ..traces import load_trace
from . import live
from .guard import LOCAL_HOSTS, Guard
from .models_page import model_page, models_page
from .play_page import play_page
from .playground import Playground, params_from
from .reading import Workspace
from .run_pages import MOST_COMPARED, chart_svg, compare_page, run_html
from .runs_page import runs_page
from .trace_page import render_trace, trace_html, traces_page
from .views import chart_views, compare_runs, run_page, run_rows

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

__all__ = ["build", "make_app"]

_STATIC = Path(__file__).with_name("static")
_KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_MOST_STREAMS = 64
_MOST_POINTS = 5000


class _Pages:
    """What the routes call; one for each application."""

    def __init__(self, root: Path, playground: Playground | None, token: str, every_s: float) -> None:
        self.workspace = Workspace(root)
        self.models = Models(root / "models")
        self.playground = playground
        self.token = token
        self.every_s = every_s
        self.tabs: Sequence[tuple[str, str]] = (("Playground", "/playground"),) if playground else ()
        self.closing = threading.Event()
        self.streams = 0

    # ------------------------------------------------------------------------------------------------------------ pages
    def runs(self, request: Request) -> str:
        asked = request.query_params
        by, descending = asked.get("sort", "made"), asked.get("desc", "1") == "1"
        now_s = time.time()
        return runs_page(
            run_rows(self.workspace), now_s=now_s, root=str(self.workspace.root), query=asked.get("q", ""), by=by, descending=descending, tabs=self.tabs
        )

    def run(self, request: Request) -> str:
        name = request.path_params["run"]
        folder = self.workspace.folder(name)
        cursor, parts = live.cursor_now(folder), live.parts_now(folder, self.workspace.info(name).status)
        events = live.last_rows(folder / "events.jsonl")
        return run_html(run_page(self.workspace, name), events, cursor, parts, self.tabs, report=(folder / "report.html").is_file())

    def _chosen(self, request: Request) -> tuple[list[str], str]:
        names = request.query_params.getlist("run")
        if not names or len(names) > MOST_COMPARED:
            raise ConfigError(f"{len(names)} runs are chosen; expected 1 to {MOST_COMPARED}. Choose some in the table of runs.")
        return names, request.query_params.get("metric", "train/loss")

    def compare(self, request: Request) -> str:
        names, metric = self._chosen(request)
        return compare_page(compare_runs(self.workspace, names), metric, self.tabs)

    def model_list(self, request: Request) -> str:
        del request
        there = self.models.folder.is_dir()
        broken = [f"{path.name}: {why}" for path, why in self.models.broken()] if there else []
        return models_page(self.models.list() if there else (), broken, self.tabs)

    def _reference(self, request: Request) -> str:
        reference = f"{request.path_params['name']}:{request.path_params['version']}"
        if not self.models.folder.is_dir():
            raise NotFoundError(f"There is no model {reference!r}: nothing is registered in {str(self.models.folder)!r}.")
        return reference

    def model(self, request: Request) -> str:
        reference = self._reference(request)
        return model_page(self.models.get(reference), ancestry(self.models, reference, self.workspace.root), self.tabs)

    def traces(self, request: Request) -> str:
        del request
        rows = []
        for info in self.workspace.infos():
            if (info.folder / "events.jsonl").is_file():
                nodes = load_trace(info.folder).nodes
                spans, decisions, events = (sum(node.kind == kind for node in nodes) for kind in ("span", "decision", "event"))
                rows.append((info.name, spans, decisions, events))
        return traces_page(rows, self.tabs)

    def trace(self, request: Request) -> str:
        name = request.path_params["run"]
        found = load_trace(self.workspace.folder(name))
        return trace_html(name, found, text=request.query_params.get("q", ""), kind=request.query_params.get("kind", ""), tabs=self.tabs)

    def play(self, request: Request) -> str:
        del request
        if self.playground is None:
            raise NotFoundError("The playground is off. Start the dashboard with --playground MODEL.")
        return play_page(self.playground.names, self.token, self.tabs)

    # ------------------------------------------------------------------------------------------------------------- data
    def charts(self, request: Request) -> object:
        name, asked = request.path_params["run"], request.query_params
        low, high = _bound(asked.get("from"), -math.inf), _bound(asked.get("to"), math.inf)
        cursor = live.cursor_now(self.workspace.folder(name))
        return {"cursor": cursor, "charts": chart_views(self.workspace, name, _most(asked.get("most")), low, high)}

    def overlay(self, request: Request) -> object:
        names, metric = self._chosen(request)
        asked = request.query_params
        low, high, most = _bound(asked.get("from"), -math.inf), _bound(asked.get("to"), math.inf), _most(asked.get("most"))
        lines = []
        for name in names:
            points = self.workspace.curves(name).points(metric, most, low, high)
            lines.append({"name": name, "x": [x for x, _ in points], "y": [y for _, y in points]})
        return {"metric": metric, "lines": lines}

    def metrics_csv(self, request: Request) -> str:
        curves = self.workspace.curves(request.path_params["run"])
        columns = {name: dict(curves.points(name, 1 << 30)) for name in curves.names()}
        steps = sorted(set().union(*columns.values()) if columns else ())
        return _csv(("step", *columns), ((step, *(column.get(step, "") for column in columns.values())) for step in steps))

    def compare_csv(self, request: Request) -> str:
        names, metric = self._chosen(request)
        found = ((name, x, y) for name in names for x, y in self.workspace.curves(name).points(metric, 1 << 30))
        return _csv(("run", "step", metric), found)

    def chart_file(self, request: Request) -> tuple[str, str]:
        name, file = request.path_params["run"], request.path_params["file"]
        key, _, kind = file.rpartition(".")
        view = next((one for one in chart_views(self.workspace, name, _MOST_POINTS) if one.key == key), None)
        if view is None or kind not in ("svg", "csv"):
            raise NotFoundError(f"The run {name!r} has no chart {file!r}. Take one from its page.")
        if kind == "svg":
            return chart_svg(view), "image/svg+xml"
        return _csv(("series", "step", view.title), ((line.field, x, y) for line in view.lines for x, y in zip(line.x, line.y, strict=True))), "text/csv"

    def card(self, request: Request) -> str:
        return model_card(self.models, self._reference(request), self.workspace.root)

    def trace_file(self, request: Request) -> tuple[str | bytes, str]:
        name, suffix = request.path_params["run"], request.path_params["suffix"]
        trace = load_trace(self.workspace.folder(name))
        if suffix == "mmd":
            return trace.to_mermaid(), "text/plain"
        if suffix == "json":
            return orjson.dumps(trace.to_prov(), option=orjson.OPT_INDENT_2), "application/json"
        return render_trace(trace, f"Trace of {name}"), "text/html"

    def static(self, request: Request) -> tuple[bytes, str]:
        name = request.path_params["name"]
        path = _STATIC.parent.parent / "reports" / name if name == "report.css" else _STATIC / name
        if path.suffix not in _KINDS or not path.is_file():
            raise NotFoundError(f"There is no file {name!r}.")
        return path.read_bytes(), _KINDS[path.suffix]

    def report(self, request: Request) -> str:
        path = self.workspace.folder(request.path_params["run"]) / "report.html"
        if not path.is_file():
            raise NotFoundError("This run has no report yet. Write one with: crucible report RUN")
        return path.read_text(encoding="utf-8")

    def ask(self, body: bytes) -> object:
        if self.playground is None:
            raise NotFoundError("The playground is off. Start the dashboard with --playground MODEL.")
        asked = orjson.loads(body)
        if not isinstance(asked, dict) or not isinstance(asked.get("prompt"), str) or not isinstance(asked.get("models"), list) or not asked["models"]:
            raise ConfigError("The question lacks a prompt or models; expected {prompt, models: [...]}. Fill both in.")
        system = asked.get("system")
        names = [str(name) for name in asked["models"]]
        answers = self.playground.ask(names, asked["prompt"], params_from(asked), system if isinstance(system, str) else "")
        return {"answers": [answer.plain() for answer in answers]}

    # ------------------------------------------------------------------------------------------------------------- live
    def run_events(self, request: Request) -> AsyncIterator[bytes]:
        name, asked = request.path_params["run"], request.query_params
        folder = self.workspace.folder(name)
        cursor = request.headers.get("last-event-id") or asked.get("after", "")
        cursor = live.cursor_now(folder) if cursor == "now" else cursor
        return live.run_stream(self.workspace, name, cursor=cursor, parts=asked.get("parts", ""), closing=self.closing.is_set, every_s=self.every_s)

    def table_events(self, request: Request) -> AsyncIterator[bytes]:
        after_s = _bound(request.query_params.get("after"), math.inf)
        return live.table_stream(self.workspace, after_s=after_s, closing=self.closing.is_set, every_s=self.every_s)

    async def counted(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        self.streams += 1
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            self.streams -= 1


def _bound(text: str | None, otherwise: float) -> float:
    try:
        value = float(text) if text else otherwise
    except ValueError:
        return otherwise
    return otherwise if math.isnan(value) else value


def _most(text: str | None) -> int:
    return min(_MOST_POINTS, max(16, int(text))) if text and text.isdecimal() and len(text) < 9 else 800


def _csv(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    # a cell that a spreadsheet would run as a formula is marked as text
    writer.writerow([f"'{cell}" if str(cell)[:1] in ("=", "+", "-", "@", "\t") else cell for cell in head])
    for row in rows:
        writer.writerow([f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t") else cell for cell in row])
    return out.getvalue()


def _routes(pages: _Pages) -> list[object]:
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route

    def route(path: str, make: Callable[[Request], object], kind: str = "text/html", **headers: str) -> Route:
        async def answer(request: Request) -> Response:
            made = await run_in_threadpool(make, request)
            body, media = made if isinstance(made, tuple) else (made, kind)
            data = body if isinstance(body, (str, bytes)) else orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_SERIALIZE_DATACLASS)
            return Response(data, media_type=media, headers={key.replace("_", "-"): value for key, value in headers.items()})

        return Route(path, answer)

    def stream(path: str, make: Callable[[Request], AsyncIterator[bytes]]) -> Route:
        async def answer(request: Request) -> Response:
            if pages.streams >= _MOST_STREAMS:
                return Response("Too many pages are open.", 503, media_type="text/plain")
            return StreamingResponse(pages.counted(make(request)), media_type="text/event-stream", headers={"x-accel-buffering": "no"})

        return Route(path, answer)

    async def ask(request: Request) -> Response:
        answer = await run_in_threadpool(pages.ask, await request.body())
        return Response(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")

    sandboxed = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # a file that a run left: no script in any case
    return [
        route("/", pages.runs),
        route("/compare", pages.compare),
        route("/compare.csv", pages.compare_csv, "text/csv"),
        route("/models", pages.model_list),
        route("/models/{name}/{version:int}", pages.model),
        route("/models/{name}/{version:int}/card.md", pages.card, "text/markdown"),
        route("/traces", pages.traces),
        route("/playground", pages.play),
        Route("/playground/ask", ask, methods=["POST"]),
        route("/runs/{run}", pages.run),
        route("/runs/{run}/trace", pages.trace),
        route("/runs/{run}/trace.{suffix}", pages.trace_file, content_security_policy=sandboxed),
        route("/runs/{run}/report.html", pages.report, content_security_policy=sandboxed),
        route("/runs/{run}/metrics.csv", pages.metrics_csv, "text/csv"),
        route("/runs/{run}/charts/{file}", pages.chart_file),
        route("/api/runs/{run}/charts", pages.charts, "application/json"),
        route("/api/compare", pages.overlay, "application/json"),
        stream("/api/runs/{run}/live", pages.run_events),
        stream("/api/live", pages.table_events),
        route("/static/{name}", pages.static, cache_control="no-cache"),
    ]


def _problem(pages: _Pages, status: int, text: str) -> Response:
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


def make_app(root: str | Path, *, playground: Playground | None = None, hosts: Iterable[str] = (), token: str = "", every_s: float = 0.5) -> Guard:
    """The dashboard as an ASGI application; closing is the caller's.

    Args:
        root: the folder of runs; `models` in it is the registry.
        playground: models that may be asked; None switches the page off.
        hosts: names that it may be asked under, besides those of this machine.
        token: what a question must bring along; random where empty.
        every_s: how often files are looked at for live pages.

    Raises:
        NotFoundError: there is no such folder. ConfigError: starlette is not installed, or `every_s` is not positive.
    """
    return build(Path(root), playground, hosts, token or secrets.token_urlsafe(24), every_s)[0]


def build(root: Path, playground: Playground | None, hosts: Iterable[str], token: str, every_s: float) -> tuple[Guard, Callable[[], None]]:
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
    pages = _Pages(root, playground, token, every_s)

    async def known(request: Request, error: Exception) -> Response:
        status = (
            404 if isinstance(error, NotFoundError) else 409 if isinstance(error, LockedError) else 400 if isinstance(error, (ConfigError, ValueError)) else 500
        )
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
