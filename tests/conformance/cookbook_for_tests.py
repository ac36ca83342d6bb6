"""tinker-cookbook as a user has it: `crucible serve` in one process, each recipe in another, no hub, and a folder of `org/name` folders.

What stands in for a hub's models and data sets is made here, from the cookbook's own example conversations. This file knows no assertion.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import tinker

from crucible_framework.data.byte_files import byte_tokenizer_files

TINY, SMALL = "local/tiny", "HuggingFaceTB/SmolLM2-135M-Instruct"
ANSWERER = "Qwen/Qwen3.5-9B"
"""The model that the recipe of the twenty questions names itself."""
SERVER = f"""
port = 0
folder = "kept"
models = ["tiny", "smollm2-135m"]
[options]
dtype = "float32"  # what the checks of numbers hold to; bf16 differs by some hundredths of a nat between sampler and trainer
[aliases]
"{TINY}" = "tiny"
"{SMALL}" = "smollm2-135m"
"{ANSWERER}" = "smollm2-135m"
"""

Row = dict[str, Any]
Figures = Callable[[str, object], None]
"""Keeps what a test measured; the end of the session shows it."""


RATE = 1e-3
"""At which the small model learns the conversations."""


class Lesson(NamedTuple):
    """A run of chat SFT: where it started, and its rows."""

    start: str
    rows: list[Row]


class Cookbook:
    """Runs what the cookbook holds.

    Args:
        home: the folder that `scripts/install_cookbook` made.
        folder: where recipes run; it holds `org/model` and `org/dataset` folders, logs and the server's files.
        url: the server's address.
    """

    def __init__(self, home: Path, folder: Path, url: str) -> None:
        self.packages, self.checks, self.folder, self.url = home / "site-packages", home / "checks", folder, url
        self.conversations = self.packages / "tinker_cookbook" / "example_data" / "conversations.jsonl"

    def run(self, *command: str) -> str:
        """What a Python command printed; a failure shows its end."""
        offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
        ours = {
            "PYTHONPATH": str(self.packages),
            "PYTHONUNBUFFERED": "1",
            "HF_HOME": str(self.folder / "hub"),
            "TINKER_COOKBOOK_RUNS_DIR": str(self.folder / "logs"),
        }
        service = {"TINKER_BASE_URL": self.url, "TINKER_API_KEY": "tml-local", "TINKER_TELEMETRY": "0"}
        done = subprocess.run(
            [sys.executable, *command], cwd=self.folder, env={**os.environ, **offline, **ours, **service}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}\n" + "\n".join((done.stdout + done.stderr).splitlines()[-40:])
        return done.stdout

    def recipe(self, module: str, model: str, log: str, *settings: str) -> list[Row]:
        """The rows that a recipe logged, one per step; a log that is there is gone on with."""
        given = [f"model_name={model}", "renderer_name=qwen3_instruct", f"log_path={self.folder / 'logs' / log}", "behavior_if_log_dir_exists=resume"]
        self.run("-m", f"tinker_cookbook.recipes.{module}", *given, *settings)
        lines = (self.folder / "logs" / log / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if len(row) > 12]  # the last row of RL holds totals alone

    def fresh(self, model: str) -> str:
        """A checkpoint of an adapter that has learnt nothing: recipes seed none, so that runs which shall be compared start from it."""
        with tinker.ServiceClient(base_url=self.url, api_key="tml-local") as client:
            training = client.create_lora_training_client(model, rank=16, seed=0).result()
            return training.save_state("fresh").result().path

    def chat(self, model: str, log: str, start: str, rate: float, epochs: int) -> list[Row]:
        """Chat SFT on the cookbook's own conversations, four steps an epoch."""
        settings = [f"dataset={self.conversations}", "batch_size=32", f"learning_rate={rate}", "lr_schedule=constant", f"num_epochs={epochs}"]
        return self.recipe("chat_sl.train", model, log, f"load_checkpoint_path={start}", *settings)

    def checkpoint(self, log: str, kind: str) -> str:
        """The path of the last checkpoint of a log: "state" or "sampler"."""
        lines = (self.folder / "logs" / log / "checkpoints.jsonl").read_text().splitlines()
        return str(json.loads(lines[-1])[f"{kind}_path"])


def write_tiny(folder: Path) -> None:
    """The tokenizer of the built-in model, under the name that the server's alias gives to it."""
    (folder / TINY).mkdir(parents=True)
    byte_tokenizer_files(folder / TINY)


def link_small(folder: Path, model: Path) -> None:
    """The small model's files likewise. Who answers the twenty questions is named by the recipe, whose renderer for that name wants two tokens:
    two special ones of the small model that no chat uses bear their names.
    """
    for name in (SMALL, ANSWERER):
        (folder / name).parent.mkdir()
    (folder / SMALL).symlink_to(model, target_is_directory=True)
    (folder / ANSWERER).mkdir()
    for file in model.glob("tokenizer*.json"):
        text = file.read_text().replace('"<issue_start>"', '"<think>"').replace('"<issue_closed>"', '"</think>"')
        (folder / ANSWERER / file.name).write_text(text)


def write_data(folder: Path, conversations: Path) -> None:
    """Data sets by the hub's names and in its shape: pairs of the right answer and another question's, and questions alone."""
    asked = list[tuple[str, str]]()
    for line in conversations.read_text().splitlines():
        turns = [turn for turn in json.loads(line)["messages"] if turn["role"] != "system"]
        if [turn["role"] for turn in turns] == ["user", "assistant"]:
            asked.append((turns[0]["content"], turns[1]["content"]))
    pairs = [{kind: f"\n\nHuman: {question}\n\nAssistant: {asked[(place + shift) % len(asked)][1]}" for kind, shift in (("chosen", 0), ("rejected", 1))}
             for place, (question, _) in enumerate(asked)]  # fmt: skip
    _write(folder / "Anthropic" / "hh-rlhf" / "train.jsonl", pairs[8:])
    _write(folder / "Anthropic" / "hh-rlhf" / "test.jsonl", pairs[:8])
    _write(folder / "zwhe99" / "DeepMath-103K" / "train.jsonl", [{"question": question} for question, _ in asked])


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a `crucible serve` that lives for the block."""
    folder.mkdir()
    config = folder / "serve.toml"
    config.write_text(SERVER)
    process = subprocess.Popen([sys.executable, "-m", "crucible_framework", "serve", config.name], cwd=folder, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = list[str]()
    rest = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)  # a pipe that nobody empties stops the server
    try:
        for line in process.stderr:
            said.append(line)
            if line.startswith("Serving"):
                break
        else:
            raise AssertionError(f"The server did not start:\n{''.join(said)}")
        rest.start()
        yield next(word for word in line.split() if word.startswith("http://"))
    finally:
        process.terminate()
        process.wait(60)
        if rest.ident is not None:
            rest.join(60)
        process.stderr.close()
