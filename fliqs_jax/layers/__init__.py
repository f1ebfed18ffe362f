"""Quantized linen layers that read their format from `arch`."""
