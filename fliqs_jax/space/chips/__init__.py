"""Chips: what they charge for an op, by its formats and its shape."""
