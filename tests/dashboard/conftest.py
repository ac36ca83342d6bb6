"""Workspaces as the other parts of Crucible write them, and a small HTTP client that may lie about who it is."""

from __future__ import annotations

import http.client
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from crucible_framework import events
from crucible_framework.config import to_dict
from crucible_framework.dashboard import Dashboard
from crucible_framework.experiments import analyse, experiment_from, run
from crucible_framework.files import JsonLines, write_json
from crucible_framework.records import AdamConfig, Checkpoint, Estimate, Json, LoraConfig, TrainConfig
from crucible_framework.store import Models, open_run

from .asked import ask_everything

MakeRun = Callable[..., Path]


def build_run(folder: Path, *, steps: int = 40, lr: float = 1e-4, evaluated: bool = False, text: str = "", rank: int = 8) -> Path:
    """A finished run; `text` stands wherever the words of a model or a user may stand."""
    config = TrainConfig(base_model=text or "smollm2-135m", lora=LoraConfig(rank=rank), adam=AdamConfig(lr=lr), max_steps=steps)
    plain = to_dict(config)
    assert isinstance(plain, dict)
    with open_run(folder, plain, environment={"python": text or "3.11"}) as run:
        run.write_json("data.json", {"train": {"name": text or "minifact", "split": "train", "rows": 240, "sha256": "a" * 64}})
        for step in range(1, steps + 1):
            row: dict[str, Json] = {"step": step, "epoch": step / 20, "train/loss": 0.5 + 2 * math.exp(-step / 10), "train/tokens": 400}
            layers = {f"grad/norm/layers.{i}.{text or 'q_proj'}": 0.1 * (i + 1) / step for i in range(3)}
            row |= {"grad/health/vanishing": 0.0, "grad/health/exploding": float(step == 2), **layers}
            run.log_metrics(row | {"train/lr": lr, "grad/global_norm": 1 + 1 / step, f"train/{text or 'extra'}": step % 3})
            run.log_timing({"step": step, "step_s": 0.5, "tokens_per_s": 800.0 + step, "memory_bytes": 1_000_000_000 + step})
        run.log_metrics({"step": steps, "epoch": steps / 20, "dev/loss": 0.6})
        with events.span("training.run", note=text or "first"):
            first = events.decision(text or "hedge", chose=text or "wait", among=(text or "wait", "fire"), because=text or "it was fast before", confidence=0.5)
            events.decision("route", chose="a", among=("a", "b"), because="cheaper", causes=(first,))
            events.emit("data.note", words=text or "plain")
        saved = Checkpoint(name="final", uri="x", kind="state", step=steps, base_model=config.base_model, lora=config.lora)
        for step in (steps // 2, steps):
            said: dict[str, Json] = {"step": step, "id": text or "claim-1", "prompt": text or "Is it so?", "target": text or "yes"}
            said["completion"] = text or f"said at {step}"
            run.log_timing({"step": step, "step_s": 0.5})
            with closing(JsonLines(folder / "watched.jsonl")) as watched:
                watched.append(said)
        run.checkpoints.publish(saved, lambda to: (to / "adapter_model.safetensors").write_bytes(b"\x01" * 500), metrics={"train/loss": 0.51}, fingerprint="f")
    if evaluated:
        evaluate(folder, "adapter", 0.7, text)
        evaluate(folder, "base", 0.4, text)
    if text:
        shown = [{"id": text, "document": text, "prompt": text, "target": text, "base": text, "adapter": text}]
        write_json(folder / "samples.json", {"samples": shown})
    return folder


def evaluate(folder: Path, label: str, value: float, text: str = "") -> None:
    place = folder / "eval" / label
    log = JsonLines(place / "scores.jsonl")
    for index in range(4):
        said = text or "SUPPORTS"
        log.append({"id": f"c{index}", "document": f"d{index}", "target": said, "completion": said, "prompt": said, "scores": {"label_accuracy": 1.0}})
    log.close()
    estimate = Estimate(name="label_accuracy", value=value, low=value - 0.1, high=value + 0.1, n=96)
    card: dict[str, Json] = {"name": text or "minifact", "split": "test", "task": "claims", "rows": 4, "sha256": "c" * 64, "licence": "MIT", "source": text}
    write_json(place / "evaluation.json", {"label": label, "model": text or "m", "card": card, "params": {}, "estimates": [to_dict(estimate)]})


@pytest.fixture
def make_run() -> MakeRun:
    return build_run


def build_workspace(root: Path) -> Path:
    for index in range(3):
        build_run(root / f"run-{index}", steps=40 + 10 * index, lr=1e-4 * (index + 1), evaluated=index < 2)
    models = Models(root / "models")
    from crucible_framework.store import Checkpoints

    first = models.register(
        Checkpoints(root / "run-0" / "checkpoints").latest(), "judge", tags={"run": "run-0"}, metrics={"accuracy": 0.7}, description="Judges."
    )
    models.promote(f"{first.name}:{first.version}")
    models.register(Checkpoints(root / "run-1" / "checkpoints").latest(), "judge", parents=("judge:1",))
    ask_everything(root / "events.jsonl")
    build_study(root / "study")
    return root


def build_study(folder: Path, *, name: str = "Ranks", because: str = "more can change") -> Path:
    """A finished and analysed study on the fake backend: two arms, one seed."""
    tree = {
        "name": name, "backend": "fake", "seeds": [0], "scorers": ["label_accuracy"], "primary": "label_accuracy",
        "sampling": {"max_tokens": 4, "temperature": 0.0}, "train": {"base_model": "tiny", "max_steps": 2, "batch_size": 4, "checkpoint_interval": 2},
        "matrix": {"lora.rank": [2, 4]}, "data": {"name": "minifact", "train_limit": 8, "test_limit": 18},
        "hypotheses": [{"better": "lora.rank=4", "than": "base", "because": because}],
    }  # fmt: skip
    analyse(run(experiment_from(tree), folder, jobs=0))
    return folder


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three finished runs and two versions of a model; read only."""
    return build_workspace(tmp_path_factory.mktemp("workspace"))


class Client:
    """Asks with exactly the headers that it is given."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.address = urlsplit(url).netloc

    def ask(self, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.address, timeout=30)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            sent = {"host": self.address} | {key.replace("_", "-"): value for key, value in headers.items()}
            if body is not None:
                sent.setdefault("content-length", str(len(body)))
            for key, value in sent.items():
                connection.putheader(key, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def text(self, path: str) -> str:
        status, _, body = self.ask(path)
        assert status == 200, (path, status, body[-300:])
        return body.decode()


@pytest.fixture(scope="module")
def served(workspace: Path) -> Iterator[Client]:
    with Dashboard(workspace, every_s=0.02) as dashboard:
        yield Client(dashboard.url)


class Tags(HTMLParser):
    """All elements of a page with their attributes."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture
def tags() -> Callable[[str], Tags]:
    return Tags
