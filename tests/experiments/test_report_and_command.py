"""The study's report and the commands `run` and `compare`, on a real small study with a failed arm."""

from __future__ import annotations

import json
import signal
import subprocess
from io import StringIO
from pathlib import Path

import pytest
from cyclopts import App
from rich.console import Console

from crucible_framework.cli.experiment import register
from crucible_framework.cli.reply import Reply
from crucible_framework.errors import ConfigError, CorruptError, NotFoundError, UnknownNameError
from crucible_framework.events import subscribe
from crucible_framework.experiments import analyse, load_analysis, load_study
from crucible_framework.reports.study import is_study, write_study_report

TOML = """
name = "ranks <b>&</b>"
backend = "fake"
threads = 1
seeds = [0, 1]
primary = "target_nll"
perplexity = true
sampling = { max_tokens = 2, temperature = 0.0 }

[train]
base_model = "tiny"
max_steps = 4
checkpoint_interval = 2
adam.lr = 0.05

[matrix]
lora.target_modules = [["q_proj"], ["q_proj", "v_proj"], ["no_proj"]]

[data]
train_limit = 24
test_limit = 24

[[hypotheses]]
better = "lora.target_modules=q_proj+v_proj"
because = "it <i>sees</i> more"
"""


def call(*words: str) -> Reply:
    app = App(name="crucible", result_action="return_value")
    register(app)
    reply = app(list(words), exit_on_error=False, print_error=False)
    assert isinstance(reply, Reply)
    return reply


def shown(reply: Reply) -> str:
    out = StringIO()
    Console(file=out, width=1000).print(reply.text)
    return out.getvalue()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Reply]:
    """(the experiment's file, the study's folder, what `crucible run` said)."""
    root = tmp_path_factory.mktemp("command")
    (root / "exp.toml").write_text(TOML)
    return root / "exp.toml", root / "study", call("run", str(root / "exp.toml"), "--folder", str(root / "study"), "--jobs", "0")


def test_run_says_what_was_found_and_writes_the_report(study: tuple[Path, Path, Reply]) -> None:
    _, folder, reply = study
    text = shown(reply)
    assert "4 of 6 cells have a result, 2 failed." in text
    assert "lora.target_modules=q_proj+v_proj − base" in text
    assert "no_proj" in text
    assert reply.exit_code == 0
    data = reply.data
    assert isinstance(data, dict)
    assert data["cells"] == {"done": 4, "failed": 2, "pending": 0, "dropped": 0}
    assert is_study(folder)
    assert not is_study(folder / "cells")


def test_the_report_holds_every_finding_failure_and_number(study: tuple[Path, Path, Reply]) -> None:
    _, folder, _ = study
    html, markdown = ((folder / name).read_text() for name in ("report.html", "report.md"))
    analysis = load_analysis(folder)
    for one in analysis.contrasts:
        assert one.name in markdown
    assert "2 cells failed" in html
    for failed in analysis.failed:
        assert failed.id in html
    assert analysis.methods in markdown.replace("\\", "")
    assert "<b>&</b>" not in html
    assert "ranks &lt;b&gt;&amp;&lt;/b&gt;" in html
    assert "<i>sees" not in html
    assert html.count("<svg") >= 4
    declared = next(one for one in analysis.contrasts if one.declared)
    assert declared.finding is not None
    assert f"{declared.finding.effect:.3g}".replace("-", "−") in markdown
    assert "Supported" in markdown
    assert "Less is better" in html
    for cell in load_study(folder).cells:
        assert cell.id in markdown


def test_a_report_needs_an_analysis_and_names_what_is_wrong(study: tuple[Path, Path, Reply], tmp_path: Path) -> None:
    _, folder, _ = study
    with pytest.raises(NotFoundError, match="holds no study"):
        write_study_report(tmp_path)
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(folder), str(copy)], check=True)
    with pytest.raises(UnknownNameError, match="html"):
        write_study_report(copy, ("pdf",))
    (copy / "findings.json").unlink()
    with pytest.raises(NotFoundError, match="not analysed"):
        write_study_report(copy)
    victim = min(copy.glob("cells/*v-proj*.json"))
    body = victim.read_bytes()
    victim.unlink()
    analyse(copy)
    assert "5 of 6 cells" not in write_study_report(copy)[1].read_text()
    assert "1 of 6 cells have no result yet" in write_study_report(copy)[1].read_text()
    victim.write_bytes(body)
    assert "analyse it again" in write_study_report(copy)[1].read_text()
    findings = json.loads((copy / "findings.json").read_text())
    findings["contrasts"][0]["finding"]["effect"] = "much"
    (copy / "findings.json").write_text(json.dumps(findings))
    with pytest.raises(CorruptError, match="cannot be reported"):
        write_study_report(copy)


def test_run_refuses_and_resumes(study: tuple[Path, Path, Reply]) -> None:
    file, folder, _ = study
    words = ("run", str(file), "--folder", str(folder), "--jobs", "0")
    with pytest.raises(ConfigError, match="--resume"):
        call(*words)
    assert "4 of 6" in shown(call(*words, "--resume"))
    with pytest.raises(ConfigError, match="max_steps"):
        call(*words, "--resume", "--set", "train.max_stepz=9")


def test_a_signal_ends_the_command_with_its_code_and_says_how_to_go_on(study: tuple[Path, Path, Reply], tmp_path: Path) -> None:
    file, _, _ = study
    end = subscribe(lambda event: signal.raise_signal(signal.SIGTERM) if event["name"] == "experiment.cell" else None)
    try:
        reply = call("run", str(file), "--folder", str(tmp_path / "cut"), "--jobs", "0")
    finally:
        end()
    assert reply.exit_code == 143
    assert "0 of 6 cells are finished. Go on with: crucible run" in shown(reply)
    assert not (tmp_path / "cut" / "report.html").exists()


def test_dry_run_shows_cells_and_cost_and_writes_nothing(study: tuple[Path, Path, Reply], tmp_path: Path) -> None:
    file, _, _ = study
    reply = call("run", str(file), "--folder", str(tmp_path / "never"), "--dry-run")
    text = shown(reply)
    assert "6 cells: about" in text
    assert "nothing was written" in text
    assert not (tmp_path / "never").exists()
    assert "s0-minifact" in text


def test_compare_answers_in_one_sentence(study: tuple[Path, Path, Reply]) -> None:
    _, folder, _ = study
    found = load_study(folder)
    cells = {(cell.arm, cell.seed): str(folder / "cells" / cell.id) for cell in found.cells}
    base = str(folder / "bases" / next(iter(found.bases)))
    best = cells["lora.target_modules=q_proj+v_proj", 0]
    text = shown(call("compare", base, best, "--metric", "target_nll"))
    assert f"{best} is better than {base} in target_nll" in text
    assert "95% interval" in text
    assert "documents" in text
    assert "is worse than" in shown(call("compare", best, base, "--metric", "target_nll"))
    assert "not shown to differ" in shown(call("compare", best, best))
    with pytest.raises(NotFoundError, match="no finished evaluation"):
        call("compare", base, str(folder / "cells"))
    with pytest.raises(UnknownNameError, match="label_accuracy"):
        call("compare", base, best, "--metric", "label_acuracy")
