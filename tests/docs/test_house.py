"""The written house rules hold: decision records fit ten lines, the change log its format, links lead somewhere, cli.md is up to date."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
SECTIONS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_relative_links_lead_to_files(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    targets = [target.partition("#")[0] for target in LINK.findall(prose) if "://" not in target and not target.startswith("mailto:")]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_pages_hold_no_folder_of_a_machine(page: Path) -> None:
    assert re.findall(r"(?<![\w.~$}])/(?:home|root|work|Users|opt)/\S+", text_of(page)) == []


def test_functions_fit_a_screen() -> None:
    long: list[str] = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                long += [f"{page_id(path)}:{node.lineno} {node.name} has {lines} lines"] if lines > 60 else []
    assert long == [], "a function of more than 60 lines is two ideas"


@pytest.mark.parametrize("page", sorted(p for p in (DOCS / "decisions").glob("*.md") if p.name != "index.md"), ids=lambda page: page.stem)
def test_decision_fits_ten_lines(page: Path) -> None:
    lines = [line for line in text_of(page).splitlines() if line.strip()]
    assert lines[0].startswith("# ")
    assert len(lines) <= 11, "a title and ten lines"
    for part in ("Decision", "Why", "Price"):
        assert sum(line.startswith(f"**{part}.**") for line in lines) == 1, f"expected one paragraph that starts with **{part}.**"
    assert f"({page.name})" in text_of(DOCS / "decisions" / "index.md"), "docs/decisions/index.md lists every decision"


def test_changelog_keeps_its_format() -> None:
    lines = text_of(ROOT / "CHANGELOG.md").splitlines()
    assert "## [Unreleased]" in lines
    headings = [line for line in lines if line.startswith("#")]
    assert headings[0] == "# Changelog"
    for heading in headings[1:]:
        assert re.fullmatch(r"## \[(Unreleased|\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d)\]?", heading) or heading.removeprefix("### ") in SECTIONS, heading
    entries = [line for line in lines if line.startswith("- ")]
    assert entries
    for entry in entries:
        assert entry.endswith("."), entry
        assert len(re.findall(r"[.!?](?: |$)", entry)) == 1, f"one sentence an entry: {entry}"


def test_the_page_of_the_command_is_what_the_command_says() -> None:
    spec = importlib.util.spec_from_file_location("docs_cli", ROOT / "scripts" / "docs_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert text_of(DOCS / "cli.md") == module.page(), "docs/cli.md is out of date; run: python scripts/docs_cli.py"
