"""The way from rows to batches beside what the tokenizer alone takes for the same texts.

usage: python benchmarks/data.py [--rows N] [--rounds N] [--save NAME]

Rows are short questions with one of two answers, in the chat template of `smollm2-135m`: about 50 tokens. The limit is one call of the
tokenizers library on all rendered texts. Both take turns; every figure is a median. --save NAME writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from crucible_framework.backends.local.bases import locate
from crucible_framework.config import places
from crucible_framework.data import Batches, HuggingFaceTokenizer, render_all
from crucible_framework.data.token_files import TokenizerFile
from crucible_framework.records import Example


def seconds(work: Callable[[], object]) -> float:
    """How long it takes, by the wall."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", metavar="NAME")
    given = parser.parse_args()
    folder = locate("smollm2-135m", places().cache, None)
    tokenizer, file = HuggingFaceTokenizer(folder, "smollm2-135m"), TokenizerFile.of(folder)
    assert file is not None
    rows = [Example(id=str(i), prompt=f"Is {i} an even number?", target="no" if i % 2 else "yes") for i in range(given.rows)]
    data = render_all(rows, tokenizer)
    texts = [file.decode(one.tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False) for one in data.data]
    took: dict[str, list[float]] = {"tokenizer alone": [], "render_all": [], "an epoch of batches": []}
    for _ in range(given.rounds):
        took["tokenizer alone"].append(seconds(lambda: file.encode_all(texts)))
        took["render_all"].append(seconds(lambda: render_all(rows, tokenizer)))
        batches = Batches(data.data, 8, seed=0)
        took["an epoch of batches"].append(seconds(lambda: [batches.at(i) for i in range(batches.per_epoch)]))  # noqa: B023 - called at once
    per_million = {name: statistics.median(times) / given.rows * 1e6 for name, times in took.items()}
    print(f"{given.rows} rows of {data.tokens / given.rows:.0f} tokens, {given.rounds} rounds; seconds per million rows:")
    for name, value in per_million.items():
        print(f"  {name:22} {value:7.1f}   ({value / per_million['tokenizer alone']:.2f} of the tokenizer alone)")
    if given.save:
        target = Path(__file__).parent / "results" / f"{given.save}.json"
        target.write_text(json.dumps({"rows": given.rows, "tokens": data.tokens, "seconds_per_million_rows": per_million}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
