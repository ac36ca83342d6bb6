"""Samplers: determinism whoever shares the batch, stops, log-probs, limits, and frozen views."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from crucible_framework.backends.local import LocalBackend, compiled, drawing, sampling, steps, torch_steps
from crucible_framework.backends.local.kv import Pages
from crucible_framework.backends.local.session import LocalSession
from crucible_framework.errors import ConfigError, DataError, NumericError
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


@pytest.fixture(scope="module", params=[("tiny", "fast"), ("qwen", "fast"), ("qwen", "torch"), ("qwen", "plain")], ids="-".join)
def session(request: pytest.FixtureRequest, shared: LocalBackend, qwen: Path) -> Iterator[LocalSession]:
    """A session whose adapter is far from zero, on each way of computing a step."""
    model, engine = request.param
    backend = shared if engine == "fast" else LocalBackend(threads=1, engine=engine)
    opened = backend.train("tiny" if model == "tiny" else str(qwen), LoraConfig(rank=4, target_modules=("all-linear",), dropout=0.0))
    for step in range(3):
        opened.forward_backward(batch(9, 12, seed=step), CE)
        opened.optim_step(AdamConfig(lr=0.03))
    yield opened
    opened.close()
    if engine != "fast":
        backend.close()


@pytest.fixture
def held(request: pytest.FixtureRequest, shared: LocalBackend) -> Iterator[Callable[[], None]]:
    """The engine waits until the function is called, so that requests pile up."""
    gate = threading.Event()
    backend = request.getfixturevalue("session")._engine if "session" in request.fixturenames else shared
    backend.submit(gate.wait, 30)
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


def test_same_seed_same_samples_whoever_shares_the_batch(session: LocalSession, held: Callable[[], None]) -> None:
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


@pytest.mark.parametrize(("rows", "tokens"), [(3, 32768), (32, 64), (32, 16)])
def test_more_samples_than_there_is_room_for(session: LocalSession, monkeypatch: pytest.MonkeyPatch, rows: int, tokens: int) -> None:
    """With few places they wait; with little memory the youngest give theirs back and are read again."""
    sampler, params = session.sampler(), SamplingParams(max_tokens=24, seed=8, temperature=3.0)
    expected = sampler.sample("hello", params, n=8).result(), sampler.sample("other text", params, n=2).result()
    monkeypatch.setattr(drawing, "ROWS", rows)
    monkeypatch.setattr(drawing, "TOKENS", tokens)
    fresh(session)
    let_go = hold(session)
    futures = [sampler.sample("hello", params, n=8), sampler.sample("other text", params, n=2)]
    let_go()
    for future, before in zip(futures, expected, strict=True):
        assert all(same(one, two) for one, two in zip(future.result(), before, strict=True))
    session._engine.submit(int).result()  # the step that answered has ended
    (batch,) = batches(session)
    assert batch._pages.used == 0
    assert batch._pages.tensor.shape[1] <= max(-(-tokens // 16), 8)  # one sample alone may go beyond
    fresh(session)


def hold(session: LocalSession) -> Callable[[], None]:
    """The engine waits until the result is called, so that requests pile up."""
    gate = threading.Event()
    session._engine.submit(gate.wait, 30)
    return gate.set


def fresh(session: LocalSession) -> None:
    """The session's backend forgets its batches, whose sizes were read when they were made."""
    service(session)._lanes.clear()


def service(session: LocalSession) -> sampling.Sampling:
    return session._engine._queue._stepwise  # type: ignore[attr-defined, no-any-return]


def batches(session: LocalSession) -> list[drawing.Batch]:
    return [lane for (base, _), lane in service(session)._lanes.items() if isinstance(lane, drawing.Batch) and base == id(session.base)]


def counted(monkeypatch: pytest.MonkeyPatch, before: Callable[[], None] = lambda: None) -> list[list[int]]:
    """Per step, how many tokens of each sample are computed."""
    found = list[list[int]]()
    for kind in (compiled.NativeSteps, torch_steps.TorchSteps):

        def logits(self: steps.Steps, chunks: Sequence[steps.Chunk], pages: Pages, *, theirs: Callable[..., torch.Tensor] = kind.logits) -> torch.Tensor:
            before()
            found.append([len(chunk.tokens) for chunk in chunks])
            return theirs(self, chunks, pages)

        monkeypatch.setattr(kind, "logits", logits)
    return found


def test_requests_share_steps(session: LocalSession, held: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    seen, sampler = counted(monkeypatch), session.sampler()
    futures = [sampler.sample((1 + i, 2), SamplingParams(max_tokens=5, seed=i, temperature=3.0)) for i in range(6)]
    held()
    assert all(len(future.result()[0].tokens) <= 5 for future in futures)
    assert len(seen) <= 5  # not 6 × 5
    assert seen[0] == [2] * 6


def test_a_late_request_joins_the_running_batch(session: LocalSession, held: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, late = session.sampler(), list[Future[tuple[Completion, ...]]]()

    def joining() -> None:
        if not late:
            late.append(sampler.sample((7, 8, 9), SamplingParams(max_tokens=4, seed=0, temperature=3.0)))

    seen = counted(monkeypatch, joining)
    first = sampler.sample("hi", SamplingParams(max_tokens=30, seed=5, temperature=3.0))
    held()
    first.result()
    assert [1, 3] in seen
    assert [1, 1] in seen
    monkeypatch.undo()
    alone = sampler.sample((7, 8, 9), SamplingParams(max_tokens=4, seed=0, temperature=3.0)).result()[0]
    assert same(late[0].result()[0], alone)


def test_long_prompts_are_read_in_pieces_while_others_go_on(session: LocalSession, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=20, seed=5, temperature=3.0)
    prompts = [tuple(3 + (i * k) % 200 for i in range(length)) for k, length in ((3, 4), (5, 100), (7, 90))]
    sampler = session.sampler()
    alone = [sampler.sample(prompt, params).result()[0] for prompt in prompts]
    fresh(session)
    for kind in (compiled.NativeSteps, torch_steps.TorchSteps):
        monkeypatch.setattr(kind, "chunk", 24)
    seen = counted(monkeypatch)
    let_go = hold(session)
    futures = [sampler.sample(prompt, params) for prompt in prompts]
    let_go()
    together = [future.result()[0] for future in futures]
    assert all(same(one, other) for one, other in zip(together, alone, strict=True))
    assert max(sum(sizes) for sizes in seen) <= 24 + 2
    assert sum(1 for sizes in seen if 1 in sizes and max(sizes) > 1) >= 5


def test_what_prompts_have_in_common_is_computed_once(session: LocalSession, monkeypatch: pytest.MonkeyPatch) -> None:
    start, params = tuple(3 + i % 200 for i in range(80)), SamplingParams(max_tokens=6, seed=5, temperature=3.0)
    prompts = [(*start, *(9 + k + i for i in range(4 + k))) for k in range(4)]
    samplers = [session.sampler(), session.sampler()]
    alone = []
    for prompt in prompts:
        fresh(session)
        alone.append(samplers[0].sample(prompt, params).result()[0])
    fresh(session)
    seen = counted(monkeypatch)
    let_go = hold(session)
    futures = [samplers[0].sample(prompt, params) for prompt in prompts]
    let_go()
    assert all(same(future.result()[0], other) for future, other in zip(futures, alone, strict=True))
    if batches(session)[0]._steps.joins:  # the step itself computes a common start once
        assert seen[0] == [84, 85, 86, 87]
    else:
        assert sum(size for sizes in seen for size in sizes if size > 1) == 84 + 5 + 6 + 7
    seen.clear()
    samplers[0].sample(prompts[1], params).result()
    assert sum(size for sizes in seen for size in sizes if size > 1) == 5  # 80 of its 85 tokens are in pages that were kept
    seen.clear()
    samplers[1].sample(prompts[1], params).result()
    assert sum(size for sizes in seen for size in sizes if size > 1) == 85  # another snapshot's pages are not its own


def test_adapters_mix_in_one_batch(session: LocalSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample has the numbers of its own weights."""
    backend = session._engine
    samplers: list[Sampler] = [session.sampler(), backend.sampler(session.base_model)]  # type: ignore[attr-defined]
    for seed, targets in ((1, ("q_proj",)), (2, ("down_proj", "up_proj")), (3, ("lm_head", "v_proj", "o_proj"))):
        opened = backend.train(session.base_model, LoraConfig(rank=2 * seed, target_modules=targets, seed=seed, dropout=0.0))  # type: ignore[attr-defined]
        opened.forward_backward(batch(9, 12, seed=seed), CE)
        opened.optim_step(AdamConfig(lr=0.2))
        samplers.append(opened.sampler())
    params = SamplingParams(max_tokens=8, seed=6, temperature=1.5)
    alone = [sampler.sample("hello there", params).result()[0] for sampler in samplers]
    assert len({completion.logprobs for completion in alone}) == len(samplers)
    seen = counted(monkeypatch)
    let_go = hold(session)
    futures = [sampler.sample("hello there", params) for sampler in [*samplers, samplers[0]]]
    let_go()
    together = [future.result()[0] for future in futures]
    assert all(same(one, other) for one, other in zip(together, [*alone, alone[0]], strict=True))
    assert max(map(len, seen)) == len(samplers) + 1


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
    for kind in (compiled.NativeSteps, torch_steps.TorchSteps):
        monkeypatch.setattr(kind, "draw", broken)
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


# --------------------------------------------------------------------------------------------------------------- turns
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
