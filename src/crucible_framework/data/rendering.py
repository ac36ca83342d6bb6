"""`Example` → `Datum`: prompt and completion as one sequence, weights on the completion alone, and a count of what was cut.

This file does not know models, templates or batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import numpy as np

from ..errors import DataError
from ..protocols import Tokenizer
from ..records import Datum, Example, record
from .tokens import completion_tokens, completions_tokens, render_prompt, render_prompts

__all__ = ["KEPT_PROMPT", "Rendered", "render", "render_all"]

KEPT_PROMPT = 8
"""A prompt that is too long keeps at least this many of its last tokens: the turn that asks for the answer."""


_TOGETHER = 4096
"""Examples whose texts are encoded together."""


@record
class Rendered:
    """Rendered examples, and how many lost tokens. `tokens` counts the input tokens of all data."""

    data: tuple[Datum, ...]
    prompts_cut: int
    completions_cut: int
    tokens: int


def _render(example: Example, tokenizer: Tokenizer, max_length: int | None) -> tuple[Datum, bool, bool]:
    prompt = _named(example, lambda: render_prompt(example.prompt, tokenizer))
    completion = _named(example, lambda: completion_tokens(example.target, tokenizer))
    return _joined(example, prompt, completion, max_length)


def _joined(example: Example, prompt: list[int], completion: list[int], max_length: int | None) -> tuple[Datum, bool, bool]:
    """The datum of an example's tokens, and whether its prompt and its completion were cut."""
    if not prompt or not completion:
        what = "completion" if prompt else "prompt"
        raise DataError(f"Example {example.id!r} has a {what} of no tokens. Expected at least one: give it text.")
    lengths = len(prompt), len(completion)
    if max_length is not None and sum(lengths) - 1 > max_length:
        kept = max(min(KEPT_PROMPT, len(prompt)), max_length + 1 - len(completion))
        room = max_length + 1 - kept
        if room < 1:
            raise DataError(
                f"Example {example.id!r} is longer than the context: {sum(lengths) - 1} tokens, and with {kept} of its prompt none of its completion "
                f"fits into max_length {max_length}. Raise max_length to at least {kept}."
            )
        prompt, completion = prompt[-kept:], completion[:room]
    full = np.array([*prompt, *completion], dtype=np.int64)
    weights = np.zeros(len(full) - 1, dtype=np.float32)
    weights[len(prompt) - 1 :] = 1.0
    datum = Datum(id=example.id, tokens=full[:-1].astype(np.int32), targets=full[1:], weights=weights)
    return datum, len(prompt) < lengths[0], len(completion) < lengths[1]


def _named(example: Example, make: Callable[[], list[int]]) -> list[int]:
    try:
        return make()
    except DataError as error:
        raise DataError(f"Example {example.id!r}: {error}") from error


def render(example: Example, tokenizer: Tokenizer, max_length: int | None = None) -> Datum:
    """An example as a loss sees it: tokens int32[T], targets int64[T], weights float32[T] with 1 on the completion and its end token.

    Args:
        example: prompt and target.
        tokenizer: of the base model.
        max_length: T at the most. Where the example is longer, the start of the prompt is cut, down to its last 8 tokens.

    Raises:
        DataError: empty prompt or completion, a template that refuses it, or a completion that does not fit whole.
    """
    datum, _, cut = _render(example, tokenizer, max_length)
    if cut:
        raise DataError(
            f"Example {example.id!r} is longer than the context: its completion does not fit into max_length {max_length} beside the last tokens "
            "of its prompt. Raise max_length, or render with render_all, which cuts the completion's end and counts it."
        )
    return datum


def render_all(dataset: Iterable[Example], tokenizer: Tokenizer, max_length: int | None = None) -> Rendered:
    """`render` for every example, with the number of prompts and completions that were cut.

    A completion that does not fit beside the last 8 tokens of its prompt loses its end, the end-of-turn token first.

    Raises:
        DataError: no prompt, a template that refuses it, or nothing of the completion fits; the message names the example.
    """
    rows, examples = list[tuple[Datum, bool, bool]](), iter(dataset)
    while some := list(itertools.islice(examples, _TOGETHER)):
        try:
            prompts, completions = render_prompts((one.prompt for one in some), tokenizer), completions_tokens([one.target for one in some], tokenizer)
        except DataError:  # which one it is, is said by those who come one by one
            rows += [_render(example, tokenizer, max_length) for example in some]
        else:
            rows += [_joined(*parts, max_length) for parts in zip(some, prompts, completions, strict=True)]
    return Rendered(
        data=tuple(datum for datum, _, _ in rows),
        prompts_cut=sum(prompt for _, prompt, _ in rows),
        completions_cut=sum(completion for _, _, completion in rows),
        tokens=sum(len(datum) for datum, _, _ in rows),
    )
