"""A run: one writer, append-only rows, a status however it ends, and readers that need no lock."""

from __future__ import annotations

import contextvars
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible_framework import events, files
from crucible_framework.config import fingerprint, to_dict
from crucible_framework.errors import ConfigError, CorruptError, LockedError, NotFoundError, StoreError
from crucible_framework.records import Checkpoint, Json, LoraConfig, TrainConfig
from crucible_framework.store import list_runs, open_run, read_metrics, read_run

if TYPE_CHECKING:
    from tests.store.conftest import Children

Save = Callable[..., Checkpoint]
pytestmark = pytest.mark.usefixtures("quick")
CONFIG: dict[str, Json] = {"base_model": "tiny", "lora": {"rank": 8}, "lr": 0.1}


# ---------------------------------------------------------------------------------------------------------- one run
def test_a_run_leaves_all_of_itself(tmp_path: Path, save: Save) -> None:
    before = time.time()
    with events.collect() as seen, open_run(tmp_path / "first", CONFIG, environment={"torch": "2.13"}) as run:
        assert (run.name, run.resumed, run.fingerprint) == ("first", False, fingerprint(CONFIG))
        assert read_run(run.folder).status == "running"
        for step in (1, 2, 3):
            run.log_metrics({"step": step, "train/loss": 1.0 / step, "note": "x"})
            run.log_timing({"step": step, "step_s": 0.5})
        run.log_metrics({"step": 3, "dev/loss": 0.5})
        checkpoint = save(run.checkpoints, 3)
        run.write_json("data.json", {"rows": 7})
        assert run.metrics() == read_metrics(run.folder)
        run.finish({"final_loss": 0.25})
    info = read_run(tmp_path / "first")
    assert (info.name, info.status, info.base_model, info.steps, info.error) == ("first", "done", "tiny", 3, "")
    assert info.metrics == {"train/loss": 1 / 3, "dev/loss": 0.5}
    assert info.result == {"final_loss": 0.25}
    assert info.environment == {"torch": "2.13"}
    assert info.fingerprint == fingerprint(CONFIG)
    assert info.finished_at is not None
    assert before <= info.created_at <= info.finished_at <= time.time()
    assert checkpoint.local_path == tmp_path / "first" / "checkpoints" / "00000003"
    assert files.read_json(run.folder / "data.json") == {"rows": 7}
    assert files.read_json(run.folder / "config.json") == CONFIG
    assert [row["step_s"] for row in files.read_lines(run.folder / "timings.jsonl")] == [0.5] * 3
    ours = [e["name"] for e in seen]
    assert ours == ["run.started", "checkpoint.saved", "run.ended"]
    assert [row["name"] for row in files.read_lines(run.folder / "events.jsonl")] == ours
    assert [row["run"] for row in files.read_lines(run.folder / "events.jsonl")] == ["first"] * 3


def test_a_training_configuration_reads_back(tmp_path: Path) -> None:
    config = TrainConfig(base_model="tiny", lora=LoraConfig(rank=2, alpha=4), loss={"cross_entropy": 0.8, "kl": 0.2})
    plain = to_dict(config)
    assert isinstance(plain, dict)
    with open_run(tmp_path / "r", plain) as run:
        assert run.fingerprint == fingerprint(config)
    with open_run(tmp_path / "r", plain, resume=True) as run:
        assert run.resumed


@pytest.mark.parametrize(
    ("ending", "status", "error"),
    [(None, "done", ""), (ValueError("no such token"), "failed", "ValueError: no such token"), (KeyboardInterrupt(), "stopped", "KeyboardInterrupt")],
    ids=["normal", "error", "interrupt"],
)
def test_status_after_the_block(tmp_path: Path, ending: BaseException | None, status: str, error: str) -> None:
    def work() -> None:
        with open_run(tmp_path / "r", CONFIG) as run:
            run.finish({"early": True})
            if ending:
                raise ending

    if ending:
        with pytest.raises(type(ending)):
            work()
    else:
        work()
    info = read_run(tmp_path / "r")
    assert (info.status, info.error, info.result) == (status, error, {"early": True})


def test_stop_and_finish_with_a_status(tmp_path: Path) -> None:
    with open_run(tmp_path / "a", CONFIG) as run:
        run.stop()
    with open_run(tmp_path / "b", CONFIG) as run:
        run.finish({"x": 1}, "stopped")
    with open_run(tmp_path / "c", CONFIG) as run:
        run.finish({"x": 1}, "failed")
        run.stop()
    with open_run(tmp_path / "d", CONFIG) as run:
        run.finish({"x": 1})
        run.stop()
    assert [info.status for info in list_runs(tmp_path)] == ["stopped", "stopped", "failed", "stopped"]


def test_rows_need_a_step_and_names_are_safe(tmp_path: Path) -> None:
    with open_run(tmp_path / "r", CONFIG) as run:
        for row in ({"loss": 1.0}, {"step": 1.5}, {"step": "1"}):
            with pytest.raises(ConfigError, match="whole number"):
                run.log_metrics(row)
            with pytest.raises(ConfigError, match="whole number"):
                run.log_timing(row)
        for name in ("run.json", "metrics.jsonl", "../x", ".lock"):
            with pytest.raises(ConfigError):
                run.write_json(name, {})
    assert read_metrics(run.folder) == []
    with pytest.raises(StoreError, match="is closed"):
        run.log_metrics({"step": 1})


# -------------------------------------------------------------------------------------------------------------- resume
def test_a_folder_with_a_run_is_not_taken_by_accident(tmp_path: Path) -> None:
    with open_run(tmp_path / "r", CONFIG) as run:
        run.log_metrics({"step": 1})
    before = (tmp_path / "r" / "run.json").read_bytes()
    with pytest.raises(ConfigError, match=r"holds a run already.*--resume"), open_run(tmp_path / "r", CONFIG):
        pass
    assert (tmp_path / "r" / "run.json").read_bytes() == before
    with open_run(tmp_path / "new", CONFIG, resume=True) as run:
        assert not run.resumed, "resuming nothing starts"


def test_resume_goes_on_where_it_was(tmp_path: Path) -> None:
    with open_run(tmp_path / "r", CONFIG) as run:
        run.log_metrics({"step": 1, "loss": 2.0})
    first = read_run(tmp_path / "r")
    with open_run(tmp_path / "r", CONFIG, resume=True) as run:
        assert run.resumed
        now = read_run(run.folder)
        assert (now.status, now.finished_at, now.created_at) == ("running", None, first.created_at)
        run.log_metrics({"step": 2, "loss": 1.0})
    assert [row["step"] for row in read_metrics(run.folder)] == [1, 2]


def test_another_configuration_is_named_key_by_key(tmp_path: Path) -> None:
    with open_run(tmp_path / "r", {**CONFIG, "a.b": 1}):
        pass
    other: dict[str, Json] = {"base_model": "tiny", "lora": {"rank": 16}, "lr": 0.1, "seed": 3, "a.b": 2}
    with pytest.raises(ConfigError) as caught, open_run(tmp_path / "r", other, resume=True):
        pass
    text = str(caught.value)
    assert "lora.rank was 8 and is 16" in text
    assert "seed was None and is 3" in text
    assert "a.b was 1 and is 2" in text
    assert "base_model" not in text
    assert "Undo the change" in text
    many: dict[str, Json] = {f"k{n}": n for n in range(20)}
    with pytest.raises(ConfigError, match="and 16 more"), open_run(tmp_path / "r", many, resume=True):
        pass
    assert read_run(tmp_path / "r").status == "done"
    with open_run(tmp_path / "r", {**CONFIG, "lora": {"rank": 8.0}, "a.b": 1}, resume=True):
        pass  # equal numbers are no change


def test_rewind_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    with open_run(tmp_path / "r", CONFIG) as run:
        for step in range(5):
            run.log_metrics({"step": step, "loss": step / 2})
            run.log_timing({"step": step, "step_s": 1.0})
        run.rewind(9)
        assert len(run.metrics()) == 5
        run.rewind(2)
        run.log_metrics({"step": 3, "loss": 9.0})
        assert [(row["step"], row["loss"]) for row in run.metrics()] == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 9.0)]
        assert [row["step"] for row in files.read_lines(run.folder / "timings.jsonl")] == [0, 1, 2]
        run.rewind(-1)
        assert run.metrics() == []
        run.log_metrics({"step": 0})
    assert read_metrics(run.folder) == [{"step": 0}]


@settings(max_examples=40)
@given(steps=st.lists(st.integers(0, 9), max_size=12), at=st.integers(-1, 10))
def test_rewind_then_the_same_rows_gives_the_same_bytes(tmp_path_factory: pytest.TempPathFactory, steps: list[int], at: int) -> None:
    folder = tmp_path_factory.mktemp("r") / "r"
    steps.sort()
    with open_run(folder, CONFIG) as run:
        for step in steps:
            run.log_metrics({"step": step, "loss": step / 3})
        whole = (folder / "metrics.jsonl").read_bytes() if steps else b""
    with open_run(folder, CONFIG, resume=True) as run:
        run.rewind(at)
        for step in steps:
            if step > at:
                run.log_metrics({"step": step, "loss": step / 3})
    assert (folder / "metrics.jsonl").read_bytes() == whole if steps else True


def test_a_torn_last_line_is_left_out_and_mended(tmp_path: Path) -> None:
    with open_run(tmp_path / "r", CONFIG) as run:
        run.log_metrics({"step": 1, "loss": 0.5})
    path = tmp_path / "r" / "metrics.jsonl"
    with path.open("ab") as file:
        file.write(b'{"step": 2, "los')
    assert read_metrics(run.folder) == [{"step": 1, "loss": 0.5}]
    assert read_run(run.folder).steps == 1
    with open_run(tmp_path / "r", CONFIG, resume=True) as run:
        run.log_metrics({"step": 2, "loss": 0.25})
    assert [row["step"] for row in read_metrics(run.folder)] == [1, 2]
    path.write_bytes(b'{"step": 1}\n{"step": tw\n{"step": 3}\n')
    with pytest.raises(CorruptError, match=r"metrics\.jsonl:2"):
        read_metrics(run.folder)


# ------------------------------------------------------------------------------------------------------------ two at once
def test_the_second_writer_is_told_at_once(tmp_path: Path, children: Children) -> None:
    with open_run(tmp_path / "r", CONFIG):
        with pytest.raises(LockedError, match="in use"), open_run(tmp_path / "r", CONFIG, resume=True):
            pass

        def other() -> None:
            with pytest.raises(LockedError), open_run(tmp_path / "r", CONFIG, resume=True):
                pass

        assert children.run(other) == 0
        assert read_run(tmp_path / "r").status == "running", "readers need no lock"
    with open_run(tmp_path / "r", CONFIG, resume=True):
        pass


def test_a_killed_run_is_interrupted_and_can_be_resumed(tmp_path: Path, children: Children, save: Save, until: Callable[..., None]) -> None:
    folder = tmp_path / "r"

    def work() -> None:
        with open_run(folder, CONFIG) as run:
            run.log_metrics({"step": 1})
            save(run.checkpoints, 1)
            run.log_metrics({"step": 2})
            (folder / "checkpoints" / ".tmp-00000002-dead").mkdir()
            (folder / ".tmp-x").write_bytes(b"half")
            (folder / "ready").write_bytes(b"")
            time.sleep(60)

    pid = children.start(work)
    until((folder / "ready").exists)
    assert read_run(folder).status == "running"
    with pytest.raises(LockedError), open_run(folder, CONFIG, resume=True):
        pass
    os.kill(pid, signal.SIGKILL)
    assert children.wait(pid) == -signal.SIGKILL
    assert read_run(folder).status == "interrupted"
    with open_run(folder, CONFIG, resume=True) as run:
        assert list(folder.rglob(".tmp-*")) == []
        run.rewind(run.checkpoints.latest(verified=True).step)
        assert run.metrics() == [{"step": 1}]
    assert read_run(folder).status == "done"


def test_threads_share_a_run(tmp_path: Path) -> None:
    with open_run(tmp_path / "r", CONFIG) as run:

        def work(first: int) -> None:
            for step in range(first, first + 50):
                run.log_metrics({"step": step, "text": "x" * 500})

        threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(row["step"] for row in read_metrics(run.folder) if isinstance(row["step"], int)) == sorted(1000 * n + i for n in range(4) for i in range(50))


def test_each_run_keeps_its_own_events(tmp_path: Path) -> None:
    both = threading.Barrier(2)

    def work(name: str) -> None:
        with open_run(tmp_path / name, CONFIG):
            both.wait(20)
            events.emit("of", which=name)
            thread = threading.Thread(target=lambda: events.emit("nobody's"))
            thread.start()
            thread.join()
            both.wait(20)

    threads = [threading.Thread(target=contextvars.Context().run, args=(work, name)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in ("a", "b"):
        rows = files.read_lines(tmp_path / name / "events.jsonl")
        assert [row.get("which") for row in rows if row["name"] == "of"] == [name]
        assert "nobody's" not in [row["name"] for row in rows], "with two runs open nobody knows whose it is"
    with open_run(tmp_path / "c", CONFIG):
        engine = threading.Thread(target=lambda: events.emit("engine"))
        engine.start()
        engine.join()
    assert "engine" in [row["name"] for row in files.read_lines(tmp_path / "c" / "events.jsonl")]
    events.emit("after")
    assert "after" not in (tmp_path / "c" / "events.jsonl").read_text()


# ------------------------------------------------------------------------------------------------------------- reading
def test_list_shows_damaged_runs_and_says_why(tmp_path: Path) -> None:
    assert list_runs(tmp_path) == list_runs(tmp_path / "missing") == ()
    for name in ("a", "b", "c", "d", "e"):
        with open_run(tmp_path / name, CONFIG) as run:
            run.log_metrics({"step": 1})
    (tmp_path / "b" / "run.json").write_bytes(b"{")
    (tmp_path / "c" / "config.json").unlink()
    state = json.loads((tmp_path / "d" / "run.json").read_bytes())
    (tmp_path / "d" / "run.json").write_text(json.dumps({**state, "status": "great"}))
    (tmp_path / "e" / "run.json").write_text("[]")
    (tmp_path / "models").mkdir()
    found = {info.name: info for info in list_runs(tmp_path)}
    assert {name: info.status for name, info in found.items()} == {"a": "done", "b": "broken", "c": "broken", "d": "broken", "e": "broken"}
    for name, why in {"b": "not valid JSON", "c": "missing", "d": "'great'", "e": "expected a JSON object"}.items():
        assert why in found[name].error
    for name in ("b", "d", "e"):
        with pytest.raises(CorruptError):
            read_run(tmp_path / name)


def test_no_run_there(tmp_path: Path) -> None:
    for read in (read_run, read_metrics):
        with pytest.raises(NotFoundError, match="holds no run"):
            read(tmp_path)


def test_values_that_are_no_numbers_do_not_become_metrics(tmp_path: Path) -> None:
    with open_run(tmp_path / "r", CONFIG) as run:
        run.log_metrics({"step": 1, "a": 1, "b": float("nan"), "c": True, "d": "text", "e": None})
        run.log_metrics({"step": 2, "a": 2.5})
    assert read_run(run.folder).metrics == {"a": 2.5}
