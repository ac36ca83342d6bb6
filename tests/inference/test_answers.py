"""Answers that are the same are read as the same, and others never."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.errors import ConfigError
from crucible_framework.inference import Reading, by_embedding, merge_by_meaning, read_answer, same_answer
from crucible_framework.inference.quantities import Quantity, last_quantity, quantity, show_number

READ = {
    "In 2024 the answer is 42": "42", "-.5": "-0.5", "x = 1/2": "0.5", "0.1 + 0.2 = 0.3": "0.3", "−7": "-7", "1.234,56": "1234.56", "$1,234.56": "1234.56 usd",
    "€999.99": "999.99 eur", "1.5e10": "15000000000", "not true": "no", "untrue": "no", "yesterday": "yesterday", "Eyes": "eyes", "That is incorrect": "no",
    "The claim is false, not true": "no", "Y": "yes", "N": "no", "nope": "no", "Absolutely": "yes", "No, I don't think so": "no", "I don't think so": "no",
    "4": "4", "4.0": "4", "4.": "4", "the answer is 4": "4", "forty-two": "42", "one hundred and five": "105", "two thirds": "2/3", "half": "0.5",
    "three and a half": "3.5", "50%": "0.5", "seventy-five percent": "0.75", "5 km": "5000 m", "1 ft": "0.3048 m", "12 inches": "0.3048 m",
    r"\boxed{\frac{1}{2}}": "0.5", r"The answer is $\boxed{42}$.": "42", r"Final: \boxed{\text{Paris}}": "paris", "(A)": "A", "A.": "A",
    "The answer is (B).": "B", "A. Paris": "A", "Answer: B) Rome": "B", "March 5, 2024": "2024-03-05", "5th of March 2024": "2024-03-05",
    "2024-03-05": "2024-03-05", "March 2024": "2024-03", "25/12/2024": "2024-12-25", "03/04/2024": "03/04/2024", "The answer is Paris.": "paris",
    "The Paris": "paris",
    "NOT_ENOUGH_INFO": "not enough info", "#### 18": "18", "3 × 10^8": "300000000", "10^{-2}": "0.01", "$1.5 million": "1500000 usd", "1,5": "1.5",
    "1,234": "1234", "1 1/2": "1.5", "the answer is 3.5.": "3.5", "The answer is St. Louis.": "st. louis", "It isn't correct.": "no",
    "I think it is not false": "yes", "Yes, it is.": "yes", "5 apples": "5 apples", "a study found": "study found", "-$5": "-5 usd",
    '{"b":1.0,"a":[1,"1"]}': '{"a":[1,"1"],"b":1}', '```json\n{"a":[1.0,2.5],"b":true}\n```': '{"a":[1,2.5],"b":true}', "1/0": "1/0", "minus two": "-2",
    "two dozen": "24", "3½": "3.5", "3 hours": "10800 s", "[NaN]": "[NaN]", "hundred million": "100000000", r"\boxed{3": r"\boxed{3",
    "2024-13-45": "2024-13-45", "{not json}": "{not json}", "Answer: **7**": "7", "one and two and a half": "one and two and a half",
}  # fmt: skip


@pytest.mark.parametrize(("text", "answer"), READ.items(), ids=lambda value: repr(value)[:30])
def test_reading(text: str, answer: str) -> None:
    assert read_answer(text) == answer


@pytest.mark.parametrize(
    "text", ["", "  .", "I don't know", "I do not know.", "I'm not sure, maybe", "unsure", "N/A", "It cannot be determined.", "no idea", "?"]
)
def test_abstentions(text: str) -> None:
    assert read_answer(text) is None


@pytest.mark.parametrize(("one", "other"), [("42", "43"), ("true", "not true"), ("The answer is 42", "The answer is 43"), ("5", "5 km"), ("1", '{"a":1}')])
def test_different_answers_stay_different(one: str, other: str) -> None:
    assert not same_answer(one, other)
    assert same_answer(one, one)
    assert not same_answer("I don't know", "I don't know")


def test_kinds_read_what_they_are_asked() -> None:
    assert read_answer("I have 3 apples and 2 pears, so 5 in all", "number") == "5"
    assert read_answer("no number at all", "number") is None
    assert read_answer("A study found 3", "number") == "3"
    assert read_answer("Yes the claim holds", "boolean") == "yes"
    assert read_answer("Certainly not something", "boolean") in ("yes", "no")
    assert read_answer("Paris", "boolean") is None
    assert read_answer("It is true. It is false.", "boolean") is None
    assert read_answer("I don't think so", "boolean") == "no"
    assert read_answer("Paris", "date") is None
    assert read_answer("42", "text") == "42"
    assert read_answer("no json", "json") is None
    assert read_answer("Paris", "choice") is None


def test_choices_units_and_dates_of_the_question() -> None:
    capitals = Reading(choices={"A": "Paris", "B": "Rome"})
    assert {read_answer(text, capitals) for text in ("A", "Paris", "the answer is Paris.", "(A) Paris")} == {"A"}
    assert read_answer("C", capitals) == "c"
    assert read_answer("5", Reading(unit="km")) == read_answer("5000 m") == "5000 m"
    assert read_answer("7", Reading(unit="apples")) == "7 apples"
    assert read_answer("03/04/2024", Reading(day_first=True)) == "2024-04-03"
    assert read_answer("03/04/2024", Reading(day_first=False)) == "2024-03-04"


@given(st.fractions(max_denominator=10**6))
def test_a_number_shown_is_read_back(value: Fraction) -> None:
    assert quantity(show_number(value)) == Quantity(value=value)


@given(st.integers(-(10**9), 10**9))
def test_separators_do_not_change_a_number(value: int) -> None:
    assert {read_answer(text) for text in (str(value), f"{value:,}", f"{value}.0", f"The answer is {value}.", rf"\boxed{{{value}}}")} == {str(value)}


@given(st.text(max_size=60))
def test_reading_never_fails_and_is_stable(text: str) -> None:
    once = read_answer(text)
    assert once is None or isinstance(once, str)
    assert read_answer(text) == once


@given(st.text(max_size=60))
def test_last_quantity_never_fails(text: str) -> None:
    assert last_quantity(text) is None or isinstance(last_quantity(text), Quantity)


def test_meaning_merges_in_both_directions_and_not_in_chains() -> None:
    close = {("a", "b"), ("b", "a"), ("b", "c"), ("c", "b")}
    assert merge_by_meaning(["c", None, "a", "b"], lambda x, y: (x, y) in close) == ("c", None, "a", "a")
    assert merge_by_meaning(["a", "b"], lambda x, y: (x, y) == ("a", "b")) == ("a", "b")


def test_embeddings() -> None:
    vectors = {"car": (1.0, 0.1), "automobile": (1.0, 0.0), "tree": (0.0, 1.0), "nothing": (0.0, 0.0)}
    equal = by_embedding(vectors.__getitem__, 0.9)
    assert merge_by_meaning(["car", "tree", "automobile", "nothing"], equal) == ("automobile", "tree", "automobile", "nothing")
    with pytest.raises(ConfigError, match="threshold"):
        by_embedding(vectors.__getitem__, 1.5)
