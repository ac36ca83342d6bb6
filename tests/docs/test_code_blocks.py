"""README and documentation are executed: every page's code runs as a reader would run it, in order, in an empty folder.

How a block is marked (the marks are HTML comments on the line before it, which readers do not see):
    ```python                     runs; all blocks of a page are one session
    ```toml title="first.toml"    is written to that file (any language); a file test_… is run by pytest after the page
    ```sh after <!-- run -->      its lines that start with `crucible` run
    <!-- not run: why -->         is left out; Python must still compile and name only what the package has
A page becomes one script whose line numbers are the page's own, so a traceback points into the page.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

import crucible_framework as cf
from crucible_framework.losses import losses

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(p for p in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
LOSS_PAGES = ROOT / "docs" / "losses"
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)(?P<rest>.*)$")
HEAD = "import sys as _sys; from crucible_framework.cli import run as _crucible"
TIMEOUT_S = 240


@dataclass(frozen=True)
class Block:
    """A fenced block: its first line (from 1), language, file name, mark and source."""

    line: int
    language: str
    title: str
    mark: str
    source: str

    @property
    def runs(self) -> bool:
        if self.mark.startswith("not run") or self.title:
            return False
        return self.language == "python" or (self.language == "sh" and self.mark == "run")


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found: list[Block] = []
    lines = text.splitlines()
    opened: tuple[int, re.Match[str]] | None = None
    for number, line in enumerate(lines, 1):
        fence = FENCE.match(line)
        if opened is None and fence:
            opened = number, fence
        elif opened is not None and fence and not fence["language"] and not fence["rest"].strip() and fence["indent"] == opened[1]["indent"]:
            start, first = opened
            mark = re.search(r"<!--\s*(.*?)\s*-->", lines[start - 2]) if start > 1 else None
            title = re.search(r'title="([^"]+)"', first["rest"])
            source = textwrap.dedent("\n".join(lines[start : number - 1]))
            found.append(Block(start + 1, first["language"], title[1] if title else "", mark[1] if mark else "", source))
            opened = None
    assert opened is None, f"the block of line {opened and opened[0]} has no end"
    return found


def commands(block: Block) -> list[tuple[int, list[str]]]:
    """Line and words of each `crucible …` command; a backslash continues a line."""
    found: list[tuple[int, list[str]]] = []
    lines = block.source.splitlines()
    offset = 0
    while offset < len(lines):
        start, line = offset, lines[offset]
        while line.endswith("\\") and offset + 1 < len(lines):
            offset += 1
            line = line[:-1] + lines[offset]
        offset += 1
        words = shlex.split(line, comments=True)
        if words[:1] == ["crucible"]:
            found.append((block.line + start, words[1:]))
    return found


def as_script(text: str) -> str:
    """The page as a script: code on the lines where it stands, everything else blank."""
    rows = [""] * (len(text.splitlines()) + 1)
    for block in blocks(text):
        if block.runs and block.language == "python":
            rows[block.line - 1 : block.line - 1 + len(block.source.splitlines())] = block.source.splitlines()
        elif block.runs:
            for number, words in commands(block):
                rows[number - 1] = f"if _crucible({words!r}): _sys.exit({f'line {number}: crucible {shlex.join(words)} failed'!r})"
    if any(row.startswith("if _crucible") for row in rows):
        assert not rows[0], "a page whose commands run starts with a title, not with code"
        rows[0] = HEAD
    return "\n".join(rows)


def run_page(text: str, folder: Path, name: str = "page") -> subprocess.CompletedProcess[str]:
    """Writes the page's files and runs its script, then its tests, in the folder and without the network."""
    for block in blocks(text):
        if block.title:
            (folder / block.title).write_text(block.source + "\n", encoding="utf-8")
    script = folder / f"{name}.md.py"
    script.write_text(as_script(text), encoding="utf-8")
    places = {f"CRUCIBLE_{key.upper()}": str(folder / key) for key in ("cache", "runs")}
    env = {**os.environ, **places, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    command = [sys.executable, "-W", "error", script.name]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    tests = [block.title for block in blocks(text) if block.title.startswith("test_")]
    if done.returncode or not tests:
        return done
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", *tests]
    return subprocess.run(pytest_command, cwd=folder, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


RUNNABLE = [
    page
    for page in PAGES
    if any(block.runs for block in blocks(page.read_text(encoding="utf-8"))) and not (page.parent == LOSS_PAGES and page.stem in losses.names())
]
"""Pages of single losses run in `test_loss_pages`."""


@pytest.mark.parametrize("page", RUNNABLE, ids=page_id)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    done = run_page(page.read_text(encoding="utf-8"), tmp_path, page.stem)
    assert done.returncode == 0, f"{page_id(page)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_all_python_compiles_and_names_what_the_package_has(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language != "python":
            continue
        tree = ast.parse("\n" * (block.line - 1) + block.source, filename=page_id(page))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cf":
                assert hasattr(cf, node.attr), f"{page_id(page)}:{node.lineno}: crucible_framework has no {node.attr!r}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_what_runs_needs_no_download(page: Path) -> None:
    running = [block for block in blocks(page.read_text(encoding="utf-8")) if block.runs or block.title]
    assert [f"line {block.line}" for block in running if "smollm2" in block.source] == [], "use base_model 'tiny', or mark the block as not run"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_marks_are_spelled_as_the_head_of_this_file_says(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8")):
        assert block.mark in ("", "run") or re.fullmatch(r"not run: .+", block.mark), f"{page_id(page)}:{block.line}: mark {block.mark!r}"
        assert block.language, f"{page_id(page)}:{block.line}: a block without a language; use text"


SAMPLE = """# Sample

```python title="mine.py"
VALUE = 3
```

1. Indented:

    ```python
    import mine
    total = mine.VALUE
    ```

<!-- not run: it would fail -->
```python
total = 0
```

```python
assert total == 3
open("done", "w").close()
```
"""


def test_blocks_of_a_page_are_one_session_and_files_are_there(tmp_path: Path) -> None:
    done = run_page(SAMPLE.replace('open("done", "w").close()', 'from pathlib import Path; Path("done").touch()'), tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done").exists()


def test_a_block_that_fails_fails_with_the_line_of_the_page(tmp_path: Path) -> None:
    done = run_page(SAMPLE.replace("total == 3", "total == 4"), tmp_path)
    assert done.returncode == 1
    assert f"line {SAMPLE.splitlines().index('assert total == 3') + 1}" in done.stderr


def test_a_command_that_fails_fails_the_page(tmp_path: Path) -> None:
    page = "# Page\n\n<!-- run -->\n```sh\n$ comment\ncrucible no-such-command \\\n  --flag\n```\n"
    done = run_page(page, tmp_path)
    assert done.returncode == 1
    assert "line 6: crucible no-such-command --flag failed" in done.stderr


def test_a_block_without_end_is_an_error() -> None:
    with pytest.raises(AssertionError, match="line 1 has no end"):
        blocks("```python\nx = 1\n")
