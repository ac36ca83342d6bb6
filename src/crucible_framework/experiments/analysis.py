"""What a study shows: differences between arms, paired by item and seed, clustered by document, corrected over their family.

What was declared before the study and what was not are two families; the second is exploratory and says so. Nothing is left out: a
comparison without data says why, and failed cells are listed. This file does not know how a cell was run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Literal, cast

from .. import events, files
from ..config import from_dict, to_dict
from ..errors import NotFoundError, StatisticsError
from ..records import Estimate, Evaluation, Finding, Json, record
from ..stats import Side, adjust, mean_estimate
from . import methods
from .arms import BASE, Arm, Claim, Hypothesis, less_is_better, select
from .design import Experiment
from .pairs import Scores, bounded, clusters_of, held_to_margin, paired_up, tested
from .rankings import Ranking, ranking_of
from .stopping import alpha_at, kept_seeds
from .study import FINDINGS, CellResult, Study, load_study

__all__ = ["Analysis", "ArmSummary", "Contrast", "Failed", "analyse", "load_analysis"]

MANY_ARMS = 6
"""With more arms than that, exploratory comparisons are those with the base and those along one axis, not all pairs."""
POWER = 0.8
Verdict = Literal["better", "worse", "equivalent", "noninferior", "not shown", "no result"]


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
        claim, margin: what was declared: that `better` is better, or equivalent within ±margin, or not worse by the margin.
        against_margin: the test of such a claim, whose interval of level 1 - 2α lies inside the margin exactly where p < α; None of "better".
        p_adjusted: of the claim; Holm's over the `family` comparisons of the same kind; where arms may be dropped early, also for the number of looks.
        simultaneous: an interval that holds for all of the family at once (Bonferroni's level, of a claim with a margin as its test asks).
        per_seed: the difference in each of `seeds`.
        detectable: about the smallest true difference that this design finds with 80 % power.
        verdict: of the claim, from the adjusted p-value.
        per_item: example → mean difference over seeds and settings; only of declared comparisons.
    """

    name: str
    better: str
    than: str
    data: str
    metric: str
    declared: bool
    because: str = ""
    claim: Claim = "better"
    margin: float | None = None
    finding: Finding | None = None
    against_margin: Finding | None = None
    p_adjusted: float | None = None
    family: int = 0
    simultaneous: tuple[float, float] | None = None
    seeds: tuple[int, ...] = ()
    per_seed: tuple[float, ...] = ()
    given_seeds: Finding | None = None
    detectable: float | None = None
    verdict: Verdict = "no result"
    note: str = ""
    per_item: Mapping[str, float] = field(default_factory=dict)


@record
class Failed:
    """A cell without a result."""

    id: str
    error: str
    message: str


@record
class Analysis:
    """Everything that a study shows.

    `dropped` says of each arm that was dropped early why; `methods` is the paragraph for a paper, written from what was done; `sources` are its
    citations.
    """

    name: str
    primary: str
    alpha: float
    arms: tuple[ArmSummary, ...]
    contrasts: tuple[Contrast, ...]
    failed: tuple[Failed, ...]
    pending: tuple[str, ...]
    dropped: Mapping[str, str]
    methods: str
    sources: tuple[str, ...]
    rankings: tuple[Ranking, ...] = ()

    def __getitem__(self, name: str) -> Contrast:
        """The first contrast of that name."""
        for contrast in self.contrasts:
            if contrast.name == name:
                return contrast
        raise NotFoundError(f"There is no contrast {name!r}. Known: {', '.join(sorted({one.name for one in self.contrasts}))}.")


# ------------------------------------------------------------------------------------------------------------ contrasts
def _contrast(scores: Scores, hypothesis: Hypothesis, data: str, *, declared: bool) -> Contrast:
    experiment = scores.study.experiment
    metric = hypothesis.metric or experiment.primary
    name = f"{hypothesis.better} − {hypothesis.than}"
    plain = Contrast(
        name=name, better=hypothesis.better, than=hypothesis.than, data=data, metric=metric, declared=declared, because=hypothesis.because,
        claim=hypothesis.claims, margin=hypothesis.margin,
    )  # fmt: skip
    paired = paired_up(scores, select(scores.arms, hypothesis), data, metric, kept_seeds(experiment))
    missing = f"without seed {', '.join(map(str, paired.missing))}: {_why_missing(scores, hypothesis, paired.missing)}" if paired.missing else ""
    if not paired.items:
        return replace(plain, note=missing or "nothing was measured")
    means = paired.per_seed()
    each = paired.per_item() if declared else {}
    plain = replace(plain, seeds=tuple(means), per_seed=tuple(means.values()), note=missing, per_item=each)
    level, held = 1 - alpha_at(experiment, len(paired.seeds)), None
    try:
        finding, given = tested(name, paired, metric, level, freedom="satterthwaite")
        if hypothesis.margin is not None:
            held = held_to_margin(name, paired, metric, level, margin=hypothesis.margin, side=_side(plain))
    except StatisticsError as error:
        return replace(plain, note="; ".join(filter(None, (str(error), missing))))
    critical = NormalDist().inv_cdf((1 + finding.level) / 2)
    half = (finding.interval[1] - finding.interval[0]) / 2
    return replace(plain, finding=finding, against_margin=held, given_seeds=given, detectable=half * (critical + NormalDist().inv_cdf(POWER)) / critical)


def _side(one: Contrast) -> Side:
    """Which margin a claim asks about."""
    if one.claim == "equivalent":
        return "both"
    return "upper" if less_is_better(one.metric) else "lower"


def _why_missing(scores: Scores, hypothesis: Hypothesis, seeds: Sequence[int]) -> str:
    names = {name for pair in select(scores.arms, hypothesis) for name in pair}
    statuses = {cell.status for cell in scores.study.cells if cell.seed in seeds and cell.arm in names}
    return "a cell has failed or has not run" if statuses & {"failed", "pending"} else "an arm was dropped before"


def _judged(scores: Scores, family: Sequence[Contrast]) -> list[Contrast]:
    """The contrasts with what depends on how many they are."""
    experiment = scores.study.experiment
    with_finding = [one for one in family if one.finding is not None]
    looks = [experiment.alpha / alpha_at(experiment, len(one.seeds)) for one in with_finding]  # 1 where nothing is looked at early
    asked = [one.against_margin or one.finding for one in with_finding]
    own = [min(1.0, one.p_value * look) for one, look in zip(asked, looks, strict=True) if one is not None]
    adjusted = iter(adjust(own, "holm"))
    found: list[Contrast] = []
    for one in family:
        if one.finding is None:
            found.append(replace(one, family=len(with_finding)))
            continue
        p = next(adjusted)
        hypothesis = Hypothesis(better=one.better, than=one.than, metric=one.metric)
        paired = paired_up(scores, select(scores.arms, hypothesis), one.data, one.metric, kept_seeds(experiment))
        level = 1 - alpha_at(experiment, len(one.seeds)) / len(with_finding)
        if one.margin is None:
            wide, _ = tested(one.name, paired, one.metric, level, freedom="satterthwaite")
        else:
            wide = held_to_margin(one.name, paired, one.metric, level, margin=one.margin, side=_side(one))
        verdict = _verdict(one, p, experiment.alpha)
        found.append(replace(one, p_adjusted=p, family=len(with_finding), simultaneous=wide.interval, verdict=verdict))
    return found


def _verdict(one: Contrast, p: float, alpha: float) -> Verdict:
    if p > alpha or one.finding is None:
        return "not shown"
    if one.claim != "better":
        return one.claim
    gain = -one.finding.effect if less_is_better(one.metric) else one.finding.effect
    return "not shown" if gain == 0 else "better" if gain > 0 else "worse"


def _exploratory(experiment: Experiment, arms: Sequence[Arm]) -> list[Hypothesis]:
    """Each arm against its base, along each axis, all pairs of few arms, and each ensemble against its members; in the other metrics only against
    the base."""
    found = [Hypothesis(better=arm.name, metric=experiment.primary) for arm in arms]
    for parts in _axes(experiment, experiment.trained()):
        found += [Hypothesis(better=other, than=parts[0], metric=experiment.primary) for other in parts[1:]]
    if len(arms) <= MANY_ARMS:
        found += [Hypothesis(better=b.name, than=a.name, metric=experiment.primary) for a, b in itertools.combinations(arms, 2)]
    else:
        found += [Hypothesis(better=arm.name, than=member, metric=experiment.primary) for arm in arms for member in arm.members]
    others = [metric for metric in experiment.metrics if metric != experiment.primary]
    found += [Hypothesis(better=arm.name, metric=metric) for metric in others for arm in arms if metric in experiment.measured(arm)]
    return found


def _axes(experiment: Experiment, arms: Sequence[Arm]) -> list[list[str]]:
    """The parts of each axis and of the conditions, where there are several."""
    size = len(arms[0].parts)
    columns = [list(dict.fromkeys(arm.parts[index] for arm in arms)) for index in range(size)] if arms and (experiment.matrix or experiment.conditions) else []
    return [column for column in columns if len(column) > 1]


def _contrasts(scores: Scores) -> tuple[Contrast, ...]:
    experiment, arms = scores.study.experiment, scores.arms

    def key(one: Hypothesis) -> tuple[object, ...]:
        pairs = select(arms, one)
        sides = frozenset(pairs) if one.claims == "noninferior" else frozenset(map(frozenset, pairs))  # the others are the same turned round
        return sides, one.metric or experiment.primary, one.claims, one.margin

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
    dropped = next((cell.dropped for cell in results.values() if cell.dropped), "")
    note = f"{len(results) - len(done)} of {len(results)} have no result" if len(done) < len(results) else ""
    note = f"{note}; dropped: {dropped}" if dropped else note
    estimate = None
    if rows:
        clusters = clusters_of([item.id for item, _ in rows], [item.document for item, _ in rows], len(done))
        try:
            estimate = mean_estimate(metric, values, clusters=clusters, level=1 - study.experiment.alpha, bounded=bounded(metric))
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
            if metric not in experiment.measured(arm):
                continue
            results = {cell.seed: cell for cell in here if cell.arm == arm.name and cell.seed in kept_seeds(experiment)}
            found.append(_summary(study, arm.name, results, plan.key, metric))
    return tuple(found)


def _rankings(study: Study) -> tuple[Ranking, ...]:
    """Of the primary metric on each data set."""
    experiment, metric, found = study.experiment, study.experiment.primary, list[Ranking]()
    for plan in experiment.data:
        here = [cell for cell in study.cells if cell.data == plan.key]
        bases = {study.base_of(cell).id: study.base_of(cell) for cell in here}
        sides: dict[str, list[Evaluation]] = {}
        for name, results in [(BASE if len(bases) == 1 else one.id, [one]) for one in bases.values()]:
            sides[name] = [one.evaluation for one in results if one.evaluation is not None]
        for arm in experiment.arms():
            mine = [cell.evaluation for cell in here if cell.arm == arm.name and cell.seed in kept_seeds(experiment)]
            sides[arm.name] = [one for one in mine if one is not None]
        ranking = ranking_of(plan.key, metric, sides, alpha=experiment.alpha, less_is_better=less_is_better(metric))
        found += [ranking] if ranking is not None else []
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
    contrasts = _contrasts(Scores(study))
    failed = tuple(
        Failed(id=one.id, error=one.failure.error, message=one.failure.message) for one in (*study.bases.values(), *study.cells) if one.failure is not None
    )
    found, rankings = [one.finding for one in contrasts if one.finding is not None], _rankings(study)
    held = [one.against_margin for one in contrasts if one.against_margin is not None]
    analysis = Analysis(
        name=study.experiment.name,
        primary=study.experiment.primary,
        alpha=study.experiment.alpha,
        arms=_summaries(study),
        contrasts=contrasts,
        failed=failed,
        pending=tuple(one.id for one in study.of("pending")),
        dropped={one.arm: one.dropped for one in study.of("dropped")},
        methods=methods.paragraph(study, found, held, declared=sum(one.declared and one.finding is not None for one in contrasts)),
        sources=methods.sources([*found, *held, *(one.overall for one in rankings)]),
        rankings=rankings,
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
