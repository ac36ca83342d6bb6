"""Small real models and data for the local engine's tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from crucible_framework.protocols import Loss
from crucible_framework.records import Batch, Datum

VOCAB = 320
TEXTS = ("water boils at a hundred degrees", "the claim is wrong", "user assistant system", "to be or not to be")


def datum(name: str, length: int, *, seed: int, weighted: int | None = None, vocab: int = 256, candidates: int = 0) -> Datum:
    """Random tokens; the last `weighted` positions count."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, length + 1)
    targets = tokens[1:].astype(np.int64) if not candidates else rng.integers(0, vocab, (length, candidates))
    weights = np.zeros(targets.shape, dtype=np.float32)
    weights[length - (length if weighted is None else weighted) :] = rng.uniform(0.2, 1.0, weights[length - (length if weighted is None else weighted) :].shape)
    return Datum(id=name, tokens=tokens[:-1].astype(np.int32), targets=targets, weights=weights)


def batch(*lengths: int, seed: int = 0, weighted: int | None = 3, candidates: int = 0) -> Batch:
    """A batch of random data of these lengths."""
    return Batch(data=tuple(datum(f"d{i}", n, seed=seed + i, weighted=weighted, candidates=candidates) for i, n in enumerate(lengths)))


def cross_entropy(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    terms = [-(torch.tensor(d.weights).to(logp) * logp).sum() for d, logp in zip(data, logprobs, strict=True)]
    return torch.stack(terms).sum(), {}


CE = Loss(name="ce", fn=cross_entropy, source="test")


def _logits_entropy(data: Sequence[Datum], logits: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    terms = []
    for d, scores in zip(data, logits, strict=True):
        logp = scores.log_softmax(-1).gather(-1, torch.tensor(d.targets)[:, None].to(scores.device))[:, 0]
        terms.append(-(torch.tensor(d.weights).to(logp) * logp).sum())
    return torch.stack(terms).sum(), {"rows": float(sum(len(s) for s in logits))}


CE_FROM_LOGITS = Loss(name="ce_from_logits", fn=_logits_entropy, source="test", needs="logits")


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer trained on the spot, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    fast.save_pretrained(str(folder))


def make_qwen(folder: Path, seed: int = 3, **changes: Any) -> Path:
    """A small random Qwen2 (biases on q, k, v; tied head) with a tokenizer, as a Hugging Face folder."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    return save_model(folder, Qwen2ForCausalLM(Qwen2Config(**(settings | changes))), seed)


def save_model(folder: Path, model: nn.Module, seed: int) -> Path:
    """Random weights of a visible size, saved with a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 and len(parameter) == 48 else 0.0, 0.1, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    cast("Any", model).save_pretrained(str(folder))
    make_tokenizer(folder)
    return folder
