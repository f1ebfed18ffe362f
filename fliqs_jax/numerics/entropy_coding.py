"""Bits of weights after entropy coding: measured, and expected of Gaussians.

An arithmetic coder with the frequencies of a tensor's values comes within a
fraction of a percent of their entropy (Shannon, 1948), and no coder that takes
one value at a time comes below it. The table of frequencies is not counted.
"""

import functools

import numpy as np
import scipy

from fliqs_jax.numerics import formats
from fliqs_jax.numerics import packing

# Exponents of bfloat16 below which a standard Gaussian has no weight.
_LEAST_EXPONENT, _LARGEST_EXPONENT = -24, 3


def measured(values: np.ndarray) -> float:
  """Returns the bits of all values after entropy coding.

  Args:
    values: [...] grid values, or codes; not NaN.
  """
  _, counts = np.unique(values, return_counts=True)
  return float(-np.sum(counts * np.log2(counts / counts.sum())))


@functools.cache
def expected(numeric_format: formats.NumericFormat, count: int) -> float:
  """Returns the expected bits of a Gaussian weight after entropy coding.

  Its threshold is the median of the largest magnitude of `count` weights, as
  that of a channel without clipping is about. A format of more bits makes more
  values likely, so it costs more, but less than its bits.

  Args:
    numeric_format: format of the weights.
    count: number of weights that share a scale, at least 1.
  """
  grid = np.unique(_grid(numeric_format.grid_format))
  if numeric_format.scaled:
    # P(all |x| < t) = 1 / 2.
    inside = 0.5 ** (1 / count)
    grid = grid / grid.max() * scipy.special.ndtri((1 + inside) / 2)
  edges = scipy.special.ndtr((grid[1:] + grid[:-1]) / 2)
  chances = np.diff(edges, prepend=0.0, append=1.0)
  chances = chances[chances > 0]
  return float(-np.sum(chances * np.log2(chances)))


def _grid(numeric_format: formats.NumericFormat) -> np.ndarray:
  if numeric_format.scaled:
    table = packing.table(numeric_format).astype(np.float64)
    # The least code of an integer is on no grid.
    return table[np.abs(table) <= numeric_format.max_value]
  mantissas = 1 + np.arange(2**numeric_format.mantissa_bits) / (
    2.0**numeric_format.mantissa_bits
  )
  exponents = np.arange(_LEAST_EXPONENT, _LARGEST_EXPONENT + 1)
  magnitudes = np.ldexp(mantissas[:, None], exponents).ravel()
  return np.concatenate([-magnitudes, [0.0], magnitudes])
