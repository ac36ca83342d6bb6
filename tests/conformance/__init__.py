"""tinker-cookbook's own recipes against `crucible serve`."""
