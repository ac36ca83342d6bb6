"""Base model and adapters asked side by side. It knows samplers and nothing of HTTP.

Models are opened when they are first asked, and one question at a time is answered by each, so that a page cannot pile up work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

from ..errors import CrucibleError, LockedError, UnknownNameError
from ..protocols import Backend, Sampler
from ..records import Checkpoint, Completion, Json, Message, SamplingParams, record

__all__ = ["Answer", "Playground"]

_TIMEOUT_S = 300.0


@record
class Answer:
    """What one model said, or why it did not: exactly one of `completion` and `error` is there."""

    model: str
    completion: Completion | None
    error: str = ""
    duration_s: float = 0.0

    def plain(self) -> dict[str, Json]:
        """As JSON; `token_logprobs` are in nats."""
        said = self.completion
        return {
            "model": self.model,
            "text": said.text if said else "",
            "logprobs": list(said.logprobs) if said else [],
            "tokens": len(said.tokens) if said else 0,
            "stop_reason": said.stop_reason if said else "",
            "error": self.error,
            "duration_s": self.duration_s,
        }


class Playground:
    """Models by the name that the page shows.

    Args:
        backend: what runs them; the caller closes it.
        models: names and what `backend.sampler` takes, or samplers (an ensemble, a hedge) as they are.
    """

    def __init__(self, backend: Backend, models: Mapping[str, str | Checkpoint | Sampler]) -> None:
        self._backend = backend
        self._models = dict(models)
        self._samplers: dict[str, Sampler] = {}
        self._opening = threading.Lock()
        self._busy = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The models' names, in order."""
        return tuple(self._models)

    def _sampler(self, name: str) -> Sampler:
        if name not in self._models:
            raise UnknownNameError("model of the playground", name, self._models)
        with self._opening:
            if name not in self._samplers:
                chosen = self._models[name]
                opened = self._backend.sampler(chosen) if isinstance(chosen, (str, Checkpoint)) else chosen
                self._samplers[name] = opened
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
            said = self._sampler(name).sample(prompt, params).result(timeout=_TIMEOUT_S)[0]
        except (CrucibleError, TimeoutError) as error:
            return Answer(model=name, completion=None, error=str(error) or type(error).__name__, duration_s=time.perf_counter() - start)
        return Answer(model=name, completion=said, duration_s=time.perf_counter() - start)


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
