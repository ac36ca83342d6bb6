"""The ensembles' page: who agrees with whom, how often who is right, whether confidence can be believed, and who voted what."""

from __future__ import annotations

from collections.abc import Sequence

from ..reports import words
from ..reports.markup import Markup, element, join
from ..reports.votes import Vote, VoteBallot, VoteSummary, agreement_map, member_plot, reliability_plot
from .figures import Plot, figure
from .frame import empty_state, field, page, part, table, url

__all__ = ["vote_plots", "votes_page"]

_MOST = 40
BASE = ("ensembles",)


def vote_plots(summary: VoteSummary) -> dict[str, Plot]:
    """The page's plots by key."""
    found = {"members": member_plot(summary), "agreement": agreement_map(summary), "calibration": reliability_plot(summary)}
    return {key: plot for key, plot in found.items() if plot is not None}


def _share(part_: int, whole: int) -> str:
    return f"{words.percent(part_ / whole, 0)}" if whole else words.NOTHING


def _facts(summary: VoteSummary) -> Markup:
    votes = summary.votes
    mean = sum(vote.agreement for vote in votes) / len(votes)
    silent = sum(vote.answer is None for vote in votes)
    shown = [
        ("Questions", f"{len(votes):,}", f"to {words.counted(len(summary.members), 'member')}"),
        ("Agreement", words.percent(mean, 0), "the winner's share of the vote, mean"),
        ("Unanimous", _share(summary.unanimous, len(votes)), f"{summary.unanimous:,} of {len(votes):,}"),
        ("No verdict", f"{silent:,}", "the rule abstained" if silent else "every question got one"),
    ]
    if summary.judged:
        shown.insert(1, ("Right", _share(summary.right, summary.judged), f"{summary.right:,} of {summary.judged:,} with a truth on file"))
    cells = (element("div", None, element("dt", None, a), element("dd", None, b), element("dd", {"class": "detail"}, c)) for a, b, c in shown)
    return element("dl", {"class": "facts"}, *cells)


def _members(summary: VoteSummary) -> Markup:
    rows = [
        (one.name, f"{one.asked:,}", f"{one.answered:,}", f"{one.abstained:,}", f"{one.failed:,}", _share(one.with_verdict, one.answered),
         _share(one.right, one.judged), words.number(one.confidence, 2), words.duration(one.latency_s))
        for one in summary.members
    ]  # fmt: skip
    columns = ("Member", "Asked", "Answered", "Abstained", "Failed", "With the verdict", "Right", "Confidence", "Latency")
    note = element("p", {"class": "note"}, "Confidence is the median of the mean token probability, latency the median.")
    return join(table(columns, rows, name="Members", numeric=range(1, len(columns))), note)


def _ballot(ballot: VoteBallot, vote: Vote) -> Markup:
    if ballot.error:
        return element("span", {"class": "error small", "title": ballot.error}, "failed")
    if ballot.answer is None:
        return element("span", {"class": "soft"}, "abstained")
    sign = "" if ballot.right is None else " ✓" if ballot.right else " ✗"
    dissent = vote.answer is not None and ballot.answer != vote.answer
    sure = f", confidence {words.number(ballot.confidence, 2)}" if ballot.confidence is not None else ""
    told = f"{ballot.member}: {ballot.answer}{sure}"
    css = "vote dissent" if dissent else "vote"
    return element(
        "span", {"class": css, "title": told}, words.clip(ballot.answer, 40), element("span", {"class": "mark-right" if ballot.right else "mark-wrong"}, sign)
    )


def _end(text: str, most: int = 120) -> str:
    """The end of a question: what it asks stands there, what it is about before."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"…{line[-most:].partition(' ')[2] or line[-most:]}"


def _row(vote: Vote, members: Sequence[str]) -> tuple[Markup | str, ...]:
    cast = {ballot.member: ballot for ballot in vote.ballots}
    sign = "" if vote.right is None else " ✓" if vote.right else " ✗"
    verdict = words.clip(vote.answer, 40) if vote.answer is not None else "no verdict"
    tie = element("span", {"class": "soft small"}, " drawn from a tie") if vote.tied else join()
    why = element("span", {"class": "soft small under"}, vote.reason) if vote.reason else join()
    question = element("span", {"class": "question", "title": vote.question}, _end(vote.question))
    mode = element("span", {"class": "soft small under"}, f"{words.when(vote.at_s)} · {vote.strategy}, {vote.mode}{f' · {vote.run}' if vote.run else ''}")
    first = element("b", None, verdict, element("span", {"class": "mark-right" if vote.right else "mark-wrong"}, sign))
    others = (_ballot(cast[m], vote) if m in cast else element("span", {"class": "soft"}, "not asked" if m in vote.skipped else words.NOTHING) for m in members)
    return (join(question, mode), join(first, tie, why), words.percent(vote.agreement, 0), *others)


def _votes(summary: VoteSummary, only: str, text: str) -> Markup:
    kinds = (("", "all"), ("split", "where members disagree"), ("wrong", "where the verdict is wrong"), ("none", "without a verdict"))
    asked = [vote for vote in reversed(summary.votes) if text.lower() in f"{vote.question} {vote.answer} {vote.run}".lower()]
    chosen = [
        vote for vote in asked
        if only not in ("split", "wrong", "none") or (only == "split" and vote.split) or (only == "wrong" and vote.right is False)
        or (only == "none" and vote.answer is None)
    ]  # fmt: skip
    options = (element("option", {"value": key, "selected": "" if key == only else None}, title) for key, title in kinds)
    find = "Find a question or an answer"
    form = element(
        "form", {"class": "tools", "role": "search", "action": url("ensembles")},
        field({"type": "search", "name": "q", "value": text, "placeholder": find, "aria-label": find, "id": "q"}),
        element("label", None, "Show ", element("select", {"name": "only"}, *options)), element("button", {"type": "submit"}, "Show"),
    )  # fmt: skip
    members = [one.name for one in summary.members]
    drawn = table(
        ("Question", "Verdict", "Agreement", *members), [_row(vote, members) for vote in chosen[:_MOST]], name="Who voted what", numeric=(2,),
        empty="No vote is like that.",
    )  # fmt: skip
    cut = element("p", {"class": "note"}, f"The latest {_MOST} of {len(chosen):,}.") if len(chosen) > _MOST else join()
    return join(form, drawn, cut)


def votes_page(summary: VoteSummary, only: str, text: str, stamp: str, tabs: Sequence[tuple[str, str]]) -> str:
    """The whole page."""
    top = element("div", {"class": "top"}, element("h1", None, "Ensembles"), element("p", {"class": "subtitle"}, "what several models said together"))
    if not summary.votes:
        what = (
            "Ask several models one question; each vote stands here with every ballot. Votes on the prompts of an evaluation are judged by its "
            "targets, which gives accuracy and calibration."
        )
        empty = empty_state("No ensemble has voted yet.", what, 'crucible ensemble smollm2-135m demo judge:1 --prompt "…" --read choice')
        body = part("votes", empty)
    else:
        plots = vote_plots(summary)
        drawn = element("div", {"class": "plots"}, *(figure(plot, key, BASE) for key, plot in plots.items()))
        body = join(
            part("facts", _facts(summary)), part("plots", drawn), part("members", _members(summary), title="Members"),
            part("votes", _votes(summary, only, text), title="Who voted what"),
        )  # fmt: skip
    return page(
        "Ensembles", element("div", {"data-live": url("api", "asked", "live"), "data-stamp": stamp}, top, body), tab="/ensembles", script="parts.js", tabs=tabs
    )
