"""Making one answer of several: best of n, refine, merge. Each is a function on a Sampler; a judge says what it was worth."""

import os
from collections.abc import Callable

import crucible_framework as cf
from crucible_framework.protocols import Sampler
from crucible_framework.records import Completion

PARAMS = cf.SamplingParams(max_tokens=24, temperature=0.8, seed=0)
QUESTION = "Why is the sky blue? Answer in one sentence."
Judge = Callable[[str, Completion], float]


def likelihood(sampler: Sampler) -> Judge:
    """A judge: the mean log-prob of an answer per token, in nats. Better ones are trained, or look the answer up."""

    def score(question: str, answer: Completion) -> float:
        found = sampler.compute_logprobs(question, answer.tokens).result()
        return sum(found) / max(1, len(found))

    return score


def best_of(sampler: Sampler, question: str, judge: Judge, n: int = 4) -> Completion:
    """n answers at once; the judge's favourite."""
    return max(cf.generate(sampler, question, PARAMS, n), key=lambda answer: judge(question, answer))


def refine(sampler: Sampler, question: str, judge: Judge, rounds: int = 2) -> Completion:
    """Answer, object, answer again; a round that the judge does not like better is thrown away."""
    best = cf.generate(sampler, question, PARAMS)[0]
    for _ in range(rounds):
        objection = cf.generate(sampler, f"{question}\nAnswer: {best.text}\nWhat is wrong with it?", PARAMS)[0]
        again = cf.generate(sampler, f"{question}\nDraft: {best.text}\nObjection: {objection.text}\nBetter answer:", PARAMS)[0]
        best = max(best, again, key=lambda answer: judge(question, answer))
    return best


def merge(sampler: Sampler, question: str, n: int = 3) -> Completion:
    """n answers at once, and one that is told them all."""
    drafts = "\n".join(f"{i}. {draft.text}" for i, draft in enumerate(cf.generate(sampler, question, PARAMS, n), 1))
    return cf.generate(sampler, f"{question}\nDrafts:\n{drafts}\nOne answer that keeps what is right in them:", PARAMS)[0]


with cf.connect("local") as backend:
    model = backend.sampler(os.environ.get("MODEL", "tiny"))
    judge = likelihood(model)
    first = cf.generate(model, QUESTION, PARAMS)[0]
    made = {"first answer": first, "best of 4": best_of(model, QUESTION, judge), "refined": refine(model, QUESTION, judge), "merged": merge(model, QUESTION)}
    for name, answer in made.items():
        print(f"{name:13} {judge(QUESTION, answer):7.3f} nats per token")
    assert judge(QUESTION, made["best of 4"]) >= judge(QUESTION, first), "the first of four draws with one seed is the first answer"
