"""Several attempts: pass@k against enumeration and simulation, resumption, and what is refused."""

from __future__ import annotations

import itertools
from concurrent.futures import Future
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.errors import ConfigError, InferenceError, StatisticsError
from crucible_framework.evaluation import attempt, pass_at_k
from crucible_framework.records import Completion, Dataset, DatasetCard, Example, Prompt, SamplingParams

DATA = Dataset(
    examples=tuple(Example(id=str(i), prompt=str(i), target=str(i)) for i in range(4)),
    card=DatasetCard(name="own", split="test", task="", rows=4, sha256="", licence="", source=""),
)


class Sometimes:
    """Answers right in the first `int(prompt)` of its attempts."""

    model = "sometimes"

    def __init__(self, fewer: int = 0) -> None:
        self.asked: list[str] = []
        self.fewer = fewer

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        self.asked.append(str(prompt))
        answers = [str(prompt) if i < int(str(prompt)) else "no" for i in range(n - self.fewer)]
        future: Future[tuple[Completion, ...]] = Future()
        future.set_result(tuple(Completion(text=text, tokens=(), logprobs=(), stop_reason="stop", prompt_tokens=0) for text in answers))
        return future

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        raise NotImplementedError


@given(n=st.integers(1, 8), data=st.data())
def test_pass_at_k_is_the_share_of_all_draws_of_k(n: int, data: st.DataObject) -> None:
    passed, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(itertools.combinations([i < passed for i in range(n)], k))
    assert pass_at_k(n, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert pass_at_k(n, passed, k, kind="all") == pytest.approx(sum(map(all, draws)) / len(draws))


def test_attempts_are_counted_and_estimated(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    sampler = Sometimes()
    found = attempt(sampler, DATA, "exact_match", n=4, ks=(1, 2), folder=tmp_path, progress=lambda done, total: told.append((done, total)))
    assert found.passed == {"0": 0, "1": 1, "2": 2, "3": 3}
    assert [one.name for one in found.estimates] == ["pass@1", "pass@2"]
    assert found.estimates[0].value == pytest.approx((0 + 1 + 2 + 3) / 16)
    assert found.estimates[1].value == pytest.approx((0 + 1 / 2 + 5 / 6 + 1) / 4)
    assert told[-1] == (4, 4)
    lines = (tmp_path / "attempts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "attempts.jsonl").write_text("".join(lines[:2]))
    again = Sometimes()
    assert attempt(again, DATA, "exact_match", n=4, ks=(1, 2), folder=tmp_path) == found
    assert again.asked == ["2", "3"], "only what is missing is asked"
    with pytest.raises(ConfigError, match="different: n"):
        attempt(again, DATA, "exact_match", n=5, ks=(1,), folder=tmp_path)


def test_what_cannot_be_estimated_is_refused() -> None:
    with pytest.raises(ConfigError, match="from 1 to n"):
        attempt(Sometimes(), DATA, "exact_match", n=2, ks=(3,))
    with pytest.raises(ConfigError, match="temperature is 0"):
        attempt(Sometimes(), DATA, "exact_match", n=2, ks=(1,), params=SamplingParams(temperature=0.0))
    with pytest.raises(InferenceError, match="gave 1 completions"):
        attempt(Sometimes(fewer=1), DATA, "exact_match", n=2, ks=(1,))
    for n, passed, k in ((2, 3, 1), (2, 1, 3), (2, -1, 1), (2, 1, 0)):
        with pytest.raises(StatisticsError, match="expected 0 <= passed <= n"):
            pass_at_k(n, passed, k)
