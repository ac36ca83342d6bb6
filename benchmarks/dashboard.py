"""How soon the table of 50 runs × 2,000 points is painted, and what a live update costs on the wire.

Cold is a dashboard that has read nothing yet, warm one that has. The first paint is Chromium's own figure (first-contentful-paint), the
server's share is processor time. usage: python benchmarks/dashboard.py [runs] [points]
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit

from crucible_framework.dashboard import Dashboard
from crucible_framework.store import open_run

ROW = b'{"step":%d,"epoch":0.1,"train/loss":%.4f,"train/lr":0.0001,"grad/global_norm":1.5,"train/tokens":400}\n'


def workspace(root: Path, runs: int, points: int) -> None:
    with open_run(root / "r000", {"base_model": "tiny"}) as run:
        run.log_metrics({"step": 1, "train/loss": 2.0})
    rows = b"".join(ROW % (step, 2 / step) for step in range(1, points + 1))
    for index in range(runs):
        if index:
            shutil.copytree(root / "r000", root / f"r{index:03d}")
        (root / f"r{index:03d}" / "metrics.jsonl").write_bytes(rows)


def fetched(url: str) -> HTTPResponse:
    """The answer of an address of this machine."""
    where = urlsplit(url)
    connection = HTTPConnection(where.netloc)
    connection.request("GET", f"{where.path}?{where.query}")
    return connection.getresponse()


def painted(url: str, times: int) -> list[float]:
    """Milliseconds to the first contentful paint, page by page."""
    from playwright.sync_api import sync_playwright

    found = []
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _ in range(times):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(url)
            page.wait_for_selector("#rows .spark")
            entry = page.evaluate("performance.getEntriesByName('first-contentful-paint').map((e) => e.startTime)")
            found += entry
            page.close()
        browser.close()
    return found


def main() -> None:
    runs, points = (int(word) for word in (*sys.argv[1:], "50", "2000")[:2])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        workspace(root, runs, points)
        with Dashboard(root) as dashboard:
            for name in ("cold", "warm"):
                start, used = time.perf_counter(), time.process_time()
                size = len(fetched(dashboard.url).read())
                print(f"{name}: {time.perf_counter() - start:.2f} s, {time.process_time() - used:.2f} s of processor, {size / 1024:.0f} KiB")
            first = painted(dashboard.url, 5)
            print(f"first contentful paint, warm: median {statistics.median(first):.0f} ms of {len(first)}")
        with Dashboard(root) as dashboard:
            print(f"first contentful paint, cold: {painted(dashboard.url, 1)[0]:.0f} ms")
        with Dashboard(root, every_s=0.05) as dashboard, fetched(f"{dashboard.url}api/runs/r000/live?after=now") as stream:
            while b"data" not in stream.readline():
                pass
            with (root / "r000" / "metrics.jsonl").open("ab") as file:
                file.write(ROW % (points + 1, 0.5))
            sent = b""
            while not sent.endswith(b"\n\n") or b"rows" not in sent:
                sent += stream.readline()
            print(f"a live update of one row: {len(sent)} bytes for {len(json.dumps(ROW.decode()))} bytes of row")


if __name__ == "__main__":
    main()
