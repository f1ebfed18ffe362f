"""Weights and activations on their grids, as functions of values.

The formulas of every quantized product: those of `quant_layers`, whose values
are variables of a linen module, and those of any other program. `statistics`
here are {name: array} with the names of the collection `quant_stats`.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.numerics import clipping
from fliqs_jax.numerics import formats
from fliqs_jax.numerics import mixture
from fliqs_jax.numerics import one_hot as one_hot_lib
from fliqs_jax.numerics import quantize

# Decay of the running moments, our choice. Batch n has the weight
# max(1/n, 1 - decay): the first batches are averaged, so the moments need no
# debiasing.
_STATS_DECAY = 0.99

Menu = Sequence[formats.NumericFormat]
Statistics = Mapping[str, Any]


def weights(
  w: jax.Array,
  menu: Menu,
  clip: str | float,
  contracted: tuple[int, ...],
  active: jax.Array | None = None,
) -> mixture.OnGrid:
  """Returns weights as a function of their format.

  Args:
    w: [...] float32 weights; inactive ones are zero.
    menu: [K] formats.
    clip: the rule of their threshold, `QuantSpec.weight_clip`.
    contracted: axes of `w` that the product sums over; the others are channels,
      each of which has a scale.
    active: bool, broadcasts to `w`: which weights are active; None: all.
  """
  peak = jnp.max(jnp.abs(w), axis=contracted, keepdims=True)
  multiples = clipping.multiples(clip, menu)

  def on_grid(one_hot: jax.Array) -> quantize.Quantized:
    threshold = peak
    if any(math.isfinite(m) for m in multiples):
      multiple = one_hot_lib.pick(one_hot, jnp.asarray(multiples))
      where = None if active is None else jnp.broadcast_to(active, w.shape)
      std = jnp.std(w, axis=contracted, keepdims=True, where=where)
      threshold = jnp.minimum(peak, multiple * std)
    return quantize.quantize(w, quantize.select(menu, one_hot), threshold)

  return on_grid


def first_statistics(menu: Menu, clip: str | float) -> dict[str, np.ndarray]:
  """Returns the statistics of activations before the first batch.

  Args:
    menu: [K] formats of the activations.
    clip: the rule of their threshold, `QuantSpec.first_act_clip`.

  Returns:
    `mean`, `mean_square` [] float32, running moments; `count` [] int32, batches
    seen; `active` [] bool, whether activations are quantized yet; `clip` [K]
    float32, threshold of each format as a multiple of the standard deviation.
  """
  return dict(
    mean=np.zeros((), np.float32),
    mean_square=np.zeros((), np.float32),
    count=np.zeros((), np.int32),
    active=np.ones((), np.bool_),
    clip=np.asarray(clipping.multiples(clip, menu), np.float32),
  )


def observed(
  statistics: Statistics, x: jax.Array, dense: Any = 1.0
) -> dict[str, Any]:
  """Returns the statistics after a batch; `clip` and `active` do not change.

  Args:
    statistics: those before the batch.
    x: [...] float32 activations.
    dense: number of values over the number of active ones, whose mean counts.
  """
  count = statistics['count'] + 1
  weight = jnp.maximum(1.0 / count, 1.0 - _STATS_DECAY)
  seen = lax.stop_gradient(x)
  first, second = jnp.mean(seen) * dense, jnp.mean(seen * seen) * dense
  mean, mean_square = statistics['mean'], statistics['mean_square']
  return {
    **statistics,
    'mean': mean + weight * (first - mean),
    'mean_square': mean_square + weight * (second - mean_square),
    'count': count,
  }


def activations(
  x: jax.Array, menu: Menu, statistics: Statistics
) -> mixture.OnGrid:
  """Returns activations as a function of their format.

  Args:
    x: [...] float32 activations.
    menu: [K] formats.
    statistics: their statistics, this batch included.
  """
  square = statistics['mean_square']
  std = jnp.sqrt(jnp.maximum(square - statistics['mean'] ** 2, 0.0))
  # Before the first batch there is no threshold: nothing is quantized.
  on = statistics['active'] & (statistics['count'] > 0)

  def on_grid(one_hot: jax.Array) -> quantize.Quantized:
    threshold = one_hot_lib.pick(one_hot, statistics['clip']) * std
    quantized = quantize.quantize(x, quantize.select(menu, one_hot), threshold)
    return quantize.Quantized(
      jnp.where(on, quantized.values, x),
      jnp.where(on, quantized.scale, 1.0),
    )

  return on_grid
