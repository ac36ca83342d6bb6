"""A complete backend in milliseconds a step: a real, tiny bigram model with exact gradients, for tests and for trying things out.

Logits of the next byte are Σ over the layers of (W + (alpha / rank) B A) x, where x is a frozen feature vector of the last token and W a
frozen matrix, both from a seed. All else is what a large backend does: LoRA on the layers that are named, dropout, AdamW, sampling,
checkpoints in PEFT's layout, one ordered queue. The same requests give the same bits. It learns which byte follows which, no language.
"""

from __future__ import annotations

import contextvars
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, ParamSpec, Self, TypeAlias, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .. import events
from ..data import ByteTokenizer, render_prompt
from ..errors import BackendError, ConfigError, CorruptError, NotFoundError, NumericError, SessionClosedError, UnknownNameError
from ..files import storage_errors, write_atomic
from ..losses.apply import apply_loss, positions, some, spread, step_output, target_logprobs
from ..losses.penalties import penalise
from ..promise import Promise
from ..protocols import GradientHook, Gradients, Loss, OnPiece, Tokenizer
from ..records import AdamConfig, Batch, Capabilities, Checkpoint, Completion, LoraConfig, OptimOutput, Prompt, SamplingParams, StepOutput
from .bigram import FIRST, SECOND, Bigram, Tensors, Tokens, adapted, generator_of
from .telling import Teller

__all__ = ["FakeBackend", "FakeSampler", "FakeSession"]

T = TypeVar("T")
P = ParamSpec("P")
Logits: TypeAlias = Callable[[Tokens], Tensor]
MODELS = ("fake", "tiny")
ADAPTER, CONFIG, OPTIMIZER, STATE = "adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json"


def _adamw(adam: AdamConfig, step: int, name: str, gradient: Tensor, old: Tensors) -> Tensors:
    """One AdamW update of one tensor and its moments, as `torch.optim.AdamW` computes it."""
    first = old[FIRST + name].lerp(gradient, 1 - adam.beta1)
    second = old[SECOND + name] * adam.beta2 + (1 - adam.beta2) * gradient * gradient
    scale = second.sqrt() / math.sqrt(1 - adam.beta2**step) + adam.eps
    weight = old[name] * (1 - adam.lr * adam.weight_decay) - adam.lr / (1 - adam.beta1**step) * first / scale
    return {name: weight, FIRST + name: first, SECOND + name: second}


def _check_finite(tensors: Tensors, what: str, examples: tuple[str, ...] = ()) -> None:
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            where = f" on examples {some(examples)}" if examples else ""
            message = f"The {what} of {name!r} is not finite{where}; expected finite numbers. The weights were not touched: lower the learning rate."
            raise NumericError(message, tensor=name, examples=examples)


def _hooked(gradients: Tensors, hook: GradientHook, metrics: dict[str, float]) -> Tensors:
    shapes = {name: gradient.shape for name, gradient in gradients.items()}
    changed = dict(hook(gradients, lambda name, value: metrics.update({name: float(value)})))
    if {name: gradient.shape for name, gradient in changed.items()} != shapes:
        raise BackendError(f"The gradient hook gave tensors {sorted(changed)}; expected those it got, {sorted(shapes)}, with the same shapes.")
    return changed


class FakeSession:
    """A LoRA adapter being trained on the fake backend; see `TrainingSession`.

    Tensors are replaced and never written to, so that a snapshot is a reference. A gradient that no step has used is not in a checkpoint.
    """

    def __init__(self, backend: FakeBackend, base: Bigram, lora: LoraConfig, tensors: Tensors, counts: tuple[int, int] = (0, 0)) -> None:
        self._backend, self._base, self._lora, self._tensors, self._number = backend, base, lora, tensors, next(backend.numbers)
        self._step, self._passes = counts
        self._gradients: Tensors = {}
        self._failure: Exception | None = None
        self._closed = False

    def _submit(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        if self._closed:
            raise SessionClosedError(f"The session on {self._base.name!r} is closed. Start one with backend.train(...) or backend.resume(...).")
        return self._backend.submit(fn, *args, **kwargs)

    def forward_backward(self, batch: Batch, loss: Loss) -> Future[StepOutput]:
        """Adds the gradient of the summed loss; after any failure of it the next `optim_step` fails too."""
        return self._submit(self._forward_backward, batch, loss)

    def forward(self, batch: Batch, loss: Loss) -> Future[StepOutput]:
        """The same numbers without dropout, gradient or change of state."""
        return self._submit(self._forward, batch, loss)

    def optim_step(self, adam: AdamConfig, hook: GradientHook | None = None) -> Future[OptimOutput]:
        """One AdamW step with the accumulated gradient, which it clears whether it succeeds or not; on failure the weights stay."""
        return self._submit(self._optim_step, adam, hook)

    def save(self, name: str, kind: Literal["state", "sampler"] = "state") -> Future[Checkpoint]:
        """Keeps the weights in the backend's memory under a new URI; `download` writes them to files."""
        return self._submit(self._save, name, kind)

    def sampler(self) -> FakeSampler:
        """The weights as they stand after the requests so far."""
        snapshot = self._submit(lambda: partial(self._base.logits, self._tensors, self._lora))
        return FakeSampler(self._backend, f"{self._base.name}/session-{self._number}", snapshot.result)

    def close(self) -> None:
        """Requests submitted before still run; later ones raise SessionClosedError."""
        self._closed = True

    def _run(self, batch: Batch, loss: Loss, tensors: Gradients, dropout: torch.Generator | None = None) -> tuple[StepOutput, Tensors]:
        """What to report and, where there is a generator for dropout, the gradient."""
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()} if dropout is not None else {}
        rows = positions(loss, batch.data, self._base.vocab)
        tokens = np.concatenate([datum.tokens[used] for datum, used in zip(batch.data, rows, strict=True)])
        logits = torch.split(self._base.logits(leaves or dict(tensors), self._lora, tokens, dropout), [len(used) for used in rows])
        logprobs = [target_logprobs(one, torch.tensor(datum.targets[used])) for datum, used, one in zip(batch.data, rows, logits, strict=True)]
        seen = [spread(one, used, len(datum)) for datum, used, one in zip(batch.data, rows, logprobs, strict=True)]
        applied = apply_loss(loss, batch.data, logits if loss.needs == "logits" else seen, grad=bool(leaves))
        gradients: Tensors = {}
        if leaves:
            upstream = [gradient[used] for gradient, used in zip(applied.gradients, rows, strict=True)]
            outputs = logits if loss.needs == "logits" else logprobs
            found = torch.autograd.grad(outputs, tuple(leaves.values()), upstream, allow_unused=True, materialize_grads=True)
            gradients = dict(zip(leaves, found, strict=True))
        return step_output(batch.data, applied, seen), gradients

    def _forward(self, batch: Batch, loss: Loss) -> StepOutput:
        with events.span("training.forward", examples=len(batch.data), tokens=batch.tokens):
            return self._run(batch, loss, self._tensors)[0]

    def _forward_backward(self, batch: Batch, loss: Loss) -> StepOutput:
        with events.span("training.forward_backward", examples=len(batch.data), tokens=batch.tokens) as span:
            try:
                adapter = {name: self._tensors[name] for name in self._base.shapes(self._lora)}

                def at(values: Gradients) -> tuple[StepOutput, Tensors]:
                    return self._run(batch, loss, values, generator_of(self._lora.seed, self._passes + 1))

                output, gradients = penalise(loss, *at(adapter), adapter, lambda values: at(values)[1])
                _check_finite(gradients, "gradient", batch.ids)
                self._gradients = {name: self._gradients.get(name, 0) + gradient for name, gradient in gradients.items()}
            except Exception as error:
                self._failure = error
                raise
            self._passes += 1  # a pass that failed draws its masks again
            span.set(loss=output.loss)
            return output

    def _optim_step(self, adam: AdamConfig, hook: GradientHook | None) -> OptimOutput:
        with events.span("training.optim_step") as span:
            gradients, failure, self._gradients, self._failure = self._gradients, self._failure, {}, None
            if failure is not None:
                kind = NumericError if isinstance(failure, NumericError) else BackendError
                raise kind(f"The step was not taken because a forward_backward before it failed: {failure}") from failure
            if not gradients:
                raise BackendError("optim_step found no gradient; expected a forward_backward since the last step. Submit one first.")
            metrics: dict[str, float] = {}
            gradients = gradients if hook is None else _hooked(gradients, hook, metrics)
            norm = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients.values()]).norm()
            _check_finite(gradients | {"global norm": norm}, "gradient")
            factor = 1.0 if adam.max_grad_norm is None else min(1.0, adam.max_grad_norm / (float(norm) + 1e-6))
            tensors = {key: new for name, part in gradients.items() for key, new in _adamw(adam, self._step + 1, name, part * factor, self._tensors).items()}
            _check_finite(tensors, "new value")
            self._tensors, self._step = tensors, self._step + 1
            span.set(step=self._step, grad_norm=float(norm))
            return OptimOutput(step=self._step, grad_norm=float(norm), metrics=metrics)

    def _save(self, name: str, kind: Literal["state", "sampler"]) -> Checkpoint:
        if not name or kind not in ("state", "sampler"):
            raise ConfigError(f"A checkpoint cannot be called {name!r} with kind {kind!r}; expected a name and 'state' or 'sampler'.")
        lora, names = self._lora, self._base.shapes(self._lora)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": self._base.name, "bias": "none", "r": lora.rank}
        config |= {"lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "target_modules": list(adapted(lora))}
        blobs = {CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(), ADAPTER: save({key: self._tensors[key] for key in names})}
        if kind == "state":
            blobs[OPTIMIZER] = save({key: tensor for key, tensor in self._tensors.items() if key not in names})
            blobs[STATE] = json.dumps({"step": self._step, "passes": self._passes}).encode()
        uri, size = f"fake://{self._number}/{next(self._backend.numbers)}/{name}", sum(map(len, blobs.values()))
        self._backend.saved[uri] = blobs
        events.emit("checkpoint.saved", checkpoint=name, step=self._step, kind=kind, size_bytes=size)
        saved = Checkpoint(name=name, uri=uri, kind=kind, step=self._step, base_model=self._base.name, lora=lora, created_at=time.time())
        return replace(saved, size_bytes=size)


class FakeSampler:
    """A frozen fake model that answers prompts; see `Sampler`. `logits` gives what gives [T, V] for tokens [T]."""

    def __init__(self, backend: FakeBackend, model: str, logits: Callable[[], Logits]) -> None:
        self._backend, self.model, self._logits = backend, model, logits

    def logits(self, tokens: Tokens) -> Tensor:
        """[T, V] after each of tokens [T]."""
        return self._logits()(tokens)

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        """`n` completions. `tokens` and `logprobs` hold all that was drawn, the stop too; `text` ends before it.

        At temperature 0 the log-probs are those of temperature 1. Without a seed the draws depend on how much the backend was asked before.
        """
        return self._backend.submit(self._sample, prompt, params, n, self._seed(params, n))

    def stream(self, prompt: Prompt, params: SamplingParams, on_piece: OnPiece, n: int = 1) -> Future[tuple[Completion, ...]]:
        """The same, each token told when it is drawn; see `StreamSampler`."""
        seed, promise = self._seed(params, n), Promise[tuple[Completion, ...]]()
        teller = Teller(promise, on_piece, self._backend.bytes, params, n=n, context=contextvars.copy_context())

        def draw() -> None:
            try:
                self._sample(prompt, params, n, seed, teller)
            except Exception as error:
                teller.fail(error)

        self._backend.submit(draw)
        return promise.future

    def _seed(self, params: SamplingParams, n: int) -> tuple[int, int]:
        if n < 1:
            raise ConfigError(f"n is {n!r}; expected a whole number of at least 1.")
        return (0, next(self._backend.numbers)) if params.seed is None else (1, params.seed)

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        """log p of each token of `completion` after `prompt` at temperature 1."""
        return self._backend.submit(self._compute_logprobs, prompt, completion)

    def _compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> tuple[float, ...]:
        tokenizer = self._backend.bytes
        if isinstance(completion, str):
            completion = tuple(tokenizer.encode(completion))
        answer = render_prompt(completion, tokenizer) if completion else ()
        given = render_prompt(prompt, tokenizer)
        with events.span("inference.logprobs", model=self.model, prompt_tokens=len(given), completion_tokens=len(answer)):
            ids = np.array([given[-1], *answer])
            logits = self._logits()(ids)[:-1]
            return tuple(torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids[1:, None]))[:, 0].tolist())

    def _sample(self, prompt: Prompt, params: SamplingParams, n: int, seed: tuple[int, int], teller: Teller | None = None) -> tuple[Completion, ...]:
        with events.span("inference.sample", model=self.model, n=n) as span:
            ids, done, drawn = render_prompt(prompt, self._backend.bytes), dict[int, Completion](), 0
            rows = {index: self._one(ids, params, generator_of(*seed, index)) for index in range(n)}
            index, token, logp, whole = 0, 0, 0.0, None
            while rows and not (teller is not None and teller.over):
                for index, row in tuple(rows.items()):
                    token, logp, whole = next(row)
                    drawn += 1
                    if whole is not None:
                        done[index] = whole
                        del rows[index]
                    if teller is not None and rows:
                        teller.put(index, token, logp, whole)
            span.set(prompt_tokens=len(ids), completion_tokens=drawn)
        if teller is not None:  # the last one comes when the event has been sent, as the answer does
            teller.put(index, token, logp, whole)
        return tuple(done[index] for index in sorted(done))

    def _one(self, ids: list[int], params: SamplingParams, generator: torch.Generator) -> Iterator[tuple[int, float, Completion | None]]:
        """(token, its log-prob, None), and with the last one the completion."""
        start, logits, tokenizer = time.perf_counter(), self._logits(), self._backend.bytes
        ends = {*tokenizer.eos_ids, *(stop for stop in params.stop if isinstance(stop, int))}
        strings = [stop for stop in params.stop if isinstance(stop, str)]
        tokens, logprobs = list[int](), list[float]()
        text, whole = "", None
        while whole is None:
            token, logp = _draw(logits(np.array([tokens[-1] if tokens else ids[-1]]))[0], params, generator)
            tokens.append(token)
            logprobs.append(logp)
            stopped = token in ends
            if not stopped:
                text = tokenizer.decode(tokens)
                cuts = [at for stop in strings if (at := text.find(stop)) >= 0]
                stopped, text = bool(cuts), text[: min(cuts, default=len(text))]
            if stopped or len(tokens) == params.max_tokens:
                reason: Literal["stop", "length"] = "stop" if stopped else "length"
                whole = Completion(text=text, tokens=tuple(tokens), logprobs=tuple(logprobs), stop_reason=reason, prompt_tokens=len(ids))
                whole = replace(whole, duration_s=time.perf_counter() - start)
            yield token, logp, whole


def _draw(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> tuple[int, float]:
    """One token and its log-prob after temperature, before top-k and top-p."""
    logprobs = torch.log_softmax(logits / (params.temperature or 1.0), -1)
    ordered, order = logprobs.sort(descending=True, stable=True)
    kept = ordered[: 1 if params.temperature == 0 else params.top_k or None].softmax(-1)
    if params.top_p < 1:
        kept = kept * (kept.cumsum(-1) - kept < params.top_p)
    token = int(order[torch.multinomial(kept, 1, generator=generator)])
    return token, float(logprobs[token])


class FakeBackend:
    """A deterministic backend with base models "fake" and "tiny" of layers embed_proj, q_proj, v_proj; each request first waits `latency_s`."""

    capabilities = Capabilities(name="fake", gradients="parameters")

    def __init__(self, latency_s: float = 0.0) -> None:
        if not (math.isfinite(latency_s) and latency_s >= 0):
            raise ConfigError(f"latency_s is {latency_s!r}; expected a finite number of seconds of at least 0.")
        self._latency_s, self._closed = latency_s, False
        self._queue = ThreadPoolExecutor(max_workers=1, thread_name_prefix="crucible-fake")
        self.numbers = itertools.count(1)  # of sessions, saves and unseeded draws
        self.bytes = ByteTokenizer()
        self._bases = {name: Bigram(name, self.bytes.vocab_size) for name in MODELS}
        self.saved: dict[str, dict[str, bytes]] = {}

    def submit(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Runs a request after those before it, in its caller's context; SessionClosedError where the backend is closed."""
        self._check_open()
        context = contextvars.copy_context()

        def request() -> T:
            time.sleep(self._latency_s)
            return context.run(fn, *args, **kwargs)

        return self._queue.submit(request)

    def base(self, base_model: str) -> Bigram:
        """The frozen weights; UnknownNameError where there is no such base model."""
        if base_model not in self._bases:
            raise UnknownNameError("base model", base_model, MODELS)
        return self._bases[base_model]

    def train(self, base_model: str, lora: LoraConfig) -> FakeSession:
        """A new adapter; UnknownNameError where there is no such base model or target module."""
        self._check_open()
        base = self.base(base_model)
        return FakeSession(self, base, lora, base.fresh(lora))

    def resume(self, checkpoint: Checkpoint) -> FakeSession:
        """Continues bit-exactly, from `local_path` where there is one, else from memory; CorruptError where the files fit no such adapter."""
        self._check_open()
        if checkpoint.kind != "state":
            raise BackendError(f"Checkpoint {checkpoint.name!r} is of kind {checkpoint.kind!r}, without an optimizer; expected 'state'. Save it so.")
        try:
            state = json.loads(self._read(checkpoint, STATE))
            counts = int(state["step"]), int(state["passes"])
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptError(f"{STATE} of checkpoint {checkpoint.name!r} does not parse: {error!r}. Use an earlier checkpoint.") from error
        tensors = self._tensors(checkpoint, ADAPTER) | self._tensors(checkpoint, OPTIMIZER, (FIRST, SECOND))
        return FakeSession(self, self.base(checkpoint.base_model), checkpoint.lora, tensors, counts)

    def sampler(self, model: str | Checkpoint) -> FakeSampler:
        """Samples the base model of that name, or a checkpoint's adapter."""
        self._check_open()
        if isinstance(model, str):
            logits = partial(self.base(model).logits, {}, None)
        else:
            logits = partial(self.base(model.base_model).logits, self._tensors(model, ADAPTER), model.lora)
        return FakeSampler(self, model if isinstance(model, str) else model.uri, lambda: logits)

    def tokenizer(self, base_model: str) -> Tokenizer:
        """One token per byte, for both base models."""
        self.base(base_model)
        return self.bytes

    def download(self, checkpoint: Checkpoint, to: Path) -> Checkpoint:
        """Writes adapter_config.json and adapter_model.safetensors, and of a "state" optimizer.safetensors and state.json, into `to`."""
        self._check_open()
        names = (CONFIG, ADAPTER, OPTIMIZER, STATE) if checkpoint.kind == "state" else (CONFIG, ADAPTER)
        blobs = {name: self._read(checkpoint, name) for name in names}
        for name, blob in blobs.items():
            write_atomic(to / name, blob)
        return replace(checkpoint, local_path=to, size_bytes=sum(map(len, blobs.values())))

    def look(self, sampler: FakeSampler, rows: Sequence[Sequence[int]], seen: Callable[[int, int, Tensor], None]) -> Future[None]:
        """Shows `seen` the logits after each token of each row: (row, first position, fp32 [t, V])."""

        def show() -> None:
            for place, row in enumerate(rows):
                seen(place, 0, sampler.logits(np.array(row)))

        return self.submit(show)

    def forget(self, checkpoint: Checkpoint) -> None:
        """Frees what memory holds of a checkpoint."""
        self.saved.pop(checkpoint.uri, None)

    def close(self) -> None:
        """Finishes what was submitted; later requests raise SessionClosedError."""
        self._closed = True
        self._queue.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError("The fake backend is closed. Make a new FakeBackend().")

    def _read(self, checkpoint: Checkpoint, name: str) -> bytes:
        folder = checkpoint.local_path
        if folder is None and checkpoint.uri in self.saved:
            return self.saved[checkpoint.uri][name]
        if folder is None or not (folder / name).is_file():
            where = "this backend's memory" if folder is None else repr(str(folder))
            raise NotFoundError(f"Checkpoint {checkpoint.uri!r} has no {name!r} in {where}. Expected one that was saved here or downloaded: download it again.")
        with storage_errors(folder, "read"):
            return (folder / name).read_bytes()

    def _tensors(self, checkpoint: Checkpoint, file: str, prefixes: tuple[str, ...] = ("",)) -> Tensors:
        try:
            tensors: Tensors = load(self._read(checkpoint, file))
        except SafetensorError as error:
            raise CorruptError(f"{file} of checkpoint {checkpoint.name!r} does not parse: {error}. Use an earlier checkpoint.") from error
        wanted = {prefix + name: shape for name, shape in self.base(checkpoint.base_model).shapes(checkpoint.lora).items() for prefix in prefixes}
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != wanted:
            raise CorruptError(f"{file} of checkpoint {checkpoint.name!r} holds other tensors than its {checkpoint.lora!r} has. Use an earlier checkpoint.")
        return tensors
