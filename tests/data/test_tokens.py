"""Tokenizers and chat templates: the same tokens as transformers gives, and errors that say what to do."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from crucible_framework.config import places
from crucible_framework.data import ByteTokenizer, HuggingFaceTokenizer, completion_tokens, load_dataset, render_all, render_prompt
from crucible_framework.errors import ConfigError, CorruptError, DataError, NotFoundError
from crucible_framework.protocols import Tokenizer
from crucible_framework.records import Message, Prompt

from .tokenizers_for_tests import ELABORATE, SMOLLM2, make_folder

ROLES = st.sampled_from(["system", "user", "assistant"])
TEXTS = st.text(st.characters(codec="utf-8"), max_size=30)
CHATS = st.lists(st.builds(Message, role=ROLES, content=TEXTS), min_size=1, max_size=5).map(tuple)


def chat(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role=cast("Any", role), content=content) for role, content in turns)


@pytest.fixture(scope="module", params=[SMOLLM2, ELABORATE], ids=["smollm2", "elaborate"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tokenizer"), request.param)


@pytest.fixture(scope="module")
def ours(folder: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(folder, "small")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def expected(theirs: Any, messages: tuple[Message, ...]) -> list[int]:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return list(theirs.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False))


# ---------------------------------------------------------------------------------------------------------------- chat
@given(messages=CHATS)
def test_chats_get_the_tokens_that_transformers_gives(ours: HuggingFaceTokenizer, theirs: Any, messages: tuple[Message, ...]) -> None:
    assert render_prompt(messages, ours) == expected(theirs, messages)


@given(text=TEXTS.filter(bool))
def test_a_string_is_one_user_turn(ours: HuggingFaceTokenizer, theirs: Any, text: str) -> None:
    assert render_prompt(text, ours) == expected(theirs, chat(("user", text)))


def test_smollm2_puts_its_own_system_turn_only_where_there_is_none(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(make_folder(tmp_path, SMOLLM2), "small")
    assert "named SmolLM" in tokenizer.decode(render_prompt("Hi", tokenizer))
    own = tokenizer.decode(render_prompt(chat(("system", "Be short."), ("user", "Hi")), tokenizer))
    assert own == "system\nBe short.\nuser\nHi\nassistant\n"


def test_a_template_that_refuses_a_role_is_named(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(make_folder(tmp_path, ELABORATE), "small")
    with pytest.raises(DataError, match=r"'small' failed on turns user, tool: no tools here"):
        render_prompt(chat(("user", "a"), ("tool", "b")), tokenizer)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{% include '/etc/hostname' %}",
    ],
)
def test_templates_cannot_reach_out_or_change_the_chat(attack: str) -> None:
    with pytest.raises(DataError, match="chat template of 'bytes' failed"):
        render_prompt("a", Template(attack))


class Template(ByteTokenizer):
    """Bytes, with a template of the test's."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source

    @property
    def chat_template(self) -> str | None:
        return self.source


def test_templates_may_ask_for_the_date() -> None:
    tokenizer = Template("{{ strftime_now('%Y') }}")
    assert tokenizer.decode(render_prompt("a", tokenizer)) in {str(datetime.now(UTC).year + step) for step in (-1, 0, 1)}


def test_a_template_that_renders_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="renders the prompt to no tokens"):
        render_prompt("a", Template("{# nothing #}"))


def test_a_template_that_does_not_parse_is_refused() -> None:
    with pytest.raises(DataError, match="failed on turns user"):
        render_prompt("a", Template("{% if %}"))


# ------------------------------------------------------------------------------------------------------------- prompts
def test_without_a_template_text_is_raw_after_the_first_token() -> None:
    plain = ByteTokenizer(chat=False)
    assert render_prompt("ab", plain) == [256, 97, 98]


def test_without_a_template_instruction_and_question_are_lines() -> None:
    plain = ByteTokenizer(chat=False)
    assert plain.decode(render_prompt(chat(("system", "Be short."), ("user", "Hi")), plain)) == "Be short.\nHi\n"
    assert plain.decode(render_prompt(chat(("user", "Hi")), plain)) == "Hi\n"
    with pytest.raises(DataError, match="no chat template, but the prompt has turns user, assistant, user"):
        render_prompt(chat(("user", "a"), ("assistant", "b"), ("user", "c")), plain)


def test_a_tokenizer_without_a_template_in_its_folder(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(make_folder(tmp_path, None), "base")
    assert tokenizer.chat_template is None
    assert render_prompt("water", tokenizer) == [tokenizer.bos_id, *tokenizer.encode("water")]
    assert tokenizer.eos_ids == (2,)


def test_token_ids_are_taken_as_they_are() -> None:
    assert render_prompt((5, 0, 260), ByteTokenizer()) == [5, 0, 260]


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ("", "prompt is ''"),
        ((), r"prompt is \(\)"),
        ((1, -1), "mixes in -1"),
        ((1, True), "mixes in True"),
        ((1, Message(role="user", content="a")), "mixes in Message"),
        ((1, 261), "token id 261, but 'bytes' has 261 tokens"),
    ],
)
def test_prompts_that_cannot_be_read(prompt: object, match: str) -> None:
    with pytest.raises(DataError, match=match):
        render_prompt(cast("Prompt", prompt), ByteTokenizer())


def test_the_answer_ends_with_the_token_that_ends_the_turn(ours: HuggingFaceTokenizer) -> None:
    tokens = completion_tokens("SUPPORT", ours)
    assert tokens[-1] == ours.eos_ids[0] == 2
    assert ours.decode(tokens) == "SUPPORT"


# ---------------------------------------------------------------------------------------------------------- tokenizers
@given(text=TEXTS)
@pytest.mark.parametrize("chat_model", [True, False])
def test_bytes_come_back(text: str, chat_model: bool) -> None:
    tokenizer = ByteTokenizer(chat=chat_model)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=TEXTS)
def test_real_tokens_come_back(ours: HuggingFaceTokenizer, text: str) -> None:
    assert ours.decode(ours.encode(text)) == text


def test_special_tokens_in_a_text_are_recognised() -> None:
    assert ByteTokenizer().encode("a<|im_end|>b") == [97, 259, 98]
    assert ByteTokenizer().decode([97, 259, 195, 98]) == "a\ufffdb"


def test_both_tokenizers_keep_the_contract(ours: HuggingFaceTokenizer) -> None:
    for tokenizer in (ours, ByteTokenizer(), ByteTokenizer(chat=False)):
        assert isinstance(tokenizer, Tokenizer)
        assert all(0 <= token < tokenizer.vocab_size for token in (*tokenizer.eos_ids, *tokenizer.encode("Zoë\n")))
        assert tokenizer.special_tokens["eos_token"]
        assert tokenizer.encode("") == []
    assert ours.name == "small"


@pytest.mark.parametrize("tokenizer", ["ours", "bytes"])
def test_lone_surrogates_are_refused(ours: HuggingFaceTokenizer, tokenizer: str) -> None:
    with pytest.raises(DataError, match="cannot be encoded"):
        (ours if tokenizer == "ours" else ByteTokenizer()).encode("\ud800")


def test_end_tokens_are_those_of_template_tokenizer_and_generation(tmp_path: Path) -> None:
    make_folder(tmp_path, SMOLLM2, eos_token="<|endoftext|>")
    assert HuggingFaceTokenizer(tmp_path, "a").eos_ids == (2, 0)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    assert HuggingFaceTokenizer(tmp_path, "b").eos_ids == (2, 0, 1)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert HuggingFaceTokenizer(tmp_path, "c").eos_ids == (2, 0, 7)
    (tmp_path / "generation_config.json").write_text("{}")
    assert HuggingFaceTokenizer(tmp_path, "d").eos_ids == (2, 0)


def test_a_token_ends_turns_only_where_the_template_uses_it(tmp_path: Path) -> None:
    make_folder(tmp_path, "{{ messages[0]['content'] }}", eos_token="<|endoftext|>")
    assert HuggingFaceTokenizer(tmp_path, "a").eos_ids == (0,)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="'gone' is not at"):
        HuggingFaceTokenizer(tmp_path / "gone", "gone").encode("a")


def test_a_broken_folder(tmp_path: Path) -> None:
    make_folder(tmp_path, SMOLLM2)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CorruptError, match="cannot be read"):
        HuggingFaceTokenizer(tmp_path, "torn").encode("a")


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"crucible-framework\[local\]"):
        HuggingFaceTokenizer(tmp_path, "small").encode("a")


def test_importing_loads_no_tokenizer_template_or_network_library() -> None:
    heavy = ("torch", "transformers", "tokenizers", "jinja2", "huggingface_hub", "datasets", "scipy", "pydantic")
    code = f"import sys, crucible_framework.data; print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.slow
def test_verification_prompts_are_short_for_the_real_smollm2() -> None:
    folder = places().cache / "models" / "smollm2-135m"
    if not folder.is_dir():
        pytest.skip("smollm2-135m is not in the cache")
    tokenizer = HuggingFaceTokenizer(folder, "smollm2-135m")
    assert tokenizer.chat_template == SMOLLM2
    theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    dataset = load_dataset("minifact")
    for example in dataset:
        assert not isinstance(example.prompt, str)
        assert render_prompt(example.prompt, tokenizer) == expected(theirs, example.prompt)
    assert render_all(dataset, tokenizer).tokens / len(dataset) < 152
