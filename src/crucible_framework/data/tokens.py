"""Text to tokens and back: tokenizers, and chat templates.

One function, `render_prompt`, makes the prompt's tokens for training and for sampling, so they are the same by construction. A completion is
encoded apart from its prompt and ends in the token that ends a turn. Special tokens written in a text are recognised as such, in data too:
that is the tokenizers' contract. This file does not know models, batches or where text comes from, and it never runs a folder's code.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from ..errors import ConfigError, CorruptError, DataError, NotFoundError
from ..protocols import Tokenizer
from ..records import Json, Message, Prompt
from .token_files import TokenizerFile

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["ByteTokenizer", "HuggingFaceTokenizer", "completion_tokens", "completions_tokens", "render_prompt", "render_prompts"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_BYTE_SPECIALS = {"<bos>": 256, "<eos>": 257, "<|im_start|>": 258, "<|im_end|>": 259, "<pad>": 260}
_BYTE_SPLIT = re.compile("(" + "|".join(re.escape(name) for name in _BYTE_SPECIALS) + ")")
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|END_OF_TURN_TOKEN|>", "<turn|>")


# ---------------------------------------------------------------------------------------------------------- tokenizers
class ByteTokenizer:
    """UTF-8 bytes 0 to 255 as tokens, and five special ones; for the built-in tiny model and for tests.

    Args:
        chat: with a ChatML template; without it strings are raw text after `<bos>`.
    """

    def __init__(self, *, chat: bool = True) -> None:
        self._chat = chat

    @property
    def name(self) -> str:
        """Always "bytes"."""
        return "bytes"

    @property
    def vocab_size(self) -> int:
        """256 bytes and the special tokens."""
        return 256 + len(_BYTE_SPECIALS)

    @property
    def bos_id(self) -> int | None:
        """`<bos>`."""
        return _BYTE_SPECIALS["<bos>"]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """What ends a turn comes first: `<|im_end|>` and `<eos>` with the chat template, else `<eos>` alone."""
        eos = _BYTE_SPECIALS["<eos>"]
        return (_BYTE_SPECIALS["<|im_end|>"], eos) if self._chat else (eos,)

    @property
    def chat_template(self) -> str | None:
        """ChatML, or None."""
        return CHATML if self._chat else None

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """`bos_token`, `eos_token`, `pad_token`."""
        return {"bos_token": "<bos>", "eos_token": "<|im_end|>" if self._chat else "<eos>", "pad_token": "<pad>"}

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, special tokens in it recognised, none added.

        Raises:
            DataError: the text holds lone surrogates, which no UTF-8 has.
        """
        tokens: list[int] = []
        try:
            for part in _BYTE_SPLIT.split(text):
                special = _BYTE_SPECIALS.get(part)
                tokens += part.encode() if special is None else (special,)
        except UnicodeEncodeError as error:
            raise DataError(f"The text cannot be encoded: {error}. Expected valid Unicode: read the text as UTF-8.") from error
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the bytes; special tokens are left out, broken UTF-8 becomes U+FFFD."""
        return bytes(token for token in tokens if 0 <= token < 256).decode(errors="replace")


class _AutoTokenizer(Protocol):
    """The part of transformers' tokenizers that is used here."""

    chat_template: str | Mapping[str, str] | None
    bos_token_id: int | None
    eos_token_id: int | None
    special_tokens_map: Mapping[str, object]

    def __len__(self) -> int: ...
    def get_vocab(self) -> Mapping[str, int]: ...
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...


class HuggingFaceTokenizer:
    """transformers' tokenizer of a local folder, loaded when first used. No code of the folder is run and no network is asked.

    Args:
        folder: holds `tokenizer.json` or what else `AutoTokenizer` reads.
        name: the base model's name, for messages.

    Raises (on first use):
        NotFoundError: there is no such folder.
        CorruptError: the folder's tokenizer cannot be read.
        ConfigError: transformers is not installed.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self._name = name
        self._lock = threading.Lock()
        self._loaded: tuple[_AutoTokenizer | TokenizerFile, tuple[int, ...]] | None = None

    def _load(self) -> tuple[_AutoTokenizer | TokenizerFile, tuple[int, ...]]:
        with self._lock:
            if self._loaded is None:
                self._loaded = _load_folder(self.folder, self._name)
            return self._loaded

    @property
    def name(self) -> str:
        """The base model's name."""
        return self._name

    @property
    def vocab_size(self) -> int:
        """All tokens, added ones included; a model's embedding may be padded beyond."""
        return len(self._load()[0])

    @property
    def bos_id(self) -> int | None:
        """The beginning-of-text token, where there is one."""
        return self._load()[0].bos_token_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """What ends a turn in the chat template, then end of text, then what `generation_config.json` adds."""
        return self._load()[1]

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's template; the one called "default" where it has several."""
        template = self._load()[0].chat_template
        return template.get("default") if isinstance(template, Mapping) else template

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """`bos_token`, `eos_token`, … as text."""
        return {key: str(value) for key, value in self._load()[0].special_tokens_map.items() if not isinstance(value, (list, tuple))}

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, special tokens in it recognised, none added.

        Raises:
            DataError: the text is not valid Unicode.
        """
        try:
            return list(self._load()[0].encode(text, add_special_tokens=False))
        except (UnicodeEncodeError, TypeError) as error:
            raise DataError(f"The text cannot be encoded: {error}. Expected valid Unicode: read the text as UTF-8.") from error

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores.

        Raises:
            DataError: a text is not valid Unicode.
        """
        loaded = self._load()[0]
        if not isinstance(loaded, TokenizerFile):
            return [self.encode(text) for text in texts]
        try:
            return loaded.encode_all(texts)
        except (UnicodeEncodeError, TypeError) as error:
            raise DataError(f"A text cannot be encoded: {error}. Expected valid Unicode: read the text as UTF-8.") from error

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._load()[0].decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _load_folder(folder: Path, name: str) -> tuple[_AutoTokenizer | TokenizerFile, tuple[int, ...]]:
    if not folder.is_dir():
        raise NotFoundError(f"The tokenizer of {name!r} is not at {str(folder)!r}. Expected a folder with 'tokenizer.json'.")
    try:
        loaded = TokenizerFile.of(folder) or _by_transformers(folder)
        loaded.encode("a", add_special_tokens=False)  # the first call may switch truncation off, which is not thread-safe
        return loaded, _end_ids(loaded, folder)
    except ImportError as error:
        raise ConfigError(f"The tokenizer of {name!r} needs transformers. Install crucible-framework[local].") from error
    except Exception as error:  # tokenizers raises bare Exception on a broken file
        raise CorruptError(f"The tokenizer of {name!r} in {str(folder)!r} cannot be read: {error} Download the folder again.") from error


def _by_transformers(folder: Path) -> _AutoTokenizer:
    from transformers import AutoTokenizer

    return cast("_AutoTokenizer", AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False))


def _end_ids(tokenizer: _AutoTokenizer | TokenizerFile, folder: Path) -> tuple[int, ...]:
    vocabulary = tokenizer.get_vocab()
    template = tokenizer.chat_template
    source = template.get("default", "") if isinstance(template, Mapping) else template or ""
    ids = [vocabulary[end] for end in _TURN_ENDS if end in source and end in vocabulary]
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    generation = folder / "generation_config.json"
    if generation.is_file():
        extra = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id")
        ids += extra if isinstance(extra, list) else [] if extra is None else [extra]
    return tuple(dict.fromkeys(int(token) for token in ids))


# --------------------------------------------------------------------------------------------------------------- chat
def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now(UTC).astimezone().strftime(pattern)


def _tojson(
    x: Json,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=32)
def _template(source: str) -> Template:
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}` only marks the model's turns: its body is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    environment.filters["tojson"] = _tojson
    return environment.from_string(source)


def _chat_text(messages: Sequence[Message], source: str, tokenizer: Tokenizer) -> str:
    from jinja2 import TemplateError

    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return _template(source).render(**tokenizer.special_tokens, messages=turns, tools=None, documents=None, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        roles = ", ".join(message.role for message in messages)
        raise DataError(
            f"The chat template of {tokenizer.name!r} failed on turns {roles}: {error}. "
            "Expected roles in an order that it knows: give one user turn, or use another model."
        ) from error


def _plain_text(messages: Sequence[Message], tokenizer: Tokenizer) -> str:
    """Instruction and question, a line end after each; turns of others cannot be told apart without a template."""
    roles = [message.role for message in messages]
    if roles not in (["user"], ["system", "user"]):
        raise DataError(
            f"{tokenizer.name!r} has no chat template, but the prompt has turns {', '.join(roles)}. "
            "Expected one user turn, a system turn before it or not: use an instruct model for chats."
        )
    return "".join(f"{message.content}\n" for message in messages)


def _given_ids(prompt: Sequence[object], tokenizer: Tokenizer) -> list[int]:
    for token in prompt:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise DataError(f"The prompt mixes in {token!r}. Expected only token ids of at least 0, or only Messages.")
    highest = max(cast("Sequence[int]", prompt))
    if highest >= tokenizer.vocab_size:
        raise DataError(
            f"The prompt holds token id {highest}, but {tokenizer.name!r} has {tokenizer.vocab_size} tokens. Encode it with this model's tokenizer."
        )
    return list(cast("Sequence[int]", prompt))


def _written(prompt: Prompt, tokenizer: Tokenizer) -> tuple[str, bool] | list[int]:
    """The prompt's text, and whether the beginning-of-text token comes before it; or the token ids that it is."""
    if not prompt:
        raise DataError(f"The prompt is {prompt!r}. Expected text, Messages or token ids: give at least one character.")
    template = tokenizer.chat_template
    if isinstance(prompt, str):
        if template is None:
            return prompt, True
        messages: tuple[Message, ...] = (Message(role="user", content=prompt),)
    elif all(isinstance(turn, Message) for turn in prompt):
        messages = cast("tuple[Message, ...]", prompt)
    else:
        return _given_ids(prompt, tokenizer)
    return (_plain_text(messages, tokenizer), True) if template is None else (_chat_text(messages, template, tokenizer), False)


def render_prompt(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """The prompt's tokens, for training and for sampling alike.

    A string is one user turn where the tokenizer has a chat template, else raw text after the beginning-of-text token if there is one.
    Messages go through the template, with the start of the model's turn at the end; without a template, a user turn and a system turn
    before it are raw text, each with a line end. Token ids are taken as they are. A template that asks for today's date (`strftime_now`)
    gives other tokens on another day.

    Raises:
        DataError: an empty prompt, a longer chat without a chat template, a template that refuses the turns, or an id outside the vocabulary.
    """
    return render_prompts((prompt,), tokenizer)[0]


def render_prompts(prompts: Iterable[Prompt], tokenizer: Tokenizer) -> list[list[int]]:
    """`render_prompt` of each; texts are encoded together."""
    written = [_written(prompt, tokenizer) for prompt in prompts]
    encoded = iter(encode_all([one[0] for one in written if isinstance(one, tuple)], tokenizer))
    start, found = [] if tokenizer.bos_id is None else [tokenizer.bos_id], list[list[int]]()
    for one in written:
        tokens = one if isinstance(one, list) else [*start, *next(encoded)] if one[1] else next(encoded)
        if not tokens and isinstance(one, tuple) and not one[1]:
            raise DataError(f"The chat template of {tokenizer.name!r} renders the prompt to no tokens. Use another model, or give token ids.")
        found.append(tokens)
    return found


def encode_all(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """`tokenizer.encode` of each text; equal ones are encoded once, all together where the tokenizer has `encode_all`."""
    together, different = getattr(tokenizer, "encode_all", None), list(dict.fromkeys(texts))
    encoded = together(different) if together is not None and len(different) > 1 else map(tokenizer.encode, different)
    found: dict[str, list[int]] = dict(zip(different, encoded, strict=True))
    return [found[text] for text in texts]


def completion_tokens(text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of an answer, and the token that ends the turn (the first of `eos_ids`), where the tokenizer has one."""
    return completions_tokens((text,), tokenizer)[0]


def completions_tokens(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """`completion_tokens` of each; texts are encoded together."""
    end = tokenizer.eos_ids[:1]
    return [[*tokens, *end] for tokens in encode_all(texts, tokenizer)]
