"""An ensemble's cell: each member's answer to an example, as it stands on file, is a ballot, and a rule decides.

No model is asked again. So a difference between an ensemble and a member is the vote's alone, the same answers always give the same bytes,
and an ensemble costs nothing. This file does not know how the members answered, nor when the cell is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from statistics import fmean

import orjson

from .. import files
from ..errors import CapabilityError, CorruptError
from ..evaluation import labels_of, load_evaluation, stated_label, target_label
from ..inference import read_answer, votes
from ..records import Ballot, Completion, Dataset, Example, Json, Prompt, SamplingParams, Verdict
from .study import work_folder

__all__ = ["Recorded", "note_verdicts", "verdicts"]

VOTES = "votes.jsonl"


def _answer(example: Example, text: str) -> str | None:
    """What a text votes for: the label that it states where the right answer is a label, else its normal form."""
    return read_answer(text) if target_label(example) is None else stated_label(text, labels_of(example))[0]


def verdicts(folder: Path, members: Mapping[str, str], vote: str, test: Dataset) -> dict[str, Verdict]:
    """Example → what the members' votes come to.

    Args:
        folder: of the study.
        members: arm → the id of its cell.
        vote: a rule's name.

    Raises:
        UnknownNameError, ConfigError: there is no such rule.
        CorruptError, NotFoundError: a member's answers are not those to these examples.
    """
    rule, said = votes.get(vote), dict[str, dict[str, str]]()
    for arm, identity in members.items():
        said[arm] = {item.id: item.completion for item in load_evaluation(work_folder(folder, "cell", identity) / "eval").items}
        if said[arm].keys() != {example.id for example in test}:
            raise CorruptError(f"The cell {identity!r} has answered other examples than those of {test.card.name!r}. Delete it and resume to run it again.")
    found: dict[str, Verdict] = {}
    for example in test:
        texts = {arm: answers[example.id] for arm, answers in said.items()}
        found[example.id] = rule(tuple(Ballot(member=arm, answer=_answer(example, text), text=text) for arm, text in texts.items()))
    return found


def note_verdicts(where: Path, found: Mapping[str, Verdict]) -> dict[str, Json]:
    """Writes votes.jsonl, a row for each example, and gives its sums."""
    rows = (
        {"id": one, "answer": v.answer, "agreement": v.agreement, "tied": list(v.tied), "answers": {b.member: b.answer for b in v.ballots}, "reason": v.reason}
        for one, v in found.items()
    )
    where.mkdir(parents=True, exist_ok=True)
    files.write_atomic(where / VOTES, b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return {
        "agreement": fmean(verdict.agreement for verdict in found.values()),
        "tied": sum(bool(verdict.tied) for verdict in found.values()),
        "abstained": sum(verdict.answer is None for verdict in found.values()),
    }


class Recorded:
    """The verdicts as a sampler, so that an ensemble is scored like any model. Where the rule gave no answer, the text is empty.

    Examples with the same prompt have the verdict of the first.
    """

    def __init__(self, model: str, test: Dataset, found: Mapping[str, Verdict]) -> None:
        self.model = model
        self._texts: dict[Prompt, str] = {}
        for example in test:
            self._texts.setdefault(example.prompt, found[example.id].text)

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        """The text of the verdict; it has no tokens of its own."""
        del params
        answer: Future[tuple[Completion, ...]] = Future()
        answer.set_result((Completion(text=self._texts[prompt], tokens=(), logprobs=(), stop_reason="stop", prompt_tokens=0),) * n)
        return answer

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        """A vote has no token probabilities: CapabilityError."""
        del prompt, completion
        raise CapabilityError(f"{self.model!r} votes on answers and has no log-probs of tokens; ask a member.")
