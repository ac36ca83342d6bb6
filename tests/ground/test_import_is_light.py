"""`import crucible_framework` stays cheap, and the tests' own guards hold. How long the import takes is a benchmark's to say."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import crucible_framework as cf
from crucible_framework.config import places

HEAVY = ("torch", "scipy", "pydantic", "transformers", "tokenizers", "safetensors.torch", "rich", "cyclopts", "jinja2")
GROUND = ("errors", "records", "protocols", "config", "plugins", "events", "clock", "files")
WITHOUT_TENSORS = ("data", "losses", "stats", "backends", "store", "training", "evaluation", "reports")


def loaded_by(code: str) -> list[str]:
    """Which heavy modules a fresh interpreter has loaded after the code."""
    check = f"{code}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]})
    return done.stdout.split()


@pytest.mark.parametrize(
    "code",
    [
        "import crucible_framework",
        "import " + ", ".join(f"crucible_framework.{name}" for name in GROUND),
        "import " + ", ".join(f"crucible_framework.{name}" for name in WITHOUT_TENSORS),
        "import crucible_framework as cf; cf.TrainConfig(); cf.load_dataset('minifact'); cf.list_runs",
    ],
    ids=["package", "ground", "folders", "first use"],
)
def test_fresh_import_loads_nothing_heavy(code: str) -> None:
    assert loaded_by(code) == []


def test_the_check_sees_what_is_loaded() -> None:
    assert loaded_by("import pydantic") == ["pydantic"]


def test_the_face_lists_what_it_has_and_nothing_else() -> None:
    assert sorted(cf.__all__) == dir(cf)
    missing = [name for name in cf.__all__ if getattr(cf, name, None) is None]
    assert missing == []
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = cf.no_such_name


@pytest.mark.parametrize("host", ["192.0.2.1", "example.org", "2001:db8::1"])
def test_the_network_is_out_of_reach_of_tests(host: str) -> None:
    with pytest.raises(pytest.fail.Exception, match="asked the network"):
        socket.create_connection((host, 80), timeout=1)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as datagram, pytest.raises(pytest.fail.Exception):
        datagram.sendto(b"x", (host, 80))


def test_loopback_is_open_to_tests() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(("localhost", server.getsockname()[1]), timeout=5) as client:
        assert client.getpeername()[0] == "127.0.0.1"


def test_the_places_of_a_test_are_its_own() -> None:
    found = places()
    assert found.offline
    assert found.data is None
    assert not found.cache.exists()
    assert found.cache.parent == found.runs.parent
    assert not found.cache.is_relative_to(Path.home() / ".cache")
