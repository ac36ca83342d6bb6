"""SkyRL's JAX backend as a servant of `benchmarks/skyrl.py`: runs under the Python that has skyrl-tx, which need not have Crucible.

usage: python skyrl.py '{"folder": …, "dtype": …, "rank": …, "alpha": …, "core": …}'      one JSON request a line on stdin, one JSON answer a line on stdout

The backend is driven in this process, as its engine drives it: no server, no database. Two adapter slots (SkyRL keeps the first for the base
model) and no rank beyond the one that is trained, because its optimizer walks through every slot.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = "a"


def cpu_s() -> float:
    """Processor seconds of this process, its threads and its children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def timed(do: Callable[..., dict[str, Any]], **request: Any) -> dict[str, Any]:
    """What `do` gives, with its seconds."""
    cpu, wall = cpu_s(), time.perf_counter()
    found = do(**request)
    return {**found, "cpu_s": cpu_s() - cpu, "wall_s": time.perf_counter() - wall}


def readable(folder: Path, dtype: str, into: Path) -> Path:
    """The model's folder as skyrl-tx 0.3 reads it: it looks for `architectures` and for `rope_theta` where transformers 4 had them."""
    for file in folder.iterdir():
        if file.name not in ("config.json", "tokenizer_config.json"):
            (into / file.name).symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": dtype, "rope_theta": config.get("rope_parameters", config)["rope_theta"]}
    (into / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (into / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return into


class Worker:
    """One LoRA model of SkyRL's backend."""

    def __init__(self, folder: Path, given: dict[str, Any]) -> None:
        jax_backend: Any = importlib.import_module("tx.tinker.backends.jax")
        self.types: Any = importlib.import_module("tx.tinker.types")
        config = jax_backend.JaxBackendConfig(max_lora_adapters=2, max_lora_rank=given["rank"])
        self.backend: Any = jax_backend.JaxBackend(str(folder), config)
        self.backend.create_model(MODEL, self.types.LoraConfig(rank=given["rank"], alpha=given["alpha"], seed=0))

    def about(self) -> dict[str, Any]:
        """Versions, and what is trained."""
        names = ("skyrl-tx", "jax", "flax", "pydantic")
        model = self.backend.model_config
        return {"versions": {name: importlib.metadata.version(name) for name in names}, "dtype": str(model.dtype), "python": sys.version.split()[0]}

    def step(self, data: list[dict[str, Any]], adam: dict[str, float]) -> dict[str, Any]:
        """Forward, backward, AdamW; the loss is in nats per weight, the gradient that of SkyRL's own mean over sequences."""
        count = len(data)
        prepared = self.types.PreparedModelPassBatch(
            all_input_ids=[one["tokens"] for one in data],
            all_targets=[one["targets"] for one in data],
            all_token_weights=[one["weights"] for one in data],
            all_sampling_logprobs=[[0.0] * len(one["tokens"]) for one in data],
            all_advantages=[[0.0] * len(one["tokens"]) for one in data],
            all_model_ids=[MODEL] * count,
            all_loss_fn_types=[self.types.LOSS_TYPES["cross_entropy"]] * count,
            all_loss_fn_configs=[None] * count,
            request_batch_slices=[("r", MODEL, 0, count)],
        )
        outputs = self.backend.forward_backward(prepared)["r"].loss_fn_outputs
        self.backend.optim_step(MODEL, self.types.OptimStepInput(adam_params=self.types.AdamParams(**adam)))
        jax: Any = importlib.import_module("jax")
        jax.block_until_ready((self.backend.lora_params, self.backend.accumulated_grads))
        return {"loss": sum(sum(one["elementwise_loss"]["data"]) for one in outputs) / sum(sum(one["weights"]) for one in data)}


def main() -> None:
    """Answers until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # SkyRL's log would stand between the answers
    given = json.loads(sys.argv[1])
    os.sched_setaffinity(0, {given["core"]})  # before JAX is there: XLA makes a thread for each core it sees

    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        worker = Worker(readable(Path(given["folder"]), given["dtype"], scratch), given)
        answer(worker.about())
        known: dict[str, Callable[..., dict[str, Any]]] = {"step": worker.step}
        for line in sys.stdin:
            request = json.loads(line)
            answer(timed(known[request.pop("do")], **request))


if __name__ == "__main__":
    main()
