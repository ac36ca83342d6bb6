"""The text of a growing sample: parts make the whole, broken characters wait, and no stop is ever told."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible_framework.data import ByteTokenizer, HuggingFaceTokenizer, Unfolding
from crucible_framework.protocols import Tokenizer

from .tokenizers_for_tests import make_folder

BYTES = ByteTokenizer()
STOPS = st.lists(st.text("abé☃ ", min_size=1, max_size=4), max_size=3)


class Words(ByteTokenizer):
    """Decodes as sentence-piece models do: a space before every word but the first. Even ids are special and have no text."""

    def decode(self, tokens: Any) -> str:
        return "".join(f" w{token}" if token % 3 else f"x{token}" for token in tokens if token % 2).removeprefix(" ")


@pytest.fixture(scope="module")
def pieces_of_words(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(make_folder(tmp_path_factory.mktemp("bpe"), None), "bpe")


def drawn(tokenizer: Tokenizer, tokens: list[int], stops: list[str], sizes: list[int]) -> tuple[list[str], str]:
    """What is told of tokens that come in parts of these sizes, and the whole text: up to the first stop that the text so far holds."""
    unfolding, told, at = Unfolding(tokenizer, (*stops, 7)), list[str](), 0
    while at < len(tokens):
        size = sizes[len(told) % len(sizes)]
        part, at = tokens[at : at + size], at + size
        text = tokenizer.decode(tokens[:at])
        cut = min((place for stop in stops if (place := text.find(stop)) >= 0), default=-1)
        if cut >= 0 or at >= len(tokens):
            whole = text[:cut] if cut >= 0 else text
            return [*told, unfolding.end(whole)], whole
        told.append(unfolding.add(part))
    return told, ""


def check(tokenizer: Tokenizer, tokens: list[int], stops: list[str], sizes: list[int]) -> None:
    told, whole = drawn(tokenizer, tokens, stops, sizes)
    assert "".join(told) == whole
    if not stops:  # a character that stays broken may be told alone where a stop begins behind it
        assert not any(part.endswith("\ufffd") for part in told[:-1])
    for stop in stops:
        assert stop not in "".join(told)


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 260), st.sampled_from(list("abé☃ ".encode()))), max_size=40), STOPS, SIZES)
def test_bytes_of_any_kind(tokens: list[int], stops: list[str], sizes: list[int]) -> None:
    check(BYTES, tokens, stops, sizes)


@settings(max_examples=200, deadline=None)
@given(st.text("abé☃ 日🙂", max_size=30), STOPS, SIZES)
def test_characters_of_several_bytes(text: str, stops: list[str], sizes: list[int]) -> None:
    check(BYTES, BYTES.encode(text), stops, sizes)


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 300), max_size=40), stops=STOPS, sizes=SIZES)
def test_tokens_of_a_trained_vocabulary(pieces_of_words: HuggingFaceTokenizer, tokens: list[int], stops: list[str], sizes: list[int]) -> None:
    check(pieces_of_words, tokens, stops, sizes)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=30), SIZES)
def test_a_first_word_without_its_space(tokens: list[int], sizes: list[int]) -> None:
    check(Words(), tokens, ["w5 w7"], sizes)


def test_what_is_certain_is_told_at_once() -> None:
    unfolding = Unfolding(BYTES, ("END",))
    assert [unfolding.add([byte]) for byte in "aEé".encode()] == ["a", "", "", "Eé"]
    assert [unfolding.add([byte]) for byte in b"EN."] == ["", "", "EN."]
    assert unfolding.add([260]) == ""
    assert unfolding.end("aEéEN.!") == "!"


def test_a_stop_that_begins_before_a_broken_character() -> None:
    unfolding = Unfolding(BYTES, ("aé",))
    assert [unfolding.add([byte]) for byte in "aé".encode()[:2]] == ["", ""]


def test_a_tokenizer_that_rewrites_has_no_rest() -> None:
    unfolding = Unfolding(BYTES)
    assert unfolding.add(list(b"ab")) == "ab"
    assert unfolding.end("another") == ""
