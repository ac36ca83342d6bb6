"""What decides how a server behaves. Knows nothing of how it does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Literal

from ..errors import ConfigError
from ..records import record

__all__ = ["ServeConfig"]


@record
class ServeConfig:
    """A server's settings.

    Attributes:
        folder: where runs, checkpoints and keys are kept.
        host, port: where it listens; port 0 takes a free one. Any host but a loopback address needs keys.
        models: base models that the server lists; others that the backend knows work too, unless `only_listed`.
        only_listed: no other base model is served.
        aliases: names that clients use → the backend's ("meta-llama/Llama-3.2-1B" → "smollm2-135m").
        tokenizers: a tokenizer folder per name, where clients shall load another than the model's own.
        registry: the folder of a model registry whose versions OpenAI clients may ask, every tenant all of them; None: none.
        body_bytes: a request's body at the most, after decompression.
        answers_bytes: collected results that are kept for clients that lost the response.
        waiting, waiting_bytes: unanswered requests per key, and their bodies together.
        samplers: samplers without a name that a session keeps; the one that was not used for longest goes first.
        durable: what survives a kill of the server beside checkpoints: "checkpoint", nothing, so that clients go on from their last one; "step",
            live sessions too, every acknowledged request and step. That writes the adapter with its optimizer to disk at each step.
        places, training_places: samples, and requests to models, at the backend at once. Keys take turns for them; few places mean short turns,
            many let samples share passes.
        max_tokens: per sample at the most, and where a client names no limit.
        poll_s: how long a request for a result that is not there is held.
        client: what the SDK shall switch on beyond its defaults, by its own names, such as sample_use_retrieve_futures, proto_compress_fwdbwd and
            pjwt_auth_enabled.
        session_s: a session whose client is silent for so long ends; its work is dropped.
        options: of the backend that `crucible serve` opens, as `connect` takes them: for "local" dtype, threads, activations_bytes and others.
    """

    folder: Path = Path("runs/serve")
    host: str = "127.0.0.1"
    port: int = 8000
    models: tuple[str, ...] = ()
    only_listed: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)
    tokenizers: Mapping[str, str] = field(default_factory=dict)
    registry: Path | None = None
    body_bytes: int = 64 * 2**20
    answers_bytes: int = 256 * 2**20
    waiting: int = 4096
    waiting_bytes: int = 2**30
    samplers: int = 32
    durable: Literal["checkpoint", "step"] = "checkpoint"
    places: int = 256
    training_places: int = 4
    max_tokens: int = 4096
    client: Mapping[str, bool] = field(default_factory=dict)
    poll_s: float = 25.0
    session_s: float = 60.0
    options: Mapping[str, bool | int | float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("body_bytes", "answers_bytes", "waiting", "waiting_bytes", "samplers", "places", "training_places", "max_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"ServeConfig.{name} is {value!r}; expected a whole number of at least 1.")
        for name in ("poll_s", "session_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"ServeConfig.{name} is {getattr(self, name)!r}; expected a positive number of seconds.")
        if self.durable not in ("checkpoint", "step"):
            raise ConfigError(f"ServeConfig.durable is {self.durable!r}; expected 'checkpoint' or 'step'.")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"ServeConfig.port is {self.port!r}; expected 0 to 65535.")

    def backend_name(self, model: str) -> str:
        """What the backend calls a model that a client names."""
        return self.aliases.get(model, model)

    @property
    def listed(self) -> tuple[str, ...]:
        """The models that clients are told of."""
        return tuple(dict.fromkeys((*self.models, *self.aliases)))
