"""A run that the service lost or corrupted is made again, with events; and what runs cost, how long checkpoints live, what waits and retries."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from crucible_framework import events
from crucible_framework.backends import connect
from crucible_framework.backends.fake import FakeBackend
from crucible_framework.backends.tinker import Prices, Recovery, TinkerBackend
from crucible_framework.errors import ConfigError, CrucibleError, NotFoundError, SessionClosedError
from crucible_framework.files import read_json, write_json
from crucible_framework.losses import resolve
from crucible_framework.protocols import TrainingSession
from crucible_framework.records import AdamConfig, LoraConfig, SamplingParams
from crucible_framework.server import ServeConfig, Serving, serve
from crucible_framework.testing import VirtualClock, make_batch

LORA, LOSS, ADAM = LoraConfig(rank=4, dropout=0.0, seed=3), resolve("cross_entropy"), AdamConfig(lr=0.01)
Open = Callable[..., TinkerBackend]


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    with FakeBackend() as engine, serve(engine, ServeConfig(folder=tmp_path / "serve", port=0, poll_s=2.0)) as server:
        yield server


@pytest.fixture
def opened(serving: Serving) -> Iterator[Open]:
    with ExitStack() as stack:

        def make(**options: Any) -> TinkerBackend:
            backend = connect("tinker", base_url=serving.url, **options)
            assert isinstance(backend, TinkerBackend)
            stack.callback(backend.close)
            return backend

        yield make


def lose(serving: Serving) -> None:
    """The service ends all sessions, as one does that was restarted."""
    with httpx.Client(base_url=serving.url, headers={"X-API-Key": "tml-local"}) as http:
        for session in http.get("/api/v1/sessions").json()["sessions"]:
            http.post(f"/api/v1/sessions/{session}/finish", json={"reason": {"type": "success"}}).raise_for_status()


def steps(session: TrainingSession, number: int) -> list[float]:
    found = []
    for _ in range(number):
        passed = session.forward_backward(make_batch(), LOSS)
        session.optim_step(ADAM)
        found.append(passed.result(60).loss)
    return found


@pytest.mark.parametrize("saved", [True, False])
def test_a_lost_run_goes_on_where_an_undisturbed_one_would(opened: Open, serving: Serving, *, saved: bool) -> None:
    """From the last state, or from the beginning where there is none; what was submitted ahead is answered."""
    expected = steps(opened().train("tiny", LORA), 7)
    with events.collect() as seen:
        session = opened(recovery=Recovery()).train("tiny", LORA)
        found = steps(session, 2)
        if saved:
            session.save("two").result(60)
        found += steps(session, 2)
        lose(serving)
        ahead = [(session.forward_backward(make_batch(), LOSS), session.optim_step(ADAM)) for _ in range(3)]
        found += [passed.result(60).loss for passed, _ in ahead]
        assert [stepped.result(60).step for _, stepped in ahead] == [5, 6, 7]
        assert session.sampler().sample("Hi", SamplingParams(max_tokens=2, seed=1)).result(60)
        session.close()
        with pytest.raises(SessionClosedError):
            session.save("late")
    assert found == expected
    names = [str(event["name"]) for event in seen if str(event["name"]).startswith("recovery.")]
    assert names == ["recovery.detected", "recovery.started", "recovery.completed"]
    (started,) = (event for event in seen if event["name"] == "recovery.started")
    assert started["step"] == (2 if saved else 0)


def test_the_best_checkpoint(opened: Open, serving: Serving) -> None:
    """A run that got worse goes back to the state with the lowest loss before it, and takes up only what has no answer."""
    session = opened(recovery=Recovery(start="best")).train("tiny", LORA)
    steps(session, 4)
    good = session.save("good").result(60)
    worse = session.forward_backward(make_batch(seed=9), LOSS).result(60).loss
    session.optim_step(ADAM).result(60)
    session.save("bad").result(60)
    lose(serving)
    with events.collect() as seen:
        assert session.forward_backward(make_batch(), LOSS).result(60).loss < worse
        assert session.optim_step(ADAM).result(60).step == good.step + 1
    assert [event["checkpoint"] for event in seen if event["name"] == "recovery.completed"] == [good.uri]


def test_a_corrupted_run_is_lost(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure of the service's own counts as a loss where the service calls the run corrupted, and else is a failure."""
    backend = opened(recovery=Recovery())
    session = backend.train("tiny", LORA)
    steps(session, 1)
    (card,) = (tmp_path / "serve").glob("runs/*/run.json")
    inner = FakeBackend.submit
    broken = threading.Event()

    def submit(self: FakeBackend, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if broken.is_set() and getattr(fn, "__name__", "") == "_forward_backward":
            broken.clear()
            raise RuntimeError("the engine fell over")
        return inner(self, fn, *args, **kwargs)

    monkeypatch.setattr(FakeBackend, "submit", submit)
    broken.set()
    with pytest.raises(CrucibleError, match="server"):
        session.forward_backward(make_batch(), LOSS).result(60)
    write_json(card, {**read_json(card), "corrupted": True})  # type: ignore[dict-item]
    broken.set()
    with events.collect() as seen:
        assert session.forward_backward(make_batch(), LOSS).result(60).loss > 0
    assert "recovery.completed" in {event["name"] for event in seen}
    assert "recovery.poll_error" not in {event["name"] for event in seen}
    monkeypatch.setattr(backend, "_rest", lambda: (_ for _ in ()).throw(OSError("no way there")))
    broken.set()
    with events.collect() as seen, pytest.raises(CrucibleError, match="server"):
        session.forward_backward(make_batch(), LOSS).result(60)
    assert [event["error"] for event in seen if event["name"] == "recovery.poll_error"] == ["OSError"], "an unknown state is no reason to begin again"


def test_attempts_end(opened: Open, serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits twice as long as the one before; then everything that waits fails with the first error, and the session is closed."""
    clock = VirtualClock()
    backend = opened(recovery=Recovery(attempts=3, backoff_s=5.0, max_backoff_s=8.0), clock=clock)
    session = backend.train("tiny", LORA)
    steps(session, 1)
    waits: list[float] = []
    later, tried = clock.call_later, threading.Semaphore(0)

    def call_later(delay_s: float, fn: Callable[[], None]) -> Callable[[], None]:
        waits.append(delay_s)
        end = later(delay_s, fn)
        tried.release()
        return end

    def refuse(*_: object) -> None:
        raise NotFoundError("There is no room.")

    monkeypatch.setattr(clock, "call_later", call_later)
    monkeypatch.setattr(backend, "_train", refuse)
    lose(serving)
    with events.collect() as seen:
        failed = session.forward_backward(make_batch(), LOSS)
        for wait_s in (5.0, 8.0):
            assert tried.acquire(timeout=60)
            clock.advance(wait_s)
        with pytest.raises(SessionClosedError):
            failed.result(60)
    assert waits == [5.0, 8.0]
    names = [str(event["name"]) for event in seen if str(event["name"]).startswith("recovery.")]
    assert names == ["recovery.detected", *["recovery.started", "recovery.failed"] * 3, "recovery.exhausted"]
    with pytest.raises(SessionClosedError):
        session.optim_step(ADAM)


def test_errors_of_the_caller_are_no_loss(opened: Open) -> None:
    session = opened(recovery=Recovery()).train("tiny", LORA)
    with events.collect() as seen, pytest.raises(CrucibleError, match="no gradient"):
        session.optim_step(ADAM).result(60)
    assert not any(str(event["name"]).startswith("recovery.") for event in seen)


@pytest.mark.parametrize("change", [{"attempts": 0}, {"backoff_s": -1.0}, {"backoff_s": 90.0}, {"start": "first"}])
def test_policies_are_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Recovery"):
        Recovery(**change)


def test_what_a_run_costs(opened: Open) -> None:
    """Every pass counts, the two of a loss that the service does not know too; prompts and drawn tokens have prices of their own."""
    backend = opened(prices=Prices(train=1.0, prefill=0.5, sample=2.0))
    session, batch = backend.train("tiny", LORA), make_batch()
    with events.collect() as seen:
        session.forward_backward(batch, LOSS).result(60)
        session.forward_backward(batch, resolve({"cross_entropy": 1.0, "mse": 0.5})).result(60)
        (one,) = session.sampler().sample("Hi", SamplingParams(max_tokens=3, seed=1)).result(60)
        backend.close()
    spent = backend.spending
    assert spent.trained_tokens == 3 * batch.tokens
    assert spent.sampled_tokens == len(one.tokens)
    assert spent.cost_usd == pytest.approx((3 * batch.tokens + 0.5 * spent.prompt_tokens + 2 * len(one.tokens)) / 1e6)
    (told,) = (event for event in seen if event["name"] == "tinker.spending")
    assert told["cost_usd"] == spent.cost_usd
    assert opened().spending.cost_usd is None
    with pytest.raises(ConfigError, match=r"Prices\.train"):
        Prices(train=-1, prefill=0, sample=0)


def test_checkpoints_expire_where_that_is_asked(opened: Open, serving: Serving) -> None:
    session = opened(ttl_s=3600).train("tiny", LORA)
    session.save("state").result(60)
    session.save("weights", "sampler").result(60)
    with httpx.Client(base_url=serving.url, headers={"X-API-Key": "tml-local"}) as http:
        listed = http.get("/api/v1/checkpoints").json()["checkpoints"]
    assert len(listed) == 3
    assert all(one["expires_at"] for one in listed)
    with pytest.raises(ConfigError, match="ttl_s"):
        opened(ttl_s=0)


def test_queue_states_and_retries_are_events(opened: Open) -> None:
    """What the SDK does while a request waits."""
    from tinker.lib.api_future_impl import QueueState

    session: Any = opened().train("tiny", LORA)
    states, holder = session._client._queue_state_logger, session._client.holder
    tries = 0

    async def flaky() -> int:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise httpx.ConnectError("gone")
        return tries

    with events.collect() as seen:
        for _ in range(2):
            states.on_queue_state_change(QueueState.PAUSED_CAPACITY, "full")
        states.on_queue_state_change(QueueState.ACTIVE, None)
        kinds = [(event["name"], event.get("state")) for event in seen]
        assert [name for name, _ in kinds] == ["tinker.queue_state"] * 2, "a state that lasts is told once"
        with contextlib.suppress(httpx.ConnectError):
            holder.run_coroutine_threadsafe(holder.execute_with_retries(flaky)).result(60)
    retried = [event for event in seen if event["name"] == "tinker.retry"]
    assert retried[0]["error"] == "ConnectError"
    assert retried[0]["attempt"] == 1
