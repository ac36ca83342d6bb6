"""GGUF files for llama.cpp: a whole model, or a LoRA adapter, of the Llama, Qwen2 and Qwen3 families.

Tensor names come from the `gguf` package; what is done here is the layout that llama.cpp expects of each family (Llama's query and key
rows are interleaved), its settings, and byte-level BPE tokenizers. What is not known exactly is refused, not guessed.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import CapabilityError, ConfigError
from ...files import read_json
from ...records import Json, record
from .lora import Adapter, tensor_name

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["Kept", "write_adapter_gguf", "write_model_gguf"]

_FAMILIES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
_ROTATED = (".self_attn.q_proj.weight", ".self_attn.k_proj.weight")
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
}
"""How text is cut before merges, as tokenizers say it → the name that llama.cpp has for the same rule."""


@record
class Kept:
    """What a GGUF file says besides its tensors: the model's configuration, and the folder with its tokenizer (None: the built-in bytes)."""

    name: str
    config: Mapping[str, Any]
    folder: Path | None

    @property
    def family(self) -> str:
        """The name of the architecture in the `gguf` package.

        Raises:
            CapabilityError: it is another, or has positions of another kind.
        """
        kind = str(self.config.get("model_type"))
        if kind not in _FAMILIES:
            raise CapabilityError(f"GGUF of model_type {kind!r} is not written here; expected {', '.join(_FAMILIES)}. Export 'merged' and convert that.")
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        if (rope_type := rope.get("rope_type", "default")) != "default":
            raise CapabilityError(f"GGUF with positions of type {rope_type!r} is not written here; expected 'default'. Export 'merged' and convert that.")
        return _FAMILIES[kind]


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("GGUF needs the package gguf. Install it: pip install 'crucible-framework[local]'") from error
    return gguf


def _names(kept: Kept) -> Any:
    gguf = _gguf()
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH[kept.family], int(kept.config["num_hidden_layers"]))


def _rows(kept: Kept, name: str, tensor: Tensor) -> Tensor:
    """Llama's rotary halves beside each other, as llama.cpp reads them; other families keep theirs."""
    if kept.family != "LLAMA" or not name.endswith(_ROTATED):
        return tensor
    heads = int(kept.config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
    return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def write_model_gguf(path: Path, state: Mapping[str, Tensor], kept: Kept, precision: str) -> None:
    """Writes a whole model.

    Args:
        path: the file.
        state: tensors by transformers' names, fp32.
        kept: configuration and tokenizer.
        precision: "float32", "float16", "bfloat16" or "q8_0"; vectors stay fp32.

    Raises:
        CapabilityError: another architecture or tokenizer, or rows that q8_0 cannot cut into blocks of 32.
    """
    gguf, names = _gguf(), _names(kept)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[kept.family]])
    try:
        _settings(writer, kept, precision)
        _tokenizer(writer, kept)
        tied = bool(kept.config.get("tie_word_embeddings")) and torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
        for name, tensor in state.items():
            if tied and name == "lm_head.weight":
                continue
            new = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if new is None:
                raise CapabilityError(f"GGUF has no place for the tensor {name!r}. Export 'merged' and convert that.")
            array, kind = _array(_rows(kept, name, tensor).contiguous().float().numpy(), precision, name)
            writer.add_tensor(new, array, raw_dtype=kind)
        _close(writer)
    finally:
        writer.close()


def write_adapter_gguf(path: Path, adapter: Adapter, layers: Sequence[str], kept: Kept, *, alpha: float) -> None:
    """Writes a LoRA adapter, fp32, that llama.cpp adds to a GGUF of the same base.

    Raises:
        CapabilityError: another architecture.
    """
    gguf, names = _gguf(), _names(kept)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[kept.family]])
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(kept.name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        for layer in layers:
            new = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
            low, high = adapter[tensor_name(layer, "A")], _rows(kept, f"{layer}.weight", adapter[tensor_name(layer, "B")])
            writer.add_tensor(f"{new}.lora_a", low.contiguous().numpy())
            writer.add_tensor(f"{new}.lora_b", high.contiguous().numpy())
        _close(writer)
    finally:
        writer.close()


def _close(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()


def _array(values: NDArray[np.float32], precision: str, name: str) -> tuple[NDArray[Any], Any]:
    gguf = _gguf()
    kinds = gguf.GGMLQuantizationType
    if values.ndim == 1 or precision == "float32":
        return values, kinds.F32
    if precision == "float16":
        return values.astype(np.float16), kinds.F16
    kind = kinds.BF16 if precision == "bfloat16" else kinds.Q8_0
    if kind == kinds.Q8_0 and values.shape[-1] % 32:
        raise CapabilityError(f"q8_0 cuts rows into blocks of 32; {name!r} has rows of {values.shape[-1]}. Use precision 'float16'.")
    return cast("NDArray[Any]", gguf.quants.quantize(values, kind)), kind


def _settings(writer: GGUFWriter, kept: Kept, precision: str) -> None:
    gguf, config = _gguf(), kept.config
    kinds = gguf.LlamaFileType
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(kept.name)
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config["num_key_value_heads"]))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_dimension_count(head_dim)
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_vocab_size(int(config["vocab_size"]))
    by_name = {"float32": kinds.ALL_F32, "float16": kinds.MOSTLY_F16, "bfloat16": kinds.MOSTLY_BF16, "q8_0": kinds.MOSTLY_Q8_0}
    writer.add_file_type(int(by_name[precision]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


# ------------------------------------------------------------------------------------------------------------ tokenizer
def _pre(tokenizer: Mapping[str, Any], folder: Path) -> str:
    """llama.cpp's name of the rule by which text is cut before merges."""
    rule = tokenizer.get("pre_tokenizer") or {}
    steps = rule.get("pretokenizers", [rule]) if rule.get("type") == "Sequence" else [rule]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and (name := _SPLITS.get(str(steps[0].get("pattern", {}).get("Regex")))):
        return name
    raise CapabilityError(
        f"The tokenizer in {str(folder)!r} cuts text in a way that has no known name in llama.cpp ({', '.join(map(str, kinds))}). "
        "Export 'merged' and convert that with llama.cpp's own script."
    )


def _tokenizer(writer: GGUFWriter, kept: Kept) -> None:
    if kept.folder is None:
        raise CapabilityError("The built-in tokenizer has bytes and no merges, which llama.cpp cannot express. Export 'merged', or take another base model.")
    gguf = _gguf()
    tokenizer = cast("dict[str, Any]", read_json(kept.folder / "tokenizer.json"))
    model = tokenizer["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise CapabilityError(f"The tokenizer in {str(kept.folder)!r} is {model.get('type')!r}; expected byte-level BPE. Export 'merged' and convert that.")
    kinds = gguf.TokenType
    added = {int(one["id"]): (str(one["content"]), bool(one["special"])) for one in tokenizer["added_tokens"]}
    by_id = {int(number): str(word) for word, number in model["vocab"].items()}
    words, types = list[str](), list[int]()
    for number in range(int(kept.config["vocab_size"])):
        if number in added:
            words.append(added[number][0])
            types.append(int(kinds.CONTROL if added[number][1] else kinds.USER_DEFINED))
        else:
            words.append(by_id.get(number, f"[PAD{number}]"))
            types.append(int(kinds.NORMAL if number in by_id else kinds.UNUSED))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre(tokenizer, kept.folder))
    writer.add_token_list(words)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    _special(writer, kept.folder, {word: number for number, word in enumerate(words)}, kept.config)


def _special(writer: GGUFWriter, folder: Path, ids: Mapping[str, int], config: Mapping[str, Any]) -> None:
    path = folder / "tokenizer_config.json"
    settings = cast("dict[str, Json]", read_json(path)) if path.is_file() else {}
    adders = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "unk": writer.add_unk_token_id, "pad": writer.add_pad_token_id}
    for kind, add in adders.items():
        said = settings.get(f"{kind}_token")
        word = said.get("content") if isinstance(said, dict) else said
        number = ids.get(str(word)) if word is not None else config.get(f"{kind}_token_id")
        if isinstance(number, int):
            add(number)
    writer.add_add_bos_token(bool(settings.get("add_bos_token", False)))
    template = settings.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, str):
        writer.add_chat_template(template)
