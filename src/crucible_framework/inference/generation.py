"""`generate`: one prompt, its answers, for a first look. Everything more is `Sampler.sample`."""

from __future__ import annotations

from ..protocols import Sampler
from ..records import Completion, Prompt, SamplingParams

__all__ = ["generate"]


def generate(sampler: Sampler, prompt: Prompt, params: SamplingParams | None = None, n: int = 1) -> tuple[Completion, ...]:
    """Samples `n` completions and waits for them.

    Args:
        sampler: from `backend.sampler(...)` or `trainer.sampler()`.
        prompt: text (one user turn), messages, or token ids.
        params: 64 tokens at temperature 0.7 where None.
        n: completions, at least 1.

    Raises:
        ConfigError: a parameter or the prompt's length does not fit the model.
    """
    return sampler.sample(prompt, params or SamplingParams(max_tokens=64, temperature=0.7), n).result()
