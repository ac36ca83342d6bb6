"""What exact per-example gradient norms cost, as a share of a training step of the local engine.

Steps with and without them alternate; their ratio is of processor time, so that other work on the machine counts little. `--base-model tiny` needs no
download. Expected on smollm2-135m: at most 25 % more. Examples of one passage, whose common start is otherwise computed once, cost more: see the last line.
"""

from __future__ import annotations

import argparse
import statistics
import time

import crucible_framework as cf
from crucible_framework.data import render
from crucible_framework.losses import resolve
from crucible_framework.records import AdamConfig, Batch


def seconds(work: object) -> float:
    start = time.process_time()
    work()  # type: ignore[operator]
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"])
    args = parser.parse_args()
    rows = list(cf.load_dataset("minifact", split="train"))
    loss = resolve("cross_entropy")
    with cf.connect("local", dtype=args.dtype) as backend:
        tokenizer = backend.tokenizer(args.base_model)
        session = backend.train(args.base_model, cf.LoraConfig(target_modules=tuple(args.targets)))
        passages = {row.prompt: row for row in rows}
        stride = max(1, len(passages) // args.batch_size)
        kinds = {"different passages": list(passages.values())[::stride][: args.batch_size], "one passage": rows[: args.batch_size]}
        for kind, chosen in kinds.items():
            batch = Batch(data=tuple(render(row, tokenizer) for row in chosen))

            def step(norms: bool, batch: Batch = batch) -> None:
                (session.forward_backward_examples if norms else session.forward_backward)(batch, loss).result()  # type: ignore[attr-defined]
                session.optim_step(AdamConfig()).result()

            step(False), step(True)
            ratios = [(seconds(lambda: step(True)), seconds(lambda: step(False))) for _ in range(args.pairs)]
            found = sorted(a / b for a, b in ratios)
            plain = statistics.median(b for _, b in ratios)
            spread = f"× {statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"
            print(f"{kind}: {batch.tokens} tokens, a step {plain:.2f} s of processor time, with norms {spread}")


if __name__ == "__main__":
    main()
