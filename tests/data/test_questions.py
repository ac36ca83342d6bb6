"""GSM8K, MMLU, HumanEval and FeverSymmetric: real rows where they are here, and what malformed ones say."""

from __future__ import annotations

import gzip
from pathlib import Path

import orjson
import pytest

from crucible_framework.data import datasets, load_dataset
from crucible_framework.errors import DataError, FormatError, NotFoundError, UnknownNameError
from crucible_framework.records import Dataset, Json

PROBLEM = {"question": "A hen lays 2 eggs a day. How many in 3 days?", "answer": "3 days give 3*2=<<3*2=6>>6 eggs.\n#### 6"}
CHOICE: dict[str, Json] = {"id": "s/0", "subject": "high_school_physics", "question": "What falls?", "choices": ["up", "down", "left", "right"], "answer": 1}


def write(path: Path, rows: list[dict[str, Json]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def documents(dataset: Dataset) -> set[str]:
    return {str(example.meta["document"]) for example in dataset}


def test_gsm8k_takes_annotations_out_and_splits_by_question(tmp_path: Path) -> None:
    rows: list[dict[str, Json]] = [{**PROBLEM, "question": f"{PROBLEM['question']} ({number})"} for number in range(200)]
    write(tmp_path / "gsm8k/train.jsonl", rows)
    write(tmp_path / "gsm8k/test.jsonl", rows[:3])
    train, dev, test = (load_dataset("gsm8k", split=split, data=tmp_path) for split in ("train", "dev", "test"))
    assert len(train) + len(dev) == 200
    assert 5 <= len(dev) <= 40
    assert not {example.prompt for example in train} & {example.prompt for example in dev}
    assert test.examples[0].target == "3 days give 3*2=6 eggs.\n#### 6"
    assert test.examples[0].meta["answer"] == "6"
    write(tmp_path / "gsm8k/test.jsonl", [{"question": "?", "answer": "six"}])
    with pytest.raises(FormatError, match=r"test\.jsonl:1.*####"):
        load_dataset("gsm8k", split="test", data=tmp_path)


def test_mmlu_asks_as_its_paper_does(tmp_path: Path) -> None:
    write(tmp_path / "mmlu/mmlu_dev.jsonl", [{**CHOICE, "id": f"dev/{k}", "question": f"Question {k}?"} for k in range(6)])
    write(tmp_path / "mmlu/mmlu_test.jsonl.gz", [CHOICE])
    example = load_dataset("mmlu", split="test", data=tmp_path).examples[0]
    assert example.prompt == (
        "The following are multiple choice questions (with answers) about high school physics.\n\nWhat falls?\nA. up\nB. down\nC. left\nD. right\nAnswer:"
    )
    assert example.target == "B"
    shown = str(load_dataset("mmlu", split="test", task="five_shot", data=tmp_path).examples[0].prompt)
    assert shown.count("Answer: B") == 5
    assert shown.endswith("Answer:")
    own = load_dataset("mmlu", split="dev", task="five_shot", data=tmp_path).examples[2]
    assert str(own.prompt).count("Question 2?") == 1
    with pytest.raises(UnknownNameError, match="dev"):
        load_dataset("mmlu", split="train", data=tmp_path)


@pytest.mark.parametrize(("key", "value"), [("choices", ["a", "b"]), ("choices", [1, 2, 3, 4]), ("answer", 4), ("answer", True), ("answer", "B")])
def test_a_malformed_question_names_its_line(tmp_path: Path, key: str, value: Json) -> None:
    write(tmp_path / "mmlu/mmlu_dev.jsonl", [CHOICE])
    write(tmp_path / "mmlu/mmlu_test.jsonl", [CHOICE, {**CHOICE, "id": "s/1", key: value}])
    with pytest.raises(FormatError, match=rf"mmlu_test\.jsonl:2.*{key}"):
        load_dataset("mmlu", split="test", data=tmp_path)


def test_fever_families_stay_in_one_split(tmp_path: Path) -> None:
    def row(name: str, claim: str, evidence: str, key: str, label: str = "SUPPORTS") -> dict[str, Json]:
        return {"id": name, "claim": claim, key: evidence, "label": label}

    folder = tmp_path / "fever_symmetric"
    write(folder / "symmetric_v0.2_fever_symmetric_dev.jsonl", [row("7", "a", "A", "evidence"), row("70000002", "b", "A", "evidence", "REFUTES")])
    full = [row("70000003", "x", "X", "evidence_sentence"), row("8", "b", "Y", "evidence_sentence"), row("80000002", "z", "Z", "evidence_sentence")]
    write(folder / "symmetric_v0.1_fever_symmetric_full.jsonl", [*full, row("9", "n", "N", "evidence_sentence")])
    dev, test = load_dataset("fever_symmetric", split="dev", data=tmp_path), load_dataset("fever_symmetric", split="test", data=tmp_path)
    assert [example.target for example in dev] == ["SUPPORT", "CONTRADICT"]
    assert documents(dev) == {"7"}
    assert [example.id for example in test] == ["9"], "one shared claim takes the whole family out"
    write(folder / "symmetric_v0.2_fever_symmetric_dev.jsonl", [row("7", "a", "A", "evidence", "MAYBE")])
    with pytest.raises(FormatError, match=r"dev\.jsonl:1.*MAYBE"):
        load_dataset("fever_symmetric", split="dev", data=tmp_path)


@pytest.mark.parametrize("name", ["gsm8k", "mmlu", "humaneval", "fever_symmetric"])
def test_missing_files_say_where_to_put_them(tmp_path: Path, name: str) -> None:
    with pytest.raises(NotFoundError, match="CRUCIBLE_DATA"):
        load_dataset(name, split="test", data=tmp_path)
    (listing,) = [one for one in datasets(tmp_path) if one.name == name]
    assert listing.missing


@pytest.mark.parametrize(
    ("name", "split", "rows"),
    [("gsm8k", "test", 1319), ("mmlu", "test", 14042), ("mmlu", "dev", 285), ("humaneval", "test", 164), ("fever_symmetric", "dev", 708)],
)
def test_the_real_files_give_every_row(real_data: Path, name: str, split: str, rows: int) -> None:
    dataset = load_dataset(name, split=split, data=real_data)
    assert len(dataset) == rows
    assert all(example.target for example in dataset)


def test_the_real_splits_are_disjoint(real_data: Path) -> None:
    dev, test = (load_dataset("fever_symmetric", split=split, data=real_data) for split in ("dev", "test"))
    assert len(test) > 200
    assert not documents(dev) & documents(test)
    for key in ("claim", "passage"):
        assert not {example.meta[key] for example in dev} & {example.meta[key] for example in test}
    sizes = [len(load_dataset("gsm8k", split=split, data=real_data)) for split in ("train", "dev")]
    assert sum(sizes) == 7473


def test_humaneval_keeps_the_tests_beside_the_prompt(tmp_path: Path) -> None:
    problem = {
        "task_id": "HumanEval/0",
        "prompt": "def f():\n",
        "entry_point": "f",
        "canonical_solution": "    return 1\n",
        "test": "def check(c): assert c() == 1",
    }
    write(tmp_path / "humaneval/HumanEval.jsonl.gz", [dict(problem)])
    (example,) = load_dataset("humaneval", split="test", data=tmp_path).examples
    assert example.target == "    return 1\n"
    assert example.meta["entry_point"] == "f"
    write(tmp_path / "humaneval/HumanEval.jsonl.gz", [dict(problem), dict(problem)])
    with pytest.raises(DataError):
        load_dataset("humaneval", split="test", data=tmp_path)


def test_gsm8k_shows_five_solved_problems_and_none_of_them_is_the_question(tmp_path: Path) -> None:
    rows: list[dict[str, Json]] = [
        {"question": f"A hen lays {n} eggs a day. How many in 3 days?", "answer": f"3 days give 3*{n}=<<3*{n}={3 * n}>>{3 * n} eggs.\n#### {3 * n}"}
        for n in range(2, 42)
    ]  # fmt: skip
    write(tmp_path / "gsm8k/train.jsonl", rows)
    write(tmp_path / "gsm8k/test.jsonl", [{**PROBLEM}, {**PROBLEM, "question": "A cow?"}])
    plain = {split: load_dataset("gsm8k", split=split, data=tmp_path) for split in ("train", "dev", "test")}
    shown = {split: load_dataset("gsm8k", split=split, task="five_shot", data=tmp_path) for split in plain}
    held_out = [str(example.meta["question"]) for example in plain["dev"]]
    assert held_out
    for split, dataset in shown.items():
        assert [example.id for example in dataset] == [example.id for example in plain[split]]
        for example in dataset:
            blocks = str(example.prompt).split("\n\n")
            assert len(blocks) == 6
            assert blocks[-1] == f"Question: {example.meta['question']}\nAnswer:"
            assert all(block.startswith("Question: ") and "\nAnswer: 3 days" in block and "####" in block and "<<" not in block for block in blocks[:5])
            assert not any(str(example.meta["question"]) in block for block in blocks[:5]), "a problem is no example for itself"
            assert not any(question in block for question in held_out for block in blocks[:5]), "dev shows nothing"
    assert [one.name for one in shown["test"].card.files] == ["train.jsonl", "test.jsonl"]
    assert [one.name for one in shown["train"].card.files] == ["train.jsonl"]


def test_real_gsm8k_shots_are_the_first_of_its_train_part(real_data: Path) -> None:
    test = load_dataset("gsm8k", split="test", task="five_shot", data=real_data)
    assert len(test) == 1319
    train = load_dataset("gsm8k", split="train", data=real_data)
    head = "\n\n".join(f"Question: {example.meta['question']}\nAnswer: {example.target}" for example in train.examples[:5])
    assert all(str(example.prompt).startswith(head) for example in test)
