"""Every registered loss has its page, and every configuration on it is loaded, resolved and run.

The pages' Python runs here, in one process, since there are many of them and each is a few milliseconds of work; `test_code_blocks` runs the others.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from crucible_framework.backends import connect
from crucible_framework.cli.jobs import load_data, load_job
from crucible_framework.losses import losses, resolve
from crucible_framework.protocols import Loss
from crucible_framework.records import TrainConfig
from crucible_framework.training import Trainer

from .test_code_blocks import LOSS_PAGES, ROOT, Block, blocks

FAMILIES = {"policy", "preference", "structure", "terms"}
PARTS = ("Maths", "Gradient", "When to use", "Pitfalls", "Source")
NAMES = losses.names()


def text_of(name: str) -> str:
    return (LOSS_PAGES / f"{name}.md").read_text(encoding="utf-8")


def titled(name: str, folder: Path) -> dict[str, Block]:
    """The page's files, written to the folder, by name."""
    found = {block.title: block for block in blocks(text_of(name)) if block.title}
    for title, block in found.items():
        (folder / title).write_text(block.source + "\n", encoding="utf-8")
    return found


def terms(loss: str | dict[str, float]) -> list[Loss]:
    """The losses that a configuration names: one, or those of a sum."""
    return [resolve(loss)] if isinstance(loss, str) else [resolve(name) for name in loss]


def test_every_registered_loss_has_a_page_and_no_page_is_of_another() -> None:
    assert {page.stem for page in LOSS_PAGES.glob("*.md")} == FAMILIES | set(NAMES)


def test_index_and_navigation_list_every_page() -> None:
    index = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    navigation = re.findall(r"losses/(\w+)\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(navigation) == sorted(FAMILIES | set(NAMES)), "each once"
    for name in NAMES:
        assert f"[`{name}`](losses/{name}.md)" in index


@pytest.mark.parametrize("name", NAMES)
def test_a_page_says_all_that_it_should(name: str) -> None:
    text = text_of(name)
    assert text.startswith(f"# {name}\n")
    assert [part for part in PARTS if not re.search(rf"^\*\*{part}\.\*\* \S", text, re.MULTILINE)] == []
    assert "| input | shape | unit |" in text
    needed = [extra for extra in resolve(name).extras if f'`extras["{extra}"]`' not in text]
    assert needed == [], "the table of inputs names every extra that the loss needs"
    years = set(re.findall(r"\b(?:19|20)\d\d\b|\d{4}\.\d{5}", resolve(name).source))
    assert years <= set(re.findall(r"\b(?:19|20)\d\d\b|\d{4}\.\d{5}", text)), "the loss and its page name the same source"


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    configuration = titled(name, tmp_path)[f"{name}.toml"]
    job = load_job(Path(f"{name}.toml"), [], {})
    named = terms(dict(job.loss) if not isinstance(job.loss, str) else job.loss)
    assert name in {re.sub(r"\(.*", "", loss.name) for loss in named} | ({"forward_kl"} & set(job.loss))
    trains = set(resolve(job.loss).extras) <= {"reference_logprobs"} or resolve(job.loss).prepare is not None
    assert trains == ("[data]" in configuration.source), "what the trainer can make the extras of has data to train on"
    if trains:
        assert job.backend == "fake"
        with connect("fake") as backend, Trainer(backend, job.config()) as trainer:
            result = trainer.train(load_data(job.data, job.data.split))
        assert result.steps == job.max_steps
        assert result.final_loss != result.initial_loss


@pytest.mark.parametrize("name", NAMES)
def test_the_python_of_a_page_runs_and_means_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    titled(name, tmp_path)
    (source,) = [block.source for block in blocks(text_of(name)) if block.language == "python"]
    session: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        exec(compile(source, f"{name}.md", "exec"), session)
    config = session["config"]
    assert isinstance(config, TrainConfig)
    assert config.loss == load_job(Path(f"{name}.toml"), [], {}).loss
    assert re.search(r"\d", shown.getvalue())
