"""Samplers: determinism whoever shares the batch, stops, log-probs, limits, and frozen views."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from crucible_framework import events
from crucible_framework.backends.local import LocalBackend, sampling
from crucible_framework.backends.local.kv import Past, Shared
from crucible_framework.backends.local.session import LocalSession
from crucible_framework.errors import ConfigError, CrucibleError, DataError, NumericError
from crucible_framework.protocols import Sampler
from crucible_framework.records import AdamConfig, Batch, Completion, Datum, LoraConfig, Message, Prompt, SamplingParams

from .models_for_tests import CE, batch

PROMPTS: tuple[Prompt, ...] = (
    "hi",
    "a rather longer prompt",
    (Message(role="system", content="be brief"), Message(role="user", content="why?")),
    (5, 6, 7),
    (9,),
)


@pytest.fixture(scope="module", params=["tiny", "qwen"])
def session(request: pytest.FixtureRequest, shared: LocalBackend, qwen: Path) -> Iterator[LocalSession]:
    """A session whose adapter is far from zero."""
    opened = shared.train("tiny" if request.param == "tiny" else str(qwen), LoraConfig(rank=4, target_modules=("all-linear",), dropout=0.0))
    for step in range(3):
        opened.forward_backward(batch(9, 12, seed=step), CE)
        opened.optim_step(AdamConfig(lr=0.03))
    yield opened
    opened.close()


@pytest.fixture
def held(shared: LocalBackend) -> Iterator[Callable[[], None]]:
    """The engine waits until the function is called, so that requests pile up."""
    gate = threading.Event()
    shared.submit(gate.wait, 30)
    yield gate.set
    gate.set()


def naive(session: LocalSession, prompt: list[int], completion: tuple[int, ...]) -> list[float]:
    """log p of a completion through the trainer's own forward pass."""
    full = [*prompt, *completion]
    weights = np.zeros(len(full) - 1, dtype=np.float32)
    weights[len(prompt) - 1 :] = 1
    datum = Datum(id="x", tokens=np.array(full[:-1], dtype=np.int32), targets=np.array(full[1:], dtype=np.int64), weights=weights)
    return [float(x) for x in session.forward(Batch(data=(datum,)), CE).result().logprobs[0][len(prompt) - 1 :]]


def same(one: Completion, two: Completion) -> bool:
    return one.tokens == two.tokens and one.text == two.text and np.allclose(one.logprobs, two.logprobs, atol=1e-4)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_trainer_and_sampler_agree(session: LocalSession, prompt: Prompt) -> None:
    from crucible_framework.data.tokens import render_prompt

    sampler = session.sampler()
    done = sampler.sample(prompt, SamplingParams(max_tokens=12, seed=4), n=2).result()
    tokens = render_prompt(prompt, session.base.tokenizer)
    for completion in done:
        assert completion.prompt_tokens == len(tokens)
        assert completion.logprobs == pytest.approx(naive(session, tokens, completion.tokens), abs=1e-4)
        assert sampler.compute_logprobs(prompt, completion.tokens).result() == pytest.approx(completion.logprobs, abs=1e-4)


def test_greedy_is_the_argmax_of_the_whole_pass(session: LocalSession) -> None:
    from crucible_framework.backends.local.lora import Active

    done = session.sampler().sample("hello", SamplingParams(max_tokens=10, temperature=0)).result()[0]
    from crucible_framework.data.tokens import render_prompt

    ids = render_prompt("hello", session.base.tokenizer)

    def whole() -> list[int]:
        tokens = list(ids)
        with torch.no_grad(), session.base.slot.using(Active(session._adapter, session.lora.alpha / session.lora.rank)):
            for _ in done.tokens:
                tokens.append(int(session.base.logits(session.base.hidden(torch.tensor([tokens])))[0, -1].argmax()))
        return tokens[len(ids) :]

    assert session._engine.submit(whole).result() == list(done.tokens)


def test_same_seed_same_samples_whoever_shares_the_batch(session: LocalSession, held: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "ROOM", 3)  # so that buffers are made anew on the way
    sampler = session.sampler()
    params = [SamplingParams(max_tokens=4 + 3 * i, seed=i, temperature=(1.0, 0.7, 0.0)[i % 3], top_k=(0, 5)[i % 2]) for i in range(len(PROMPTS))]
    futures = [sampler.sample(prompt, p, n=1 + i % 3) for i, (prompt, p) in enumerate(zip(PROMPTS, params, strict=True))]
    held()
    together = [future.result() for future in futures]
    for prompt, p, done in zip(PROMPTS, params, together, strict=True):
        assert all(same(one, two) for one, two in zip(sampler.sample(prompt, p, n=len(done)).result(), done, strict=True))
        assert same(sampler.sample(prompt, p, n=1).result()[0], done[0])
    assert not same(sampler.sample("hi", SamplingParams(seed=1)).result()[0], sampler.sample("hi", SamplingParams(seed=2)).result()[0])


def test_samples_differ_within_a_request(session: LocalSession) -> None:
    done = session.sampler().sample("hi", SamplingParams(max_tokens=12, seed=0, temperature=1.5), n=4).result()
    assert len({completion.tokens for completion in done}) == 4


@pytest.mark.parametrize(("rows", "columns"), [(3, 32768), (32, 60)])
def test_more_samples_than_places(session: LocalSession, monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    sampler, params = session.sampler(), SamplingParams(max_tokens=6, seed=8)
    expected = sampler.sample("hello", params, n=8).result()
    monkeypatch.setattr(sampling, "ROWS", rows)
    monkeypatch.setattr(sampling, "COLUMNS", columns)
    monkeypatch.setattr(sampling, "ROOM", 2)
    futures = [sampler.sample("hello", params, n=8), sampler.sample("other text", params, n=2)]
    found = [future.result() for future in futures]
    assert all(same(one, two) for one, two in zip(found[0], expected, strict=True))
    assert len(found[1]) == 2


def test_requests_share_passes(session: LocalSession, held: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    steps, step = list[int](), sampling._Batch._step

    def counted(self: sampling._Batch) -> None:
        steps.append(len(self._rows))
        step(self)

    monkeypatch.setattr(sampling._Batch, "_step", counted)
    sampler = session.sampler()
    futures = [sampler.sample((1 + i, 2), SamplingParams(max_tokens=5, seed=i, temperature=3.0)) for i in range(6)]
    held()
    assert all(len(future.result()[0].tokens) <= 5 for future in futures)
    assert len(steps) <= 4  # not 6 × 4
    assert steps[0] >= 4


def test_a_late_request_joins_the_running_batch(session: LocalSession, held: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, widths, step = session.sampler(), list[int](), sampling._Batch._step
    late: list[Future[tuple[Completion, ...]]] = []

    def joining(self: sampling._Batch) -> None:
        if not late:
            late.append(sampler.sample((7, 8, 9), SamplingParams(max_tokens=4, seed=0, temperature=3.0)))
        widths.append(len(self._rows))
        step(self)

    monkeypatch.setattr(sampling._Batch, "_step", joining)
    first = sampler.sample("hi", SamplingParams(max_tokens=30, seed=5, temperature=3.0))
    held()
    first.result()
    assert 2 in widths
    alone = sampler.sample((7, 8, 9), SamplingParams(max_tokens=4, seed=0, temperature=3.0)).result()[0]
    assert same(late[0].result()[0], alone)


# --------------------------------------------------------------------------------------------------------------- stops
def test_stop_ids_and_strings(shared: LocalBackend) -> None:
    sampler, base = shared.sampler("tiny"), SamplingParams(max_tokens=40, seed=11)
    whole = sampler.sample("hi", base).result()[0]
    assert whole.stop_reason in ("length", "stop")
    third = whole.tokens[2]
    first = whole.tokens.index(third)
    by_id = sampler.sample("hi", SamplingParams(max_tokens=40, seed=11, stop=(third,))).result()[0]
    assert by_id.tokens == whole.tokens[: first + 1]
    assert (by_id.stop_reason, by_id.text) == ("stop", shared.tokenizer("tiny").decode(whole.tokens[:first]))
    readable = next(c for c in whole.text[1:] if c.isascii() and c.isprintable())
    by_text = sampler.sample("hi", SamplingParams(max_tokens=40, seed=11, stop=("never there", readable))).result()[0]
    assert by_text.text == whole.text[: whole.text.index(readable)]
    assert by_text.stop_reason == "stop"
    assert by_text.tokens == whole.tokens[: len(by_text.tokens)]
    assert len(by_text.logprobs) == len(by_text.tokens)


def test_a_stop_string_of_several_tokens(session: LocalSession) -> None:
    """Learn to say 'abcdef', then stop inside."""
    tokenizer = session.base.tokenizer
    prompt, answer = tokenizer.encode("q:"), tokenizer.encode("one two three")
    full = [*prompt, *answer, tokenizer.eos_ids[0]]
    weights = np.array([0.0] * (len(prompt) - 1) + [1.0] * (len(answer) + 1), dtype=np.float32)
    datum = Datum(id="x", tokens=np.array(full[:-1], dtype=np.int32), targets=np.array(full[1:], dtype=np.int64), weights=weights)
    learner = session._engine.train(session.base_model, LoraConfig(rank=16, target_modules=("all-linear",), dropout=0.0))  # type: ignore[attr-defined]
    for _ in range(80):
        learner.forward_backward(Batch(data=(datum,)), CE)
        learner.optim_step(AdamConfig(lr=0.003))
    sampler = learner.sampler()
    said = sampler.sample(tuple(prompt), SamplingParams(temperature=0, max_tokens=40)).result()[0]
    assert (said.text, said.stop_reason) == ("one two three", "stop")
    assert said.tokens[-1] == tokenizer.eos_ids[0]
    cut = sampler.sample(tuple(prompt), SamplingParams(temperature=0, max_tokens=40, stop=("three", " two"))).result()[0]
    assert (cut.text, cut.stop_reason) == ("one", "stop")
    short = sampler.sample(tuple(prompt), SamplingParams(temperature=0, max_tokens=2)).result()[0]
    assert (len(short.tokens), short.stop_reason) == (2, "length")


def test_top_k_and_top_p_limit_what_is_drawn(session: LocalSession) -> None:
    sampler, greedy = session.sampler(), SamplingParams(max_tokens=8, temperature=0)
    expected = sampler.sample("hello", greedy).result()[0].tokens
    for params in (SamplingParams(max_tokens=8, top_k=1, seed=3), SamplingParams(max_tokens=8, top_p=1e-9, seed=3)):
        assert sampler.sample("hello", params).result()[0].tokens == expected


# -------------------------------------------------------------------------------------------------------------- limits
def test_the_context_is_never_left(shared: LocalBackend, qwen: Path) -> None:
    sampler = shared.sampler(str(qwen))
    prompt = tuple(3 + i % 200 for i in range(120))
    done = sampler.sample(prompt, SamplingParams(max_tokens=100, seed=2, temperature=2.0)).result()[0]
    assert (len(done.tokens), done.stop_reason) == (8, "length")
    with pytest.raises(DataError, match=r"The prompt has 128 tokens, which leaves no room for an answer: .* reads at most 128"):
        sampler.sample(prompt + prompt[:8], SamplingParams()).result()
    with pytest.raises(DataError, match=r"The prompt has 240 tokens; .* reads at most 128. Shorten it"):
        sampler.sample(prompt * 2, SamplingParams()).result()
    with pytest.raises(DataError, match="The prompt with its completion has 129 tokens"):
        sampler.compute_logprobs(prompt, prompt[:10]).result()
    assert len(sampler.compute_logprobs(prompt, prompt[:9]).result()) == 9


@pytest.mark.parametrize("prompt", ["", (), (999,), (-1,), (3, "x")])
def test_bad_prompts_fail_alone(shared: LocalBackend, held: Callable[[], None], prompt: Prompt) -> None:
    sampler = shared.sampler("tiny")
    good, bad, after = (sampler.sample(p, SamplingParams(max_tokens=3, seed=0)) for p in ("hi", prompt, "hi"))
    scored, unscored = sampler.compute_logprobs("hi", "x"), sampler.compute_logprobs(prompt, "x")
    held()
    for future in (bad, unscored):
        with pytest.raises(DataError):
            future.result()
    assert same(good.result()[0], after.result()[0])
    assert len(scored.result()) == 1


def test_bad_counts_and_completions(shared: LocalBackend) -> None:
    sampler = shared.sampler("tiny")
    for n in (0, -1, True, 1.5):
        with pytest.raises(ConfigError, match="expected a whole number of at least 1"):
            sampler.sample("hi", SamplingParams(), n=n)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="holds token 400"):
        sampler.compute_logprobs("hi", (400,)).result()
    assert sampler.compute_logprobs("hi", "").result() == ()


def test_logits_that_are_not_finite(backend: LocalBackend) -> None:
    session = backend.train("tiny", LoraConfig(dropout=0.0))
    session._adapter = {name: torch.full_like(tensor, 1e30) for name, tensor in session._adapter.items()}
    sampler = session.sampler()
    with pytest.raises(NumericError, match="are not finite after 0 tokens"):
        sampler.sample("hi", SamplingParams(max_tokens=3), n=2).result()


def test_an_engine_failure_reaches_every_request(shared: LocalBackend, held: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise MemoryError("no more")

    sampler = shared.sampler("tiny")
    futures = [sampler.sample("hi", SamplingParams(max_tokens=3)), sampler.sample("you", SamplingParams(max_tokens=3), n=2)]
    scored = [sampler.compute_logprobs("hi", "x"), sampler.compute_logprobs("hi", "y")]
    monkeypatch.setattr(sampling, "draw", broken)
    monkeypatch.setattr(sampling, "completion_logprobs", broken)
    held()
    for drawn in futures:
        with pytest.raises(MemoryError):
            drawn.result()
    for logprobs in scored:
        with pytest.raises(MemoryError):
            logprobs.result()
    monkeypatch.undo()
    assert sampler.sample("hi", SamplingParams(max_tokens=2)).result()


def test_a_cancelled_request_is_skipped(shared: LocalBackend, held: Callable[[], None]) -> None:
    sampler = shared.sampler("tiny")
    futures = [sampler.sample("hi", SamplingParams(max_tokens=3)) for _ in range(3)]
    assert futures[0].cancel()
    assert futures[1].cancel()
    held()
    assert futures[2].result()


# ------------------------------------------------------------------------------------------------- order and frozen views
def test_a_sampler_is_a_snapshot(shared: LocalBackend) -> None:
    session = shared.train("tiny", LoraConfig(dropout=0.0))
    data, params = batch(9, 12), SamplingParams(max_tokens=10, seed=1)
    samplers: list[Sampler] = []
    for _ in range(3):
        samplers.append(session.sampler())
        for _ in range(3):
            session.forward_backward(data, CE)
            session.optim_step(AdamConfig(lr=0.05))
    futures = [sampler.compute_logprobs("hi", "abc") for sampler in samplers]
    plain = shared.sampler("tiny").compute_logprobs("hi", "abc").result()
    found = [future.result() for future in futures]
    assert found[0] == pytest.approx(plain, abs=1e-5)
    assert len({round(logprobs[0], 3) for logprobs in found}) == 3
    assert [sampler.compute_logprobs("hi", "abc").result() for sampler in samplers] == found
    assert samplers[1].sample("hi", params).result()[0].logprobs != samplers[2].sample("hi", params).result()[0].logprobs
    session.close()
    assert samplers[0].sample("hi", params).result()


def test_sampling_does_not_disturb_training(shared: LocalBackend) -> None:
    def losses(*, ask: bool) -> list[float]:
        session, other = shared.train("tiny", LoraConfig(seed=3)), shared.sampler("tiny")
        futures = []
        for step in range(4):
            futures.append(session.forward_backward(batch(8, 9, seed=step), CE))
            if ask:
                other.sample("hi", SamplingParams(max_tokens=5))
                session.sampler().sample("hi", SamplingParams(max_tokens=5), n=2)
                other.compute_logprobs("hi", "x")
            session.optim_step(AdamConfig(lr=0.01))
        return [future.result().loss for future in futures]

    assert losses(ask=True) == losses(ask=False)


def test_requests_of_different_models_take_turns(shared: LocalBackend, qwen: Path, held: Callable[[], None]) -> None:
    samplers = [shared.sampler("tiny"), shared.sampler(str(qwen))]
    params = SamplingParams(max_tokens=4, seed=0)
    finished: list[int] = []

    def note(position: int, _future: Future[tuple[Completion, ...]]) -> None:
        finished.append(position)

    futures = [(i, samplers[i].sample("hi", params)) for i in (0, 1, 0, 1, 1)]
    for position, (_, future) in enumerate(futures):
        future.add_done_callback(partial(note, position))
    held()
    answers = [(i, future.result()[0]) for i, future in futures]
    assert all(same(completion, samplers[i].sample("hi", params).result()[0]) for i, completion in answers)
    assert finished.index(0) < finished.index(1) < finished.index(4)


def test_events(shared: LocalBackend) -> None:
    sampler = shared.sampler("tiny")
    with events.collect() as seen, events.in_run("r2"):
        done = sampler.sample("hi", SamplingParams(max_tokens=3, seed=0), n=2).result()
        with pytest.raises(CrucibleError):
            sampler.sample("", SamplingParams()).result()
    found = [event for event in seen if event["name"] == "inference.sample"]
    assert [event["run"] for event in found] == ["r2", "r2"]
    assert found[0]["completion_tokens"] == sum(len(completion.tokens) for completion in done)
    assert found[0]["n"] == 2
    assert found[1]["error"] == "DataError"
    assert all(completion.duration_s > 0 for completion in done)


# ------------------------------------------------------------------------------------------------------------------ kv
def test_buffers_keep_every_past() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (3, 5, 1)
    pasts: list[Past] = [[(torch.randn(2, n, 4, generator=generator), torch.randn(2, n, 4, generator=generator)) for _ in range(2)] for n in lengths]
    shared = Shared.of(pasts, room=2)
    assert (shared.width, shared.capacity, shared.lengths[:, 0].tolist()) == (5, 7, [3, 5, 1])
    assert shared.mask is not None
    assert shared.mask.sum(1).tolist() == [n + 2 for n in lengths]
    new = [(torch.randn(3, 2, 1, 4, generator=generator), torch.randn(3, 2, 1, 4, generator=generator)) for _ in range(2)]
    for layer, (keys, values) in enumerate(new):
        seen = shared.cache.update(keys, values, layer)
        assert seen[0].shape == (3, 2, 6, 4)
    shared.advance()
    for place, past in enumerate(shared.pasts()):
        for layer, (keys, values) in enumerate(past):
            torch.testing.assert_close(keys, torch.cat([pasts[place][layer][0], new[layer][0][place]], dim=1))
            torch.testing.assert_close(values, torch.cat([pasts[place][layer][1], new[layer][1][place]], dim=1))
    assert Shared.of(pasts[:1], room=1).mask is None
