"""Each command as a user types it: what it prints, what it leaves, how it fails."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
from cyclopts import App

from crucible_framework import __main__
from crucible_framework.cli import run
from crucible_framework.cli.app import PARTS, build
from crucible_framework.errors import CorruptError
from crucible_framework.files import read_lines
from crucible_framework.store import Checkpoints

Json = dict[str, object]
TRAIN = ["train", "--base-model", "fake", "--backend", "fake", "--limit", "20", "--max-steps", "6", "--set", "checkpoint_interval=2", "--set", "adam.lr=0.05"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CRUCIBLE_RUNS", str(tmp_path / "runs"))


def asked(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Json:
    """The JSON document that a command puts on standard output."""
    capsys.readouterr()
    assert run([*words, "--json", "--quiet"]) == code
    document = json.loads(capsys.readouterr().out)
    assert isinstance(document, dict)
    return document


def failed(capsys: pytest.CaptureFixture[str], *words: str, code: int) -> str:
    """The one line that a command that fails puts on standard error."""
    capsys.readouterr()
    assert run(list(words)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("crucible: ")
    return lines[0]


def test_train_from_toml_and_flags_then_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "exp.toml").write_text(
        'base_model = "fake"\nbackend = "fake"\nfolder = "runs/exp"\nmax_steps = 4\n[lora]\nrank = 4\n[data]\nname = "minifact"\nlimit = 12\n', encoding="utf-8"
    )
    done = asked(capsys, "train", "exp.toml", "--set", "lora.rank=8", "--max-steps", "5")
    assert done["steps"] == 5
    config = json.loads((tmp_path / "runs/exp/config.json").read_text(encoding="utf-8"))
    assert config["lora"]["rank"] == 8
    again = asked(capsys, "train", "exp.toml", "--set", "lora.rank=8", "--max-steps", "5", "--resume")
    assert again["steps"] == 5
    message = failed(capsys, "train", "exp.toml", "--max-steps", "5", "--resume", code=2)
    assert "lora.rank" in message


def test_the_human_text_says_what_was_learned(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*TRAIN, "--folder", "runs/a"]) == 0
    text = capsys.readouterr().out
    assert "6 steps" in text
    assert "nats per token" in text
    assert "runs/a/checkpoints/00000006" in text


def test_runs_and_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*TRAIN, "--folder", "runs/a", "--quiet"]) == 0
    assert run(["runs"]) == 0
    assert "done" in capsys.readouterr().out
    assert asked(capsys, "runs", "runs/a")["status"] == "done"
    listed = asked(capsys, "checkpoints", "list", "runs/a")
    assert isinstance(listed["checkpoints"], list)
    assert [c["step"] for c in listed["checkpoints"]] == [2, 4, 6]
    assert "metrics" in asked(capsys, "checkpoints", "best", "runs/a")
    assert asked(capsys, "checkpoints", "verify", "runs/a") == {"verified": ["00000002", "00000004", "00000006"]}
    assert asked(capsys, "checkpoints", "verify", "runs/a/checkpoints/00000004")["step"] == 4
    removed = asked(capsys, "checkpoints", "prune", "runs/a", "--keep", "1")["removed"]
    assert removed
    newest = Checkpoints(tmp_path / "runs/a/checkpoints").latest().local_path
    assert newest is not None
    (newest / "adapter_model.safetensors").write_bytes(b"x")
    assert "not sound" in failed(capsys, "checkpoints", "verify", "runs/a", code=CorruptError.exit_code)
    assert run(["checkpoints", "list", "runs/a"]) == 0
    assert "not sound" in capsys.readouterr().out


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*TRAIN, "--folder", "runs/a", "--quiet"]) == 0
    made = asked(capsys, "models", "register", "runs/a", "judge", "--tag", "task=verify", "--description", "Judges claims.")
    assert (made["name"], made["version"]) == ("judge", 1)
    assert asked(capsys, "models", "promote", "judge:1", "production")["stage"] == "production"
    assert asked(capsys, "models", "tag", "judge", "owner=me")["tags"] == {"task": "verify", "owner": "me"}
    listed = asked(capsys, "models", "list", "--stage", "production", "--tag", "owner=me")["models"]
    assert isinstance(listed, list)
    assert [one["version"] for one in listed] == [1]
    assert asked(capsys, "models", "list", "--tag", "owner=you")["models"] == []
    assert run(["models", "show", "judge@production"]) == 0
    assert "Judges claims." in capsys.readouterr().out
    assert "neither a run nor a checkpoint" in failed(capsys, "models", "register", "nowhere", "judge", code=2)
    assert "key=value" in failed(capsys, "models", "tag", "judge", "owner", code=2)
    answers = asked_list(capsys, "sample", "judge:1", "Is it so?", "--backend", "fake", "--max-tokens", "5", "--seed", "1", "-n", "2")
    assert len(answers) == 2


def asked_list(capsys: pytest.CaptureFixture[str], *words: str) -> list[Json]:
    """The JSON array that a command puts on standard output."""
    capsys.readouterr()
    assert run([*words, "--json", "--quiet"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert isinstance(document, list)
    return document


def test_sample_is_seeded_and_reads_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("sample", "tiny", "Hello", "--max-tokens", "6", "--seed", "3")
    assert asked_list(capsys, *words)[0]["tokens"] == asked_list(capsys, *words)[0]["tokens"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello"))
    assert asked_list(capsys, "sample", "tiny", "-", "--max-tokens", "6", "--seed", "3")[0]["tokens"] == asked_list(capsys, *words)[0]["tokens"]
    assert "no prompt" in failed(capsys, "sample", "tiny", code=2)


def test_a_chat_keeps_what_was_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAnd now?\n\nnot read\n"))
    talk = asked_list(capsys, "sample", "tiny", "-i", "--max-tokens", "4", "--temperature", "0", "--system", "Be brief.")
    assert len(talk) == 2
    assert int(str(talk[1]["prompt_tokens"])) > int(str(talk[0]["prompt_tokens"])) + len("And now?")


def test_eval_alone_and_against_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*TRAIN, "--folder", "runs/a", "--quiet"]) == 0
    words = ("eval", "runs/a", "--limit", "18", "--backend", "fake", "--max-tokens", "4", "--perplexity")
    found = asked(capsys, *words, "--against", "fake", "--folder", "runs/a/eval")
    assert set(found) == {"evaluation", "against", "findings"}
    assert (Path("runs/a/eval/model/scores.jsonl")).exists()
    assert (Path("runs/a/eval/against/scores.jsonl")).exists()
    chosen = asked(capsys, *words, "--choose")["evaluation"]
    assert isinstance(chosen, dict)
    assert {item["completion"] for item in chosen["items"]} <= {"SUPPORT", "CONTRADICT", "NOT_ENOUGH_INFO"}
    assert run(list(words)) == 0
    text = capsys.readouterr().out
    assert "label_accuracy" in text
    assert "perplexity" in text


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["datasets"]) == 0
    assert "minifact" in capsys.readouterr().out
    assert run(["losses"]) == 0
    assert "cross_entropy" in capsys.readouterr().out
    checks = asked(capsys, "doctor")["checks"]
    assert isinstance(checks, list)
    assert {"Python", "torch", "memory", "free disk"} <= {check["what"] for check in checks}
    assert run(["runs"]) == 0
    assert "crucible demo" in capsys.readouterr().out


def test_doctor_names_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crucible_framework.cli.checkup.NEEDED", ("torch", "no-such-package"))
    checks = asked(capsys, "doctor", code=78)["checks"]
    assert isinstance(checks, list)
    bad = [check for check in checks if not check["ok"]]
    assert [check["what"] for check in bad] == ["no-such-package"]
    assert "pip install" in bad[0]["fix"]


def test_report_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*TRAIN, "--folder", "runs/a", "--quiet"]) == 0
    paths = asked(capsys, "report", "runs/a")["paths"]
    assert isinstance(paths, list)
    assert {Path(path).name for path in paths} == {"report.html", "report.md"}


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["trian"], 2, "train"),
        (["train", "--max-steps", "many"], 2, "many"),
        (["train", "missing.toml"], 2, "missing.toml"),
        (["train", "--set", "lora.rnak=8"], 2, "lora.rank"),
        (["train", "--set", "lora.rank=0"], 2, "rank"),
        (["train", "--set", "adam.lr=-1"], 2, "lr"),
        (["train", "--loss", "cross_entropi"], 2, "cross_entropy"),
        (["train", "--dataset", "minifac"], 2, "minifact"),
        (["train", "--split", "trian"], 2, "train"),
        (["train", "--backend", "locl"], 2, "local"),
        (["train", "--backend", "fake", "--base-model", "tiny-x"], 2, "tiny-x"),
        (["sample", "smollm2-135", "hi"], 2, "smollm2-135m"),
        (["sample", "meta-llama/Llama-3.1-8B", "hi"], 69, "meta-llama/Llama-3.1-8B"),
        (["checkpoints", "best", "runs/none"], 2, "none"),
        (["models", "show", "nobody"], 2, "nobody"),
        (["runs", "nowhere"], 2, "nowhere"),
        (["report", "nowhere"], 2, "nowhere"),
        (["demo", "--dataset", "scifact"], 2, "CRUCIBLE_DATA"),
    ],
)
def test_bad_input_is_one_sentence_with_the_designed_exit_code(capsys: pytest.CaptureFixture[str], words: list[str], code: int, part: str) -> None:
    assert part in failed(capsys, *words, code=code)


def test_bad_data_names_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n', encoding="utf-8")
    assert "rows.jsonl:2" in failed(capsys, "train", "--dataset", str(rows), "--base-model", "fake", "--backend", "fake", code=65)
    rows.write_text("", encoding="utf-8")
    failed(capsys, "train", "--dataset", str(rows), "--base-model", "fake", "--backend", "fake", code=65)


def test_errors_as_json_and_with_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["runs", "nowhere", "--json"]) == 2
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["exit_code"] == 2
    assert "nowhere" in document["error"]
    assert run(["runs", "nowhere", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_said_to_be_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("crucible_framework.cli.commands.examine", broken)
    assert "internal error" in failed(capsys, "doctor", code=70)
    monkeypatch.setattr("crucible_framework.cli.commands.examine", lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert run(["doctor"]) == 130


def test_the_entry_point_exits_with_the_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["crucible", "runs", "nowhere"])
    with pytest.raises(SystemExit) as end:
        __main__.main()
    assert end.value.code == 2
    capsys.readouterr()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_checkpoint_and_sets_the_exit_code(tmp_path: Path, number: int, code: int) -> None:
    words = [
        "train",
        "--base-model",
        "fake",
        "--backend",
        "fake",
        "--limit",
        "20",
        "--max-steps",
        "100000",
        "--folder",
        "runs/s",
        "--set",
        "checkpoint_interval=0",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "crucible_framework", *words], cwd=tmp_path, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    metrics = tmp_path / "runs/s/metrics.jsonl"
    end = time.monotonic() + 60
    while time.monotonic() < end and not (metrics.exists() and len(read_lines(metrics)) > 5):
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert b"--resume" in out
    saved = Checkpoints(tmp_path / "runs/s/checkpoints").latest(verified=True)
    assert saved.step > 3


def test_every_file_registers_the_commands_that_the_table_says() -> None:
    for part, names in PARTS.items():
        tree = App()
        import_module(f"crucible_framework.cli.{part}").register(tree)
        assert tuple(name for name in tree if not name.startswith("-")) == names
    assert set(build(["sample"])) < set(build())


def test_asking_a_model_of_a_known_family_does_not_import_transformers() -> None:
    code = "import sys; from crucible_framework.cli.app import run; code = run(['sample', 'tiny', 'hi', '--max-tokens', '1']); sys.exit(code or ('transformers' in sys.modules) * 3)"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
