"""The whole way in one call: base evaluated, adapter trained, saved and registered, sampled, evaluated on the same items, compared, reported.

Everything is kept in one run folder; a second call there continues where the first one ended and repeats nothing that is on disk. The
demo knows no more than its parts: each step is one call that a reader can copy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, cast

from . import files
from .backends import connect
from .config import differing_keys, to_dict
from .data import load_dataset
from .errors import ConfigError, NotFoundError
from .evaluation import compare, evaluate
from .inference import ChoiceSampler
from .protocols import Sampler
from .records import (
    AdamConfig,
    Checkpoint,
    Dataset,
    Evaluation,
    Finding,
    Json,
    LoraConfig,
    ModelVersion,
    SamplingParams,
    TrainConfig,
    TrainingResult,
    record,
)
from .reports import write_report
from .store import Models
from .training import Callback, Trainer

__all__ = ["DemoResult", "run_demo"]

ANSWER = SamplingParams(max_tokens=20, temperature=0.0)
SCORERS = ("label_accuracy", "exact_match")
SHOWN = 12
Stage = Literal["base", "base by likelihood", "adapter"]


@record
class DemoResult:
    """What the demo found.

    Attributes:
        base, adapter: both asked to write the label.
        preferred: the base again, scored by which label it finds likeliest: it may know more than it says.
        finding: adapter − base in label accuracy on the same claims, clustered by passage.
        fair: adapter − preferred, the harder comparison.
    """

    training: TrainingResult
    base: Evaluation
    preferred: Evaluation
    adapter: Evaluation
    finding: Finding
    fair: Finding
    model: ModelVersion
    report: Path

    @property
    def better(self) -> bool:
        """Whether both intervals lie above zero as a whole."""
        return self.finding.interval[0] > 0 and self.fair.interval[0] > 0


def demo_config(base_model: str, dataset: str, *, quick: bool, seed: int = 0) -> TrainConfig:
    """What the demo trains: LoRA on all linear layers, claims about one passage together. Abstracts are longer, so fewer of them fit the time."""
    lora = LoraConfig(rank=16, alpha=32.0, dropout=0.05, target_modules=("all-linear",), seed=seed)
    steps, size, length = (120, 9, 1024) if quick or dataset == "minifact" else (40, 4, 512)
    return TrainConfig(
        base_model=base_model, lora=lora, adam=AdamConfig(lr=1e-2 if quick else 2.5e-3), batch_size=size, max_steps=steps, warmup_steps=5,
        schedule="linear", batching="prefix", checkpoint_interval=steps // 4, max_length=length, seed=seed,
    )  # fmt: skip


def run_demo(
    dataset: str = "minifact",
    *,
    base_model: str | None = None,
    folder: str | Path = "runs/demo",
    quick: bool = False,
    seed: int = 0,
    callbacks: tuple[Callback, ...] = (),
    progress: Callable[[Stage, int, int], None] | None = None,
    command: str = "crucible demo",
) -> DemoResult:
    """Fine-tunes an adapter to judge claims and says with a paired interval whether it beats its base.

    Args:
        dataset: one with a `verify` task: "minifact" (shipped) or "scifact" (needs its files, see `load_dataset`).
        base_model: "smollm2-135m", or "tiny" with `quick`, where None.
        folder: the run folder; a finished or interrupted demo there is continued.
        quick: few examples and, unless `base_model` says otherwise, the built-in tiny model: under 90 seconds on two cores.
        seed: of the adapter, the dropout and the batches.
        callbacks: for the trainer.
        progress: called with (stage, done, in all) during evaluations.
        command: recorded in the report.

    Raises:
        DataError: the files of the data set are not there; the message says where to put them.
        ConfigError: the folder holds another run.
    """
    folder = Path(folder)
    base_model = base_model or ("tiny" if quick else "smollm2-135m")
    limit = 90 if quick else 600
    train = load_dataset(dataset, split="train", task="verify", limit=limit)
    test = load_dataset(dataset, split="test", task="verify", limit=54 if quick else 162 if dataset == "minifact" else 90)
    config = demo_config(base_model, dataset, quick=quick, seed=seed)
    _check_folder(folder, config)

    def judged(sampler: Sampler, label: Stage) -> Evaluation:
        told = None if progress is None else partial(progress, label)
        return evaluate(sampler, test, SCORERS, params=ANSWER, label=label, folder=folder / "eval" / label, in_flight=9, progress=told)

    with connect("local") as backend:
        base = judged(backend.sampler(base_model), "base")
        preferred = judged(ChoiceSampler(backend.sampler(base_model), test.card.labels, by="mean"), "base by likelihood")
        with Trainer(backend, config, folder=folder, callbacks=callbacks, resume=True, command=command) as trainer:
            training = trainer.train(train)
            if training.checkpoint is None or training.stopped == "signal":
                raise KeyboardInterrupt
        adapter = judged(backend.sampler(training.checkpoint), "adapter")
    finding = compare(base, adapter, "label_accuracy")
    fair = compare(preferred, adapter, "label_accuracy", name="label_accuracy, base asked by likelihood")
    model = _registered(folder, training.checkpoint, adapter)
    files.write_json(folder / "findings.json", {"findings": [to_dict(finding), to_dict(fair)]})
    files.write_json(folder / "samples.json", {"samples": _samples(test, base, adapter)})
    report = next(path for path in write_report(folder) if path.suffix == ".html")
    return DemoResult(training=training, base=base, preferred=preferred, adapter=adapter, finding=finding, fair=fair, model=model, report=report)


def _check_folder(folder: Path, config: TrainConfig) -> None:
    """Says so before the base model is evaluated, not after, when the folder belongs to another run."""
    try:
        there = files.read_json(folder / "config.json")
    except NotFoundError:
        return
    keys = differing_keys(cast("dict[str, Json]", there), cast("dict[str, Json]", to_dict(config)))
    if keys:
        raise ConfigError(f"{str(folder)!r} holds another run (it differs in {', '.join(keys)}). Choose another folder with --folder, or remove it.")


def _registered(folder: Path, checkpoint: Checkpoint, adapter: Evaluation) -> ModelVersion:
    models = Models(folder.parent / "models")
    tags = {"dataset": adapter.card.name, "run": folder.name, "checkpoint_sha256": checkpoint.sha256}
    for version in models.find(tags={"checkpoint_sha256": checkpoint.sha256}):
        return version
    accuracy = adapter["label_accuracy"]
    return models.register(
        checkpoint,
        name=folder.name,
        tags=tags,
        metrics={"label_accuracy": accuracy.value},
        description=f"Judges claims; made by the demo from {checkpoint.base_model}.",
    )


def _samples(test: Dataset, base: Evaluation, adapter: Evaluation) -> list[Json]:
    """The same items' completions side by side: the first claim of each document in turn, so that no answer is chosen by hand."""
    pairs = {item.id: (item, other) for item, other in zip(base.items, adapter.items, strict=True) if item.id == other.id}
    seen: dict[str, int] = {}
    ranked: list[tuple[int, str]] = []
    for item in base.items:
        rank = seen.setdefault(item.document, 0)
        seen[item.document] += 1
        ranked.append((rank, item.id))
    chosen = [identity for _, identity in sorted(ranked, key=lambda pair: pair[0])][:SHOWN]
    prompts = {example.id: example.prompt for example in test}
    return [
        {
            "id": identity, "document": pairs[identity][0].document, "prompt": to_dict(prompts[identity]), "target": pairs[identity][0].target,
            "base": pairs[identity][0].completion, "adapter": pairs[identity][1].completion,
        }
        for identity in chosen
    ]  # fmt: skip
