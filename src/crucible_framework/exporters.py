"""Events in other programs' formats: OpenTelemetry (OTLP), MLflow, Weights & Biases and trackio. All optional, all behind a `Queued` sink.

Nothing here is imported, connected or written in the caller's thread: a target that is slow, dead or not there costs what an append costs,
and holds up the end of the process for EXIT_S seconds at the most. The trackers get each run with its configuration as parameters, the
numbers of `training.*` events under the names of metrics.jsonl, and estimates of evaluations under "eval/<data set>/<measure>".
`Tracker.export` copies a whole run afterwards. Prometheus reads the server's `/metrics`; see `server`.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import orjson

from .errors import ConfigError, CrucibleError
from .events import Event
from .files import read_json
from .records import Json
from .sinks import Queued

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

__all__ = ["EXIT_S", "Begin", "Copy", "flat", "mlflow_copies", "to_mlflow", "to_opentelemetry", "to_trackio", "to_wandb", "trackio_copies", "wandb_copies"]

EXIT_S = 5.0
_MOST_PARAMS, _MOST_METRICS, _MOST_SIGNS = 100, 1000, 6000
"""What MLflow takes in one call, and of one parameter."""


# ------------------------------------------------------------------------------------------------------------- trackers
class Copy(Protocol):
    """One run, as another tracker keeps it."""

    def log(self, step: int, values: Mapping[str, float], ts: float) -> None:
        """Takes the numbers of a step; `ts` is in seconds since the epoch."""

    def end(self, status: str) -> None:
        """Says how the run ended ("done", "failed", "stopped", …) and waits until all of it was handed over."""


Begin = Callable[[str, Mapping[str, Json]], Copy]
"""Starts a copy of the run of that name with these parameters."""


def flat(tree: Mapping[str, Json], prefix: str = "") -> dict[str, Json]:
    """A configuration as dotted keys with plain values."""
    found: dict[str, Json] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _needed(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{package} is not installed. Install it: pip install {package}")


_STEP = {"loss": "train/loss", "grad_norm": "grad/global_norm", "lr": "train/lr", "tokens": "train/tokens", "epoch": "epoch", "dev_loss": "dev/loss"}


def _measured(event: Event) -> dict[str, float]:
    if event["name"] == "evaluation.done":
        estimates = event.get("estimates")
        pairs = [(f"eval/{event.get('dataset', 'data')}/{key}", value) for key, value in (estimates if isinstance(estimates, dict) else {}).items()]
    elif event["name"] in ("training.step", "training.evaluated"):
        pairs = [(name, event.get(key)) for key, name in _STEP.items()]
    else:
        return {}
    return {key: float(value) for key, value in pairs if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)}


def _parameters(folder: Json) -> dict[str, Json]:
    try:
        config = read_json(Path(str(folder)) / "config.json")
    except CrucibleError:  # a run of another machine, or gone
        return {}
    return flat(config) if isinstance(config, dict) else {}


def _relay(connect: Callable[[], Begin]) -> Queued:
    """A sink that opens a copy of every run it hears of. What comes in no run has no place in a tracker and is left out."""
    copies: dict[str, Copy] = {}
    steps: dict[str, int] = {}
    begin: list[Begin] = []

    def copy_of(run: str, event: Event) -> Copy:
        if run not in copies:
            if not begin:
                begin.append(connect())
            copies[run] = begin[0](run, _parameters(event.get("path")) if event["name"] == "run.started" else {})
        return copies[run]

    def write(batch: Sequence[Event]) -> None:
        for event in batch:
            run, step = str(event.get("run") or ""), event.get("step")
            if not run:
                continue
            if isinstance(step, int):
                steps[run] = step
            if event["name"] == "run.started":
                copy_of(run, event)
            elif values := _measured(event):
                copy_of(run, event).log(steps.get(run, 0), values, float(cast("float", event["ts"])))
            elif event["name"] == "run.ended" and run in copies:
                copies.pop(run).end(str(event.get("status")))

    def close() -> None:
        for copy in copies.values():
            copy.end("stopped")

    return Queued(write, exit_s=EXIT_S, close=close)


def mlflow_copies(experiment: str, tracking_uri: str = "") -> Begin:
    """Copies of runs in an MLflow experiment, which is made if need be. `tracking_uri` "": what MLFLOW_TRACKING_URI says.

    Raises:
        ConfigError: MLflow is not installed (mlflow-skinny is enough).
    """
    _needed("mlflow", "mlflow-skinny")
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri or None)
    known = client.get_experiment_by_name(experiment)
    where = str(known.experiment_id if known else client.create_experiment(experiment))

    class Run:
        def __init__(self, name: str, params: Mapping[str, Json]) -> None:
            self.id = str(client.create_run(where, run_name=name, tags={"crucible.run": name}).info.run_id)
            self.waiting: list[Metric] = []
            rows = [Param(key, str(value)[:_MOST_SIGNS]) for key, value in params.items()]
            for start in range(0, len(rows), _MOST_PARAMS):
                client.log_batch(self.id, params=rows[start : start + _MOST_PARAMS])

        def log(self, step: int, values: Mapping[str, float], ts: float) -> None:
            self.waiting += [Metric(key, value, int(ts * 1000), step) for key, value in values.items()]
            if len(self.waiting) >= _MOST_METRICS // 2:
                self.flush()

        def flush(self) -> None:
            rows, self.waiting = self.waiting, []
            for start in range(0, len(rows), _MOST_METRICS):
                client.log_batch(self.id, metrics=rows[start : start + _MOST_METRICS])

        def end(self, status: str) -> None:
            self.flush()
            client.set_terminated(self.id, {"done": "FINISHED", "failed": "FAILED"}.get(status, "KILLED"))

    return Run


class _Logger:
    """wandb and trackio have one way to say it."""

    def __init__(self, run: object, codes: bool) -> None:
        self._run, self._codes = cast("_Loggable", run), codes

    def log(self, step: int, values: Mapping[str, float], ts: float) -> None:
        del ts  # both stamp rows themselves
        self._run.log(dict(values), step=step)

    def end(self, status: str) -> None:
        if self._codes:
            self._run.finish(exit_code=int(status == "failed"))
        else:
            self._run.finish()


class _Loggable(Protocol):
    def log(self, values: dict[str, float], *, step: int) -> None: ...

    def finish(self, exit_code: int = 0) -> None: ...


def wandb_copies(project: str, **settings: object) -> Begin:
    """Copies of runs in a Weights & Biases project; WANDB_MODE=offline keeps them on this disk.

    Args:
        project: made if need be.
        settings: fields of `wandb.Settings` to be set otherwise.

    Raises:
        ConfigError: wandb is not installed.
    """
    _needed("wandb", "wandb")
    import wandb

    given = {"silent": True, "console": "off", "finish_timeout": EXIT_S, "finish_timeout_raises": False} | settings
    chosen = wandb.Settings.model_validate(given)

    def begin(name: str, params: Mapping[str, Json]) -> Copy:
        made = wandb.init(project=project, name=name, config=dict(params), reinit="create_new", settings=chosen)
        return _Logger(made, codes=True)

    return begin


def trackio_copies(project: str) -> Begin:
    """Copies of runs in a trackio project, in its own folder (TRACKIO_DIR).

    Raises:
        ConfigError: trackio is not installed.
    """
    _needed("trackio", "trackio")
    import trackio  # pyright: ignore[reportMissingImports] # optional, and no dependency of the tests

    def begin(name: str, params: Mapping[str, Json]) -> Copy:
        return _Logger(trackio.init(project=project, name=name, config=dict(params), embed=False), codes=False)

    return begin


def to_mlflow(experiment: str = "crucible", *, tracking_uri: str = "") -> Callable[[], None]:
    """Every run from now on is copied to an MLflow experiment as it goes; returns a function that ends it.

    Raises:
        ConfigError: MLflow is not installed (mlflow-skinny is enough).
    """
    _needed("mlflow", "mlflow-skinny")
    return _relay(lambda: mlflow_copies(experiment, tracking_uri)).listen()


def to_wandb(project: str = "crucible", **settings: object) -> Callable[[], None]:
    """Every run from now on is copied to a Weights & Biases project as it goes; returns a function that ends it.

    Raises:
        ConfigError: wandb is not installed.
    """
    _needed("wandb", "wandb")
    return _relay(lambda: wandb_copies(project, **settings)).listen()


def to_trackio(project: str = "crucible") -> Callable[[], None]:
    """Every run from now on is copied to a trackio project as it goes; returns a function that ends it.

    Raises:
        ConfigError: trackio is not installed.
    """
    _needed("trackio", "trackio")
    return _relay(lambda: trackio_copies(project)).listen()


# -------------------------------------------------------------------------------------------------------- OpenTelemetry
_GENAI: Mapping[str, str] = {
    "model": "gen_ai.request.model",
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "seed": "gen_ai.request.seed",
    "n": "gen_ai.request.choice.count",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "tokens": "gen_ai.usage.output_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
}
"""Field of `inference.sample` → attribute. Source: OpenTelemetry semantic conventions for generative AI (development status), as of 2026-10."""
_OPERATION = "chat"


def _attributes(event: Event) -> dict[str, str | int | float | bool]:
    name = str(event["name"])
    found: dict[str, str | int | float | bool] = {"crucible.run": str(event.get("run", ""))} if event.get("run") else {}
    inference = name.startswith("inference.")
    if inference:
        found |= {"gen_ai.operation.name": _OPERATION, "gen_ai.provider.name": "crucible"}
    area = "train" if name.startswith("training.") else name.partition(".")[0]
    for key, value in event.items():
        if key in ("ts", "name", "run", "span", "parent", "trace", "kind", "duration_s", "seq") or value is None:
            continue
        plain = value if isinstance(value, (str, int, float, bool)) else orjson.dumps(value, default=str).decode()
        if key == "error":
            found["error.type"] = str(value)
        else:
            found[_GENAI[key] if inference and key in _GENAI else f"crucible.{area}.{key}"] = plain
    return found


def _title(event: Event) -> str:
    """A call of a model is "chat <model>", as the conventions have it; all else keeps its name."""
    return f"{_OPERATION} {event['model']}" if event["name"] == "inference.sample" and event.get("model") else str(event["name"])


def _otlp(endpoint: str) -> SpanProcessor:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError("The OTLP exporter is not installed. Install it: pip install 'crucible-framework[otel]'") from error
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=EXIT_S), export_timeout_millis=EXIT_S * 1000)


def to_opentelemetry(target: SpanProcessor | str) -> Callable[[], None]:
    """Sends spans, and other events as spans without length, to OpenTelemetry; returns a function that ends it.

    Ids are kept, so that what other services report under a `traceparent` of ours hangs below the right span.

    Args:
        target: a collector's whole address ("http://127.0.0.1:4318/v1/traces", OTLP over HTTP), or a span processor of your own.

    Raises:
        ConfigError: the packages of the extra `otel` are not installed.
    """
    try:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.id_generator import IdGenerator
        from opentelemetry.trace import NonRecordingSpan, SpanContext, StatusCode, TraceFlags, set_span_in_context
    except ImportError as error:
        raise ConfigError("OpenTelemetry is not installed. Install it: pip install 'crucible-framework[otel]'") from error

    class Ours(IdGenerator):
        trace, span = 0, 0

        def generate_span_id(self) -> int:
            return self.span or int.from_bytes(os.urandom(8), "big") | 1

        def generate_trace_id(self) -> int:
            return self.trace or int.from_bytes(os.urandom(16), "big") | 1

    ids = Ours()
    provider = TracerProvider(id_generator=ids, shutdown_on_exit=False)
    provider.add_span_processor(_otlp(target) if isinstance(target, str) else target)
    tracer = provider.get_tracer("crucible_framework")

    def send(event: Event) -> None:
        is_span = event.get("kind") == "span"
        ids.trace = int(str(event.get("trace") or "0"), 16)
        ids.span = int(str(event["span"]), 16) if is_span else 0
        above = str(event.get("parent") if is_span else event.get("span")) if ids.trace else ""
        context = None
        if above:
            context = set_span_in_context(NonRecordingSpan(SpanContext(ids.trace, int(above, 16), is_remote=False, trace_flags=TraceFlags(1))))
        end_ns = int(float(cast("float", event["ts"])) * 1e9)
        start_ns = end_ns - int(float(cast("float", event.get("duration_s") or 0.0)) * 1e9)
        made = tracer.start_span(_title(event), context=context, start_time=start_ns, attributes=_attributes(event))
        if event.get("error"):
            made.set_status(StatusCode.ERROR, str(event["error"]))
        made.end(end_ns)

    def write(batch: Sequence[Event]) -> None:
        for event in batch:
            send(event)

    return Queued(write, exit_s=EXIT_S, close=provider.shutdown).listen()
