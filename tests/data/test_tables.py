"""Files of the user's own: prompts with completions, or chats, in JSON lines or CSV."""

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.data import load_dataset
from crucible_framework.errors import ConfigError, DataError, FormatError, NotFoundError, UnknownNameError
from crucible_framework.events import collect
from crucible_framework.records import Message

TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(lambda text: bool(text.strip()))


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8),
    names=st.sampled_from([("prompt", "completion"), ("input", "output"), ("question", "answer")]),
)
def test_what_is_in_the_file_is_what_comes_out(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], names: tuple[str, str]) -> None:
    folder = tmp_path_factory.mktemp("table")
    lines = write(folder / "a.jsonl", [dict(zip(names, row, strict=True)) for row in rows])
    with (folder / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([names, *rows])
    for path in (lines, folder / "a.csv"):
        dataset = load_dataset(path)
        assert [(example.prompt, example.target) for example in dataset] == rows
        assert len({example.id for example in dataset}) == len(rows)
        assert all(example.meta == {} for example in dataset)


def test_ids_splits_and_other_columns(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "prompt": "a", "completion": "b", "split": "train", "document": "d1", "label": "SUPPORT"},
        {"id": "two", "prompt": "c", "completion": "d", "split": "test", "document": "d2"},
    ]
    path = write(tmp_path / "mine.jsonl", rows)
    (train,) = load_dataset(str(path))
    assert (train.id, train.meta) == ("1", {"document": "d1", "label": "SUPPORT"})
    test = load_dataset(path, split="test")
    assert [example.id for example in test] == ["two"]
    assert (test.card.name, test.card.split, test.card.task, test.card.rows) == ("mine", "test", "completion", 1)
    with pytest.raises(UnknownNameError, match=r"No split is called 'tets'\. Did you mean 'test'"):
        load_dataset(path, split="tets")


def test_the_card_says_what_was_read(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", [{"prompt": "a", "completion": "b"}])
    with collect() as events:
        card = load_dataset(path, split="train").card
    assert (card.split, card.licence, card.source) == ("all", "not stated in the file", "File mine.jsonl.")
    assert [(file.name, file.sha256) for file in card.files] == [("mine.jsonl", hashlib.sha256(path.read_bytes()).hexdigest())]
    (event,) = events
    expected = {"name": "data.loaded", "dataset": "mine", "split": "all", "task": "completion", "rows": 1, "sha256": card.sha256}
    assert {key: event[key] for key in expected} == expected


def test_the_cards_sum_follows_the_examples_alone(tmp_path: Path) -> None:
    one, two = ({"id": "1", "prompt": "a", "completion": "b"}, {"id": "2", "prompt": "a", "completion": "b"})
    both = load_dataset(write(tmp_path / "a.jsonl", [one, two])).card.sha256
    assert load_dataset(write(tmp_path / "b.jsonl", [one, two])).card.sha256 == both
    assert load_dataset(write(tmp_path / "c.jsonl", [two, one])).card.sha256 != both
    assert load_dataset(write(tmp_path / "d.jsonl", [one, two | {"completion": "c"}])).card.sha256 != both


def test_chats_end_in_the_assistants_turn(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (example,) = load_dataset(write(tmp_path / "a.jsonl", [{"messages": turns, "document": "x"}]))
    assert example.prompt == (Message(role="system", content="Be short."), Message(role="user", content="Hi"))
    assert example.target == "Hello"
    assert example.meta == {"document": "x"}


def test_a_folder_holds_a_file_for_each_split(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    write(folder / "train.jsonl", [{"prompt": "a", "completion": "b"}])
    (folder / "test.csv").write_text("prompt,completion\nc,d\n")
    (folder / "notes.txt").write_text("no data")
    for name in (folder, str(folder)):
        train, test = load_dataset(name), load_dataset(name, split="test")
        assert (train.card.name, train.card.split, train[0].target) == ("mine", "train", "b")
        assert (test.card.name, test.card.split, test[0].target) == ("mine", "test", "d")
    with pytest.raises(UnknownNameError, match=r"split of the folder 'mine' is called 'dev'.*Known: test, train"):
        load_dataset(folder, split="dev")


def test_a_folder_without_a_slash_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine" / "train.jsonl", [{"prompt": "a", "completion": "b"}])
    monkeypatch.chdir(tmp_path)
    assert len(load_dataset("mine")) == 1


def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"holds no data file\. Expected <split>\.jsonl"):
        load_dataset(tmp_path)


def test_files_below_the_folder_given(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    assert len(load_dataset("a.jsonl", data=tmp_path)) == 1
    with pytest.raises(NotFoundError, match=r"no data file 'b\.jsonl'"):
        load_dataset("b.jsonl", data=tmp_path)


OK = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "a"}, r"the row has 'prompt'; expected 'prompt' with 'completion', .* or 'messages'"),
        ({}, "the row has nothing"),
        ({"prompt": "a", "completion": ""}, "'completion' is ''; expected text"),
        ({"prompt": ["a"], "completion": "b"}, r"'prompt' is \['a'\]; expected text"),
        ({"messages": []}, r"'messages' is \[\]; expected a list of turns"),
        ({"messages": "hello"}, "'messages' is 'hello'"),
        ({"messages": ["hello"]}, "turn 1 of 'messages' is 'hello'"),
        ({"messages": [{"role": "human", "content": "a"}]}, r"turn 1 .*expected 'role' \(system, user, assistant, tool\)"),
        ({"messages": [{"role": "user", "content": None}]}, "turn 1 of 'messages'"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}, "turn 2 of 'messages'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "'messages' end in 'user' after 0 turns"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "'messages' end in 'user' after 1 turns"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "'messages' end in 'assistant' after 0 turns"),
        ({"id": "", **OK}, "'id' is ''"),
        ({"id": True, **OK}, "'id' is True"),
        ({"id": 1.5, **OK}, "'id' is 1.5"),
        ([1], "the line is a JSON list"),
    ],
)
def test_malformed_rows_give_file_and_line(tmp_path: Path, row: object, match: str) -> None:
    path = write(tmp_path / "a.jsonl", [{**OK, "id": "first"}, row])
    with pytest.raises(FormatError, match=rf"{path}:2: .*{match}"):
        load_dataset(path)


def test_duplicate_ids_give_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"id": 1, **OK}, {"id": "2", **OK}, {"id": "1", **OK}])
    with pytest.raises(DataError, match=rf"id '1' stands at {path}:1 and again at {path}:3"):
        load_dataset(path)


def test_a_document_in_two_splits_is_refused(tmp_path: Path) -> None:
    rows = [{**OK, "split": "train", "document": "d1"}, {**OK, "split": "train", "document": "d1"}, {**OK, "split": "test", "document": "d2"}]
    assert len(load_dataset(write(tmp_path / "a.jsonl", rows))) == 2
    assert len(load_dataset(write(tmp_path / "c.jsonl", [*rows, {**OK, "split": "test", "document": ""}]))) == 2
    path = write(tmp_path / "b.jsonl", [*rows, {**OK, "split": "test", "document": "d1"}, {**OK, "split": "dev"}])
    with pytest.raises(DataError, match=rf"Document 'd1' is in split 'train' at {path}:1 and in 'test' at {path}:4"):
        load_dataset(path)


def test_a_document_in_two_files_of_a_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{**OK, "document": "d1"}, {**OK, "document": "d2"}])
    write(tmp_path / "test.jsonl", [{**OK, "document": "d3"}])
    write(tmp_path / "other.jsonl", [{**OK, "document": "d1"}])
    assert len(load_dataset(tmp_path)) == 2
    write(tmp_path / "test.jsonl", [{**OK, "document": "d3"}, {**OK, "document": "d2"}])
    for split in ("train", "test"):
        with pytest.raises(DataError, match=r"Document 'd2' is in split 'test' at .*test\.jsonl:2 and in 'train' at .*train\.jsonl:2"):
            load_dataset(tmp_path, split=split)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"a\.jsonl holds 0 rows"):
        load_dataset(tmp_path / "a.jsonl")


def test_an_unknown_task(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"No task of a file is called 'completions'\. Did you mean 'completion'"):
        load_dataset(write(tmp_path / "a.jsonl", [OK]), task="completions")


def test_limits(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{**OK, "id": n} for n in range(5)])
    whole, some = load_dataset(path), load_dataset(path, limit=2)
    assert some.examples == whole.examples[:2]
    assert (some.card.rows, some.card.source) == (2, "File a.jsonl. Only the first 2 of 5 examples.")
    assert some.card.sha256 != whole.card.sha256
    assert load_dataset(path, limit=5) == load_dataset(path, limit=99) == whole
    for limit in (0, -1):
        with pytest.raises(ConfigError, match=f"limit is {limit} examples"):
            load_dataset(path, limit=limit)


def test_names_without_a_suffix_are_data_sets() -> None:
    with pytest.raises(
        UnknownNameError, match=r"No data set is called 'minifcat'\. Did you mean 'minifact'.*\? Known: .*, minifact, mmlu, scifact\. Your own: a path"
    ):
        load_dataset("minifcat")


def test_json_values_are_kept_as_they_are(tmp_path: Path) -> None:
    extra: dict[str, Any] = {"n": 1.5, "list": [1, None, {"a": True}], "text": " spaced "}
    (example,) = load_dataset(write(tmp_path / "a.jsonl", [{**OK, **extra}]))
    assert cast("dict[str, Any]", example.meta) == extra
