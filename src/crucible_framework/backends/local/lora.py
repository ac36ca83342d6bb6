"""Low-rank adapters beside frozen linear layers, named and initialised as PEFT does.

An adapter is a plain mapping of fp32 tensors under PEFT's names; what is active in an engine stands in one `Slot` that every `LoraLinear`
of the base reads, so that one frozen base serves any number of adapters. Layers that the active adapter does not name compute the base's
own numbers. This file does not know losses, optimizers or files.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import UnknownNameError
from ...records import LoraConfig
from .examplewise import ExampleNorms
from .walks import STEPS, Drop

__all__ = ["Active", "Adapter", "LoraLinear", "Mixed", "Slot", "init_adapter", "install", "layer_names", "tensor_shapes"]

Adapter = dict[str, Tensor]
"""fp32 tensors by PEFT name: `….lora_A.weight` of shape [rank, in] and `….lora_B.weight` of shape [out, rank]."""
Layers = Mapping[str, tuple[int, int]]
"""Linear layers by their name in the base model: (out, in) features."""

ALL_LINEAR = "all-linear"


def tensor_name(layer: str, part: str) -> str:
    """PEFT's name of the `part` ("A" or "B") of a layer's adapter."""
    return f"base_model.model.{layer}.lora_{part}.weight"


TOGETHER = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
"""Layers that read the same input, by the last part of their name; the others read one of their own."""


def _read_with(layer: str) -> str:
    """One name for all layers that read the same input."""
    parent, _, leaf = layer.rpartition(".")
    return f"{parent}.{TOGETHER.get(leaf, leaf)}"


@dataclass(slots=True, eq=False, weakref_slot=True)
class Active:
    """An adapter as the forward pass sees it.

    Dropout masks are functions of (a seed per pass through the model, the layer's name), so that a pass can be computed again, in any order.

    Attributes:
        adapter: tensors by PEFT name.
        scale: alpha / rank.
        dropout: probability with which an input of the adapter is zeroed, to 1 / 65,536; layers that read the same input share a mask.
        generator: the processor's, draws the seed of every pass; None: no dropout.
        note: collects the gradient norm of each example in a backward pass.
        serial: another number for every one.
    """

    adapter: Mapping[str, Tensor]
    scale: float
    dropout: float = 0.0
    generator: torch.Generator | None = None
    note: ExampleNorms | None = None
    pairs: dict[str, tuple[Tensor, Tensor]] = field(init=False)
    serial: int = field(default_factory=itertools.count(1).__next__, init=False)
    _seed: int = field(default=0, init=False)
    _begun: bool = field(default=False, init=False)
    _seen: set[str] = field(default_factory=set, init=False)
    _joined: dict[str, tuple[Tensor, Tensor] | None] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        ending = ".lora_A.weight"
        layers = [name.removeprefix("base_model.model.").removesuffix(ending) for name in self.adapter if name.endswith(ending)]
        self.pairs = {layer: (self.adapter[tensor_name(layer, "A")], self.adapter[tensor_name(layer, "B")]) for layer in layers}

    @property
    def drops(self) -> bool:
        """Whether there is dropout."""
        return self.dropout > 0 and self.generator is not None

    @property
    def raise_by(self) -> float:
        """1 / (1 − p) with dropout, else 1: what is kept is raised by it."""
        return STEPS / (STEPS - self._threshold) if self.drops else 1.0

    @property
    def _threshold(self) -> int:
        return min(round(self.dropout * STEPS), STEPS - 1)

    def begin(self) -> int:
        """The seed of a new pass through the model."""
        if self.drops:
            self._seed = int(torch.randint(2**63 - 1, (), generator=self.generator))
            self._begun = True
            self._seen.clear()
        return self._seed

    def seed_of(self, layer: str) -> int:
        """The seed of the pass that the layer runs in; a layer that runs again begins a new one."""
        if layer in self._seen or not self._begun:
            self.begin()
        self._seen.add(layer)
        return self._seed

    def drop(self, seed: int, layer: str) -> Drop | None:
        """What is zeroed of a layer's input for its adapter; None without dropout. Layers that read the same input share it."""
        return Drop(seed, zlib.crc32(_read_with(layer).encode()), self._threshold) if self.drops else None

    def beside(self, rows: Sequence[tuple[str, int, int]], weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """The adapters of layers that read the same input as one, without dropout: [in, ranks] and scaled [ranks, out], in the weight's dtype.

        Args:
            rows: per layer its name and its first and last + 1 output column.
            weight: of all these layers, [out, in].
        """
        name = rows[0][0]
        if name not in self._joined:
            found = [(self.pairs[layer], low, high) for layer, low, high in rows if layer in self.pairs]
            if not found:
                return None
            first = torch.cat([pair[0] for pair, _, _ in found]).t().to(weight.dtype).contiguous()
            second = weight.new_zeros((first.shape[1], weight.shape[0]))
            start = 0
            for (a, b), low, high in found:
                second[start : start + a.shape[0], low:high] = b.t() * self.scale
                start += a.shape[0]
            self._joined[name] = first, second
        return self._joined[name]


@dataclass(slots=True, frozen=True, eq=False)
class Mixed:
    """Several adapters in one pass: `groups` says which rows, from one to before another, use which."""

    groups: tuple[tuple[Active | None, int, int], ...]
    _scales: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False)

    def joined(self, layer: str, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor] | None:
        """The adapters of a layer as one: A [ranks, in], B [out, ranks], and the scale of A x, [tokens, ranks], 0 where a row is not the adapter's."""
        members = [(place, one) for place, (one, _, _) in enumerate(self.groups) if one is not None and layer in one.pairs]
        if not members:
            return None
        pairs = [one.pairs[layer] for _, one in members]
        key = tuple(place for place, _ in members)
        if key not in self._scales:  # all layers that a set of adapters has share it
            scale, first = pairs[0][0].new_zeros((tokens, sum(a.shape[0] for a, _ in pairs)), dtype=dtype), 0
            for (place, one), (a, _) in zip(members, pairs, strict=True):
                scale[self.groups[place][1] : self.groups[place][2], first : first + a.shape[0]] = one.scale * one.raise_by
                first += a.shape[0]
            self._scales[key] = scale
        return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1), self._scales[key]

    def names(self, layer: str) -> bool:
        """Whether any of them adapts the layer."""
        return any(active is not None and layer in active.pairs for active, _, _ in self.groups)


class Slot:
    """Which adapter the layers of one base use now; None is the base itself. Only the engine's thread sets it."""

    __slots__ = ("active",)

    def __init__(self) -> None:
        self.active: Active | Mixed | None = None

    def names(self, layer: str) -> bool:
        """Whether what is active adapts the layer."""
        return self.active.names(layer) if isinstance(self.active, Mixed) else self.active is not None and layer in self.active.pairs

    @contextmanager
    def using(self, active: Active | Mixed | None) -> Iterator[None]:
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
        if isinstance(active, Mixed):
            for one, low, high in active.groups:
                if one is not None and (mine := one.pairs.get(self.name)) is not None:
                    result[low:high] += (functional.linear(functional.linear(x[low:high].to(mine[0].dtype), mine[0]), mine[1]) * one.scale).to(result.dtype)
            return result
        pair = active.pairs.get(self.name) if active is not None else None
        if active is None or pair is None:
            return result
        inputs = x.to(pair[0].dtype)
        if active.drops:
            drop = active.drop(active.seed_of(self.name), self.name)
            inputs = inputs if drop is None else inputs * (drop.kept(tuple(x.shape), x.device) * active.raise_by)
        ranks = functional.linear(inputs, pair[0])
        added = functional.linear(ranks, pair[1]) * active.scale
        if (note := active.note) is not None and added.requires_grad:
            head, rows, shrunk = x.ndim == 2, inputs.detach().flatten(0, -2), ranks.detach().flatten(0, -2)

            def tell(gradient: Tensor) -> None:
                g = gradient.flatten(0, -2) * active.scale
                note.add(g, shrunk, head=head)
                note.add(g @ pair[1], rows, head=head)

            added.register_hook(tell)  # type: ignore[no-untyped-call]
        return (result + added).to(result.dtype)


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
