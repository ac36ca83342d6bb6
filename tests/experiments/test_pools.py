"""Pools and the worker's way of talking, without a process and without Ray being there; Ray itself where it is installed."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from types import ModuleType

import orjson
import pytest
from tests.experiments.conftest import VOTING, result_bytes, small

from crucible_framework.errors import ConfigError, ExperimentError
from crucible_framework.experiments import Experiment, analyse, load_study, run
from crucible_framework.experiments.work import Job, job_for
from crucible_framework.experiments.worker import serve


def spoken(experiment: Experiment, folder: Path, *, stop: bool) -> tuple[list[dict[str, object]], bool]:
    """What a worker says to one job, and whether it was cut off when its input ended."""
    (job_in, job_out), (said_in, said_out) = os.pipe(), os.pipe()
    cut: list[bool] = []
    job = job_for(experiment, experiment.cells()[0], folder, "cell")
    with os.fdopen(job_in, "rb") as source, os.fdopen(said_out, "wb") as sink, os.fdopen(job_out, "wb") as ask, os.fdopen(said_in, "rb") as hear:
        thread = threading.Thread(target=serve, args=(source, sink, lambda: cut.append(True)))
        thread.start()
        ask.write(orjson.dumps({"job": job.plain()}) + b"\n" + (orjson.dumps({"stop": True}) + b"\n" if stop else b""))
        ask.close()  # the runner is gone before the job has ended
        thread.join(60)
        sink.close()
        said = [orjson.loads(line) for line in hear]
    return said, bool(cut)


def test_a_worker_does_its_job_and_notices_that_the_runner_is_gone(tmp_path: Path) -> None:
    said, cut = spoken(small(), tmp_path, stop=False)
    assert cut
    assert said[-1]["kind"] == "done"
    assert len(list(tmp_path.glob("cells/*.json"))) == 1


def test_a_worker_that_is_told_to_stop_does(tmp_path: Path) -> None:
    said, cut = spoken(small(), tmp_path, stop=True)
    assert not cut
    assert said[-1]["kind"] == "stopped"
    assert not list(tmp_path.glob("cells/*.json"))


def test_a_job_survives_the_way_to_another_process(experiment: Experiment, tmp_path: Path) -> None:
    job = job_for(experiment, experiment.cells()[0], tmp_path, "cell")
    again = Job.of(orjson.loads(orjson.dumps(job.plain())))
    assert again == job


# ------------------------------------------------------------------------------------------------------------------ Ray
class StandIn(ModuleType):
    """The part of Ray's interface that the pool uses, on threads: it tells whether the pool keeps to that interface."""

    def __init__(self, cpus: int, *, deaths: int = 0, starts: bool = True) -> None:
        super().__init__("ray")
        self.cpus, self.deaths, self.starts, self.alive = cpus, deaths, starts, 0
        self.pool = ThreadPoolExecutor(8)
        self.exceptions = ModuleType("ray.exceptions")
        self.exceptions.RayError = type("RayError", (Exception,), {})  # type: ignore[attr-defined]
        self.exceptions.GetTimeoutError = type("GetTimeoutError", (self.exceptions.RayError,), {})  # type: ignore[attr-defined]
        self.running = False

    def is_initialized(self) -> bool:
        return self.running

    def init(self, *, include_dashboard: bool, log_to_driver: bool) -> None:
        self.running = True

    def shutdown(self) -> None:
        self.running = False

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.cpus)}

    def remote(self, *, num_cpus: int, max_restarts: int, max_concurrency: int) -> object:
        module = self

        class Actor:
            def __init__(self, cls: type) -> None:
                self.inner = cls()

            def __getattr__(self, name: str) -> object:
                inner = getattr(self.inner, name)

                class Method:
                    @staticmethod
                    def remote(*arguments: object) -> Future[object]:
                        if name == "perform" and module.deaths:
                            module.deaths -= 1
                            died: Future[object] = Future()
                            died.set_exception(module.exceptions.RayError("the actor died"))
                            return died
                        return module.pool.submit(inner, *arguments)

                return Method

        class ActorClass:
            def __init__(self, cls: type) -> None:
                self.cls = cls

            def remote(self) -> Actor:
                module.alive += 1
                return Actor(self.cls)

        return ActorClass

    def get(self, future: Future[object], *, timeout: float | None = None) -> object:
        if not self.starts:
            raise self.exceptions.GetTimeoutError
        return future.result(timeout)

    def wait(self, futures: list[Future[object]], *, num_returns: int, timeout: float) -> tuple[list[object], list[object]]:
        done, rest = wait_for(futures, timeout, return_when="FIRST_COMPLETED")
        return list(done), list(rest)

    def kill(self, actor: object) -> None:
        self.alive -= 1


def stand_in(monkeypatch: pytest.MonkeyPatch, module: StandIn) -> StandIn:
    monkeypatch.setitem(sys.modules, "ray", module)
    monkeypatch.setitem(sys.modules, "ray.exceptions", module.exceptions)
    return module


def test_the_ray_pool_gives_the_same_study(monkeypatch: pytest.MonkeyPatch, experiment: Experiment, tmp_path: Path) -> None:
    ray = stand_in(monkeypatch, StandIn(2, deaths=1))
    analyse(run(experiment, tmp_path / "ray", jobs=2, executor="ray"))
    assert (ray.alive, ray.running) == (0, False), "what the pool has started it also ends"
    analyse(run(experiment, tmp_path / "here", jobs=0))
    assert result_bytes(tmp_path / "ray") == result_bytes(tmp_path / "here")


def test_asking_ray_for_too_much_is_an_error_and_no_hang(monkeypatch: pytest.MonkeyPatch, experiment: Experiment, tmp_path: Path) -> None:
    ray = stand_in(monkeypatch, StandIn(2))
    with pytest.raises(ConfigError, match="need 3 processors; the Ray cluster has 2"):
        run(experiment, tmp_path / "a", jobs=3, executor="ray")
    assert not ray.running
    stand_in(monkeypatch, StandIn(2, starts=False))
    with pytest.raises(ExperimentError, match="started no worker"):
        run(experiment, tmp_path / "b", jobs=1, executor="ray")


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, experiment: Experiment, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"crucible-framework\[ray\]"):
        run(experiment, tmp_path, executor="ray")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.filterwarnings("ignore")
def test_real_ray_gives_the_same_study(tmp_path: Path) -> None:
    experiment = small(**VOTING)
    analyse(run(experiment, tmp_path / "ray", jobs=1, executor="ray"))
    assert load_study(tmp_path / "ray").finished
    analyse(run(experiment, tmp_path / "here", jobs=0))
    assert result_bytes(tmp_path / "ray") == result_bytes(tmp_path / "here")
