"""The runs of a workspace: found, compared, labelled and given artifacts, by many processes at once, with an index that is never the truth."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crucible_framework import events, files
from crucible_framework.errors import ConfigError, CorruptError, NotFoundError, UnknownNameError
from crucible_framework.records import Json
from crucible_framework.store import RunInfo, Tracker, open_run, read_run
from crucible_framework.store.query import Condition, direction_of, ordered, parse_condition
from crucible_framework.store.system import SystemWatch, system_row

if TYPE_CHECKING:
    from tests.store.conftest import Children

pytestmark = pytest.mark.usefixtures("quick")


def make(root: Path, name: str, *, rank: int = 8, losses: tuple[float, ...] = (2.0, 1.0), **config: Json) -> None:
    with open_run(root / name, {"base_model": "tiny", "lora": {"rank": rank}, **config}) as run:
        for step, loss in enumerate(losses, start=1):
            run.log_metrics({"step": step, "epoch": step / 2, "train/loss": loss})
            run.log_timing({"step": step, "tokens_per_s": 10.0 * step})


@pytest.fixture
def tracker(tmp_path: Path) -> Tracker:
    root = tmp_path / "runs"
    make(root, "a", rank=4, losses=(2.0, 0.5), seed=1)
    make(root, "b", rank=8, losses=(2.0, 0.25))
    make(root, "c", rank=16, losses=(float("nan"),))
    with pytest.raises(ValueError, match="bad"), open_run(root / "d", {"base_model": "other"}):
        raise ValueError("bad")
    return Tracker(root)


def names(found: tuple[RunInfo, ...]) -> list[str]:
    return [info.name for info in found]


def test_runs_are_found_by_settings_metrics_tags_and_words(tracker: Tracker) -> None:
    tracker.tag("b", {"owner": "Ada"})
    tracker.note("a", "the one with the odd schedule")
    assert names(tracker.runs()) == ["a", "b", "c", "d"]
    assert names(tracker.runs(where=["train/loss < 0.4"])) == ["b"]
    assert names(tracker.runs(where=["lora.rank >= 8", "base_model = tiny"])) == ["b", "c"]
    assert names(tracker.runs(where=["status = failed"])) == ["d"]
    assert names(tracker.runs(where=["name != ?"])) == []
    assert names(tracker.runs(where=["tag.owner = ada"])) == names(tracker.runs(tags={"owner": "Ada"})) == ["b"]
    assert names(tracker.runs(text="ODD")) == names(tracker.runs(where=["seed=1"])) == ["a"]
    assert names(tracker.runs(where=["epochs = 1"])) == ["a", "b"]
    assert names(tracker.runs(order_by="train/loss")) == ["b", "a", "c", "d"]
    assert names(tracker.runs(order_by="lora.rank", direction="max", limit=2)) == ["c", "b"]
    with pytest.raises(ConfigError, match=r"more of 'lora.rank' is better"):
        tracker.runs(order_by="lora.rank")
    with pytest.raises(UnknownNameError, match="Did you mean 'train/loss'"):
        tracker.runs(where=["train/los < 1"])
    with pytest.raises(ConfigError, match="is no condition"):
        tracker.runs(where=["train/loss"])
    assert Tracker(tracker.root / "nowhere").runs(where=["x < 1"]) == ()


def test_a_comparison_names_what_differs(tracker: Tracker) -> None:
    found = tracker.compare(["a", "b"])
    assert found.params == {"lora.rank": (4, 8), "seed": (1, None)}
    assert found.same == {"base_model": "tiny"}
    assert found.metrics["train/loss"] == (0.5, 0.25)
    with pytest.raises(ConfigError, match="at least two"):
        tracker.compare(["a"])
    with pytest.raises(NotFoundError, match="No run is called 'aa'"):
        tracker.compare(["a", "aa"])
    for bad in ("../a", ".", "", "a/"):
        with pytest.raises(NotFoundError):
            tracker.get(bad)


def test_curves_lie_over_steps_epochs_and_time(tracker: Tracker) -> None:
    assert tracker.history("a", "train/loss") == ((1.0, 2.0), (2.0, 0.5))
    assert tracker.history("a", "train/loss", by="epoch") == ((0.5, 2.0), (1.0, 0.5))
    assert tracker.history("a", "tokens_per_s") == ((1.0, 10.0), (2.0, 20.0))
    with pytest.raises(ConfigError, match="not written over time"):
        tracker.history("a", "tokens_per_s", by="time")
    with pytest.raises(NotFoundError, match="No metric is called 'loss'"):
        tracker.history("a", "loss")


def test_the_machine_is_watched_while_a_run_goes_on(tmp_path: Path) -> None:
    row = system_row(tmp_path)
    assert {"ts", "cpu_s", "load", "threads", "disk_free_bytes"} <= row.keys()
    assert float(str(row["disk_free_bytes"])) > 0
    seen, enough = list[dict[str, Json]](), threading.Event()

    def write(row: dict[str, Json]) -> None:
        seen.append(row)
        enough.set()

    watch = SystemWatch(tmp_path, write, every_s=0.001)
    assert enough.wait(20)
    watch.close()
    assert float(str(seen[0]["cpu_share"])) >= 0
    with open_run(tmp_path / "runs" / "a", {"base_model": "tiny"}) as run:
        run.log_metrics({"step": 3, "train/loss": 1.0})
        run.log_system({"ts": run_time(run.folder) + 2.0, "memory_bytes": 5})
    assert Tracker(tmp_path / "runs").history("a", "memory_bytes") == ((3.0, 5.0),)
    assert Tracker(tmp_path / "runs").history("a", "memory_bytes", by="time") == ((2.0, 5.0),)
    assert "memory_bytes" not in (tmp_path / "runs" / "a" / "metrics.jsonl").read_text()


def run_time(folder: Path) -> float:
    return read_run(folder).created_at


# ------------------------------------------------------------------------------------------------------------ labels
def test_labels_change_while_a_run_goes_on_and_never_its_own_files(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    with open_run(tmp_path / "a", {"base_model": "tiny"}) as run, events.collect() as seen:
        before = (run.folder / "run.json").read_bytes()
        assert tracker.tag("a", {"x": "1", "y": "2"}).tags == {"x": "1", "y": "2"}
        assert tracker.tag("a", {"x": None, "z": "3"}).tags == {"y": "2", "z": "3"}
        assert tracker.note("a", "slow").notes == "slow"
        assert (run.folder / "run.json").read_bytes() == before
    assert [e["name"] for e in seen if e["name"] in ("run.tagged", "run.noted")] == ["run.tagged", "run.tagged", "run.noted"]
    assert tracker.get("a").notes == "slow"
    with pytest.raises(ConfigError, match="expected text"):
        tracker.tag("a", {"x": 1})  # type: ignore[dict-item]
    (tmp_path / "a" / "labels.json").write_text("[]")
    with pytest.raises(CorruptError, match="expected a JSON object"):
        tracker.get("a")
    assert tracker.runs()[0].status == "broken"


def test_artifacts_of_runs_are_kept_until_nobody_has_them(tracker: Tracker, tmp_path: Path) -> None:
    (tmp_path / "plot.svg").write_bytes(b"<svg/>")
    one = tracker.attach("a", tmp_path / "plot.svg")
    same = tracker.attach("b", b"<svg/>", as_name="copy.svg")
    assert one.key == same.key
    assert tracker.artifact("a", "plot.svg") == b"<svg/>"
    assert tracker.get("b").artifacts == {"copy.svg": one.key}
    loose = tracker.artifacts.put(b"x" * 100)
    assert [artifact.key for artifact in tracker.artifacts.prune(0)] == [loose]
    newer = tracker.attach("a", b"new", as_name="plot.svg")
    assert tracker.artifacts.owned() == {"a": (newer.key,), "b": (one.key,)}
    assert tracker.artifact("b", "copy.svg") == b"<svg/>"
    with pytest.raises(NotFoundError, match="No artifact is called 'plot'"):
        tracker.artifact("a", "plot")
    with pytest.raises(ConfigError, match="not safe"):
        tracker.attach("a", b"no name")
    for path in sorted((tracker.root / "b").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (tracker.root / "b").rmdir()
    assert tracker.rebuild() == {"runs": 3, "models": 0, "artifacts": 2}
    assert [artifact.key for artifact in tracker.artifacts.prune(0)] == [one.key]


def test_problems_are_found_and_nothing_is_changed(tracker: Tracker) -> None:
    assert tracker.problems() == ()
    key = tracker.attach("a", b"bytes", as_name="x").key
    (tracker.root / "artifacts" / key[:2] / key).write_bytes(b"other")
    (tracker.root / "b" / "run.json").write_text("{")
    found = dict(tracker.problems())
    assert set(found) == {"b", f"artifact {key[:12]}…"}
    assert "not valid JSON" in found["b"]


# ------------------------------------------------------------------------------------------------------------- index
def dump(tracker: Tracker) -> list[tuple[str, str, str]]:
    db = sqlite3.connect(tracker.root / ".runs.sqlite")
    try:
        return db.execute("SELECT name, stamp, body FROM runs ORDER BY name").fetchall()
    finally:
        db.close()


def test_the_index_follows_every_change_and_rebuilt_is_equal(tracker: Tracker) -> None:
    first = tracker.runs()
    tracker.tag("a", {"x": "1"})
    make(tracker.root, "e")
    (tracker.root / "d" / "run.json").unlink()
    found, rows = tracker.runs(), dump(tracker)
    assert names(found) == ["a", "b", "c", "e"]
    assert found[0].tags == {"x": "1"}
    assert found[1] == first[1]
    assert tracker.rebuild()["runs"] == 4
    assert dump(tracker) == rows
    assert tracker.runs() == found == tuple(sorted(map(tracker.get, "abce"), key=lambda info: info.created_at))


def test_only_changed_runs_are_read_again(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker.runs()
    read: list[str] = []
    real = files.read_lines

    def counted(path: Path) -> list[dict[str, Json]]:
        read.append(path.parent.name)
        return real(path)

    monkeypatch.setattr(files, "read_lines", counted)
    tracker.runs()
    assert read == []
    tracker.note("c", "changed")
    read.clear()
    assert tracker.runs(text="changed")[0].name == "c"
    assert read == ["c"]


@pytest.mark.parametrize(
    "statement", ["DROP TABLE runs", "PRAGMA user_version = 0", "DELETE FROM runs WHERE name = 'a'", "UPDATE runs SET body = '{'", "UPDATE runs SET stamp = ''"]
)
def test_a_changed_database_costs_time_and_no_run(tracker: Tracker, statement: str) -> None:
    found, rows = tracker.runs(), dump(tracker)
    db = sqlite3.connect(tracker.root / ".runs.sqlite", isolation_level=None)
    db.execute(statement)
    db.close()
    assert tracker.runs() == found
    tracker.rebuild()
    assert dump(tracker) == rows


@pytest.mark.parametrize("content", [b"", b"no database" * 200])
def test_a_damaged_database_costs_time_and_no_run(tracker: Tracker, content: bytes) -> None:
    found = tracker.runs()
    (tracker.root / ".runs.sqlite").write_bytes(content)
    assert tracker.runs() == found
    assert tracker.runs() == found
    assert len(dump(tracker)) == 4


def test_a_newer_layout_is_left_alone(tracker: Tracker) -> None:
    found = tracker.runs()
    db = sqlite3.connect(tracker.root / ".runs.sqlite", isolation_level=None)
    db.execute("PRAGMA user_version = 99")
    db.close()
    make(tracker.root, "e")
    assert names(tracker.runs()) == [*names(found), "e"]
    assert len(dump(tracker)) == 4


def test_a_killed_run_is_interrupted_although_no_file_changed(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom crucible_framework.store import open_run\n"
        "with open_run(Path(sys.argv[1]), {'base_model': 'tiny'}) as run:\n    run.log_metrics({'step': 1, 'train/loss': 1.0})\n"
        "    print('now', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        tracker = Tracker(tmp_path)
        assert tracker.runs(where=["status = running"])[0].steps == 1
        rows = dump(tracker)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert names(tracker.runs(where=["status = interrupted"])) == ["a"]
    tracker.rebuild()
    assert dump(tracker) == rows


def test_eight_processes_write_at_once_and_nothing_is_lost(tmp_path: Path, children: Children) -> None:
    make(tmp_path, "shared")

    def work(who: int) -> None:
        own = Tracker(tmp_path)
        for turn in range(3):
            make(tmp_path, f"run-{who}-{turn}", losses=tuple(float(step) for step in range(5)))
            own.tag("shared", {f"{who}-{turn}": "yes"})
            own.attach("shared", f"{who}".encode(), as_name=f"{who}")
            found = own.runs(where=["steps = 5"])
            assert f"run-{who}-{turn}" in names(found)

    started = [children.start(partial(work, who)) for who in range(8)]
    assert [children.wait(child) for child in started] == [0] * 8
    tracker = Tracker(tmp_path)
    found = tracker.runs()
    assert sorted(names(found)) == sorted(["shared", *(f"run-{who}-{turn}" for who in range(8) for turn in range(3))])
    assert all([row["train/loss"] for row in files.read_lines(info.folder / "metrics.jsonl")] == [0, 1, 2, 3, 4] for info in found if info.name != "shared")
    assert tracker.get("shared").tags == {f"{who}-{turn}": "yes" for who in range(8) for turn in range(3)}
    assert {name: tracker.artifact("shared", name) for name in tracker.get("shared").artifacts} == {str(who): str(who).encode() for who in range(8)}
    rows = dump(tracker)
    tracker.rebuild()
    assert dump(tracker) == rows
    assert tracker.problems() == ()


def test_a_busy_database_is_waited_for_or_done_without(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tracker.runs()
    monkeypatch.setattr("crucible_framework.store.run_index._BUSY_S", 0.05)
    db = sqlite3.connect(tracker.root / ".runs.sqlite", isolation_level=None)
    try:
        db.execute("BEGIN EXCLUSIVE")
        tracker.tag("a", {"late": "yes"})
        assert tracker.runs(tags={"late": "yes"})[0].name == "a"
    finally:
        db.close()
    assert len(tracker.runs()) == len(found)


# -------------------------------------------------------------------------------------------------------- conditions
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(value=st.one_of(st.floats(), st.integers(), st.text(), st.none(), st.booleans()), limit=st.floats(allow_nan=False))
def test_a_condition_and_its_opposite_share_no_value(value: Json, limit: float) -> None:
    for sign, opposite in (("<", ">="), (">", "<="), ("=", "!=")):
        one, other = (parse_condition(f"x {each} {limit!r}") for each in (sign, opposite))
        assert not (one.fits(value) and other.fits(value))
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
            assert one.fits(value) or other.fits(value)


def test_text_conditions_take_a_star_and_no_size() -> None:
    assert parse_condition("name = Demo*") == Condition(key="name", sign="=", text="Demo*", number=None)
    assert parse_condition("name=demo*").fits("DEMO-1")
    assert not parse_condition("name!=demo*").fits("demo")
    assert not parse_condition("seed = 1").fits("one")
    with pytest.raises(ConfigError, match="'abc' is no number"):
        parse_condition("name < abc")


def test_directions_are_stated_or_known_or_asked_for() -> None:
    assert (direction_of("dev/loss"), direction_of("eval/minifact/label_accuracy")) == ("min", "max")
    assert direction_of("mine", {"mine": "min"}) == direction_of("loss", {"loss": "min"}) == "min"
    with pytest.raises(ConfigError, match="Nothing says"):
        direction_of("mine")


@given(st.lists(st.one_of(st.none(), st.floats())))
def test_order_puts_the_best_first_and_the_unknown_last(values: list[float | None]) -> None:
    pairs = list(enumerate(values))
    for direction, best in (("min", min), ("max", max)):
        found = [values[index] for index in ordered(pairs, direction)]  # type: ignore[arg-type]
        known = [value for value in values if value is not None and value == value]
        assert len(found) == len(values)
        if known:
            assert found[0] == best(known)
        assert found[: len(known)] == sorted(known, reverse=direction == "max")


def test_a_workspace_is_plain_files(tracker: Tracker) -> None:
    tracker.tag("a", {"x": "1"})
    assert json.loads((tracker.root / "a" / "labels.json").read_text()) == {"tags": {"x": "1"}, "notes": "", "artifacts": {}}
    tracker.runs()
    tracker.root.replace(tracker.root.with_name("moved"))
    assert Tracker(tracker.root.with_name("moved")).runs(tags={"x": "1"})[0].folder == tracker.root.with_name("moved") / "a"
