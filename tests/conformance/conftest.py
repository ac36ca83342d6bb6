"""One server and one folder for all recipes, and what several of them start from."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from crucible_framework.backends import connect

from .cookbook_for_tests import RATE, SMALL, Cookbook, Figures, Lesson, link_small, served, write_data, write_tiny


@pytest.fixture(scope="session")
def cookbook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cookbook]:
    """The cookbook beside this environment (or where `CRUCIBLE_COOKBOOK` says), a server, and a folder to run recipes in."""
    home = Path(os.environ.get("CRUCIBLE_COOKBOOK") or Path(sys.prefix) / "cookbook").resolve()
    packages = home / "site-packages"
    if not (home / "checks" / "validate_temperature_logprobs.py").is_file():
        pytest.skip(f"tinker-cookbook is not in {home}. Put it there with scripts/install_cookbook, or run `make conformance`.")
    folder = tmp_path_factory.mktemp("recipes")
    write_tiny(folder)
    write_data(folder, packages / "tinker_cookbook" / "example_data" / "conversations.jsonl")
    with served(folder / "server") as url:
        yield Cookbook(home, folder, url)


@pytest.fixture(scope="session")
def small(cookbook: Cookbook) -> Cookbook:
    """The same, with the default model; it is fetched once into the user's cache."""
    with connect("local") as backend:
        link_small(cookbook.folder, Path(str(getattr(backend.tokenizer("smollm2-135m"), "folder", None))))
    return cookbook


@pytest.fixture(scope="session")
def lesson(small: Cookbook) -> Lesson:
    """Eight steps of chat SFT on the default model; the log is called "lesson"."""
    start = small.fresh(SMALL)
    return Lesson(start, small.chat(SMALL, "lesson", start, RATE, 2))


@pytest.fixture
def figures(record_property: Figures) -> Figures:
    """Keeps what a test measured."""
    return record_property


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Shows it."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            if "tests/conformance/" in report.nodeid and report.when == "call" and report.user_properties:
                terminalreporter.write_line(f"{report.nodeid.partition('::')[2]} ({report.duration:.0f} s)")
                for name, value in report.user_properties:
                    terminalreporter.write_line(f"    {name}: {value}")
