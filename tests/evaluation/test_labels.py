"""How a label is read out of free text: fair to a bare label and to prose, and never generous to hedging."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.evaluation import DEFAULT_LABELS, labels_of, stated_label, target_label
from crucible_framework.records import Example, Json

STATED = {
    "SUPPORT": [
        "SUPPORT",
        " support.",
        "**SUPPORT**",
        "Supported",
        "The claim is supported by the passage.",
        "Yes, the passage supports it.",
        "SUPPORT because the passage contradicts the opposite view.",
        "SUPPORT: the passage refutes the alternative",
        "Answer: SUPPORT\n\nPassage: It contradicts",
        "It does not only support the claim, it proves it.",
        "It does not contradict but supports the claim.",
        "The passage does not contradict it. Answer: SUPPORT",
        "No - it supports the claim",
        "It is not neutral but supports the claim.",
        "SUPPORT (the passage does not contradict it)",
        "SUPPORT SUPPORT SUPPORT",
    ],
    "CONTRADICT": [
        "contradict",
        "Contradicted.",
        "CONTRADICTS the claim",
        "This is a contradiction.",
        "The passage refutes the claim.",
        "REFUTED",
        "No, it contradicts the claim.",
        "Does the passage support the claim? CONTRADICT",
        "I must see whether the passage supports it. It refutes it.",
        "Some studies support it. Final answer: CONTRADICT",
        "The label is **contradict**.",
        "It does not support the claim and contradicts it.",
    ],
    "NOT_ENOUGH_INFO": [
        "NOT_ENOUGH_INFO",
        "not enough info",
        "Not enough information to support or contradict the claim.",
        "NotEnoughInfo",
        "not-enough-info",
        "NEI",
        "There isn't enough information.",
        "The passage does not provide enough information to support the claim.",
        "insufficient evidence",
        "The passage neither supports nor contradicts the claim.",
        "It doesn't support or refute it.",
        "This cannot be determined.",
        "not sufficient information",
        "Not supported; NOT_ENOUGH_INFO",
        "There is not enough evidence that it supports the claim.",
    ],
}
NOT_STATED = [
    ("", "no label"),
    ("I do not know.", "no label"),
    ("The claim is unsupported.", "no label"),
    ("The claim is not supported.", "denied"),
    ("It fails to support the claim.", "denied"),
    ("There is no evidence to support or contradict it.", "denied"),
    ("It does not support the claim or contradict it.", "denied"),
    ("Does the passage support the claim?", "asked"),
    ("We check if the passage supports the claim.", "left open"),
    ("SUPPORT, CONTRADICT, NOT_ENOUGH_INFO", "ambiguous: 'SUPPORT' and 'CONTRADICT'"),
    ("SUPPORT\nCONTRADICT\nNOT_ENOUGH_INFO", "ambiguous"),
    ("SUPPORT CONTRADICT", "ambiguous"),
    ("1. SUPPORT\n2. CONTRADICT", "ambiguous"),
    ("- SUPPORT\n- CONTRADICT", "ambiguous"),
    ("support/contradict", "ambiguous"),
    ("It supports or possibly contradicts the claim.", "ambiguous: 'supports' and 'contradicts'"),
    ("Supports a part but contradicts another.", "ambiguous"),
    ("NOT_ENOUGH_INFO or SUPPORT", "ambiguous"),
]


@pytest.mark.parametrize(("label", "text"), [(label, text) for label, texts in STATED.items() for text in texts])
def test_the_label_of(label: str, text: str) -> None:
    assert stated_label(text) == (label, "")


@pytest.mark.parametrize(("text", "reason"), NOT_STATED)
def test_no_label_of(text: str, reason: str) -> None:
    label, why = stated_label(text)
    assert label is None
    assert reason in why


@given(st.sampled_from(DEFAULT_LABELS), st.sampled_from(["{}", " {}\n", "**{}**", '"{}"', "({})", "Answer: {}", "{}.", "{}\n\nPassage: more text"]))
def test_markup_and_case_do_not_matter(label: str, frame: str) -> None:
    for text in (label, label.lower(), label.title(), label.replace("_", " "), label.replace("_", "-")):
        assert stated_label(frame.format(text)) == (label, "")


@given(st.lists(st.sampled_from(DEFAULT_LABELS), min_size=2, max_size=4), st.sampled_from([", ", " / ", "\n", " or ", " and ", " | ", "\n- ", " "]))
def test_a_list_of_labels_is_no_answer_unless_all_are_one(labels: list[str], separator: str) -> None:
    label, why = stated_label(separator.join(labels))
    if len(set(labels)) == 1:
        assert (label, why) == (labels[0], "")
    elif labels[0] != labels[1]:
        assert label is None
        assert "ambiguous" in why


@given(st.text(max_size=200), st.sampled_from([DEFAULT_LABELS, ("A", "B"), ("yes", "no")]))
def test_any_text_is_read(text: str, labels: tuple[str, ...]) -> None:
    label, why = stated_label(text, labels)
    assert (label in labels) == (why == "")


@given(st.permutations(DEFAULT_LABELS), st.sampled_from([text for texts in STATED.values() for text in texts] + [text for text, _ in NOT_STATED]))
def test_the_order_in_which_labels_are_declared_does_not_matter(labels: list[str], text: str) -> None:
    assert stated_label(text, labels)[0] == stated_label(text)[0]


@pytest.mark.parametrize("text", ["support " * 8000, "_" * 60000, "not " * 20000, "neither support nor " * 3000, "no " * 20000 + "support", "if " * 20000])
def test_long_rambling_is_read_in_no_time(text: str) -> None:
    started = time.perf_counter()
    stated_label(text)
    assert time.perf_counter() - started < 20


def test_labels_of_ones_own() -> None:
    choices = ("A", "B", "C", "D")
    assert stated_label("The answer is C.", choices)[0] == "C"
    assert stated_label("(B) because of this", choices)[0] == "B"
    assert stated_label("A study says that B is right", choices)[0] == "B"
    assert stated_label("A is right", choices)[0] == "A"
    assert stated_label("b", choices)[0] is None
    fever = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")
    assert stated_label("The claim is refuted.", fever)[0] == "REFUTES"
    assert stated_label("not_enough_info", fever)[0] == "NOT ENOUGH INFO"
    both = ("support", "supported")  # two labels of one family: each is only itself
    assert stated_label("supported", both)[0] == "supported"
    assert stated_label("supports", both)[0] is None
    assert stated_label("c++ it is", ("c", "c++"))[0] == "c++"


def example(target: str, labels: Json = None) -> Example:
    return Example(id="e", prompt="p", target=target, meta={} if labels is None else {"labels": labels})


def test_the_labels_of_an_example_and_its_target() -> None:
    assert labels_of(example("SUPPORT")) == DEFAULT_LABELS
    assert labels_of(example("A", ["A", "B"])) == ("A", "B")
    assert labels_of(example("A", ["", " "])) == DEFAULT_LABELS
    assert labels_of(example("A", "AB")) == DEFAULT_LABELS
    assert target_label(example(" supports ")) == "SUPPORT"
    assert target_label(example("CLAIM[c1]: x\nRELATION: c2 supports c1")) is None
    assert target_label(example("B", ["A", "B"])) == "B"
