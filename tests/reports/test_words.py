"""How numbers, times and settings look."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.records import Json
from crucible_framework.reports import words


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.6131, "0.613"), (12345.0, "12,345"), (0.0002, "2×10⁻⁴"), (1e-7, "1×10⁻⁷"), (-0.5, "−0.500"), (0.0, "0"), (None, "–"),
        (math.nan, "–"), (math.inf, "–"), (2.5e12, "2.5×10¹²"), (123.456, "123"), (3.0, "3"), (-2.0, "−2"),
    ],
)  # fmt: skip
def test_numbers(value: float | None, shown: str) -> None:
    assert words.number(value) == shown


@given(st.floats(-1e15, 1e15).filter(lambda value: value == 0 or abs(value) > 1e-15))
def test_a_number_reads_back_to_within_its_digits(value: float) -> None:
    text = words.number(value).replace("−", "-").replace(",", "")
    mantissa, _, power = text.partition("×10")
    exponent = int(power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))) if power else 0
    assert math.isclose(float(mantissa) * 10.0**exponent, value, rel_tol=0.0051)


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_a_share_that_is_not_zero_is_shown_as_zero_only_below_a_thousandth_of_a_point(low: float, high: float) -> None:
    digits = words.share_digits(low, high)
    for value in (low, high):
        assert float(words.points(value, digits).replace("−", "-")) != 0 or abs(value) < 1e-5 * 0.5000001 or value == 0


def test_shares_and_intervals() -> None:
    assert words.percent(0.6111, 1) == "61.1\u00a0%"
    assert words.percent(math.nan) == words.NOTHING
    assert words.points(0.21, 1, plus=True) == "+21.0"
    assert words.points(-0.0001, 1, plus=True) == "0.0"
    assert words.interval(0.5, 0.612, share=True) == "50.0 to 61.2\u00a0%"
    assert words.interval(-0.0002, 0.1, share=True) == "−0.02 to 10.00\u00a0%"
    assert words.interval(1.5, 2.25, share=False) == "1.50 to 2.25"
    assert words.interval(math.nan, 1, share=True) == words.NOTHING
    assert (words.signed(0.5), words.signed(-0.5), words.signed(0)) == ("+0.500", "−0.500", "0")
    assert words.level(0.95) == "95\u00a0%"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4215, "0.42 s"), (12.34, "12.3 s"), (61.5, "1 min 02 s"), (59.96, "1 min 00 s"), (7620, "2 h 07 min"), (None, "–"), (math.inf, "–")],
)
def test_durations(seconds: float | None, shown: str) -> None:
    assert words.duration(seconds) == shown


@pytest.mark.parametrize(("count", "shown"), [(7, "7 B"), (4_900_000, "4.9 MB"), (999_600, "1.0 MB"), (123_000, "123 kB"), (5e15, "5000 TB"), (None, "–")])
def test_sizes(count: float | None, shown: str) -> None:
    assert words.size(count) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "none"), (True, "yes"), (False, "no"), ("", "–"), ("a", "a"), (1e-4, "0.0001"), (32.0, "32.0"), (["q", 1], "q, 1"), ([], "–"),
        ({"a": [1]}, '{"a": [1]}'), ("\n", '"\\n"'), ([[1]], "[[1]]"),
    ],
)  # fmt: skip
def test_settings_keep_every_digit(value: Json, shown: str) -> None:
    assert words.setting(value) == shown


def test_text_and_moments() -> None:
    assert words.clip("abcdef", 3) == "abc … [3 more characters]"
    assert words.clip("abc", 3) == "abc"
    assert (words.counted(1, "step"), words.counted(1200, "step")) == ("1 step", "1,200 steps")
    assert words.when(1_700_000_000) == "14 November 2023, 22:13 UTC"
    assert (words.when("yesterday"), words.when(None), words.when(-5), words.when(True)) == ("yesterday", "–", "–", "–")
    assert words.visible("a\x1b[1m\u202e\x7f\u200b\n") == "a␛[1m⟨U+202E⟩␡⟨U+200B⟩\n"
