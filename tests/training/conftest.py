"""What the trainer's tests share: a small real data set and a backend that takes milliseconds a step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from crucible_framework.backends import connect
from crucible_framework.data import load_dataset
from crucible_framework.protocols import Backend
from crucible_framework.records import Dataset


@pytest.fixture(scope="session")
def claims() -> Dataset:
    """Forty claims that we ship."""
    return load_dataset("minifact", split="train", limit=40)


@pytest.fixture
def backend() -> Iterator[Backend]:
    """The fake backend, fresh."""
    with connect("fake") as engine:
        yield engine
