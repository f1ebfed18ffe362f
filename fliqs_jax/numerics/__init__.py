"""Numeric formats: grids, quantization, clipping, packing, fast products."""
