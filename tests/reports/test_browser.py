"""The report in a real browser: it opens without a message on the console. Skipped where no Chromium is installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from crucible_framework.reports import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def opened(url: str, profile: Path) -> tuple[str, str]:
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--enable-logging=stderr", "--v=0")
    assert CHROMIUM is not None
    ran = subprocess.run([CHROMIUM, *flags, f"--user-data-dir={profile}", "--dump-dom", url], capture_output=True, text=True, timeout=60, check=True)
    return ran.stdout, "\n".join(line for line in ran.stderr.splitlines() if ":CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_console_stays_empty_and_the_drawings_are_there(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first", texts=("</div><script>console.error('model text ran')</script>",))
    page, console = opened(write_report(folder, ("html",))[0].as_uri(), tmp_path / "profile")
    assert console == ""
    assert page.count("<svg") == 4
    assert "&lt;script&gt;console.error" in page
    loud = tmp_path / "loud.html"
    loud.write_text("<script>console.error('heard')</script>")
    assert "heard" in opened(loud.as_uri(), tmp_path / "profile")[1], "the test must be able to hear the console"
