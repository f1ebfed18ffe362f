"""Random tensors with outliers, as in the paper's A.8, and their table."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fliqs_jax.analyses import finding as finding_lib

# A.8: one outlier in so many values; 0: none.
OUTLIERS = (0, 10_000, 1000, 100, 10)
_SEED = 0


def tensors(
  distribution: str, outliers: int, count: int, values: int
) -> np.ndarray:
  """Returns tensors, [count, values], in units of their clean deviation.

  A.8 leaves open whether the standard deviation is that with the outliers. Here
  it is that of the tensor before it gets them, so that one unit means the same
  at every rate; the largest magnitude is that with the outliers.
  (`numerics.clipping` divides by the deviation with the outliers, because a
  layer cannot measure another one.)

  Args:
    distribution: `gaussian` or `laplacian`.
    outliers: every such value, over all tensors in turn, is replaced by three
      times the largest magnitude of its tensor, with a random sign; 0: none.
    count: number of tensors.
    values: number of values of each.
  """
  rng = np.random.default_rng(_SEED)
  draw = rng.standard_normal if distribution == 'gaussian' else rng.laplace
  x = draw(size=(count, values))
  x /= x.std(axis=1, keepdims=True)
  if outliers:
    # Values are independent, so the places of the outliers do not matter.
    at = np.arange(0, x.size, outliers)
    largest = np.abs(x).max(axis=1)[at // values]
    x.flat[at] = 3 * largest * rng.choice([-1.0, 1.0], size=at.size)
  return x


def label(outliers: int) -> str:
  """Returns a rate of outliers as the paper writes it, 1:1000."""
  return f'1:{outliers}' if outliers else 'none'


def row(
  distribution: str,
  outliers: int,
  source: str,
  bits: Sequence[int],
  values: Sequence[float],
) -> dict[str, Any]:
  """Returns a row of a table: one value for each integer format.

  Args:
    distribution: as of `tensors`.
    outliers: as of `tensors`.
    source: `expected` or `measured`.
    bits: [K] bits of the formats.
    values: [K] numbers.
  """
  return dict(
    distribution=distribution,
    outliers=label(outliers),
    source=source,
    **{f'INT{k}': float(value) for k, value in zip(bits, values)},
  )


def columns(bits: Sequence[int], form: str) -> list[finding_lib.Column]:
  """Returns the columns of `row`.

  Args:
    bits: [K] bits of the formats.
    form: format specification of the values.
  """
  return [
    finding_lib.Column('distribution', 'distribution'),
    finding_lib.Column('outliers', 'outliers'),
    finding_lib.Column('source', ''),
    *(finding_lib.Column(f'INT{k}', f'INT{k}', form) for k in bits),
  ]
