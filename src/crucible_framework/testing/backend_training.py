"""Training: what forward, forward_backward and optim_step must compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ..errors import BackendError, CapabilityError, NumericError
from ..losses import combine, resolve
from ..protocols import Backend, Gradients, Loss, Report, Tokenizer, TrainingSession
from ..records import AdamConfig, Batch, Datum, LoraConfig
from .backend_parts import BackendFixtures, Made, Numbers, close, distribution, done, gradient, observe, own_cross_entropy, train

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NumbersContract", "TrainingContract"]


def _from_logits(data: Sequence[Datum], logits: Sequence[Tensor]) -> Made:
    import torch

    targets = [torch.tensor(datum.targets)[:, None].to(values.device) for datum, values in zip(data, logits, strict=True)]
    picked = [torch.log_softmax(values, -1).gather(1, wanted)[:, 0] for wanted, values in zip(targets, logits, strict=True)]
    return own_cross_entropy(data, picked)


def _one(batch: Batch, *places: int) -> Batch:
    return replace(batch, data=tuple(batch.data[place] for place in places))


class NumbersContract(BackendFixtures):
    """What a forward and backward pass gives."""

    def test_loss_is_nats_per_weight(self, session: TrainingSession, batch: Batch) -> None:
        """The reported loss is −Σ w log p / Σ w of the reported log-probs."""
        output = done(session.forward(batch, resolve("cross_entropy")))
        total = sum(float(datum.weights @ logprobs) for datum, logprobs in zip(batch.data, output.logprobs, strict=True))
        assert output.weight == sum(float(datum.weights.sum()) for datum in batch.data)
        assert output.loss == pytest.approx(-total / output.weight, rel=1e-5)

    def test_logprobs_have_the_shape_of_the_targets(self, session: TrainingSession, batch: Batch) -> None:
        """Per datum float32, finite, at most 0."""
        for datum, logprobs in zip(batch.data, done(session.forward(batch, resolve("cross_entropy"))).logprobs, strict=True):
            assert logprobs.shape == datum.targets.shape
            assert logprobs.dtype == np.float32
            assert np.isfinite(logprobs).all()
            assert (logprobs <= 1e-6).all()
            assert (logprobs[datum.weights != 0] < 0).any()

    def test_probabilities_sum_to_one(self, session: TrainingSession, tokenizer: Tokenizer) -> None:
        """Targets [T, K] with the whole vocabulary as candidates."""
        assert np.logaddexp.reduce(distribution(session, tokenizer, "Say a word.")) == pytest.approx(0.0, abs=1e-4)

    def test_fresh_adapter_is_the_base_model(self, backend: Backend, base_model: str, session: TrainingSession, batch: Batch) -> None:
        """B is zero at the start."""
        output, sampler = done(session.forward(batch, resolve("cross_entropy"))), backend.sampler(base_model)
        for datum, logprobs in zip(batch.data, output.logprobs, strict=True):
            start = int(np.flatnonzero(datum.weights)[0])
            ids = (*(int(token) for token in datum.tokens), int(datum.targets[-1]))
            close(done(sampler.compute_logprobs(ids[: start + 1], ids[start + 1 :])), logprobs[start:], tolerance=1e-3)

    def test_forward_is_forward_backward_without_traces(self, session: TrainingSession, batch: Batch) -> None:
        """Without dropout both give the same numbers, and forward changes nothing."""
        seen = [done(session.forward(batch, resolve("cross_entropy"))) for _ in range(2)]
        output = done(session.forward_backward(batch, resolve("cross_entropy")))
        assert seen[0].loss == seen[1].loss
        close(output.loss, seen[0].loss)
        for left, right in zip(output.logprobs, seen[0].logprobs, strict=True):
            close(left, right)

    def test_targets_of_weight_zero_do_not_count(self, session: TrainingSession, batch: Batch) -> None:
        """Other targets where the prompt is change nothing; even ones outside the vocabulary do not."""
        data = tuple(replace(datum, targets=np.where(datum.weights == 0, -100, datum.targets)) for datum in batch.data)
        close(done(session.forward(Batch(data=data), resolve("cross_entropy"))).loss, done(session.forward(batch, resolve("cross_entropy"))).loss)

    def test_datum_alone_is_the_datum_in_a_batch(self, session: TrainingSession, batch: Batch) -> None:
        """Neighbours and padding do not leak."""
        together = done(session.forward(batch, resolve("cross_entropy"))).logprobs
        for place, logprobs in enumerate(together):
            close(done(session.forward(_one(batch, place), resolve("cross_entropy"))).logprobs[0], logprobs)

    def test_order_of_data_does_not_matter(self, session: TrainingSession, batch: Batch) -> None:
        """The loss stays, the log-probs move with the data."""
        there = done(session.forward(batch, resolve("cross_entropy")))
        back = done(session.forward(_one(batch, 2, 1, 0), resolve("cross_entropy")))
        close(back.loss, there.loss)
        for left, right in zip(reversed(back.logprobs), there.logprobs, strict=True):
            close(left, right)

    def test_soft_targets_are_weighted_sums(self, session: TrainingSession, batch: Batch) -> None:
        """Two candidates of weight 0.7 and 0.3 give 0.7 and 0.3 times their own losses."""
        datum = batch.data[0]
        other = np.where(datum.weights != 0, (datum.targets + 1) % 200, datum.targets)
        weights = np.stack([0.7 * datum.weights, 0.3 * datum.weights], axis=1).astype(np.float32)
        soft = replace(datum, targets=np.stack([datum.targets, other], axis=1), weights=weights)
        losses = [done(session.forward(Batch(data=(one,)), resolve("cross_entropy"))).loss for one in (soft, datum, replace(datum, targets=other))]
        assert losses[0] == pytest.approx(0.7 * losses[1] + 0.3 * losses[2], rel=1e-4)

    @pytest.mark.usefixtures("parameters")
    def test_gradients_add_up(self, session: TrainingSession, batch: Batch) -> None:
        """Slices in two requests give the gradient of the whole batch: losses are summed, not averaged."""
        whole, parts = gradient(session, batch), gradient(session, _one(batch, 0, 1), _one(batch, 2))
        assert whole.keys() == parts.keys()
        for name, values in whole.items():
            close(parts[name], values)

    @pytest.mark.usefixtures("parameters")
    def test_gradient_scales_with_weights(self, session: TrainingSession, batch: Batch) -> None:
        """Twice the weights give twice the gradient and the same loss per weight."""
        double = Batch(data=tuple(replace(datum, weights=2 * datum.weights) for datum in batch.data))
        outputs = [done(session.forward(each, resolve("cross_entropy"))) for each in (batch, double)]
        close(outputs[1].loss, outputs[0].loss)
        once, twice = gradient(session, batch), gradient(session, double)
        for name, values in once.items():
            close(twice[name], 2 * values)

    @pytest.mark.usefixtures("parameters")
    def test_gradient_is_that_of_the_loss(self, backend: Backend, base_model: str, lora: LoraConfig, batch: Batch) -> None:
        """A small step against the gradient lowers the summed loss by as much as the gradient says."""
        session = backend.train(base_model, lora)
        found: Numbers = {}
        before = done(session.forward_backward(batch, resolve("cross_entropy")))
        done(session.optim_step(AdamConfig(lr=1e-4, eps=1e-12, max_grad_norm=None), observe(found)))
        after = done(session.forward(batch, resolve("cross_entropy")))
        expected = 1e-4 * sum(float(np.abs(values).sum()) for values in found.values())  # the first Adam step is lr · sign(gradient)
        assert (before.loss - after.loss) * before.weight == pytest.approx(expected, rel=0.1)

    @pytest.mark.parametrize("needs", ["logprobs", "logits"])
    def test_own_loss_function(self, backend: Backend, session: TrainingSession, batch: Batch, needs: str) -> None:
        """Cross-entropy written by a user, on log-probs or on logits, is cross-entropy."""
        own = resolve(own_cross_entropy) if needs == "logprobs" else Loss(name="own", fn=_from_logits, source="test", needs="logits")
        if needs == "logits" and backend.capabilities.gradients != "parameters":
            with pytest.raises(CapabilityError):
                done(session.forward_backward(batch, own))
            return
        output = done(session.forward_backward(batch, own))
        assert output.metrics["data"] == 3.0
        close(output.loss, done(session.forward(batch, resolve("cross_entropy"))).loss)
        done(session.optim_step(AdamConfig(lr=0.0)))
        if backend.capabilities.gradients == "parameters":
            left, right = gradient(session, batch, loss=own), gradient(session, batch)
            for name, values in left.items():
                close(values, right[name])

    def test_combined_losses_report_their_parts(self, session: TrainingSession, batch: Batch) -> None:
        """The loss is Σ factor · part."""
        output = done(session.forward(batch, combine({"cross_entropy": 0.5, "mse": 2.0})))
        assert output.loss == pytest.approx(0.5 * output.metrics["loss/cross_entropy"] + 2.0 * output.metrics["loss/mse"], rel=1e-5)

    def test_extras_reach_the_loss(self, session: TrainingSession, batch: Batch) -> None:
        """The divergence from the model's own log-probs is 0, and one nat away it is e − 2 per token."""
        seen = done(session.forward(batch, resolve("cross_entropy"))).logprobs
        for shift, expected in ((0.0, 0.0), (1.0, math.e - 2)):
            data = tuple(replace(datum, extras={"reference_logprobs": own + np.float32(shift)}) for datum, own in zip(batch.data, seen, strict=True))
            assert done(session.forward(Batch(data=data), resolve("kl"))).loss == pytest.approx(expected, abs=1e-4)


class TrainingContract(BackendFixtures):
    """What a step does."""

    def test_training_lowers_the_loss(self, session: TrainingSession, batch: Batch) -> None:
        """Thirty steps on three answers."""
        losses = [output.loss for output in train(session, batch, 30, lr=2e-2)]
        assert losses[-1] < 0.7 * losses[0]

    def test_steps_count_from_one(self, session: TrainingSession, batch: Batch) -> None:
        """And only steps count, not passes."""
        for step in (1, 2, 3):
            for _ in range(step):
                session.forward_backward(batch, resolve("cross_entropy"))
            assert done(session.optim_step(AdamConfig())).step == step

    def test_learning_rate_zero_leaves_the_weights(self, session: TrainingSession, batch: Batch) -> None:
        """Bit for bit."""
        train(session, batch, 2)
        before = done(session.forward(batch, resolve("cross_entropy")))
        train(session, batch, 2, lr=0.0)
        assert done(session.forward(batch, resolve("cross_entropy"))).loss == before.loss

    def test_submitting_ahead_changes_nothing(self, backend: Backend, base_model: str, lora: LoraConfig, batch: Batch) -> None:
        """Requests run in order: waiting for each gives the same bits, in another session with the same seed too."""
        ahead, waiting = backend.train(base_model, lora), backend.train(base_model, lora)
        losses = [output.loss for output in train(ahead, batch, 5)]
        assert losses == [output.loss for _ in range(5) for output in train(waiting, batch, 1)]
        assert len(set(losses)) == 5

    def test_sessions_are_independent(self, backend: Backend, base_model: str, lora: LoraConfig, batch: Batch) -> None:
        """Training one adapter does not move another on the same base model."""
        still, moved = backend.train(base_model, lora), backend.train(base_model, lora)
        before = done(still.forward(batch, resolve("cross_entropy"))).loss
        train(moved, batch)
        assert done(still.forward(batch, resolve("cross_entropy"))).loss == before
        assert done(moved.forward(batch, resolve("cross_entropy"))).loss != before

    def test_seed_decides_the_adapter(self, backend: Backend, base_model: str, lora: LoraConfig, batch: Batch) -> None:
        """Another seed trains to other numbers."""
        losses = [train(backend.train(base_model, replace(lora, seed=seed)), batch)[-1].loss for seed in (1, 1, 2)]
        assert losses[0] == losses[1] != losses[2]

    def test_dropout_is_for_training_only(self, backend: Backend, base_model: str, lora: LoraConfig, batch: Batch) -> None:
        """Two backward passes differ, two forward passes do not; the seed decides the masks."""
        if not backend.capabilities.dropout:
            pytest.skip("this backend has no dropout")
        seen = []
        for _ in range(2):
            session = backend.train(base_model, replace(lora, dropout=0.5))
            train(session, batch, 3)
            passes = [done(session.forward_backward(batch, resolve("cross_entropy"))).loss for _ in range(2)]
            assert passes[0] != passes[1]
            assert len({done(session.forward(batch, resolve("cross_entropy"))).loss for _ in range(2)}) == 1
            seen.append(passes)
        assert seen[0] == seen[1]

    @pytest.mark.usefixtures("parameters")
    def test_hook_sees_every_adapter_tensor(self, session: TrainingSession, backend: Backend, batch: Batch, tmp_path: Path) -> None:
        """Gradients have the names and shapes of the saved adapter; the reported norm is theirs, before clipping."""
        from safetensors.numpy import load_file

        found: Numbers = {}
        train(session, batch, 1)
        session.forward_backward(batch, resolve("cross_entropy"))
        output = done(session.optim_step(AdamConfig(max_grad_norm=1e-3), observe(found)))
        assert output.metrics["tensors"] == len(found)
        assert output.grad_norm == pytest.approx(math.sqrt(sum(float((values.astype(np.float64) ** 2).sum()) for values in found.values())), rel=1e-4)
        saved = load_file(backend.download(done(session.save("hooked")), tmp_path / "files").local_path / "adapter_model.safetensors")  # type: ignore[operator]
        assert {name: values.shape for name, values in saved.items()} == {name: values.shape for name, values in found.items()}

    @pytest.mark.usefixtures("parameters")
    @pytest.mark.parametrize("adam", [AdamConfig(lr=0.01, weight_decay=0.1), AdamConfig(lr=0.003, beta1=0.5, beta2=0.9, eps=1e-3, max_grad_norm=0.05)])
    def test_step_is_that_of_torch(self, session: TrainingSession, backend: Backend, batch: Batch, adam: AdamConfig, tmp_path: Path) -> None:
        """Three steps with the gradients that the hook saw, made again by `torch.optim.AdamW` and `clip_grad_norm_`."""
        import torch
        from safetensors.torch import load_file

        def weights(name: str) -> dict[str, torch.Tensor]:
            folder = backend.download(done(session.save(name)), tmp_path / name).local_path
            assert folder is not None
            found: dict[str, torch.Tensor] = load_file(folder / "adapter_model.safetensors")
            return found

        twin = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in weights("before").items()}
        optimizer = torch.optim.AdamW(twin.values(), lr=adam.lr, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay)
        for _ in range(3):
            found: Numbers = {}
            session.forward_backward(batch, resolve("cross_entropy"))
            done(session.optim_step(adam, observe(found)))
            for name, parameter in twin.items():
                parameter.grad = torch.tensor(found[name])
            if adam.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(twin.values(), adam.max_grad_norm)
            optimizer.step()
        for name, tensor in weights("after").items():
            torch.testing.assert_close(tensor, twin[name].detach(), rtol=1e-5, atol=1e-7)

    @pytest.mark.usefixtures("parameters")
    def test_hook_decides_the_step(self, session: TrainingSession, batch: Batch) -> None:
        """Zeroed gradients leave the weights; the norm is that of what the hook gave."""
        before = done(session.forward(batch, resolve("cross_entropy"))).loss
        session.forward_backward(batch, resolve("cross_entropy"))
        output = done(session.optim_step(AdamConfig(lr=0.1), lambda gradients, _: {name: values * 0 for name, values in gradients.items()}))
        assert output.grad_norm == 0.0
        assert done(session.forward(batch, resolve("cross_entropy"))).loss == before

    @pytest.mark.usefixtures("parameters")
    def test_bad_hooks_do_not_step(self, session: TrainingSession, batch: Batch) -> None:
        """A hook that raises, drops a tensor or makes NaN fails its step; the weights and the step number stay."""

        def raising(*_: object) -> Gradients:
            raise KeyError("from the hook")

        before = done(session.forward(batch, resolve("cross_entropy"))).loss
        hooks: tuple[tuple[type[Exception], Callable[[Gradients, Report], Gradients]], ...] = (
            (KeyError, raising),
            (BackendError, lambda gradients, _: dict(list(gradients.items())[1:])),
            (NumericError, lambda gradients, _: {name: values * float("nan") for name, values in gradients.items()}),
        )
        for error, hook in hooks:
            session.forward_backward(batch, resolve("cross_entropy"))
            with pytest.raises(error):
                done(session.optim_step(AdamConfig(), hook))
            assert done(session.forward(batch, resolve("cross_entropy"))).loss == before
        session.forward_backward(batch, resolve("cross_entropy"))
        assert done(session.optim_step(AdamConfig())).step == 1

    def test_hooks_need_parameters(self, session: TrainingSession, backend: Backend, batch: Batch) -> None:
        """Where there are no gradients of parameters a hook is refused, not ignored."""
        if backend.capabilities.gradients == "parameters":
            pytest.skip("this backend has hooks")
        session.forward_backward(batch, resolve("cross_entropy"))
        with pytest.raises(CapabilityError):
            done(session.optim_step(AdamConfig(), observe({})))
