"""The methods paragraph of a study, written from what was done and not from what was planned, and its citations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..records import Finding
from .arms import word
from .study import Study

__all__ = ["paragraph", "sources"]

_HOLM = "Holm 1979, A Simple Sequentially Rejective Multiple Test Procedure, Scand. J. Statistics 6:65-70"
_DUNN = "Dunn 1961, Multiple Comparisons Among Means, JASA 56:52-64 (simultaneous intervals)"
_LORA = "Hu et al. 2021, LoRA, arXiv 2106.09685"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def paragraph(study: Study, findings: Sequence[Finding], held: Sequence[Finding], *, declared: int) -> str:
    """What was trained, asked, compared and corrected; `held` are the tests of claims with a margin."""
    experiment = study.experiment
    arms = experiment.trained()
    models, losses = {arm.config.base_model for arm in arms}, {word(arm.config.loss) for arm in arms}
    cells = _counted(len(arms) * len(experiment.seeds) * len(experiment.data), "cell")
    first = (
        f"{_counted(len(arms), 'arm')} of LoRA fine-tuning ({_listed(sorted(models))}; loss {_listed(sorted(losses))}) "
        f"{'was' if len(arms) == 1 else 'were'} trained with {_counted(len(experiment.seeds), 'seed')} "
        f"({_listed(list(map(str, experiment.seeds)))}) on {_listed([plan.key for plan in experiment.data])}, which makes {cells}."
    )
    lines = [first, *_voted(study)]
    without = [f"{len(cells)} {words}" for cells, words in ((study.of("failed"), "failed"), (study.of("pending"), "did not run")) if cells]
    if without:
        lines.append(f"{_listed(without)}; comparisons leave out the seeds that this concerns and say so.")
    lines += _stopped(study)
    lines += _asked(study)
    lines += _compared(study, findings, declared)
    if held:
        tests = Counter(finding.test for finding in held)
        claims = [f"{test} ({_counted(count, 'comparison')})" for test, count in tests.items()]
        lines.append(f"Claims of equivalence and non-inferiority were held to margins declared before the study, by the {_listed(claims)}.")
    return " ".join(lines)


def _voted(study: Study) -> list[str]:
    told = [f"{arm.name} ({arm.vote} vote of {_listed(arm.members)})" for arm in study.experiment.arms() if arm.members]
    if not told:
        return []
    one = len(told) == 1
    counted = _counted(len(told) * len(study.experiment.seeds) * len(study.experiment.data), "cell")
    first = f"{_counted(len(told), 'ensemble')}, {_listed(told)}, {'counts' if one else 'count'} the recorded answers of adapters of the same seed as votes"
    return [f"{first} ({counted} more); where a vote has no winner, nothing was answered."]


def _stopped(study: Study) -> list[str]:
    rule = study.experiment.stopping
    if rule is None:
        return []
    dropped = len({cell.arm for cell in study.of("dropped")})
    chosen = (
        f"After {_counted(rule.selection, 'seed')} the share of {rule.keep:g} of the arms with the lowest loss on held-out data went on ({dropped} did not); "
        "these seeds are in no test."
    )
    looked = (
        f"After each seed from the third on, arms shown to be worse than another were dropped ({dropped} were), by group-sequential looks with "
        f"{rule.spending} spending of α, divided by the number of pairs; intervals and p-values hold over all looks."
    )
    return [chosen if rule.rule == "halving" else looked]


def _asked(study: Study) -> list[str]:
    sampling, sizes = study.experiment.sampling, {plan.key: 0 for plan in study.experiment.data}
    documents: dict[str, set[str]] = {key: set() for key in sizes}
    for cell in (*study.bases.values(), *study.cells):
        if cell.evaluation is not None:
            sizes[cell.data] = len(cell.evaluation.items)
            documents[cell.data] = {item.document for item in cell.evaluation.items if item.document}
    parts = [
        f"{_counted(count, 'held-out example')} of {key}" + (f" ({_counted(len(documents[key]), 'document')})" if documents[key] else "")
        for key, count in sizes.items()
        if count
    ]
    if not parts:
        return ["Nothing was evaluated."]
    drawn = "greedily" if sampling.temperature == 0 else f"at temperature {sampling.temperature:g}"
    how = "by choosing the likeliest label" if study.experiment.choose else f"{drawn} with at most {sampling.max_tokens} tokens"
    return [f"Every adapter and its untrained base answered {_listed(parts)} {how}."]


def _compared(study: Study, findings: Sequence[Finding], declared: int) -> list[str]:
    experiment, others = study.experiment, len(findings) - declared
    if not findings:
        return ["Nothing could be compared."]
    tests = Counter(finding.test for finding in findings)
    clustered = any(finding.clusters for finding in findings)
    used = _listed([f"{test} ({_counted(count, 'comparison')})" for test, count in tests.items()])
    first = (
        f"The primary metric, declared before the study, is {experiment.primary}. Differences were taken between answers to the same example by models "
        f"of the same seed{', clustered by document' if clustered else ''}, and tested with the {used}."
    )
    lines = [first]
    if declared:
        lines.append(
            f"{_counted(declared, 'comparison')} {'was' if declared == 1 else 'were'} declared before the study and corrected together by Holm's method "
            f"at α = {experiment.alpha:g}."
        )
    if others:
        lines.append(
            f"{_counted(others, 'comparison')} {'was' if others == 1 else 'were'} not declared and {'is' if others == 1 else 'are'} exploratory; "
            "they were corrected as a family of their own."
        )
    lines.append(
        f"Intervals have level {1 - experiment.alpha:.0%} for one comparison; simultaneous ones use Bonferroni's level for the family. "
        + (
            "With several seeds they are about new examples and new seeds at once; those for the adapters at hand are given beside."
            if len(experiment.seeds) > 1
            else "With a single seed they are about new examples for the adapters at hand only."
        )
    )
    return lines


def sources(findings: Sequence[Finding]) -> tuple[str, ...]:
    """The citations of what was used, each once."""
    if not findings:
        return (_LORA,)
    return tuple(dict.fromkeys((*(finding.source for finding in findings), _HOLM, _DUNN, _LORA)))
