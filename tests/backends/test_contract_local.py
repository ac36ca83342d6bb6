"""The local engine keeps the backend contract on its built-in tiny model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from crucible_framework.backends import connect
from crucible_framework.protocols import Backend
from crucible_framework.testing import BackendContract

torch.set_num_threads(1)


class TestLocalBackend(BackendContract):
    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        backend = connect("local")
        yield backend
        backend.close()
