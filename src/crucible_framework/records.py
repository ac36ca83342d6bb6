"""Every noun that crosses a folder, as frozen records.

Records hold data and check their own ranges; they know no files, no environment, no tensors and no backend. Arrays are numpy.
Units stand in the names: `_s` seconds, `_bytes` bytes; losses are nats per weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar, cast, dataclass_transform, get_args, overload

import numpy as np
from numpy.typing import NDArray

from .display import table_html
from .errors import ConfigError, DataError, UnknownNameError

__all__ = [
    "AdamConfig",
    "Ballot",
    "Batch",
    "Capabilities",
    "Checkpoint",
    "Completion",
    "Dataset",
    "DatasetCard",
    "Datum",
    "Estimate",
    "Evaluation",
    "Example",
    "FileCard",
    "Finding",
    "HedgeDecision",
    "HedgeLeg",
    "HedgeOutcome",
    "HedgeRequest",
    "Json",
    "LoraConfig",
    "Message",
    "ModelVersion",
    "OptimOutput",
    "Piece",
    "Prompt",
    "Role",
    "SamplingParams",
    "Score",
    "ScoredExample",
    "StepOutput",
    "TrainConfig",
    "TrainingResult",
    "Verdict",
    "answer_id",
    "less_is_better",
    "record",
    "split_answer_id",
]

T = TypeVar("T")
Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]
Split = Literal["train", "dev", "test"]


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def record(cls: type[T]) -> type[T]:
    """Makes a frozen, slotted, keyword-only dataclass."""
    return dataclass(frozen=True, slots=True, kw_only=True)(cls)


def _check(owner: object, name: str, ok: bool, expected: str, fix: str = "") -> None:
    if not ok:
        value = getattr(owner, name)
        raise ConfigError(f"{type(owner).__name__}.{name} is {value!r}; expected {expected}.{' ' + fix if fix else ''}")


def _finite(value: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


# ---------------------------------------------------------------------------------------------------------------- text
@record
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


Prompt = str | tuple[Message, ...] | tuple[int, ...]
"""A string is one user turn where the model has a chat template, else raw text; token ids are taken as they are."""


@record
class Example:
    """One row of a data set: what is asked, what is right, and where it comes from.

    `meta["document"]`, where present, is the id of the source document: splits are disjoint by it and intervals are clustered by it.
    """

    id: str
    prompt: str | tuple[Message, ...]
    target: str
    meta: Mapping[str, Json] = field(default_factory=dict)


@record
class FileCard:
    """A file that a data set was read from."""

    name: str
    sha256: str
    size_bytes: int


@record
class DatasetCard:
    """Where a data set comes from and what may be done with it. `sha256` is over the examples as loaded."""

    name: str
    split: str
    task: str
    rows: int
    sha256: str
    licence: str
    source: str
    citation: str = ""
    labels: tuple[str, ...] = ()
    files: tuple[FileCard, ...] = ()


@record
class Dataset:
    """An immutable sequence of examples with its card."""

    examples: tuple[Example, ...]
    card: DatasetCard

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        return self.examples[index]


# -------------------------------------------------------------------------------------------------------------- tokens
@record
class Datum:
    """What a loss sees of one example; all arrays run over the same T positions.

    Attributes:
        id: the example's id.
        tokens: int32[T], the model's input.
        targets: int64[T], the token to predict after each input token; or int64[T, K] candidates per position.
        weights: float32, of the shape of `targets`: how much each target counts; 0 where the prompt is.
        extras: further arrays that a loss needs (reference log-probs, advantages), by name.
    """

    id: str
    tokens: NDArray[np.int32]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]
    extras: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or not len(self.tokens):
            raise DataError(f"Datum {self.id!r} has tokens of shape {self.tokens.shape}; expected one dimension with at least one token.")
        if self.targets.shape[:1] != self.tokens.shape or self.targets.ndim > 2:
            raise DataError(f"Datum {self.id!r} has targets of shape {self.targets.shape} for {len(self.tokens)} tokens; expected [T] or [T, K].")
        if self.weights.shape != self.targets.shape:
            raise DataError(f"Datum {self.id!r} has weights of shape {self.weights.shape}; expected that of the targets, {self.targets.shape}.")

    def __len__(self) -> int:
        return len(self.tokens)


@record
class Batch:
    """Data that go through the model together; `index` counts batches over all epochs from 0."""

    data: tuple[Datum, ...]
    epoch: int = 0
    index: int = 0

    @property
    def tokens(self) -> int:
        """How many input tokens the batch holds."""
        return sum(len(datum) for datum in self.data)

    @property
    def ids(self) -> tuple[str, ...]:
        """The examples' ids, in order."""
        return tuple(datum.id for datum in self.data)


# ------------------------------------------------------------------------------------------------------- configuration
@record
class LoraConfig:
    """Low-rank adapters on frozen linear layers: W x + (alpha / rank) B A x.

    `target_modules` are the last parts of layer names ("q_proj"), or ("all-linear",) for every linear layer but the head.
    Source: Hu et al. 2021, arXiv 2106.09685.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self, "rank", _whole(self.rank, 1), "a whole number of at least 1", "Typical: 8 to 64.")
        _check(self, "alpha", _finite(self.alpha) and self.alpha > 0, "a positive number", "Typical: 2 × rank.")
        _check(self, "dropout", _finite(self.dropout) and 0 <= self.dropout < 1, "a number in [0, 1)")
        _check(
            self,
            "target_modules",
            isinstance(self.target_modules, tuple) and bool(self.target_modules) and all(self.target_modules),
            "a tuple of at least one layer name",
            "For all linear layers: ('all-linear',).",
        )
        _check(self, "seed", _whole(self.seed, 0), "a whole number of at least 0")


@record
class AdamConfig:
    """One AdamW step (decoupled weight decay), equal to `torch.optim.AdamW`.

    `max_grad_norm` clips the global L2 norm of the gradient; None leaves it. Source: Loshchilov & Hutter 2019, arXiv 1711.05101.
    """

    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        _check(self, "lr", _finite(self.lr) and self.lr >= 0, "a number of at least 0", "Typical for LoRA: 1e-4 to 1e-3.")
        for name in ("beta1", "beta2"):
            _check(self, name, _finite(getattr(self, name)) and 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        _check(self, "eps", _finite(self.eps) and self.eps > 0, "a positive number")
        _check(self, "weight_decay", _finite(self.weight_decay) and self.weight_decay >= 0, "a number of at least 0")
        _check(self, "max_grad_norm", self.max_grad_norm is None or (_finite(self.max_grad_norm) and self.max_grad_norm > 0), "a positive number or none")


@record
class TrainConfig:
    """Everything that decides what a training run computes; its fingerprint names the run's result.

    Attributes:
        base_model: a name, a Hugging Face id or a folder.
        loss: a registered loss, or weights over several ({"cross_entropy": 0.8, "kl": 0.2}).
        batch_size: examples per optimizer step and per accumulation slice.
        accumulate: slices whose gradients are summed before each step.
        max_steps: optimizer steps; with `epochs`, whichever ends first.
        schedule: the learning rate after warm-up: constant, linear or cosine, down to `final_lr_ratio` × lr.
        max_length: tokens per example; the prompt's start is cut first, the completion never without being counted.
        batching: "shuffle"; "length" groups examples of similar length; "prefix" those that begin alike, whose common start the local
            engine computes once; "pack" fills slices up to batch_size × max_length tokens.
        checkpoint_interval, eval_interval: in steps; 0 switches them off.
        patience: evaluations without improvement of the dev loss before stopping; 0 never stops early.
        keep: checkpoints kept besides the best and the pinned.
        hooks: names of gradient hooks that run in each step, in order, before the trainer's own.
        example_norms: record each step's gradient norms of single examples, where the backend tells them.
    """

    base_model: str = "smollm2-135m"
    lora: LoraConfig = LoraConfig()
    adam: AdamConfig = AdamConfig()
    loss: str | Mapping[str, float] = "cross_entropy"
    batch_size: int = 4
    accumulate: int = 1
    max_steps: int = 1000
    epochs: int | None = None
    schedule: str = "linear"
    warmup_steps: int = 0
    final_lr_ratio: float = 0.0
    max_length: int = 1024
    batching: Literal["shuffle", "length", "prefix", "pack"] = "shuffle"
    checkpoint_interval: int = 100
    eval_interval: int = 0
    patience: int = 0
    keep: int = 3
    seed: int = 0
    hooks: tuple[str, ...] = ()
    example_norms: bool = False

    def __post_init__(self) -> None:
        _check(self, "hooks", isinstance(self.hooks, tuple) and all(self.hooks), "names of gradient hooks", "For example ['norms', 'health'].")
        _check(self, "base_model", bool(self.base_model), "a model's name or folder", "Offline default: 'smollm2-135m'.")
        for name in ("batch_size", "accumulate", "max_steps", "max_length", "keep"):
            _check(self, name, _whole(getattr(self, name), 1), "a whole number of at least 1")
        for name in ("warmup_steps", "checkpoint_interval", "eval_interval", "patience", "seed"):
            _check(self, name, _whole(getattr(self, name), 0), "a whole number of at least 0")
        _check(self, "epochs", self.epochs is None or _whole(self.epochs, 1), "a whole number of at least 1, or none")
        _check(self, "final_lr_ratio", _finite(self.final_lr_ratio) and 0 <= self.final_lr_ratio <= 1, "a number in [0, 1]")
        _check(self, "batching", self.batching in ("shuffle", "length", "prefix", "pack"), "'shuffle', 'length', 'prefix' or 'pack'")
        finite = isinstance(self.loss, str) or all(_finite(weight) for weight in self.loss.values())
        _check(self, "loss", bool(self.loss) and finite, "a loss name, or finite weights over loss names")


@record
class SamplingParams:
    """How to draw a completion.

    Attributes:
        max_tokens: tokens drawn at the most.
        temperature: 0 is greedy; log-probs are of the distribution after temperature, before top-k and top-p.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with at least this mass.
        stop: strings and token ids that end the completion; they are not part of its text.
        seed: the same seed gives the same samples on the same backend; None draws fresh ones.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str | int, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        _check(self, "max_tokens", _whole(self.max_tokens, 1), "a whole number of at least 1")
        _check(self, "temperature", _finite(self.temperature) and self.temperature >= 0, "a number of at least 0")
        _check(self, "top_k", _whole(self.top_k, 0), "a whole number of at least 0 (0: all tokens)")
        _check(self, "top_p", _finite(self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]")
        _check(self, "stop", isinstance(self.stop, tuple) and "" not in self.stop, "a tuple of non-empty strings or token ids")
        _check(self, "seed", self.seed is None or _whole(self.seed, 0), "a whole number of at least 0, or none")


# ------------------------------------------------------------------------------------------------------------ results
@record
class Capabilities:
    """What a backend can do. Each flag says whether that setting of `LoraConfig` is honoured."""

    name: str
    gradients: Literal["parameters", "logprobs"]
    alpha: bool = True
    dropout: bool = True
    target_modules: bool = True


@record
class StepOutput:
    """What a forward-backward pass gives.

    Attributes:
        loss: nats per weight: the summed loss divided by `weight`.
        weight: the sum of the batch's weights (1 where all are zero).
        logprobs: per datum, float32 of the shape of its targets: log p(target | prefix); 0 where the weight is 0 and nothing was computed.
        metrics: what the loss reported.
        example_norms: per datum the L2 norm of its own gradient, float64, where it was asked for.
    """

    loss: float
    weight: float
    logprobs: tuple[NDArray[np.float32], ...]
    metrics: Mapping[str, float]
    example_norms: NDArray[np.float64] | None = None


@record
class OptimOutput:
    """What an optimizer step gives. `step` counts from 1; `grad_norm` is the global L2 norm before clipping."""

    step: int
    grad_norm: float
    metrics: Mapping[str, float]


@record
class Checkpoint:
    """Saved weights. "state" holds the optimizer too and can be resumed; "sampler" holds what sampling needs.

    `sha256` is that of the manifest once published in a run folder, "" before.
    """

    name: str
    uri: str
    kind: Literal["state", "sampler"]
    step: int
    base_model: str
    lora: LoraConfig
    sha256: str = ""
    local_path: Path | None = None
    size_bytes: int = 0
    created_at: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    pinned: bool = False


@record
class TrainingResult:
    """How a training run went. The losses are nats per weight on the same handful of training examples, before and after, without dropout."""

    initial_loss: float
    final_loss: float
    steps: int
    epochs: float
    tokens: int
    duration_s: float
    stopped: Literal["max_steps", "epochs", "patience", "signal", "callback"]
    best_dev_loss: float | None = None
    checkpoint: Checkpoint | None = None
    folder: Path | None = None


@record
class ModelVersion:
    """One entry of the model registry; `parents` are "name:version" strings and checkpoint URIs it was made from.

    `directions` says of metrics by name whether less ("min") or more ("max") is better, where that was stated.
    """

    name: str
    version: int
    stage: Literal["none", "staging", "production", "archived"]
    checkpoint: Checkpoint
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    parents: tuple[str, ...]
    created_at: float
    description: str = ""
    directions: Mapping[str, str] = field(default_factory=dict)


@record
class Completion:
    """One sampled answer. `logprobs` are float32 per token, of the distribution after temperature."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop_reason: Literal["stop", "length"]
    prompt_tokens: int
    duration_s: float = 0.0


@record
class Piece:
    """What one of a stream's samples has drawn anew.

    Attributes:
        index: of the sample, from 0.
        text: what is certain now and was not told before; "" where a character is not complete yet, or a stop may have begun.
        tokens: at least one; of them the last may be a stop, which is in no text.
        logprobs: of the tokens, as in a `Completion`.
        stop_reason: why the sample ended; None where it goes on.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop_reason: Literal["stop", "length"] | None = None


@record
class Score:
    """What a scorer says of one completion. `value` None means that the scorer does not apply to this example."""

    name: str
    value: float | None
    detail: str = ""


_LESS_IS_BETTER = frozenset({
    "brier", "chirality", "circuit_rank", "cost", "cyclic", "ece", "error", "error_rate", "hallucination_rate", "invented_documents", "latency_s", "loss",
    "mae", "mse", "nll", "perplexity", "polarity_conflict", "rmse", "target_nll",
})  # fmt: skip


def less_is_better(metric: str) -> bool:
    """Whether less of a metric is better, by the last part of its name: "dev/loss", "final_loss" and "target_nll" yes, "accuracy" no."""
    name = metric.rpartition("/")[2]
    return name in _LESS_IS_BETTER or name.endswith(("_loss", "_nll", "_error", "_cost", "_latency_s", "_perplexity"))


@record
class ScoredExample:
    """One example's completion and scores."""

    id: str
    document: str
    target: str
    completion: str
    scores: Mapping[str, float | None]


@record
class Estimate:
    """A number with its interval. `n` is the number of observations, `clusters` that of independent groups of them."""

    name: str
    value: float
    low: float
    high: float
    n: int
    level: float = 0.95
    method: str = ""
    clusters: int | None = None


@record
class Evaluation:
    """What a sampler scored on a data set."""

    model: str
    card: DatasetCard
    items: tuple[ScoredExample, ...]
    estimates: tuple[Estimate, ...]
    folder: Path | None = None

    def __getitem__(self, name: str) -> Estimate:
        for estimate in self.estimates:
            if estimate.name == name:
                return estimate
        raise UnknownNameError("estimate", name, (estimate.name for estimate in self.estimates))

    def _repr_html_(self) -> str:
        rows = [(e.name, e.value, e.low, e.high, f"{e.level:.0%}", e.n, e.clusters, e.method) for e in self.estimates]
        headers = ("measure", "value", "low", "high", "level", "n", "clusters", "method")
        return table_html(f"{self.model} on {self.card.name} {self.card.split}: {len(self.items):,} examples", headers, rows)


@record
class Finding:
    """A comparison: which test, why this one, on how much, with what effect. `interval` is of `effect` at `level`."""

    name: str
    test: str
    statistic: float
    p_value: float
    effect: float
    interval: tuple[float, float]
    n: int
    why: str
    source: str
    level: float = 0.95
    clusters: int | None = None

    def _repr_html_(self) -> str:
        row = (self.effect, *self.interval, f"{self.level:.0%}", self.p_value, self.n, self.clusters, self.test)
        return table_html(self.name, ("effect", "low", "high", "level", "p", "n", "clusters", "test"), [row], self.why)


# ---------------------------------------------------------------------------------------------------------- inference
@record
class Ballot:
    """What one member of an ensemble said.

    Attributes:
        member: who was asked.
        answer: the answer in its normal form, by which answers are compared; None is an abstention, or a failure where `error` says why.
        text: the answer as it was given.
        confidence: mean probability of the tokens, in [0, 1]; None where it is unknown, which is no number.
        weight: how much this ballot counts where the rule weighs.
        ranking: further answers in normal form, best first, where the member ranked several (its first is `answer`).
        error: why there is no answer; "" where the member answered or abstained.
        cost: in the pool's currency; None where no price is known.
    """

    member: str
    answer: str | None
    text: str = ""
    confidence: float | None = None
    weight: float = 1.0
    ranking: tuple[str, ...] = ()
    error: str = ""
    latency_s: float = 0.0
    cost: float | None = None
    completion: Completion | None = None

    def __post_init__(self) -> None:
        _check(self, "weight", _finite(self.weight) and self.weight >= 0, "a number of at least 0")
        known = self.confidence is None or (_finite(self.confidence) and 0 <= self.confidence <= 1)
        _check(self, "confidence", known, "a probability, or none where it is unknown")


@record
class Verdict:
    """What an ensemble says.

    Attributes:
        answer: the winner in normal form; None where the rule abstains, and `reason` says why.
        text: the winner as its most confident supporter gave it.
        agreement: the winner's share of the score of all who answered or abstained, in [0, 1]; failed members are not in it.
        probability: that the answer is right, where a rule or a calibration knows it.
        scores: per answer, what the rule counted.
        tied: the answers between which a seeded draw decided.
        skipped: members that were not asked, since the outcome could no longer change, or that had been set aside.
    """

    answer: str | None
    text: str
    agreement: float
    strategy: str
    ballots: tuple[Ballot, ...]
    probability: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    tied: tuple[str, ...] = ()
    reason: str = ""
    skipped: tuple[str, ...] = ()
    duration_s: float = 0.0

    @property
    def cost(self) -> float | None:
        """What all ballots cost together; None where a price is unknown."""
        costs = [ballot.cost for ballot in self.ballots]
        return None if any(cost is None for cost in costs) else sum(cost for cost in costs if cost is not None)

    def _repr_html_(self) -> str:
        rows = [(b.member, "(none)" if b.answer is None else b.answer, b.confidence, b.weight, b.latency_s, b.cost, b.error) for b in self.ballots]
        sure = "" if self.probability is None else f", probability {self.probability:.2f}"
        told = f"{self.answer if self.answer is not None else 'no answer'} ({self.strategy}, agreement {self.agreement:.2f}{sure})"
        return table_html(told, ("member", "answer", "confidence", "weight", "seconds", "cost", "error"), rows, self.reason)


@record
class HedgeRequest:
    """What a hedging policy sees when a leg has started. `started` counts the legs so far, `elapsed_s` since the request came."""

    started: int
    elapsed_s: float
    in_flight: int
    credit: float


@record
class HedgeDecision:
    """Start the next leg after `delay_s`, or never where None. `probability` is that of hedging at all, before the draw."""

    delay_s: float | None
    reason: str
    probability: float = 1.0


@record
class HedgeLeg:
    """One call of a hedged request.

    Attributes:
        index: 0 is the primary.
        started_s: after the request came.
        latency_s: from its own start to its end, or until it was given up.
        outcome: "won"; "lost" (answered too late); "cancelled" (given up, so that `latency_s` is only a lower bound); "failed".
    """

    index: int
    started_s: float
    latency_s: float
    outcome: Literal["won", "lost", "cancelled", "failed"]


@record
class HedgeOutcome:
    """How a hedged request went."""

    latency_s: float
    ok: bool
    legs: tuple[HedgeLeg, ...]


# ------------------------------------------------------------------------------------------------- answers that belong together
Role = Literal["chosen", "rejected", "baseline", "view1", "view2"]


def answer_id(name: str, role: Role) -> str:
    """The id of one of several answers to one prompt, "<name>#<role>"; batches keep them together, and losses compare them."""
    return f"{name}#{role}"


def split_answer_id(identity: str) -> tuple[str, Role | Literal[""]]:
    """(name, role) of an id that `answer_id` made; (the id, "") of any other."""
    name, _, role = identity.rpartition("#")
    return (name, cast("Role", role)) if name and role in get_args(Role) else (identity, "")
