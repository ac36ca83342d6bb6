"""A run folder as the other parts write it: the run through `open_run` and `files.publish`, evaluations in their documented shape."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from crucible_framework.config import to_dict
from crucible_framework.files import JsonLines, read_json, write_json
from crucible_framework.records import AdamConfig, Checkpoint, DatasetCard, Estimate, FileCard, Finding, Json, LoraConfig, TrainConfig
from crucible_framework.reports import write_report
from crucible_framework.stats import mean_estimate, paired_difference
from crucible_framework.store.runs import open_run

LABELS = ("SUPPORT", "CONTRADICT", "NOT_ENOUGH_INFO")
MakeRun = Callable[..., Path]


def _card(split: str, rows: int, sha: str) -> DatasetCard:
    return DatasetCard(
        name="minifact", split=split, task="verify", rows=rows, sha256=sha * 64, licence="CC0-1.0", source="https://example.org/minifact",
        labels=LABELS, files=(FileCard(name="claims.jsonl", sha256="f" * 64, size_bytes=48_213),),
    )  # fmt: skip


def _train(folder: Path, config: TrainConfig, steps: int, command: str) -> None:
    draw = random.Random(7)
    environment: dict[str, Json] = {
        "python": "3.11.9", "system": "Linux 6.1 x86_64", "processor": "Example CPU", "cores": 2,
        "packages": {"torch": "2.13.0", "numpy": "2.3.1"}, "not_honoured": ["lora.dropout"],
    }  # fmt: skip
    if command:
        environment["command"] = command
    plain = to_dict(config)
    assert isinstance(plain, dict)
    with open_run(folder, plain, environment=environment) as run:
        run.write_json(
            "data.json", {"train": _card("train", 240, "a"), "dev": _card("dev", 60, "b"), "truncated": {"prompts": 3, "completions": 1, "tokens": 51234}}
        )
        run.log_metrics({"step": 0, "epoch": 0.0, "probe/loss": 2.4137})
        for step in range(1, steps + 1):
            loss = 0.6 + 1.8 * math.exp(-step / 25) + draw.gauss(0, 0.12)
            norm = 3 * math.exp(draw.gauss(0, 0.5)) / (1 + step / 20)
            row: dict[str, Json] = {"step": step, "epoch": step / 60, "train/loss": loss, "train/tokens": 400}
            run.log_metrics(row | {"train/lr": 1e-4 * (1 - step / steps), "grad/global_norm": norm})
            run.log_timing({"step": step, "step_s": 0.5, "tokens_per_s": 800.0 + step, "memory_bytes": 1_200_000_000})
            if step % 20 == 0:
                run.log_metrics({"step": step, "epoch": step / 60, "dev/loss": loss + 0.07})
        run.log_metrics({"step": steps, "epoch": steps / 60, "probe/loss": 0.7219})
        checkpoint = Checkpoint(name="final", uri="x", kind="state", step=steps, base_model=config.base_model, lora=config.lora)

        def write(into: Path) -> None:
            (into / "adapter_model.safetensors").write_bytes(b"\x01" * 5000)

        run.checkpoints.publish(checkpoint, write, metrics={"train/loss": 0.7}, fingerprint=run.fingerprint)
        losses: dict[str, Json] = {"initial_loss": 2.4137, "final_loss": 0.7219, "best_dev_loss": 0.7}
        run.finish(losses | {"steps": steps, "epochs": steps / 60, "tokens": 400 * steps, "duration_s": 61.5, "stopped": "max_steps"})


def _evaluate(folder: Path, label: str, chance: float, texts: tuple[str, ...], prompts: tuple[str, ...]) -> list[dict[str, Json]]:
    draw = random.Random(label)
    rows: list[dict[str, Json]] = []
    for index in range(96):
        target = LABELS[index % 3]
        right = draw.random() < chance
        said = target if right else LABELS[(index + 1) % 3]
        extra = texts[index % len(texts)] if texts else ""
        rows.append({
            "id": f"claim-{index}", "document": f"doc-{index % 32}", "target": target, "completion": f"{said}{extra}",
            "scores": {"label_accuracy": float(right), "f1": round(0.9 if right else draw.random() / 3, 4)}, "details": {},
            "prompt": prompts[index % len(prompts)] if prompts else f"Claim {index}: water boils at {index} degrees.\nDoes the passage support it?",
        })  # fmt: skip
    place = folder / "eval" / label
    log = JsonLines(place / "scores.jsonl")
    for row in rows:
        log.append(row)
    log.close()
    clusters = [str(row["document"]) for row in rows]
    estimates: list[Estimate] = [mean_estimate(name, _values(rows, name), clusters=clusters) for name in ("label_accuracy", "f1")]
    estimates.append(Estimate(name="majority_label", value=1 / 3, low=0.24, high=0.43, n=96, method="share of the commonest label"))
    body = {
        "label": label,
        "model": f"smollm2-135m#{label}",
        "card": _card("test", 96, "c"),
        "params": {"max_tokens": 32, "temperature": 0.0, "stop": ["\n"]},
        "estimates": estimates,
        "omitted": {"perplexity": "not asked"},
    }
    write_json(place / "evaluation.json", body)
    return rows


def _values(rows: list[dict[str, Json]], name: str) -> list[float | None]:
    found = []
    for row in rows:
        scores = row["scores"]
        assert isinstance(scores, dict)
        value = scores[name]
        assert isinstance(value, float)
        found.append(value)
    return list(found)


def _build(
    folder: Path,
    *,
    steps: int = 120,
    evaluated: bool = True,
    compared: bool = True,
    chances: tuple[float, float] = (0.35, 0.75),
    command: str = "crucible train --data minifact --set lora.rank=8",
    texts: tuple[str, ...] = (),
    prompts: tuple[str, ...] = (),
    samples: tuple[dict[str, Json], ...] = (),
) -> Path:
    config = TrainConfig(base_model="smollm2-135m", lora=LoraConfig(rank=8), adam=AdamConfig(lr=1e-4), max_steps=steps)
    _train(folder, config, steps, command)
    if evaluated:
        base = _evaluate(folder, "base", chances[0], texts, prompts)
        adapter = _evaluate(folder, "adapter", chances[1], texts, prompts)
        clusters = [str(row["document"]) for row in base]
        findings: list[Finding] = [
            paired_difference(f"{name}: adapter − base", _values(base, name), _values(adapter, name), clusters=clusters) for name in ("f1", "label_accuracy")
        ]
        if compared:
            write_json(folder / "findings.json", {"findings": findings})
    if samples:
        write_json(folder / "samples.json", {"samples": list(samples)})
    return folder


@pytest.fixture
def make_run() -> MakeRun:
    """Builds a run folder; see `_build` for what can be varied."""
    return _build


class Page(HTMLParser):
    """Tags, attributes and text by the class or tag that they stand in."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, str]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.feed(source)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if not self.open:
            assert not data.strip()
            return
        self.texts.append((tuple(f"{tag}.{css}" for tag, css in self.open), data))

    def inside(self, name: str) -> list[str]:
        return [text for path, text in self.texts if any(name in re.split(r"[. ]", part) for part in path)]

    def text(self) -> str:
        return " ".join(text for path, text in self.texts if not any(part.startswith(("style.", "title.")) for part in path)).replace("\u00a0", " ")


@pytest.fixture
def report() -> Callable[[Path], tuple[Page, str]]:
    """Writes both formats of a run's report and reads them back; Markdown without its backslashes."""

    def read(folder: Path) -> tuple[Page, str]:
        html, markdown = write_report(folder)
        return Page(html.read_text(encoding="utf-8")), markdown.read_text(encoding="utf-8").replace("\u00a0", " ").replace("\\", "")

    return read


@pytest.fixture
def parsed() -> Callable[[str], Page]:
    """Reads HTML; it fails where tags do not match."""
    return Page


@pytest.fixture
def change() -> Callable[[Path, str, object], None]:
    """Replaces the value of a key in a JSON file."""

    def replace(path: Path, key: str, value: object) -> None:
        body = read_json(path)
        assert isinstance(body, dict)
        write_json(path, {**body, key: value})

    return replace
