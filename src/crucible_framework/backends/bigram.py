"""The frozen model of the fake backend: which byte follows which, as features of a token times a sum of matrices, some of them adapted.

This file does not know losses, steps or samples.
"""

from __future__ import annotations

import math
import zlib
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UnknownNameError
from ..records import LoraConfig

__all__ = ["FIRST", "PREFIX", "SECOND", "Bigram", "Tensors", "Tokens", "adapted", "generator_of"]

Tensors = dict[str, Tensor]
Tokens: TypeAlias = NDArray[np.int32] | NDArray[np.int64]
LAYERS = ("embed_proj", "q_proj", "v_proj")
WIDTH = 64
PREFIX, FIRST, SECOND = "base_model.model.", "exp_avg.", "exp_avg_sq."


def generator_of(*parts: int) -> torch.Generator:
    """Draws that each of several numbers changes."""
    seed = np.random.SeedSequence([part % 2**64 for part in parts]).generate_state(1, np.uint32)[0]
    return torch.Generator().manual_seed(int(seed))


class Bigram:
    """The frozen part of a base model: features [V, WIDTH] of each token, and one matrix [V, WIDTH] per layer, which are summed."""

    def __init__(self, name: str, vocab: int) -> None:
        generator = generator_of(zlib.crc32(name.encode()))
        self.name, self.vocab = name, vocab
        self.features = torch.randn(vocab, WIDTH, generator=generator)
        self.head = torch.stack([torch.randn(vocab, WIDTH, generator=generator) / WIDTH for _ in LAYERS]).sum(0)

    def logits(self, tensors: Tensors, lora: LoraConfig | None, tokens: Tokens, dropout: torch.Generator | None = None) -> Tensor:
        """[T, V] for tokens [T]; `dropout` draws the masks, None switches dropout off."""
        x = self.features[torch.tensor(tokens, dtype=torch.int64)]
        total = x @ self.head.T
        if lora is None:
            return total
        for layer in adapted(lora):
            seen = x
            if dropout is not None and lora.dropout > 0:
                seen = x * (torch.rand(x.shape, generator=dropout) >= lora.dropout) / (1 - lora.dropout)
            a, b = (tensors[f"{PREFIX}{layer}.lora_{part}.weight"] for part in "AB")
            total = total + (seen @ a.T) @ b.T * (lora.alpha / lora.rank)
        return total

    def shapes(self, lora: LoraConfig) -> dict[str, tuple[int, int]]:
        """The adapter's tensors: A [r, WIDTH] and B [V, r] of each adapted layer."""
        pairs = ((layer, part) for layer in adapted(lora) for part in "AB")
        return {f"{PREFIX}{layer}.lora_{part}.weight": (lora.rank, WIDTH) if part == "A" else (self.vocab, lora.rank) for layer, part in pairs}

    def fresh(self, lora: LoraConfig) -> Tensors:
        """A uniform in ±1/√WIDTH from the seed, B zero (so the adapter starts as the base model), and zero moments."""
        generator, shapes = generator_of(lora.seed), self.shapes(lora)
        tensors = {prefix + name: torch.zeros(shape) for prefix in ("", FIRST, SECOND) for name, shape in shapes.items()}
        for name in shapes:
            if ".lora_A." in name:
                tensors[name].uniform_(-1 / math.sqrt(WIDTH), 1 / math.sqrt(WIDTH), generator=generator)
        return tensors


def adapted(lora: LoraConfig) -> tuple[str, ...]:
    """The layers that an adapter changes, in the model's order."""
    chosen = set(LAYERS if lora.target_modules == ("all-linear",) else lora.target_modules)
    if unknown := sorted(chosen.difference(LAYERS)):
        raise UnknownNameError("target module", unknown[0], (*LAYERS, "all-linear"))
    return tuple(layer for layer in LAYERS if layer in chosen)
