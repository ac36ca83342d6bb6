"""Rendering: weights lie on the completion alone, and cutting takes the prompt's start first."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible_framework.data import ByteTokenizer, HuggingFaceTokenizer, completion_tokens, load_dataset, render, render_all, render_prompt, rendering
from crucible_framework.data.rendering import KEPT_PROMPT
from crucible_framework.errors import DataError
from crucible_framework.records import Example, Message

from .tokenizers_for_tests import SMOLLM2, make_folder

TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
EXAMPLES = st.builds(Example, id=st.just("e"), prompt=TEXTS, target=TEXTS)
TOKENIZERS = st.booleans().map(lambda chat: ByteTokenizer(chat=chat))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(make_folder(tmp_path_factory.mktemp("bpe"), SMOLLM2), "bpe")


@given(example=EXAMPLES, tokenizer=TOKENIZERS)
def test_weights_cover_exactly_the_completion_and_its_end(example: Example, tokenizer: ByteTokenizer) -> None:
    prompt, completion = render_prompt(example.prompt, tokenizer), completion_tokens(example.target, tokenizer)
    datum = render(example, tokenizer)
    assert [*datum.tokens.tolist(), datum.targets[-1]] == [*prompt, *completion]
    assert datum.targets[:-1].tolist() == datum.tokens[1:].tolist()
    assert datum.targets[datum.weights == 1].tolist() == completion
    assert datum.weights.tolist() == [0.0] * (len(prompt) - 1) + [1.0] * len(completion)
    assert [str(array.dtype) for array in (datum.tokens, datum.targets, datum.weights)] == ["int32", "int64", "float32"]
    assert completion[-1] == tokenizer.eos_ids[0]


@given(example=EXAMPLES, tokenizer=TOKENIZERS, max_length=st.integers(1, 200))
def test_cutting_takes_the_start_of_the_prompt_and_never_the_completion_unseen(example: Example, tokenizer: ByteTokenizer, max_length: int) -> None:
    prompt, completion = render_prompt(example.prompt, tokenizer), completion_tokens(example.target, tokenizer)
    least = min(KEPT_PROMPT, len(prompt))
    if max_length < least:
        with pytest.raises(DataError, match="'e' is longer than the context"):
            render_all([example], tokenizer, max_length)
        return
    rendered = render_all([example], tokenizer, max_length)
    (datum,) = rendered.data
    kept, answered = datum.tokens.tolist()[: len(datum) - int(datum.weights.sum()) + 1], datum.targets[datum.weights == 1].tolist()
    assert len(datum) == rendered.tokens == min(max_length, len(prompt) + len(completion) - 1)
    assert prompt[-len(kept) :] == kept
    assert completion[: len(answered)] == answered
    assert rendered.prompts_cut == (len(kept) < len(prompt))
    assert rendered.completions_cut == (len(answered) < len(completion))
    assert not rendered.completions_cut or len(kept) == least, "the completion is cut only when the prompt has given all that it can"
    if rendered.completions_cut:
        with pytest.raises(DataError, match="'e' is longer than the context"):
            render(example, tokenizer, max_length)
    else:
        assert np.array_equal(render(example, tokenizer, max_length).tokens, datum.tokens)


def test_render_never_cuts_a_completion_but_render_all_counts_it() -> None:
    example = Example(id="7", prompt="Is it?", target="yes" * 10)
    with pytest.raises(DataError, match="'7' is longer than the context: its completion does not fit into max_length 20"):
        render(example, ByteTokenizer(chat=False), 20)
    assert render_all([example], ByteTokenizer(chat=False), 20).completions_cut == 1


def test_counts_are_over_all_examples() -> None:
    short = Example(id="short", prompt="Is it?", target="yes")
    long_prompt = Example(id="long prompt", prompt="x" * 100, target="yes")
    long_answer = Example(id="long answer", prompt="Is it?", target="y" * 100)
    rendered = render_all([short, long_prompt, long_answer], ByteTokenizer(chat=False), 20)
    assert (rendered.prompts_cut, rendered.completions_cut) == (1, 1)
    assert [datum.id for datum in rendered.data] == ["short", "long prompt", "long answer"]
    assert rendered.tokens == sum(len(datum) for datum in rendered.data) == 10 + 20 + 20


def test_no_examples_render_to_nothing() -> None:
    assert render_all([], ByteTokenizer()).data == ()


@pytest.mark.parametrize(
    ("example", "match"),
    [
        (Example(id="7", prompt="", target="a"), "Example '7': The prompt is ''"),
        (Example(id="7", prompt="a", target="\ud800"), "Example '7': The text cannot be encoded"),
    ],
)
def test_errors_name_the_example(example: Example, match: str) -> None:
    with pytest.raises(DataError, match=match):
        render_all([example], ByteTokenizer())


class Endless(ByteTokenizer):
    """Bytes without a token that ends a turn."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return ()


def test_a_completion_of_no_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="'7' has a completion of no tokens"):
        render(Example(id="7", prompt="a", target=""), Endless())
    with pytest.raises(DataError, match="'7' has a prompt of no tokens"):
        render(Example(id="7", prompt="<empty>", target="a"), Deaf())


class Deaf(ByteTokenizer):
    """Hears nothing, and has no first token."""

    def __init__(self) -> None:
        super().__init__(chat=False)

    @property
    def bos_id(self) -> int | None:
        return None

    def encode(self, text: str) -> list[int]:
        return [] if text == "<empty>" else super().encode(text)


def test_the_shipped_data_renders_whole() -> None:
    dataset = load_dataset("minifact", split="dev")
    tokenizer = ByteTokenizer()
    rendered = render_all(dataset, tokenizer, 1024)
    assert (rendered.prompts_cut, rendered.completions_cut) == (0, 0)
    for example, datum in zip(dataset, rendered.data, strict=True):
        assert tokenizer.decode(datum.targets[datum.weights == 1].tolist()) == example.target
        assert isinstance(example.prompt, tuple)
        assert [type(turn) for turn in example.prompt] == [Message, Message]


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.text(min_size=1, max_size=12), st.sampled_from(["yes", "no", "né", "<|im_end|>"])), min_size=1, max_size=30))
def test_rows_rendered_together_are_rows_rendered_alone(bpe: HuggingFaceTokenizer, rows: list[tuple[str, str]]) -> None:
    """Across the borders of the parts that are encoded together, with equal texts among them."""
    examples = [Example(id=str(i), prompt=prompt, target=target) for i, (prompt, target) in enumerate(rows)]
    with mock.patch.object(rendering, "_TOGETHER", 7):
        found = render_all(examples, bpe).data
    for one, example in zip(found, examples, strict=True):
        alone = render(example, bpe)
        assert one.id == alone.id
        assert all(np.array_equal(getattr(one, part), getattr(alone, part)) for part in ("tokens", "targets", "weights"))


def test_the_row_that_cannot_be_encoded_is_named(bpe: HuggingFaceTokenizer) -> None:
    examples = [Example(id=str(i), prompt="\ud800" if i == 3 else "a", target="b") for i in range(6)]
    with pytest.raises(DataError, match="Example '3'"):
        render_all(examples, bpe)
