"""A Sampler whose answers are given beforehand, and small data sets for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from crucible_framework.config import fingerprint
from crucible_framework.records import Completion, Dataset, DatasetCard, Example, Json, Prompt, SamplingParams

_THREADS = ThreadPoolExecutor(max_workers=2)
LABELS = ("SUPPORT", "CONTRADICT", "NOT_ENOUGH_INFO")


def said(text: str) -> Completion:
    tokens = tuple(text.encode("utf-8", "replace"))
    return Completion(text=text, tokens=tokens, logprobs=(0.0,) * len(tokens), stop_reason="stop", prompt_tokens=1)


def key(prompt: Prompt) -> str:
    """A prompt as a key of the table."""
    return prompt if isinstance(prompt, str) else "|".join(str(part) for part in prompt)


class Scripted:
    """Answers from a table of prompts, on other threads; `fail` raises for the prompts that it names.

    A token of the target has log-prob −(its number of letters); `peak` is how many requests were open at once.
    """

    def __init__(self, answers: Mapping[str, str], *, model: str = "scripted", fail: Mapping[str, Exception] | None = None, copies: int = 1) -> None:
        self.model, self.answers, self.fail, self.copies = model, dict(answers), dict(fail or {}), copies
        self.asked: list[str] = []
        self.params: list[SamplingParams] = []
        self.peak = self._open = 0
        self._lock = threading.Lock()

    def _answer(self, prompt: Prompt) -> tuple[Completion, ...]:
        text = key(prompt)
        if text in self.fail:
            raise self.fail[text]
        return (said(self.answers[text]),) * self.copies

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        assert n == 1
        with self._lock:
            self.asked.append(key(prompt))
            self.params.append(params)
            self._open += 1
            self.peak = max(self.peak, self._open)
        future = _THREADS.submit(self._answer, prompt)
        future.add_done_callback(lambda _: self._closed())
        return future

    def _closed(self) -> None:
        with self._lock:
            self._open -= 1

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        assert isinstance(completion, str)
        return _THREADS.submit(lambda: tuple(-float(len(word)) for word in completion.split()))


class Refusing(Scripted):
    """Raises at once, instead of in the future, from the request of that number on."""

    def __init__(self, answers: Mapping[str, str], start: int, error: Exception) -> None:
        super().__init__(answers)
        self.start, self.error = start, error

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        if len(self.asked) >= self.start:
            raise self.error
        return super().sample(prompt, params, n)


def dataset(examples: Sequence[Example], name: str = "small") -> Dataset:
    card = DatasetCard(name=name, split="test", task="verify", rows=len(examples), sha256=fingerprint(tuple(examples)), licence="CC0-1.0", source="test")
    return Dataset(examples=tuple(examples), card=card)


def labelled(n: int, *, documents: int | None = None, target: Callable[[int], str] = lambda i: LABELS[i % 3]) -> Dataset:
    """`n` claims with the prompt "p<i>"; documents in turn where their number is given."""

    def meta(i: int) -> dict[str, Json]:
        return {} if documents is None else {"document": f"d{i % documents}"}

    return dataset([Example(id=f"e{i}", prompt=f"p{i}", target=target(i), meta=meta(i)) for i in range(n)])


def right(data: Dataset, wrong: Sequence[int] = ()) -> dict[str, str]:
    """The targets as answers, with another label for the examples of those numbers."""
    table = {key(example.prompt): example.target for example in data}
    for i in wrong:
        table[f"p{i}"] = next(label for label in LABELS if label != data[i].target)
    return table
