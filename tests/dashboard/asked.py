"""Events of votes, hedges and routes as the samplers themselves emit them, on a virtual clock; the same every time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from crucible_framework import sinks
from crucible_framework.inference import Ensemble, Fixed, HedgedSampler, RoutedSampler
from crucible_framework.records import Completion, Prompt, SamplingParams
from crucible_framework.testing import VirtualClock

PARAMS = SamplingParams(max_tokens=4)


class Timed:
    """Answers with the next text after the next time; both start again at their end."""

    def __init__(self, model: str, clock: VirtualClock, texts: Sequence[str], times: Sequence[float]) -> None:
        self.model, self.clock, self.texts, self.times, self.calls = model, clock, texts, times, 0

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        del prompt, params, n
        future: Future[tuple[Completion, ...]] = Future()
        text, delay_s = self.texts[self.calls % len(self.texts)], self.times[self.calls % len(self.times)]
        self.calls += 1

        def give() -> None:
            if future.set_running_or_notify_cancel():
                future.set_result((Completion(text=text, tokens=(1, 2), logprobs=(-0.1, -0.3), stop_reason="stop", prompt_tokens=3),))

        self.clock.call_later(delay_s, give)
        return future

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        raise NotImplementedError


def ask_everything(file: Path, questions: Sequence[str] = ("Q one?", "Q two?", "Q three?", "Q four?"), text: str = "yes") -> None:
    """Votes of three members, 40 hedged requests of which every tenth is slow, 30 routed ones; their events go to `file`."""
    clock = VirtualClock()
    end = sinks.to_jsonl(file)
    try:
        members = {
            "alpha": Timed("alpha", clock, [text], [1.0]),
            "beta": Timed("beta", clock, [text, "no"], [2.0]),
            "gamma": Timed("gamma", clock, ["no"], [0.5]),
        }
        ensemble = Ensemble(members, clock=clock)
        for question in questions:
            verdict = ensemble.submit(question, PARAMS)
            clock.advance(3.0)
            assert verdict.done()
        slow = Timed("replica", clock, ["x"], [0.2] * 9 + [5.0, 0.3])
        hedged = HedgedSampler(slow, Fixed(1.0), budget=1.0, clock=clock)
        for _ in range(40):
            answer = hedged.sample("hello", PARAMS)
            clock.advance(6.0)
            assert answer.done()
        routed = RoutedSampler(
            {"small": Timed("small", clock, ["x"], [0.1]), "large": Timed("large", clock, ["x"], [0.4])}, "round_robin", clock=clock
        )  # fmt: skip
        for _ in range(30):
            answer = routed.sample("hello", PARAMS)
            clock.advance(1.0)
            assert answer.done()
    finally:
        end()
