"""One engine and one small Hugging Face folder for all tests of the local backend."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from crucible_framework.backends.local import LocalBackend

from .models_for_tests import make_qwen

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen2 with a tokenizer."""
    return make_qwen(tmp_path_factory.mktemp("qwen") / "model")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalBackend]:
    """An open backend that keeps its base models over the tests."""
    with LocalBackend(threads=1, cache=tmp_path_factory.mktemp("cache")) as backend:
        yield backend


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[LocalBackend]:
    """A backend of the test's own."""
    with LocalBackend(threads=1, cache=tmp_path / "cache") as opened:
        yield opened
