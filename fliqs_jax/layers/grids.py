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
from fliqs_jax.numerics import explicit_axes
from fliqs_jax.numerics import float_ops
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
  ratios: jax.Array | None = None,
) -> mixture.OnGrid:
  """Returns weights as a function of their format.

  Args:
    w: [...] float32 weights; inactive ones are zero.
    menu: [K] formats.
    clip: the rule of their threshold, `QuantSpec.weight_clip`.
    contracted: axes of `w` that the product sums over; the others are channels,
      each of which has a scale.
    active: bool, broadcasts to `w`: which weights are active; None: all.
    ratios: [K, channels], by which thresholds are multiplied; 0, not found
      yet, counts as 1. None: 1.
  """
  seen = lax.stop_gradient(w)  # A threshold has no gradient.
  peak = jnp.max(jnp.abs(seen), axis=contracted, keepdims=True)
  multiples = clipping.multiples(clip, menu)

  def on_grid(one_hot: jax.Array) -> quantize.Quantized:
    if all(math.isinf(m) for m in multiples):
      grid, threshold = quantize.select(menu, one_hot), peak
    else:
      grid, multiple = quantize.select_with(
        menu, one_hot, np.asarray(multiples, np.float32)
      )
      where = None if active is None else jnp.broadcast_to(active, w.shape)
      over = dict(axis=contracted, keepdims=True, where=where)
      mean, std = jnp.mean(seen, **over), jnp.std(seen, **over)
      threshold = _threshold(multiple, mean, std, peak)
    if ratios is not None:
      threshold *= _ratio(one_hot, ratios).reshape(peak.shape)
    return quantize.quantize(w, grid, threshold)

  return on_grid


def first_statistics(menu: Menu, clip: str | float) -> dict[str, np.ndarray]:
  """Returns the statistics of activations before the first batch.

  Args:
    menu: [K] formats of the activations.
    clip: the rule of their threshold, `QuantSpec.first_act_clip`.

  Returns:
    `mean`, `variance`, `largest` [] float32, running means over batches of the
    mean, of the variance about it, and of the largest magnitude; `count` []
    int32, batches seen; `active` [] bool, whether activations are quantized
    yet; `clip` [K] float32, the multiple of each format; and, if a format has a
    strategy, `ratio` [K] float32, by which thresholds are multiplied; 0: not
    found yet, which counts as 1.
  """
  ratio = np.zeros(len(menu), np.float32)
  return dict(
    mean=np.zeros((), np.float32),
    variance=np.zeros((), np.float32),
    largest=np.zeros((), np.float32),
    count=np.zeros((), np.int32),
    active=np.ones((), np.bool_),
    clip=np.asarray(clipping.multiples(clip, menu), np.float32),
    **(dict(ratio=ratio) if formats.has_strategies(menu) else {}),
  )


def observed(
  statistics: Statistics, x: jax.Array, active: jax.Array | None = None
) -> dict[str, Any]:
  """Returns the statistics after a batch; what was set does not change.

  A batch that is empty or holds a number that is not finite, or of which the
  square is not, changes nothing.

  Args:
    statistics: those before the batch.
    x: [...] float32 activations.
    active: bool [C], which of the last axis are active; the others are zero and
      do not count. None: all.
  """
  if not x.size:
    return dict(statistics)
  before = statistics['count']
  seen = lax.stop_gradient(x)
  # Moments about the mean so far: those about zero cancel where the offset is
  # large. Before the first batch, any value of it is near its mean.
  shift = jnp.where(before > 0, statistics['mean'], explicit_axes.first(seen))

  def mean(values: jax.Array) -> jax.Array:
    if active is None:
      return jnp.mean(values)
    dense = active.size / jnp.sum(active)
    return jnp.mean(jnp.where(active, values, 0.0)) * dense

  # The first moment is not the mean of the differences: with two readers, XLA
  # would write them out.
  first, second = mean(seen) - shift, mean(jnp.square(seen - shift))
  weight = jnp.maximum(1.0 / (before + 1), np.float32(1.0 - _STATS_DECAY))
  variance, largest = statistics['variance'], statistics['largest']
  after = dict(
    mean=shift + weight * first,
    # That of the mixture of what was before and this batch.
    variance=(1.0 - weight) * variance
    + weight * jnp.maximum(second - weight * first * first, 0.0),
    largest=largest + weight * (jnp.max(jnp.abs(seen)) - largest),
    count=before + 1,
  )
  usable = jnp.isfinite(second)
  return {
    **statistics,
    **{k: jnp.where(usable, new, statistics[k]) for k, new in after.items()},
  }


def activations(
  x: jax.Array, menu: Menu, statistics: Statistics, rule: str
) -> mixture.OnGrid:
  """Returns activations as a function of their format.

  Args:
    x: [...] float32 activations.
    menu: [K] formats.
    statistics: their statistics, this batch included.
    rule: how their threshold is made of them, `QuantSpec.act_threshold`.
  """
  mean, largest = statistics['mean'], statistics['largest']
  std = jnp.sqrt(statistics['variance'])
  # Before the first batch there is no threshold: nothing is quantized.
  on = statistics['active'] & (statistics['count'] > 0)

  def on_grid(one_hot: jax.Array) -> quantize.Quantized:
    grid, multiple = quantize.select_with(menu, one_hot, statistics['clip'])
    if rule == 'magnitude':
      threshold = _threshold(multiple, mean, std, largest)
    else:
      threshold = jnp.where(jnp.isfinite(multiple), multiple * std, largest)
    if 'ratio' in statistics:
      threshold *= _ratio(one_hot, statistics['ratio'])
    # Several readers would each compute it anew from the statistics.
    threshold = float_ops.written_once(threshold)
    quantized = quantize.quantize(x, grid, threshold)
    return quantize.Quantized(
      jnp.where(on, quantized.values, x),
      jnp.where(on, quantized.scale, 1.0),
    )

  return on_grid


def _ratio(one_hot: jax.Array, ratios: jax.Array) -> jax.Array:
  """Returns the ratio of the picked format; 1 until its strategy found one."""
  return one_hot_lib.pick(one_hot, jnp.where(ratios > 0, ratios, 1.0))


def _threshold(multiple: Any, mean: Any, std: Any, largest: Any) -> jax.Array:
  """Returns |mean| + multiple x std, at most the largest magnitude.

  A grid is symmetric about zero, so it must reach as far as the values, not as
  they spread. For a mean of zero this is the paper's multiple of the standard
  deviation (A.2), without the part of the grid that no value reaches.
  """
  spread = jnp.where(jnp.isfinite(multiple), multiple * std, jnp.inf)
  return jnp.minimum(jnp.abs(mean) + spread, largest)
