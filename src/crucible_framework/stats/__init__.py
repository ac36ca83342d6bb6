"""Estimates and findings with honest intervals. Knows no models and no files; scipy is imported when first needed."""

from .intervals import bootstrap, majority_rate, mean_estimate, paired_difference, wilson

__all__ = ["bootstrap", "majority_rate", "mean_estimate", "paired_difference", "wilson"]
