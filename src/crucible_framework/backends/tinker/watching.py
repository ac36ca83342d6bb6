"""What the SDK does by itself while a request waits, as events: queue states and retries. And what it does not: hand on the caller's span.

The SDK has no public hook for these. What is used here is checked for being there, and left out where another version has it not.
"""

from __future__ import annotations

import contextvars
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from ... import events
from ...records import Json

if TYPE_CHECKING:
    import tinker

__all__ = ["watch"]


def watch(client: tinker.TrainingClient | tinker.SamplingClient, name: str) -> None:
    """From now on the client's waits and retries are the events `tinker.queue_state` and `tinker.retry`, and its requests carry `traceparent`.

    Args:
        client: of the SDK.
        name: of the run or sampler, for the events.
    """
    context = contextvars.copy_context()  # the SDK's threads know nothing of the caller's run

    def tell(event: str, **fields: Json) -> None:
        context.copy().run(lambda: events.emit(event, model=name, **fields))

    states: Any = getattr(client, "_queue_state_logger", client)
    if hasattr(states, "on_queue_state_change") and not hasattr(states, "crucible_watched"):
        told: Callable[..., None] = states.on_queue_state_change
        last = ""

        def on_queue_state_change(state: Any, reason: str | None = None) -> None:
            nonlocal last
            if (now := str(getattr(state, "value", state))) != last:
                tell("tinker.queue_state", state=now, reason=reason or "")
            last = now
            told(state, reason)

        states.on_queue_state_change, states.crucible_watched = on_queue_state_change, True
    holder: Any = getattr(client, "holder", None)
    _hand_on(holder)
    retried: Callable[..., Awaitable[Any]] | None = getattr(holder, "execute_with_retries", None)
    if retried is None or getattr(holder, "crucible_watched", False):
        return

    async def execute_with_retries(func: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
        attempt = 0

        async def once(*given: Any, **named: Any) -> Any:
            nonlocal attempt
            attempt += 1
            try:
                return await func(*given, **named)
            except Exception as error:
                status = getattr(error, "status_code", None)
                again = bool(holder._is_retryable_exception(error)) if hasattr(holder, "_is_retryable_exception") else False
                tell("tinker.retry", attempt=attempt, error=type(error).__name__, status=status, again=again)
                raise

        return await retried(once, *args, **kwargs)

    holder.execute_with_retries = execute_with_retries
    holder.crucible_watched = True


def _hand_on(holder: Any) -> None:
    """Requests of the holder's HTTP clients name the span that is open where they were asked for; the SDK keeps the caller's context."""
    clients: Callable[..., AbstractContextManager[Any]] | None = getattr(holder, "aclient", None)
    if clients is None or hasattr(holder, "crucible_traced"):
        return

    @contextmanager
    def aclient(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with clients(*args, **kwargs) as client:
            prepare = getattr(client, "_prepare_request", None)
            if prepare is not None and not hasattr(client, "crucible_traced"):

                async def prepared(request: Any) -> None:
                    if header := events.traceparent():
                        request.headers["traceparent"] = header
                    await prepare(request)

                client._prepare_request, client.crucible_traced = prepared, True
            yield client

    holder.aclient, holder.crucible_traced = aclient, True
