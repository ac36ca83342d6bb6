"""Samples as training goes: the same few examples answered at every checkpoint, kept in the run's watched.jsonl.

Nothing is submitted ahead of a checkpoint, so the answers are of exactly those weights. Training waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal

from .. import events, files
from ..errors import ConfigError
from ..protocols import Sampler
from ..records import Example, Json, SamplingParams, record
from .trainer import Callback, Progress

__all__ = ["WATCHED", "Watched", "read_watched", "watch"]

WATCHED = "watched.jsonl"
_GREEDY = SamplingParams(max_tokens=48, temperature=0.0)


@record
class Watched:
    """One example with what the model said to it. `answers` are (step, text), in the order of the steps."""

    id: str
    prompt: str
    target: str
    answers: tuple[tuple[int, str], ...]


def watch(
    examples: Sequence[Example],
    sampler: Callable[[], Sampler],
    folder: str | Path,
    *,
    kinds: Sequence[Literal["checkpoint", "evaluation"]] = ("checkpoint",),
    params: SamplingParams = _GREEDY,
) -> Callback:
    """A trainer's callback that has examples answered while training runs, so that one can see what the model learns to say.

    Args:
        examples: a few; each is a completion at each moment.
        sampler: gives the weights as they stand, `lambda: trainer.sampler()`.
        folder: the run's; rows go to `watched.jsonl` in it.
        kinds: at which moments.
        params: greedy with 48 tokens where nothing else is said.

    Raises:
        ConfigError: no examples, or another moment.

    Emits:
        `training.watched` with step and count.
    """
    if not examples or not set(kinds) <= {"checkpoint", "evaluation"} or not kinds:
        raise ConfigError(f"watch got {len(examples)} examples and moments {tuple(kinds)!r}; expected at least one example, and checkpoint or evaluation.")
    chosen = tuple(examples)

    def callback(progress: Progress) -> None:
        if progress.kind not in kinds:
            return
        now = sampler()
        asked = [now.sample(example.prompt, params) for example in chosen]
        rows: list[dict[str, Json]] = [
            {"step": progress.step, "id": example.id, "prompt": _words(example), "target": example.target, "completion": future.result()[0].text}
            for example, future in zip(chosen, asked, strict=True)
        ]
        with closing(files.JsonLines(Path(folder) / WATCHED)) as log:
            for row in rows:
                log.append(row)
        events.emit("training.watched", step=progress.step, count=len(rows))

    return callback


def _words(example: Example) -> str:
    return example.prompt if isinstance(example.prompt, str) else "\n\n".join(f"{message.role}: {message.content}" for message in example.prompt)


def read_watched(folder: str | Path) -> tuple[Watched, ...]:
    """What was watched in a run, in the order in which examples first appear; of a step that was done twice the later answer counts.

    Raises:
        CorruptError: a line before the last is damaged.
    """
    path = Path(folder) / WATCHED
    if not path.exists():
        return ()
    said: dict[str, dict[int, str]] = {}
    about: dict[str, tuple[str, str]] = {}
    for row in files.read_lines(path):
        identity, step, text = row.get("id"), row.get("step"), row.get("completion")
        if isinstance(identity, str) and isinstance(step, int) and isinstance(text, str):
            said.setdefault(identity, {})[step] = text
            about.setdefault(identity, (str(row.get("prompt", "")), str(row.get("target", ""))))
    return tuple(Watched(id=one, prompt=about[one][0], target=about[one][1], answers=tuple(sorted(texts.items()))) for one, texts in said.items())
