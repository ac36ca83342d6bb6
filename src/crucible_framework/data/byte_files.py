"""The built-in byte tokenizer as files, for programs that read Hugging Face folders."""

from __future__ import annotations

from pathlib import Path

from ..files import write_json
from .tokens import CHATML, ByteTokenizer

__all__ = ["byte_tokenizer_files"]


def byte_tokenizer_files(to: Path) -> None:
    """The built-in byte tokenizer as files that transformers' `AutoTokenizer` reads: the same ids, special tokens and chat template."""
    ours = ByteTokenizer()
    # The byte-level alphabet of GPT-2: printable bytes stand for themselves, the others for characters from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    vocabulary = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    names = ("<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<pad>")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": ours.encode(name)[0], "content": name, **flags} for name in names]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    bpe: dict[str, object] = {"type": "BPE", "vocab": vocabulary, "merges": [], "fuse_unk": False, "byte_fallback": False}
    whole = {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": level, "post_processor": None, "decoder": level, "model": bpe}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHATML, "clean_up_tokenization_spaces": False, "bos_token": "<bos>",
              "eos_token": "<|im_end|>", "pad_token": "<pad>"}  # fmt: skip
    write_json(to / "tokenizer.json", whole)
    write_json(to / "tokenizer_config.json", config)
    write_json(to / "generation_config.json", {"eos_token_id": list(ours.eos_ids)})
