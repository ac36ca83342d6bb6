"""Low-rank adapters beside frozen linear layers, named and initialised as PEFT does.

An adapter is a plain mapping of fp32 tensors under PEFT's names; what is active in an engine stands in one `Slot` that every `LoraLinear`
of the base reads, so that one frozen base serves any number of adapters. Layers that the active adapter does not name compute the base's
own numbers. This file does not know losses, optimizers or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import UnknownNameError
from ...records import LoraConfig

__all__ = ["Active", "Adapter", "LoraLinear", "Slot", "init_adapter", "install", "layer_names", "tensor_shapes"]

Adapter = dict[str, Tensor]
"""fp32 tensors by PEFT name: `….lora_A.weight` of shape [rank, in] and `….lora_B.weight` of shape [out, rank]."""
Layers = Mapping[str, tuple[int, int]]
"""Linear layers by their name in the base model: (out, in) features."""

ALL_LINEAR = "all-linear"


def tensor_name(layer: str, part: str) -> str:
    """PEFT's name of the `part` ("A" or "B") of a layer's adapter."""
    return f"base_model.model.{layer}.lora_{part}.weight"


@dataclass(slots=True)
class Active:
    """An adapter as the forward pass sees it.

    Attributes:
        adapter: tensors by PEFT name.
        scale: alpha / rank.
        dropout: probability with which an input of the adapter is zeroed; the generator draws the masks.
    """

    adapter: Mapping[str, Tensor]
    scale: float
    dropout: float = 0.0
    generator: torch.Generator | None = None
    pairs: dict[str, tuple[Tensor, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        ending = ".lora_A.weight"
        layers = [name.removeprefix("base_model.model.").removesuffix(ending) for name in self.adapter if name.endswith(ending)]
        self.pairs = {layer: (self.adapter[tensor_name(layer, "A")], self.adapter[tensor_name(layer, "B")]) for layer in layers}


class Slot:
    """Which adapter the layers of one base use now; None is the base itself. Only the engine's thread sets it."""

    __slots__ = ("active",)

    def __init__(self) -> None:
        self.active: Active | None = None

    @contextmanager
    def using(self, active: Active | None) -> Iterator[None]:
        """The adapter is active for the block."""
        before, self.active = self.active, active
        try:
            yield
        finally:
            self.active = before


class LoraLinear(nn.Module):
    """A frozen linear layer W x + b that adds scale · B A dropout(x) for the adapter that is active in `slot`.

    Source: Hu et al. 2021, arXiv 2106.09685.
    """

    def __init__(self, linear: nn.Linear, name: str, slot: Slot) -> None:
        super().__init__()
        self.linear, self.name, self.slot = linear, name, slot

    @property
    def weight(self) -> Tensor:
        """The frozen weight, [out, in]."""
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] → […, out], in the dtype of the base."""
        result = functional.linear(x, self.linear.weight, self.linear.bias)
        active = self.slot.active
        pair = active.pairs.get(self.name) if active is not None else None
        if active is None or pair is None:
            return result
        inputs = x.to(pair[0].dtype)
        if active.dropout and active.generator is not None:
            keep = torch.empty_like(inputs).bernoulli_(1 - active.dropout, generator=active.generator)
            inputs = inputs * keep.div_(1 - active.dropout)
        return (result + functional.linear(functional.linear(inputs, pair[0]), pair[1]) * active.scale).to(result.dtype)


def install(model: nn.Module) -> tuple[Slot, dict[str, tuple[int, int]]]:
    """Puts a `LoraLinear` around every linear layer of the model; returns their slot and the layers' shapes in model order."""
    slot, layers = Slot(), dict[str, tuple[int, int]]()
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name, linear in linears:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LoraLinear(linear, name, slot))
        layers[name] = (linear.out_features, linear.in_features)
    return slot, layers


def layer_names(layers: Layers, config: LoraConfig, head: str) -> tuple[str, ...]:
    """The layers that `config.target_modules` means, in model order.

    Args:
        layers: all linear layers of the base.
        config: a target is the end of a layer's name at a dot ("q_proj", "self_attn.q_proj"), or "all-linear".
        head: the output layer's name, which "all-linear" leaves out.

    Raises:
        UnknownNameError: a target that no layer has; the known ones are named.
    """
    chosen = set[str]()
    for target in config.target_modules:
        if target == ALL_LINEAR:
            chosen |= layers.keys() - {head}
            continue
        found = {name for name in layers if name == target or name.endswith(f".{target}")}
        if not found:
            known = {name.rpartition(".")[2] for name in layers} | {ALL_LINEAR}
            raise UnknownNameError("linear layer of the base model", target, known, fix="Set target_modules to some of these.")
        chosen |= found
    return tuple(name for name in layers if name in chosen)


def tensor_shapes(layers: Layers, names: tuple[str, ...], rank: int) -> dict[str, tuple[int, int]]:
    """The shape of every adapter tensor by PEFT name."""
    shapes = dict[str, tuple[int, int]]()
    for name in names:
        out_features, in_features = layers[name]
        shapes[tensor_name(name, "A")] = (rank, in_features)
        shapes[tensor_name(name, "B")] = (out_features, rank)
    return shapes


def init_adapter(shapes: Mapping[str, tuple[int, int]], seed: int, device: torch.device) -> Adapter:
    """A fresh adapter as PEFT makes it: A Kaiming-uniform with a = √5, B zero, so that it changes nothing yet.

    Drawn on the CPU from a private generator, so the same seed gives the same tensors on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    adapter = Adapter()
    for name, shape in shapes.items():
        tensor = torch.zeros(shape, dtype=torch.float32)
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
        adapter[name] = tensor.to(device)
    return adapter
