"""GSM8K, MMLU and HumanEval from their authors' files, with the prompts that their papers use.

- `gsm8k`: grade-school word problems; the target is the worked solution that ends in `#### number`. The calculator's annotations
  (`<<48/2=24>>`) are taken out of it. A tenth of the official train file, by sha256 of the question, is `dev`. `solve` asks the question
  alone, `five_shot` puts five solved problems of `train` before it, as "Question: …", "Answer: …" (Gao et al., lm-evaluation-harness).
- `mmlu`: four choices A to D in 57 subjects; `choice` asks the question alone, `five_shot` puts the subject's five `dev` questions before it.
  `dev` has these five; there is no train split.
- `humaneval`: functions to complete; `meta` has the tests. Nothing here runs code. Only `test`.

This file does not know tokens, scorers or sandboxes.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from ..errors import FormatError
from ..records import Dataset, DatasetCard, Example, Json
from .examples import Source, check_known, make_dataset
from .sources import Row, file_card, find_files, read_rows

__all__ = ["GSM8K", "HUMANEVAL", "LETTERS", "MMLU"]

LETTERS = ("A", "B", "C", "D")
DEV_SHARE = 0.1
_ANNOTATION = re.compile(r"<<[^<>]*>>")
_SHOTS = 5


def _fix(name: str, files: str, origin: str) -> str:
    return f"Put {files} of {origin} into a folder {name!r} and set CRUCIBLE_DATA to the folder that holds it."


# --------------------------------------------------------------------------------------------------------------- gsm8k
def _find_gsm8k(data: Path | None) -> tuple[Path, ...]:
    return find_files(
        "gsm8k", (("train.jsonl",), ("test.jsonl",)), data=data, fix=_fix("gsm8k", "train.jsonl and test.jsonl", "github.com/openai/grade-school-math")
    )


def _in_dev(question: str) -> bool:
    return int.from_bytes(hashlib.sha256(question.encode()).digest(), "big") < DEV_SHARE * 2**256


def _gsm8k_shots(train: Path) -> list[tuple[str, str]]:
    """The first problems of the train part, one more than are shown, so that a problem is no example for itself."""
    found: list[tuple[str, str]] = []
    for row in read_rows(train):
        question, answer = row.text("question").strip(), row.text("answer").strip()
        if not _in_dev(question):
            found.append((question, f"Question: {question}\nAnswer: {_ANNOTATION.sub('', answer)}"))
        if len(found) > _SHOTS:
            break
    return found


def _load_gsm8k(split: str, task: str | None, data: Path | None) -> Dataset:
    check_known("split of 'gsm8k'", split, GSM8K.splits)
    task = check_known("task of 'gsm8k'", task or "solve", GSM8K.tasks)
    train, test = _find_gsm8k(data)
    path = test if split == "test" else train
    shots = _gsm8k_shots(train) if task == "five_shot" else []
    pairs: list[tuple[Row, Example]] = []
    for number, row in enumerate(read_rows(path), start=1):
        question, answer = row.text("question").strip(), row.text("answer").strip()
        if split != "test" and _in_dev(question) != (split == "dev"):
            continue
        if "####" not in answer:
            raise FormatError(f"{row.where}: the answer has no line '#### number'. Use the authors' file.")
        name = f"{path.stem}-{number}"
        meta: dict[str, Json] = {"document": name, "answer": answer.rpartition("####")[2].strip()}
        before = [text for asked, text in shots if asked != question][:_SHOTS]
        prompt = "\n\n".join([*before, f"Question: {question}\nAnswer:"]) if task == "five_shot" else question
        pairs.append((row, Example(id=name, prompt=prompt, target=_ANNOTATION.sub("", answer), meta={**meta, "question": question})))
    files = tuple(map(file_card, dict.fromkeys((train, path)))) if task == "five_shot" else (file_card(path),)
    source = "GSM8K, official test file." if split == "test" else f"GSM8K, official train file; dev is {DEV_SHARE:.0%} of it by sha256 of the question."
    citation = "Cobbe et al. 2021, Training Verifiers to Solve Math Word Problems, arXiv 2110.14168"
    card = DatasetCard(
        name="gsm8k", split=split, task=task, rows=0, sha256="", licence="MIT", source=source, citation=citation, files=files
    )  # fmt: skip
    return make_dataset(pairs, card)


GSM8K = Source(load=_load_gsm8k, find=_find_gsm8k, tasks=("solve", "five_shot"), licence="MIT")


# ---------------------------------------------------------------------------------------------------------------- mmlu
def _find_mmlu(data: Path | None) -> tuple[Path, ...]:
    wanted = (("mmlu_dev.jsonl", "mmlu_dev.jsonl.gz"), ("mmlu_test.jsonl", "mmlu_test.jsonl.gz"))
    return find_files("mmlu", wanted, data=data, fix=_fix("mmlu", "mmlu_dev.jsonl and mmlu_test.jsonl.gz (id, subject, question, choices, answer)", "MMLU"))


def _asked(row: Row) -> tuple[str, str, str]:
    """(subject, question with its choices, the right letter) of a row."""
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or len(choices) != len(LETTERS) or not all(isinstance(choice, str) for choice in choices):
        raise FormatError(f"{row.where}: 'choices' is {choices!r}; expected four texts. Correct the row.")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(LETTERS):
        raise FormatError(f"{row.where}: 'answer' is {answer!r}; expected 0, 1, 2 or 3. Correct the row.")
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    return row.text("subject"), f"{row.text('question').strip()}\n{listed}\nAnswer:", LETTERS[answer]


def _load_mmlu(split: str, task: str | None, data: Path | None) -> Dataset:
    check_known("split of 'mmlu'", split, MMLU.splits)
    task = check_known("task of 'mmlu'", task or "choice", MMLU.tasks)
    dev, test = _find_mmlu(data)
    shots: dict[str, list[str]] = {}
    if task == "five_shot":
        for row in read_rows(dev):
            subject, question, letter = _asked(row)
            shots.setdefault(subject, []).append(f"{question} {letter}")
    pairs: list[tuple[Row, Example]] = []
    for row in read_rows(dev if split == "dev" else test):
        subject, question, letter = _asked(row)
        head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}."
        own = f"{question} {letter}"  # a dev question is no example for itself
        before = [shot for shot in shots.get(subject, ()) if shot != own][:_SHOTS]
        meta: dict[str, Json] = {"document": row.text("id"), "subject": subject, "labels": list(LETTERS)}
        pairs.append((row, Example(id=row.text("id"), prompt="\n\n".join((head, *before, question)), target=letter, meta=meta)))
    citation = "Hendrycks et al. 2021, Measuring Massive Multitask Language Understanding, ICLR 2021, arXiv 2009.03300"
    files = tuple(map(file_card, (dev, test) if task == "five_shot" else (dev if split == "dev" else test,)))
    source = f"MMLU, {split} questions."
    card = DatasetCard(
        name="mmlu", split=split, task=task, rows=0, sha256="", licence="MIT", source=source, citation=citation, labels=LETTERS, files=files
    )  # fmt: skip
    return make_dataset(pairs, card)


MMLU = Source(load=_load_mmlu, find=_find_mmlu, tasks=("choice", "five_shot"), licence="MIT", splits=("dev", "test"))


# ----------------------------------------------------------------------------------------------------------- humaneval
def _find_humaneval(data: Path | None) -> tuple[Path, ...]:
    wanted = (("HumanEval.jsonl.gz", "HumanEval.jsonl"),)
    return find_files("humaneval", wanted, data=data, fix=_fix("humaneval", "HumanEval.jsonl.gz", "github.com/openai/human-eval"))


def _load_humaneval(split: str, task: str | None, data: Path | None) -> Dataset:
    check_known("split of 'humaneval'", split, HUMANEVAL.splits)
    check_known("task of 'humaneval'", task or "complete", HUMANEVAL.tasks)
    (path,) = _find_humaneval(data)
    pairs: list[tuple[Row, Example]] = []
    for row in read_rows(path):
        name = row.text("task_id")
        meta: dict[str, Json] = {"document": name, "entry_point": row.text("entry_point"), "test": row.text("test")}
        pairs.append((row, Example(id=name, prompt=row.text("prompt"), target=row.text("canonical_solution"), meta=meta)))
    citation = "Chen et al. 2021, Evaluating Large Language Models Trained on Code, arXiv 2107.03374"
    card = DatasetCard(
        name="humaneval", split=split, task="complete", rows=0, sha256="", licence="MIT", source="HumanEval, all problems.", citation=citation,
        files=(file_card(path),),
    )  # fmt: skip
    return make_dataset(pairs, card)


HUMANEVAL = Source(load=_load_humaneval, find=_find_humaneval, tasks=("complete",), licence="MIT", splits=("test",))
