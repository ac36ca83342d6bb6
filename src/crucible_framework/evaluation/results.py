"""What an evaluation says: estimates from its rows, its file, baselines that ask no model, and paired comparisons.

`evaluation.json` holds label, model, card, params, estimates, what was omitted and why, and the sha256 of scores.jsonl. It holds no time, so
that the same rows give the same bytes. This file does not know how rows came to be.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias, cast

from ..config import from_dict, to_dict
from ..errors import ConfigError, CorruptError, DataError, NotFoundError, StatisticsError, UnknownNameError
from ..events import emit
from ..files import read_json, read_lines, sha256_file, write_json
from ..records import Dataset, DatasetCard, Estimate, Evaluation, Example, Finding, Json, SamplingParams, ScoredExample
from ..stats import majority_rate, mean_estimate, paired_difference
from .labels import labels_of, target_label

__all__ = [
    "EVALUATION",
    "MAJORITY",
    "NLL",
    "SCORES",
    "Row",
    "baselines",
    "compare",
    "document_of",
    "load_evaluation",
    "scored",
    "summarise",
    "write_evaluation",
]

Row: TypeAlias = dict[str, Json]
SCORES, EVALUATION = "scores.jsonl", "evaluation.json"
NLL, PERPLEXITY, MAJORITY, UNIFORM = "target_nll", "perplexity", "majority_label", "uniform_label"
_FORMAT = 1


def document_of(example: Example) -> str:
    """The id of the example's source document, "" where it has none."""
    document = example.meta.get("document")
    return "" if document is None else str(document)


def scored(row: Mapping[str, Json]) -> ScoredExample:
    """A row as a record.

    Raises:
        CorruptError: it lacks a key, or a score is neither a number nor null.
    """
    texts = [row.get(key) for key in ("id", "document", "target", "completion")]
    scores = row.get("scores")
    if not all(isinstance(text, str) for text in texts) or not isinstance(scores, dict):
        raise CorruptError(f"The row {str(row.get('id'))!r} lacks id, document, target, completion or scores. Delete the folder to evaluate again.")
    for name, value in scores.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise CorruptError(f"The row {texts[0]!r} has the score {value!r} for {name!r}; expected a number or null. Delete the folder to evaluate again.")
    identity, document, target, completion = cast("list[str]", texts)
    return ScoredExample(id=identity, document=document, target=target, completion=completion, scores=cast("dict[str, float | None]", dict(scores)))


# ----------------------------------------------------------------------------------------------------------- estimates
def _clusters(documents: Sequence[str]) -> tuple[str, ...] | None:
    """The documents as clusters, None where an example has none: then every example is its own."""
    return tuple(documents) if documents and all(documents) else None


def summarise(rows: Sequence[Row], dataset: Dataset) -> tuple[tuple[Estimate, ...], dict[str, str]]:
    """(an estimate per measure, and the majority's where all targets are labels; why the others have none)."""
    items = [scored(row) for row in rows]
    clusters = _clusters([item.document for item in items])
    estimates: list[Estimate] = []
    omitted: dict[str, str] = {}
    for name in dict.fromkeys(name for item in items for name in item.scores):
        try:
            values = [item.scores.get(name) for item in items]
            estimates.append(mean_estimate(name, values, clusters=clusters, bounded=False if name == NLL else None))
            if name == NLL:
                estimates.append(_perplexity(estimates[-1]))
        except StatisticsError as error:
            omitted[name] = str(error)
    if all(target_label(example) is not None for example in dataset):
        estimates.append(baselines(dataset)[0])
    return tuple(estimates), omitted


def _perplexity(nll: Estimate) -> Estimate:
    if max(abs(nll.value), abs(nll.low), abs(nll.high)) > 700:
        raise StatisticsError(f"{PERPLEXITY!r} is exp({nll.value:g}) or has such an end, which is no finite number. Read {NLL!r} instead.")
    value, low, high = math.exp(nll.value), math.exp(nll.low), math.exp(nll.high)
    return replace(nll, name=PERPLEXITY, value=value, low=low, high=high, method=f"exponential of {NLL}: {nll.method}")


def baselines(dataset: Dataset, *, train: Dataset | None = None, level: float = 0.95) -> tuple[Estimate, ...]:
    """What two ways of answering without reading would score in label accuracy: "majority_label" and "uniform_label".

    The first always says the commonest label. Taken from the evaluated data itself it is the best that a constant answer can do there, so a
    little high and harder to beat; with `train` the label is chosen from those data, as a model's could be. The second guesses each label of
    an example with the same chance; its expected score is exact, so its interval has no width.

    Args:
        dataset: what is scored.
        train: where the commonest label is taken from; None takes `dataset`.
        level: confidence.

    Raises:
        DataError: no examples, or a target that is no label of its example.
    """
    targets = _targets(dataset)
    chosen, _ = majority_rate(targets if train is None else _targets(train))
    clusters = _clusters([document_of(example) for example in dataset])
    majority = mean_estimate(MAJORITY, [float(target == chosen) for target in targets], clusters=clusters, level=level)
    source = "these data" if train is None else f"{train.card.name}, split {train.card.split}"
    majority = replace(majority, method=f"always {chosen!r}, the commonest label of {source}; {majority.method}")
    kinds = Counter(len(labels_of(example)) for example in dataset)
    uniform = math.fsum(count / kind for kind, count in kinds.items()) / len(targets)
    exact = Estimate(name=UNIFORM, value=uniform, low=uniform, high=uniform, n=len(targets), level=level, method="expected score of a guess: exact, no sample")
    return majority, exact


def _targets(dataset: Dataset) -> list[str]:
    if not len(dataset):
        raise DataError(f"The data set {dataset.card.name!r} has no examples in split {dataset.card.split!r}; expected at least one.")
    found: list[str] = []
    for example in dataset:
        label = target_label(example)
        if label is None:
            expected = ", ".join(labels_of(example))
            raise DataError(f"The target of example {example.id!r} is {example.target[:40]!r}; a label baseline needs one of {expected}.")
        found.append(label)
    return found


# ---------------------------------------------------------------------------------------------------------------- files
def write_evaluation(
    folder: Path, *, label: str, model: str, card: DatasetCard, params: SamplingParams, estimates: Sequence[Estimate], omitted: Mapping[str, str]
) -> None:
    """Writes evaluation.json beside the scores.jsonl that it sums up."""
    body = {
        "format_version": _FORMAT,
        "label": label,
        "model": model,
        "card": to_dict(card),
        "params": to_dict(params),
        "estimates": [to_dict(estimate) for estimate in estimates],
        "omitted": dict(omitted),
        "scores_sha256": sha256_file(folder / SCORES),
    }
    write_json(folder / EVALUATION, body)


def load_evaluation(folder: Path | str) -> Evaluation:
    """A finished evaluation from its folder.

    Raises:
        NotFoundError: there is none, or it is not finished.
        CorruptError: a file does not parse, or scores.jsonl is not the one that evaluation.json sums up.
    """
    folder = Path(folder)
    path, scores = folder / EVALUATION, folder / SCORES
    if not path.exists():
        kept = len(read_lines(scores))
        state = f"{kept} rows of an evaluation that is not finished: call evaluate again with this folder" if kept else "no evaluation"
        raise NotFoundError(f"{str(folder)!r} holds {state}.")
    body = read_json(path)
    if not isinstance(body, dict) or body.get("format_version") != _FORMAT:
        found = body.get("format_version") if isinstance(body, dict) else body
        raise CorruptError(f"{str(path)!r} has format version {found!r}; expected {_FORMAT}. Evaluate again, or use the version that wrote it.")
    if not scores.exists() or sha256_file(scores) != body.get("scores_sha256"):
        raise CorruptError(f"{str(scores)!r} is not the file that {EVALUATION} sums up. Call evaluate again with this folder.")
    model, card, estimates = body.get("model"), body.get("card"), body.get("estimates")
    if not isinstance(model, str) or not isinstance(card, dict) or not isinstance(estimates, list) or not all(isinstance(e, dict) for e in estimates):
        raise CorruptError(f"{str(path)!r} lacks model, card or estimates. Call evaluate again with this folder.")
    try:
        return Evaluation(
            model=model,
            card=from_dict(DatasetCard, card),
            items=tuple(scored(row) for row in read_lines(scores)),
            estimates=tuple(from_dict(Estimate, cast("dict[str, Json]", estimate)) for estimate in estimates),
            folder=folder,
        )
    except ConfigError as error:
        raise CorruptError(f"{str(path)!r} does not parse: {error} Call evaluate again with this folder.") from error


# ----------------------------------------------------------------------------------------------------------- comparison
def compare(before: Evaluation, after: Evaluation, metric: str = "label_accuracy", *, level: float = 0.95, name: str = "") -> Finding:
    """after - before in one measure, paired by example id and clustered by document where every example has one.

    Both must have answered the same examples; their order does not matter. Of "target_nll" less is better, of the other measures more.

    Args:
        metric: a scorer's name, or "target_nll".
        name: the finding's name; "" makes it the metric's.

    Raises:
        UnknownNameError: one of them has no such measure.
        StatisticsError: they answered different examples, or an example's target or document differs; or as `paired_difference` says.
        TooFewError: fewer than two examples or documents with a value on both sides.

    Emits:
        `evaluation.compared` with metric, before, after, n, effect, p_value.
    """
    for evaluation in (before, after):
        measured = dict.fromkeys(key for item in evaluation.items for key in item.scores)
        if metric not in measured:
            fix = f"Compare {NLL!r}; its difference is the logarithm of the ratio of perplexities." if metric == PERPLEXITY else ""
            raise UnknownNameError(f"measure of {evaluation.model!r}", metric, measured, fix=fix)
    pairs = _pairs(before, after)
    finding = paired_difference(
        name or metric,
        [left.scores.get(metric) for left, _ in pairs],
        [right.scores.get(metric) for _, right in pairs],
        clusters=_clusters([left.document for left, _ in pairs]),
        level=level,
        bounded=False if metric == NLL else None,
    )
    emit("evaluation.compared", metric=metric, before=before.model, after=after.model, n=finding.n, effect=finding.effect, p_value=finding.p_value)
    return finding


def _pairs(before: Evaluation, after: Evaluation) -> list[tuple[ScoredExample, ScoredExample]]:
    """Pairs in the order of the ids, so that neither side's order decides a bit of the result."""
    left, right = ({item.id: item for item in evaluation.items} for evaluation in (before, after))
    if only := sorted(left.keys() ^ right.keys()):
        raise StatisticsError(
            f"{len(only)} examples were answered on one side only ({', '.join(map(repr, only[:3]))}{', …' if len(only) > 3 else ''}); "
            "expected the same examples on both. Evaluate both on one data set."
        )
    for identity, item in left.items():
        if (item.target, item.document) != (right[identity].target, right[identity].document):
            raise StatisticsError(f"Example {identity!r} has another target or document on each side; expected the same. Evaluate both on one data set.")
    return [(left[identity], right[identity]) for identity in sorted(left)]
