"""What each finding must keep: finite numbers, the effect in its interval, and an interval that says the same as the p-value."""

from __future__ import annotations

import importlib
import math
from typing import Any

from crucible_framework.records import Finding

SCIPY: Any = importlib.import_module("scipy.stats")  # its stubs know fewer argument types than the library
PANDAS: Any = importlib.import_module("pandas")


def check(found: Finding, alpha: float = 0.05) -> None:
    low, high = found.interval
    assert all(math.isfinite(x) for x in (found.statistic, found.p_value, found.effect, low, high)), found
    assert 0 <= found.p_value <= 1
    assert low <= found.effect + 1e-12
    assert found.effect <= high + 1e-12
    assert found.n >= 2
    assert found.why
    assert found.source
    if abs(found.p_value - alpha) > 1e-7 and not (0 < abs(low) < 1e-9 and low != math.nextafter(0, 1)):
        left_out = low > 0 or high < 0
        assert (found.p_value < alpha) == left_out, found
