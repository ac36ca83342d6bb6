"""`evaluate`: every example asked and scored once, rows kept and reused to the byte, failures told with what was kept."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework import events
from crucible_framework.errors import ConfigError, CorruptError, DataError, InferenceError, LockedError, NumericError, StatisticsError, UnknownNameError
from crucible_framework.evaluation import GREEDY, evaluate, load_evaluation
from crucible_framework.files import lock
from crucible_framework.records import Completion, Dataset, Evaluation, Example, Message, SamplingParams, Score, record
from crucible_framework.stats import mean_estimate, wilson

from .samplers_for_tests import Refusing, Scripted, dataset, labelled, right, said

FILES = ("plan.json", "scores.jsonl", "evaluation.json")


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def letters(example: Example, completion: Completion) -> Score:
    return Score(name="letters", value=float(len(completion.text)), detail=f"of {example.id}")


# ------------------------------------------------------------------------------------------------------------- results
def test_importing_it_loads_neither_torch_nor_scipy() -> None:
    code = "import sys, crucible_framework.evaluation; print([m for m in ('scipy', 'torch', 'pydantic', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]})
    assert done.stdout.strip() == "[]"


def test_each_example_is_asked_once_and_scored() -> None:
    data = labelled(9)
    sampler = Scripted(right(data, wrong=[2, 5]))
    found = evaluate(sampler, data, ["label_accuracy", "exact_match"])
    assert sampler.asked == [f"p{i}" for i in range(9)]
    assert sampler.params == [GREEDY] * 9
    assert [item.id for item in found.items] == [f"e{i}" for i in range(9)]
    assert [item.scores["label_accuracy"] for item in found.items] == [1, 1, 0, 1, 1, 0, 1, 1, 1]
    assert (found["label_accuracy"].low, found["label_accuracy"].high) == wilson(7, 9)
    assert [estimate.name for estimate in found.estimates] == ["label_accuracy", "exact_match", "majority_label"]
    assert found["majority_label"].value == pytest.approx(1 / 3)
    assert (found.model, found.card, found.folder) == ("scripted", data.card, None)


def test_documents_are_clusters_where_every_example_has_one() -> None:
    data = labelled(12, documents=4)
    values = [0.0, 1.0, 1.0] * 4
    found = evaluate(Scripted(right(data, wrong=[0, 3, 6, 9])), data)["label_accuracy"]
    assert found == mean_estimate("label_accuracy", values, clusters=[f"d{i % 4}" for i in range(12)])
    assert found.clusters == 4
    mixed = dataset([*data.examples, Example(id="x", prompt="px", target="SUPPORT")])
    assert evaluate(Scripted(right(mixed)), mixed)["label_accuracy"].clusters is None


def test_settings_reach_the_sampler_and_requests_go_ahead() -> None:
    data = labelled(12)
    params = SamplingParams(max_tokens=5, temperature=0.7, seed=3)
    sampler = Scripted(right(data))
    evaluate(sampler, data, params=params, in_flight=3)
    assert set(sampler.params) == {params}
    assert 1 <= sampler.peak <= 3


def test_a_scorer_of_ones_own_beside_named_ones(tmp_path: Path) -> None:
    data = labelled(3)
    found = evaluate(Scripted(right(data)), data, [letters, "label_accuracy", f"{__name__}:brief"], folder=tmp_path)
    assert [item.scores["letters"] for item in found.items] == [7.0, 10.0, 15.0]
    assert "brief" in found.items[0].scores
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert rows[1]["details"] == {"letters": "of e1", "label_accuracy": "CONTRADICT"}
    assert rows[1]["prompt"] == "p1"


def brief(example: Example, completion: Completion) -> Score:
    return Score(name="brief", value=float(len(completion.text) < 8))


def test_perplexity_is_that_of_the_targets() -> None:
    data = dataset([Example(id="a", prompt="p0", target="one three"), Example(id="b", prompt="p1", target="four"), Example(id="c", prompt="p2", target="")])
    found = evaluate(Scripted(right(data)), data, ["contains"], perplexity=True)
    assert [item.scores["target_nll"] for item in found.items] == [4.0, 4.0, None]
    assert (found["target_nll"].value, found["target_nll"].n) == (4.0, 2)
    assert found["perplexity"].value == pytest.approx(math.exp(4))
    assert found["perplexity"].method.startswith("exponential of target_nll: ")
    spread = dataset([Example(id=str(i), prompt="p", target="x" * (i + 1)) for i in range(5)])
    nll, perplexity = (evaluate(Scripted({"p": ""}), spread, ["contains"], perplexity=True)[name] for name in ("target_nll", "perplexity"))
    assert (perplexity.low, perplexity.high) == pytest.approx((math.exp(nll.low), math.exp(nll.high)))


def test_a_measure_without_values_is_omitted_and_the_file_says_why(tmp_path: Path) -> None:
    data = dataset([Example(id="a", prompt="p", target="no number"), Example(id="b", prompt="p", target="x" * 800)])
    found = evaluate(Scripted({"p": "7"}), data, ["numeric", "contains"], perplexity=True, folder=tmp_path)
    assert [estimate.name for estimate in found.estimates] == ["contains", "target_nll"]
    omitted = json.loads((tmp_path / "evaluation.json").read_text())["omitted"]
    assert "no value that applies, of 2" in omitted["numeric"]
    assert "perplexity" in omitted["target_nll"] or "perplexity" in omitted["perplexity"]
    with pytest.raises(UnknownNameError, match="numeric"):
        found["numeric"]


def test_chats_are_asked_as_they_are() -> None:
    prompt = (Message(role="user", content="hello"),)
    sampler = Scripted({str(prompt[0]): "x"})
    found = evaluate(sampler, dataset([Example(id="a", prompt=prompt, target="x")]), ["exact_match"])
    assert found["exact_match"].value == 1
    assert sampler.asked == [str(prompt[0])]


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(1, 5))
def test_how_many_requests_are_ahead_changes_nothing(answers: list[bool], in_flight: int) -> None:
    data = labelled(len(answers))
    table = right(data, wrong=[i for i, ok in enumerate(answers) if not ok])
    found = evaluate(Scripted(table), data, in_flight=in_flight)
    assert [item.scores["label_accuracy"] for item in found.items] == [float(ok) for ok in answers]
    assert found.estimates == evaluate(Scripted(table), data, in_flight=1).estimates


# --------------------------------------------------------------------------------------------------------------- files
def test_what_is_written_is_what_is_loaded(tmp_path: Path) -> None:
    data = labelled(6, documents=3)
    found = evaluate(Scripted(right(data, wrong=[1])), data, ["label_accuracy", "f1"], label="base", folder=tmp_path / "eval", perplexity=True)
    loaded = load_evaluation(tmp_path / "eval")
    assert loaded == found
    body = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    assert (body["label"], body["model"], body["card"]["sha256"], body["params"]["max_tokens"]) == ("base", "scripted", data.card.sha256, 32)
    assert len((tmp_path / "eval" / "scores.jsonl").read_text().splitlines()) == 6


def test_the_same_evaluation_gives_the_same_bytes(tmp_path: Path) -> None:
    data = labelled(8, documents=4)
    for name in ("one", "two"):
        evaluate(Scripted(right(data, wrong=[3])), data, ["label_accuracy", "f1"], folder=tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("failing", [0, 1, 4, 7])
def test_a_failure_keeps_the_rows_before_it_and_a_second_call_asks_for_the_rest(tmp_path: Path, failing: int) -> None:
    data = labelled(8, documents=4)
    evaluate(Scripted(right(data)), data, folder=tmp_path / "whole")
    broken = Scripted(right(data), fail={f"p{failing}": InferenceError("the service went away")})
    with pytest.raises(InferenceError, match="went away") as caught:
        evaluate(broken, data, folder=tmp_path / "torn")
    assert caught.value.__notes__ == [f"while evaluating example 'e{failing}'; the rows before it are kept"]
    assert len((tmp_path / "torn" / "scores.jsonl").read_text().splitlines()) == failing
    assert not (tmp_path / "torn" / "evaluation.json").exists()
    again = Scripted(right(data))
    seen: list[tuple[int, int]] = []
    found = evaluate(again, data, folder=tmp_path / "torn", progress=lambda done, total: seen.append((done, total)))
    assert again.asked == [f"p{i}" for i in range(failing, 8)]
    assert seen == [(i + 1, 8) for i in range(failing, 8)]
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")
    assert found.estimates == load_evaluation(tmp_path / "whole").estimates


def test_a_request_refused_at_once_keeps_those_before_it(tmp_path: Path) -> None:
    data = labelled(8)
    with pytest.raises(InferenceError, match="busy"):
        evaluate(Refusing(right(data), 5, InferenceError("busy")), data, folder=tmp_path, in_flight=4)
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 5


def test_a_torn_last_line_is_asked_again_and_the_bytes_are_the_same(tmp_path: Path) -> None:
    data = labelled(5)
    evaluate(Scripted(right(data)), data, folder=tmp_path)
    whole = contents(tmp_path)
    for cut in (1, 20):  # the line end alone; half of the row
        (tmp_path / "scores.jsonl").write_bytes(whole["scores.jsonl"][:-cut])
        (tmp_path / "evaluation.json").unlink()
        again = Scripted(right(data))
        evaluate(again, data, folder=tmp_path)
        assert again.asked == ([] if cut == 1 else ["p4"])
        assert contents(tmp_path) == whole


def test_a_finished_evaluation_asks_nothing_and_takes_a_new_label(tmp_path: Path) -> None:
    data = labelled(4)
    first = evaluate(Scripted(right(data)), data, folder=tmp_path)
    again = Scripted(right(data))
    second = evaluate(again, data, folder=tmp_path, label="renamed", in_flight=2)
    assert again.asked == []
    assert second == first
    assert json.loads((tmp_path / "evaluation.json").read_text())["label"] == "renamed"


def test_a_killed_process_is_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
from pathlib import Path
from crucible_framework.evaluation import evaluate
from tests.evaluation.samplers_for_tests import Scripted, labelled, right
class Slow(Scripted):
    def _answer(self, prompt):
        time.sleep(0.02)
        return super()._answer(prompt)
data = labelled(200, documents=20)
evaluate(Slow(right(data)), data, folder=Path({str(tmp_path / "killed")!r}))
"""
    child = subprocess.Popen([sys.executable, "-c", code])
    rows = tmp_path / "killed" / "scores.jsonl"
    limit = time.monotonic() + 60
    while not (rows.exists() and rows.read_bytes().count(b"\n") >= 10):
        assert child.poll() is None, "the child ended before it was killed"
        assert time.monotonic() < limit
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = rows.read_bytes()
    data = labelled(200, documents=20)
    again = Scripted(right(data))
    evaluate(again, data, folder=str(tmp_path / "killed"))
    evaluate(Scripted(right(data)), data, folder=tmp_path / "whole")
    assert 0 < len(again.asked) <= 190
    assert rows.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@record
class Longer:
    """A scorer with a setting."""

    than: int

    def __call__(self, example: Example, completion: Completion) -> Score:
        return Score(name="longer", value=float(len(completion.text) > self.than))


def longer(than: int, example: Example, completion: Completion) -> Score:
    return Score(name="longer", value=float(len(completion.text) > than))


def test_another_plan_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    data = labelled(4)
    evaluate(Scripted(right(data)), data, folder=tmp_path)
    before = contents(tmp_path)
    changed = dataset([*data.examples[:3], Example(id="e3", prompt="p3", target="CONTRADICT")])
    cases: list[tuple[Callable[[], Evaluation], str]] = [
        (lambda: evaluate(Scripted(right(data), model="other"), data, folder=tmp_path), "different: model"),
        (lambda: evaluate(Scripted(right(data)), data, ["f1"], folder=tmp_path), "different: scorers"),
        (lambda: evaluate(Scripted(right(data)), data, folder=tmp_path, perplexity=True), "different: perplexity"),
        (lambda: evaluate(Scripted(right(data)), data, folder=tmp_path, params=SamplingParams(seed=1)), r"different: params\.max_tokens, params\.seed"),
        (lambda: evaluate(Scripted(right(data)), changed, folder=tmp_path), r"different: dataset\.examples, dataset\.sha256"),
        (lambda: evaluate(Scripted(right(data)), labelled(3), folder=tmp_path), r"dataset\.rows"),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            call()
    assert contents(tmp_path) == before


def test_a_scorer_with_another_setting_is_another_plan(tmp_path: Path) -> None:
    data = labelled(3)
    for name, one, other in (("record", Longer(than=3), Longer(than=9)), ("partial", functools.partial(longer, 3), functools.partial(longer, 9))):
        evaluate(Scripted(right(data)), data, [one], folder=tmp_path / name)
        evaluate(Scripted({}), data, [one], folder=tmp_path / name)  # the same setting again: nothing is asked
        with pytest.raises(ConfigError, match="different: scorers"):
            evaluate(Scripted(right(data)), data, [other], folder=tmp_path / name)


def test_a_scorer_without_source_has_a_plan(tmp_path: Path) -> None:
    space: dict[str, object] = {"Score": Score}
    exec("def mine(example, completion):\n    return Score(name='mine', value=1.0)", space)
    data = labelled(2)
    mine = space["mine"]
    assert callable(mine)
    assert evaluate(Scripted(right(data)), data, [mine], folder=tmp_path)["mine"].value == 1
    assert json.loads((tmp_path / "plan.json").read_text())["scorers"][0]["source"] == ""


@pytest.mark.parametrize(
    ("file", "text", "error", "message"),
    [
        ("plan.json", "[]", CorruptError, "holds no plan"),
        ("plan.json", "{", CorruptError, "not valid JSON"),
        ("plan.json", None, ConfigError, "no plan.json beside it"),
        ("scores.jsonl", '{"id": "e1"}\n{"id": "e0"}\n', CorruptError, "order of the data set"),
        ("scores.jsonl", '{"id": "e0"}\n', CorruptError, "'e0' lacks"),
        ("scores.jsonl", "nonsense\n{}\n", CorruptError, "scores.jsonl:1"),
        ("scores.jsonl", '{"id":"e0","document":"","target":"","completion":"","scores":{"f1":"x"}}\n', CorruptError, "the score 'x' for 'f1'"),
    ],
)
def test_a_folder_that_was_tampered_with_is_refused(tmp_path: Path, file: str, text: str | None, error: type[Exception], message: str) -> None:
    data = labelled(3)
    evaluate(Scripted(right(data)), data, folder=tmp_path)
    (tmp_path / file).unlink()
    if text is not None:
        (tmp_path / file).write_text(text)
    with pytest.raises(error, match=message):
        evaluate(Scripted(right(data)), data, folder=tmp_path)


def test_two_evaluations_cannot_share_a_folder(tmp_path: Path) -> None:
    data = labelled(2)
    with lock(tmp_path / ".lock", "evaluation folder"), pytest.raises(LockedError, match="in use"):
        evaluate(Scripted(right(data)), data, folder=tmp_path)


# ------------------------------------------------------------------------------------------------------------ bad input
def nan(example: Example, completion: Completion) -> Score:
    return Score(name="nan", value=math.nan)


def test_what_cannot_be_evaluated_is_refused_before_anything_is_asked() -> None:
    data = labelled(2)
    sampler = Scripted(right(data))
    twice = Dataset(examples=(data[0], data[0]), card=data.card)
    cases: list[tuple[Callable[[], Evaluation], type[Exception], str]] = [
        (lambda: evaluate(sampler, data, in_flight=0), ConfigError, "in_flight is 0"),
        (lambda: evaluate(sampler, data, []), ConfigError, r"scorers is \[\]"),
        (lambda: evaluate(sampler, data, "f1"), ConfigError, "scorers is 'f1'; expected a sequence"),
        (lambda: evaluate(sampler, data, ["f2"]), UnknownNameError, "Did you mean 'f1'"),
        (lambda: evaluate(sampler, Dataset(examples=(), card=data.card)), DataError, "no examples in split 'test'"),
        (lambda: evaluate(sampler, twice), DataError, "two examples with the id 'e0'"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    assert sampler.asked == []


def test_answers_and_scores_that_cannot_be_used_are_refused() -> None:
    data = labelled(2)

    class Infinite(Scripted):
        def compute_logprobs(self, prompt: object, completion: object) -> Future[tuple[float, ...]]:
            future: Future[tuple[float, ...]] = Future()
            future.set_result((-math.inf,))
            return future

    with pytest.raises(InferenceError, match="gave 2 completions for example 'e0'"):
        evaluate(Scripted(right(data), copies=2), data)
    with pytest.raises(ConfigError, match="Two measures are called 'f1'"):
        evaluate(Scripted(right(data)), data, ["f1", "f1"])
    with pytest.raises(ConfigError, match="Two measures are called 'target_nll'"):
        evaluate(Scripted(right(data)), data, [lambda example, completion: Score(name="target_nll", value=1.0)], perplexity=True)
    with pytest.raises(StatisticsError, match="'nan' gave nan for example 'e0'"):
        evaluate(Scripted(right(data)), data, [nan])
    with pytest.raises(NumericError, match="target of example 'e0'") as caught:
        evaluate(Infinite(right(data)), data, perplexity=True)
    assert caught.value.examples == ("e0",)


def test_what_waits_is_cancelled_when_one_fails() -> None:
    class Never(Scripted):
        def sample(self, prompt: object, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
            future: Future[tuple[Completion, ...]] = Future()
            if prompt == "p0":
                future.set_exception(InferenceError("no"))
            self.waiting = [*getattr(self, "waiting", []), future]
            return future

    sampler = Never({})
    with pytest.raises(InferenceError, match="no"):
        evaluate(sampler, labelled(9), in_flight=3, perplexity=True)
    assert [future.cancelled() for future in sampler.waiting] == [False, True, True]


def test_half_a_surrogate_pair_can_be_kept(tmp_path: Path) -> None:
    data = labelled(1)
    found = evaluate(Scripted({"p0": "SUPPORT \ud83d"}), data, folder=tmp_path)
    assert found.items[0].completion == "SUPPORT ?"
    assert load_evaluation(tmp_path) == found


# -------------------------------------------------------------------------------------------------------------- events
def test_events_say_what_was_done(tmp_path: Path) -> None:
    data = labelled(3)
    with pytest.raises(InferenceError), events.collect() as seen:
        evaluate(Scripted(right(data), fail={"p2": InferenceError("no")}), data, folder=tmp_path, label="base")
    assert [event["name"] for event in seen] == ["evaluation.started"]
    with events.collect() as seen:
        evaluate(Scripted(right(data)), data, folder=tmp_path, label="base")
    started, done = seen
    assert (started["name"], done["name"]) == ("evaluation.started", "evaluation.done")
    assert {key: done[key] for key in ("label", "model", "dataset", "n", "resumed")} == {
        "label": "base", "model": "scripted", "dataset": "small", "n": 3, "resumed": 2,
    }  # fmt: skip
    assert done["estimates"] == {"label_accuracy": 1.0, "majority_label": pytest.approx(1 / 3)}
    assert isinstance(done["duration_s"], float)


def test_the_scripted_sampler_says_what_it_is_told() -> None:
    assert Scripted({"p": "x"}).sample("p", GREEDY).result() == (said("x"),)
