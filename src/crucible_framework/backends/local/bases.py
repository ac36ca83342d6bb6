"""Frozen base models: the built-in tiny Llama, `smollm2-135m`, Hugging Face folders and hub ids.

A base is loaded once and shared by everything that uses it; its weights never change. No code of a model's folder is ever run, and a
local name never asks the network. This file does not know adapters' values, training or sampling. It supports decoders whose logits are
the output layer applied to the last hidden state (Llama, Qwen, Mistral, SmolLM, …), probes that when loading, and refuses others.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict, cast

import torch
from torch import Tensor, nn

from ...data.tokens import ByteTokenizer, HuggingFaceTokenizer
from ...errors import ConfigError, UnknownNameError
from ...events import span
from ...files import storage_errors
from ...losses.apply import target_logprobs
from ...protocols import Tokenizer
from ...records import record
from . import smollm
from .decoder import Decoder
from .hub import snapshot
from .kernels import target_scores
from .layout import TOKENS_PER_SLICE, Pass
from .loading import TINY_CONTEXT, head_name, hidden_by_modules, probe, read_folder, tiny_model
from .lora import Slot, install
from .short import Short
from .sizes import ITEM_BYTES, check_memory, fitting_dtype, room_to_pack, weights_in
from .skeleton import FAMILIES, Skeleton
from .walks import Span, Walks

if TYPE_CHECKING:
    from transformers import Cache

__all__ = ["ALIASES", "TINY", "Base", "canonical", "load_base", "load_tokenizer", "locate"]

TINY = "tiny"
SMOLLM = "smollm2-135m"
ALIASES = {SMOLLM: SMOLLM, smollm.HUB_ID: SMOLLM}


class _Layout(TypedDict):
    """How `lay_out` may lay sequences out for a base."""

    share: bool
    pack: bool
    limit: int


class _Config(Protocol):
    """The part of a model's configuration that is read here."""

    vocab_size: int
    max_position_embeddings: int


@record
class Base:
    """A frozen model with what the engine needs to know of it.

    Attributes:
        name: the canonical name.
        source: what an adapter's configuration names as its base: a hub id, a folder or a name.
        model: the decoder with a `LoraLinear` around every linear layer.
        layers: the linear layers by name: (out, in) features.
        head: the output layer's name.
        slot: the adapter that is active.
        decoder: our own layers over the model's weights; None where transformers' modules compute.
        context: the most tokens that it reads.
        vocab_size: rows of its embedding; the tokenizer may have fewer.
        limit: tokens that go through the model together in training.
        keeps: tokens of a batch up to which activations wait for the loss; a longer batch goes through the model again for its gradient.
        native: where compiled code is kept; None where none may be used.
    """

    name: str
    source: str
    model: nn.Module
    tokenizer: Tokenizer
    layers: Mapping[str, tuple[int, int]]
    head: str
    slot: Slot
    context: int
    vocab_size: int
    device: torch.device
    decoder: Decoder | None = None
    limit: int = TOKENS_PER_SLICE
    keeps: int = TOKENS_PER_SLICE
    native: Path | None = None

    @property
    def layout(self) -> _Layout:
        """What `lay_out` may do for this base."""
        return {"share": self.takes_masks, "pack": self.decoder is not None, "limit": self.limit}

    @property
    def short(self) -> Short | None:
        """fp32 matrices in bf16, where a file of the cache has them and no number changes."""
        return self.model.short if isinstance(self.model, Skeleton) else None

    @property
    def takes_masks(self) -> bool:
        """Whether `hidden` may be given a 4-D mask: plain attention in every layer, as in the Llama and Qwen families."""
        config = self.model.config
        kind, window = getattr(config, "model_type", ""), getattr(config, "use_sliding_window", getattr(config, "sliding_window", None))
        return kind in FAMILIES and not window

    def hidden(
        self, ids: Tensor, cache: Cache | None = None, *, mask: Tensor | None = None, places: Tensor | None = None, spans: tuple[Span, ...] | None = None
    ) -> Tensor:
        """The last hidden states [B, L, H] of token ids [B, L], after those that the cache holds.

        Args:
            ids: the tokens.
            cache: keys and values of earlier tokens; those of `ids` are added to it.
            mask: bool [B, earlier + L], False where the cache holds padding, for single tokens; or float [B, 1, L, L], added to the attention's scores.
            places: int64 [B, L], each token's position in its sequence; counted on from the cache's length where None.
            spans: of packed rows, which tokens of the flattened ids see each other; only with a decoder of our own.
        """
        if self.decoder is None:
            return hidden_by_modules(self.model, ids, cache, mask, places)
        return self.decoder.hidden(ids, cache, mask=mask, places=places, spans=spans)

    def read(self, one: Pass, cache: Cache | None = None) -> Tensor:
        """The last hidden states [B · L, H] of sequences that are laid out together."""
        return self.hidden(one.ids, cache, mask=one.mask, places=one.places, spans=one.spans).flatten(0, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits [..., V] of hidden states [..., H]."""
        if self.decoder is not None and not self._adapted_head and not torch.is_grad_enabled():
            return self.decoder.head.times(hidden.flatten(0, -2)).view(*hidden.shape[:-1], -1).float()
        return cast("Tensor", self.model.get_submodule(self.head)(hidden)).float()

    def target_logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """log p fp32 [R] of targets [R] after hidden states [R, H], in nats."""
        if self.decoder is None or self._adapted_head:
            return target_logprobs(self.logits(hidden), targets)
        return target_scores(hidden, self.decoder.head, targets, self.decoder.walks)

    @property
    def _adapted_head(self) -> bool:
        return self.slot.names(self.head)


# ------------------------------------------------------------------------------------------------------------- finding
def canonical(name: str) -> str:
    """One name per base model: aliases resolved, folders absolute."""
    folder = _folder(name)
    return ALIASES.get(name, name) if folder is None else str(folder)


def _folder(name: str) -> Path | None:
    """The folder that a name means, or None where it is a model's name.

    Raises:
        ConfigError: it is written as a path, and no folder is there.
    """
    if name in (TINY, *ALIASES):
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name:
        raise ConfigError(f"There is no model folder {name!r}. Expected config.json, safetensors and a tokenizer in it; offline default: {SMOLLM!r}.")
    return None


def locate(name: str, cache: Path, item_bytes: int | None, device: torch.device | None = None) -> Path:
    """The folder with a model's files, made or downloaded where it must be.

    Args:
        name: a canonical name.
        cache: where `smollm2-135m` is kept.
        item_bytes: size of a weight; None for the tokenizer alone.
        device: that the weights must fit on before they are downloaded.
    """
    if (folder := _folder(name)) is not None:
        return folder
    if name in ALIASES:
        return smollm.folder(cache)
    if name.count("/") == 1:
        return snapshot(name, item_bytes, partial(check_memory, device=device))
    raise UnknownNameError("base model", name, (TINY, SMOLLM), fix="A Hugging Face id ('organisation/name') or a folder works too.")


# ------------------------------------------------------------------------------------------------------------- loading
def load_tokenizer(name: str, *, cache: Path) -> Tokenizer:
    """The tokenizer of a base model, without its weights.

    Raises:
        UnknownNameError, ConfigError, ServiceError: as `load_base`.
    """
    return ByteTokenizer() if name == TINY else HuggingFaceTokenizer(locate(name, cache, None), name)


def load_base(
    name: str,
    *,
    cache: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    engine: Literal["fast", "torch", "plain"] = "fast",
    activations_bytes: int | None = None,
) -> Base:
    """Loads a base model and freezes it.

    Args:
        name: "tiny", "smollm2-135m" (or its hub id), a folder, or a hub id.
        cache: where `smollm2-135m` is kept once converted.
        dtype: of the weights; None: bfloat16 on a GPU and, for models of `SMALL` weights and more, on a processor that is fast at it; else float32.
        device: where they are put.
        engine: "fast" and "torch" take our own decoder for the families that it covers, "fast" with C++ that is compiled for this processor.
        activations_bytes: what a training pass may keep beside the weights; None: 4,096 tokens, whatever they take.

    Raises:
        UnknownNameError: a short name that is none of ours.
        ConfigError: a folder that is not there or is no model, or a model whose logits the engine would compute wrongly.
        ServiceError, AuthError: the hub cannot be reached, or refuses.
        CorruptError: files are broken.
        BackendError: the weights do not fit into memory, or into the GPU's.
    """
    with span("model.loaded", model=name) as opened:
        model, source, tokenizer, kind = _read(name, cache, dtype, device, modules=engine == "plain")
        model.requires_grad_(requires_grad=False).to(device)
        head = head_name(model, name)
        probe(model, head, name, device)
        slot, layers = install(model)
        native = cache / "native" if engine == "fast" and device.type == "cpu" else None
        walks = Walks(native)
        decoder = Decoder.of(model, head, slot, pack=room_to_pack(layers, kind), walks=walks) if engine != "plain" else None
        config, limit = cast("_Config", model.config), TOKENS_PER_SLICE
        keeps = limit if decoder is None else decoder.recompute_above
        if activations_bytes is not None:
            if decoder is None:
                raise ConfigError(f"activations_bytes works with our own decoder, which does not cover {name!r} (or engine='plain'). Leave it out.")
            limit = keeps = decoder.fit(activations_bytes, TOKENS_PER_SLICE)
        context = int(getattr(config, "max_position_embeddings", 0) or TINY_CONTEXT)
        opened.set(parameters=sum(p.numel() for p in model.parameters()), dtype=str(kind).removeprefix("torch."))
        opened.set(engine="plain" if decoder is None else "fast" if walks.compiled else "torch")
        return Base(
            name=name,
            source=source,
            model=model,
            tokenizer=tokenizer,
            layers=layers,
            head=head,
            slot=slot,
            context=context,
            vocab_size=int(config.vocab_size),
            device=device,
            decoder=decoder,
            limit=limit,
            keeps=keeps,
            native=native,
        )


def _read(name: str, cache: Path, dtype: torch.dtype | None, device: torch.device, *, modules: bool) -> tuple[nn.Module, str, Tokenizer, torch.dtype]:
    """A model, what an adapter names as its base, its tokenizer, and its dtype; with `modules`, always those of transformers."""
    if name == TINY:
        kind = dtype or fitting_dtype(0, device)
        return tiny_model(kind, modules=modules), TINY, ByteTokenizer(), kind
    with storage_errors(cache, "read"):
        folder = locate(name, cache, ITEM_BYTES[dtype or torch.bfloat16], device)
    kind = dtype or fitting_dtype(weights_in(folder), device)
    model = read_folder(folder, name, kind, cache=None if modules else cache, ours=name in ALIASES, device=device)
    return model, smollm.HUB_ID if name in ALIASES else name, HuggingFaceTokenizer(folder, name), kind
