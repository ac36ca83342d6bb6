"""An adapter being trained on the local engine: accumulate, step, save, look at it.

All state is touched by the engine's thread only, and tensors are replaced, never written to, so that a snapshot is a reference. This file
does not know how gradients are computed, nor where files lie.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Literal, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

from ... import events
from ...errors import BackendError, ConfigError, NumericError, SessionClosedError
from ...losses.penalties import penalise
from ...protocols import GradientHook, Gradients, Loss
from ...records import AdamConfig, Batch, Checkpoint, LoraConfig, OptimOutput, StepOutput
from .adapters import Snapshot
from .bases import Base
from .engine import Asked, evaluate, evaluate_together, few
from .examplewise import ExampleNorms
from .lora import Active
from .optim import AdamState, adamw, first_not_finite, global_norm
from .queue import Mix
from .sampling import Frozen, LocalSampler

__all__ = ["LocalSession"]

T = TypeVar("T")
P = ParamSpec("P")


class Engine(Protocol):
    """What a session needs of its backend."""

    def submit(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Runs a request after all before it."""
        ...

    def submit_for(self, session: LocalSession, fn: Callable[[], T], mix: Mix[T] | None = None) -> Future[T]:
        """Runs a session's request after those before it; with `mix`, maybe together with other sessions'."""
        ...

    def keep(self, checkpoint: Checkpoint, snapshot: Snapshot) -> Checkpoint:
        """Keeps a snapshot in memory under the checkpoint's URI, made unique."""
        ...

    def sampler_of(self, model: str, frozen: Future[Frozen]) -> LocalSampler:
        """A sampler of weights that an earlier request gives."""
        ...


class LocalSession:
    """A LoRA adapter on a frozen base model; see `TrainingSession`.

    Log-probs in a `StepOutput` are 0 at positions whose weight is 0, where the engine computes nothing, unless the loss needs logits or all
    weights of the batch are 0. A gradient that no step has used is not in a checkpoint.

    Args:
        engine: the backend.
        base: the frozen model.
        lora: the adapter's settings.
        snapshot: where it starts, with optimizer and generator.
        name: unique among sessions.
        base_model: what the user called the model.
    """

    def __init__(self, engine: Engine, base: Base, lora: LoraConfig, snapshot: Snapshot, *, name: str, base_model: str) -> None:
        if snapshot.optimizer is None or snapshot.generator is None:
            raise BackendError(f"The session {name!r} cannot start without optimizer and generator state. Save checkpoints as kind 'state'.")
        self.name, self.base, self.lora, self.base_model = name, base, lora, base_model
        self._engine, self._closed = engine, False
        self._adapter = snapshot.adapter
        self._optimizer: AdamState = snapshot.optimizer
        self._generator = torch.Generator()  # on the processor whatever the device: a checkpoint goes on anywhere
        self._generator.set_state(snapshot.generator)
        self._gradients: dict[str, Tensor] = {}
        self._failure: Exception | None = None

    def _submit(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        if self._closed:
            raise SessionClosedError(f"The session on {self.base_model!r} is closed. Start one with backend.train(...) or backend.resume(...).")
        return self._engine.submit_for(self, partial(fn, *args, **kwargs))

    def forward_backward(self, batch: Batch, loss: Loss) -> Future[StepOutput]:
        """Adds the gradient of the summed loss; after any failure of it the next `optim_step` fails too.

        Raises (from the future):
            NumericError: loss or gradient is not finite.
            DataError: no data, tokens outside the vocabulary or the context, or an extra that the loss needs is missing.
            BackendError: the loss gave no scalar with a gradient.
        """
        if self._closed or not few(self.base, self._asked(batch, loss)):
            return self._submit(self._forward_backward, batch, loss)
        alone = partial(self._forward_backward, batch, loss)
        return self._engine.submit_for(self, alone, Mix(("forward_backward", id(self.base)), (self, batch, loss), _together))

    def forward_backward_examples(self, batch: Batch, loss: Loss) -> Future[StepOutput]:
        """As `forward_backward`, with the exact L2 norm of each example's own gradient in `StepOutput.example_norms`.

        The norm is of what flows through the example's own log-probs, weights included: the gradient of the example alone, where the loss sums over
        examples that do not see each other. Common starts of examples are not shared in such a pass.
        """
        return self._submit(self._forward_backward, batch, loss, norms=True)

    def forward(self, batch: Batch, loss: Loss) -> Future[StepOutput]:
        """The same numbers without dropout, gradient or change of state."""
        return self._submit(self._forward, batch, loss)

    def optim_step(self, adam: AdamConfig, hook: GradientHook | None = None) -> Future[OptimOutput]:
        """One AdamW step with the accumulated gradient, which it clears whether it succeeds or not.

        Raises (from the future):
            BackendError: there is no gradient, a `forward_backward` before it failed, or the hook gave other tensors.
            NumericError: a gradient, the norm or a new weight is not finite; the weights stay as they were.
        """
        return self._submit(self._optim_step, adam, hook)

    def save(self, name: str, kind: Literal["state", "sampler"] = "state") -> Future[Checkpoint]:
        """Keeps the weights in the backend's memory under a new URI; `download` writes them to files.

        Raises:
            ConfigError: the name is empty, or the kind is neither "state" nor "sampler".
        """
        if not name or kind not in ("state", "sampler"):
            raise ConfigError(f"A checkpoint cannot be called {name!r} with kind {kind!r}; expected a name and 'state' or 'sampler'.")
        return self._submit(self._save, name, kind)

    def sampler(self) -> LocalSampler:
        """The weights as they stand after the requests so far."""
        return self._engine.sampler_of(f"{self.base_model}/{self.name}", self._submit(self._frozen))

    def close(self) -> None:
        """Requests submitted before still run; later ones raise SessionClosedError."""
        self._closed = True

    # ------------------------------------------------------------------------------------------- on the engine's thread
    @property
    def _scale(self) -> float:
        return self.lora.alpha / self.lora.rank

    def _frozen(self) -> Frozen:
        return Frozen(self.base, Active(self._adapter, self._scale))

    def _asked(self, batch: Batch, loss: Loss) -> Asked:
        return Asked(batch, loss, Active(self._adapter, self._scale, self.lora.dropout, self._generator))

    def _forward(self, batch: Batch, loss: Loss) -> StepOutput:
        with events.span("training.forward", examples=len(batch.data), tokens=batch.tokens):
            return evaluate(self.base, batch, loss, Active(self._adapter, self._scale), train=False)[0]

    def _forward_backward(self, batch: Batch, loss: Loss, *, norms: bool = False) -> StepOutput:
        with events.span("training.forward_backward", examples=len(batch.data), tokens=batch.tokens) as span:
            before = self._generator.get_state()
            try:
                note = ExampleNorms(len(batch.data)) if norms else None
                active = Active(self._adapter, self._scale, self.lora.dropout, self._generator, note)
                output, gradients = evaluate(self.base, batch, loss, active, train=True)
                if loss.penalties:
                    output, gradients = penalise(loss, output, gradients, self._adapter, partial(self._slope, batch, loss, before))
                if self._gradients:
                    gradients = {name: self._gradients[name] + gradient for name, gradient in gradients.items()}
            except Exception as error:
                self._failure = error
                self._generator.set_state(before)
                raise
            self._gradients = gradients
            span.set(loss=output.loss)
            return output if note is None else replace(output, example_norms=note.norms())

    def _took_shared(
        self, batch: Batch, found: tuple[StepOutput, dict[str, Tensor]] | Exception, before: Tensor, *, shared: int, duration_s: float
    ) -> StepOutput:
        """What this session's part of a shared pass gives; `duration_s` is the whole pass's."""
        with events.span("training.forward_backward", examples=len(batch.data), tokens=batch.tokens, shared=shared, duration_s=duration_s) as span:
            if isinstance(found, Exception):
                self._failure = found
                self._generator.set_state(before)
                raise found
            output, gradients = found
            self._gradients = {name: self._gradients[name] + gradient for name, gradient in gradients.items()} if self._gradients else gradients
            span.set(loss=output.loss)
            return output

    def _slope(self, batch: Batch, loss: Loss, start: Tensor, adapter: Gradients) -> dict[str, Tensor]:
        """The gradient at other values of the adapter, with the masks that a pass draws from the generator's state `start`."""
        now = self._generator.get_state()
        self._generator.set_state(start)
        try:
            return evaluate(self.base, batch, loss, Active(adapter, self._scale, self.lora.dropout, self._generator), train=True)[1]
        finally:
            self._generator.set_state(now)

    def _optim_step(self, adam: AdamConfig, hook: GradientHook | None) -> OptimOutput:
        with events.span("training.optim_step", lr=adam.lr) as span:
            gradients, failure = self._gradients, self._failure
            self._gradients, self._failure = {}, None
            if failure is not None:
                message = f"The step was not taken because a forward_backward before it failed: {failure}"
                if isinstance(failure, NumericError):
                    raise NumericError(message, tensor=failure.tensor, examples=failure.examples) from failure
                raise BackendError(message) from failure
            if not gradients:
                raise BackendError("optim_step found no gradient; expected a forward_backward since the last step. Submit one first.")
            metrics: dict[str, float] = {}
            if hook is not None:
                gradients = _hooked(gradients, hook, metrics)
            _refuse_not_finite(gradients, "gradient")
            norm = global_norm(gradients)
            _refuse_not_finite({"global norm": norm}, "gradient")
            adapter, optimizer = adamw(self._adapter, gradients, self._optimizer, adam, norm)
            _refuse_not_finite({**adapter, **{f"second moment of {name}": square for name, square in optimizer.exp_avg_sq.items()}}, "new value")
            self._adapter, self._optimizer = adapter, optimizer
            span.set(step=optimizer.step, grad_norm=float(norm))
            return OptimOutput(step=optimizer.step, grad_norm=float(norm), metrics=metrics)

    def _save(self, name: str, kind: Literal["state", "sampler"]) -> Checkpoint:
        full = kind == "state"
        optimizer, generator = (self._optimizer, self._generator.get_state()) if full else (None, None)
        uri, step = f"local://{self.name}/{name}", self._optimizer.step
        checkpoint = Checkpoint(name=name, uri=uri, kind=kind, step=step, base_model=self.base_model, lora=self.lora)
        return self._engine.keep(checkpoint, Snapshot(adapter=self._adapter, optimizer=optimizer, generator=generator))


def _together(items: Sequence[object]) -> list[Callable[[], StepOutput]]:
    """Passes of several sessions on one base as one pass; for each what its caller gets."""
    given, start = cast("Sequence[tuple[LocalSession, Batch, Loss]]", items), time.perf_counter()
    before = [session._generator.get_state() for session, _, _ in given]
    found = evaluate_together(given[0][0].base, [session._asked(batch, loss) for session, batch, loss in given])
    duration_s = time.perf_counter() - start
    return [
        partial(session._took_shared, batch, one, state, shared=len(given), duration_s=duration_s)
        for (session, batch, _), one, state in zip(given, found, before, strict=True)
    ]


def _refuse_not_finite(tensors: dict[str, Tensor], what: str) -> None:
    if (bad := first_not_finite(tensors)) is not None:
        message = f"The {what} of {bad!r} is not finite; expected finite numbers. The weights were not touched: lower the learning rate or look at the hook."
        raise NumericError(message, tensor=bad)


def _hooked(gradients: dict[str, Tensor], hook: GradientHook, metrics: dict[str, float]) -> dict[str, Tensor]:
    def report(name: str, value: float) -> None:
        if not math.isfinite(number := float(value)):
            raise NumericError(f"The gradient hook reported {name!r} = {number}; expected a finite number. The weights were not touched.", tensor=name)
        metrics[name] = number

    shapes = {name: gradient.shape for name, gradient in gradients.items()}
    with torch.no_grad():
        changed = dict(hook(gradients, report))
    if {name: gradient.shape for name, gradient in changed.items()} != shapes:
        raise BackendError(f"The gradient hook gave tensors {sorted(changed)}; expected those it got, {sorted(shapes)}, with the same shapes.")
    return {name: changed[name].detach().to(gradient) for name, gradient in gradients.items()}
