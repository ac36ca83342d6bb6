"""A panel of critics: each looks at one side of an answer, is an ensemble of several wordings, and its votes are scores from 1 to 5."""

import os
import statistics
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import crucible_framework as cf
from crucible_framework.inference import ChoiceSampler, Ensemble
from crucible_framework.protocols import Sampler
from crucible_framework.records import Ballot, Completion, Prompt, Verdict

CRITICS = {
    "logic": ("Does each step follow from the one before?", "Is the reasoning free of contradictions and circles?"),
    "grounding": ("Is every statement borne out by the passage?", "Is nothing in the answer invented?"),
    "novelty": ("Does the answer say more than the passage?", "Is there an idea of its own in the answer?"),
    "causal": ("Are causes told apart from things that only go together?", "Would the effect vanish without the named cause?"),
    "bias": ("Is the answer fair to both sides?", "Is the wording neutral?"),
}


@dataclass
class Asked:
    """A Sampler made of a Sampler: puts a critic's question after what it is to judge."""

    sampler: Sampler
    question: str

    @property
    def model(self) -> str:
        return self.question

    def sample(self, prompt: Prompt, params: cf.SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        return self.sampler.sample(f"{prompt}\n\n{self.question}\nScore from 1 (not at all) to 5 (wholly):", params, n)

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        return self.sampler.compute_logprobs(prompt, completion)


def median(ballots: Sequence[Ballot]) -> Verdict:
    """A vote of our own, for answers that are numbers; agreement says how close the scores are."""
    scores = [float(ballot.answer) for ballot in ballots if ballot.answer is not None]
    middle = statistics.median(scores)
    agreement = 1 - (max(scores) - min(scores)) / 4
    return Verdict(answer=f"{middle:g}", text=f"{middle:g}", agreement=agreement, strategy="median", ballots=tuple(ballots))


with cf.connect("local") as backend:
    scale = ChoiceSampler(backend.sampler(os.environ.get("MODEL", "tiny")), ("1", "2", "3", "4", "5"))  # always a score, never prose
    panel = {name: Ensemble({q: Asked(scale, q) for q in questions}, vote=median, read="number") for name, questions in CRITICS.items()}
    judged = "Passage: Coffee at night delays sleep by forty minutes.\nAnswer: Coffee delays sleep."
    asked = {name: critic.submit(judged) for name, critic in panel.items()}  # all at once, so that the engine can batch them
    for name, future in asked.items():
        verdict = future.result()
        worst = "  ← look here" if float(verdict.text) <= 2 else ""
        print(f"{name:10} {verdict.text:>4} of 5, agreement {verdict.agreement:.2f}{worst}")
