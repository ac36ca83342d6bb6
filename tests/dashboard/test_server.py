"""Every address answers, nobody else may ask, live pages get only what is new, and the server stops by itself."""

from __future__ import annotations

import csv
import http.client
import io
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from crucible_framework.dashboard import Dashboard, make_app
from crucible_framework.errors import ConfigError, NotFoundError
from crucible_framework.files import JsonLines, write_atomic, write_json
from crucible_framework.store import open_run

from .conftest import Client, MakeRun, Tags
from .payloads import PAYLOADS

PAGES = (
    "/", "/?q=run&sort=loss&desc=0", "/compare?run=run-0&run=run-1&metric=dev/loss", "/models", "/models/judge/2", "/traces", "/runs/run-0",
    "/runs/run-0/trace", "/runs/run-0/trace?q=cheap&kind=decision", "/studies", "/studies/study", "/ensembles", "/ensembles?only=split&q=two", "/requests",
)  # fmt: skip
FILES = {
    "/runs/run-0/trace.html": "text/html", "/runs/run-0/trace.mmd": "text/plain", "/runs/run-0/trace.json": "application/json",
    "/runs/run-0/metrics.csv": "text/csv", "/runs/run-0/charts/loss.svg": "image/svg+xml", "/runs/run-0/charts/grad.csv": "text/csv",
    "/models/judge/1/card.md": "text/markdown", "/compare.csv?run=run-0": "text/csv", "/api/runs/run-0/charts": "application/json",
    "/runs/run-0/plots/layers.svg": "image/svg+xml", "/runs/run-0/plots/layers.csv": "text/csv", "/studies/study/plots/matrix.svg": "image/svg+xml",
    "/studies/study/plots/matrix.csv": "text/csv", "/studies/study/plots/arms0.svg": "image/svg+xml", "/studies/study/plots/arms0.csv": "text/csv",
    "/ensembles/plots/agreement.svg": "image/svg+xml", "/ensembles/plots/members.csv": "text/csv", "/requests/plots/latency.svg": "image/svg+xml",
    "/requests/plots/shares.csv": "text/csv", "/compare/plots/d0.svg?run=run-0&run=run-1": "image/svg+xml", "/compare/plots/d0.csv?run=run-0": "text/csv",
    "/api/compare?run=run-0": "application/json", "/static/app.css": "text/css", "/static/report.css": "text/css", "/static/chart.js": "text/javascript",
}  # fmt: skip


@pytest.mark.parametrize("path", [*PAGES, *FILES])
def test_every_address_answers_with_the_headers_that_protect_it(served: Client, path: str) -> None:
    status, headers, body = served.ask(path)
    assert status == 200
    assert body
    assert headers["content-type"].startswith(FILES.get(path, "text/html"))
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy or "script-src" not in policy
    assert "unsafe-inline" not in policy or policy.startswith("sandbox")
    assert (headers["x-content-type-options"], headers["x-frame-options"], headers["referrer-policy"]) == ("nosniff", "DENY", "no-referrer")
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("path", PAGES)
def test_pages_load_nothing_from_elsewhere_and_hold_no_inline_script(served: Client, path: str) -> None:
    for tag, attributes in Tags(served.text(path)).found:
        assert not [key for key in attributes if key.startswith("on") or key == "style"], (tag, attributes)
        for key in ("src", "href", "action"):
            assert re.match(r"(/(?!/)|#|data:,$)", attributes.get(key) or "/"), (tag, attributes)
        if tag == "script":
            assert (attributes.get("src") or "").startswith("/static/")


@pytest.mark.parametrize(
    "path",
    ["/runs/none", "/runs/..%2F..", "/runs/run-0/charts/loss.png", "/runs/run-0/charts/none.svg", "/runs/run-0/report.html", "/models/judge/9",
     "/models/none/1", "/static/..%2Fserver.py", "/static/../server.py", "/static/none.js", "/static/theme", "/nowhere", "/compare?run=none",
     "/playground", "/runs/none/trace", "/studies/none", "/studies/run-0", "/studies/..%2F..", "/studies/study/report.html", "/studies/study/plots/none.svg",
     "/ensembles/plots/agreement.png", "/requests/plots/none.csv", "/runs/study::none", "/runs/study::..", "/runs/..::x"],
)  # fmt: skip
def test_what_is_not_there_is_said_to_be_missing(served: Client, path: str) -> None:
    status, headers, body = served.ask(path)
    assert status == 404
    assert headers["content-security-policy"]
    assert b"Traceback" not in body


def test_a_comparison_of_nothing_or_of_too_much_is_refused(served: Client) -> None:
    assert served.ask("/compare")[0] == 400
    assert served.ask("/compare?" + "&".join(f"run=r{i}" for i in range(17)))[0] == 400


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:80", "", "localhost.evil", "[::2]", "127.0.0.1@evil.example", "0.0.0.0"]
)
def test_a_foreign_host_is_refused(served: Client, host: str) -> None:
    for path in ("/", "/static/app.css", "/api/live"):
        assert served.ask(path, host=host)[0] == 421


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:99", "127.0.0.1", "[::1]:80"])
def test_this_machine_has_several_names(served: Client, host: str) -> None:
    assert served.ask("/static/app.css", host=host)[0] == 200


def test_a_foreign_origin_is_refused_and_our_own_is_not(served: Client) -> None:
    for origin in ("http://evil.example", "null", "https://127.0.0.1.evil.example", f"http://{served.address}.evil", "file://"):
        assert served.ask("/api/runs/run-0/charts", origin=origin)[0] == 403, origin
    assert served.ask("/", origin=f"http://{served.address}")[0] == 200
    assert served.ask("/", sec_fetch_site="cross-site", sec_fetch_mode="no-cors")[0] == 403
    assert served.ask("/", sec_fetch_site="cross-site", sec_fetch_mode="navigate")[0] == 200, "a link from elsewhere may lead here"


def test_nothing_can_be_posted_without_the_token_or_changed_at_all(served: Client) -> None:
    assert served.ask("/playground/ask", "POST", b"{}", content_type="application/json")[0] == 403
    assert served.ask("/", "POST", b"{}", x_crucible_token="wrong", content_type="application/json")[0] == 403
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        assert served.ask("/", method)[0] == 405, method
    status, _, body = served.ask("/", "HEAD")
    assert (status, body) == (200, b"")


def test_data_files_hold_the_numbers(served: Client) -> None:
    rows = list(csv.DictReader(io.StringIO(served.text("/runs/run-0/metrics.csv"))))
    assert len(rows) == 40
    assert rows[0]["step"] == "1.0"
    assert float(rows[-1]["dev/loss"]) == 0.6
    assert rows[0]["dev/loss"] == ""
    drawn = list(csv.reader(io.StringIO(served.text("/compare.csv?run=run-0&run=run-1&metric=dev/loss"))))
    assert drawn == [["run", "step", "dev/loss"], ["run-0", "40.0", "0.6"], ["run-1", "50.0", "0.6"]]
    charts = json.loads(served.text("/api/runs/run-0/charts?from=3&to=5"))
    assert charts["charts"][0]["lines"][0]["x"] == [3, 4, 5]
    lines = json.loads(served.text("/api/compare?run=run-0&run=run-2&most=16&from=x&to=nan"))["lines"]
    assert [line["name"] for line in lines] == ["run-0", "run-2"]
    assert len(lines[1]["x"]) <= 18
    svg = served.text("/runs/run-0/charts/loss.svg")
    assert svg.startswith("<svg")
    assert 'xmlns="http://www.w3.org/2000/svg"' in svg
    assert "polyline" in svg


def test_a_name_that_a_spreadsheet_would_run_is_marked_as_text(tmp_path: Path, make_run: MakeRun) -> None:
    make_run(tmp_path / "=cmd()", steps=2)
    with Dashboard(tmp_path) as dashboard:
        found = Client(dashboard.url).text("/compare.csv?run=" + quote("=cmd()"))
    assert found.splitlines()[1].startswith("'=cmd()")


def test_a_report_is_shown_without_the_right_to_run(tmp_path: Path, make_run: MakeRun) -> None:
    (make_run(tmp_path / "a", steps=2) / "report.html").write_text("<script>alert(1)</script>")
    with Dashboard(tmp_path) as dashboard:
        client = Client(dashboard.url)
        status, headers, _ = client.ask("/runs/a/report.html")
        assert 'href="/runs/a/report.html"' in client.text("/runs/a")
    assert status == 200
    assert headers["content-security-policy"].startswith("sandbox; default-src 'none'")


def test_an_empty_workspace_says_how_to_begin(tmp_path: Path) -> None:
    with Dashboard(tmp_path) as dashboard:
        client = Client(dashboard.url)
        assert "crucible demo --quick" in client.text("/")
        assert "No model is registered" in client.text("/models")
        assert client.ask("/models/a/1")[0] == 404
        assert "No run has recorded events" in client.text("/traces")


# ----------------------------------------------------------------------------------------------------------------- live
class Stream:
    """Server-sent events as they come."""

    def __init__(self, client: Client, path: str, **headers: str) -> None:
        self.connection = http.client.HTTPConnection(client.address, timeout=20)
        self.connection.request("GET", path, headers={key.replace("_", "-"): value for key, value in headers.items()})
        self.answer = self.connection.getresponse()
        assert self.answer.status == 200
        assert self.answer.getheader("content-type", "").startswith("text/event-stream")

    def events(self) -> Iterator[tuple[str, Any, str, int]]:
        kind, data, identity, size = "", "", "", 0
        while line := self.answer.readline():
            size += len(line)
            text = line.decode().rstrip("\n")
            name, _, value = text.partition(": ")
            kind, data, identity = (value if name == "event" else kind), (value if name == "data" else data), (value if name == "id" else identity)
            if not text and kind:
                yield kind, json.loads(data), identity, size
                kind, data, size = "", "", 0

    def close(self) -> None:
        self.answer.close()
        self.connection.close()


@pytest.fixture
def follow() -> Iterator[Callable[..., Stream]]:
    """Opens streams that are closed at the end."""
    opened: list[Stream] = []

    def open_one(client: Client, path: str, **headers: str) -> Stream:
        opened.append(Stream(client, path, **headers))
        return opened[-1]

    yield open_one
    for stream in opened:
        stream.close()


Follow = Callable[..., Stream]


def test_a_run_sends_only_new_rows_and_says_when_it_ends(tmp_path: Path, follow: Follow) -> None:
    with Dashboard(tmp_path, every_s=0.02) as dashboard, open_run(tmp_path / "a", {"base_model": "tiny"}) as run:
        for step in range(1, 501):
            run.log_metrics({"step": step, "train/loss": 1.0})
        told, pause = tmp_path / "a" / "events.jsonl", threading.Event()  # events are written by a thread of their own
        for _ in range(1000):
            if told.exists() and b"run.started" in told.read_bytes():
                break
            pause.wait(0.01)
        client = Client(dashboard.url)
        cursor = json.loads(client.text("/api/runs/a/charts"))["cursor"]
        stream = follow(client, f"/api/runs/a/live?after={cursor}")
        found = stream.events()
        assert next(found)[:2] == ("hello", {"status": "running"})
        run.log_metrics({"step": 501, "train/loss": 0.5})
        kind, data, identity, size = next(found)
        assert (kind, data) == ("rows", {"metrics": [{"step": 501, "train/loss": 0.5}]})
        assert size < 300, "one row is sent, not the file"
        stream.close()
        run.log_metrics({"step": 502, "train/loss": 0.4})
        again = follow(client, f"/api/runs/a/live?after={cursor}", last_event_id=identity)
        found = again.events()
        next(found)
        assert next(found)[1] == {"metrics": [{"step": 502, "train/loss": 0.4}]}, "a browser that reconnects goes on where it was"
        run.finish({"steps": 502})
        parts = next(event for event in found if event[0] == "parts" and event[1]["status"] == "done")
        assert parts
        write_atomic(tmp_path / "a" / "metrics.jsonl", b'{"step": 1}\n')
        assert next(event for event in found if event[0] == "again")
        assert next(found, None) is None, "the stream ends: the page loads anew"


def test_after_now_skips_what_is_there(tmp_path: Path, make_run: MakeRun, follow: Follow) -> None:
    folder = make_run(tmp_path / "a", steps=20)
    with Dashboard(tmp_path, every_s=0.02) as dashboard:
        stream = follow(Client(dashboard.url), "/api/runs/a/live?after=now")
        found = stream.events()
        next(found)
        log = JsonLines(folder / "metrics.jsonl")
        log.append({"step": 21})
        log.close()
        assert next(found)[1] == {"metrics": [{"step": 21}]}


def test_the_table_sends_only_rows_that_changed(tmp_path: Path, make_run: MakeRun, follow: Follow) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name, steps=3)
    with Dashboard(tmp_path, every_s=0.02) as dashboard:
        stream = follow(Client(dashboard.url), "/api/live")
        found = stream.events()
        assert next(found)[1] == {"runs": 2}
        log = JsonLines(tmp_path / "b" / "metrics.jsonl")
        log.append({"step": 4, "train/loss": 0.125})
        log.close()
        kind, data, _, _ = next(found)
        assert (kind, data["name"], data["new"]) == ("row", "b", False)
        assert "0.125" in data["html"]
        make_run(tmp_path / "c", steps=2)
        assert any(event[1].get("name") == "c" and event[1]["new"] for event in found if event[0] == "row")
        (tmp_path / "a" / "run.json").unlink()
        assert next(event[1] for event in found if event[0] == "gone") == {"names": ["a"]}


def test_it_stops_at_once_although_pages_are_open(tmp_path: Path, make_run: MakeRun, follow: Follow) -> None:
    make_run(tmp_path / "a", steps=2)
    before = set(threading.enumerate())
    dashboard = Dashboard(tmp_path, every_s=0.02).start()
    streams = [follow(Client(dashboard.url), path) for path in ("/api/live", "/api/runs/a/live")]
    start = time.monotonic()
    dashboard.close()
    dashboard.close()
    assert time.monotonic() - start < 5
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "crucible-dashboard" and thread.is_alive()]
    assert len(streams) == 2


def test_what_cannot_be_served_is_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no folder"):
        Dashboard(tmp_path / "none")
    with pytest.raises(ConfigError, match="positive number"):
        make_app(tmp_path, every_s=0)
    with Dashboard(tmp_path) as dashboard:
        port = urlsplit(dashboard.url).port
        assert port is not None
        with pytest.raises(ConfigError, match=f"Port {port} cannot be used"):
            Dashboard(tmp_path, port=port)


# ------------------------------------------------------------------------------------------------------------ injection
@pytest.mark.parametrize("index", range(0, len(PAYLOADS), 6))
def test_no_text_of_a_run_becomes_markup(index: int, tmp_path: Path, make_run: MakeRun) -> None:
    assert len(set(PAYLOADS)) == 60
    plain_run = make_run(tmp_path / "plain", steps=3, evaluated=True, text="words")
    names = []
    for number, text in enumerate(PAYLOADS[index : index + 6]):
        make_run(tmp_path / f"r{number}", steps=3, evaluated=True, text=text)
        write_json(tmp_path / f"r{number}" / "findings.json", {"findings": [{"name": text, "test": text, "why": text, "effect": 0.1, "interval": [0, 1]}]})
        named = text.replace("/", "∕").replace("\\", "").replace("\0", "")[:60]
        if not named.startswith("."):
            shutil.copytree(tmp_path / f"r{number}", tmp_path / named)
            names.append(named)
    write_json(plain_run / "findings.json", {"findings": [{"name": "w", "test": "w", "why": "w", "effect": 0.1, "interval": [0, 1]}]})
    with Dashboard(tmp_path) as dashboard:
        client = Client(dashboard.url)

        def shape(path: str) -> list[tuple[str, tuple[str, ...]]]:
            return [(tag, tuple(sorted(attributes))) for tag, attributes in Tags(client.text(path)).found]

        for page in ("/runs/{}", "/runs/{}/trace", "/compare?run={}&run={}"):
            clean = shape(page.replace("{}", "plain"))
            for number in range(6):
                assert shape(page.replace("{}", f"r{number}")) == clean, (page, PAYLOADS[index + number])
        for path in ("/", *(f"/runs/{quote(name, safe='')}" for name in names)):
            found = Tags(client.text(path)).found
            assert {tag for tag, _ in found} <= ALLOWED
            assert not [attributes for _, attributes in found if any(key.startswith("on") for key in attributes)]
            assert not [a for _, a in found if re.match(r"\s*(javascript|data:(?!,$)|//)", a.get("href") or a.get("src") or "")]


ALLOWED = frozenset(
    re.findall(
        r"\w+",
        "a article aside b body button circle code dd desc details div dl dt figcaption figure footer form h1 h2 h3 head header html input kbd"
        " label li line link main meta nav option output p path polyline rect script section select span summary svg table tbody td text th thead title tr ul",
    )
)


def test_markdown_of_others_stays_text(tmp_path: Path, make_run: MakeRun) -> None:
    from crucible_framework.dashboard import model_card
    from crucible_framework.store import Checkpoints, Models

    folder = make_run(tmp_path / "a", steps=2, evaluated=True, text="<script>x</script> | [a](javascript:b) `c`\n# head")
    models = Models(tmp_path / "models")
    models.register(Checkpoints(folder / "checkpoints").latest(), "m", description="<img src=x onerror=y>", tags={"<b>": "![i](http://x)"})
    card = model_card(models, "m", tmp_path)
    body = card.split("---\n", 2)[2]
    assert not re.search(r"(?<!\\)<\w", body)
    assert not re.search(r"(?<!\\)\]\(", body)
    assert "\n# head" not in body
