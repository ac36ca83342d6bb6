"""The tinker backend keeps the backend contract against our own server, through the unmodified SDK."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from crucible_framework.backends import connect
from crucible_framework.protocols import Backend, Tokenizer, TrainingSession
from crucible_framework.records import Batch, LoraConfig
from crucible_framework.testing import BackendContract

torch.set_num_threads(1)

_spec = importlib.util.spec_from_file_location("serving_for_tests", Path(__file__).parents[1] / "server" / "serving_for_tests.py")
assert _spec is not None
assert _spec.loader is not None
serving = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = serving
_spec.loader.exec_module(serving)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving.server_process("fake", tmp_path_factory.mktemp("serve")) as address:
        yield address


class TestTinkerBackend(BackendContract):
    @pytest.fixture
    def backend(self, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
        monkeypatch.delenv("TINKER_API_KEY", raising=False)
        backend = connect("tinker", base_url=url)
        yield backend
        backend.close()

    @pytest.mark.slow
    def test_end_of_turn_is_learnt(self, session: TrainingSession, batch: Batch, tokenizer: Tokenizer) -> None:
        """Some hundred steps, each through HTTP."""
        super().test_end_of_turn_is_learnt(session, batch, tokenizer)

    @pytest.mark.slow
    def test_stops(self, session: TrainingSession, batch: Batch, tokenizer: Tokenizer) -> None:
        """Likewise."""
        super().test_stops(session, batch, tokenizer)

    @pytest.fixture
    def lora(self) -> LoraConfig:
        """What a service honours: rank and seed."""
        return LoraConfig(rank=4, dropout=0.0)
