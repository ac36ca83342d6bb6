"""Models answer side by side, one failure spoils no other answer, and only the page's own token may ask. Cards and the command."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from crucible_framework.backends import connect
from crucible_framework.cli import ui
from crucible_framework.dashboard import Dashboard, Playground, model_card
from crucible_framework.dashboard.guard import Guard
from crucible_framework.dashboard.models_page import lineage_svg
from crucible_framework.errors import ConfigError, InferenceError, LockedError, NotFoundError, UnknownNameError
from crucible_framework.protocols import Backend
from crucible_framework.records import Completion, Prompt, SamplingParams
from crucible_framework.store import Models
from crucible_framework.store.lineage import ancestry, run_of

from .conftest import Client


class Said:
    """A sampler that says what it was made with, or fails, or waits."""

    def __init__(self, text: str | Exception, gate: threading.Event | None = None) -> None:
        self.model, self.text, self.gate = "said", text, gate
        self.asked: list[Prompt] = []

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        self.asked.append(prompt)
        if self.gate is not None:
            self.gate.wait(10)
        future: Future[tuple[Completion, ...]] = Future()
        if isinstance(self.text, Exception):
            future.set_exception(self.text)
        else:
            future.set_result((Completion(text=self.text, tokens=(1, 2), logprobs=(-0.1, -2.0), stop_reason="stop", prompt_tokens=3),))
        return future

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        raise NotImplementedError


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with connect("fake") as opened:
        yield opened


GREEDY = SamplingParams(max_tokens=4, temperature=0.0)


def test_a_real_backend_answers_and_the_same_model_says_the_same(backend: Backend) -> None:
    answers = Playground(backend, {"one": "tiny", "two": "tiny"}).ask(["one", "two"], "What is water?", GREEDY)
    assert [answer.model for answer in answers] == ["one", "two"]
    first, second = (answer.completion for answer in answers)
    assert first is not None
    assert second is not None
    assert first.tokens == second.tokens
    assert len(first.tokens) >= 1


def test_one_failure_spoils_no_other_answer(backend: Backend) -> None:
    bad, good = Said(InferenceError("no answer came")), Said("yes")
    answers = Playground(backend, {"bad": bad, "good": good}).ask(["bad", "good"], "q", GREEDY, "be short")
    assert (answers[0].completion, answers[0].error) == (None, "no answer came")
    assert answers[1].completion is not None
    assert answers[1].plain()["logprobs"] == [-0.1, -2.0]
    assert [turn.role for turn in good.asked[0] if not isinstance(turn, (str, int))] == ["system", "user"]
    with pytest.raises(UnknownNameError, match="'goood'"):
        Playground(backend, {"good": good}).ask(["goood"], "q", GREEDY)


def test_a_second_question_waits_its_turn(backend: Backend) -> None:
    gate = threading.Event()
    slow = Said("late", gate)
    playground = Playground(backend, {"slow": slow})
    thread = threading.Thread(target=playground.ask, args=(["slow"], "q", GREEDY))
    thread.start()
    while not slow.asked:
        pass
    with pytest.raises(LockedError, match="earlier question"):
        playground.ask(["slow"], "q", GREEDY)
    gate.set()
    thread.join()
    assert playground.ask(["slow"], "q", GREEDY)[0].error == ""


def test_the_page_asks_over_http_with_its_token(tmp_path: Path, backend: Backend) -> None:
    text = "<script>window.pwned=1</script>"
    with Dashboard(tmp_path, playground=Playground(backend, {text: Said(text)})) as dashboard:
        client = Client(dashboard.url)
        page = client.text("/playground")
        token = re.search(r'name="crucible-token" content="([^"]+)"', page)
        assert token is not None
        assert "<script>window" not in page
        assert 'href="/playground"' in client.text("/")
        assert "crucible-token" not in client.text("/")

        def ask(body: object, **headers: str) -> tuple[int, bytes]:
            sent = {"content_type": "application/json", "x_crucible_token": token[1]} | headers
            status, _, answer = client.ask("/playground/ask", "POST", body if isinstance(body, bytes) else json.dumps(body).encode(), **sent)
            return status, answer

        status, answer = ask({"prompt": "q", "models": [text], "max_tokens": 3, "seed": 1})
        assert status == 200
        assert json.loads(answer)["answers"][0]["text"] == text
        for body, expected in (
            ({"prompt": "q", "models": []}, 400),
            ({"models": [text]}, 400),
            ([], 400),
            (b"{", 400),
            ({"prompt": "q", "models": ["x"]}, 400),
        ):
            assert ask(body)[0] == expected, body
        assert ask({"prompt": "q", "models": [text], "temperature": -1})[0] == 400
        assert ask({"prompt": "q", "models": [text]}, x_crucible_token="x")[0] == 403
        assert ask({"prompt": "q", "models": [text]}, content_type="text/plain")[0] == 415
        assert ask({"prompt": "q", "models": [text]}, content_length="99999999")[0] == 413
        assert ask({"prompt": "q", "models": [text]}, origin="http://evil.example")[0] == 403


def test_a_guard_without_a_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="token is empty"):
        Guard(None, token="")  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------- models
def test_a_card_says_what_is_on_file(workspace: Path) -> None:
    card = model_card(Models(workspace / "models"), "judge@production", workspace)
    assert 'base_model: "smollm2-135m"' in card
    assert "# judge:1" in card
    assert "LoRA, rank 8" in card
    assert "| label\\_accuracy | 0.700 | 95\u00a0%: 0.600 to 0.800 | 96 |" in card
    assert "crucible sample judge:1" in card
    assert str(workspace) not in card, "no folder of this machine is in a card"
    with pytest.raises(NotFoundError):
        model_card(Models(workspace / "models"), "nobody", workspace)


def test_the_lineage_leads_from_data_to_the_version(workspace: Path) -> None:
    nodes = {node.id: node for node in ancestry(Models(workspace / "models"), "judge:2", workspace)}
    kinds = sorted(node.kind for node in nodes.values())
    assert kinds == ["base model", "checkpoint", "checkpoint", "data set", "model", "model", "run", "run"]
    assert "judge:1" in nodes["judge:2"].made_from
    assert nodes["run run-0"].made_from == ("base smollm2-135m", "data minifact train aaaaaaaa")
    svg = lineage_svg(tuple(nodes.values()))
    assert svg.count("<rect") == 8
    assert svg.count('class="edge"') == sum(len(node.made_from) for node in nodes.values())
    assert 'href="/runs/run-0"' in svg
    assert lineage_svg(()) == ""


def test_a_checkpoint_elsewhere_is_no_run_of_the_workspace(workspace: Path, tmp_path: Path) -> None:
    assert run_of(f"file:{workspace}/run-0/checkpoints/00000040-final", workspace) == "run-0"
    for uri in (f"file:{tmp_path}/run-0/checkpoints/1", "tinker://x/y", f"file:{workspace}/run-0", f"file:{workspace}/none/checkpoints/1"):
        assert run_of(uri, workspace) == ""


# -------------------------------------------------------------------------------------------------------------- command
def test_the_command_serves_and_ends_by_itself(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reply = ui.ui(workspace, browser=False, playground=["tiny"], backend="fake", seconds=0.05)
    assert re.match(r"Dashboard: http://127\.0\.0\.1:\d+/", capsys.readouterr().err)
    assert reply.exit_code == 0
    with pytest.raises(NotFoundError):
        ui.ui(workspace / "none", browser=False)
