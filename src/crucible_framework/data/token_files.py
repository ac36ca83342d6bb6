"""`tokenizer.json` as it stands, read by the `tokenizers` library: the common case, without the seconds that transformers takes to import.

This file does not know chat templates' rendering, nor which tokens end a turn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["TokenizerFile"]

_AS_IT_STANDS = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Classes for which transformers takes `tokenizer.json` unchanged; others rebuild parts of it."""
_HARMLESS = {"backend", "chat_template", "clean_up_tokenization_spaces", "is_local", "local_files_only", "model_max_length", "padding_side", "tokenizer_class"}
"""Settings beside the special tokens that change nothing of what is used here."""
_PATCHED = 100_000
"""Tokens above which transformers may repair a file's regular expression."""
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerFile:
    """What `AutoTokenizer` gives for a folder that names one of the plain classes.

    Args:
        tokenizer: the parsed file.
        special: `bos_token`, `eos_token`, … as text.
        template: the chat template.
    """

    def __init__(self, tokenizer: Tokenizer, special: Mapping[str, str], template: str | None) -> None:
        self._tokenizer, self.special_tokens_map, self.chat_template = tokenizer, special, template
        self.bos_token_id = self._id("bos_token")
        self.eos_token_id = self._id("eos_token")

    @classmethod
    def of(cls, folder: Path) -> TokenizerFile | None:
        """The tokenizer of a folder, or None where it takes more than its `tokenizer.json`.

        Raises:
            Exception: the file is broken, as the `tokenizers` library says it.
        """
        settings, file, template = folder / "tokenizer_config.json", folder / "tokenizer.json", folder / "chat_template.jinja"
        if not settings.is_file() or not file.is_file():
            return None
        given = json.loads(settings.read_text(encoding="utf-8"))
        written = given.get("chat_template")
        special = {name: given[name] for name in _SPECIAL if given.get(name) is not None}
        texts = all(isinstance(token, str) for token in special.values())
        known = texts and given.get("tokenizer_class") in _AS_IT_STANDS and given.keys() <= _HARMLESS | set(_SPECIAL)
        if not known or not isinstance(written, str | None) or (folder / "added_tokens.json").exists():
            return None
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        if not added.issuperset(special.values()) or tokenizer.get_vocab_size() > _PATCHED:
            return None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, special, template.read_text(encoding="utf-8") if template.is_file() else written)

    def _id(self, name: str) -> int | None:
        token = self.special_tokens_map.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> Mapping[str, int]:
        """Ids by token, added ones included."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of the text."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, none added, on all cores."""
        return [found.ids for found in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """The text of token ids; spaces are left as they are."""
        if clean_up_tokenization_spaces:
            raise NotImplementedError("Spaces are not cleaned up.")
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
