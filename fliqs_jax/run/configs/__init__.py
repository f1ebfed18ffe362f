"""Configs of runs: the arguments of recipes, the keys, their checks."""
