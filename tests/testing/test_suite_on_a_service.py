"""The backend suite on a backend that is like a training service: no gradients of parameters, no logits, no dropout, its own layers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crucible_framework.backends.fake import FakeBackend, FakeSession
from crucible_framework.errors import CapabilityError
from crucible_framework.protocols import Backend, GradientHook, Loss
from crucible_framework.records import AdamConfig, Batch, LoraConfig, OptimOutput, StepOutput
from crucible_framework.testing import BackendContract

torch.set_num_threads(1)


class ServiceSession(FakeSession):
    """Refuses what needs the model's insides."""

    def forward_backward(self, batch: Batch, loss: Loss) -> Future[StepOutput]:
        if loss.needs == "logits":
            raise CapabilityError(f"The loss {loss.name!r} needs logits; this backend gives log-probs. Use the local backend.")
        return super().forward_backward(batch, loss)

    def optim_step(self, adam: AdamConfig, hook: GradientHook | None = None) -> Future[OptimOutput]:
        if hook is not None:
            raise CapabilityError("This backend gives no gradients of parameters; expected no hook. Use the local backend.")
        return super().optim_step(adam)


class Service(FakeBackend):
    capabilities = replace(FakeBackend.capabilities, name="service", gradients="logprobs", dropout=False, target_modules=False)

    def train(self, base_model: str, lora: LoraConfig) -> ServiceSession:
        made = super().train(base_model, lora)
        return ServiceSession(self, made._base, lora, made._tensors)


class TestService(BackendContract):
    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        with Service() as backend:
            yield backend


UNFINISHED = """
from crucible_framework.testing import BackendContract, LossContract

class TestNothing(LossContract):
    pass

class TestNowhere(BackendContract):
    pass
"""


def test_suites_say_what_to_override(tmp_path: Path) -> None:
    """A subclass without its fixture fails with the sentence that names it."""
    (tmp_path / "test_unfinished.py").write_text(UNFINISHED)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "is_described or what_it_can", "test_unfinished.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "2 errors" in done.stdout.splitlines()[-1], done.stdout + done.stderr
    for name in ("LossContract.loss", "BackendContract.backend"):
        assert f"{name} is not overridden; expected a fixture" in done.stdout
