"""C++ kernels, compiled for this processor on first use and kept in the user's cache; without a compiler there are none.

Sources lie beside this file and need no headers but the compiler's own. This file does not know what the kernels compute; whoever asks
for a library has another way to the same numbers.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path

from filelock import FileLock

from .... import events
from ....errors import StoreError
from ....files import storage_errors

__all__ = ["compiler", "library"]

FOLDER = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-shared", "-fPIC", "-w")
_TIMEOUT_S = 300
_LOCK = threading.Lock()
_LOADED: dict[str, ctypes.CDLL | None] = {}


def library(source: str, folder: Path) -> ctypes.CDLL | None:
    """The compiled library of `source`, a file beside this one, or None where it cannot be had; the event `native.unavailable` says why.

    It uses the OpenMP threads that torch has, where the compiler knows OpenMP; import torch first.

    Args:
        source: the .cpp file's name.
        folder: where compiled libraries are kept, one per source, compiler and processor; a process looks once.
    """
    with _LOCK:
        if source not in _LOADED:
            try:
                _LOADED[source] = ctypes.CDLL(str(_compiled(source, folder)))
            except (StoreError, OSError, RuntimeError, subprocess.SubprocessError) as error:
                events.emit("native.unavailable", source=source, reason=str(error)[:500])
                _LOADED[source] = None
        return _LOADED[source]


def compiler() -> str | None:
    """The C++ compiler that is used, or None."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def _compiled(source: str, folder: Path) -> Path:
    """The library's file, made where it is not there.

    Raises:
        RuntimeError: there is no compiler, or it refuses.
    """
    program = compiler()
    if program is None:
        raise RuntimeError(f"no C++ compiler; looked for {', '.join(COMPILERS)}")
    texts = b"".join(path.read_bytes() for path in sorted([FOLDER / source, *FOLDER.glob("*.h")]))
    name = hashlib.sha256("\0".join((_version(program), _processor(), *FLAGS)).encode() + texts).hexdigest()[:24]
    final = folder / f"{Path(source).stem}-{name}.so"
    if final.is_file():
        return final
    with storage_errors(final):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(final.with_suffix(".lock")):
            if not final.is_file():
                with events.span("native.compiled", source=source), tempfile.TemporaryDirectory(dir=folder) as work:
                    made = Path(work) / "made.so"
                    words = _run(program, "-fopenmp", source=source, target=made)
                    if words and (words := _run(program, source=source, target=made)):
                        raise RuntimeError(f"{program} could not compile {source}: {words}")
                    made.replace(final)
    return final


def _run(program: str, *more: str, source: str, target: Path) -> str:
    """Compiles; the compiler's complaint where it fails, else nothing."""
    command = [program, *FLAGS, *more, str(FOLDER / source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)  # noqa: S603 - fixed arguments, no shell
    return (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""


@cache
def _version(program: str) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout  # noqa: S603 - fixed arguments


@cache
def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
