"""Every example runs from an empty folder as its reader would run it, and stays short. Those of the large model are slow tests."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def needs_large_model(path: Path) -> bool:
    """Whether its code, not only its words, names the model of 135 million parameters."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    words = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return any(isinstance(node, ast.Constant) and "smollm2" in str(node.value) and id(node) not in words for node in ast.walk(tree))


def as_case(path: Path) -> object:
    return pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if needs_large_model(path) else [])


@pytest.mark.parametrize("path", [as_case(path) for path in EXAMPLES])
def test_example_runs(path: Path, tmp_path: Path) -> None:
    own = {} if needs_large_model(path) else {"CRUCIBLE_CACHE": str(tmp_path / "cache")}
    env = {**{key: value for key, value in os.environ.items() if key != "MODEL"}, **own, "CRUCIBLE_RUNS": str(tmp_path / "runs"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-W", "error", str(path)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, f"{path.name}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert done.stdout.strip(), "an example shows what it found"


def test_examples_are_numbered_in_reading_order_from_one() -> None:
    assert EXAMPLES, "examples/ is empty"
    assert all(re.fullmatch(r"\d\d_[a-z0-9_]+\.py", path.name) for path in EXAMPLES)
    assert [int(path.name[:2]) for path in EXAMPLES] == list(range(1, len(EXAMPLES) + 1))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_fits_a_screen_and_says_what_it_shows(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60, f"{path.name} has {len(lines)} lines; expected at most 60"
    assert lines[0].startswith('"""'), "the first line says what the example shows"
