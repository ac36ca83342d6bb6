"""What the backend suite's tests share: fixtures to override, and how to train, look at gradients and ask for a whole distribution."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from ..data import render_prompt
from ..losses import resolve
from ..protocols import Backend, GradientHook, Gradients, Loss, Report, Tokenizer, TrainingSession
from ..records import AdamConfig, Batch, Datum, LoraConfig, OptimOutput, Prompt, StepOutput
from .builders import text_datum

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BackendFixtures", "Made", "Numbers", "close", "distribution", "done", "finish", "gradient", "observe", "own_cross_entropy", "token_datum", "train"]

T = TypeVar("T")
Numbers = dict[str, NDArray[np.float32]]
Made = tuple["Tensor", dict[str, float]]
WAIT_S = 120.0
"""A future that is not resolved by then counts as hanging."""


def done(future: Future[T]) -> T:
    """The future's result, or a failed test where it hangs."""
    return future.result(timeout=WAIT_S)


def finish(futures: Sequence[Future[T]]) -> list[T]:
    """All results, in order."""
    return [done(future) for future in futures]


def close(left: object, right: object, *, tolerance: float = 1e-4) -> None:
    """Numbers agree within a floating-point tolerance."""
    np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=tolerance, atol=tolerance)


def train(session: TrainingSession, batch: Batch, steps: int = 3, *, lr: float = 1e-2, loss: str | Loss = "cross_entropy") -> list[StepOutput]:
    """So many steps, submitted ahead."""
    outputs: list[Future[StepOutput]] = []
    made: list[Future[OptimOutput]] = []
    for _ in range(steps):
        outputs.append(session.forward_backward(batch, resolve(loss)))
        made.append(session.optim_step(AdamConfig(lr=lr)))
    finish(made)
    return finish(outputs)


def observe(into: Numbers) -> GradientHook:
    """A hook that copies the gradients and leaves them as they are."""

    def hook(gradients: Gradients, report: Report) -> Gradients:
        into.update({name: gradient.detach().cpu().numpy().copy() for name, gradient in gradients.items()})
        report("tensors", len(gradients))
        return gradients

    return hook


def gradient(session: TrainingSession, *batches: Batch, loss: str | Loss = "cross_entropy") -> Numbers:
    """The gradient summed over batches; the weights stay (learning rate 0)."""
    found: Numbers = {}
    for batch in batches:
        done(session.forward_backward(batch, resolve(loss)))
    done(session.optim_step(AdamConfig(lr=0.0), observe(found)))
    return found


def own_cross_entropy(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> Made:
    """Cross-entropy as a user would write it."""
    import torch

    terms = [-(torch.tensor(datum.weights).to(values) * values).sum() for datum, values in zip(data, logprobs, strict=True)]
    return torch.stack(terms).sum(), {"data": float(len(data))}


def token_datum(prompt: Sequence[int], completion: Sequence[int], name: str = "tokens") -> Datum:
    """A datum of token ids with weight 1 on the completion."""
    ids = [*prompt, *completion]
    weights = np.zeros(len(ids) - 1, dtype=np.float32)
    weights[len(prompt) - 1 :] = 1.0
    return Datum(id=name, tokens=np.array(ids[:-1], dtype=np.int32), targets=np.array(ids[1:], dtype=np.int64), weights=weights)


def distribution(session: TrainingSession, tokenizer: Tokenizer, prompt: Prompt) -> NDArray[np.float64]:
    """log p of every token of the vocabulary after the prompt."""
    ids = render_prompt(prompt, tokenizer)
    targets = np.tile(np.arange(tokenizer.vocab_size, dtype=np.int64), (len(ids), 1))
    weights = np.zeros(targets.shape, dtype=np.float32)
    weights[-1] = 1.0
    datum = Datum(id="distribution", tokens=np.array(ids, dtype=np.int32), targets=targets, weights=weights)
    output = done(session.forward(Batch(data=(datum,)), resolve("cross_entropy")))
    return np.asarray(output.logprobs[0][-1], dtype=np.float64)


class BackendFixtures:
    """`backend` and `base_model` are to be overridden, `lora` may be."""

    @pytest.fixture
    def backend(self) -> Backend:
        """A fresh backend; close it after the test."""
        raise NotImplementedError("BackendContract.backend is not overridden; expected a fixture that gives a Backend. Add it to your subclass.")

    @pytest.fixture
    def base_model(self) -> str:
        """A small base model of the backend."""
        return "tiny"

    @pytest.fixture
    def lora(self) -> LoraConfig:
        """An adapter without dropout."""
        return LoraConfig(rank=4, alpha=8.0, dropout=0.0)

    @pytest.fixture
    def session(self, backend: Backend, base_model: str, lora: LoraConfig) -> TrainingSession:
        """A fresh session."""
        return backend.train(base_model, lora)

    @pytest.fixture
    def tokenizer(self, backend: Backend, base_model: str) -> Tokenizer:
        """That of the base model."""
        return backend.tokenizer(base_model)

    @pytest.fixture
    def batch(self, tokenizer: Tokenizer) -> Batch:
        """Three data of different lengths."""
        pairs = (("Which colour has grass?", "Green."), ("Two and two?", "Four, of course."), ("Capital of France?", "Paris"))
        return Batch(data=tuple(text_datum(prompt, target, tokenizer) for prompt, target in pairs))

    @pytest.fixture
    def parameters(self, backend: Backend) -> None:
        """Skips where hooks see no parameters' gradients."""
        if backend.capabilities.gradients != "parameters":
            pytest.skip("this backend gives no gradients of parameters")
