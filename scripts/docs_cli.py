"""Writes docs/cli.md, the reference of the `crucible` command, from the command itself.

usage: python scripts/docs_cli.py   (a test says when the page is out of date)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from crucible_framework.cli.app import build

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
HEAD = """<!-- written by scripts/docs_cli.py: change the command, not this page -->
# The command

"""
TAIL = """
## Exit codes

| code | meaning |
|---|---|
| 0 | done |
| 2 | a flag, a setting or a name is wrong |
| 65 | the data cannot be used |
| 69 | a service is not available |
| 70 | a failure inside; `--debug` shows where |
| 74 | reading or writing failed, or the disk is full |
| 75 | another process holds the folder; try later |
| 76 | a loss or gradient is not finite |
| 77 | no key, or the wrong one |
| 78 | the environment is not safe for what was asked |
| 130, 143 | stopped by a signal; a checkpoint was saved |
"""


def page() -> str:
    """The whole page; it does not depend on the terminal or on who runs this."""
    words, sys.argv = sys.argv, ["crucible"]  # cyclopts writes the running program's name into usage lines
    try:
        body = build().generate_docs(output_format="markdown", heading_level=1)
    finally:
        sys.argv = words
    body = re.sub(r"\A\s*# .*\n+", "", body)
    body = re.sub(r"^## Table of Contents\n.*?(?=^\*\*Commands\*\*)", "", body, flags=re.DOTALL | re.MULTILINE)  # the site has its own
    body = "\n".join(line.rstrip() for line in body.splitlines())
    return HEAD + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n" + TAIL


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
