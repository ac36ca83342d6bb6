"""The `crucible` command: words to calls, results to text or JSON, errors to exit codes. It holds no knowledge of its own."""

from .app import run

__all__ = ["run"]
