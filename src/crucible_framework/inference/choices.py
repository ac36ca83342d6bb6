"""Answering by log-likelihood: of fixed choices, the one that the model finds likeliest after the prompt.

A model that never writes a label in its own words can still be asked which one it prefers, so base models are compared fairly. A
`ChoiceSampler` is a Sampler made of a Sampler; whoever scores its completions need not know. Source: the "multiple choice" scoring of
Gao et al., A framework for few-shot language model evaluation (2021), acc and acc_norm.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Literal, get_args

from ..errors import ConfigError
from ..protocols import Sampler
from ..records import Completion, Prompt, SamplingParams

__all__ = ["ChoiceSampler"]

Normalise = Literal["sum", "mean"]


class ChoiceSampler:
    """Answers with one of the choices.

    The completion's text is the choice; its `logprobs` hold one number, log p(choice | one of the choices), in nats; it has no tokens, as
    nothing was drawn. Ties go to the choice that was named first. Of the parameters of `sample` none has an effect.

    Args:
        sampler: the model that is asked.
        choices: at least two different texts.
        by: "sum" compares log p of the whole choice, "mean" that per token, for choices of very different length.

    Raises:
        ConfigError: fewer than two choices, an empty or repeated one, or another `by`.
    """

    def __init__(self, sampler: Sampler, choices: Sequence[str], *, by: Normalise = "sum") -> None:
        if isinstance(choices, str) or len(choices) < 2 or len(set(choices)) < len(choices) or not all(choices):
            raise ConfigError(f"choices is {choices!r}; expected at least two different texts, for example ('SUPPORT', 'CONTRADICT').")
        if by not in get_args(Normalise):
            raise ConfigError(f"by is {by!r}; expected 'sum' or 'mean'.")
        self._sampler, self._choices, self._by = sampler, tuple(choices), by

    @property
    def model(self) -> str:
        """The model's name and how it is asked."""
        return f"{self._sampler.model}?choices={'|'.join(self._choices)}&by={self._by}"

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:  # noqa: ARG002 - nothing is drawn
        """The likeliest choice, `n` times.

        Raises:
            ConfigError: n is below 1. From the future, what `compute_logprobs` raises; ConfigError where a choice has no token.
        """
        if n < 1:
            raise ConfigError(f"n is {n!r}; expected a whole number of at least 1.")
        started = time.perf_counter()
        answer: Future[tuple[Completion, ...]] = Future()
        asked = [self._sampler.compute_logprobs(prompt, choice) for choice in self._choices]
        waiting, guard = [len(asked)], threading.Lock()

        def one_more(_: Future[tuple[float, ...]]) -> None:
            with guard:
                waiting[0] -= 1
                last = not waiting[0]
            if last and answer.set_running_or_notify_cancel():
                try:
                    answer.set_result((self._decide([future.result() for future in asked], time.perf_counter() - started),) * n)
                except Exception as error:
                    answer.set_exception(error)

        for future in asked:
            future.add_done_callback(one_more)
        return answer

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        """Those of the model itself."""
        return self._sampler.compute_logprobs(prompt, completion)

    def _decide(self, logprobs: Sequence[tuple[float, ...]], duration_s: float) -> Completion:
        for choice, found in zip(self._choices, logprobs, strict=True):
            if not found:
                raise ConfigError(f"The choice {choice!r} has no token for {self._sampler.model!r}. Choose another text.")
        scores = [math.fsum(found) / (len(found) if self._by == "mean" else 1) for found in logprobs]
        best = max(range(len(scores)), key=scores.__getitem__)
        total = math.log(math.fsum(math.exp(score - scores[best]) for score in scores))
        return Completion(
            text=self._choices[best], tokens=(), logprobs=(-total,), stop_reason="stop", prompt_tokens=0, duration_s=duration_s
        )  # fmt: skip
