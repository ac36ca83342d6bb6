"""Every public operation says what it did. `OPERATIONS` lists them with their events; what is missing in it fails here.

An operation changes something, computes with a model, or reads data from outside. What only reads its own files or computes stands in `SILENT`.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import httpx
import pytest
from tests.experiments.conftest import small
from tests.inference.simulated import Timed

import crucible_framework as cf
from crucible_framework import events, store
from crucible_framework.backends.fake import FakeBackend
from crucible_framework.evaluation import attempt, monitor
from crucible_framework.experiments import Budget
from crucible_framework.inference import Fixed, Never
from crucible_framework.records import AdamConfig, LoraConfig, SamplingParams, TrainConfig
from crucible_framework.server import ServeConfig, serve
from crucible_framework.testing import VirtualClock, make_batch, make_dataset
from crucible_framework.training import health, watch

ROOT = Path(__file__).resolve().parents[2]
CONFIG = TrainConfig(base_model="tiny", max_steps=2, batch_size=4, checkpoint_interval=2, lora=LoraConfig(rank=2))
PARAMS = SamplingParams(max_tokens=2)
At: TypeAlias = SimpleNamespace  # `folder`, an empty one, and `backend`, the fake one
Case: TypeAlias = Callable[[At], Iterator[None]]  # what is made ready, a yield, and the operation; only events after the yield count


def _trained(at: At, name: str = "run", **changes: Any) -> Path:
    folder: Path = at.folder / "runs" / name
    with cf.Trainer(at.backend, replace(CONFIG, **changes), folder=folder) as trainer:
        trainer.train(make_dataset(), make_dataset(seed=1) if changes.get("eval_interval") else None)
    return folder


def _registered(at: At) -> cf.Models:
    models = cf.Models(at.folder / "runs" / "models")
    models.register(cf.Checkpoints(_trained(at) / "checkpoints").latest(), "judge")
    return models


# ------------------------------------------------------------------------------------------------------------------ data
def _load_dataset(at: At) -> Iterator[None]:
    yield
    cf.load_dataset("minifact", split="train", limit=4)


def _load_preferences(at: At) -> Iterator[None]:
    path = at.folder / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}) + "\n")
    yield
    cf.load_preferences(path)


# -------------------------------------------------------------------------------------------------------------- training
def _train(at: At) -> Iterator[None]:
    yield
    _trained(at, eval_interval=1)


def _resume(at: At) -> Iterator[None]:
    folder = _trained(at)
    yield
    with cf.Trainer(at.backend, CONFIG, folder=folder, resume=True) as trainer:
        trainer.train(make_dataset())


def _cut(at: At) -> Iterator[None]:
    yield
    _trained(at, max_length=8)


def _save(at: At) -> Iterator[None]:
    with cf.Trainer(at.backend, CONFIG, folder=at.folder / "run") as trainer:
        trainer.train(make_dataset())
        yield
        trainer.save("mine")


def _watch(at: At) -> Iterator[None]:
    folder, callbacks = at.folder / "run", [monitor(["train/loss<=0"], kinds=["step"])]
    with cf.Trainer(at.backend, CONFIG, folder=folder, hook=health(1e-9, 1e-8)) as trainer:
        trainer.callbacks = (*callbacks, watch(make_dataset().examples[:1], trainer.sampler, folder))
        yield
        trainer.train(make_dataset())


def _session(work: Callable[[cf.TrainingSession, cf.Loss], object]) -> Case:
    def case(at: At) -> Iterator[None]:
        session, loss = at.backend.train("tiny", LoraConfig(rank=2)), cf.resolve_loss("cross_entropy")
        session.forward_backward(make_batch(), loss).result()
        yield
        work(session, loss)

    return case


# ----------------------------------------------------------------------------------------------------------------- store
def _publish(at: At) -> Iterator[None]:
    checkpoint = cf.Checkpoints(_trained(at) / "checkpoints").latest()
    yield
    cf.Checkpoints(at.folder / "copies").publish(checkpoint, lambda folder: at.backend.download(checkpoint, folder), metrics={}, fingerprint="")


def _pin(at: At) -> Iterator[None]:
    kept = cf.Checkpoints(_trained(at) / "checkpoints")
    yield
    kept.pin(2)


def _prune(at: At) -> Iterator[None]:
    kept = cf.Checkpoints(_trained(at, checkpoint_interval=1, max_steps=3) / "checkpoints")
    yield
    assert kept.prune(1)


def _register(at: At) -> Iterator[None]:
    checkpoint = cf.Checkpoints(_trained(at) / "checkpoints").latest()
    yield
    cf.Models(at.folder / "models").register(checkpoint, "judge")


def _models(work: Callable[[cf.Models], object]) -> Case:
    def case(at: At) -> Iterator[None]:
        models = _registered(at)
        yield
        work(models)

    return case


def _push(at: At) -> Iterator[None]:
    models = _registered(at)
    yield
    store.push(models, "judge:1", at.folder / "out")


def _pull(at: At) -> Iterator[None]:
    store.push(_registered(at), "judge:1", at.folder / "out")
    yield
    store.pull(cf.Models(at.folder / "elsewhere"), at.folder / "out")


def _tracker(work: Callable[[cf.Tracker], object]) -> Case:
    def case(at: At) -> Iterator[None]:
        _trained(at)
        tracker = cf.Tracker(at.folder / "runs")
        yield
        work(tracker)

    return case


def _exchange(at: At) -> Iterator[None]:
    _trained(at)
    runs, table = cf.Tracker(at.folder / "runs").runs(), at.folder / "runs.csv"
    yield
    store.export_runs(runs, table)
    store.import_runs(table, at.folder / "again")
    store.copy_runs(runs, lambda name, params: SimpleNamespace(log=lambda *row: None, end=lambda status: None))


def _artifacts(at: At) -> Iterator[None]:
    kept = cf.Artifacts(at.folder / "artifacts")
    yield
    kept.put(b"bytes", owner="me")
    kept.release("me")
    kept.prune(0)


def _download(at: At) -> Iterator[None]:
    with cf.Dashboard(at.folder) as dashboard:
        yield
        cf.Artifacts(at.folder / "artifacts").download(f"{dashboard.url}static/app.css")


# ------------------------------------------------------------------------------------------------------- asking, judging
def _asks(work: Callable[[cf.Sampler], object]) -> Case:
    def case(at: At) -> Iterator[None]:
        sampler = at.backend.sampler("tiny")
        yield
        work(sampler)

    return case


def _judged(at: At) -> Iterator[None]:
    data, sampler = make_dataset(), at.backend.sampler("tiny")
    before, after = (cf.evaluate(sampler, data, ["exact_match"], params=PARAMS, label=label) for label in ("a", "b"))
    yield
    cf.compare(before, after, "exact_match")


def _late(sampler: cf.Sampler, budget: float = 1.0) -> None:
    """The first call is slow, on a clock of its own: a real one may take no time at all."""
    del sampler
    clock = VirtualClock()
    future = cf.HedgedSampler([Timed(clock, after_s=(9.0,)), Timed(clock)], Fixed(0.1), budget=budget, clock=clock).sample("?", PARAMS)
    clock.advance(10.0)
    future.result()


# ------------------------------------------------------------------------------------------------- experiments, reports
def _experiment(**changes: object) -> cf.Experiment:
    return small(seeds=(0,), matrix={"lora.rank": (2,)}, hypotheses=(), **changes)


def _run(at: At) -> Iterator[None]:
    yield
    cf.run_experiment(_experiment(budget=Budget(hours=99.0)), at.folder / "study", jobs=0)


def _analyse(at: At) -> Iterator[None]:
    study = cf.run_experiment(_experiment(), at.folder / "study", jobs=0)
    yield
    cf.analyse(study)


def _report(at: At) -> Iterator[None]:
    folder = _trained(at)
    yield
    cf.write_report(folder)


def _serve(at: At) -> Iterator[None]:
    yield
    config = ServeConfig(folder=at.folder / "serve", port=0, models=("tiny",))
    with serve(at.backend, config) as server, httpx.Client(base_url=server.url, timeout=60, headers={"X-API-Key": "any"}) as client:
        made = client.post("/api/v1/create_session", json={"tags": [], "sdk_version": "0.38.0", "user_metadata": None}).json()["session_id"]
        client.post("/v1/completions", json={"model": "tiny", "prompt": "hello", "max_tokens": 2}).raise_for_status()
        client.post(f"/api/v1/sessions/{made}/finish", json={})


class _Falls(FakeBackend):
    """An engine that falls over at whatever it is asked."""

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"the engine fell over at {fn.__name__}")


def _broken(at: At) -> Iterator[None]:
    config = ServeConfig(folder=at.folder / "serve", port=0, models=("tiny",))
    with _Falls() as backend, serve(backend, config) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        yield
        ask = {"model": "tiny", "prompt": "hello", "max_tokens": 2}
        assert client.post("/v1/completions", json=ask, headers={"X-API-Key": "any"}).status_code == 502


def _connect(at: At) -> Iterator[None]:
    yield
    with cf.connect("local", threads=1) as backend:
        backend.sampler("tiny").sample("hello", PARAMS).result()


OPERATIONS: dict[str, tuple[Case, set[str]]] = {
    "load_dataset": (_load_dataset, {"data.loaded"}),
    "load_preferences": (_load_preferences, {"data.loaded"}),
    "connect": (_connect, {"model.loaded", "inference.sample"}),
    "TrainingSession.forward": (_session(lambda session, loss: session.forward(make_batch(), loss).result()), {"training.forward"}),
    "TrainingSession.forward_backward": (_session(lambda session, loss: session.forward_backward(make_batch(), loss).result()), {"training.forward_backward"}),
    "TrainingSession.optim_step": (_session(lambda session, loss: session.optim_step(AdamConfig()).result()), {"training.optim_step"}),
    "TrainingSession.save": (_session(lambda session, loss: session.save("mine").result()), {"checkpoint.saved"}),
    "Trainer.train": (
        _train,
        {"run.started", "training.run", "training.step", "training.evaluated", "training.forward_backward", "training.optim_step",
         "checkpoint.saved", "run.ended"},
    ),
    "Trainer.train, resumed": (_resume, {"run.started", "training.resumed"}),
    "Trainer.train, with examples that are too long": (_cut, {"data.truncated"}),
    "Trainer.train, with what looks on": (_watch, {"training.watched", "training.gradient_issue", "quality.shortfall"}),
    "Trainer.save": (_save, {"checkpoint.saved"}),
    "Checkpoints.publish": (_publish, {"checkpoint.saved"}),
    "Checkpoints.pin": (_pin, {"checkpoint.pinned"}),
    "Checkpoints.prune": (_prune, {"checkpoint.removed"}),
    "Models.register": (_register, {"model.registered"}),
    "Models.tag": (_models(lambda models: models.tag("judge:1", {"task": "nli"})), {"model.tagged"}),
    "Models.promote": (_models(lambda models: models.promote("judge:1")), {"model.promoted"}),
    "Models.alias": (_models(lambda models: models.alias("judge", "best", 1)), {"model.aliased"}),
    "Models.rebuild": (_models(lambda models: models.rebuild()), {"model.index_rebuilt"}),
    "push": (_push, {"model.pushed"}),
    "pull": (_pull, {"model.registered"}),
    "Tracker.tag": (_tracker(lambda tracker: tracker.tag("run", {"owner": "ada"})), {"run.tagged"}),
    "Tracker.note": (_tracker(lambda tracker: tracker.note("run", "baseline")), {"run.noted"}),
    "Tracker.attach": (_tracker(lambda tracker: tracker.attach("run", b"bytes", "x.bin")), {"run.attached", "artifact.stored"}),
    "export_runs, import_runs, copy_runs": (_exchange, {"run.exported", "run.imported", "run.copied"}),
    "Artifacts.put, Artifacts.release, Artifacts.prune": (_artifacts, {"artifact.stored", "artifact.released", "artifact.removed"}),
    "Artifacts.download": (_download, {"artifact.stored"}),
    "Sampler.sample": (_asks(lambda sampler: sampler.sample("?", PARAMS).result()), {"inference.sample"}),
    "Sampler.compute_logprobs": (_asks(lambda sampler: sampler.compute_logprobs("?", "no").result()), {"inference.logprobs"}),
    "generate": (_asks(lambda sampler: cf.generate(sampler, "?", PARAMS)), {"inference.sample"}),
    "Ensemble.ask, Ensemble.submit": (_asks(lambda sampler: cf.Ensemble({"a": sampler, "b": sampler}).ask("?", PARAMS)),
                                      {"ensemble.request", "ensemble.member", "ensemble.vote", "inference.sample"}),
    "Ensemble.ask, in turn": (_asks(lambda sampler: cf.Ensemble({"a": sampler, "b": sampler}, mode="sequential").ask("?", PARAMS)), {"ensemble.asked"}),
    "Ensemble.sample": (_asks(lambda sampler: cf.Ensemble({"a": sampler}).sample("?", PARAMS).result()), {"ensemble.vote"}),
    "HedgedSampler.sample, HedgedSampler.stream": (_asks(_late), {"hedge.request", "hedge.started", "hedge.leg", "hedge.fired", "hedge.ended"}),
    "HedgedSampler.sample, with no second call": (_asks(lambda one: cf.HedgedSampler([one], Never()).sample("?", PARAMS).result()), {"hedge.started"}),
    "HedgedSampler.sample, with no credit": (_asks(lambda sampler: _late(sampler, budget=0.05)), {"hedge.started", "hedge.refused", "hedge.ended"}),
    "RoutedSampler.sample": (_asks(lambda one: cf.RoutedSampler({"a": one}).sample("?", PARAMS).result()), {"route.request", "route.chosen", "route.ended"}),
    "RoutedSampler.stream": (
        _asks(lambda sampler: cf.RoutedSampler({"a": sampler}).stream("?", PARAMS, lambda piece: None).result()),
        {"route.request", "route.chosen", "route.ended", "inference.sample"},
    ),
    "evaluate": (_asks(lambda sampler: cf.evaluate(sampler, make_dataset(), ["exact_match"], params=PARAMS)), {"evaluation.started", "evaluation.done"}),
    "attempt": (_asks(lambda sampler: attempt(sampler, make_dataset(), "exact_match", n=2, ks=(1,), params=PARAMS)), {"evaluation.done"}),
    "compare": (_judged, {"evaluation.compared"}),
    "run_experiment": (_run, {"experiment.run", "experiment.started", "experiment.estimated", "experiment.cell", "experiment.done", "evaluation.done"}),
    "analyse": (_analyse, {"experiment.analysed"}),
    "write_report": (_report, {"report.written"}),
    "serve": (_serve, {"server.session", "server.http", "server.request", "inference.sample"}),
    "serve, on a backend that breaks": (_broken, {"server.failed", "server.error"}),
}  # fmt: skip

SILENT = {
    "reads what is on file": (
        "datasets", "list_runs", "load_checkpoint", "load_evaluation", "load_experiment", "load_study", "load_toml", "read_metrics", "Artifacts.contains",
        "Artifacts.get", "Artifacts.list", "Artifacts.owned", "Artifacts.verify", "Checkpoints.best", "Checkpoints.broken", "Checkpoints.get",
        "Checkpoints.latest", "Checkpoints.list", "Checkpoints.verify", "Models.aliases", "Models.broken", "Models.find", "Models.get", "Models.lineage",
        "Models.list", "Tracker.artifact", "Tracker.compare", "Tracker.folder", "Tracker.get", "Tracker.history", "Tracker.lineage", "Tracker.problems",
        "Tracker.runs", "Pool.from_registry", "Pool.from_versions", "Pool.tagged",
    ),
    "makes values from values": (
        "Batches.at", "Batches.epoch_batches", "Ensemble.judge",
        "bootstrap", "combine", "compare_groups", "fingerprint", "mean_estimate", "paired_difference", "plan",
        "progress_bar", "register_loss", "render", "resolve_loss", "seeds_and_items", "wilson",
    ),
    "is made of operations above, which tell": ("run_demo", "Tracker.rebuild", "Trainer.sampler", "ChoiceSampler.sample", "Dashboard.start", "Dashboard.close"),
    "gives log-probs of a text; what asks for them tells": (
        "ChoiceSampler.compute_logprobs", "Ensemble.compute_logprobs", "HedgedSampler.compute_logprobs", "RoutedSampler.compute_logprobs",
    ),
    "waits or sweeps what a dead process left": ("Dashboard.wait", "Checkpoints.sweep"),
}  # fmt: skip

ELSEWHERE = {
    "experiment.searched": "experiments/test_search.py", "model.converted": "backends/local/test_smollm.py", "model.exported": "backends/local/test_export.py",
    "native.compiled": "backends/local/test_native.py", "native.unavailable": "backends/local/test_native.py", "events.dropped": "ground/test_events_sinks.py",
    "recovery.completed": "backends/test_tinker_recovery.py", "recovery.detected": "backends/test_tinker_recovery.py",
    "recovery.exhausted": "backends/test_tinker_recovery.py", "recovery.failed": "backends/test_tinker_recovery.py",
    "recovery.poll_error": "backends/test_tinker_recovery.py", "recovery.started": "backends/test_tinker_recovery.py",
    "tinker.queue_state": "backends/test_tinker_recovery.py",
    "tinker.retry": "backends/test_tinker_recovery.py", "tinker.spending": "backends/test_tinker_recovery.py",
    "training.example_norms": "training/test_example_norms.py",
}  # fmt: skip
"""Events that need a service, a compiler or a failure: the test that provokes each."""


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_tells_what_it_did(operation: str, tmp_path: Path) -> None:
    case, told = OPERATIONS[operation]
    with FakeBackend() as backend:
        steps = case(SimpleNamespace(folder=tmp_path, backend=backend))
        next(steps)
        with events.collect() as seen:
            assert next(steps, "ended") == "ended"
    assert told - {str(event["name"]) for event in seen} == set()
    for event in seen:
        assert isinstance(event["ts"], float)
        assert {"run", "span", "parent"} <= event.keys()
        if event["name"] in ("training.step", "training.evaluated"):
            assert isinstance(event["step"], int)
            assert isinstance(event["epoch"], float)
            assert event["run"] == ("run" if operation.startswith("Trainer") else "") or operation == "run_experiment"


def _public() -> set[str]:
    """The functions of the face, and the methods of its classes that are neither records nor contracts."""
    found: set[str] = set()
    for name in cf.__all__:
        value = getattr(cf, name)
        if inspect.isfunction(value):
            found.add(name)
        elif inspect.isclass(value) and not getattr(value, "_is_protocol", False) and not hasattr(value, "__dataclass_fields__"):
            found |= {f"{name}.{key}" for key in vars(value) if not key.startswith("_") and callable(getattr(value, key))}
    return found


def test_no_public_operation_is_left_out() -> None:
    silent = {name for names in SILENT.values() for name in names}
    assert _public() - {name for row in OPERATIONS for name in row.split(", ")} - silent == set(), (
        "a new operation: give it an event and a row in OPERATIONS, or a reason in SILENT"
    )
    assert silent - _public() == set(), "SILENT names what is not there any more"


WHERE_NAMED = {**dict.fromkeys(("emit", "span", "tell", "opened", "past", "OpenSpan"), 0), "linked": 1}  # which argument is the event's name


def _emitted() -> set[str]:
    """The names that the source emits."""
    found: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = (getattr(node.func, "attr", "") or getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
            place = WHERE_NAMED.get(called)
            if isinstance(node, ast.Call) and place is not None and len(node.args) > place:
                found |= {part.value for part in ast.walk(node.args[place]) if isinstance(part, ast.Constant) and isinstance(part.value, str)}
    return {name for name in found if re.fullmatch(r"[a-z]+\.[a-z_]+", name)}


def test_each_event_is_provoked_by_a_test_and_told_of_in_the_documentation() -> None:
    told = {name for _, names in OPERATIONS.values() for name in names}
    emitted = _emitted() | {"events.dropped"}
    assert emitted - told - ELSEWHERE.keys() == set(), "a new event: name the operation that emits it, or the test"
    for name, where in ELSEWHERE.items():
        assert f'"{name}"' in (ROOT / "tests" / where).read_text(), (name, where)
    page = (ROOT / "docs" / "observability.md").read_text()
    table = page[page.index("| Operation | Events |") :].partition("\n\n")[0]
    assert set(re.findall(r"`([a-z]+\.[a-z_]+)`", table)) == emitted
