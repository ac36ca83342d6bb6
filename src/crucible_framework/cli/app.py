"""Arguments in, exit code out: global flags, error rendering, JSON or human output.

Every command returns a `Reply`. With `--json` standard output gets exactly one JSON document and the text goes to standard error.
Exit codes: 0 ok · 2 usage or configuration · 65 bad data · 69 service unavailable · 70 internal · 74 I/O or disk full · 75 locked ·
76 numeric failure · 77 no or wrong key · 78 unsafe environment · 130/143 on signals, with a checkpoint saved.
"""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import MappingProxyType

import orjson
from cyclopts import App, CycloptsError
from rich.console import Console

from ..config import to_dict
from ..errors import CrucibleError
from .live import place
from .reply import Reply, typed

__all__ = ["build", "run"]

GLOBAL = {"--json": "json", "--quiet": "quiet", "-q": "quiet", "--debug": "debug"}
PARTS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "commands": ("demo", "train", "report", "datasets", "losses", "doctor", "eval"),
    "asking": ("sample",),
    "runs": ("runs", "db"),
    "models": ("checkpoints", "models"),
    "ensemble": ("ensemble",),
    "experiment": ("run", "compare", "leaks"),
    "quality": ("claims", "gate"),
    "trace": ("trace",),
    "serve": ("serve",),
    "ui": ("ui",),
})  # fmt: skip
"""Which file of this folder registers which commands: only the one that is asked for is imported, so that short commands start at once."""


def build(words: Sequence[str] = ()) -> App:
    """The command tree, or the part of it that the first word names."""
    app = App(
        name="crucible",
        help="Fine-tune LoRA adapters, ask them, and say with honest statistics which is better.\n\n"
        "Every command also takes --json (one JSON document on standard output), --quiet and --debug (tracebacks).",
        help_format="markdown",
        version_flags=["--version"],
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    for part in [part for part, names in PARTS.items() if words and words[0] in names] or PARTS:
        import_module(f".{part}", __package__).register(app)
    return app


def _say(reply: Reply, flags: set[str]) -> None:
    if "json" in flags:
        sys.stdout.buffer.write(orjson.dumps(to_dict(reply.data), default=str, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY))
        sys.stdout.buffer.flush()
    if "quiet" not in flags and reply.text:
        console = Console(stderr="json" in flags, soft_wrap=True, highlight=False, markup=False)
        console.print(reply.text)


def _fail(message: str, code: int, flags: set[str]) -> int:
    if "json" in flags:
        sys.stdout.buffer.write(orjson.dumps({"error": message, "exit_code": code}, option=orjson.OPT_APPEND_NEWLINE))
        sys.stdout.buffer.flush()
    print(f"crucible: {message}", file=sys.stderr)
    return code


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code; nothing but a bug escapes as an exception."""
    flags = {GLOBAL[word] for word in arguments if word in GLOBAL}
    words = [word for word in arguments if word not in GLOBAL]
    typed.set(shlex.join(["crucible", *words]))
    aloud = place.set(None if flags & {"json", "quiet"} else sys.stdout)
    try:
        reply = build(words)(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return _fail(f"{' '.join(str(error).split())} Ask `crucible --help`.", 2, flags)
    except CrucibleError as error:
        if "debug" in flags:
            traceback.print_exc()
        return _fail(str(error), error.exit_code, flags)
    except KeyboardInterrupt:
        return _fail("stopped.", 130, flags)
    except BrokenPipeError:
        return 0
    except Exception as error:
        if "debug" in flags:
            traceback.print_exc()
        return _fail(f"an internal error, {type(error).__name__}: {error}. Run again with --debug and report it.", 70, flags)
    finally:
        place.reset(aloud)
    if not isinstance(reply, Reply):
        return 0
    _say(reply, flags)
    return reply.exit_code
