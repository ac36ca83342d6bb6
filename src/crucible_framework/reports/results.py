"""The sections on evaluations: charts, scores, comparisons, who gained and lost what, and answers side by side.

Only counts of stored scores are made here. Nothing is escaped: a format escapes everything that it prints.
"""

from __future__ import annotations

import dataclasses
import math

from ..stats import adjust
from . import words
from .evidence import LOWER_IS_BETTER, RIGHT, Pair, difference_of, effect_words, estimate_of, find_pair, is_baseline, is_share, named, noun, value_words
from .parts import Block, DotPlot, Interval, Note, Sample, Samples, Section, Table, Tone
from .sources import Arm, Row, RunFiles

__all__ = ["results", "samples"]

_COLUMN = f"{words.level(0.95)} interval"
_BASELINES = ("a guess among the labels", "always the commonest label")
_PER_GROUP = 4
_TEXT_LIMIT, _PROMPT_LIMIT, _ID_LIMIT, _MOST_SHOWN = 1200, 4000, 80, 24


def _tone(arm: Arm) -> Tone:
    return "base" if arm.label == "base" else "adapter" if arm.label == "adapter" else "other"


def _level(level: float) -> str:
    return "" if math.isclose(level, 0.95) else f" ({words.level(level)})"


def _scores_table(run: RunFiles) -> Table | None:
    rows = []
    methods: dict[str, list[str]] = {}
    for name in dict.fromkeys(e.name for arm in run.arms for e in arm.estimates):
        given = [(arm, e) for arm in run.arms for e in arm.estimates if e.name == name]
        share = is_share(name, run.arms) or (is_baseline(name) and all(0 <= e.value <= 1 for _, e in given))
        if is_baseline(name) and len({(e.value, e.low, e.high, e.n) for _, e in given}) == 1:
            given = given[:1]
        for arm, e in given:
            who = _BASELINES["majority" in name] if is_baseline(name) else arm.label
            clusters = words.NOTHING if e.clusters is None else f"{e.clusters:,}"
            rows.append((name, who, value_words(e, share=share), words.interval(e.low, e.high, share=share) + _level(e.level), f"{e.n:,}", clusters))
            methods.setdefault(e.method, []).append(name)
    if not rows:
        return None
    told = [f"{', '.join(dict.fromkeys(names))}: {method}" for method, names in methods.items() if method]
    return Table(
        title="Scores before and after",
        columns=("Score", "Who", "Value", _COLUMN, "n", "Clusters"),
        rows=tuple(rows),
        source=", ".join(f"{arm.source}/evaluation.json" for arm in run.arms),
        numeric=(2, 3, 4, 5),
        note="n counts items, clusters the independent groups of them." + (f" Intervals: {'; '.join(told)}." if told else ""),
    )


def _findings(run: RunFiles, pair: Pair | None) -> list[Block]:
    rows = []
    told: dict[str, list[str]] = {}
    corrected = adjust([finding.p_value for finding in run.findings], "holm") if all(0 <= f.p_value <= 1 for f in run.findings) else ()
    for index, finding in enumerate(run.findings):
        share = (pair is not None and pair.share and difference_of(pair, finding) is not None) or is_share(finding.name.partition(",")[0], run.arms)
        effect, ends = effect_words(finding, share=share)
        clusters = words.NOTHING if finding.clusters is None else f"{finding.clusters:,}"
        own = words.number(corrected[index], 2) if corrected else words.NOTHING
        rows.append((finding.name, effect, ends + _level(finding.level), words.number(finding.p_value, 2), own, f"{finding.n:,}", clusters))
        because = "".join((finding.test, f": {finding.why}" if finding.why else "", f". Source: {finding.source}" if finding.source else ""))
        told.setdefault(because, []).append(finding.name)
    if not rows:
        return []
    table = Table(
        title="Comparisons",
        columns=("Comparison", "Effect", _COLUMN, "p", "p corrected", "n", "Clusters"),
        rows=tuple(rows),
        source="findings.json",
        numeric=(1, 2, 3, 4, 5, 6),
        note=f"p corrected: by Holm's method over the {len(rows)} comparisons of this table; intervals are of one comparison each." if len(rows) > 1 else "",
    )
    return [table, *(Note(text=f"{'; '.join(names)} – {because}.") for because, names in told.items() if because)]


def _plots(pair: Pair) -> list[Block]:
    rows = []
    for arm in (pair.base, pair.adapter):
        e = estimate_of(arm, pair.score)
        if e is not None:
            tone: Tone = "base" if arm is pair.base else "adapter"
            rows.append(Interval(label=arm.label, value=e.value, low=e.low, high=e.high, text=value_words(e, share=pair.share), tone=tone))
    majority = next((e for e in pair.adapter.estimates if "majority" in e.name and math.isfinite(e.value)), None)
    if majority is not None and pair.share and pair.score in RIGHT:
        rows.append(
            Interval(label="always the commonest label", value=majority.value, low=majority.low, high=majority.high, text=value_words(majority, share=True))
        )
    source = f"{pair.base.source}/evaluation.json, {pair.adapter.source}/evaluation.json"
    name = named(pair.score).capitalize()
    plots: list[Block] = [DotPlot(title=f"{name} with intervals", rows=tuple(rows), unit=name + (", %" if pair.share else ""), source=source, share=pair.share)]
    if pair.difference is not None:
        d = pair.difference
        label = f"{pair.adapter.label} − {pair.base.label}"
        row = Interval(label=label, value=d.effect, low=d.interval[0], high=d.interval[1], text=effect_words(d, share=pair.share)[0], tone="adapter")
        unit = f"Difference in {named(pair.score)}" + (", percentage points" if pair.share else "")
        note = "The dashed line is no difference."
        plots.append(
            DotPlot(title=f"Difference in {named(pair.score)}", rows=(row,), unit=unit, source="findings.json", zero=True, share=pair.share, note=note)
        )
    return plots


def _outcomes(pair: Pair) -> Table | None:
    both = [(b.scores.get(pair.score), a.scores.get(pair.score)) for b, a in pair.joined]
    scored = [(b == 1, a == 1) for b, a in both if b is not None and a is not None]
    if not (pair.share and scored):
        return None

    def cell(*wanted: tuple[bool, bool]) -> str:
        count = sum(outcome in wanted for outcome in scored)
        return f"{count:,} ({words.percent(count / len(scored))})"

    base, adapter = pair.base.label.capitalize(), pair.adapter.label.capitalize()
    yes, no = True, False
    fixed, broken = scored.count((no, yes)), scored.count((yes, no))
    left_out = len(pair.joined) - len(scored)
    note = f"Only {pair.adapter.label} right (fixed): {fixed}; only {pair.base.label} right (broken): {broken}." + (
        f" {left_out} items without a score on one side are left out." if left_out else ""
    )
    return Table(
        title=f"Who is right on which of {len(scored):,} {noun(pair.adapter)}",
        columns=("", f"{adapter} right", f"{adapter} wrong", "Together"),
        rows=(
            (f"{base} right", cell((yes, yes)), cell((yes, no)), cell((yes, yes), (yes, no))),
            (f"{base} wrong", cell((no, yes)), cell((no, no)), cell((no, yes), (no, no))),
            ("Together", cell((yes, yes), (no, yes)), cell((yes, no), (no, no)), f"{len(scored):,}"),
        ),
        source=f"{pair.base.source}/scores.jsonl, {pair.adapter.source}/scores.jsonl",
        numeric=(1, 2, 3),
        note=note,
    )


def _params(run: RunFiles) -> Table | None:
    names = list(dict.fromkeys(key for arm in run.arms for key in arm.params))
    if not names:
        return None
    rows = [
        ("model", *(arm.model or words.NOTHING for arm in run.arms)),
        *((name, *(words.setting(arm.params.get(name)) for arm in run.arms)) for name in names),
    ]
    source = ", ".join(f"{arm.source}/evaluation.json" for arm in run.arms)
    return Table(title="How the answers were sampled", columns=("Setting", *(arm.label for arm in run.arms)), rows=tuple(rows), source=source)


def _joined(labels: list[str]) -> str:
    return " and ".join(labels)


def results(run: RunFiles) -> Section | None:
    """Scores with intervals, comparisons, and who is right on what."""
    pair = find_pair(run)
    blocks: list[Block | None] = list(_plots(pair)) if pair else []
    blocks += [_scores_table(run), *_findings(run, pair), _outcomes(pair) if pair else None, _params(run)]
    if run.arms and not run.findings:
        blocks.append(Note(text="No comparison of base and adapter is on file (findings.json), so no interval of their difference is shown."))
    omitted: dict[str, list[str]] = {}
    for arm in run.arms:
        for name, why in arm.omitted:
            omitted.setdefault(f"{name}{f' ({why})' if why else ''}", []).append(arm.label)
    if omitted:
        blocks.append(Note(text=f"No estimate: {'; '.join(f'{what} of {_joined(who)}' for what, who in omitted.items())}."))
    kept = tuple(block for block in blocks if block is not None)
    return Section(key="results", title="Before and after", blocks=kept) if kept else None


def _right(value: float | None, *, share: bool) -> bool | None:
    return value == 1 if share and value is not None else None


def _gain(pair: Pair, old: float | None, new: float | None) -> str:
    if old is None or new is None or old == new:
        return "other"
    return "fixed" if (new > old) != (pair.score in LOWER_IS_BETTER) else "broken"


def _sample(pair: Pair | None, base: Row, adapter: Row) -> Sample:
    old, new = (row.scores.get(pair.score) if pair else None for row in (base, adapter))
    share = pair is not None and pair.share
    return Sample(
        id=words.clip(base.id, _ID_LIMIT),
        document=words.clip(base.document or adapter.document, _ID_LIMIT),
        group=_gain(pair, old, new) if pair else "other",
        prompt=words.clip(base.prompt or adapter.prompt, _PROMPT_LIMIT),
        target=words.clip(base.target, _TEXT_LIMIT),
        base=words.clip(base.completion, _TEXT_LIMIT),
        adapter=words.clip(adapter.completion, _TEXT_LIMIT),
        base_score=words.number(old),
        adapter_score=words.number(new),
        base_right=_right(old, share=share),
        adapter_right=_right(new, share=share),
    )


def _chosen(run: RunFiles, pair: Pair | None) -> Samples:
    """Those of samples.json; right or wrong only where scores.jsonl judged exactly this answer."""
    sides: list[dict[str, Row]] = [{row.id: row for row in arm.rows} for arm in (pair.base, pair.adapter)] if pair else [{}, {}]

    def row(side: int, id_: str, completion: str) -> Row:
        known = sides[side].get(id_)
        return Row(id=id_, document="", target="", completion=completion, prompt="", scores=known.scores if known and known.completion == completion else {})

    items = []
    for shown in run.samples[:_MOST_SHOWN]:
        base = dataclasses.replace(row(0, shown.id, shown.base), document=shown.document, target=shown.target, prompt=shown.prompt)
        items.append(_sample(pair, base, row(1, shown.id, shown.adapter)))
    more = f" The first {len(items)} of {len(run.samples):,} are shown." if len(items) < len(run.samples) else ""
    judged = f" Right or wrong: {named(pair.score)} in scores.jsonl of the same answer." if pair else " They were not scored."
    rule = f"{words.counted(len(run.samples), 'item')} chosen by whoever made the run (samples.json): examples, no measure of quality.{judged}{more}"
    source = "samples.json" + (f", {pair.base.source}/scores.jsonl, {pair.adapter.source}/scores.jsonl" if pair else "")
    return Samples(rule=rule, items=tuple(items), source=source)


def samples(run: RunFiles) -> Section | None:
    """Items side by side: those of samples.json, else up to twelve chosen by a rule and not by hand."""
    pair = find_pair(run)
    if run.samples:
        return Section(key="samples", title="Answers side by side", blocks=(_chosen(run, pair),))
    if pair is None or not pair.joined:
        return None
    groups: dict[str, list[tuple[Row, Row]]] = {"fixed": [], "broken": [], "other": []}
    for base, adapter in pair.joined:
        groups[_gain(pair, base.scores.get(pair.score), adapter.scores.get(pair.score))].append((base, adapter))
    items = tuple(_sample(pair, *rows) for found in groups.values() for rows in found[:_PER_GROUP])
    fixed, broken, other = (f"{len(found[:_PER_GROUP])} of {len(found):,}" for found in groups.values())
    rule = (
        f"Chosen by rule, not by hand: in file order, the first {_PER_GROUP} that the adapter fixed ({fixed} shown), the first {_PER_GROUP} "
        f"that it broke ({broken}), and the first {_PER_GROUP} others ({other}), by {named(pair.score)}."
    )
    source = f"{pair.base.source}/scores.jsonl, {pair.adapter.source}/scores.jsonl"
    return Section(key="samples", title="Answers side by side", blocks=(Samples(rule=rule, items=items, source=source),))
