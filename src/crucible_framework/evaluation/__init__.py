"""Evaluation: ask a sampler every example, score, estimate with honest intervals, compare in pairs. Importing it loads neither torch nor scipy."""

from __future__ import annotations

from .evaluate import GREEDY, evaluate
from .labels import DEFAULT_LABELS, labels_of, stated_label, target_label
from .results import baselines, compare, load_evaluation
from .scoring import citation_accuracy, contains, exact_match, f1, label_accuracy, numeric, schema_compliance, scorers

__all__ = [
    "DEFAULT_LABELS",
    "GREEDY",
    "baselines",
    "citation_accuracy",
    "compare",
    "contains",
    "evaluate",
    "exact_match",
    "f1",
    "label_accuracy",
    "labels_of",
    "load_evaluation",
    "numeric",
    "schema_compliance",
    "scorers",
    "stated_label",
    "target_label",
]
