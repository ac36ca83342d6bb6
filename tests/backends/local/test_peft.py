"""PEFT is the oracle: same start → same loss and gradients; what is saved loads there with equal logits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crucible_framework.backends.local import LocalBackend
from crucible_framework.backends.local.loading import tiny_model
from crucible_framework.protocols import GradientHook, Gradients, Report
from crucible_framework.records import AdamConfig, Batch, Datum, LoraConfig

from .models_for_tests import CE, CE_FROM_LOGITS, batch

TARGETS = [("q_proj", "v_proj"), ("all-linear",), ("down_proj", "lm_head")]


@pytest.fixture(params=["tiny", "qwen"])
def name(request: pytest.FixtureRequest, qwen: Path) -> str:
    return "tiny" if request.param == "tiny" else str(qwen)


def fresh_model(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    return tiny_model() if name == "tiny" else AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)


def peft_loss(model: Any, data: Batch) -> torch.Tensor:
    """One example at a time, without padding, written as plainly as can be."""
    total = torch.zeros(())
    for datum in data.data:
        logits = model(input_ids=torch.tensor(datum.tokens, dtype=torch.int64)[None]).logits[0]
        logp = logits.log_softmax(-1).gather(-1, torch.tensor(datum.targets)[:, None])[:, 0]
        total = total - (torch.tensor(datum.weights) * logp).sum()
    return total


def capture(into: dict[str, torch.Tensor]) -> GradientHook:
    def hook(gradients: Gradients, _report: Report) -> Gradients:
        into.update({name: gradient.clone() for name, gradient in gradients.items()})
        return gradients

    return hook


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("loss", [CE, CE_FROM_LOGITS], ids=["logprobs", "logits"])
def test_loss_gradients_and_saved_adapter(shared: LocalBackend, name: str, targets: tuple[str, ...], loss: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    lora = LoraConfig(rank=4, alpha=10.0, dropout=0.0, target_modules=targets, seed=7)
    data = batch(5, 17, 16, 9, weighted=4)
    session = shared.train(name, lora)
    for _ in range(2):  # so that B is no longer zero
        session.forward_backward(data, loss)
        session.optim_step(AdamConfig(lr=0.02))
    checkpoint = session.save("trained", "sampler").result()
    folder = shared.download(checkpoint, tmp_path / "adapter").local_path
    assert folder is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(fresh_model(name), str(folder), is_trainable=True)
    model.eval()

    found: dict[str, torch.Tensor] = {}
    output = session.forward_backward(data, loss)
    session.optim_step(AdamConfig(lr=0.0), capture(found)).result()
    expected = peft_loss(model, data)
    torch.autograd.backward(expected)
    theirs = {key.replace(".default", ""): parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert output.result().loss * output.result().weight == pytest.approx(float(expected.detach()), rel=1e-5)
    assert found.keys() == theirs.keys()
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in found.values())
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, theirs[key], rtol=1e-4, atol=1e-4)

    prompt = np.arange(3, 15)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(prompt)[None]).logits[0]
    logp = logits.log_softmax(-1)[torch.arange(11), torch.tensor(prompt[1:])]
    ours = shared.sampler(checkpoint).compute_logprobs((3,), tuple(int(t) for t in prompt[1:])).result()
    np.testing.assert_allclose(ours, logp.numpy(), atol=1e-4)


def test_start_has_the_shapes_and_scale_of_peft(shared: LocalBackend, name: str, tmp_path: Path) -> None:
    """PEFT draws A from the global generator; ours from a private one with the session's seed: the same distribution and B zero."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from safetensors.torch import load_file

    folder = shared.download(shared.train(name, LoraConfig(rank=16)).save("x", "sampler").result(), tmp_path / "a").local_path
    assert folder is not None
    ours = load_file(folder / "adapter_model.safetensors")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(fresh_model(name), PeftConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    theirs = {key.replace(".default", ""): parameter.detach() for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: tensor.shape for key, tensor in theirs.items()}
    for key, tensor in ours.items():
        assert float(tensor.abs().max()) == pytest.approx(float(theirs[key].abs().max()), rel=0.02, abs=0)
        assert float(tensor.std()) == pytest.approx(float(theirs[key].std()), rel=0.15, abs=0)


def test_logprobs_where_weighted_and_zero_elsewhere(shared: LocalBackend, name: str) -> None:
    model = fresh_model(name)
    data = batch(6, 11, weighted=4)
    for output in (shared.train(name, LoraConfig()).forward(data, CE).result(), shared.train(name, LoraConfig()).forward_backward(data, CE).result()):
        for datum, logprobs in zip(data.data, output.logprobs, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor(datum.tokens, dtype=torch.int64)[None]).logits[0]
            logp = logits.log_softmax(-1).gather(-1, torch.tensor(datum.targets)[:, None])[:, 0].numpy()
            assert logprobs.dtype == np.float32
            np.testing.assert_allclose(logprobs, np.where(datum.weights != 0, logp, 0), atol=1e-4)


def test_candidates_per_position(shared: LocalBackend, name: str) -> None:
    data = batch(9, 4, weighted=3, candidates=5)
    output = shared.train(name, LoraConfig()).forward(data, CE).result()
    model, total = fresh_model(name), 0.0
    for datum, logprobs in zip(data.data, output.logprobs, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(datum.tokens, dtype=torch.int64)[None]).logits[0]
        logp = logits.log_softmax(-1).gather(-1, torch.tensor(datum.targets)).numpy()
        np.testing.assert_allclose(logprobs[-3:], logp[-3:], atol=1e-4)
        total -= float((datum.weights * logp).sum())
    assert output.loss * output.weight == pytest.approx(total, rel=1e-4)


def test_all_weights_zero_still_gives_logprobs(shared: LocalBackend) -> None:
    data = batch(6, weighted=6).data[0]
    silent = Datum(id="s", tokens=data.tokens, targets=data.targets, weights=np.zeros_like(data.weights))
    session = shared.train("tiny", LoraConfig())
    heard = session.forward(Batch(data=(data,)), CE).result()
    output = session.forward(Batch(data=(silent,)), CE).result()
    assert (output.loss, output.weight) == (0.0, 1.0)
    np.testing.assert_allclose(output.logprobs[0], heard.logprobs[0], atol=1e-6)
