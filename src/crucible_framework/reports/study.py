"""A study folder as a report: what was declared, what was found, each arm with its interval, failed cells, methods, cost.

It reads plan.json, findings.json, cells/*.json and timings.jsonl as they lie on disk, says what is missing, and computes nothing but sums of
times and tokens. How a page looks is decided elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..config import from_dict
from ..errors import CorruptError, CrucibleError, NotFoundError
from ..files import read_json, read_lines
from ..records import Estimate, Finding, Json, record
from . import words
from .parts import Block, Document, DotPlot, Fact, Interval, Note, Section, Table, Tone
from .sources import as_list, as_number, as_table, as_text
from .study_figures import costs, curves, ensembles, item_differences, ranks
from .writing import chosen, publish

__all__ = ["is_study", "study_document", "write_study_report"]

_MOST_DRAWN = 24
_TONES: Mapping[str, Tone] = {"better": "adapter", "worse": "base"}
_VERDICTS = {
    "better": "better", "worse": "worse", "equivalent": "equivalent", "noninferior": "not worse", "not shown": "not shown to differ", "no result": "no result",
}  # fmt: skip
_OUTCOMES = {"better": "Supported", "equivalent": "Supported", "noninferior": "Supported", "worse": "Contradicted"}
_CLAIMS = {"better": "is better than", "equivalent": "is equivalent to", "noninferior": "is not worse than"}


@record
class _Study:
    """A study's files as plain values."""

    folder: Path
    experiment: Mapping[str, Json]
    leaks: Mapping[str, Json]
    findings: Mapping[str, Json]
    cells: tuple[Mapping[str, Json], ...]
    planned: int
    timings: tuple[Mapping[str, Json], ...]

    @property
    def primary(self) -> str:
        return as_text(self.findings.get("primary"))

    @property
    def contrasts(self) -> list[Mapping[str, Json]]:
        return [as_table(one) for one in as_list(self.findings.get("contrasts"))]

    @property
    def arms(self) -> list[Mapping[str, Json]]:
        return [as_table(one) for one in as_list(self.findings.get("arms"))]

    @property
    def shares(self) -> frozenset[str]:
        """Metrics whose every estimate lies in [0, 1]; a loss that happens to is none."""
        found: dict[str, bool] = {}
        for one in self.arms:
            estimate = _estimate(one)
            name = as_text(one.get("metric"))
            if estimate is not None:
                found[name] = found.get(name, name != "target_nll") and estimate.low >= 0 and estimate.high <= 1
        return frozenset(name for name, inside in found.items() if inside)

    def count(self, status: str) -> int:
        return sum(cell.get("status") == status for cell in self.cells)


def is_study(folder: str | Path) -> bool:
    """Whether the folder holds a study (and not a single run)."""
    return (Path(folder) / "plan.json").is_file()


def _read(folder: Path) -> _Study:
    if not is_study(folder):
        raise NotFoundError(f"{str(folder)!r} holds no study (plan.json is missing). Reports of single runs: crucible report RUN.")
    plan = as_table(read_json(folder / "plan.json"))
    if not (folder / "findings.json").exists():
        raise NotFoundError(f"{str(folder)!r} was not analysed yet: findings.json is missing. Call analyse(folder) first; `crucible run` does it at the end.")
    cells = [as_table(read_json(path)) for path in sorted((folder / "cells").glob("*.json"))]
    return _Study(
        folder=folder,
        experiment=as_table(plan.get("experiment")),
        leaks=as_table(read_json(folder / "leaks.json")) if (folder / "leaks.json").exists() else {},
        findings=as_table(read_json(folder / "findings.json")),
        cells=tuple(cells),
        planned=len(as_list(plan.get("cells"))),
        timings=tuple(read_lines(folder / "timings.jsonl")),
    )


def _estimate(one: Mapping[str, Json]) -> Estimate | None:
    plain = one.get("estimate")
    return from_dict(Estimate, plain) if isinstance(plain, dict) else None


def _finding(one: Mapping[str, Json], key: str = "finding") -> Finding | None:
    plain = one.get(key)
    return from_dict(Finding, plain) if isinstance(plain, dict) else None


# ---------------------------------------------------------------------------------------------------------------- words
def _value(value: float, *, share: bool) -> str:
    return words.percent(value, max(1, words.share_digits(value))) if share else words.number(value)


def _effect(value: float, *, share: bool) -> str:
    return f"{words.points(value, max(1, words.share_digits(value)), plus=True)} points" if share else words.signed(value)


def _ends(low: float, high: float, *, share: bool) -> str:
    if not share:
        return f"{words.signed(low)} to {words.signed(high)}"
    digits = max(1, words.share_digits(low, high))
    return f"{words.points(low, digits, plus=True)} to {words.points(high, digits, plus=True)} points"


def _p(value: Json) -> str:
    number = as_number(value)
    return words.NOTHING if number is None else "< 0.0001" if number < 1e-4 else f"{number:.4f}"


def _margin(contrast: Mapping[str, Json], share: bool) -> str:
    """The margin of a claim, "" where it has none."""
    margin = as_number(contrast.get("margin"))
    if margin is None:
        return ""
    shown = _effect(margin, share=share).lstrip("+")
    return f", margin {'±' if contrast.get('claim') == 'equivalent' else ''}{shown}"


def _title(contrast: Mapping[str, Json], study: _Study) -> str:
    several = len({as_text(one.get("data")) for one in study.contrasts}) > 1
    return as_text(contrast.get("name")) + (f" on {as_text(contrast.get('data'))}" if several else "")


def _sentence(contrast: Mapping[str, Json], study: _Study) -> str:
    """A declared claim and what became of it."""
    finding = _finding(contrast)
    share = as_text(contrast.get("metric")) in study.shares
    verb = _CLAIMS.get(as_text(contrast.get("claim")), _CLAIMS["better"])
    claim = f"Declared: {as_text(contrast.get('better'))} {verb} {as_text(contrast.get('than'))} in {as_text(contrast.get('metric'))}{_margin(contrast, share)}"
    if finding is None:
        return f"{claim}. No result: {as_text(contrast.get('note'))}."
    held = _finding(contrast, "against_margin")
    verdict = _OUTCOMES.get(as_text(contrast.get("verdict")), "Not shown")
    finding = held or finding  # its interval is the one that the margin is held against
    low, high = finding.interval
    return (
        f"{claim}. {verdict}: difference {_effect(finding.effect, share=share)}, {words.level(finding.level)} interval {_ends(low, high, share=share)}, "
        f"adjusted p {_p(contrast.get('p_adjusted'))}."
    )


# ------------------------------------------------------------------------------------------------------------- sections
def _contrast_tables(study: _Study, title: str, chosen: Sequence[Mapping[str, Json]]) -> tuple[Table, ...]:
    """What was found, what it rests on, and by which tests."""
    found, rests, told = [], [], dict[str, list[str]]()
    for one in chosen:
        name, metric, finding, given = _title(one, study), as_text(one.get("metric")), _finding(one), _finding(one, "given_seeds")
        share = metric in study.shares
        note = as_text(one.get("note")) or words.NOTHING
        if finding is None:
            found.append((name, metric, *(words.NOTHING,) * 3, _VERDICTS["no result"], words.NOTHING, note))
            continue
        per_seed = [_effect(value, share=share).removesuffix(" points") for v in as_list(one.get("per_seed")) if (value := as_number(v)) is not None]
        interval, verdict = _ends(*finding.interval, share=share), _told_verdict(one)
        found.append((name, metric, _effect(finding.effect, share=share), interval, _p(one.get("p_adjusted")), verdict, ", ".join(per_seed), note))
        ends = [end for value in as_list(one.get("simultaneous")) if (end := as_number(value)) is not None]
        rests.append((
            name, metric, _p(finding.p_value), _ends(ends[0], ends[1], share=share) if len(ends) == 2 else words.NOTHING,
            words.NOTHING if given is None else _ends(*given.interval, share=share), _value(as_number(one.get("detectable")) or 0.0, share=share),
            f"{finding.n:,}" + (f" in {finding.clusters:,}" if finding.clusters else ""),
        ))  # fmt: skip
        for test in filter(None, (finding, _finding(one, "against_margin"))):
            told.setdefault(f"{test.test}: {test.why}. Source: {test.source}.", []).append(f"{name} ({metric})")
    columns = ("Comparison", "Score", "Difference", "Interval", "p adjusted", "Verdict", "Each seed", "Note")
    more = ("Comparison", "Score", "p", "Simultaneous", "These seeds only", "Detectable", "n in clusters")
    note = (
        "Simultaneous intervals hold for the whole family at once (Bonferroni; a little wider than Holm's p-values ask). These seeds only: the interval for "
        "the adapters at hand. Detectable: about the smallest true difference that this design finds with 80 % power."
    )
    margins = _margin_rows(chosen, study)
    held = "Margin", "p", "Interval that is held against it", "Verdict"
    return (
        *(
            (Table(title=f"{title}: claims with a margin", columns=("Claim", "Score", *held), rows=margins, source="findings.json", numeric=(2, 3, 4)),)
            if margins
            else ()
        ),
        Table(title=title, columns=columns, rows=tuple(found), source="findings.json", numeric=(2, 3, 4)),
        Table(title=f"{title}: what this rests on", columns=more, rows=tuple(rests), source="findings.json", numeric=(2, 3, 4, 5, 6), note=note),
        Table(
            title=f"{title}: which test and why",
            columns=("", "Test"),
            rows=tuple(("; ".join(names), why) for why, names in told.items()),
            source="findings.json",
        ),
    )


def _told_verdict(one: Mapping[str, Json]) -> str:
    """The verdict in words; a claim with a margin that was not shown is not one of a difference."""
    verdict, claim = as_text(one.get("verdict")), as_text(one.get("claim"))
    if verdict == "not shown" and claim in ("equivalent", "noninferior"):
        return f"not shown to be {_VERDICTS[claim]}"
    return _VERDICTS.get(verdict, words.NOTHING)


def _margin_rows(chosen: Sequence[Mapping[str, Json]], study: _Study) -> tuple[tuple[str, ...], ...]:
    """Claims of equivalence and non-inferiority, each with the interval of level 1 - 2α that decides."""
    rows = []
    for one in chosen:
        held, metric = _finding(one, "against_margin"), as_text(one.get("metric"))
        if held is not None:
            share = metric in study.shares
            verb = _CLAIMS.get(as_text(one.get("claim")), _CLAIMS["better"]).removeprefix("is ")
            margin, ends = _margin(one, share).removeprefix(", margin "), _ends(*held.interval, share=share)
            name = f"{as_text(one.get('better'))} {verb} {as_text(one.get('than'))}"
            rows.append((name, metric, margin, _p(held.p_value), f"{ends} ({words.level(held.level)})", _told_verdict(one)))
    return tuple(rows)


def _contrast_plots(study: _Study, title: str, chosen: Sequence[Mapping[str, Json]]) -> Iterator[DotPlot]:
    for metric in dict.fromkeys(as_text(one.get("metric")) for one in chosen):
        share = metric in study.shares
        rows = []
        for one in chosen:
            finding = _finding(one)
            if finding is not None and as_text(one.get("metric")) == metric and all(map(math.isfinite, finding.interval)):
                label, tone = _title(one, study), _TONES.get(as_text(one.get("verdict")), "other")
                rows.append(Interval(label=label, value=finding.effect, low=finding.interval[0], high=finding.interval[1],
                                     text=_effect(finding.effect, share=share), tone=tone))  # fmt: skip
        if rows:
            less = " Less is better." if metric == "target_nll" else ""
            told = f"Dots are differences, lines their {words.level(1 - _alpha(study))} intervals.{less}"
            left = f" The first {_MOST_DRAWN} of {len(rows)}; all are in the table." if len(rows) > _MOST_DRAWN else ""
            yield DotPlot(
                title=f"{title}: {metric}", rows=tuple(rows[:_MOST_DRAWN]), unit=f"difference in {metric}{', percentage points' if share else ''}",
                source="findings.json", zero=True, share=share, note=told + left,
            )  # fmt: skip


def _alpha(study: _Study) -> float:
    return as_number(study.findings.get("alpha")) or 0.05


def _findings_section(study: _Study) -> Section:
    blocks: list[Block] = []
    for declared, title in ((True, "Declared before the study"), (False, "Exploratory")):
        chosen = [one for one in study.contrasts if one.get("declared") is declared]
        if not chosen:
            blocks.append(Note(text="No hypothesis was declared before the study: everything here is exploratory.")) if declared else None
            continue
        if declared:
            blocks += [Note(text=_sentence(one, study) + (f" Reason given: {as_text(one.get('because'))}" if one.get("because") else "")) for one in chosen]
        blocks += [*_contrast_plots(study, title, chosen), *_contrast_tables(study, title, chosen)]
        blocks += item_differences(chosen, study.shares) if declared else ()
    return Section(key="findings", title="Findings", blocks=tuple(blocks))


def _arms_section(study: _Study) -> Section:
    blocks: list[Block] = []
    rows = []
    for data, metric in dict.fromkeys((as_text(one.get("data")), as_text(one.get("metric"))) for one in study.arms):
        share, drawn = metric in study.shares, []
        for one in study.arms:
            if (as_text(one.get("data")), as_text(one.get("metric"))) != (data, metric):
                continue
            estimate, name = _estimate(one), as_text(one.get("arm"))
            per_seed = [_value(value, share=share) for v in as_list(one.get("per_seed")) if (value := as_number(v)) is not None]
            if estimate is not None:
                drawn.append(Interval(label=name, value=estimate.value, low=estimate.low, high=estimate.high, text=_value(estimate.value, share=share),
                                      tone="base" if name.startswith("base") else "adapter"))  # fmt: skip
            shown = (_value(estimate.value, share=share), words.interval(estimate.low, estimate.high, share=share)) if estimate else (words.NOTHING,) * 2
            rows.append((name, data, metric, *shown, ", ".join(per_seed) or words.NOTHING, as_text(one.get("note")) or words.NOTHING))
        if drawn:
            blocks.append(DotPlot(title=f"{metric} on {data}", rows=tuple(drawn[:_MOST_DRAWN]), unit=metric + (", %" if share else ""), source="findings.json",
                                  share=share, note="All seeds together; the intervals are of new examples."))  # fmt: skip
    columns = ("Arm", "Data", "Score", "Value", "Interval", "Each seed", "Note")
    blocks.append(Table(title="Every arm", columns=columns, rows=tuple(rows), source="findings.json", numeric=(3, 4)))
    blocks += ranks([as_table(one) for one in as_list(study.findings.get("rankings"))])
    return Section(key="arms", title="Arms", blocks=tuple(blocks))


def _training_section(study: _Study) -> Section:
    blocks = tuple(curves(study.folder, study.cells))
    return Section(key="training", title="Learning curves", blocks=blocks or (Note(text="No training is on file."),))


def _cells_section(study: _Study) -> Section:
    blocks: list[Block] = []
    failed = [as_table(one) for one in as_list(study.findings.get("failed"))]
    if failed:
        lost = tuple((as_text(one.get("id")), as_text(one.get("error")), words.clip(as_text(one.get("message")), 400)) for one in failed)
        blocks.append(Table(title="Failed", columns=("Cell", "Error", "What it says"), rows=lost, source="cells/*.json"))
    dropped = tuple((arm, as_text(because)) for arm, because in as_table(study.findings.get("dropped")).items())
    if dropped:
        blocks.append(Table(title="Dropped before all their seeds", columns=("Arm", "Why"), rows=dropped, source="findings.json"))
    rows = tuple(
        (as_text(cell.get("id")), as_text(cell.get("arm")), words.setting(cell.get("seed")), as_text(cell.get("data")), as_text(cell.get("status")),
         *(words.number(as_number(as_table(cell.get("training")).get(key)), 4) for key in ("initial_loss", "final_loss", "steps", "tokens")))
        for cell in study.cells
    )  # fmt: skip
    blocks += ensembles(study.cells, study.shares, study.primary)
    columns = ("Cell", "Arm", "Seed", "Data", "Ended", "Loss before", "Loss after", "Steps", "Tokens")
    blocks.append(Table(title="Every cell", columns=columns, rows=rows, source="cells/*.json", numeric=(2, 5, 6, 7, 8), note="Losses in nats per weight."))
    pending = [as_text(one) for one in as_list(study.findings.get("pending"))]
    if pending:
        blocks.append(Note(text=f"Without a result when the study was analysed: {', '.join(pending)}.", source="findings.json"))
    return Section(key="cells", title="Cells", blocks=tuple(blocks))


def _methods_section(study: _Study) -> Section:
    listed = tuple((str(index), as_text(one)) for index, one in enumerate(as_list(study.findings.get("sources")), 1))
    blocks: list[Block] = [Note(text=as_text(study.findings.get("methods")), source="findings.json")]
    blocks.append(Table(title="Sources", columns=("", "Source"), rows=listed, source="findings.json"))
    return Section(key="methods", title="Methods", blocks=tuple(blocks))


def _plan_section(study: _Study) -> Section:
    rows = tuple((key, words.clip(words.setting(value), 600)) for key, value in study.experiment.items() if value not in ({}, [], None) and key != "hypotheses")
    return Section(key="plan", title="Plan", blocks=(Table(title="As declared", columns=("", "Value"), rows=rows, source="plan.json"),))


def _spent(study: _Study) -> tuple[float, float]:
    numbers = {key: sum(as_number(row.get(key)) or 0.0 for row in study.timings) for key in ("train_s", "eval_s", "train_tokens", "asked_tokens")}
    return numbers["train_s"] + numbers["eval_s"], numbers["train_tokens"] + numbers["asked_tokens"]


def _cost_section(study: _Study) -> Section:
    rows = tuple(
        (as_text(row.get("id")), as_text(row.get("ended")), words.duration(as_number(row.get("train_s"))), words.duration(as_number(row.get("eval_s"))),
         words.number(as_number(row.get("train_tokens"))), words.number(as_number(row.get("asked_tokens"))))
        for row in study.timings
    )  # fmt: skip
    columns = ("Attempt at", "Ended", "Training", "Evaluation", "Tokens trained", "Tokens asked")
    note = "Every attempt is a row; those whose runner was killed left none."
    return Section(
        key="cost", title="Cost", blocks=(
            *costs(study.arms, study.cells, study.timings, study.shares, study.primary),
            Table(title="Time and tokens", columns=columns, rows=rows, source="timings.jsonl", numeric=(2, 3, 4, 5), note=note),
        ),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- whole
def _document(study: _Study) -> Document:
    done, failed = study.count("done"), study.count("failed")
    dropped = study.count("dropped")
    finished = done + failed + dropped >= study.planned
    declared = [one for one in study.contrasts if one.get("declared") is True]
    found = [as_text(one.get("verdict")) for one in declared]
    outcomes = [_OUTCOMES.get(verdict, "Not shown").lower() for verdict in found if verdict != "no result"]
    told = [f"{outcomes.count(text)} {text}" for text in ("supported", "contradicted", "not shown") if text in outcomes]
    seconds, tokens = _spent(study)
    notices = [f"{words.counted(failed, 'cell')} failed; they are listed below and left out of the comparisons."] if failed else []
    notices += [] if finished else [f"{study.planned - done - failed - dropped} of {study.planned} cells have no result yet."]
    notices += [] if declared else ["No hypothesis was declared before the study: its findings are exploratory."]
    for data, told_ in study.leaks.items():
        count, whole = (as_number(as_table(told_).get(key)) or 0.0 for key in ("count", "of"))
        if count:
            notices.append(f"{count:,.0f} of {words.counted(int(whole), 'test example')} of {data} share a document or text with training (leaks.json).")
    pending = as_list(study.findings.get("pending"))
    if finished and pending:
        notices.append("Cells have ended since the study was analysed; analyse it again.")
    return Document(
        of="study",
        title=as_text(study.findings.get("name")) or study.folder.name,
        subtitle=f"A study of {words.counted(study.planned, 'cell')}: arms × seeds × data sets",
        status="finished" if finished else "not finished",
        finished=finished,
        summary=f"{done} of {words.counted(study.planned, 'cell')} have a result. The primary score, declared before, is {study.primary}.",
        verdict=f"Declared comparisons: {', '.join(told)}." if told else "",
        facts=(
            Fact(label="Cells", value=f"{done} of {study.planned}", detail=f"{failed} failed" + (f", {dropped} dropped" if dropped else "")),
            Fact(label="Declared", value=str(len(declared)), detail=", ".join(told)),
            Fact(label="Time", value=words.duration(seconds), detail="of all workers together"),
            Fact(label="Tokens", value=words.number(tokens), detail="trained and asked"),
        ),
        notices=tuple(notices),
        sections=(
            _findings_section(study), _arms_section(study), _training_section(study), _methods_section(study), _cells_section(study), _cost_section(study),
            _plan_section(study),
        ),
    )  # fmt: skip


def study_document(folder: str | Path) -> Document:
    """The report of an analysed study as a document; raises as `write_study_report`."""
    study = _read(Path(folder))
    try:
        return _document(study)
    except CrucibleError as error:
        raise CorruptError(f"{str(study.folder / 'findings.json')!r} cannot be reported: {error} Analyse the study again.") from error


def write_study_report(folder: str | Path, formats: Sequence[str] = ("html", "markdown")) -> tuple[Path, ...]:
    """Writes the report of an analysed study beside its files in the formats asked for; older ones are replaced.

    Raises:
        NotFoundError: there is no study, or it was not analysed.
        CorruptError: a file of it is no study's.
        UnknownNameError: no such format.
    """
    folder, names = Path(folder), chosen(formats)
    return publish(study_document(folder), folder, names)
