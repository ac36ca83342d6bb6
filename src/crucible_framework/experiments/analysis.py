"""What a study shows: differences between arms, paired by item and seed, clustered by document, corrected over their family.

What was declared before the study and what was not are two families; the second is exploratory and says so. Nothing is left out: a
comparison without data says why, and failed cells are listed. This file does not know how a cell was run.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Literal, cast

from .. import events, files
from ..config import from_dict, to_dict
from ..errors import NotFoundError, StatisticsError
from ..records import Estimate, Evaluation, Finding, Json, record
from ..stats import adjust, mean_estimate, paired_difference, seeds_and_items
from . import methods
from .design import BASE, Arm, Experiment, Hypothesis, less_is_better, select
from .study import FINDINGS, CellResult, Study, load_study

__all__ = ["Analysis", "ArmSummary", "Contrast", "Failed", "analyse", "load_analysis"]

MANY_ARMS = 6
"""With more arms than that, exploratory comparisons are those with the base and those along one axis, not all pairs."""
POWER = 0.8
Verdict = Literal["better", "worse", "not shown", "no result"]


@record
class ArmSummary:
    """One arm on one data set in one metric: all items and seeds together, with each seed's mean beside."""

    arm: str
    data: str
    metric: str
    estimate: Estimate | None
    seeds: tuple[int, ...]
    per_seed: tuple[float, ...]
    note: str = ""


@record
class Contrast:
    """One comparison.

    Attributes:
        name: "rank=8 − base".
        declared: claimed before the study; otherwise exploratory.
        finding: the difference better − than, with several seeds about new examples and new seeds at once; None where there is none, and
            `note` says why.
        given_seeds: the same difference for the adapters at hand, so about new examples only.
        p_adjusted: Holm's over the `family` comparisons of the same kind.
        simultaneous: an interval that holds for all of the family at once (Bonferroni's level).
        per_seed: the difference in each of `seeds`.
        detectable: about the smallest true difference that this design finds with 80 % power.
        verdict: of `better`, from the adjusted p-value.
    """

    name: str
    better: str
    than: str
    data: str
    metric: str
    declared: bool
    because: str = ""
    finding: Finding | None = None
    p_adjusted: float | None = None
    family: int = 0
    simultaneous: tuple[float, float] | None = None
    seeds: tuple[int, ...] = ()
    per_seed: tuple[float, ...] = ()
    given_seeds: Finding | None = None
    detectable: float | None = None
    verdict: Verdict = "no result"
    note: str = ""


@record
class Failed:
    """A cell without a result."""

    id: str
    error: str
    message: str


@record
class Analysis:
    """Everything that a study shows. `methods` is the paragraph for a paper, written from what was done; `sources` are its citations."""

    name: str
    primary: str
    alpha: float
    arms: tuple[ArmSummary, ...]
    contrasts: tuple[Contrast, ...]
    failed: tuple[Failed, ...]
    pending: tuple[str, ...]
    methods: str
    sources: tuple[str, ...]

    def __getitem__(self, name: str) -> Contrast:
        """The first contrast of that name."""
        for contrast in self.contrasts:
            if contrast.name == name:
                return contrast
        raise NotFoundError(f"There is no contrast {name!r}. Known: {', '.join(sorted({one.name for one in self.contrasts}))}.")


# ---------------------------------------------------------------------------------------------------------------- pairs
class _Scores:
    """A study's scores, by arm, seed and data set."""

    def __init__(self, study: Study) -> None:
        self.study, self.arms = study, study.experiment.arms()
        self._cells = {(cell.arm, cell.seed, cell.data): cell for cell in study.cells}

    def of(self, arm: str, seed: int, data: str, against: str) -> Evaluation | None:
        """An arm's evaluation, or that of the base which `against` started from."""
        cell = self._cells[against if arm == BASE else arm, seed, data]
        found: CellResult = self.study.base_of(cell) if arm == BASE else cell
        return found.evaluation


class _Paired:
    """Scores of two sides, pair by pair: the same item, the same seed, the same other settings."""

    def __init__(self) -> None:
        self.before: list[float | None] = []
        self.after: list[float | None] = []
        self.items: list[str] = []
        self.documents: list[str] = []
        self.seeds: dict[int, dict[str, list[tuple[float | None, float | None]]]] = {}
        self.sets = 0
        self.missing: list[int] = []

    def add(self, seed: int, before: Evaluation, after: Evaluation, metric: str) -> None:
        """One pair of evaluations; items in the order of their ids, so that neither side's order decides a bit."""
        other = {item.id: item for item in before.items}
        rows = self.seeds.setdefault(seed, {})
        for item in sorted(after.items, key=lambda one: one.id):
            pair = other[item.id].scores.get(metric), item.scores.get(metric)
            self.before.append(pair[0])
            self.after.append(pair[1])
            self.items.append(item.id)
            self.documents.append(item.document)
            rows.setdefault(item.id, []).append(pair)
        self.sets += 1

    def clusters(self) -> list[str] | None:
        """Documents where every item has one; else the items, where they come more than once."""
        return _clusters(self.items, self.documents, self.sets)

    def per_seed(self) -> dict[int, float]:
        """The mean difference of each seed that has one."""
        found = {seed: [b - a for pairs in rows.values() for a, b in pairs if a is not None and b is not None] for seed, rows in self.seeds.items()}
        return {seed: fmean(values) for seed, values in found.items() if values}

    def rows(self) -> tuple[list[list[float | None]], list[list[float | None]], list[str] | None]:
        """(before, after) as [seed][item], each the mean over the other settings, and the items' documents."""
        sides = [[[_mean([pair[side] for pair in pairs]) for pairs in rows.values()] for rows in self.seeds.values()] for side in (0, 1)]
        documents = dict(zip(self.items, self.documents, strict=True))
        return sides[0], sides[1], list(documents.values()) if all(documents.values()) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _clusters(items: Sequence[str], documents: Sequence[str], sets: int) -> list[str] | None:
    if documents and all(documents):
        return list(documents)
    return list(items) if sets > 1 else None


def _paired(scores: _Scores, pairs: Sequence[tuple[str, str]], data: str, metric: str) -> _Paired:
    found = _Paired()
    for seed in scores.study.experiment.seeds:
        sides = [(scores.of(than, seed, data, better), scores.of(better, seed, data, than)) for better, than in pairs]
        if any(before is None or after is None for before, after in sides):
            found.missing.append(seed)  # the whole seed: what is left would not be balanced over the other settings
            continue
        for before, after in sides:
            found.add(seed, cast("Evaluation", before), cast("Evaluation", after), metric)
    return found


# ------------------------------------------------------------------------------------------------------------ contrasts
def _bounded(metric: str) -> bool | None:
    return False if metric == "target_nll" else None


def _tested(name: str, paired: _Paired, metric: str, level: float) -> tuple[Finding, Finding | None]:
    """(the finding about new examples and, with several seeds, new seeds; the one about new examples for the adapters at hand).

    Raises:
        StatisticsError: too few items or documents, or no spread.
    """
    refused: StatisticsError | None = None
    given: Finding | None = None
    try:
        given = paired_difference(name, paired.before, paired.after, clusters=paired.clusters(), level=level, bounded=_bounded(metric))
    except StatisticsError as error:
        refused = error
    if len(paired.seeds) > 1:
        before, after, documents = paired.rows()
        with contextlib.suppress(StatisticsError):
            both = seeds_and_items(name, before, after, clusters=documents, paired_seeds=True, level=level)
            if both.interval[0] < both.interval[1]:  # without any spread a t interval has no width; the score method is then the honest one
                return both, given
    if given is None:
        raise refused or StatisticsError(f"{name!r} has no finding.")
    return given, given


def _contrast(scores: _Scores, hypothesis: Hypothesis, data: str, *, declared: bool) -> Contrast:
    experiment = scores.study.experiment
    metric, level = hypothesis.metric or experiment.primary, 1 - experiment.alpha
    name = f"{hypothesis.better} − {hypothesis.than}"
    plain = Contrast(name=name, better=hypothesis.better, than=hypothesis.than, data=data, metric=metric, declared=declared, because=hypothesis.because)
    paired = _paired(scores, select(scores.arms, hypothesis), data, metric)
    missing = f"without seed {', '.join(map(str, paired.missing))}: a cell has failed or has not run" if paired.missing else ""
    if not paired.items:
        return replace(plain, note=missing or "nothing was measured")
    means = paired.per_seed()
    plain = replace(plain, seeds=tuple(means), per_seed=tuple(means.values()), note=missing)
    try:
        finding, given = _tested(name, paired, metric, level)
    except StatisticsError as error:
        return replace(plain, note="; ".join(filter(None, (str(error), missing))))
    critical = NormalDist().inv_cdf(1 - experiment.alpha / 2)
    half = (finding.interval[1] - finding.interval[0]) / 2
    return replace(plain, finding=finding, given_seeds=given, detectable=half * (critical + NormalDist().inv_cdf(POWER)) / critical)


def _judged(scores: _Scores, family: Sequence[Contrast]) -> list[Contrast]:
    """The contrasts with what depends on how many they are."""
    experiment = scores.study.experiment
    tested = [one for one in family if one.finding is not None]
    adjusted = iter(adjust([one.finding.p_value for one in tested if one.finding is not None], "holm"))
    level = 1 - experiment.alpha / max(1, len(tested))
    found: list[Contrast] = []
    for one in family:
        if one.finding is None:
            found.append(replace(one, family=len(tested)))
            continue
        p = next(adjusted)
        hypothesis = Hypothesis(better=one.better, than=one.than, metric=one.metric)
        paired = _paired(scores, select(scores.arms, hypothesis), one.data, one.metric)
        wide, _ = _tested(one.name, paired, one.metric, level)
        gain = -one.finding.effect if less_is_better(one.metric) else one.finding.effect
        verdict: Verdict = "not shown" if p > experiment.alpha or gain == 0 else "better" if gain > 0 else "worse"
        found.append(replace(one, p_adjusted=p, family=len(tested), simultaneous=wide.interval, verdict=verdict))
    return found


def _exploratory(experiment: Experiment, arms: Sequence[Arm]) -> list[Hypothesis]:
    """Each arm against its base, along each axis, and all pairs of few arms; in the other metrics only against the base."""
    found = [Hypothesis(better=arm.name, metric=experiment.primary) for arm in arms]
    for parts in _axes(experiment, arms):
        found += [Hypothesis(better=other, than=parts[0], metric=experiment.primary) for other in parts[1:]]
    if len(arms) <= MANY_ARMS:
        found += [Hypothesis(better=b.name, than=a.name, metric=experiment.primary) for a, b in itertools.combinations(arms, 2)]
    found += [Hypothesis(better=arm.name, metric=metric) for metric in experiment.metrics if metric != experiment.primary for arm in arms]
    return found


def _axes(experiment: Experiment, arms: Sequence[Arm]) -> list[list[str]]:
    """The parts of each axis and of the conditions, where there are several."""
    size = len(arms[0].parts)
    columns = [list(dict.fromkeys(arm.parts[index] for arm in arms)) for index in range(size)] if arms and (experiment.matrix or experiment.conditions) else []
    return [column for column in columns if len(column) > 1]


def _contrasts(scores: _Scores) -> tuple[Contrast, ...]:
    experiment, arms = scores.study.experiment, scores.arms

    def key(hypothesis: Hypothesis) -> tuple[object, str]:
        return frozenset(frozenset(pair) for pair in select(arms, hypothesis)), hypothesis.metric or experiment.primary

    declared = {key(one): one for one in experiment.hypotheses}
    others = {key(one): one for one in reversed(_exploratory(experiment, arms)) if key(one) not in declared}
    families = ((tuple(declared.values()), True), (tuple(reversed(others.values())), False))
    found: list[Contrast] = []
    for hypotheses, is_declared in families:
        found += _judged(scores, [_contrast(scores, one, plan.key, declared=is_declared) for plan in experiment.data for one in hypotheses])
    return tuple(found)


# ----------------------------------------------------------------------------------------------------------------- arms
def _summary(study: Study, name: str, results: Mapping[int, CellResult], data: str, metric: str) -> ArmSummary:
    done = {seed: cell.evaluation for seed, cell in results.items() if cell.evaluation is not None}
    rows = [(item, seed) for seed, evaluation in done.items() for item in sorted(evaluation.items, key=lambda one: one.id)]
    values = [item.scores.get(metric) for item, _ in rows]
    per_seed = {seed: [v for item in one.items if (v := item.scores.get(metric)) is not None] for seed, one in done.items()}
    means = tuple(fmean(found) for found in per_seed.values() if found)
    note = f"{len(results) - len(done)} of {len(results)} have no result" if len(done) < len(results) else ""
    estimate = None
    if rows:
        clusters = _clusters([item.id for item, _ in rows], [item.document for item, _ in rows], len(done))
        try:
            estimate = mean_estimate(metric, values, clusters=clusters, level=1 - study.experiment.alpha, bounded=_bounded(metric))
        except StatisticsError as error:
            note = "; ".join(filter(None, (note, str(error))))
    return ArmSummary(arm=name, data=data, metric=metric, estimate=estimate, seeds=tuple(per_seed), per_seed=means, note=note)


def _summaries(study: Study) -> tuple[ArmSummary, ...]:
    experiment = study.experiment
    found: list[ArmSummary] = []
    for plan, metric in itertools.product(experiment.data, experiment.metrics):
        here = [cell for cell in study.cells if cell.data == plan.key]
        bases = {study.base_of(cell).id: study.base_of(cell) for cell in here}
        names = {identity: BASE if len(bases) == 1 else identity for identity in bases}
        found += [_summary(study, names[identity], {0: result}, plan.key, metric) for identity, result in bases.items()]
        for arm in experiment.arms():
            found.append(_summary(study, arm.name, {cell.seed: cell for cell in here if cell.arm == arm.name}, plan.key, metric))
    return tuple(found)


# ---------------------------------------------------------------------------------------------------------------- whole
def analyse(study: Study | str | Path) -> Analysis:
    """Says what a study shows, and keeps it in findings.json beside the plan.

    The effect of a contrast is the mean difference over all pairs of the same item and the same seed; items of one document count as one
    cluster. With several seeds its interval is about new examples and new seeds at once, which few seeds make wide; `given_seeds` is about
    new examples for these adapters alone.

    Args:
        study: from `run` or `load_study`, or its folder; it need not be finished.

    Raises:
        NotFoundError, CorruptError: there is no study, or a file of it is damaged.

    Emits:
        `experiment.analysed` with name, contrasts and failed.

    Source: Holm 1979, Scand. J. Statistics 6:65-70; Miller 2024, arXiv 2411.00640; and each finding's own.
    """
    study = study if isinstance(study, Study) else load_study(study)
    contrasts = _contrasts(_Scores(study))
    failed = tuple(
        Failed(id=one.id, error=one.failure.error, message=one.failure.message) for one in (*study.bases.values(), *study.cells) if one.failure is not None
    )
    found = [one.finding for one in contrasts if one.finding is not None]
    analysis = Analysis(
        name=study.experiment.name,
        primary=study.experiment.primary,
        alpha=study.experiment.alpha,
        arms=_summaries(study),
        contrasts=contrasts,
        failed=failed,
        pending=tuple(one.id for one in study.of("pending")),
        methods=methods.paragraph(study, found, declared=sum(one.declared and one.finding is not None for one in contrasts)),
        sources=methods.sources(found),
    )
    files.write_json(study.folder / FINDINGS, _plain(to_dict(analysis)))
    events.emit("experiment.analysed", experiment=analysis.name, contrasts=len(contrasts), failed=len(failed))
    return analysis


def _plain(value: Json) -> Json:
    """Infinite numbers as words, which JSON lacks; reading turns them back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def load_analysis(folder: str | Path) -> Analysis:
    """What `analyse` kept.

    Raises:
        NotFoundError: the study was not analysed yet.
        ConfigError: findings.json is no analysis.
    """
    return from_dict(Analysis, cast("dict[str, object]", files.read_json(Path(folder) / FINDINGS)))
