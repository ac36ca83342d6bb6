"""A training run at a service that is lost or corrupted is made again from a checkpoint, and what was asked since then is asked again.

Requests are remembered since the last "state" that was saved, so a run that saves never holds more than one interval of them. This file
does not know the SDK.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

from ... import events
from ...errors import ConfigError, SessionClosedError
from ...protocols import Clock, GradientHook, Loss, Sampler, TrainingSession
from ...records import AdamConfig, Batch, Checkpoint, OptimOutput, StepOutput, record

__all__ = ["RecoveringSession", "Recovery", "Restart"]

T = TypeVar("T")


@record
class Recovery:
    """What happens when a run at the service is lost.

    Attributes:
        attempts: to make it again, at the most; then its requests fail with the first error.
        backoff_s, max_backoff_s: waited before the second attempt, doubled before each later one.
        start: "latest" goes on from the last state that was saved and asks everything since then again, which ends where an undisturbed run
            ends; "best" goes back to the state before which the loss was lowest, and asks only what has no answer yet.
    """

    attempts: int = 3
    backoff_s: float = 5.0
    max_backoff_s: float = 60.0
    start: Literal["latest", "best"] = "latest"

    def __post_init__(self) -> None:
        if not isinstance(self.attempts, int) or isinstance(self.attempts, bool) or self.attempts < 1:
            raise ConfigError(f"Recovery.attempts is {self.attempts!r}; expected a whole number of at least 1.")
        if not 0 <= self.backoff_s <= self.max_backoff_s:
            raise ConfigError(f"Recovery.backoff_s is {self.backoff_s!r}; expected seconds from 0 to max_backoff_s, which is {self.max_backoff_s!r}.")
        if self.start not in ("latest", "best"):
            raise ConfigError(f"Recovery.start is {self.start!r}; expected 'latest' or 'best'.")


Restart: TypeAlias = Callable[[Checkpoint | None], TrainingSession]
"""Makes a session anew: from a checkpoint, or without one as it was at first."""


@dataclass(slots=True, eq=False)
class _Request:
    """A request and the future that its caller holds."""

    make: Callable[[TrainingSession], Future[Any]]
    outer: Future[Any] = field(default_factory=Future)
    loss: float | None = None


@dataclass(slots=True, eq=False)
class _Saved:
    checkpoint: Checkpoint
    loss: float


class RecoveringSession:
    """A session that outlives its run at the service; see `TrainingSession`. Samplers of a run that was lost are lost with it.

    Args:
        restart: makes the run anew.
        session: the run as it is.
        recovery: when to stop trying.
        lost: whether an error means that the run is gone.
        clock: waits between attempts.
    """

    def __init__(self, restart: Restart, session: TrainingSession, recovery: Recovery, *, lost: Callable[[BaseException], bool], clock: Clock) -> None:
        self._restart, self._session, self._recovery, self._lost, self._clock = restart, session, recovery, lost, clock
        self._log: list[_Request] = []
        self._saved: list[_Saved] = []
        self._lock, self._whole = threading.RLock(), threading.Event()
        self._whole.set()
        self._run, self._closed = 0, False

    # -------------------------------------------------------------------------------------------------------- contract
    def forward_backward(self, batch: Batch, loss: Loss) -> Future[StepOutput]:
        """Adds the gradient of the summed loss; asked again where the run is lost."""
        return self._submit(lambda session: session.forward_backward(batch, loss))

    def forward(self, batch: Batch, loss: Loss) -> Future[StepOutput]:
        """The loss's numbers; asked again where the run is lost."""
        return self._submit(lambda session: session.forward(batch, loss))

    def optim_step(self, adam: AdamConfig, hook: GradientHook | None = None) -> Future[OptimOutput]:
        """One AdamW step; taken again from the checkpoint's weights where the run is lost."""
        return self._submit(lambda session: session.optim_step(adam, hook))

    def save(self, name: str, kind: Literal["state", "sampler"] = "state") -> Future[Checkpoint]:
        """Keeps the weights; a "state" is what a lost run goes on from."""
        return self._submit(lambda session: session.save(name, kind))

    def sampler(self) -> Sampler:
        """The weights as they stand after the requests so far; waits where the run is being made again."""
        self._whole.wait()
        with self._lock:
            return self._session.sampler()

    def close(self) -> None:
        """Requests submitted before still run; later ones raise SessionClosedError."""
        with self._lock:
            self._closed = True
            if self._whole.is_set():
                self._session.close()

    # --------------------------------------------------------------------------------------------------------- private
    def _submit(self, make: Callable[[TrainingSession], Future[T]]) -> Future[T]:
        request = _Request(make)
        with self._lock:
            if self._closed:
                raise SessionClosedError("The session is closed. Start one with backend.train(...) or backend.resume(...).")
            if self._whole.is_set():
                self._send(request)
            self._log.append(request)
        return request.outer

    def _send(self, request: _Request) -> None:
        run = self._run
        request.make(self._session).add_done_callback(lambda future: self._settle(request, future, run))

    def _settle(self, request: _Request, future: Future[Any], run: int) -> None:
        error = future.exception()
        if error is not None and run == self._run and self._lost(error):
            self._lose(error, run)
            return
        with self._lock:
            if run != self._run or request.outer.done():
                return  # an answer of a run that is gone, or one that was given before it was lost
            if error is None:
                self._note(request, future.result())
        if error is None:
            request.outer.set_result(future.result())
        else:
            request.outer.set_exception(error)

    def _note(self, request: _Request, result: object) -> None:
        if isinstance(result, StepOutput):
            request.loss = result.loss
        if isinstance(result, Checkpoint) and result.kind == "state" and request in self._log:
            place = self._log.index(request)
            losses = [one.loss for one in self._log[:place] if one.loss is not None]
            self._saved.append(_Saved(result, sum(losses) / len(losses) if losses else float("inf")))
            del self._log[: place + 1]

    # -------------------------------------------------------------------------------------------------------- recovery
    def _chosen(self) -> Checkpoint | None:
        if not self._saved:
            return None
        if self._recovery.start == "latest":
            return self._saved[-1].checkpoint
        return min(self._saved, key=lambda saved: saved.loss).checkpoint

    def _lose(self, error: BaseException, run: int) -> None:
        with self._lock:
            if run != self._run:
                return
            self._run += 1
            self._whole.clear()
        events.emit("recovery.detected", error=f"{type(error).__name__}: {error}", waiting=sum(not one.outer.done() for one in self._log))
        self._begin(1, error)

    def _begin(self, attempt: int, error: BaseException) -> None:
        threading.Thread(target=self._attempt, args=(attempt, error), name="crucible-recovery", daemon=True).start()

    def _attempt(self, attempt: int, error: BaseException) -> None:
        checkpoint = self._chosen()
        name = None if checkpoint is None else checkpoint.uri
        events.emit("recovery.started", attempt=attempt, checkpoint=name, step=0 if checkpoint is None else checkpoint.step, start=self._recovery.start)
        try:
            session = self._restart(checkpoint)
        except Exception as failure:
            events.emit("recovery.failed", attempt=attempt, error=f"{type(failure).__name__}: {failure}")
            ours = isinstance(failure, SessionClosedError) and failure.__cause__ is None  # the backend itself is closed
            if ours or attempt >= self._recovery.attempts:
                self._give_up(error, attempt)
                return
            delay_s = min(self._recovery.max_backoff_s, self._recovery.backoff_s * 2 ** (attempt - 1))
            self._clock.call_later(delay_s, lambda: self._begin(attempt + 1, error))
            return
        with self._lock:
            self._session = session
            if self._saved and checkpoint is not None and checkpoint != self._saved[-1].checkpoint:
                self._log = [one for one in self._log if not one.outer.done()]
            again = list(self._log)
            self._whole.set()
            for request in again:
                try:
                    self._send(request)
                except Exception as refused:  # the backend was closed meanwhile
                    if not request.outer.done():
                        request.outer.set_exception(refused)
            if self._closed:
                session.close()
        events.emit("recovery.completed", attempt=attempt, checkpoint=name, requests=len(again))

    def _give_up(self, error: BaseException, attempts: int) -> None:
        events.emit("recovery.exhausted", attempts=attempts, error=f"{type(error).__name__}: {error}")
        with self._lock:
            self._closed = True
            waiting, self._log = [one for one in self._log if not one.outer.done()], []
            self._whole.set()
        for request in waiting:
            request.outer.set_exception(error)
