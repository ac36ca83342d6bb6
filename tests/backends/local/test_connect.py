"""Opening backends by name, their options, and the end of a backend."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest

from crucible_framework.backends import Connection, backends, connect
from crucible_framework.backends.local import LocalBackend
from crucible_framework.errors import ConfigError, SessionClosedError, UnknownNameError
from crucible_framework.records import AdamConfig, LoraConfig, SamplingParams

from .models_for_tests import CE, batch


def test_importing_backends_loads_no_torch() -> None:
    code = "import sys, crucible_framework.backends as b; b.backends.names(); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0


def _fits(backend: LocalBackend) -> Connection:
    """The type checker holds the backend, its sessions and its samplers to the contract."""
    return backend


def test_known_backends() -> None:
    assert {"fake", "local"} <= set(backends.names())


def test_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'local'"):
        connect("locall")


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"No option of the backend 'local' is called 'dtyp'\. Did you mean 'dtype'"):
        connect("local", dtyp="float32")


def test_a_callable_is_a_backend_and_must_get_what_it_needs(tmp_path: Path) -> None:
    def make(cache: Path) -> LocalBackend:
        return LocalBackend(cache=cache, threads=1)

    with pytest.raises(ConfigError, match="missing a required argument: 'cache'"):
        connect(make)
    with connect(make, cache=tmp_path) as backend:
        assert backend.capabilities.name == "local"


def test_a_maker_may_take_any_option() -> None:
    def make(**options: object) -> LocalBackend:
        assert options == {"anything": 1}
        return LocalBackend(threads=1)

    connect(make, anything=1).close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype is 'float8'; expected 'auto', 'float32', 'bfloat16' or 'int8'"),
        ({"threads": 0}, "threads is 0; expected a whole number of at least 1"),
        ({"threads": True}, "threads is True"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"engine": "warp"}, "engine is 'warp'; expected 'fast', 'torch' or 'plain'"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        connect("local", **options)


def test_close_finishes_what_was_submitted_and_refuses_the_rest() -> None:
    backend = LocalBackend(threads=1)
    session = backend.train("tiny", LoraConfig())
    steps: list[Future[object]] = []
    for _ in range(3):
        session.forward_backward(batch(5, 7), CE)
        steps.append(session.optim_step(AdamConfig()))  # type: ignore[arg-type]
    sampler = session.sampler()
    drawn = sampler.sample("hello", SamplingParams(max_tokens=3), n=2)
    backend.close()
    backend.close()
    assert [step.result(0).step for step in steps] == [1, 2, 3]  # type: ignore[attr-defined]
    assert len(drawn.result(0)) == 2
    for refused in (
        lambda: session.forward(batch(3), CE),
        lambda: sampler.sample("x", SamplingParams()),
        lambda: backend.train("tiny", LoraConfig()),
        lambda: backend.sampler("tiny"),
        lambda: backend.tokenizer("tiny"),
    ):
        with pytest.raises(SessionClosedError, match="closed"):
            refused()


def test_a_closed_session_refuses_and_the_backend_goes_on(backend: LocalBackend) -> None:
    session = backend.train("tiny", LoraConfig())
    first = session.forward(batch(4), CE)
    session.close()
    assert first.result().weight > 0
    for refused in (lambda: session.forward(batch(3), CE), lambda: session.save("x"), session.sampler):
        with pytest.raises(SessionClosedError, match="The session on 'tiny' is closed"):
            refused()
    assert backend.train("tiny", LoraConfig()).forward(batch(3), CE).result().loss > 0


def test_tokenizers(shared: LocalBackend, qwen: Path) -> None:
    assert shared.tokenizer("tiny").name == "bytes"
    assert shared.tokenizer(str(qwen)) is shared.tokenizer(f"{qwen}/")
    assert shared.tokenizer(str(qwen)).eos_ids == (2,)
