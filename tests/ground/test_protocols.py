"""The contracts: every name is public, a Loss is a record, and a tokenizer of one's own is told from something else."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import pytest

from crucible_framework import protocols
from crucible_framework.protocols import Loss, Tokenizer

CONTRACTS = [found for name in protocols.__all__ if inspect.isclass(found := getattr(protocols, name)) and getattr(found, "_is_protocol", False)]


class Letters:
    """One id a letter: the least that a tokenizer can be."""

    name = "letters"
    vocab_size = 128
    bos_id: int | None = None
    eos_ids = (0,)
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = {}

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))


def test_a_class_with_the_methods_is_a_tokenizer_and_another_is_not() -> None:
    mine: Tokenizer = Letters()
    assert isinstance(mine, Tokenizer)
    assert mine.decode(mine.encode("abc")) == "abc"
    assert not isinstance(object(), Tokenizer)


def test_the_contracts_are_these() -> None:
    names = {"Backend", "Clock", "ExampleSession", "HedgePolicy", "Router", "Sampler", "StreamSampler", "Tokenizer", "TrainingSession"}
    assert {contract.__name__ for contract in CONTRACTS} == names


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
def test_a_contract_has_no_body_and_says_the_type_of_everything(contract: type) -> None:
    with pytest.raises(TypeError):
        contract()
    for name, member in vars(contract).items():
        function = member.fget if isinstance(member, property) else member
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        parameters = {name: one for name, one in inspect.signature(function).parameters.items() if name != "self"}
        named = {name: name for name, one in parameters.items() if one.kind is inspect.Parameter.KEYWORD_ONLY}
        wanted = [name for name in parameters if name not in named]
        assert {*parameters, "return"} <= set(function.__annotations__), f"{contract.__name__}.{name}"
        assert function(object(), *wanted, **named) is None, f"{contract.__name__}.{name} has a body"


def test_a_loss_says_what_it_needs() -> None:
    loss = Loss(name="mine", fn=lambda data, logprobs: (logprobs[0].sum(), {}), source="here")
    assert (loss.needs, loss.extras, loss.native) == ("logprobs", (), None)
    with pytest.raises(TypeError):
        Loss("mine", lambda data, logprobs: (logprobs[0].sum(), {}), "here")  # type: ignore[call-arg]  # what is tested
