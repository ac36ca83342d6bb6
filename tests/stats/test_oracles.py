"""Every stored case agrees with its oracle; the oracles themselves need not be installed."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.stats.oracle_cases import OURS, gap, load

CASES = load()


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{i}-{case['test']}-{case['kind']}" for i, case in enumerate(CASES)])
def test_agrees(index: int) -> None:
    case = CASES[index]
    assert gap(case) <= case["tolerance"], case["oracle"]


def test_there_are_many_cases_of_every_test() -> None:
    assert len(CASES) >= 100
    assert Counter(case["test"] for case in CASES).keys() == OURS.keys()
