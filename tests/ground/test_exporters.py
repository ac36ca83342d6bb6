"""Other programs get what happened: each exporter is run against the real library, and what arrived is read back."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from crucible_framework import events
from crucible_framework.errors import ConfigError
from crucible_framework.events import emit, span
from crucible_framework.exporters import to_mlflow, to_opentelemetry, to_trackio, to_wandb
from crucible_framework.records import Json
from crucible_framework.store import open_run

CONFIG: dict[str, Json] = {"base_model": "tiny", "lora": {"rank": 4}}


class Collector(ThreadingHTTPServer):
    """Takes OTLP over HTTP and keeps the bodies."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        kept = self.bodies

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                kept.append(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_opentelemetry_gets_the_same_tree_with_the_same_ids() -> None:
    trace_sdk = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    end = to_opentelemetry(trace_sdk.SimpleSpanProcessor(exporter))
    with events.collect() as seen:
        with events.in_run("first"), span("training.run", loss="cross_entropy"), span("inference.sample", model="tiny", n=2) as inner:
            inner.set(tokens=5, causes=["a"])
            emit("hedge.fired", delay_s=0.5)
        with pytest.raises(ValueError, match="bad"), span("work"):
            raise ValueError("bad")
        emit("alone")
    end()
    by_name = {one.name: one for one in exporter.get_finished_spans()}
    own = {str(event["name"]): event for event in seen}
    assert set(by_name) == {"chat tiny" if name == "inference.sample" else name for name in own}
    root, sample = by_name["training.run"], by_name["chat tiny"]
    assert f"{root.context.trace_id:032x}" == own["training.run"]["trace"]
    assert f"{sample.context.span_id:016x}" == own["inference.sample"]["span"]
    assert sample.parent.span_id == root.context.span_id
    assert by_name["hedge.fired"].parent.span_id == sample.context.span_id
    assert by_name["alone"].parent is None
    assert sample.attributes["gen_ai.request.model"] == "tiny"
    assert sample.attributes["gen_ai.usage.output_tokens"] == 5
    assert sample.attributes["crucible.inference.causes"] == '["a"]'
    assert (root.attributes["crucible.train.loss"], root.attributes["crucible.run"]) == ("cross_entropy", "first")
    assert by_name["work"].attributes["error.type"] == "ValueError"
    assert not by_name["work"].status.is_ok
    assert abs((root.end_time - root.start_time) / 1e9 - float(str(own["training.run"]["duration_s"]))) < 1e-3


def test_otlp_reaches_a_collector_as_the_standard_has_it(collector: Collector) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    end = to_opentelemetry(f"http://127.0.0.1:{collector.server_port}/v1/traces")
    with events.collect() as seen, span("ensemble.ask"), span("inference.sample", model="tiny", temperature=0.5, tokens=3):
        pass
    end()
    spans: dict[str, Any] = {}
    for body in collector.bodies:
        for resource in service.ExportTraceServiceRequest.FromString(body).resource_spans:
            spans |= {one.name: one for scope in resource.scope_spans for one in scope.spans}
    assert set(spans) == {"ensemble.ask", "chat tiny"}
    inner, outer = seen
    assert (spans["chat tiny"].trace_id.hex(), spans["chat tiny"].span_id.hex()) == (inner["trace"], inner["span"])
    assert spans["chat tiny"].parent_span_id.hex() == outer["span"]
    attributes = {one.key: one.value for one in spans["chat tiny"].attributes}
    assert attributes["gen_ai.operation.name"].string_value == "chat"
    assert attributes["gen_ai.request.temperature"].double_value == 0.5
    assert attributes["gen_ai.usage.output_tokens"].int_value == 3


def test_a_collector_that_is_not_there_does_not_hold_up_the_end() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    code = (
        "import logging\nlogging.disable(logging.CRITICAL)\nfrom crucible_framework import events, exporters\nexporters.EXIT_S = 0.3\n"
        "exporters.to_opentelemetry('http://127.0.0.1:9/v1/traces')\nfor i in range(5):\n    with events.span('x'): pass\n"
    )
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert time.monotonic() - start < 30


def fail() -> None:
    emit("training.step", step=1, loss=float("nan"), lr=1e-4)
    raise ValueError("bad")


def a_run(folder: Path) -> None:
    with open_run(folder, CONFIG):
        for step in (1, 2, 3):
            emit("training.step", step=step, loss=2.0 / step, grad_norm=1.0, lr=1e-4, tokens=10)
        emit("training.evaluated", step=3, dev_loss=0.75)
        emit("evaluation.done", dataset="minifact", estimates={"label_accuracy": 0.5}, duration_s=1.0)
    with pytest.raises(ValueError, match="bad"), open_run(folder.with_name("failing"), CONFIG):
        fail()
    emit("training.step", step=9, loss=1.0)  # in no run


def test_mlflow_keeps_each_run_with_parameters_and_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    where = (tmp_path / "mlruns").as_uri()
    end = to_mlflow("reliability", tracking_uri=where)
    a_run(tmp_path / "first")
    end()
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=where)
    experiment = client.get_experiment_by_name("reliability")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert {name: run.info.status for name, run in runs.items()} == {"first": "FINISHED", "failing": "FAILED"}
    assert runs["first"].data.params == {"base_model": "tiny", "lora.rank": "4"}
    curve = client.get_metric_history(runs["first"].info.run_id, "train/loss")
    assert [(point.step, point.value) for point in curve] == [(1, 2.0), (2, 1.0), (3, 2.0 / 3)]
    assert runs["first"].data.metrics["dev/loss"] == 0.75
    assert runs["first"].data.metrics["eval/minifact/label_accuracy"] == 0.5
    assert runs["failing"].data.metrics == {"train/lr": 1e-4}


def test_wandb_keeps_each_run_on_this_disk(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    code = (
        "import sys\nfrom pathlib import Path\nfrom crucible_framework import events, exporters\nfrom crucible_framework.store import open_run\n"
        "end = exporters.to_wandb('reliability', x_disable_stats=True)\n"
        "with open_run(Path('first'), {'base_model': 'tiny', 'lora': {'rank': 4}}):\n"
        "    for step in (1, 2): events.emit('training.step', step=step, loss=2.0 / step)\nend()\n"
    )
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_CACHE_DIR": str(tmp_path), "WANDB_DATA_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=tmp_path, env={**os.environ, **environment})
    records = list(_wandb_records(next(tmp_path.glob("wandb/offline-run-*/*.wandb"))))
    run = next(one.run for one in records if one.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name) == ("reliability", "first")
    config = {item.key or "/".join(item.nested_key): item.value_json for item in run.config.update}
    assert (config["base_model"], config["lora.rank"]) == ('"tiny"', "4")
    history = [{item.key or item.nested_key[0]: item.value_json for item in one.history.item} for one in records if one.WhichOneof("record_type") == "history"]
    assert [(row["_step"], float(row["train/loss"])) for row in history] == [("1", 2.0), ("2", 1.0)]
    assert [one.exit.exit_code for one in records if one.WhichOneof("record_type") == "exit"] == [0]


def _wandb_records(path: Path) -> Iterator[Any]:
    """The records of W&B's own log: LevelDB's format (blocks of 32 kB; a record's parts have CRC, length and kind) behind a head of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def test_trackio_keeps_each_run_in_its_database(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    code = (
        "import sys\nfrom pathlib import Path\nfrom crucible_framework import events, exporters\nfrom crucible_framework.store import open_run\n"
        "end = exporters.to_trackio('reliability')\n"
        "with open_run(Path('first'), {'base_model': 'tiny'}):\n"
        "    for step in (1, 2): events.emit('training.step', step=step, loss=2.0 / step)\nend()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=tmp_path, env={**os.environ, "TRACKIO_DIR": str(tmp_path)})
    with contextlib.closing(sqlite3.connect(tmp_path / "reliability.db")) as db:
        rows = [
            (run, step, json.loads(metrics)["train/loss"]) for run, step, metrics in db.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step")
        ]
        config = json.loads(db.execute("SELECT config FROM configs").fetchone()[0])
    assert rows == [("first", 1, 2.0), ("first", 2, 1.0)]
    assert config["base_model"] == "tiny"


@pytest.mark.parametrize(("sink", "package"), [(to_mlflow, "mlflow-skinny"), (to_wandb, "wandb"), (to_trackio, "trackio")])
def test_a_library_that_is_not_installed_is_named_at_once(sink: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        sink()
    assert events._sinks == []
