"""A version goes to a folder or a hub and comes back byte for byte, or not at all. The hub is a real client's, against a server here."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.store.conftest import save_checkpoint

from crucible_framework import events, files
from crucible_framework.errors import ConfigError, CorruptError, NotFoundError
from crucible_framework.records import ModelVersion
from crucible_framework.store import Checkpoints, Models, pull, push

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def models(tmp_path: Path) -> Models:
    models = Models(tmp_path / "models")
    checkpoint = save_checkpoint(Checkpoints(tmp_path / "run" / "checkpoints"), 3, metrics={"dev/loss": 0.5})
    models.register(checkpoint, "judge", tags={"task": "nli"}, metrics={"odd": float("nan"), "score": 0.7}, directions={"score": "max"}, description="Judges.")
    return models


def told(version: ModelVersion) -> dict[str, object]:
    checkpoint = version.checkpoint
    folder = checkpoint.local_path
    assert folder is not None
    bytes_of = {card.name: (folder / card.name).read_bytes() for card in files.read_manifest(folder).files}
    return {
        "tags": version.tags, "metrics": repr(version.metrics), "directions": version.directions, "description": version.description, "step": checkpoint.step,
        "lora": checkpoint.lora, "base": checkpoint.base_model, "kind": checkpoint.kind, "files": bytes_of,
    }  # fmt: skip


def test_a_folder_carries_everything(models: Models, tmp_path: Path) -> None:
    with events.collect() as seen:
        assert push(models, "judge:1", tmp_path / "out", card="# Judge\n") == str(tmp_path / "out")
    assert [event["to"] for event in seen if event["name"] == "model.pushed"] == [str(tmp_path / "out")]
    assert (tmp_path / "out" / "README.md").read_text() == "# Judge\n"
    assert str(tmp_path) not in (tmp_path / "out" / "crucible.json").read_text()
    other = Models(tmp_path / "other")
    back = pull(other, tmp_path / "out")
    assert (back.name, back.version) == ("judge", 1)
    assert told(back) == told(models.get("judge:1"))
    assert back.parents[0] == f"file:{tmp_path / 'out'}"
    assert pull(other, tmp_path / "out", "mine").name == "mine"
    with pytest.raises(ConfigError, match="exists already"):
        push(models, "judge", tmp_path / "out")


def test_a_changed_byte_a_missing_file_and_a_way_out_are_refused(models: Models, tmp_path: Path) -> None:
    push(models, "judge", tmp_path / "out")
    about = (tmp_path / "out" / "crucible.json").read_text()
    other = Models(tmp_path / "other")
    with pytest.raises(NotFoundError, match="nothing was pushed there"):
        pull(other, tmp_path)
    (tmp_path / "out" / "crucible.json").write_text(about.replace("adapter.bin", "../models/judge/1/adapter.bin"))
    with pytest.raises(CorruptError, match="outside its folder"):
        pull(other, tmp_path / "out")
    (tmp_path / "out" / "crucible.json").write_text(about.replace('"step": 3', '"step": "x"'))
    with pytest.raises(CorruptError):
        pull(other, tmp_path / "out")
    (tmp_path / "out" / "crucible.json").write_text("[]")
    with pytest.raises(CorruptError, match="does not parse"):
        pull(other, tmp_path / "out")
    (tmp_path / "out" / "crucible.json").write_text(about.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ConfigError, match="newer Crucible"):
        pull(other, tmp_path / "out")
    (tmp_path / "out" / "crucible.json").write_text(about)
    weights = tmp_path / "out" / "adapter.bin"
    weights.write_bytes(b"\xff" + weights.read_bytes()[1:])
    with pytest.raises(CorruptError, match=r"another 'adapter.bin' than was pushed"):
        pull(other, tmp_path / "out")
    weights.unlink()
    with pytest.raises(CorruptError, match="or none"):
        pull(other, tmp_path / "out")
    assert other.list() == ()


class Hub(ThreadingHTTPServer):
    """One repository, spoken to as the hub is: create, commit with files inline, list and read."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.calls: list[tuple[str, str]] = []
        self.status = 200
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, body: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for key, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.calls.append(("POST", self.path))
                if hub.status != 200:
                    self.answer({"error": "no"}, hub.status)
                elif self.path.endswith("/preupload/main"):
                    asked = json.loads(body)["files"]
                    self.answer({"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]})
                elif "/commit/main" in self.path:
                    for line in body.splitlines():
                        row = json.loads(line)
                        if row["key"] == "file":
                            hub.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
                    self.answer({"commitUrl": f"{hub.url}/o/n/commit/{'a' * 40}", "commitOid": "a" * 40, "hookOutput": ""})
                else:
                    self.answer({"url": f"{hub.url}/o/n", "name": "o/n"})

            def do_GET(self) -> None:
                hub.calls.append((self.command, self.path))
                name = self.path.partition("?")[0]
                if hub.status != 200:
                    self.answer({"error": "no"}, hub.status)
                elif name.startswith("/api/models/o/n/tree/"):
                    self.answer([{"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for path, data in hub.files.items()])
                elif name.startswith("/api/models/o/n"):
                    self.answer({"id": "o/n", "sha": "a" * 40, "siblings": [{"rfilename": path} for path in hub.files], "private": True})
                elif "/resolve/" in name:
                    data = hub.files[name.split("/resolve/", 1)[1].split("/", 1)[1]]
                    self.answer(data, headers={"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": "a" * 40})
                else:
                    self.answer({"error": "unknown"}, 404)

            do_HEAD = do_GET

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def in_process(hub: Hub, tmp_path: Path, code: str) -> str:
    """The client reads its address when it is imported, so it gets a process of its own."""
    start = (
        "import sys\nfrom crucible_framework.errors import CrucibleError\nfrom crucible_framework.store import Models, pull, push\nmodels = Models('models')\n"
    )
    environment = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_x", "PYTHONPATH": ":".join(sys.path), "PATH": "", "HOME": str(tmp_path),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", start + code], check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_hub_gets_it_and_gives_it_back(models: Models, hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    code = "push(models, 'judge', 'hf://o/n', card='# Judge')\nprint(pull(Models('other'), 'hf://o/n').parents[0])"
    assert in_process(hub, tmp_path, code) == "hf://o/n"
    assert set(hub.files) == {"README.md", "crucible.json", "adapter.bin", "state/optimizer.json"}
    assert told(Models(tmp_path / "other").get("judge:1")) == told(models.get("judge:1"))
    assert ("POST", "/api/repos/create") in hub.calls
    hub.status = 403
    refused = "try:\n    push(models, 'judge', 'hf://o/n')\nexcept CrucibleError as error:\n    print(type(error).__name__, error)"
    assert in_process(hub, tmp_path, refused).startswith("AuthError The hub refuses 'o/n' (403). Set HF_TOKEN")


def test_names_that_are_no_repositories_and_an_offline_hub(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="names no repository"):
        push(models, "judge", "hf://judge")
    monkeypatch.setenv("CRUCIBLE_OFFLINE", "1")
    with pytest.raises(ConfigError, match="switched off"):
        push(models, "judge", "hf://o/n")
