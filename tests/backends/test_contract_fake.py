"""The fake backend keeps the backend contract."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from crucible_framework.backends.fake import FakeBackend
from crucible_framework.protocols import Backend
from crucible_framework.records import LoraConfig
from crucible_framework.testing import BackendContract

torch.set_num_threads(1)


class TestFakeBackend(BackendContract):
    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        with FakeBackend() as backend:
            yield backend


class TestFakeBackendWithEveryLayer(BackendContract):
    """The other base model, and adapters on every layer."""

    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        with FakeBackend() as backend:
            yield backend

    @pytest.fixture
    def base_model(self) -> str:
        return "fake"

    @pytest.fixture
    def lora(self) -> LoraConfig:
        return LoraConfig(rank=3, alpha=4.5, dropout=0.0, target_modules=("all-linear",), seed=5)
