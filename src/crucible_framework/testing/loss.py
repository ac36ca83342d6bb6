"""What every loss must do, as tests to inherit. Knows no loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ..protocols import Loss
from ..records import Datum
from .builders import make_data

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LossContract"]

VOCABULARY = 16


class LossContract:
    """Override `loss`; and `data` where the loss needs extras or other targets. Targets must be below 16.

    The suite asks for what backends rely on: a finite scalar with the right gradient, in any order of the data, the same twice, and
    exactly nothing from tokens of weight 0.
    """

    additive = True
    """Whether the loss of a batch is the sum of the losses of its data; set it to False for losses that compare data."""

    @pytest.fixture
    def loss(self) -> Loss:
        """The loss under test."""
        raise NotImplementedError("LossContract.loss is not overridden; expected a fixture that returns a Loss. Add it to your subclass.")

    @pytest.fixture
    def data(self) -> tuple[Datum, ...]:
        """At least two data, with some weights zero."""
        return make_data((6, 3, 5), vocab_size=VOCABULARY)

    @pytest.fixture
    def inputs(self, loss: Loss, data: tuple[Datum, ...]) -> list[Tensor]:
        """float64 log-probs of the targets, or logits, with gradient."""
        import torch

        generator = torch.Generator().manual_seed(0)
        made: list[Tensor] = []
        for datum in data:
            logits = torch.randn(len(datum), VOCABULARY, generator=generator, dtype=torch.float64)
            targets = torch.tensor(datum.targets)
            picked = torch.log_softmax(logits, -1).gather(1, targets.reshape(len(datum), -1)).reshape(targets.shape)
            made.append((logits if loss.needs == "logits" else picked).requires_grad_())
        return made

    def _gradient(self, loss: Loss, data: Sequence[Datum], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        import torch

        value, _ = loss.fn(data, inputs)
        return torch.autograd.grad(value.reshape(()), inputs, allow_unused=True, materialize_grads=True)

    def test_is_described(self, loss: Loss) -> None:
        """Name and source are there."""
        assert loss.name
        assert loss.source

    def test_value_is_one_finite_number(self, loss: Loss, data: tuple[Datum, ...], inputs: list[Tensor]) -> None:
        """A scalar tensor with a graph, and metrics that are finite numbers."""
        value, metrics = loss.fn(data, inputs)
        assert value.numel() == 1
        assert value.requires_grad
        assert bool(value.isfinite().all())
        assert all(np.isfinite(float(number)) for number in metrics.values())

    def test_gradient_is_that_of_the_value(self, loss: Loss, data: tuple[Datum, ...], inputs: list[Tensor]) -> None:
        """Analytic and numeric gradient agree in float64."""
        import torch

        assert torch.autograd.gradcheck(lambda *values: loss.fn(data, values)[0].reshape(()), tuple(inputs), eps=1e-6, atol=1e-6)

    def test_gradient_is_finite_and_not_zero(self, loss: Loss, data: tuple[Datum, ...], inputs: list[Tensor]) -> None:
        """There is something to learn from."""
        gradients = self._gradient(loss, data, inputs)
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)
        assert any(bool(gradient.any()) for gradient in gradients)

    def test_two_passes_are_one(self, loss: Loss, data: tuple[Datum, ...], inputs: list[Tensor]) -> None:
        """The gradient through a model is the same when the loss sees detached inputs first and the model runs again."""
        import torch

        scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        value, _ = loss.fn(data, [values * scale for values in inputs])
        (direct,) = torch.autograd.grad(value.reshape(()), scale)
        seen = [(values * scale).detach().requires_grad_() for values in inputs]
        upstream = self._gradient(loss, data, seen)
        (later,) = torch.autograd.grad([values * scale for values in inputs], scale, upstream)
        torch.testing.assert_close(later, direct)

    def test_same_call_gives_the_same_number(self, loss: Loss, data: tuple[Datum, ...], inputs: list[Tensor]) -> None:
        """No hidden state."""
        assert float(loss.fn(data, inputs)[0].detach()) == float(loss.fn(data, inputs)[0].detach())

    def test_order_of_data_does_not_matter(self, loss: Loss, data: tuple[Datum, ...], inputs: list[Tensor]) -> None:
        """Value and gradients move with the data."""
        import torch

        order = list(reversed(range(len(data))))
        value, _ = loss.fn(data, inputs)
        turned, _ = loss.fn([data[i] for i in order], [inputs[i] for i in order])
        torch.testing.assert_close(turned, value)
        there, back = self._gradient(loss, data, inputs), self._gradient(loss, [data[i] for i in order], [inputs[i] for i in order])
        for i, place in enumerate(order):
            torch.testing.assert_close(back[i], there[place])

    def test_batch_is_the_sum_of_its_data(self, loss: Loss, data: tuple[Datum, ...], inputs: list[Tensor]) -> None:
        """Slices of a batch can be accumulated."""
        import torch

        if not self.additive:
            pytest.skip("this loss compares the data of a batch")
        whole, _ = loss.fn(data, inputs)
        parts = [loss.fn([datum], [values])[0].reshape(()) for datum, values in zip(data, inputs, strict=True)]
        torch.testing.assert_close(torch.stack(parts).sum(), whole.reshape(()))

    def test_weight_zero_means_nothing(self, loss: Loss, data: tuple[Datum, ...], inputs: list[Tensor]) -> None:
        """Where all weights of a position are 0, its log-probs change neither the value nor get a gradient."""
        import torch

        value, _ = loss.fn(data, inputs)
        still = [torch.tensor(datum.weights.reshape(len(datum), -1).any(axis=1)) for datum in data]
        moved = [torch.where(kept.reshape(-1, *(1,) * (values.ndim - 1)), values, values - 3.0) for kept, values in zip(still, inputs, strict=True)]
        torch.testing.assert_close(loss.fn(data, moved)[0], value)
        for gradient, kept in zip(self._gradient(loss, data, inputs), still, strict=True):
            assert not bool(gradient[~kept].any())

    def test_float32_is_close(self, loss: Loss, data: tuple[Datum, ...], inputs: list[Tensor]) -> None:
        """The dtype in which backends call it gives the same value."""
        value, _ = loss.fn(data, inputs)
        single, _ = loss.fn(data, [values.detach().float().requires_grad_() for values in inputs])
        assert float(single.detach()) == pytest.approx(float(value.detach()), rel=1e-4, abs=1e-5)
