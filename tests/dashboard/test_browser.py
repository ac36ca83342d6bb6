"""The pages in Debian's Chromium: every one without a message on the console, no text of a run executed, live numbers, keys, widths."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

import pytest

from crucible_framework.backends import connect
from crucible_framework.dashboard import Dashboard, Playground
from crucible_framework.files import JsonLines
from crucible_framework.store import Tracker, open_run

from .asked import ask_everything
from .conftest import build_run, build_study
from .payloads import PAYLOADS

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
PAGES = (
    "", "runs/run-0", "compare?run=run-0&run=run-1", "studies", "studies/study", "ensembles", "requests", "models", "models/judge/2", "traces",
    "runs/run-0/trace",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def url(workspace: Path) -> Iterator[str]:
    with connect("fake") as backend, Dashboard(workspace, every_s=0.05, playground=Playground(backend, {"base": "tiny", "again": "tiny"})) as dashboard:
        yield dashboard.url


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of 1280 pixels whose console must stay empty and that may ask this machine only."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    said: list[str] = []
    opened.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: said.append(f"asked {request.url}") if not re.match(r"http://127\.0\.0\.1:|data:|blob:", request.url) else None)
    opened.on("dialog", lambda dialog: dialog.accept("pwned"))
    opened.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
    yield opened
    opened.close()
    assert said == []


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as opened:
        yield opened


def until(page: Page, expression: str, seconds: float = 15.0) -> None:
    """Waits for a true expression; playwright's own way needs `eval`, which the pages' policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(20)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_every_page_fits_its_width_and_is_silent(page: Page, url: str, width: int, scheme: Literal["light", "dark"]) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    for path in (*PAGES, "playground"):
        page.goto(url + path)
        page.wait_for_timeout(60)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        assert page.locator("h1").count() == 1
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(251, 250, 248)" if scheme == "light" else "rgb(23, 22, 20)")


def test_no_text_of_a_run_is_executed(page: Page, tmp_path: Path, stack: contextlib.ExitStack) -> None:
    build_run(tmp_path / "all", steps=6, evaluated=True, text=PAYLOADS[0])
    metrics, log = (stack.enter_context(contextlib.closing(JsonLines(tmp_path / "all" / name))) for name in ("metrics.jsonl", "events.jsonl"))
    for text in PAYLOADS:
        metrics.append({"step": 7, text: 1.0})
        metrics.append({"step": 8, text: 2.0})
        log.append({"ts": 1.0, "name": text, "run": "", "span": "", "parent": "", "text": text})
    build_run(tmp_path / "<img src=x onerror=window.pwned=1>", steps=6, text=PAYLOADS[13])
    ask_everything(tmp_path / "events.jsonl", questions=PAYLOADS, text=PAYLOADS[14])
    build_study(tmp_path / "study", name=PAYLOADS[2], because=PAYLOADS[15])
    with Dashboard(tmp_path, every_s=0.05) as dashboard:
        for path in (
            "",
            "runs/all",
            "runs/all/trace",
            "studies",
            "studies/study",
            "ensembles",
            "requests",
            "compare?run=all&metric=" + quote(PAYLOADS[2], safe=""),
            "runs/" + quote("<img src=x onerror=window.pwned=1>"),
        ):
            page.goto(dashboard.url + path)
            page.wait_for_timeout(150)
            if path == "runs/all":
                for text in PAYLOADS:  # and what comes live
                    log.append({"ts": 2.0, "name": text, "text": text})
                until(page, "document.querySelectorAll('#log tr').length > 110")
            assert page.evaluate("window.pwned === undefined"), path
        page.goto(dashboard.url)
        metrics.append({"step": 9, "train/loss": 0.0625})
        until(page, "document.body.textContent.includes('0.0625')")
        assert page.evaluate("window.pwned === undefined")


def test_a_run_grows_before_the_eyes(page: Page, tmp_path: Path) -> None:
    with Dashboard(tmp_path, every_s=0.05) as dashboard, open_run(tmp_path / "a", {"base_model": "tiny"}) as run:
        for step in range(1, 30):
            run.log_metrics({"step": step, "train/loss": 1.0 / step})
        page.goto(dashboard.url + "runs/a")
        page.wait_for_selector("[data-chart=loss] .live-chart polyline")
        until(page, "document.querySelector('#live').textContent === 'live'")
        run.log_metrics({"step": 30, "train/loss": 0.0123})
        until(page, "document.querySelector('[data-chart=loss] output').textContent === '0.0123'")
        run.finish({"steps": 30})
        page.wait_for_selector("#head .state.done")


def test_charts_zoom_hide_and_read_values_by_key(page: Page, url: str) -> None:
    page.goto(url + "runs/run-0")
    chart = page.locator("[data-chart=loss] .live-chart")
    chart.wait_for()
    box = chart.bounding_box()
    assert box is not None
    chart.focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    output = page.locator("[data-chart=loss] output").first
    assert (output.text_content() or "").endswith("@ 39")
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + 80)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 80)
    page.mouse.up()
    until(page, "[...document.querySelectorAll('[data-chart=loss] text')].every(t => t.textContent !== '40')")
    chart.focus()
    page.keyboard.press("Escape")
    until(page, "[...document.querySelectorAll('[data-chart=loss] text')].some(t => t.textContent === '40')")
    page.locator("[data-chart=loss] .key.held_out").click()
    assert page.locator("[data-chart=loss] .key.held_out").get_attribute("aria-pressed") == "false"
    page.locator("#event-filter").fill("checkpoint")
    assert page.locator("#log tr:visible").count() == 1


def test_runs_are_filtered_ordered_and_chosen_by_key(page: Page, url: str) -> None:
    page.goto(url)
    page.keyboard.press("/")
    page.keyboard.type("run-1")
    until(page, "document.querySelectorAll('#rows tr').length === 1")
    page.locator("#q").fill("")
    until(page, "document.querySelectorAll('#rows tr').length === 3")
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    page.keyboard.press("x")
    page.keyboard.press("j")
    page.keyboard.press("x")
    assert page.locator("#compare").text_content() == "Compare 2 runs"
    page.keyboard.press("c")
    page.wait_for_selector("#comparison[data-ready=yes]")
    assert page.locator("#overlay polyline").count() == 4
    page.select_option("#metric", "grad/global_norm")
    until(page, "document.getElementById('chart-title').textContent === 'grad/global_norm'")
    with page.expect_download() as saved:
        page.locator("#svg").click()
    text = Path(saved.value.path()).read_text()
    assert text.startswith("<svg")
    assert "polyline" in text
    page.goto(url + "?sort=loss&desc=0")
    assert page.locator("th[aria-sort=ascending]").text_content() == "Loss ↑"


def test_the_theme_is_kept(page: Page, url: str) -> None:
    page.emulate_media(color_scheme="light")
    page.goto(url)
    page.locator("#theme").click()
    page.locator("#theme").click()
    assert page.locator("#theme").text_content() == "Theme: dark"
    page.goto(url + "models")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 22, 20)"


def test_the_playground_answers_votes_and_shades_tokens(page: Page, url: str) -> None:
    page.goto(url + "playground")
    page.fill("textarea[name=prompt]", "<b>What</b> is water?")
    page.check("#probabilities")
    page.select_option("select[name=vote]", "majority")
    page.keyboard.press("Control+Enter")
    page.locator("#send").click()
    page.wait_for_selector("#answers .verdict-card")
    assert page.locator("#answers article").count() == 3
    assert page.locator("#answers .tokens .p").count() > 2
    assert page.locator("#answers .text.plain").first.is_hidden()
    assert (page.locator("#answers .tokens .p").first.get_attribute("title") or "").endswith("nats")
    page.uncheck("#probabilities")
    assert page.locator("#answers .text.plain").first.is_visible()
    assert page.locator("#answers .verdict-card tbody tr").count() == 2


def test_pages_can_be_read_without_scripts(browser: Browser, url: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto(url + "runs/run-0")
    assert opened.locator("[data-chart=loss] svg polyline").count() >= 2
    opened.goto(url + "?q=run-2")
    assert opened.locator("#rows tr").count() == 1
    context.close()


def test_a_page_that_is_open_follows_what_is_asked(page: Page, tmp_path: Path) -> None:
    ask_everything(tmp_path / "events.jsonl", questions=["first?"])
    with Dashboard(tmp_path, every_s=0.05) as dashboard:
        page.goto(dashboard.url + "ensembles")
        until(page, "document.querySelector('#live').textContent === 'live'")
        ask_everything(tmp_path / "events.jsonl", questions=["second?"])
        until(page, "document.body.textContent.includes('second?')")


def test_stages_and_tags_are_changed_where_that_is_allowed(page: Page, workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "models", tmp_path / "models")
    with Dashboard(tmp_path, write=True) as dashboard:
        page.goto(dashboard.url + "models/judge/2")
        page.select_option("select[name=stage]", "production")
        page.locator("form[data-change=stage] button").click()
        page.wait_for_selector("h1 .state.production")
        page.fill("input[name=key]", "note")
        page.fill("input[name=value]", "<b>ours</b>")
        page.locator("form[data-change=tag] button").click()
        page.get_by_text("<b>ours</b>").wait_for()
    with Dashboard(tmp_path) as dashboard:
        page.goto(dashboard.url + "models/judge/2")
        assert page.locator("form[data-change]").count() == 0


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    build_run(tmp_path / "a", steps=4)
    return tmp_path


@contextlib.contextmanager
def run_shown(page: Page, root: Path, *, write: bool) -> Iterator[None]:
    """The page of the run "a", which is left before its server goes, so that it asks nobody who is not there."""
    with Dashboard(root, every_s=0.05, write=write) as dashboard:
        page.goto(dashboard.url + "runs/a")
        yield
        page.goto("about:blank")


def box(page: Page, name: str) -> Locator:
    return page.get_by_role("textbox", name=name, exact=True)


def send(page: Page, kind: str) -> None:
    """Submits a form of tags or notes; the page is made anew where that was accepted."""
    with page.expect_navigation():
        page.locator(f"form[data-change={kind}] button").click()


def set_tag(page: Page, key: str, value: str) -> None:
    box(page, "Tag").fill(key)
    box(page, "Value").fill(value)
    send(page, "tag")


TAGS = "[...document.querySelectorAll('#labels tbody tr')].map(row => [...row.cells].map(cell => cell.textContent).join('=')).join()"
NOTES = "document.querySelector('#labels p.text')?.textContent ?? ''"


def test_tags_and_notes_of_a_run_are_added_kept_and_removed(page: Page, labelled: Path) -> None:
    text = "Two lines:\n<i>the second</i>"
    with run_shown(page, labelled, write=True):
        set_tag(page, "purpose", "<b>the paper</b>")
        assert page.evaluate(TAGS) == "purpose=<b>the paper</b>"
        box(page, "Notes").fill(text)
        send(page, "notes")
        assert page.evaluate(NOTES) == text
        page.reload()
        assert page.evaluate(TAGS) == "purpose=<b>the paper</b>"
        assert page.evaluate(NOTES) == box(page, "Notes").input_value() == text
        info = Tracker(labelled).get("a")
        assert (dict(info.tags), info.notes) == ({"purpose": "<b>the paper</b>"}, text)
        set_tag(page, "purpose", "")
        assert page.evaluate(TAGS) == ""
        page.reload()
        assert (page.evaluate(TAGS), page.evaluate(NOTES)) == ("", text)
        assert not Tracker(labelled).get("a").tags


def test_a_note_that_is_being_written_is_not_lost(page: Page, labelled: Path) -> None:
    with run_shown(page, labelled, write=True):
        box(page, "Notes").fill("half a thought")
        set_tag(page, "k", "v")
        assert (page.evaluate(TAGS), page.evaluate(NOTES)) == ("k=v", "")
        assert box(page, "Notes").input_value() == "half a thought"
        assert page.locator("#said").text_content() == "These notes are not saved yet."
        Tracker(labelled).note("a", "of another")
        until(page, f"{NOTES} === 'of another'")
        assert box(page, "Notes").input_value() == "half a thought"
        box(page, "Notes").fill("a whole thought")
        send(page, "notes")
        assert page.evaluate(NOTES) == box(page, "Notes").input_value() == "a whole thought"
        assert page.locator("#said").text_content() == ""


def test_notes_that_nobody_writes_follow_what_others_make_of_them(page: Page, labelled: Path) -> None:
    with run_shown(page, labelled, write=True):
        until(page, "document.querySelector('#live').textContent === 'up to date'")
        Tracker(labelled).note("a", "of another")
        until(page, f"{NOTES} === 'of another'")
        assert box(page, "Notes").input_value() == "of another"


def test_a_dashboard_that_only_reads_shows_tags_and_notes_without_controls(page: Page, labelled: Path) -> None:
    Tracker(labelled).tag("a", {"k": "v"})
    Tracker(labelled).note("a", "seen")
    with run_shown(page, labelled, write=False):
        assert (page.evaluate(TAGS), page.evaluate(NOTES)) == ("k=v", "seen")
        assert page.locator("form[data-change], textarea, meta[name=crucible-token]").count() == 0
        assert box(page, "Tag").count() == box(page, "Notes").count() == 0
