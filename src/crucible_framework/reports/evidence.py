"""What a run's evaluations show: which two are compared, on which score, and the headline in words.

It computes no statistics: every interval and p-value is read from the files; only counts and differences of stored scores are made here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from ..records import Estimate, Finding, record
from . import words
from .parts import Fact
from .sources import Arm, Row, RunFiles, as_text

__all__ = [
    "LOWER_IS_BETTER",
    "RIGHT",
    "Pair",
    "compared",
    "difference_of",
    "effect_words",
    "estimate_of",
    "evaluation_notices",
    "facts",
    "find_pair",
    "is_baseline",
    "is_share",
    "named",
    "noun",
    "value_words",
]

RIGHT = ("label_accuracy", "accuracy", "exact_match", "numeric", "contains")
LOWER_IS_BETTER = ("perplexity", "target_nll", "loss", "nll")
_NOUNS = {"verify": "claims", "extract": "passages"}
_SAME = 1e-6


@record
class Pair:
    """Base and adapter on one score.

    Attributes:
        score: the score that the report leads with.
        share: its values are 0 or 1, so that its mean is a share of the items.
        joined: the items that both answered, in the base's order.
        difference: adapter − base with its interval, where a stored finding holds it.
    """

    base: Arm
    adapter: Arm
    score: str
    share: bool
    joined: tuple[tuple[Row, Row], ...]
    difference: Finding | None


# ------------------------------------------------------------------------------------------------------------- choosing
def _arms(run: RunFiles) -> tuple[Arm | None, Arm | None]:
    by_label = {arm.label: arm for arm in run.arms}
    base = by_label.get("base")
    others = [arm for arm in run.arms if arm is not base]
    adapter = by_label.get("adapter") or (others[-1] if others else None)
    return base, adapter


def estimate_of(arm: Arm, name: str) -> Estimate | None:
    """The estimate of that name, where it has a finite value."""
    return next((e for e in arm.estimates if e.name == name and math.isfinite(e.value)), None)


def is_baseline(name: str) -> bool:
    """Whether an estimate is that of no model: always the commonest label, or a guess among the labels."""
    return "majority" in name or "uniform_label" in name


def is_share(score: str, arms: Iterable[Arm]) -> bool:
    """Whether all values of a score are 0 or 1, so that its mean is a share; by its name where there are no values."""
    values = {row.scores[score] for arm in arms for row in arm.rows if score in row.scores} - {None}
    return values <= {0.0, 1.0} if values else score in RIGHT


def _scores(arms: Sequence[Arm], run: RunFiles) -> list[str]:
    names = [e.name for e in arms[0].estimates if not is_baseline(e.name) and all(estimate_of(arm, e.name) for arm in arms)]

    def rank(name: str) -> tuple[bool, bool, int]:
        tested = any(name in finding.name for finding in run.findings)
        return (not tested, not is_share(name, arms), RIGHT.index(name) if name in RIGHT else len(RIGHT))

    return sorted(names, key=rank)


def find_pair(run: RunFiles) -> Pair | None:
    """Base and adapter, where both were evaluated with a common score on the same data."""
    base, adapter = _arms(run)
    if base is None or adapter is None or not _same_data(base, adapter):
        return None
    scores = _scores((adapter, base), run)
    if not scores:
        return None
    score = scores[0]
    answered = {row.id: row for row in adapter.rows}
    joined = tuple((row, answered[row.id]) for row in base.rows if row.id in answered)
    pair = Pair(base=base, adapter=adapter, score=score, share=is_share(score, (base, adapter)), joined=joined, difference=None)
    ordered = sorted(run.findings, key=lambda finding: score not in finding.name)
    return dataclasses.replace(pair, difference=next((d for finding in ordered if (d := difference_of(pair, finding))), None))


def _same_data(base: Arm, adapter: Arm) -> bool:
    return base.card.get("sha256") == adapter.card.get("sha256")


def _observed(pair: Pair) -> list[float]:
    """The difference of the means, over the items that both were scored on and over all."""
    both = [(a.scores.get(pair.score), b.scores.get(pair.score)) for b, a in pair.joined]
    paired = [x - y for x, y in both if x is not None and y is not None]
    found = [math.fsum(paired) / len(paired)] if paired else []
    adapter, base = estimate_of(pair.adapter, pair.score), estimate_of(pair.base, pair.score)
    return [*found, adapter.value - base.value] if adapter and base else found


def difference_of(pair: Pair, finding: Finding) -> Finding | None:
    """The finding as adapter − base, where its effect is the difference seen in the files; None where it measures something else.

    base − adapter is turned round. A finding that names another score, or the majority, is about that.
    """
    others = {e.name for e in (*pair.adapter.estimates, *pair.base.estimates)} - {pair.score}
    about_other = pair.score not in finding.name and any(name in finding.name for name in others)
    longer = any(name in finding.name for name in others if pair.score in name)
    if about_other or longer or is_baseline(finding.name) or not math.isfinite(finding.effect):
        return None
    seen = _observed(pair)
    close = _SAME * max([1.0, *(abs(value) for value in seen)])
    if any(abs(finding.effect - value) <= close for value in seen):
        return finding
    if any(abs(finding.effect + value) <= close for value in seen):
        low, high = finding.interval
        return dataclasses.replace(finding, effect=-finding.effect, statistic=-finding.statistic, interval=(-high, -low))
    return None


def noun(arm: Arm) -> str:
    """What the items of a task are called, in the plural."""
    return _NOUNS.get(as_text(arm.card.get("task")), "items")


# ------------------------------------------------------------------------------------------------------------- headline
def _level(level: float) -> str:
    return f"{words.level(level)} interval"


def value_words(estimate: Estimate, *, share: bool) -> str:
    """An estimate's value: a share in percent, else a number."""
    return words.percent(estimate.value, max(1, words.share_digits(estimate.value))) if share else words.number(estimate.value)


def _own(estimate: Estimate, *, share: bool) -> str:
    """ "61.1 % (95 % interval 53.4 to 68.3 %)"."""
    ends = words.interval(estimate.low, estimate.high, share=share)
    tail = "no interval on file" if ends == words.NOTHING else f"{_level(estimate.level)} {ends}"
    return f"{value_words(estimate, share=share)} ({tail})"


def effect_words(difference: Finding, *, share: bool) -> tuple[str, str]:
    """The effect and its interval in words."""
    low, high = difference.interval
    if not share:
        return words.signed(difference.effect), words.interval(low, high, share=False)
    digits = max(1, words.share_digits(difference.effect, low, high))
    ends = f"{words.points(low, digits, plus=True)} to {words.points(high, digits, plus=True)}"
    return f"{words.points(difference.effect, digits, plus=True)} points", ends if math.isfinite(low + high) else words.NOTHING


def _design(pair: Pair, difference: Finding) -> tuple[str, str]:
    told = f"{difference.test} {difference.why}".lower()
    paired = "unpaired" not in told and any(word in told for word in ("pair", "mcnemar", "tango"))
    units = ""
    if difference.clusters and difference.clusters < difference.n:
        units = f", clustered by {words.counted(difference.clusters, 'document' if any(row.document for row in pair.base.rows) else 'cluster')}"
    return f"{'paired ' if paired else ''}difference", units


def _verdict(pair: Pair, difference: Finding) -> str:
    low, high = difference.interval
    if not math.isfinite(low + high):
        return "The adapter is not shown to be better: its difference has no interval on file."
    if low <= 0 <= high:
        return "The adapter is not shown to be better or worse: the interval of the difference includes 0."
    better = (low > 0) != (pair.score in LOWER_IS_BETTER)
    return f"The adapter is {'better' if better else 'worse'} than the base model on this data: the interval of the difference excludes 0."


def _majority(pair: Pair) -> str:
    """What no model would score, where that is on file; said because a gain over the base may still be below it."""
    floor = next((e for e in pair.adapter.estimates if "majority" in e.name and math.isfinite(e.value)), None)
    own = estimate_of(pair.adapter, pair.score)
    if floor is None or own is None or not (pair.share and pair.score in RIGHT):
        return ""
    where = ""
    if math.isfinite(own.low + own.high):
        where = ", above the adapter's interval" if floor.value > own.high else ", below the adapter's interval" if floor.value < own.low else ""
        where = where or ", which lies inside the adapter's interval"
    return f" Always giving the commonest label would score {value_words(floor, share=True)}{where}."


def compared(run: RunFiles) -> tuple[str, str]:
    """What was found, to follow "… was trained", and what that shows. The first is "" where nothing was evaluated."""
    pair = find_pair(run)
    base, adapter = _arms(run)
    if pair is not None:
        before, after = estimate_of(pair.base, pair.score), estimate_of(pair.adapter, pair.score)
        if before is not None and after is not None:
            return _both(pair, before, after)
    said = []
    for arm in (base, adapter):
        scores = _scores((arm,), run) if arm else []
        found = estimate_of(arm, scores[0]) if arm and scores else None
        if arm and found:
            said.append(f"{arm.label} has {named(found.name)} {_own(found, share=is_share(found.name, (arm,)))} on {found.n:,} {noun(arm)}")
    if base and adapter and not _same_data(base, adapter):
        return "; ".join(said), "Whether the adapter is better is not known: the two were evaluated on different data."
    if base is None and adapter is None:
        return "", "Whether the adapter answers better is not known: nothing was evaluated."
    missing = "base model was" if base is None else "adapter was" if adapter is None else "two were"
    how = "not evaluated" if base is None or adapter is None else "not scored by a common measure"
    return "; ".join(said), f"Whether the adapter is better than the base model is not known: the {missing} {how}."


def _both(pair: Pair, before: Estimate, after: Estimate) -> tuple[str, str]:
    on = f"{after.n:,} {noun(pair.adapter)}" + (f" ({before.n:,} before)" if before.n != after.n else "")
    change = f"{named(pair.score)} on {on} went from {_own(before, share=pair.share)} before to {_own(after, share=pair.share)} after"
    if pair.difference is None:
        return change, f"The adapter is not shown to be better: no comparison of the two is on file, so the difference has no interval.{_majority(pair)}"
    effect, ends = effect_words(pair.difference, share=pair.share)
    kind, units = _design(pair, pair.difference)
    tail = "no interval on file" if ends == words.NOTHING else f"{_level(pair.difference.level)} {ends}{units}"
    return f"{change}: a {kind} of {effect} ({tail})", _verdict(pair, pair.difference) + _majority(pair)


def named(score: str) -> str:
    """A score's name as words."""
    return score.replace("_", " ")


def facts(run: RunFiles) -> list[Fact]:
    """The main score of base and adapter and their difference, in as few words as possible."""
    pair = find_pair(run)
    if pair is None:
        return []
    found = []
    for label, arm in (("Before", pair.base), ("After", pair.adapter)):
        e = estimate_of(arm, pair.score)
        if e is not None:
            ends = words.interval(e.low, e.high, share=pair.share)
            found.append(Fact(label=f"{label}: {named(pair.score)}", value=value_words(e, share=pair.share), detail=f"{words.level(e.level)}: {ends}"))
    if pair.difference is not None:
        effect, ends = effect_words(pair.difference, share=pair.share)
        found.append(Fact(label="Difference", value=effect, detail=f"{words.level(pair.difference.level)}: {ends}"))
    return found


def evaluation_notices(run: RunFiles) -> list[str]:
    """What a reader must know before comparing: other data, other sampling, items that only one side answered."""
    base, adapter = _arms(run)
    if base is None or adapter is None:
        return []
    found = []
    if not _same_data(base, adapter):
        found.append(f"{base.label} and {adapter.label} were evaluated on different data (sha256 differs): they are not compared.")
    differing = sorted(key for key in base.params.keys() | adapter.params.keys() if base.params.get(key) != adapter.params.get(key))
    if differing:
        found.append(f"{base.label} and {adapter.label} were sampled with different settings: {', '.join(differing)}.")
    alone = {row.id for row in base.rows} ^ {row.id for row in adapter.rows}
    if alone and base.rows and adapter.rows:
        found.append(f"{len(alone)} items were answered by only one of {base.label} and {adapter.label}; item-by-item tables leave them out.")
    return found
