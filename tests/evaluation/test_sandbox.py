"""Code that a model wrote: what passes, what fails, and what it cannot reach."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from crucible_framework.data import load_dataset
from crucible_framework.errors import UnsafeError
from crucible_framework.evaluation import sandbox
from crucible_framework.evaluation.sandbox import SandboxLimits, passes_tests, passes_tests_unsafely, program_of, run_program, sandbox_missing
from crucible_framework.records import Completion, Example

boxed = pytest.mark.skipif(bool(sandbox_missing()), reason=sandbox_missing() or "there is a sandbox")
EXAMPLE = Example(
    id="add", prompt="import math\n\n\ndef add(a, b):\n    \"\"\"The sum.\"\"\"\n", target="    return a + b\n",
    meta={"entry_point": "add", "test": "def check(f):\n    assert f(1, 2) == 3\n"},
)  # fmt: skip


def completion(text: str) -> Completion:
    return Completion(text=text, tokens=(), logprobs=(), stop_reason="stop", prompt_tokens=0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("    return a + b\n", 1.0),
        ("    return a + b\n\nprint(add('a', 1))\n", 1.0),
        ("    return a - b\n", 0.0),
        ("    return a +\n", 0.0),
        ("Here it is:\n```python\ndef add(a, b):\n    return math.fsum((a, b))\n```\nDone.", 1.0),
        ("def add(a, b):\n    return a + b\n", 1.0),
        ("    import os\n    os._exit(0)\n", 0.0),
        ("    raise SystemExit(0)\n", 0.0),
        ("    import sys\n    sys.__stdout__.write('x')\n    return 3\n", 0.0),
    ],
)
def test_what_passes(text: str, value: float) -> None:
    score = passes_tests_unsafely(EXAMPLE, completion(text))
    assert score.value == value, score.detail
    if not sandbox_missing():
        assert passes_tests(EXAMPLE, completion(text)).value == value


def test_what_runs_too_long_is_stopped() -> None:
    assert run_program("while True: pass", SandboxLimits(time_s=0.5), unsafe=True).outcome == "timeout"


def test_memory_and_files_are_limited(tmp_path: Path) -> None:
    assert "MemoryError" in run_program("x = bytearray(2**31)", SandboxLimits(memory_bytes=1 << 29), unsafe=True).error
    assert run_program("open('big', 'wb').write(bytes(2**22))", unsafe=True).outcome == "failed"
    assert not list(tmp_path.iterdir())


@boxed
def test_the_sandbox_has_no_network_and_no_files_of_ours(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("key", encoding="utf-8")
    assert run_program(f"open({str(secret)!r}).read()").outcome == "failed"
    assert run_program(f"open({str(secret)!r}).read()", unsafe=True).outcome == "passed", "without a sandbox it could be read"
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[object] = []
        server.settimeout(1)

        def accept() -> None:
            try:
                taken.append(server.accept())
            except TimeoutError:
                return

        waiting = threading.Thread(target=accept)
        waiting.start()
        port = server.getsockname()[1]
        assert run_program(f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)").outcome == "failed"
        waiting.join()
        assert not taken
    assert run_program("open('/usr/x', 'w')").outcome == "failed"
    assert run_program("import os; assert not os.environ.get('HOME')").outcome == "passed"


def test_without_a_sandbox_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "sandbox_missing", lambda: "'bwrap' is not installed")
    with pytest.raises(UnsafeError, match="bubblewrap") as refused:
        passes_tests(EXAMPLE, completion("    return a + b\n"))
    assert refused.value.exit_code == 78


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "not installed" in sandbox_missing.__wrapped__()


def test_an_example_without_tests_has_no_score() -> None:
    assert passes_tests_unsafely(Example(id="a", prompt="p", target="t"), completion("x")).value is None


def test_the_program_holds_prompt_completion_and_tests() -> None:
    program = program_of(EXAMPLE, "    return 1\n\ndef other():\n    pass\n")
    assert "other" not in program
    assert program.endswith("check(add)\n")


@boxed
def test_the_authors_solutions_pass(real_data: Path) -> None:
    for example in load_dataset("humaneval", split="test", limit=20, data=real_data):
        score = passes_tests(example, completion(example.target))
        assert score.value == 1.0, (example.id, score.detail)
