"""What a sampler asks of the engine, and of which weights."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeAlias

from ...data.tokens import render_prompt
from ...errors import DataError
from ...protocols import OnPiece
from ...records import Completion, Prompt, SamplingParams, record
from .bases import Base
from .engine import check_tokens
from .lora import Active
from .queue import Job

__all__ = ["Answer", "Ask", "AskJob", "Frozen", "prompt_tokens"]


@dataclass(slots=True, frozen=True, eq=False)
class Frozen:
    """Weights that no longer change: a base and, unless it is sampled as it is, an adapter."""

    base: Base
    active: Active | None = None


@record
class Ask:
    """A request for samples, which `on_piece` is told of while they are drawn; or with `completion` for log-probs."""

    model: str
    frozen: Future[Frozen]
    prompt: Prompt
    params: SamplingParams = SamplingParams()
    n: int = 1
    on_piece: OnPiece | None = None
    completion: str | tuple[int, ...] | None = None


Answer: TypeAlias = tuple[Completion, ...] | tuple[float, ...]
AskJob: TypeAlias = Job[Ask, Answer]


def prompt_tokens(base: Base, prompt: Prompt, room: int = 0) -> list[int]:
    """The prompt's tokens, checked against the model's vocabulary and context.

    Raises:
        DataError: they do not fit, or leave less than `room` tokens of the context for an answer.
    """
    tokens = render_prompt(prompt, base.tokenizer)
    check_tokens(base, tokens, "The prompt", "Shorten it.")
    if len(tokens) + room > base.context:
        raise DataError(f"The prompt has {len(tokens)} tokens, which leaves no room for an answer: {base.name!r} reads at most {base.context}. Shorten it.")
    return tokens
