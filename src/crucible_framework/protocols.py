"""Every contract that others may implement, without bodies.

Each has a suite in `crucible_framework.testing` that an implementation joins by overriding one fixture. Sync code calls `.result()` on
a Future; asyncio code awaits `asyncio.wrap_future(future)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .records import (
    AdamConfig,
    Ballot,
    Batch,
    Capabilities,
    Checkpoint,
    Completion,
    Datum,
    Example,
    HedgeDecision,
    HedgeOutcome,
    HedgeRequest,
    Json,
    LoraConfig,
    OptimOutput,
    Piece,
    Prompt,
    SamplingParams,
    Score,
    StepOutput,
    Verdict,
    record,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Backend",
    "Clock",
    "ExampleSession",
    "GradientHook",
    "Gradients",
    "HedgePolicy",
    "Loss",
    "LossFn",
    "OnPiece",
    "Penalty",
    "PenaltyFn",
    "Report",
    "Router",
    "Sampler",
    "Schedule",
    "Scorer",
    "Slope",
    "StreamSampler",
    "Tokenizer",
    "TrainingSession",
    "Vote",
]

LossFn: TypeAlias = "Callable[[Sequence[Datum], Sequence[Tensor]], tuple[Tensor, dict[str, float]]]"
"""The `tinker` SDK's own custom-loss signature: (data, log-probs per datum) → (summed scalar loss, metrics).

Log-probs are float32 of the shape of each datum's targets; the loss sums over weighted tokens and never divides by the batch.
"""
Gradients: TypeAlias = "Mapping[str, Tensor]"
Report: TypeAlias = Callable[[str, float], None]
GradientHook: TypeAlias = "Callable[[Gradients, Report], Gradients]"
"""Runs between backward and step: (gradient per parameter name, report(name, value)) → gradients to use."""
Scorer: TypeAlias = Callable[[Example, Completion], Score]
Schedule: TypeAlias = Callable[[int, int], float]
"""(step from 0, steps in all) → factor in [0, 1] for the learning rate."""


Slope: TypeAlias = "Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]"
"""Adapter tensors by name → the gradient there, per unit of token weight, of the loss that a penalty is added to."""
PenaltyFn: TypeAlias = "Callable[[Mapping[str, Tensor], Slope], tuple[float, Mapping[str, Tensor]]]"
"""(adapter tensors by name, slope) → the penalty's value and its gradient."""


@record
class Penalty:
    """A term on the adapter's tensors, added to a loss `factor` times per unit of token weight."""

    name: str
    fn: PenaltyFn
    factor: float = 1.0


@record
class Loss:
    """A loss function with what it cannot say of itself.

    Attributes:
        fn: sums over weighted tokens; its gradient with respect to the log-probs is all that a backend needs.
        source: paper or definition.
        needs: "logprobs" of the targets, or full "logits" (then the second argument holds [T, V] logits; local backends only).
        extras: names that every datum's `extras` must hold.
        native: the Tinker service's name of the same loss, where it has one.
        penalties: terms on the adapter's own tensors; local backends only.
        prepare: adds to a rendered datum what the loss needs and text alone tells (candidates, extras); run once per datum before training.
    """

    name: str
    fn: LossFn
    source: str
    needs: Literal["logprobs", "logits"] = "logprobs"
    extras: tuple[str, ...] = ()
    native: str | None = None
    penalties: tuple[Penalty, ...] = ()
    prepare: Callable[[Datum, Tokenizer], Datum] | None = None


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back, for one base model."""

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion (end of text and end of turn)."""
        ...

    @property
    def chat_template(self) -> str | None:
        """Jinja source, or None where the model knows no chat."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """`bos_token`, `eos_token`, … for the template."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, special tokens in it recognised, none added."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        ...


class Sampler(Protocol):
    """A frozen view of a model that answers prompts; wrappers (hedge, route, ensemble) are Samplers too."""

    @property
    def model(self) -> str: ...
    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]: ...
    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        """log p of each token of `completion` after `prompt` at temperature 1, in nats."""
        ...


OnPiece: TypeAlias = Callable[[Piece], None]
"""Gets each `Piece` as it comes, those of one sample in order, one at a time, on any thread."""


@runtime_checkable
class StreamSampler(Sampler, Protocol):
    """A Sampler that also tells its answers while they are being drawn."""

    def stream(self, prompt: Prompt, params: SamplingParams, on_piece: OnPiece, n: int = 1) -> Future[tuple[Completion, ...]]:
        """What `sample` gives for the same seed, told piece by piece; the future resolves after the last piece.

        Texts, tokens and log-probs of a sample's pieces together are those of its completion. A reader that is slow holds up neither the drawing
        nor other readers. Cancelling the future ends the drawing at once; what `on_piece` raises does too, and fails the future.
        """
        ...


class TrainingSession(Protocol):
    """An adapter being trained. Requests run in the order in which they were submitted; submit-ahead is free."""

    def forward_backward(self, batch: Batch, loss: Loss) -> Future[StepOutput]:
        """Adds the gradient of the summed loss to what has accumulated since the last step.

        Raises (from the future) NumericError where the loss or a gradient is not finite; the next `optim_step` then fails too and
        clears what had accumulated, so that a step submitted ahead never uses half a gradient.
        """
        ...

    def forward(self, batch: Batch, loss: Loss) -> Future[StepOutput]:
        """The same numbers without dropout and without touching gradients."""
        ...

    def optim_step(self, adam: AdamConfig, hook: GradientHook | None = None) -> Future[OptimOutput]:
        """Steps with the accumulated (summed, not averaged) gradient, then clears it. Whoever makes the batches scales the weights."""
        ...

    def save(self, name: str, kind: Literal["state", "sampler"] = "state") -> Future[Checkpoint]: ...
    def sampler(self) -> Sampler:
        """A snapshot of the weights as they stand after the requests submitted so far; later steps do not change it."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class ExampleSession(TrainingSession, Protocol):
    """A session that also knows each example's own gradient norm, from the pass that training makes anyway."""

    def forward_backward_examples(self, batch: Batch, loss: Loss) -> Future[StepOutput]:
        """As `forward_backward`, with `StepOutput.example_norms`."""
        ...


class Backend(Protocol):
    """An ordered queue with one engine."""

    @property
    def capabilities(self) -> Capabilities: ...
    def train(self, base_model: str, lora: LoraConfig) -> TrainingSession: ...
    def resume(self, checkpoint: Checkpoint) -> TrainingSession:
        """Continues bit-exactly: weights, optimizer, generator and step."""
        ...

    def sampler(self, model: str | Checkpoint) -> Sampler: ...
    def tokenizer(self, base_model: str) -> Tokenizer: ...
    def download(self, checkpoint: Checkpoint, to: Path) -> Checkpoint:
        """Writes the checkpoint's files (PEFT format, optimizer and generator state beside it) into the folder `to`."""
        ...

    def close(self) -> None: ...


class Clock(Protocol):
    """Time that tests can replace."""

    def now(self) -> float:
        """Seconds, monotonic."""
        ...

    def call_later(self, delay_s: float, fn: Callable[[], None]) -> Callable[[], None]:
        """Calls `fn` once after `delay_s`; returns a function that cancels it."""
        ...


Vote: TypeAlias = Callable[[Sequence[Ballot]], Verdict]
"""A voting rule: the same verdict for every order of the ballots. It raises InferenceError where no ballot was cast at all."""


class HedgePolicy(Protocol):
    """When to send a request a second time. Called on many threads, so it must guard its state, and be quick."""

    def plan(self, request: HedgeRequest) -> HedgeDecision:
        """After a leg has started: when the next one may start, or never. The sampler's budget has the last word."""
        ...

    def observe(self, outcome: HedgeOutcome) -> None:
        """Learns from a request whose every leg has ended or was given up."""
        ...


class Router(Protocol):
    """Which model answers a request. `observe` follows every `choose`, in any order."""

    def choose(self, names: Sequence[str], context: NDArray[np.float64] | None = None) -> str: ...
    def observe(self, name: str, *, reward: float, cost: float, latency_s: float, ok: bool, context: NDArray[np.float64] | None = None) -> None:
        """`reward` is in [0, 1]; 0 where the model failed."""
        ...

    def state(self) -> dict[str, Json]:
        """All that was learned, as JSON values."""
        ...

    def restore(self, state: Mapping[str, Json]) -> None: ...
