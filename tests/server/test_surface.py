"""The page lists every call of the SDK that is installed, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import tinker

PAGE = Path(__file__).parents[2] / "docs" / "tinker.md"
CLASSES = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "AdminClient")
INSIDE = {"get_telemetry", "on_queue_state_change", "holder"}
"""What the SDK's own parts call on each other."""


def test_every_call_of_the_sdk_is_on_the_page() -> None:
    listed = set(re.findall(r"^\| `(\w+\.\w+)` \| \S", PAGE.read_text().partition("## Every call of the SDK")[2], flags=re.MULTILINE))
    calls = {
        f"{name}.{call}"
        for name in CLASSES
        for call in dir(getattr(tinker, name))
        if not call.startswith("_") and not call.endswith("_async") and call not in INSIDE
    }
    assert listed == calls
