"""Failures: what cannot be computed fails at its own future, and a step submitted ahead never uses half a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ..data import render_prompt
from ..errors import BackendError, CrucibleError, DataError, NumericError, UnknownNameError
from ..losses import resolve
from ..protocols import Backend, Loss, Tokenizer, TrainingSession
from ..records import AdamConfig, Batch, Datum, LoraConfig
from .backend_parts import BackendFixtures, Made, done, own_cross_entropy, token_datum, train

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FailureContract"]


def _times(factor: float) -> Loss:
    def scaled(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> Made:
        value, metrics = own_cross_entropy(data, logprobs)
        return value * factor, metrics

    return Loss(name="scaled", fn=scaled, source="test")


class FailureContract(BackendFixtures):
    """What cannot be computed fails at its own future, and a step submitted ahead never uses half a gradient."""

    def _check_untouched(self, session: TrainingSession, clean: TrainingSession, batch: Batch) -> None:
        assert [output.loss for output in train(session, batch, 2)] == [output.loss for output in train(clean, batch, 2)]

    @pytest.fixture
    def clean(self, backend: Backend, base_model: str, lora: LoraConfig) -> TrainingSession:
        """A second session that sees no failure."""
        return backend.train(base_model, lora)

    def test_loss_that_is_not_finite(self, session: TrainingSession, clean: TrainingSession, batch: Batch) -> None:
        """NumericError names the examples; the step fails and clears the good gradient before it too."""
        session.forward_backward(batch, resolve("cross_entropy"))
        failed, step = session.forward_backward(batch, _times(float("nan"))), session.optim_step(AdamConfig())
        with pytest.raises(NumericError, match="nan") as caught:
            done(failed)
        assert caught.value.examples == batch.ids
        with pytest.raises(NumericError):
            done(step)
        self._check_untouched(session, clean, batch)

    def test_gradient_that_is_not_finite(self, session: TrainingSession, clean: TrainingSession, batch: Batch) -> None:
        """A finite loss whose gradient is not: the square root at 0."""

        def rooted(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> Made:
            value, metrics = own_cross_entropy(data, logprobs)
            return value + (logprobs[0] * 0).abs().sqrt().sum(), metrics

        failed, step = session.forward_backward(batch, resolve(rooted)), session.optim_step(AdamConfig())
        with pytest.raises(NumericError):
            done(failed)
        with pytest.raises(NumericError):
            done(step)
        self._check_untouched(session, clean, batch)

    @pytest.mark.parametrize("case", ["empty", "token", "target", "extra"])
    def test_data_that_do_not_fit(self, session: TrainingSession, clean: TrainingSession, batch: Batch, case: str) -> None:
        """DataError that names the datum, forward or backward; then the step fails too."""
        first = batch.data[0]
        wrong = {
            "empty": Batch(data=()),
            "token": Batch(data=(replace(first, tokens=np.full_like(first.tokens, 10**8)),)),
            "target": Batch(data=(replace(first, targets=np.full_like(first.targets, 10**8)),)),
            "extra": replace(batch, data=batch.data[:1]),
        }[case]
        loss = resolve("kl" if case == "extra" else "cross_entropy")
        for request in (session.forward, session.forward_backward):
            with pytest.raises(DataError, match="empty" if case == "empty" else first.id.replace("?", r"\?")):
                done(request(wrong, loss))
        with pytest.raises(BackendError):
            done(session.optim_step(AdamConfig()))
        self._check_untouched(session, clean, batch)

    def test_loss_that_gives_no_number(self, session: TrainingSession, clean: TrainingSession, batch: Batch) -> None:
        """A vector, a constant, and an error of its own."""

        def raising(*_: object) -> Made:
            raise KeyError("from the loss")

        def detached(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> Made:
            return own_cross_entropy(data, [values.detach() for values in logprobs])

        cases: tuple[tuple[type[Exception], Callable[[Sequence[Datum], Sequence[Tensor]], Made]], ...] = (
            (BackendError, lambda _, logprobs: (logprobs[0], {})),
            (BackendError, detached),
            (KeyError, raising),
        )
        for error, fn in cases:
            failed, step = session.forward_backward(batch, resolve(fn)), session.optim_step(AdamConfig())
            with pytest.raises(error):
                done(failed)
            with pytest.raises(BackendError):
                done(step)
        self._check_untouched(session, clean, batch)

    def test_step_without_a_gradient(self, session: TrainingSession, batch: Batch) -> None:
        """There is nothing to step with, at the start and after a step."""
        with pytest.raises(BackendError):
            done(session.optim_step(AdamConfig()))
        train(session, batch, 1)
        with pytest.raises(BackendError):
            done(session.optim_step(AdamConfig()))

    def test_model_that_blew_up(self, session: TrainingSession, batch: Batch) -> None:
        """Weights of 1e37 give no finite loss: the pass and the step after it fail, again and again."""
        train(session, batch, 1)  # B is zero before
        train(session, batch, 1, lr=1e37)
        passes = [session.forward_backward(batch, resolve("cross_entropy")) for _ in range(2)]
        step = session.optim_step(AdamConfig())
        for failed in passes:
            with pytest.raises(NumericError):
                done(failed)
        with pytest.raises(NumericError):
            done(step)

    def test_unknown_names(self, backend: Backend, base_model: str) -> None:
        """Of a base model and of a layer."""
        with pytest.raises(CrucibleError, match="no-such-model"):
            backend.train("no-such-model", LoraConfig())
        if backend.capabilities.target_modules:
            with pytest.raises(UnknownNameError, match="q_porj"):
                backend.train(base_model, LoraConfig(target_modules=("q_porj",)))

    def test_zero_weights_everywhere(self, session: TrainingSession, tokenizer: Tokenizer) -> None:
        """A batch with no weight has loss 0 and weight 1, and its log-probs are all computed."""
        datum = token_datum(render_prompt("Which?", tokenizer), tokenizer.encode("None"))
        output = done(session.forward(Batch(data=(replace(datum, weights=np.zeros_like(datum.weights)),)), resolve("cross_entropy")))
        assert (output.loss, output.weight) == (0.0, 1.0)
        assert (output.logprobs[0] < 0).all()
