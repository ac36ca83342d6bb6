"""Reports: a run folder to one HTML file and one Markdown file that say honestly what was trained and what it changed.

`write_report` reads run.json, config.json, data.json, metrics.jsonl, timings.jsonl, checkpoints/*/manifest.json and
eval/<label>/{evaluation.json,scores.jsonl} as the other parts write them ("base" is before, "adapter" after), and two files that whoever
makes a run may add:

    findings.json   {"findings": [<Finding as a plain object>, ...]}   the paired comparison of "base" and "adapter" among them
    samples.json    {"samples": [{"id", "document", "prompt", "target", "base", "adapter"}, ...]}   base and adapter are completions

A finding is taken for the difference adapter − base when its effect equals the difference of the stored scores (either way round) and its
name speaks of no other score. A sample is marked right or wrong where scores.jsonl of that evaluation has the same id and completion.
Without samples.json, answers are chosen from scores.jsonl by a rule that the report states. Whatever is missing or damaged is named.
"""

from __future__ import annotations

from .writing import FORMATS, write_report

__all__ = ["FORMATS", "write_report"]
