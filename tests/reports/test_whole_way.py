"""The report on what the evaluation itself writes: shapes, names and numbers fit without a translation between them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from crucible_framework.data import load_dataset
from crucible_framework.evaluation import compare, evaluate
from crucible_framework.files import write_json
from crucible_framework.records import Completion, Dataset, Prompt, SamplingParams
from crucible_framework.reports import write_report


class Reader:
    """Answers the prompts of a data set with its targets, except every n-th."""

    def __init__(self, model: str, dataset: Dataset, wrong_every: int) -> None:
        self.model = model
        self._answers = {
            example.prompt: ("<b>NOT_ENOUGH_INFO</b>" if example.target != "NOT_ENOUGH_INFO" else "SUPPORT") if index % wrong_every == 0 else example.target
            for index, example in enumerate(dataset)
        }

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        done: Future[tuple[Completion, ...]] = Future()
        done.set_result((Completion(text=self._answers[prompt], tokens=(1,), logprobs=(-0.1,), stop_reason="stop", prompt_tokens=3),))  # type: ignore[index]
        return done

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        done: Future[tuple[float, ...]] = Future()
        done.set_result((-0.5, -0.25 * len(self.model)))
        return done


def test_what_evaluate_and_compare_write_is_what_the_report_reads(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first", steps=20, evaluated=False)
    dataset = load_dataset("minifact", split="test")
    base, adapter = (
        evaluate(Reader(name, dataset, wrong), dataset, ("label_accuracy", "exact_match"), label=name, folder=folder / "eval" / name, perplexity=True)
        for name, wrong in (("base", 2), ("adapter", 5))
    )
    finding = compare(base, adapter)
    write_json(folder / "findings.json", {"findings": [finding]})
    html, markdown = (path.read_text(encoding="utf-8").replace("\u00a0", " ") for path in write_report(folder))
    before, after = base["label_accuracy"], adapter["label_accuracy"]
    low, high = (f"{100 * end:+.1f}".replace("-", "−") for end in finding.interval)
    for text in (
        f"Label accuracy on {len(dataset)} claims went from {100 * before.value:.1f} % (95 % interval {100 * before.low:.1f} to {100 * before.high:.1f} %)",
        f"{100 * after.value:.1f} % (95 % interval {100 * after.low:.1f} to {100 * after.high:.1f} %) after",
        f"difference of {100 * finding.effect:+.1f} points (95 % interval {low} to {high}, clustered by {finding.clusters} documents)",
        f"Always giving the commonest label would score {100 * base['majority_label'].value:.1f} %",
        dataset.card.sha256,
    ):
        assert text in html, text
        assert text in markdown, text
    assert "perplexity" in html
    assert "&lt;b&gt;NOT_ENOUGH_INFO&lt;/b&gt;" in html
    assert "<b>NOT_ENOUGH_INFO" not in html
    assert "may disagree" not in html
    with (folder / "eval/base/scores.jsonl").open("a") as file:
        file.write('{"id": "added"}\n')
    assert "eval/base/scores.jsonl is not the file that its evaluation.json sums up" in write_report(folder, ("html",))[0].read_text()
