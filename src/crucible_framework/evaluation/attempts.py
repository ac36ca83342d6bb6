"""Several attempts at each problem: pass@k without bias, and pass^k, the chance that all of k attempts pass. Knows no sandbox.

An attempt passes where its score is 1. Rows are kept as they come, so that an interrupted run goes on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Literal, cast

from ..config import differing_keys, fingerprint, to_dict
from ..errors import ConfigError, CorruptError, InferenceError, StatisticsError
from ..events import emit
from ..files import JsonLines, lock, read_json, read_lines, write_json
from ..protocols import Sampler, Scorer
from ..records import Completion, Dataset, Estimate, Example, Json, SamplingParams, record
from ..stats import mean_estimate
from .results import document_of
from .scoring import scorers

__all__ = ["Attempts", "attempt", "pass_at_k"]

ATTEMPTS, _PLAN = "attempts.jsonl", "plan.json"
_SAMPLED = SamplingParams(max_tokens=512, temperature=0.8, top_p=0.95)


@record
class Attempts:
    """How a sampler did on a data set with n attempts each.

    Attributes:
        passed: example id → how many of its attempts passed.
        estimates: "pass@k" for each k asked, over examples, clustered by document where every example has one.
    """

    model: str
    scorer: str
    n: int
    passed: dict[str, int]
    estimates: tuple[Estimate, ...]


def pass_at_k(n: int, passed: int, k: int, *, kind: Literal["any", "all"] = "any") -> float:
    """The chance that any ("pass@k") or all ("pass^k") of k attempts pass, estimated without bias from n attempts of which `passed` did.

    1 - C(n - c, k)/C(n, k), or C(c, k)/C(n, k). The plug-in 1 - (1 - c/n)^k is too low.

    Raises:
        StatisticsError: not 0 <= passed <= n and 1 <= k <= n.

    Source: Chen et al. 2021, arXiv 2107.03374, section 2.1; Yao et al. 2024, arXiv 2406.12045 (pass^k).
    """
    if not 0 <= passed <= n or not 1 <= k <= n:
        raise StatisticsError(f"n is {n}, passed {passed} and k {k}; expected 0 <= passed <= n and 1 <= k <= n. Draw at least k attempts.")
    chance = math.comb(passed, k) / math.comb(n, k)
    return chance if kind == "all" else 1 - math.comb(n - passed, k) / math.comb(n, k)


def attempt(
    sampler: Sampler,
    dataset: Dataset,
    scorer: str | Scorer = "passes_tests",
    *,
    n: int = 20,
    ks: Sequence[int] = (1, 10),
    params: SamplingParams | None = None,
    folder: Path | str | None = None,
    in_flight: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Attempts:
    """Draws n answers to each example and estimates pass@k.

    Args:
        scorer: a name or function; an attempt passes where it gives 1. None ("does not apply") counts as not passed.
        n: attempts per example, at least the largest k.
        ks: for which pass@k is estimated.
        params: temperature 0.8, top-p 0.95 and 512 tokens where None, as Chen et al. used for k of 10 and more.
        folder: where rows are kept; a second call with the same plan asks only for what is missing.

    Raises:
        ConfigError: n, ks or in_flight out of range, a greedy temperature with n > 1, or a folder of another plan.
        UnsafeError: the scorer runs code and there is no sandbox.
        InferenceError: the sampler gave another number of answers.
        TooFewError: too few examples for an interval.

    Emits:
        `evaluation.done` with label "attempts".
    """
    params = params or _SAMPLED
    if n < 1 or in_flight < 1 or not ks or min(ks) < 1 or max(ks) > n or len(set(ks)) != len(ks):
        raise ConfigError(f"n is {n}, ks {tuple(ks)} and in_flight {in_flight}; expected different k from 1 to n, and at least 1 in flight.")
    if n > 1 and params.temperature == 0:
        raise ConfigError(f"temperature is 0, so all {n} attempts would be one; expected more than 0. Usual: 0.8, or n=1 with greedy answers.")
    judge = scorers.get(scorer)
    name = scorer if isinstance(scorer, str) else getattr(scorer, "__qualname__", repr(scorer))
    if folder is None:
        rows = list[dict[str, Json]]()
        _draw(sampler, dataset.examples, judge, n=n, params=params, in_flight=in_flight, keep=rows.append, told=(progress, len(dataset)))
    else:
        plan: dict[str, Json] = {"examples": fingerprint(dataset.examples), "model": sampler.model, "scorer": name, "n": n, "params": to_dict(params)}
        rows = _kept(sampler, dataset, judge, n=n, params=params, in_flight=in_flight, folder=Path(folder), plan=plan, progress=progress)
    passed = {str(row["id"]): int(cast("int", row["passed"])) for row in rows}
    documents = [document_of(example) for example in dataset]
    clusters = documents if all(documents) else None
    estimates = tuple(mean_estimate(f"pass@{k}", [pass_at_k(n, passed[example.id], k) for example in dataset], clusters=clusters, bounded=True) for k in ks)
    values: dict[str, Json] = {one.name: one.value for one in estimates}
    emit("evaluation.done", label="attempts", model=sampler.model, dataset=dataset.card.name, n=len(dataset), estimates=values)
    return Attempts(model=sampler.model, scorer=name, n=n, passed=passed, estimates=estimates)


def _kept(
    sampler: Sampler, dataset: Dataset, judge: Scorer, *, n: int, params: SamplingParams, in_flight: int, folder: Path, plan: dict[str, Json],
    progress: Callable[[int, int], None] | None,
) -> list[dict[str, Json]]:  # fmt: skip
    with lock(folder / ".lock", "evaluation folder"):
        if not (folder / _PLAN).exists():
            write_json(folder / _PLAN, plan)
        old = read_json(folder / _PLAN)
        if differing := differing_keys(cast("dict[str, Json]", old), plan):
            raise ConfigError(f"{str(folder)!r} holds attempts of another plan; different: {', '.join(differing)}. Choose another folder.")
        rows = list(read_lines(folder / ATTEMPTS))
        if [row.get("id") for row in rows] != [example.id for example in dataset.examples[: len(rows)]]:
            raise CorruptError(f"{str(folder / ATTEMPTS)!r} does not follow the order of the data set. Delete the folder to begin again.")
        with closing(JsonLines(folder / ATTEMPTS)) as log:

            def keep(row: dict[str, Json]) -> None:
                log.append(row)
                rows.append(row)

            told = (progress, len(dataset))
            _draw(sampler, dataset.examples[len(rows) :], judge, n=n, params=params, in_flight=in_flight, keep=keep, told=told)
            log.sync()
    return rows


def _draw(
    sampler: Sampler, examples: Sequence[Example], judge: Scorer, *, n: int, params: SamplingParams, in_flight: int, keep: Callable[[dict[str, Json]], None],
    told: tuple[Callable[[int, int], None] | None, int],
) -> None:  # fmt: skip
    waiting: deque[tuple[Example, Future[tuple[Completion, ...]]]] = deque()
    rest, done = deque(examples), told[1] - len(examples)
    while rest or waiting:
        while rest and len(waiting) < in_flight:
            waiting.append((rest[0], sampler.sample(rest[0].prompt, params, n)))
            rest.popleft()
        example, answer = waiting.popleft()
        completions = answer.result()
        if len(completions) != n:
            raise InferenceError(f"{sampler.model!r} gave {len(completions)} completions for example {example.id!r}; expected {n}.")
        scores = [judge(example, completion) for completion in completions]
        texts: list[Json] = [completion.text.encode("utf-8", "replace").decode() for completion in completions]
        details: list[Json] = [score.detail for score in scores]
        keep({"id": example.id, "n": n, "passed": sum(score.value == 1 for score in scores), "completions": texts, "details": details})
        done += 1
        if told[0] is not None:
            told[0](done, told[1])
