"""Experiments, ensembles, requests, gradient health and watched samples: what the pages say is what the files say, and it comes live."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, Literal

import pytest

from crucible_framework.backends import connect
from crucible_framework.dashboard import Dashboard, Playground, studies_page
from crucible_framework.dashboard.asked import AskedEvents
from crucible_framework.dashboard.figures import plot_csv, plot_svg, plots_in, section
from crucible_framework.experiments import study_overview
from crucible_framework.inference.telling import prompt_digest
from crucible_framework.reports.parts import LineChart, Point, Ranks, Scatter, Section, Series, Table
from crucible_framework.store import Tracker

from .asked import ask_everything
from .conftest import Client, MakeRun, build_run
from .payloads import PAYLOADS


def plain(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


def test_the_experiment_shows_its_matrix_findings_and_runs(served: Client) -> None:
    listed = plain(served.text("/studies"))
    assert "Ranks" in listed
    assert "2 of 2" in listed
    page = served.text("/studies/study")
    assert "2 arms × 1 seed × 1 data set" in listed
    for words in ("lora.rank=2", "lora.rank=4", "seed 0", "Declared before the study", "Reason given: more can change"):
        assert words in plain(page), words
    run = re.search(r'href="(/runs/study%3A%3A[^"]+)"', page)
    assert run is not None
    assert "Curves" in served.text(run[1])
    rows = list(csv.DictReader(io.StringIO(served.text("/studies/study/plots/matrix.csv"))))
    assert [row["row"] for row in rows] == ["lora.rank=2", "lora.rank=4"]


def test_a_study_on_its_way_is_shown_as_far_as_it_is(workspace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(workspace / "study", folder)
    (folder / "findings.json").unlink()
    first, second = sorted((folder / "cells").glob("*.json"))
    first.unlink()
    second.write_text(json.dumps(json.loads(second.read_text()) | {"status": "failed", "failure": {"error": "DataError", "message": "no <b>rows</b>"}}))
    overview = study_overview(folder)
    assert (overview.count("pending"), overview.count("failed"), overview.finished, overview.analysed) == (1, 1, False, False)
    with Dashboard(tmp_path) as dashboard:
        page = Client(dashboard.url).text("/studies/half")
        assert "1 cell wait" in plain(page)
        assert "DataError: no &lt;b&gt;rows&lt;/b&gt;" in page
        second.write_text("{")
        assert "broken" in plain(Client(dashboard.url).text("/studies/half"))
        (folder / "plan.json").write_text("[]")
        assert "is no plan of a study" in plain(Client(dashboard.url).text("/studies"))


def test_votes_are_shown_with_every_ballot(served: Client) -> None:
    page = plain(served.text("/ensembles"))
    for words in ("Questions 4", "alpha", "beta", "gamma", "Q one?", "Who voted what"):
        assert words in page, words
    agreement = list(csv.DictReader(io.StringIO(served.text("/ensembles/plots/agreement.csv"))))
    pair = next(row for row in agreement if (row["row"], row["member"]) == ("alpha", "gamma"))
    assert float(pair["% of questions"]) == 0.0
    split = served.text("/ensembles?only=split&q=Q%20two")
    assert "Q two?" in split
    assert "Q one?" not in split


def test_votes_are_judged_by_the_targets_of_evaluations(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "eval" / "base"
    folder.mkdir(parents=True)
    rows = [{"id": "a", "prompt": "Q one?", "target": "yes"}, {"id": "b", "prompt": "Q two?", "target": "no"}, {"id": "c", "prompt": "", "target": ""}]
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{torn")
    ask_everything(tmp_path / "events.jsonl")
    asked = AskedEvents(tmp_path)
    assert asked.targets() == {prompt_digest("Q one?"): "yes", prompt_digest("Q two?"): "no"}
    with Dashboard(tmp_path) as dashboard:
        client = Client(dashboard.url)
        assert "2 of 2 with a truth on file" in plain(client.text("/ensembles"))
        calibration = list(csv.DictReader(io.StringIO(client.text("/ensembles/plots/calibration.csv"))))
        assert [float(row["right, %"]) for row in calibration] == [1.0]


def test_requests_say_what_hedging_saved_and_cost(served: Client) -> None:
    page = plain(served.text("/requests"))
    for words in ("Requests 40", "Rescued", "Saved at p99", "replica", "small", "large", "Who is asked"):
        assert words in page, words
    latency = list(csv.DictReader(io.StringIO(served.text("/requests/plots/latency.csv"))))
    assert {row["series"] for row in latency} == {"as answered", "first call alone (estimated)"}


def test_every_plot_file_is_well_formed_and_stands_alone(served: Client) -> None:
    for path in ("/", "/runs/run-0", "/studies/study", "/ensembles", "/requests", "/compare?run=run-0&run=run-1"):
        links = re.findall(r'href="(/[^"]*(?:plots|charts)/[^"]*\.(svg|csv)[^"]*)"', served.text(path).replace("&amp;", "&"))
        for href, kind in links:
            body = served.text(href)
            if kind == "svg":
                root = ET.fromstring(body)
                assert root.find("{http://www.w3.org/2000/svg}style") is not None, href
            else:
                assert len(body.splitlines()) > 1, href


def test_gradients_per_layer_and_watched_samples_are_on_the_run_page(served: Client) -> None:
    page = served.text("/runs/run-0")
    text = plain(page)
    assert "Gradient health" in text
    assert "exploding 1 of 40" in text
    assert "grad/norm" not in text
    for words in ("Samples as training goes", "said at 20", "said at 40"):
        assert words in text, words
    rows = list(csv.DictReader(io.StringIO(served.text("/runs/run-0/plots/layers.csv"))))
    assert {row["row"] for row in rows} == {"layers.0.q_proj", "layers.1.q_proj", "layers.2.q_proj"}
    assert len(rows) == 120


def test_what_is_asked_comes_live(tmp_path: Path) -> None:
    asked = AskedEvents(tmp_path)
    assert asked.events() == []
    before = asked.signature()
    ask_everything(tmp_path / "events.jsonl", questions=["first?"])
    assert asked.signature() != before
    seen = len(asked.events())
    ask_everything(tmp_path / "events.jsonl", questions=["second?"])
    assert len(asked.events()) == 2 * seen
    (tmp_path / "events.jsonl").unlink()
    assert asked.events() == []


@pytest.mark.parametrize("page", ["/studies", "/ensembles", "/requests", "/", "/models", "/traces"])
def test_an_empty_workspace_says_how_to_fill_it(tmp_path: Path, page: str) -> None:
    with Dashboard(tmp_path) as dashboard:
        assert re.search(r"crucible |Sampler", plain(Client(dashboard.url).text(page)))


def test_text_of_models_is_text_on_every_page(tmp_path: Path, make_run: MakeRun) -> None:
    del make_run
    build_run(tmp_path / "run", steps=6, text=PAYLOADS[0])
    ask_everything(tmp_path / "events.jsonl", questions=PAYLOADS, text=PAYLOADS[14])
    with Dashboard(tmp_path) as dashboard:
        client = Client(dashboard.url)
        for path in ("/ensembles", "/requests", "/runs/run", "/ensembles/plots/agreement.svg", "/runs/run/plots/layers.svg"):
            body = client.text(path)
            assert "<script>window" not in body, path
            assert "<img" not in body, path


def test_only_a_dashboard_that_may_write_changes_models(workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "models", tmp_path / "models")

    def post(url: str, body: object, token: str) -> tuple[int, str]:
        asked = Client(url).ask("/models/judge/1", "POST", json.dumps(body).encode(), content_type="application/json", x_crucible_token=token)
        return asked[0], asked[2].decode()

    with Dashboard(tmp_path) as dashboard:
        page = Client(dashboard.url).text("/models/judge/1")
        assert "crucible-token" not in page
        assert post(dashboard.url, {"stage": "archived"}, "")[0] == 403
    with Dashboard(tmp_path, write=True) as dashboard:
        found = re.search(r'name="crucible-token" content="([^"]+)"', Client(dashboard.url).text("/models/judge/1"))
        assert found is not None
        assert post(dashboard.url, {"stage": "archived"}, "guessed")[0] == 403
        assert post(dashboard.url, {"stage": "nowhere"}, found[1])[0] == 400
        assert post(dashboard.url, {"tags": {"a": 1}}, found[1])[0] == 400
        assert post(dashboard.url, {"name": "other"}, found[1])[0] == 400
        status, body = post(dashboard.url, {"stage": "archived", "tags": {"run": None, "seen": "yes"}}, found[1])
        assert (status, json.loads(body)) == (200, {"stage": "archived", "tags": {"seen": "yes"}})


def test_a_read_only_dashboard_refuses_even_with_its_own_token(workspace: Path) -> None:
    with connect("fake") as backend, Dashboard(workspace, playground=Playground(backend, {"base": "tiny"})) as dashboard:
        client = Client(dashboard.url)
        found = re.search(r'name="crucible-token" content="([^"]+)"', client.text("/playground"))
        assert found is not None
        status, _, body = client.ask("/models/judge/1", "POST", b'{"stage":"archived"}', content_type="application/json", x_crucible_token=found[1])
        assert (status, b"read-only" in body) == (403, True)


def test_runs_are_labelled_where_that_is_allowed(tmp_path: Path) -> None:
    build_run(tmp_path / "run", steps=4)

    def post(url: str, body: object, token: str, run: str = "run") -> tuple[int, str]:
        asked = Client(url).ask(f"/runs/{run}", "POST", json.dumps(body).encode(), content_type="application/json", x_crucible_token=token)
        return asked[0], asked[2].decode()

    with Dashboard(tmp_path) as dashboard:
        assert "crucible-token" not in Client(dashboard.url).text("/runs/run")
        assert post(dashboard.url, {"notes": "x"}, "")[0] == 403
    with Dashboard(tmp_path, write=True) as dashboard:
        found = re.search(r'name="crucible-token" content="([^"]+)"', Client(dashboard.url).text("/runs/run"))
        assert found is not None
        wrongs: list[Any] = [{"notes": 1}, {"tags": {"a": 1}}, {"tags": []}, {"stage": "production"}, {}, []]
        for wrong in wrongs:
            assert post(dashboard.url, wrong, found[1])[0] == 400, wrong
        assert post(dashboard.url, {"notes": "x"}, "guessed")[0] == 403
        assert post(dashboard.url, {"notes": "x"}, found[1], "nothing")[0] == 404
        status, body = post(dashboard.url, {"notes": "<b>half</b>", "tags": {"owner": "ada", "x": None}}, found[1])
        assert (status, json.loads(body)) == (200, {"tags": {"owner": "ada"}, "notes": "<b>half</b>"})
        page = Client(dashboard.url).text("/runs/run")
        assert "&lt;b&gt;half&lt;/b&gt;" in page
        assert "ada" in page
    assert Tracker(tmp_path).get("run").notes == "<b>half</b>"


def test_only_parts_that_changed_go_over_the_wire(tmp_path: Path) -> None:
    ask_everything(tmp_path / "events.jsonl", questions=["first?"])
    with Dashboard(tmp_path) as dashboard:
        client = Client(dashboard.url)
        for path in ("/ensembles", "/requests", "/studies"):
            here = dict(re.findall(r'data-part="([^"]+)" data-digest="([^"]+)"', client.text(path)))
            known = f"{path}?known={','.join(f'{key}:{digest}' for key, digest in here.items())}"
            assert json.loads(client.text(known)) == {"order": list(here), "parts": {}}, path
            assert list(json.loads(client.text(f"{path}?known="))["parts"]) == list(here)
        whole = client.text("/ensembles")
        here = dict(re.findall(r'data-part="([^"]+)" data-digest="([^"]+)"', whole))
        ask_everything(tmp_path / "events.jsonl", questions=["second?"])
        told = json.loads(client.text(f"/ensembles?known={','.join(f'{key}:{digest}' for key, digest in here.items())}"))
        assert "second?" in told["parts"]["votes"]
        assert all(re.search(r'data-digest="([^"]+)"', part)[1] != here[key] for key, part in told["parts"].items())  # type: ignore[index]


def test_what_was_asked_outside_runs_has_a_trace(tmp_path: Path) -> None:
    build_run(tmp_path / "run", steps=4)
    with Dashboard(tmp_path) as dashboard:
        assert "outside runs" not in Client(dashboard.url).text("/traces")
        assert Client(dashboard.url).ask("/traces/outside")[0] == 404
        ask_everything(tmp_path / "events.jsonl", questions=["first?"])
        client = Client(dashboard.url)
        assert 'href="/traces/outside"' in client.text("/traces")
        assert "ensemble.request" in client.text("/traces/outside")
        assert client.text("/traces/outside/trace.mmd").startswith("flowchart")
        assert json.loads(client.text("/traces/outside/trace.json"))["prefix"]


def test_cost_and_ranks_of_a_report_can_be_downloaded() -> None:
    nothing = Table(title="", columns=(), rows=(), source="")
    points = (Point(label="=1+1", x=1.0, y=0.5, low=0.4, high=0.6, best=True), Point(label="b", x=2.0, y=0.4, low=0.3, high=0.5))
    scatter = Scatter(title="Cost", x_label="tokens", y_label="accuracy", points=points, source="", values=nothing)
    ranks = Ranks(title="Ranks", places=(("a", 1.2), ("b", 1.8), ("c", 3.0)), sets=(("a", "b"),), distance=0.9, source="", values=nothing)
    part = Section(key="s", title="S", blocks=(scatter, ranks))
    plots = plots_in([part])
    assert list(plots) == ["s0", "s1"]
    for key in plots:
        assert f'href="/studies/x/plots/{key}.svg"' in section(part, ("studies", "x"))
        assert plot_svg(plots[key], key).count("<svg") == 1
    assert list(csv.reader(io.StringIO(plot_csv(scatter)))) == [
        ["label", "tokens", "accuracy", "low", "high", "undominated"], ["'=1+1", "1.0", "0.5", "0.4", "0.6", "yes"], ["b", "2.0", "0.4", "0.3", "0.5", "no"],
    ]  # fmt: skip
    assert list(csv.reader(io.StringIO(plot_csv(ranks))))[1:] == [["a", "1.2", "b"], ["b", "1.8", "a"], ["c", "3.0", ""]]


def test_every_state_of_a_cell_has_a_colour() -> None:
    style = (Path(studies_page.__file__).parent / "static" / "app.css").read_text()
    for state in studies_page._STATES:
        assert re.search(rf"\.bar-{state}\b", style), state


def test_curves_of_equal_weight_have_colours_of_their_own_in_a_downloaded_plot() -> None:
    roles: tuple[Literal["hue0", "hue1", "hue2"], ...] = ("hue0", "hue1", "hue2")
    series = tuple(Series(name=role, x=(0.0, 1.0), y=(0.0, 1.0), role=role) for role in roles)
    table = Table(title="t", columns=("a",), rows=(), source="")
    drawn = plot_svg(LineChart(title="t", x_label="x", y_label="y", series=series, source="", values=table), "t")
    style = dict(re.findall(r"\.curve\.(hue\d)[^{]*\{stroke:(#\w+)", drawn))
    legend = re.findall(r'stroke="(#\w+)"', drawn)
    assert legend == [style["hue0"], style["hue1"], style["hue2"]]
    assert len(set(legend)) == 3
