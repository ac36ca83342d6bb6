"""A base model's modules with their weights: the built-in tiny Llama, and Hugging Face folders.

The families that our own decoder covers come as a skeleton, which takes a fraction of a second; everything else is transformers' own.
No code of a model's folder is run. This file does not know names of models, adapters or sampling.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ...data.tokens import ByteTokenizer
from ...errors import ConfigError, CorruptError, NotFoundError, StoreError
from ...files import read_json, verify, write_json
from ...records import Json
from .prepared import prepared_weights
from .sizes import ITEM_BYTES, check_memory, weights_in
from .skeleton import Skeleton, known, shapes, skeleton

if TYPE_CHECKING:
    from transformers import Cache

__all__ = ["TINY_CONTEXT", "head_name", "hidden_by_modules", "probe", "quiet", "read_folder", "tiny_model"]

TINY_CONTEXT = 2048


def tiny_model(dtype: torch.dtype = torch.float32, *, modules: bool = True) -> nn.Module:
    """The built-in Llama: 2 layers, 64 wide, 4 heads on 2 key-value heads, byte vocabulary; the same weights every time.

    They are drawn from a private generator, so that the global one is not touched.

    Args:
        dtype: of the weights.
        modules: whether transformers' modules hold them, which can compute by themselves.
    """
    tokenizer = ByteTokenizer()
    given: dict[str, Json] = {
        "model_type": "llama",
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": TINY_CONTEXT,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_ids[0],
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    config = cast("SimpleNamespace", known(given))
    generator = torch.Generator().manual_seed(0)
    state = {
        name: (torch.ones(shape) if len(shape) == 1 else torch.empty(shape).normal_(0.0, 0.05, generator=generator)).to(dtype)
        for name, shape in shapes(config).items()
    }
    if not modules:
        return skeleton(config, state)
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaConfig.from_dict(dict[str, Any](given))
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(theirs)
    model.load_state_dict(state, assign=True)
    model.get_submodule("model").rotary_emb = LlamaRotaryEmbedding(theirs)
    return model.eval()


def read_folder(folder: Path, name: str, dtype: torch.dtype, *, cache: Path | None, ours: bool, device: torch.device | None = None) -> nn.Module:
    """The model of a Hugging Face folder.

    Args:
        folder: its files.
        name: of the model, for messages.
        dtype: of the weights.
        cache: where prepared weights are kept; None: transformers' modules are asked for, which can compute by themselves.
        ours: whether the folder stands in our cache: bytes that were found whole are then not read again until a file's time or size changes.
        device: that the weights must fit on as well; they are not put there.

    Raises:
        ConfigError: no config.json, or an architecture that transformers does not know.
        CorruptError: tensors are missing, broken or of other shapes than the configuration says.
        BackendError: not enough memory.
    """
    try:
        config = read_json(folder / "config.json")
    except NotFoundError as error:
        raise ConfigError(f"The model folder {str(folder)!r} has no config.json. Expected the files of a Hugging Face model: download it again.") from error
    if (folder / "manifest.json").is_file():
        try:
            _verify(folder, remember=ours)
        except CorruptError as error:
            raise CorruptError(f"The model {name!r} is damaged: {error} Delete that folder: it is made again.") from error
    check_memory(name, weights_in(folder) * ITEM_BYTES[dtype], device)
    plan = None if cache is None else known(config)
    try:
        state = None if plan is None or cache is None else prepared_weights(folder, plan, dtype, cache)
    except Exception as error:  # safetensors raises bare errors on broken tensors
        raise CorruptError(f"The weights in {str(folder)!r} cannot be read: {_line(error)} Download the model again.") from error
    return _by_transformers(folder, name, dtype, config) if plan is None or state is None else skeleton(plan, state.tensors, state.short)


def _verify(folder: Path, *, remember: bool) -> None:
    """Compares every byte with the manifest, or with `remember` only the files' sizes and times with those that were compared before."""
    seen = folder.with_name(f".{folder.name}.checked.json")
    now = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.iterdir())}
    if remember and seen.is_file() and read_json(seen) == now:
        return
    verify(folder)
    if remember:
        with contextlib.suppress(StoreError):  # a cache that cannot be written is compared again
            write_json(seen, now)


def _by_transformers(folder: Path, name: str, dtype: torch.dtype, config: Json) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            loaded = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
    except (ValueError, KeyError, ImportError) as error:
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise ConfigError(
            f"transformers cannot build the model {name!r} (model_type {kind!r}): {_line(error)} "
            "Expected a causal language model that it knows; code in the folder is not run."
        ) from error
    except Exception as error:  # safetensors and torch raise bare errors on broken tensors
        raise CorruptError(f"The weights in {str(folder)!r} cannot be read: {_line(error)} Download the model again.") from error
    model, report = cast("tuple[nn.Module, dict[str, set[str]]]", loaded)
    if missing := sorted(report["missing_keys"]):
        raise CorruptError(f"The weights in {str(folder)!r} lack {len(missing)} tensors, first {missing[0]!r}. Download the model again.")
    return model.eval()


def _line(error: Exception) -> str:
    """A library's message as one sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    return text if text.endswith((".", "!")) else f"{text}."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers prints no progress bars and no advice inside the block."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def head_name(model: nn.Module, name: str) -> str:
    """The output layer's name.

    Raises:
        ConfigError: the model has none.
    """
    head = cast("Callable[[], nn.Module | None]", model.get_output_embeddings)()
    found: str | None = next((key for key, module in model.named_modules() if module is head), None)
    if head is None or found is None:
        raise ConfigError(f"The model {name!r} has no output layer. Expected a causal language model.")
    return found


def hidden_by_modules(model: nn.Module, ids: Tensor, cache: Cache | None = None, mask: Tensor | None = None, places: Tensor | None = None) -> Tensor:
    """The last hidden states [B, L, H] as transformers' modules compute them; see `Base.hidden`."""
    backbone = cast("Callable[[], nn.Module]", model.get_decoder)()
    key = "cache" if "cache" in inspect.signature(backbone.forward).parameters else "past_key_values"  # renamed in transformers 5
    given = {key: cache} if cache is not None else {}
    if mask is not None and mask.is_floating_point():
        mask = mask.to(next(backbone.parameters()).dtype)  # CUDA's kernels of attention refuse another
    return cast("Tensor", backbone(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=cache is not None, **given).last_hidden_state)


@torch.no_grad()
def probe(model: nn.Module, head: str, name: str, device: torch.device) -> None:
    """Checks on four tokens that the logits are the output layer on the last hidden state, also in two parts through a cache.

    Raises:
        ConfigError: they are not (soft-capped or scaled logits, recurrent layers).
    """
    if isinstance(model, Skeleton):
        return
    from transformers import DynamicCache

    ids = torch.arange(1, 5, device=device)[None]
    cache = DynamicCache()
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    try:
        parts = [hidden_by_modules(model, ids), torch.cat([hidden_by_modules(model, ids[:, :2], cache), hidden_by_modules(model, ids[:, 2:], cache)], dim=1)]
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise ConfigError(f"The model {name!r} does not run with a key-value cache: {_line(error)} Use a Llama- or Qwen-like decoder.") from error
    for hidden in parts:
        ours = model.get_submodule(head)(hidden).float()
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max())):
            raise ConfigError(
                f"The model {name!r} changes its logits after the output layer, which the local engine does not. Use a Llama- or Qwen-like model."
            )
