"""What holds for every test: one thread per process, no hub, no network but loopback, a cache of its own, steady hypothesis settings."""

from __future__ import annotations

import ipaddress
import os
import runpy
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before numpy or torch load: xdist workers share the cores
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

if _without := os.environ.get("CRUCIBLE_TEST_WITHOUT"):  # amx or avx512: as if this processor had none, in compiled code and in torch
    _instructions = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "instructions.py"))
    _instructions["switch_off"](_instructions["features"](_without))

settings.register_profile("local", deadline=None, max_examples=50)
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

_REAL_DATA = os.environ.get("CRUCIBLE_DATA")  # as the caller set it, before tests get places of their own
_LOCAL_NAMES = {"", "localhost", "ip6-localhost", socket.gethostname()}


def _is_local(host: object) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if name is None or (isinstance(name, str) and name in _LOCAL_NAMES):
        return True
    try:
        address = ipaddress.ip_address(str(name))
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _refuse(host: object) -> None:
    if not _is_local(host):
        # Not an Exception, so that code which falls back when a service is out of reach cannot hide the attempt.
        pytest.fail(f"the test asked the network for {host!r}; tests may only use loopback")


@pytest.fixture(autouse=True, scope="session")
def _loopback_only() -> Iterator[None]:
    """Every connection and look-up that leaves the machine fails the test that makes it."""

    def guard_address(real: Callable[..., object], position: int) -> Callable[..., object]:
        def call(self: socket.socket, *args: object) -> object:
            address = args[position]
            if self.family != socket.AF_UNIX and isinstance(address, tuple):
                _refuse(address[0])
            return real(self, *args)

        return call

    def guard_lookup(real: Callable[..., object]) -> Callable[..., object]:
        def call(host: object, *args: object, **kwargs: object) -> object:
            _refuse(host)
            return real(host, *args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guard_address(socket.socket.connect, 0))
        patch.setattr(socket.socket, "connect_ex", guard_address(socket.socket.connect_ex, 0))
        patch.setattr(socket.socket, "sendto", guard_address(socket.socket.sendto, -1))
        patch.setattr(socket, "getaddrinfo", guard_lookup(socket.getaddrinfo))
        yield


@pytest.fixture(autouse=True)
def _own_places(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The folders that the environment decides are the test's own; a slow test uses the user's cache and data, to fetch nothing twice."""
    own = tmp_path_factory.getbasetemp() / f"places-{uuid.uuid4().hex[:8]}"  # made only by tests that write there
    monkeypatch.setenv("CRUCIBLE_RUNS", str(own / "runs"))
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setenv("CRUCIBLE_CACHE", str(own / "cache"))
        monkeypatch.delenv("CRUCIBLE_DATA", raising=False)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets that the caller names with `CRUCIBLE_DATA`; a test that needs it is skipped without it."""
    if not _REAL_DATA or not Path(_REAL_DATA).is_dir():
        pytest.skip("CRUCIBLE_DATA names no folder of real data sets")
    return Path(_REAL_DATA).resolve()
