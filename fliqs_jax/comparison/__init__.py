"""Comparisons: search methods and baselines on one problem, at equal cost."""
