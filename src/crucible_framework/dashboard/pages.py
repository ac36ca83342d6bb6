"""What each address shows: from a request to a page, to data, or to a stream. Reads through the workspace, draws through the page files."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from ..errors import AuthError, ConfigError, CrucibleError, NotFoundError
from ..experiments import StudyOverview, study_overview
from ..records import Json
from ..reports.cards import model_card
from ..reports.parts import Document
from ..reports.requests import HedgeSummary, RouteSummary, read_requests, summarise_hedges, summarise_routes
from ..reports.study import study_document
from ..reports.votes import VoteSummary, read_votes, summarise_votes
from ..store import Models, Tracker
from ..store.lineage import ancestry
from ..traces import Trace, load_trace
from . import live
from .asked import AskedEvents
from .figures import Plot, csv_text, plot_csv, plot_svg, plots_in
from .models_page import model_page, models_page
from .play_page import play_page
from .playground import Playground, params_from, verdict_on
from .reading import Workspace
from .request_graph import graph_html, requests_table
from .requests_page import request_plots, requests_page
from .run_pages import MOST_COMPARED, chart_svg, compare_page, compare_plots, run_html, run_plots
from .runs_page import runs_page
from .studies_page import matrix_map, studies_page, study_page
from .trace_page import render_trace, trace_home, trace_html, trace_title, traces_page
from .views import chart_views, compare_runs, run_page, run_rows
from .votes_page import vote_plots, votes_page

if TYPE_CHECKING:
    from starlette.requests import Request

__all__ = ["Pages"]

_STATIC = Path(__file__).with_name("static")
_KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_MOST_POINTS = 5000


class Pages:
    """What the routes call; one for each application. Each method takes a request and gives a page, data, or a stream."""

    def __init__(self, root: Path, playground: Playground | None, token: str, every_s: float, *, write: bool) -> None:
        self.workspace = Workspace(root)
        self.models = Models(root / "models")
        self.asked = AskedEvents(root)
        self.playground = playground
        self.token = token
        self.every_s, self.write = every_s, write
        self.tabs: Sequence[tuple[str, str]] = (("Playground", "/playground"),) if playground else ()
        self.closing = threading.Event()
        self.streams = 0

    # ------------------------------------------------------------------------------------------------------------ pages
    def runs(self, request: Request) -> str:
        """The table of runs."""
        asked = request.query_params
        by, descending = asked.get("sort", "made"), asked.get("desc", "1") == "1"
        now_s = time.time()
        return runs_page(
            run_rows(self.workspace), now_s=now_s, root=str(self.workspace.root), query=asked.get("q", ""), by=by, descending=descending, tabs=self.tabs
        )

    def run(self, request: Request) -> str:
        """One run."""
        name = request.path_params["run"]
        folder = self.workspace.folder(name)
        cursor, parts = live.cursor_now(folder), live.parts_now(folder, self.workspace.info(name).status)
        events = live.last_rows(folder / "events.jsonl")
        token = self.token if self.write and folder.parent == self.workspace.root else ""
        return run_html(run_page(self.workspace, name), events, cursor, parts, self.tabs, report=(folder / "report.html").is_file(), token=token)

    def _chosen(self, request: Request) -> tuple[list[str], str]:
        names = request.query_params.getlist("run")
        if not names or len(names) > MOST_COMPARED:
            raise ConfigError(f"{len(names)} runs are chosen; expected 1 to {MOST_COMPARED}. Choose some in the table of runs.")
        return names, request.query_params.get("metric", "train/loss")

    def compare(self, request: Request) -> str:
        """Several runs beside each other."""
        names, metric = self._chosen(request)
        return compare_page(compare_runs(self.workspace, names), metric, self.tabs)

    def model_list(self, request: Request) -> str:
        """The registry."""
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
        """One version of a model."""
        reference = self._reference(request)
        token = self.token if self.write else ""
        return model_page(self.models.get(reference), ancestry(self.models, reference, self.workspace.root), self.tabs, token)

    def traces(self, request: Request) -> str:
        """The runs that have a trace, and what was asked outside any run."""
        del request
        folders = [("", self.workspace.root), *((info.name, info.folder) for info in self.workspace.infos())]
        return traces_page([(name, load_trace(folder).counts()) for name, folder in folders if (folder / "events.jsonl").is_file()], self.tabs)

    def _traced(self, request: Request) -> tuple[str, Trace]:
        name = request.path_params.get("run", "")
        return name, load_trace(self.workspace.folder(name) if name else self.workspace.root)

    def trace(self, request: Request) -> str:
        """The trace of one run, or of what was asked outside any; or the graph of one request in it."""
        (name, found), asked = self._traced(request), request.query_params
        if "request" in asked:
            return graph_html(name or "outside runs", found, asked["request"], base=trace_home(name), tabs=self.tabs)
        return trace_html(name, found, requests_table(found, trace_home(name)), text=asked.get("q", ""), kind=asked.get("kind", ""), tabs=self.tabs)

    def play(self, request: Request) -> str:
        """The playground."""
        del request
        if self.playground is None:
            raise NotFoundError("The playground is off. Start the dashboard with --playground MODEL.")
        return play_page(self.playground.names, self.token, self.tabs)

    def studies(self, request: Request) -> str:
        """The experiments."""
        del request
        found: list[tuple[str, StudyOverview]] = []
        broken: list[str] = []
        for name in self.workspace.studies():
            try:
                found.append((name, study_overview(self.workspace.root / name)))
            except CrucibleError as error:
                broken.append(f"{name}: {error}")
        return studies_page(found, broken, self.tabs)

    def _study(self, request: Request) -> tuple[str, StudyOverview, Document | None]:
        name = request.path_params["study"]
        overview = study_overview(self.workspace.study(name))
        return name, overview, study_document(overview.folder) if overview.analysed else None

    def study(self, request: Request) -> str:
        """One experiment."""
        stamp = live.study_stamp(self.workspace.study(request.path_params["study"]))
        name, overview, document = self._study(request)
        return study_page(name, overview, document, stamp, self.tabs)

    def _votes(self) -> VoteSummary:
        events = self.asked.events()
        votes = any(event.get("name") == "ensemble.vote" for event in events)
        return summarise_votes(read_votes(events, self.asked.targets() if votes else {}))

    def votes(self, request: Request) -> str:
        """The ensembles."""
        stamp, asked = self.asked.signature(), request.query_params
        return votes_page(self._votes(), asked.get("only", ""), asked.get("q", ""), stamp, self.tabs)

    def _requests(self) -> tuple[HedgeSummary, RouteSummary]:
        events: Sequence[Mapping[str, Json]] = self.asked.events()
        return summarise_hedges(read_requests(events), events), summarise_routes(events)

    def requests(self, request: Request) -> str:
        """Hedged and routed requests."""
        del request
        stamp = self.asked.signature()
        return requests_page(*self._requests(), stamp, self.tabs)

    # ------------------------------------------------------------------------------------------------------------ plots
    def _file(self, request: Request, plots: Mapping[str, Plot]) -> tuple[str, str]:
        key, _, kind = request.path_params["file"].rpartition(".")
        if key not in plots or kind not in ("svg", "csv"):
            raise NotFoundError(f"There is no plot {request.path_params['file']!r}. Take one from its page.")
        return (plot_svg(plots[key], key), "image/svg+xml") if kind == "svg" else (plot_csv(plots[key]), "text/csv")

    def study_plot(self, request: Request) -> tuple[str, str]:
        """A plot of an experiment as a file."""
        _, overview, document = self._study(request)
        return self._file(request, {"matrix": matrix_map(overview), **plots_in(document.sections if document else ())})

    def vote_plot(self, request: Request) -> tuple[str, str]:
        """A plot of the ensembles' page as a file."""
        return self._file(request, vote_plots(self._votes()))

    def request_plot(self, request: Request) -> tuple[str, str]:
        """A plot of the requests' page as a file."""
        return self._file(request, request_plots(*self._requests()))

    def run_plot(self, request: Request) -> tuple[str, str]:
        """A plot of a run's page as a file."""
        return self._file(request, run_plots(run_page(self.workspace, request.path_params["run"])))

    def compare_plot(self, request: Request) -> tuple[str, str]:
        """A plot of a comparison as a file."""
        return self._file(request, compare_plots(compare_runs(self.workspace, self._chosen(request)[0])))

    # ------------------------------------------------------------------------------------------------------------- data
    def charts(self, request: Request) -> object:
        """A run's curves, with the cursor from which live rows go on."""
        name, asked = request.path_params["run"], request.query_params
        low, high = _bound(asked.get("from"), -math.inf), _bound(asked.get("to"), math.inf)
        cursor = live.cursor_now(self.workspace.folder(name))
        return {"cursor": cursor, "charts": chart_views(self.workspace, name, _most(asked.get("most")), low, high)}

    def overlay(self, request: Request) -> object:
        """One metric of several runs."""
        names, metric = self._chosen(request)
        asked = request.query_params
        low, high, most = _bound(asked.get("from"), -math.inf), _bound(asked.get("to"), math.inf), _most(asked.get("most"))
        lines = []
        for name in names:
            points = self.workspace.curves(name).points(metric, most, low, high)
            lines.append({"name": name, "x": [x for x, _ in points], "y": [y for _, y in points]})
        return {"metric": metric, "lines": lines}

    def metrics_csv(self, request: Request) -> str:
        """All metrics of a run."""
        curves = self.workspace.curves(request.path_params["run"])
        columns = {name: dict(curves.points(name, 1 << 30)) for name in curves.names()}
        steps = sorted(set().union(*columns.values()) if columns else ())
        return csv_text(("step", *columns), ((step, *(column.get(step, "") for column in columns.values())) for step in steps))

    def compare_csv(self, request: Request) -> str:
        """One metric of several runs, as a table."""
        names, metric = self._chosen(request)
        found = ((name, x, y) for name in names for x, y in self.workspace.curves(name).points(metric, 1 << 30))
        return csv_text(("run", "step", metric), found)

    def chart_file(self, request: Request) -> tuple[str, str]:
        """A curve of a run as a file."""
        name, file = request.path_params["run"], request.path_params["file"]
        key, _, kind = file.rpartition(".")
        view = next((one for one in chart_views(self.workspace, name, _MOST_POINTS) if one.key == key), None)
        if view is None or kind not in ("svg", "csv"):
            raise NotFoundError(f"The run {name!r} has no chart {file!r}. Take one from its page.")
        if kind == "svg":
            return chart_svg(view), "image/svg+xml"
        return csv_text(("series", "step", view.title), ((line.field, x, y) for line in view.lines for x, y in zip(line.x, line.y, strict=True))), "text/csv"

    def card(self, request: Request) -> str:
        """A version's card."""
        return model_card(self.models, self._reference(request), self.workspace.root)

    def trace_file(self, request: Request) -> tuple[str | bytes, str]:
        """A trace as a file."""
        suffix = request.path_params["suffix"]
        name, trace = self._traced(request)
        if suffix == "mmd":
            return trace.to_mermaid(), "text/plain"
        if suffix == "json":
            return orjson.dumps(trace.to_prov(), option=orjson.OPT_INDENT_2), "application/json"
        return render_trace(trace, trace_title(name)), "text/html"

    def static(self, request: Request) -> tuple[bytes, str]:
        """A style sheet or script."""
        name = request.path_params["name"]
        path = _STATIC.parent.parent / "reports" / name if name == "report.css" else _STATIC / name
        if path.suffix not in _KINDS or not path.is_file():
            raise NotFoundError(f"There is no file {name!r}.")
        return path.read_bytes(), _KINDS[path.suffix]

    def study_report(self, request: Request) -> str:
        """An experiment's report, which may run nothing."""
        path = self.workspace.study(request.path_params["study"]) / "report.html"
        if not path.is_file():
            raise NotFoundError("This experiment has no report yet. Write one with: crucible report FOLDER")
        return path.read_text(encoding="utf-8")

    def report(self, request: Request) -> str:
        """A run's report, which may run nothing."""
        path = self.workspace.folder(request.path_params["run"]) / "report.html"
        if not path.is_file():
            raise NotFoundError("This run has no report yet. Write one with: crucible report RUN")
        return path.read_text(encoding="utf-8")

    def ask(self, body: bytes) -> object:
        """The playground's answers to a question."""
        if self.playground is None:
            raise NotFoundError("The playground is off. Start the dashboard with --playground MODEL.")
        asked = orjson.loads(body)
        if not isinstance(asked, dict) or not isinstance(asked.get("prompt"), str) or not isinstance(asked.get("models"), list) or not asked["models"]:
            raise ConfigError("The question lacks a prompt or models; expected {prompt, models: [...]}. Fill both in.")
        system = asked.get("system")
        names = [str(name) for name in asked["models"]]
        answers = self.playground.ask(names, asked["prompt"], params_from(asked), system if isinstance(system, str) else "")
        rule = asked.get("vote")
        verdict = verdict_on(answers, rule) if isinstance(rule, str) and rule else None
        return {"answers": [answer.plain() for answer in answers], "verdict": verdict}

    def change(self, request: Request, body: bytes) -> object:
        """Gives a version another stage or other tags, or a run other tags or notes; refused where the dashboard only reads."""
        if not self.write:
            raise AuthError("The dashboard is read-only. Start it with --write to change stages, tags and notes.")
        asked = orjson.loads(body)
        if "run" in request.path_params:
            return self._label(request.path_params["run"], asked)
        reference = self._reference(request)
        if not isinstance(asked, dict) or not asked.keys() <= {"stage", "tags"} or not asked:
            raise ConfigError("The change lacks a stage or tags; expected {stage: ...} or {tags: {key: value or null}}.")
        tags = asked.get("tags", {})
        if not isinstance(tags, dict) or not all(value is None or isinstance(value, str) for value in tags.values()):
            raise ConfigError(f"tags is {tags!r}; expected texts by key, null to take one away.")
        if tags:
            self.models.tag(reference, tags)
        if "stage" in asked:
            self.models.promote(reference, asked["stage"])
        changed = self.models.get(reference)
        return {"stage": changed.stage, "tags": dict(changed.tags)}

    def _label(self, run: str, asked: object) -> object:
        folder = self.workspace.folder(run)
        if not isinstance(asked, dict) or not asked.keys() <= {"tags", "notes"} or not asked:
            raise ConfigError("The change lacks tags or notes; expected {tags: {key: value or null}} or {notes: text}.")
        tags, notes, tracker = asked.get("tags", {}), asked.get("notes"), Tracker(folder.parent)
        if not isinstance(tags, dict) or not isinstance(notes, (str, type(None))):
            raise ConfigError(f"tags is {tags!r} and notes {notes!r}; expected texts by key, and a text.")
        if tags:
            tracker.tag(folder.name, tags)
        if notes is not None:
            tracker.note(folder.name, notes)
        changed = tracker.get(folder.name)
        return {"tags": dict(changed.tags), "notes": changed.notes}

    # ------------------------------------------------------------------------------------------------------------- live
    def run_events(self, request: Request) -> AsyncIterator[bytes]:
        """What is new of a run."""
        name, asked = request.path_params["run"], request.query_params
        folder = self.workspace.folder(name)
        cursor = request.headers.get("last-event-id") or asked.get("after", "")
        cursor = live.cursor_now(folder) if cursor == "now" else cursor
        return live.run_stream(self.workspace, name, cursor=cursor, parts=asked.get("parts", ""), closing=self.closing.is_set, every_s=self.every_s)

    def table_events(self, request: Request) -> AsyncIterator[bytes]:
        """What is new in the table of runs."""
        after_s = _bound(request.query_params.get("after"), math.inf)
        return live.table_stream(self.workspace, after_s=after_s, closing=self.closing.is_set, every_s=self.every_s)

    def study_events(self, request: Request) -> AsyncIterator[bytes]:
        """Word that an experiment went on."""
        folder = self.workspace.study(request.path_params["study"])
        after = request.query_params.get("after", "")
        return live.stamp_stream(lambda: live.study_stamp(folder), after=after, closing=self.closing.is_set, every_s=self.every_s)

    def asked_events(self, request: Request) -> AsyncIterator[bytes]:
        """Word that something was asked."""
        after = request.query_params.get("after", "")
        return live.stamp_stream(self.asked.signature, after=after, closing=self.closing.is_set, every_s=max(1.0, self.every_s))

    async def counted(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """A stream that counts among the open ones until it ends."""
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
