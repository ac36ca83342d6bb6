"""A small decoder of our own for the Llama, Qwen2 and Qwen3 families: transformers' numbers in less time.

It reads the weights of transformers' modules, whose q, k, v and gate, up matrices it lays beside each other without a second copy, and
the adapter that is active. Sequences may stand in one row, with attention inside each. This file does not know how models are loaded,
nor layouts, losses or sampling. What it does not cover stays with transformers' modules: `Decoder.of` gives None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ...errors import ConfigError
from .attending import is_there
from .attention import SHORT, Attention, Pattern, Rotation, attend, rotate
from .kernels import Frozen, LoraMatmul, Matmul, Norm, Part, can_pack
from .layer import Layer, Plan
from .linear import Linear, Step
from .lora import Active, LoraLinear, Mixed, Slot
from .skeleton import FAMILIES
from .walks import Span, Walks

if TYPE_CHECKING:
    from transformers import Cache

__all__ = ["Decoder", "Joint", "Parts"]

_Made = list[tuple[Matmul, list[Tensor]]]
"""A layer's steps, each with its pairs A, B, A, B, …."""
ROTARY = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions that do not change with the length of what is read."""
RECOMPUTE_ABOVE = 4096
"""Tokens above which activations are computed again instead of kept, where no budget says otherwise: of one pass in each layer, of a batch by a second pass."""
FEWEST = 256
"""Tokens of a pass below which products are slow; a budget for less is met by computing again."""


class _Config(Protocol):
    """The part of a model's configuration that is read here."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float


@dataclass(slots=True, eq=False)
class Joint:
    """Linear layers that read the same input, as one matrix; `rows` says which output columns belong to which layer."""

    frozen: Frozen
    rows: tuple[tuple[str, int, int], ...]

    @property
    def compiled(self) -> bool:
        """Whether a step with it can be compiled, whichever of its layers are adapted."""
        return self.frozen.panels is not None and all(low % 32 == high % 32 == 0 for _, low, high in self.rows)

    @classmethod
    def of(cls, layers: Sequence[LoraLinear], *, pack: bool, linear: Linear | None) -> Joint:
        """Lays the layers' weights beside each other; the layers then hold views of the result."""
        first = layers[0].linear
        weight, bias = first.weight.detach(), None if first.bias is None else first.bias.detach()
        sizes = [layer.linear.out_features for layer in layers]
        if len(layers) > 1:
            weight = _joined([layer.linear.weight.detach() for layer in layers])
            for layer, part in zip(layers, torch.split(weight, sizes), strict=True):
                layer.linear.weight = nn.Parameter(part, requires_grad=False)
            if any(layer.linear.bias is not None for layer in layers):
                zeros = [layer.linear.weight.new_zeros(size) for layer, size in zip(layers, sizes, strict=True)]
                bias = torch.cat([zero if layer.linear.bias is None else layer.linear.bias.detach() for layer, zero in zip(layers, zeros, strict=True)])
        ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
        rows = tuple((layer.name, end - size, end) for layer, end, size in zip(layers, ends, sizes, strict=True))
        return cls(Frozen(weight, bias, pack=pack, linear=linear), rows)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Matrices [out, in] as one, without a copy where they stand one after the other in memory."""
    first, ends = parts[0], [part.data_ptr() + part.nbytes for part in parts]
    touch = all(part.is_contiguous() and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for part in parts)
    if touch and all(part.data_ptr() == end for part, end in zip(parts[1:], ends, strict=False)):
        return first.as_strided((sum(part.shape[0] for part in parts), first.shape[1]), (first.shape[1], 1))
    return torch.cat(list(parts))


@dataclass(slots=True, eq=False)
class _Layer:
    """One decoder layer's frozen tensors."""

    before: Tensor
    qkv: Joint
    out: Joint
    between: Tensor
    up: Joint
    down: Joint
    heads: Tensor | None


@dataclass(slots=True, frozen=True, eq=False)
class Parts:
    """What a decoder is made of, for who computes with it otherwise.

    Attributes:
        embedding: [V, H].
        norm: weight of the last norm; eps is that of all norms.
        head: the output layer's matrix.
        rotary: gives cos and sin [1 or B, L, size] of (any tensor of a dtype, places [1 or B, L]).
        queries, keys: heads, and key-value heads, of `size` each.
    """

    embedding: Tensor
    layers: Sequence[_Layer]
    norm: Tensor
    eps: float
    head: Frozen
    rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    queries: int
    keys: int
    size: int


class Decoder:
    """The layers of one frozen model; see the file's head.

    Args:
        model: a Llama-, Qwen2- or Qwen3-like model whose linear layers are `LoraLinear`s.
        head: its output layer's name.
        slot: where the active adapter stands.
        pack: whether matrices may have copies in an order that products read faster, which take up to twice their memory.
        walks: how elementwise work is done.
    """

    def __init__(self, model: nn.Module, head: str, slot: Slot, *, pack: bool, walks: Walks) -> None:
        config = cast("_Config", model.config)
        self._slot, self._eps, self.walks = slot, config.rms_norm_eps, walks
        self._queries, self._keys = config.num_attention_heads, config.num_key_value_heads
        self._size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._embedding = cast("Tensor", model.get_submodule("model.embed_tokens").weight)
        self._rotary = cast("Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]", model.get_submodule("model.rotary_emb"))
        self._norm = cast("Tensor", model.get_submodule("model.norm").weight).detach()
        output = cast("LoraLinear", model.get_submodule(head))
        pack = pack and can_pack(output.weight)
        self.head, self.head_name = Frozen(output.weight.detach(), None, pack=pack, linear=walks.linear), head
        self._layers = [self._layer(layer, pack=pack) for layer in model.get_submodule("model.layers").children()]
        self.recompute_above = RECOMPUTE_ABOVE

    def kept_bytes(self, tokens: int, longest: int, *, again: bool) -> int:
        """About what a training pass keeps beside the weights.

        Args:
            tokens: of the pass.
            longest: tokens of its longest sequence.
            again: whether layers keep their input only; one layer then has its inner activations at a time.
        """
        size, width = self.head.weight.element_size(), self.head.weight.shape[1]
        inner = self._layers[0].up.frozen.weight.shape[0] + (2 * self._queries + 2 * self._keys) * self._size + width
        fused = self.head.weight.device.type == "cpu" and is_there(self.walks.folder, self.head.weight.dtype, self._size)
        scores = self._queries * (4 if fused else longest * size if longest <= SHORT else 0)  # log-sums in fp32, or probabilities
        layer, count = (inner + width) * size + scores, len(self._layers)
        work = 3 * inner * size  # gradients of one layer's activations while it goes back
        return tokens * (work + (count * width * size + layer if again else count * layer))

    def fit(self, budget_bytes: int, most: int) -> int:
        """Sets from which pass on activations are computed again, so that a pass keeps at most so many bytes; gives the tokens of a pass, up to `most`.

        Raises:
            ConfigError: the budget is below what the shortest pass needs.
        """
        need = self.kept_bytes(FEWEST, FEWEST, again=True)
        if need > budget_bytes:
            raise ConfigError(f"activations_bytes is {budget_bytes}; a training pass of {FEWEST} tokens keeps {need} bytes at least. Raise it.")
        fitting = [
            tokens for tokens in range(FEWEST, max(most, FEWEST) + 1, FEWEST) if self.kept_bytes(tokens, min(tokens, SHORT), again=False) <= budget_bytes
        ]
        self.recompute_above = fitting[-1] if fitting else 0
        return fitting[-1] if fitting else FEWEST

    @classmethod
    def of(cls, model: nn.Module, head: str, slot: Slot, *, pack: bool, walks: Walks) -> Decoder | None:
        """A decoder for the model, or None where it is of another family or has parts that are not covered."""
        config = model.config
        rope = getattr(config, "rope_parameters", None)
        kind = rope.get("rope_type", "default") if isinstance(rope, dict) else None
        known = getattr(config, "model_type", "") in FAMILIES and getattr(config, "hidden_act", "") == "silu" and kind in ROTARY
        window = getattr(config, "use_sliding_window", getattr(config, "sliding_window", None))
        if not known or window or getattr(model.get_submodule(f"{head}.linear"), "bias", None) is not None:
            return None
        return cls(model, head, slot, pack=pack, walks=walks)

    @property
    def parts(self) -> Parts:
        """Its tensors and sizes."""
        return Parts(self._embedding, self._layers, self._norm, self._eps, self.head, self._rotary, self._queries, self._keys, self._size)

    def _layer(self, layer: nn.Module, *, pack: bool) -> _Layer:
        def joint(*names: str) -> Joint:
            layers = [cast("LoraLinear", layer.get_submodule(name)) for name in names]
            return Joint.of(layers, pack=pack, linear=self.head.linear)

        def norm(name: str) -> Tensor:
            return cast("Tensor", layer.get_submodule(name).weight).detach()

        heads = None
        if hasattr(layer.get_submodule("self_attn"), "q_norm"):
            q, k = norm("self_attn.q_norm"), norm("self_attn.k_norm")
            heads = torch.cat([q.expand(self._queries, -1), k.expand(self._keys, -1)])
        return _Layer(
            before=norm("input_layernorm"),
            qkv=joint("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            out=joint("self_attn.o_proj"),
            between=norm("post_attention_layernorm"),
            up=joint("mlp.gate_proj", "mlp.up_proj"),
            down=joint("mlp.down_proj"),
            heads=heads,
        )

    def hidden(
        self, ids: Tensor, cache: Cache | None = None, *, mask: Tensor | None = None, places: Tensor | None = None, spans: Sequence[Span] | None = None
    ) -> Tensor:
        """The last hidden states [B, L, H]; see `Base.hidden`.

        Args:
            ids: int64 [B, L].
            cache: keys and values of earlier tokens; only without a gradient.
            mask: bool [B, earlier + L] where L is 1, or float [B, 1, L, L].
            places: int64 [1 or B, L].
            spans: which tokens of the flattened ids see each other, in place of a mask.

        Raises:
            NotImplementedError: padding before several new tokens, or a gradient through a cache; nothing here asks for them.
        """
        rows, length = ids.shape
        if (mask is not None and not mask.is_floating_point() and length > 1) or (cache is not None and torch.is_grad_enabled()):
            raise NotImplementedError("The decoder reads padding before single tokens only, and a cache only without a gradient.")
        earlier = cache.get_seq_length() if cache is not None else 0
        if places is None:
            places = torch.arange(earlier, earlier + length, device=ids.device)[None]
        x = functional.embedding(ids.flatten(), self._embedding)
        cos, sin = (part[..., : self._size // 2].expand(rows, -1, -1).reshape(-1, 1, self._size // 2).contiguous() for part in self._rotary(x, places))
        active = self._slot.active
        every = [one for one, _, _ in active.groups] if isinstance(active, Mixed) else [active]
        seeds = [0 if one is None else one.begin() for one in every]
        if spans is None:
            spans = [Span(0, rows, length, mask if mask is not None and mask.is_floating_point() else None)]
        if cache is not None:
            seen = _seen(mask, earlier, length, ids.device)
            whole = None if earlier else spans
            for index, layer in enumerate(self._layers):
                rotation = Rotation(cos, sin, self.walks, layer.heads, self._eps)
                x = self._cached(layer, x, rotation, index=index, cache=cache, shape=ids.shape, spans=whole, seen=seen)
        else:
            again = torch.is_grad_enabled() and x.shape[0] > self.recompute_above
            for layer in self._layers:
                rotation = Rotation(cos, sin, self.walks, layer.heads, self._eps)
                x = (
                    checkpoint(self._whole, layer, x, rotation, spans, seeds, use_reentrant=False, preserve_rng_state=False)
                    if again
                    else self._whole(layer, x, rotation, spans, seeds)
                )
        return Norm.apply(x, self._norm, self._eps, self.walks).view(rows, length, -1)  # type: ignore[no-untyped-call, no-any-return]

    # ----------------------------------------------------------------------------------------------------------- layers
    def _whole(self, layer: _Layer, x: Tensor, rotation: Rotation, spans: Sequence[Span], seeds: Sequence[int]) -> Tensor:
        """A layer over whole sequences."""
        pattern, made = Pattern(self._queries, rotation, spans), self._steps(layer, x, seeds)
        (qkv_step, _), (out, _), (up, _), (down, _) = made
        plan = Plan(qkv_step, out, up, down, pattern)
        if (linear := plan.linear(x)) is not None:
            return cast("Tensor", Layer.apply(x, plan, linear, *(tensor for _, pairs in made for tensor in pairs)))  # type: ignore[no-untyped-call]
        qkv = self._times(layer.qkv, made[0], x).view(x.shape[0], -1, self._size)
        return self._rest(layer, made, x, cast("Tensor", Attention.apply(qkv, pattern)))  # type: ignore[no-untyped-call]

    def _rest(self, layer: _Layer, made: _Made, x: Tensor, o: Tensor) -> Tensor:
        """A layer from the result [T, heads, D] of its attention on."""
        x = self._times(layer.out, made[1], o.flatten(1), x)
        return self._times(layer.down, made[3], self._times(layer.up, made[2], x), x)

    def _cached(
        self, layer: _Layer, x: Tensor, rotation: Rotation, *, index: int, cache: Cache, shape: torch.Size, spans: Sequence[Span] | None, seen: Tensor | None
    ) -> Tensor:
        """A layer over new tokens, whose keys and values the cache takes."""
        made = self._steps(layer, x, ())
        qkv = self._times(layer.qkv, made[0], x).view(x.shape[0], -1, self._size)
        if spans is not None:
            o = cast("Tensor", Attention.apply(qkv, Pattern(self._queries, rotation, spans)))  # type: ignore[no-untyped-call]  # rotates qkv in place
            _, k, v = self._split(qkv, shape)
            cache.update(k, v, index)
        else:
            rotate(qkv, self._queries + self._keys, rotation)
            q, k, v = self._split(qkv, shape)
            keys, values = cache.update(k, v, index)
            o = attend(q, keys, values, seen).transpose(1, 2).flatten(0, 1)
        return self._rest(layer, made, x, o)

    def _split(self, qkv: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
        """Packed heads as queries, keys and values [B, heads, L, D]."""
        return torch.split(torch.unflatten(qkv, 0, shape).transpose(1, 2), [self._queries, self._keys, self._keys], dim=1)

    def _steps(self, layer: _Layer, x: Tensor, seeds: Sequence[int]) -> _Made:
        """The layer's four steps over x [T, H] with the pairs of the active adapters; one seed per adapter where there is dropout."""
        given: Sequence[tuple[Joint, Tensor | None, bool]]
        given = ((layer.qkv, layer.before, False), (layer.out, None, False), (layer.up, layer.between, False), (layer.down, None, True))
        apart = all(joint.compiled for joint, _, _ in given)
        made = [(joint, Matmul(joint.frozen, self.walks, norm=norm, eps=self._eps, gated=gated)) for joint, norm, gated in given]
        return [(step, self._adapt(joint, step, x, seeds, apart=apart)) for joint, step in made]

    def _adapt(self, joint: Joint, step: Matmul, x: Tensor, seeds: Sequence[int], *, apart: bool) -> list[Tensor]:
        """Gives a step the parts and the dropout of the active adapters, and gives their pairs; several are `apart`, or one with scales of each token."""
        active, tokens = self._slot.active, x.shape[0]
        if active is None:
            return []
        groups = active.groups if isinstance(active, Mixed) else ((active, 0, tokens),)
        pairs = list[Tensor]()
        if isinstance(active, Mixed) and not apart:
            joined = [(low, high, found) for name, low, high in joint.rows if (found := active.joined(name, tokens, x.dtype)) is not None]
            step.parts = [Part(low, high, scale) for low, high, (_, _, scale) in joined]
            pairs = [tensor for _, _, (a, b, _) in joined for tensor in (a, b)]
        else:
            parts = list[Part]()
            for name, low, high in joint.rows:
                for one, begin, end in groups:
                    if one is not None and name in one.pairs:
                        parts.append(Part(low, high, one.scale * one.raise_by, slice(begin, end)))
                        pairs += one.pairs[name]
            step.parts = parts
        if isinstance(active, Active) and active.note is not None:
            step.note = active.note.add
        drops = [(slice(low, high), one.drop(seed, joint.rows[0][0])) for (one, low, high), seed in zip(groups, seeds, strict=False) if one is not None]
        step.drops = [(rows, drop) for rows, drop in drops if drop is not None] if pairs else []
        return pairs

    def _times(self, joint: Joint, made: tuple[Matmul, list[Tensor]], h: Tensor, residual: Tensor | None = None) -> Tensor:
        """One step over h."""
        (step, pairs), active = made, self._slot.active
        if torch.is_grad_enabled() and (pairs or h.requires_grad):
            return cast("Tensor", LoraMatmul.apply(h, residual, step, *pairs))  # type: ignore[no-untyped-call]
        if (linear := step.compiled(h)) is not None:
            return linear.forward(Step(step, pairs), h, residual)
        if not pairs or (isinstance(active, Active) and not step.drops):
            return _plain(step, h, residual, active.beside(joint.rows, joint.frozen.weight) if isinstance(active, Active) else None)
        return cast("Tensor", LoraMatmul.apply(h, residual, step, *pairs))  # type: ignore[no-untyped-call]


def _plain(step: Matmul, h: Tensor, residual: Tensor | None, pair: tuple[Tensor, Tensor] | None) -> Tensor:
    """A step without a graph; the pair is the adapters' [in, rank] and [rank, out], scaled."""
    x, _ = step.enter(h)
    y = step.frozen.times(x)
    if pair is not None:
        y.addmm_(x @ pair[0], pair[1])
    return y if residual is None else y.add_(residual)


def _seen(mask: Tensor | None, earlier: int, length: int, device: torch.device) -> Tensor | None:
    """Which columns of a cache new tokens see, bool [B or 1, 1, L, earlier + L]; None where all do."""
    if not earlier or (length == 1 and mask is None):
        return None
    if mask is not None and length == 1:
        return mask[:, None, None, : earlier + 1]
    columns = torch.arange(earlier + length, device=device)
    return (columns[None] <= columns[earlier:, None])[None, None]
