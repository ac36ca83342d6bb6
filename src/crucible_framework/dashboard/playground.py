"""Base model, adapters and ensembles asked side by side. It knows samplers and nothing of HTTP.

Models are opened when they are first asked, and one question at a time is answered by each, so that a page cannot pile up work.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

from ..errors import ConfigError, CrucibleError, LockedError, UnknownNameError
from ..inference import Ensemble
from ..inference.answers import read_answer
from ..inference.pool import token_confidence
from ..inference.voting import votes as known_votes
from ..protocols import Backend, Sampler
from ..records import Ballot, Checkpoint, Completion, Json, Message, SamplingParams, Verdict, record

__all__ = ["Answer", "Playground", "params_from", "pieces", "verdict_on"]

_TIMEOUT_S = 300.0
_UNFINISHED = "\ufffd"
_CONTEXT = 4


@record
class Answer:
    """What one model said, or why it did not: exactly one of `completion` and `error` is there.

    Attributes:
        pieces: the text of each token, "" where it ends inside a character; () where no tokenizer is known.
        ballots: who voted what, where the model is an ensemble.
    """

    model: str
    completion: Completion | None
    error: str = ""
    duration_s: float = 0.0
    pieces: tuple[str, ...] = ()
    ballots: tuple[Ballot, ...] = ()

    def plain(self) -> dict[str, Json]:
        """As JSON; `logprobs` are in nats."""
        said = self.completion
        return {
            "model": self.model,
            "text": said.text if said else "",
            "logprobs": list(said.logprobs) if said else [],
            "pieces": list(self.pieces),
            "tokens": len(said.tokens) if said else 0,
            "stop_reason": said.stop_reason if said else "",
            "error": self.error,
            "duration_s": self.duration_s,
            "ballots": [plain_ballot(ballot) for ballot in self.ballots],
        }


def plain_ballot(ballot: Ballot) -> dict[str, Json]:
    """A ballot as JSON."""
    return {"member": ballot.member, "answer": ballot.answer, "confidence": ballot.confidence, "error": ballot.error}


def pieces(backend: Backend, base_model: str, tokens: Sequence[int]) -> tuple[str, ...]:
    """The text that each token adds. A token that ends inside a character adds nothing; the one that completes it adds the whole."""
    tokenizer = backend.tokenizer(base_model)
    found, start = [], 0
    for end in range(1, len(tokens) + 1):
        before = tokens[max(0, start - _CONTEXT) : start]  # some tokenizers write a token at the very start without its blank
        text = tokenizer.decode([*before, *tokens[start:end]]).removeprefix(tokenizer.decode(before))
        if text.endswith(_UNFINISHED) and end < len(tokens):
            found.append("")
            continue
        found.append(text)
        start = end
    return tuple(found)


class Playground:
    """Models by the name that the page shows.

    Args:
        backend: what runs them; the caller closes it.
        models: names and what `backend.sampler` takes, or samplers (an ensemble, a hedge) as they are.
    """

    def __init__(self, backend: Backend, models: Mapping[str, str | Checkpoint | Sampler | Ensemble]) -> None:
        self._backend = backend
        self._models = dict(models)
        self._samplers: dict[str, Sampler | Ensemble] = {}
        self._opening = threading.Lock()
        self._busy = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The models' names, in order."""
        return tuple(self._models)

    def _sampler(self, name: str) -> Sampler | Ensemble:
        with self._opening:
            if name not in self._samplers:
                chosen = self._models[name]
                self._samplers[name] = self._backend.sampler(chosen) if isinstance(chosen, (str, Checkpoint)) else chosen
            return self._samplers[name]

    def ask(self, names: Sequence[str], prompt: str, params: SamplingParams, system: str = "") -> tuple[Answer, ...]:
        """Asks the models at the same time; one that fails does not spoil the others.

        Raises:
            UnknownNameError: a name is not one of the playground's.
            LockedError: an earlier question is still being answered.
        """
        for name in names:
            if name not in self._models:
                raise UnknownNameError("model of the playground", name, self._models)
        first = (Message(role="system", content=system),) if system else ()
        asked = (*first, Message(role="user", content=prompt))
        if not self._busy.acquire(blocking=False):
            raise LockedError("The models still answer an earlier question. Wait for it to end.")
        try:
            with ThreadPoolExecutor(max(1, len(names))) as pool:
                return tuple(pool.map(lambda name: self._one(name, asked, params), names))
        finally:
            self._busy.release()

    def _one(self, name: str, prompt: tuple[Message, ...], params: SamplingParams) -> Answer:
        start = time.perf_counter()
        try:
            sampler = self._sampler(name)
            if isinstance(sampler, Ensemble):
                return self._vote(name, sampler.submit(prompt, params).result(timeout=_TIMEOUT_S))
            said = sampler.sample(prompt, params).result(timeout=_TIMEOUT_S)[0]
        except (CrucibleError, TimeoutError) as error:
            return Answer(model=name, completion=None, error=str(error) or type(error).__name__, duration_s=time.perf_counter() - start)
        chosen = self._models[name]
        base = chosen if isinstance(chosen, str) else chosen.base_model if isinstance(chosen, Checkpoint) else ""
        shown = pieces(self._backend, base, said.tokens) if base else ()
        return Answer(model=name, completion=said, duration_s=time.perf_counter() - start, pieces=shown)

    @staticmethod
    def _vote(name: str, verdict: Verdict) -> Answer:
        mine = [ballot.completion for ballot in verdict.ballots if ballot.completion is not None and ballot.text == verdict.text]
        if verdict.answer is None or not mine:
            return Answer(model=name, completion=None, error=f"No verdict: {verdict.reason}.", duration_s=verdict.duration_s, ballots=verdict.ballots)
        return Answer(model=name, completion=mine[0], duration_s=verdict.duration_s, ballots=verdict.ballots)


def verdict_on(answers: Sequence[Answer], rule: str) -> dict[str, Json]:
    """What the models say together by a voting rule, as JSON; failed ones are in it as failed.

    Raises:
        UnknownNameError: no such rule. ConfigError: fewer than two models.
    """
    if len(answers) < 2:
        raise ConfigError(f"A vote got {len(answers)} model; expected at least two. Choose more.")
    ballots = []
    for answer in answers:
        said = answer.completion
        if said is None:
            ballots.append(Ballot(member=answer.model, answer=None, error=answer.error, latency_s=answer.duration_s))
        else:
            read, sure = read_answer(said.text, "auto"), token_confidence(said)
            ballots.append(Ballot(member=answer.model, answer=read, text=said.text, confidence=sure, latency_s=answer.duration_s, completion=said))
    verdict = known_votes.get(rule)(tuple(ballots))
    scores: dict[str, Json] = dict(itertools.islice(verdict.scores.items(), 12))
    return {
        "answer": verdict.answer, "text": verdict.text, "agreement": verdict.agreement, "reason": verdict.reason, "tied": list(verdict.tied),
        "strategy": verdict.strategy, "scores": scores, "ballots": [plain_ballot(ballot) for ballot in verdict.ballots],
    }  # fmt: skip


def params_from(body: Mapping[str, Json]) -> SamplingParams:
    """The sampling settings in a request.

    Raises:
        ConfigError: one is out of range.
    """
    seed = body.get("seed")
    return SamplingParams(
        max_tokens=min(1024, cast("int", body.get("max_tokens", 64))),
        temperature=float(cast("float", body.get("temperature", 0.0))),
        top_p=float(cast("float", body.get("top_p", 1.0))),
        seed=seed if isinstance(seed, int) else None,
    )
