"""The Llama, Qwen2 and Qwen3 families as modules that hold weights and compute nothing: what our own decoder reads.

Names, shapes and order of the parameters are those of transformers, whose modelling code takes seconds to import and is left alone here.
Where anything of a model is unusual (scaled rotary positions, windows, quantised weights, a key that its configuration leaves to a default,
a tensor that is missing) there is no skeleton: transformers then loads the model, or says what is wrong. This file does not know adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...records import Json
from .short import Short

__all__ = ["FAMILIES", "Skeleton", "known", "read_weights", "shapes", "skeleton"]

FAMILIES = ("llama", "qwen2", "qwen3")
_NUMBERS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")


class _Rotary(nn.Module):
    """cos and sin [.., L, size] of positions [.., L], in the dtype of x; angles are computed in fp32. Source: Su et al. 2021 (RoFormer)."""

    def __init__(self, theta: float, size: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size), persistent=False)

    def forward(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        half = places[..., None].float() * cast("Tensor", self.inv_freq)
        angles = torch.cat([half, half], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class Skeleton(nn.Module):
    """Weights under transformers' names, and the short form of the matrices where there is one; it has no `forward`."""

    def __init__(self, config: SimpleNamespace, short: Short | None = None) -> None:
        super().__init__()
        self.config, self.short = config, short

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.get_submodule("lm_head")


def known(given: Json) -> SimpleNamespace | None:
    """A `config.json` with what is derived from it, where a skeleton covers the model; else None."""
    if not isinstance(given, dict) or given.get("model_type") not in FAMILIES or given.get("quantization_config"):
        return None
    config = SimpleNamespace(**given)
    rope = given.get("rope_parameters", {"rope_type": "default", "rope_theta": given.get("rope_theta")})  # older files have it beside the rest
    if not isinstance(rope, dict) or not rope.keys() <= {"rope_type", "rope_theta"} or rope.get("rope_type", "default") != "default":
        return None
    if given.get("rope_scaling") or given.get("use_sliding_window", given.get("sliding_window")):
        return None
    whole = all(isinstance(given.get(key), int) and given[key] for key in _NUMBERS) and isinstance(given.get("tie_word_embeddings"), bool)
    reals = all(isinstance(value, int | float) for value in (rope.get("rope_theta"), given.get("rms_norm_eps")))
    if not whole or not reals or given.get("hidden_act") != "silu":
        return None
    config.rope_parameters = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    config.head_dim = given.get("head_dim") or config.hidden_size // config.num_attention_heads
    return config


def shapes(config: SimpleNamespace) -> dict[str, tuple[int, ...]]:
    """The parameters of a model in transformers' order; a tied output layer is not among them."""
    width, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    everywhere = config.model_type != "qwen2" and bool(getattr(config, "attention_bias", False))
    biased = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), config.model_type == "qwen2" or everywhere),
        "o_proj": everywhere,
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), config.model_type == "llama" and bool(getattr(config, "mlp_bias", False))),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for index in range(config.num_hidden_layers):
        at = f"model.layers.{index}"
        for name, out, into in (
            ("self_attn.q_proj", queries, width),
            ("self_attn.k_proj", keys, width),
            ("self_attn.v_proj", keys, width),
            ("self_attn.o_proj", width, queries),
            *((("self_attn.q_norm", size, 0), ("self_attn.k_norm", size, 0)) if config.model_type == "qwen3" else ()),
            ("mlp.gate_proj", inner, width),
            ("mlp.up_proj", inner, width),
            ("mlp.down_proj", width, inner),
            ("input_layernorm", width, 0),
            ("post_attention_layernorm", width, 0),
        ):
            found[f"{at}.{name}.weight"] = (out, into) if into else (out,)
            if biased.get(name.rpartition(".")[2]):
                found[f"{at}.{name}.bias"] = (out,)
    found["model.norm.weight"] = (width,)
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (config.vocab_size, width)
    return found


def skeleton(config: SimpleNamespace, state: Mapping[str, Tensor], short: Short | None = None) -> nn.Module:
    """The modules of a configuration that is `known`, around tensors of `shapes` in their order; frozen."""
    root = Skeleton(config, short)
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        module: nn.Module = root
        for place, part in enumerate(path):
            if part not in dict(module.named_children()):
                last = place == len(path) - 1 and tensor.ndim == 2
                module.add_module(part, _matrix(part, tensor) if last else nn.Module())
            module = module.get_submodule(part)
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
    embedding = root.get_submodule("model.embed_tokens").weight
    if config.tie_word_embeddings:
        root.add_module("lm_head", _matrix("lm_head", cast("Tensor", embedding)))
        root.get_submodule("lm_head").weight = embedding
    root.get_submodule("model").add_module("rotary_emb", _Rotary(config.rope_parameters["rope_theta"], config.head_dim))
    return root.eval()


def _matrix(name: str, weight: Tensor) -> nn.Module:
    """An empty module for a matrix [out, in]."""
    out, into = weight.shape
    return nn.Embedding(out, into, _weight=weight) if name == "embed_tokens" else nn.Linear(into, out, bias=False, device="meta")


def read_weights(folder: Path, config: SimpleNamespace, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """The parameters out of a folder's safetensors, mapped where they have the dtype already; None where not all are there in their shapes."""
    wanted, found = shapes(config), dict[str, Tensor]()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys() & wanted.keys():
                found[name] = file.get_tensor(name).to(dtype)
    if any(name not in found or tuple(found[name].shape) != shape for name, shape in wanted.items()):
        return None
    return {name: found[name] for name in wanted}
