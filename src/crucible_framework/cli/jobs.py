"""What the command line adds to a training configuration: which data, which backend, which folder; and how names become models."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import from_dict, load_toml, merge, parse_overrides, places
from ..data import load_dataset, with_shots
from ..errors import ConfigError, NotFoundError, UnknownNameError
from ..evaluation import require_sandbox
from ..protocols import Sampler, StreamSampler
from ..records import Checkpoint, Completion, Dataset, Message, SamplingParams, TrainConfig, record
from ..sinks import to_jsonl
from ..store import Checkpoints, Models, load_checkpoint
from .live import ask_aloud

__all__ = ["DataChoice", "TrainJob", "chat", "kept_events", "load_data", "load_job", "load_rows", "numbers", "resolve_model", "runnable"]


@record
class DataChoice:
    """Which rows: a data set's name or path, its splits, and how many of them."""

    name: str = "minifact"
    split: str = "train"
    dev: str | None = None
    task: str | None = None
    limit: int | None = None


@record
class TrainJob(TrainConfig):
    """A TOML file of `crucible train`: the keys of `TrainConfig`, and `[data]`, `backend` and `folder`."""

    data: DataChoice = DataChoice()
    backend: str = "local"
    folder: str = "runs/first"

    def config(self) -> TrainConfig:
        """The part that decides what is computed."""
        return TrainConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(TrainConfig)})


def load_job(file: Path | None, settings: list[str], flags: dict[str, object]) -> TrainJob:
    """TOML, then `--set`, then flags; later ones win."""
    tree = load_toml(file) if file else {}
    tree = merge(merge(tree, parse_overrides(settings)), {key: value for key, value in flags.items() if value is not None})
    return from_dict(TrainJob, tree)


def load_data(choice: DataChoice, split: str) -> Dataset:
    """The chosen rows of a split."""
    return load_dataset(choice.name, split=split, task=choice.task, limit=choice.limit)


def load_rows(choice: DataChoice, split: str, shots: int) -> Dataset:
    """The chosen rows of a split, each with solved examples of `train` (of `dev` where the data set has no `train`) before it."""
    rows = load_data(choice, split)
    if not shots:
        return rows
    try:
        pool = load_dataset(choice.name, split="train", task=choice.task)
    except UnknownNameError:
        pool = load_dataset(choice.name, split="dev", task=choice.task)
    return with_shots(rows, pool, shots)


def runnable(names: list[str], *, unsafe: bool) -> tuple[str, ...]:
    """The scorers' names, where one that runs code has its sandbox or the user's word that it needs none.

    Raises:
        UnsafeError: there is no sandbox, before any model is loaded.
    """
    if "passes_tests" in names and not unsafe:
        require_sandbox("--unsafe-local")
    return tuple("passes_tests_unsafely" if name == "passes_tests" and unsafe else name for name in names)


def numbers(flag: str, text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--{flag} is {text!r}; expected whole numbers with commas between, for example 1,10.") from error


def resolve_model(reference: str) -> str | Checkpoint:
    """A checkpoint for a run folder, a checkpoint folder or a registered model; any other text is the name of a base model.

    Raises:
        NotFoundError: the run folder has no checkpoint yet.
    """
    folder = Path(reference)
    if (folder / "manifest.json").is_file():
        return load_checkpoint(folder)
    for run in (folder, places().runs / reference):
        if (run / "run.json").is_file():
            return _latest(run)
    models = Models(places().runs / "models")
    name = reference.partition(":")[0].partition("@")[0]
    if any(version.name == name for version in models.list()):
        return models.get(reference).checkpoint
    return reference


def _latest(run: Path) -> Checkpoint:
    found = Checkpoints(run / "checkpoints").list()
    if not found:
        raise NotFoundError(f"The run {str(run)!r} has no checkpoint yet. Train it first, or resume it with `crucible train … --resume`.")
    return load_checkpoint(found[-1].local_path or run)


@contextmanager
def kept_events() -> Iterator[None]:
    """What happens in the block, outside any run, goes to the workspace's events.jsonl, which the dashboard reads; nowhere without a workspace."""
    root = places().runs
    if not root.is_dir():
        yield
        return
    end = to_jsonl(root / "events.jsonl")
    try:
        yield
    finally:
        end()


def chat(sampler: Sampler, params: SamplingParams, messages: tuple[Message, ...]) -> tuple[Completion, ...]:
    """Turn by turn on standard input until an empty line or its end; the whole talk is the prompt each time. Answers are shown on a terminal."""
    said: list[Completion] = []
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            print("you> ", end="", file=sys.stderr, flush=True)
        words = sys.stdin.readline().strip()
        if not words:
            return tuple(said)
        messages = (*messages, Message(role="user", content=words))
        (answer,) = ask_aloud(sampler, messages, params, out=sys.stderr if terminal else None)
        if terminal and not isinstance(sampler, StreamSampler):
            print(answer.text, file=sys.stderr, flush=True)
        messages = (*messages, Message(role="assistant", content=answer.text))
        said.append(answer)
