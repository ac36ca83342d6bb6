"""Counters and gauges in Prometheus' text format. This file does not know what is counted."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["prometheus"]

_HELP = {
    "sessions_total": "Sessions opened.",
    "requests_total": "Requests begun, by kind.",
    "failures_total": "Requests that failed.",
    "steps_total": "Optimizer steps.",
    "checkpoints_total": "Checkpoints written.",
    "tokens_total": "Tokens, by what was done with them.",
    "sessions": "Live sessions.",
    "models": "Adapters in training.",
    "samplers": "Samplers of live sessions.",
    "waiting": "Unanswered requests.",
}


def prometheus(values: Mapping[str, float]) -> str:
    """The text of values by name; what stands behind a colon becomes the label `kind`."""
    lines, seen = list[str](), set[str]()
    for name in sorted(values):
        stem, _, kind = name.partition(":")
        if stem not in seen:
            seen.add(stem)
            lines += [f"# HELP crucible_{stem} {_HELP.get(stem, stem)}", f"# TYPE crucible_{stem} {'counter' if stem.endswith('_total') else 'gauge'}"]
        label = f'{{kind="{kind}"}}' if kind else ""
        lines.append(f"crucible_{stem}{label} {values[name]:g}")
    return "\n".join(lines) + "\n"
