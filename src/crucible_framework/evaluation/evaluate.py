"""`evaluate`: ask a sampler every example, score the answers, keep each row as it comes, and estimate with intervals.

An evaluation's folder holds plan.json (what was asked of whom), scores.jsonl (a row per example, in the data set's order) and, once done,
evaluation.json. This file does not know what kind of model answers, how scorers judge, or how intervals are made.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import TypeVar, cast

from ..config import differing_keys, fingerprint, to_dict
from ..errors import ConfigError, CorruptError, DataError, InferenceError, NumericError, StatisticsError
from ..events import emit
from ..files import JsonLines, lock, read_json, read_lines, write_json
from ..protocols import Sampler, Scorer
from ..records import Completion, Dataset, Evaluation, Example, Json, SamplingParams, record
from . import labels, scoring
from .results import NLL, SCORES, Row, document_of, scored, summarise, write_evaluation

__all__ = ["GREEDY", "evaluate"]

T = TypeVar("T")
GREEDY = SamplingParams(max_tokens=32, temperature=0.0)
"""How `evaluate` samples where nothing else is said."""
_PLAN = "plan.json"


@record
class _Asked:
    """An example with what was asked about it."""

    example: Example
    answer: Future[tuple[Completion, ...]]
    logprobs: Future[tuple[float, ...]] | None = None


@record
class _Work:
    """What is done with each example."""

    sampler: Sampler
    params: SamplingParams
    scorers: tuple[Scorer, ...]
    perplexity: bool
    in_flight: int


def evaluate(
    sampler: Sampler,
    dataset: Dataset,
    scorers: Sequence[str | Scorer] = ("label_accuracy",),
    *,
    params: SamplingParams | None = None,
    label: str = "model",
    folder: Path | str | None = None,
    perplexity: bool = False,
    in_flight: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Scores a sampler on a data set, one completion an example.

    Where every example has `meta["document"]`, intervals are clustered by it. Where all targets are labels, the estimates also hold
    "majority_label" (see `baselines`). A measure that too few examples have gets no estimate; evaluation.json says why under "omitted".

    Args:
        scorers: names (see `evaluation.scorers`) or functions.
        params: greedy with 32 tokens where None: enough for a label, too few for claims or worked sums.
        label: what this evaluation is called in reports ("base", "adapter").
        folder: where rows are kept; a second call with the same plan asks only for what is missing. None keeps nothing. The plan knows a
            model by `sampler.model` alone: use another folder for other weights under the same name.
        perplexity: also ask for the log-probs of the target, giving the estimates "target_nll" (nats per token, the mean over examples of
            each one's mean) and "perplexity" (its exponential).
        in_flight: examples submitted and not yet answered, at most.
        progress: called with (rows done, rows in all) after each row.

    Raises:
        ConfigError: in_flight < 1, no or unknown scorers, or the folder holds an evaluation of another plan (the keys that differ are named).
        DataError: no examples, or two with one id.
        LockedError: another process evaluates into the folder.
        CorruptError: the folder's rows or plan are not what an evaluation writes.
        InferenceError: the sampler gave no or several completions.
        NumericError: the log-probs of a target are not finite.
        StatisticsError: a scorer's value is not finite.
        Whatever the sampler or a scorer raises, with a note that names the example. The rows before the failed example are kept.

    Emits:
        `evaluation.started` and `evaluation.done`, both with label, model, dataset, n and resumed (rows taken from an earlier call).
    """
    if in_flight < 1:
        raise ConfigError(f"in_flight is {in_flight!r}; expected at least 1. Usual: 4.")
    _check_ids(dataset)
    work = _Work(sampler=sampler, params=params or GREEDY, scorers=_resolve(scorers), perplexity=perplexity, in_flight=in_flight)
    if folder is None:
        return _evaluated(work, dataset, label=label, folder=None, progress=progress)
    folder = Path(folder)
    with lock(folder / ".lock", "evaluation folder"):
        return _evaluated(work, dataset, label=label, folder=folder, progress=progress)


def _evaluated(work: _Work, dataset: Dataset, *, label: str, folder: Path | None, progress: Callable[[int, int], None] | None) -> Evaluation:
    started = time.perf_counter()
    rows = [] if folder is None else _earlier(folder, _plan(work, dataset), dataset)
    resumed = len(rows)
    facts: dict[str, Json] = {"label": label, "model": work.sampler.model, "dataset": dataset.card.name, "n": len(dataset), "resumed": resumed}
    emit("evaluation.started", **facts)

    def keep(row: Row) -> None:
        rows.append(row)
        if progress is not None:
            progress(len(rows), len(dataset))

    if folder is None:
        _run(work, dataset, keep)
    else:
        with closing(JsonLines(folder / SCORES)) as log:

            def keep_on_disk(row: Row) -> None:
                log.append(row)
                keep(row)

            _run(work, dataset.examples[resumed:], keep_on_disk)
            log.sync()
    estimates, omitted = summarise(rows, dataset)
    if folder is not None:
        write_evaluation(folder, label=label, model=work.sampler.model, card=dataset.card, params=work.params, estimates=estimates, omitted=omitted)
    done = Evaluation(model=work.sampler.model, card=dataset.card, items=tuple(scored(row) for row in rows), estimates=estimates, folder=folder)
    emit("evaluation.done", **facts, estimates={e.name: e.value for e in estimates}, duration_s=time.perf_counter() - started)
    return done


# ---------------------------------------------------------------------------------------------------------------- plan
def _check_ids(dataset: Dataset) -> None:
    if not len(dataset):
        raise DataError(f"The data set {dataset.card.name!r} has no examples in split {dataset.card.split!r}; expected at least one.")
    seen: set[str] = set()
    for example in dataset:
        if example.id in seen:
            raise DataError(f"The data set {dataset.card.name!r} has two examples with the id {example.id!r}; expected unique ids. Rename one.")
        seen.add(example.id)


def _resolve(asked: Sequence[str | Scorer]) -> tuple[Scorer, ...]:
    if isinstance(asked, str) or not asked:
        known = ", ".join(scoring.scorers.names())
        raise ConfigError(f"scorers is {asked!r}; expected a sequence with at least one name or function. Known: {known}.")
    return tuple(scoring.scorers.get(scorer) for scorer in asked)


def _identity(scorer: object) -> Row:
    """What tells one scorer from another: its place, its arguments and, where it can be read, its source (of our own: the whole files)."""
    if isinstance(scorer, functools.partial):
        return {**_identity(scorer.func), "arguments": repr((scorer.args, sorted(scorer.keywords.items())))}
    kind = scorer if hasattr(scorer, "__qualname__") else type(scorer)
    place = f"{getattr(kind, '__module__', '')}:{getattr(kind, '__qualname__', repr(kind))}"
    of = (labels, scoring) if getattr(kind, "__module__", "") == scoring.__name__ else (kind,)
    try:
        source = "".join(inspect.getsource(cast("type", part)) for part in of)
    except (OSError, TypeError):
        source = ""
    found: Row = {"name": place, "source": hashlib.sha256(source.encode()).hexdigest()[:16] if source else ""}
    if dataclasses.is_dataclass(scorer) and not isinstance(scorer, type):
        found["arguments"] = repr(scorer)
    return found


def _plan(work: _Work, dataset: Dataset) -> Row:
    return {
        "dataset": {"sha256": dataset.card.sha256, "rows": len(dataset), "examples": fingerprint(dataset.examples)},
        "model": work.sampler.model,
        "params": to_dict(work.params),
        "scorers": [_identity(scorer) for scorer in work.scorers],
        "perplexity": work.perplexity,
    }


def _earlier(folder: Path, plan: Row, dataset: Dataset) -> list[Row]:
    """The rows that an earlier call with the same plan kept; writes the plan where there is none."""
    path, scores = folder / _PLAN, folder / SCORES
    rows = read_lines(scores)
    if not path.exists():
        if rows:
            raise ConfigError(f"{str(scores)!r} has {len(rows)} rows and no {_PLAN} beside it says what they are of. Choose another folder.")
        write_json(path, plan)
    old = read_json(path)
    if not isinstance(old, dict):
        raise CorruptError(f"{str(path)!r} holds no plan. Delete the folder to evaluate again.")
    if differing := differing_keys(old, plan):
        raise ConfigError(f"{str(folder)!r} holds an evaluation of another plan; different: {', '.join(differing)}. Choose another folder, or delete this one.")
    if [row.get("id") for row in rows] != [example.id for example in dataset.examples[: len(rows)]]:
        raise CorruptError(f"{str(scores)!r} does not follow the order of the data set. Delete the folder to evaluate again.")
    return rows


# ---------------------------------------------------------------------------------------------------------------- rows
def _submitted(submit: Callable[[], Future[T]]) -> Future[T]:
    """The future of a request; a request refused at once is a failed future, so that those submitted before it are still kept."""
    try:
        return submit()
    except Exception as error:
        refused: Future[T] = Future()
        refused.set_exception(error)
        return refused


def _run(work: _Work, examples: Iterable[Example], keep: Callable[[Row], None]) -> None:
    """Hands rows to `keep` in the order of the examples, with requests submitted ahead; what still waits at the end is cancelled."""
    waiting: deque[_Asked] = deque()
    rest = iter(examples)
    try:
        while True:
            while len(waiting) < work.in_flight and (example := next(rest, None)) is not None:
                waiting.append(_ask(work, example))
            if not waiting:
                return
            try:
                row = _row(work, waiting[0])
            except Exception as error:
                error.add_note(f"while evaluating example {waiting[0].example.id!r}; the rows before it are kept")
                raise
            keep(row)
            waiting.popleft()
    finally:
        for asked in waiting:
            asked.answer.cancel()
            if asked.logprobs is not None:
                asked.logprobs.cancel()


def _ask(work: _Work, example: Example) -> _Asked:
    answer = _submitted(lambda: work.sampler.sample(example.prompt, work.params))
    if not work.perplexity or not example.target:
        return _Asked(example=example, answer=answer)
    return _Asked(example=example, answer=answer, logprobs=_submitted(lambda: work.sampler.compute_logprobs(example.prompt, example.target)))


def _row(work: _Work, asked: _Asked) -> Row:
    example, completions = asked.example, asked.answer.result()
    if len(completions) != 1:
        raise InferenceError(f"{work.sampler.model!r} gave {len(completions)} completions for example {example.id!r}; expected 1.")
    values: dict[str, Json] = {}
    details: dict[str, Json] = {}
    for scorer in work.scorers:
        score = scorer(example, completions[0])
        if score.name in values or score.name == NLL:
            raise ConfigError(f"Two measures are called {score.name!r}; expected each once. Rename one, or leave it out.")
        if score.value is not None and not math.isfinite(score.value):
            raise StatisticsError(f"The scorer {score.name!r} gave {score.value!r} for example {example.id!r}; expected a finite number or None.")
        values[score.name] = None if score.value is None else float(score.value)
        if score.detail:
            details[score.name] = score.detail
    if work.perplexity:
        values[NLL] = _target_nll(work.sampler.model, example, () if asked.logprobs is None else asked.logprobs.result())
    return {
        "id": example.id,
        "document": document_of(example),
        "target": example.target,
        "completion": completions[0].text.encode("utf-8", "replace").decode(),  # half a surrogate pair cannot be written
        "scores": values,
        "details": details,
        "prompt": scoring.prompt_text(example),
    }


def _target_nll(model: str, example: Example, logprobs: Sequence[float]) -> float | None:
    if not all(math.isfinite(value) for value in logprobs):
        raise NumericError(
            f"{model!r} gave a log-prob that is not finite for the target of example {example.id!r}; expected finite numbers.", examples=(example.id,)
        )
    return -math.fsum(logprobs) / len(logprobs) if logprobs else None
