"""Processes: workers and runners may be killed at any moment, and the study is the same, byte by byte."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.experiments.conftest import VOTING, result_bytes, small

from crucible_framework import events
from crucible_framework.errors import ExperimentError
from crucible_framework.experiments import Experiment, load_study, run
from crucible_framework.experiments import runner as runner_module
from crucible_framework.experiments.arms import BASE
from crucible_framework.sinks import read_events

SCRIPT = """
import sys
from pathlib import Path
from crucible_framework.experiments import run
from tests.experiments.conftest import VOTING, small
study = run(small(seeds=({seeds}), **{changes}), {folder!r}, resume=Path({folder!r}, "plan.json").exists(), jobs=2)
sys.exit(3 if study.stopped else 0)
"""
ROOT = Path(__file__).resolve().parents[2]


def children(pid: int) -> list[int]:
    """The processes that a process has started and that still live."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(word) for word in task.read_text().split()]
        except OSError:
            continue
    return found


def start(folder: Path, seeds: str = "0, 1", changes: str = "{}") -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT)))}
    return subprocess.Popen([sys.executable, "-c", SCRIPT.format(folder=str(folder), seeds=seeds, changes=changes)], env=env)


def until(condition: object, timeout_s: float = 200.0) -> None:
    ends = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < ends, "it took too long"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_a_killed_worker_and_a_killed_runner_change_nothing(experiment: Experiment, tmp_path: Path) -> None:
    run(experiment, tmp_path / "whole", jobs=0)
    cut = tmp_path / "cut"
    runner = start(cut)
    until(lambda: list(cut.glob("cells/*/run/checkpoints/*/manifest.json")) or runner.poll() is not None)
    for pid in children(runner.pid):
        os.kill(pid, signal.SIGKILL)
    until(lambda: list(cut.glob("cells/*.json")) or runner.poll() is not None)
    workers = children(runner.pid)
    runner.kill()
    runner.wait()
    until(lambda: all(map(gone, workers)), 100)
    kept = {path: path.stat().st_mtime_ns for path in cut.glob("cells/*.json")}
    assert kept
    assert run(experiment, cut, jobs=0, resume=True).finished
    assert result_bytes(cut) == result_bytes(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "a finished cell is not run again"


def test_sigterm_to_the_runner_stops_its_workers_where_they_can_go_on(experiment: Experiment, tmp_path: Path) -> None:
    runner = start(tmp_path / "cut")
    until(lambda: list((tmp_path / "cut").glob("cells/*/run/metrics.jsonl")) or runner.poll() is not None)
    runner.terminate()
    assert runner.wait(200) == 3
    study = load_study(tmp_path / "cut")
    assert study.of("pending")
    assert run(experiment, tmp_path / "cut", jobs=0, resume=True).finished


def test_a_cell_whose_worker_always_dies_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runner_module, "EARLY", 2)
    (tmp_path / "deadly.py").write_text("import os\nfrom crucible_framework.backends import connect\ndef backend():\n    os.kill(os.getpid(), 9)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    study = run(small(matrix={"backend": ("deadly:backend", "fake")}, seeds=(0,), hypotheses=(), retries=0), tmp_path / "study", jobs=1)
    assert [(cell.arm, cell.status) for cell in study.cells] == [("backend=deadly:backend", "failed"), ("backend=fake", "done")]
    failure = study.cells[0].failure
    assert failure is not None
    assert failure.error == "WorkerDied"
    assert "-9" in failure.message
    assert {one.status for one in study.bases.values()} == {"failed", "done"}, f"the {BASE} of that backend has failed too"


def test_workers_that_cannot_start_end_the_study_and_fail_no_cell(monkeypatch: pytest.MonkeyPatch, experiment: Experiment, tmp_path: Path) -> None:
    monkeypatch.setattr(runner_module, "STILLBORN", 3)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ExperimentError, match=r"3 workers in a row .* with 1\."):
        run(experiment, tmp_path, jobs=1)
    assert not load_study(tmp_path).of("failed")


@pytest.mark.slow
def test_ten_killed_runners_and_twenty_killed_workers(tmp_path: Path) -> None:
    seeds = ", ".join(map(str, range(10)))
    run(small(seeds=tuple(range(10)), **VOTING), tmp_path / "whole", jobs=0)
    chance, cut, runners, workers, runner = random.Random(7), tmp_path / "cut", 0, 0, start(tmp_path / "cut", seeds, "VOTING")
    while runner.poll() is None:
        time.sleep(chance.uniform(0.5, 2.5))
        alive = children(runner.pid)
        if workers < 20 and alive:
            os.kill(chance.choice(alive), signal.SIGKILL)
            workers += 1
        elif runners < 10 and (cut / "plan.json").exists():
            runner.kill()
            runner.wait()
            runners += 1
            runner = start(cut, seeds, "VOTING")
        if workers % 2 == 0 and runners < 10 and alive and runner.poll() is None:
            runner.kill()
            runner.wait()
            runners += 1
            runner = start(cut, seeds, "VOTING")
    assert runner.returncode == 0
    assert (runners, workers) == (10, 20)
    assert result_bytes(cut) == result_bytes(tmp_path / "whole")


@pytest.mark.parametrize("jobs", [0, 1])
def test_what_a_cell_does_hangs_below_the_study_also_in_another_process(tmp_path: Path, jobs: int) -> None:
    with events.collect() as seen:
        study = run(small(seeds=(0,), matrix={"lora.rank": (2,)}, hypotheses=()), tmp_path / "study", jobs=jobs)
    assert study.finished
    (whole,) = (event for event in seen if event["name"] == "experiment.run")
    told = [event for path in (tmp_path / "study").glob("cells/*/run/events.jsonl") for event in read_events(path).events]
    (trained,) = (event for event in told if event["name"] == "training.run")
    assert (trained["trace"], trained["parent"]) == (whole["trace"], whole["span"])
    assert any(event["name"] == "training.run" for event in seen) == (jobs == 0), "a worker's events stay with the worker"
