"""Running code that a model wrote, in a sandbox: no network, own namespaces, an empty file system, limits on time, memory, files and processes.

The sandbox is bubblewrap (`bwrap`, Linux). Where there is none, nothing runs, unless the caller says `unsafe=True` and means it: then only
the limits hold. A program passes when it runs to its end and says a word that it cannot know beforehand, so leaving early is no success.
This file does not know prompts or scores of anything else. Source of the scheme: Chen et al. 2021, arXiv 2107.03374, section 2.3.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

from ..errors import UnsafeError
from ..records import Completion, Example, Score, record

__all__ = ["Ran", "SandboxLimits", "passes_tests", "passes_tests_unsafely", "program_of", "require_sandbox", "run_program", "sandbox_missing"]

_STOPS = re.compile(r"\n(?=class |def |#|if |print|@|assert )")
_FENCE = re.compile(r"```(?:python|py)?\s*\n(.*?)(?:```|\Z)", re.DOTALL)
_INSIDE = """
import json, resource, sys
given = json.loads(sys.stdin.readline())
for name, value in given["limits"].items():
    resource.setrlimit(getattr(resource, name), (value, value))
word, say = given["word"], sys.stdout
del given["word"]
sys.stdout = sys.stderr
exec(compile(given["program"], "<program>", "exec"), {"__name__": "__main__"})
say.write(word)
say.flush()
"""


@record
class SandboxLimits:
    """What one program may use.

    Attributes:
        time_s: of the wall clock; of the processor the same, rounded up.
        memory_bytes: address space.
        file_bytes: the largest file, and what the error text may be.
        processes: of the user, where the kernel counts them per namespace.
    """

    time_s: float = 10.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    processes: int = 64


@record
class Ran:
    """How a program ended. `error` is the end of what it wrote to standard error, or what stopped it."""

    outcome: Literal["passed", "failed", "timeout"]
    error: str = ""


def _command(unsafe: bool) -> list[str]:
    python = str(Path(sys.executable).resolve())
    inside = [python, "-I", "-S", "-c", _INSIDE]
    if unsafe:
        return inside
    bound = ["--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/lib", "/lib64"):
        path = Path(name)
        if path.is_symlink():
            bound += ["--symlink", str(path.readlink()), name]
        elif path.is_dir():
            bound += ["--ro-bind", name, name]
    prefix = Path(sys.base_prefix).resolve()
    if not prefix.is_relative_to("/usr"):
        bound += ["--ro-bind", str(prefix), str(prefix)]
    alone = ["--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]  # noqa: S108 - of the sandbox
    return [shutil.which("bwrap") or "bwrap", *alone, *bound, "--chdir", "/tmp", *inside]  # noqa: S108 - of the sandbox


def run_program(program: str, limits: SandboxLimits | None = None, *, unsafe: bool = False) -> Ran:
    """Runs a Python program to its end, with the standard library alone.

    Args:
        program: source text.
        limits: ten seconds and 1 GiB where None.
        unsafe: run it with the limits but without a sandbox, as this user: it can read and delete your files.

    Raises:
        UnsafeError: there is no working sandbox here, and `unsafe` is off.
    """
    if not unsafe:
        require_sandbox("unsafe=True")
    return _run(program, limits or SandboxLimits(), unsafe=unsafe)


def _run(program: str, limits: SandboxLimits, *, unsafe: bool) -> Ran:
    word = secrets.token_hex(16)
    rlimits = {"RLIMIT_CPU": int(limits.time_s) + 1, "RLIMIT_AS": limits.memory_bytes, "RLIMIT_FSIZE": limits.file_bytes, "RLIMIT_NOFILE": 64, "RLIMIT_CORE": 0}
    if not unsafe:
        rlimits["RLIMIT_NPROC"] = limits.processes
    given = json.dumps({"program": program, "word": word, "limits": rlimits}) + "\n"
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "errors").open("w+b") as errors, (Path(folder) / "said").open("w+b") as said:
        try:
            done = subprocess.run(  # noqa: S603 - running it is what this file is for
                _command(unsafe), input=given.encode(), stdout=said, stderr=errors, timeout=limits.time_s, check=False, cwd=folder,
                env={"PATH": "/usr/bin:/bin"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Ran(outcome="timeout", error=f"still running after {limits.time_s:g} s")
        said.seek(0)
        if done.returncode == 0 and said.read(len(word) + 1) == word.encode():
            return Ran(outcome="passed")
        errors.seek(max(0, errors.seek(0, 2) - 2000))
        told = errors.read().decode(errors="replace").strip()
    return Ran(outcome="failed", error=told or f"ended early with code {done.returncode}")


def require_sandbox(way_out: str) -> None:
    """Refuses where there is no working sandbox; `way_out` is what runs code without one.

    Raises:
        UnsafeError: there is none (exit code 78).
    """
    if why := sandbox_missing():
        raise UnsafeError(f"Code that a model wrote needs a sandbox, and {why}. Install bubblewrap, or run it unprotected with {way_out}.")


@functools.cache
def sandbox_missing() -> str:
    """Why there is no working sandbox here; "" where there is one. A trivial program is run once to know."""
    if shutil.which("bwrap") is None:
        return "'bwrap' is not installed"
    tried = _run("pass", SandboxLimits(), unsafe=False)
    return "" if tried.outcome == "passed" else f"'bwrap' does not work here ({tried.error.splitlines()[-1] if tried.error else tried.outcome})"


def program_of(example: Example, completion: str) -> str:
    """The program that tests a completion: prompt, completion and the example's own tests.

    A completion goes on where the prompt ends, until it begins something new at the left margin; one that holds a fenced block or defines
    the function itself is taken whole, after the prompt's own lines before the function.
    """
    prompt, entry = str(example.prompt), str(example.meta["entry_point"])
    block = _FENCE.search(completion)
    code = block[1] if block else completion
    if re.search(rf"^def {re.escape(entry)}\b", code, re.MULTILINE):
        body = prompt[: prompt.find(f"def {entry}")] + code
    else:
        body = prompt + _STOPS.split("\n" + code, maxsplit=1)[0].removeprefix("\n") if not block else prompt + code
    return f"{body}\n\n{example.meta['test']}\n\ncheck({entry})\n"


def _passes(example: Example, completion: Completion, *, unsafe: bool) -> Score:
    if "entry_point" not in example.meta or "test" not in example.meta:
        return Score(name="passes_tests", value=None, detail="the example has no tests")
    ran = run_program(program_of(example, completion.text), unsafe=unsafe)
    return Score(name="passes_tests", value=float(ran.outcome == "passed"), detail=ran.error.splitlines()[-1] if ran.error else ran.outcome)


def passes_tests(example: Example, completion: Completion) -> Score:
    """1 where the completed function passes the example's tests (`meta` "test" and "entry_point", as in HumanEval), in a sandbox.

    Raises:
        UnsafeError: there is no working sandbox here.
    """
    return _passes(example, completion, unsafe=False)


def passes_tests_unsafely(example: Example, completion: Completion) -> Score:
    """The same without a sandbox: what the model wrote runs as you. Only where the whole machine may be thrown away."""
    return _passes(example, completion, unsafe=True)
