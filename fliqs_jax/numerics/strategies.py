"""Strategies: rules that find a clipping threshold in the numbers themselves.

The candidates of DQSS (arXiv 2404.08010). Its text was not to be had, so they
are defined as by the tools from which their names come: `kl` by TensorRT, MNN
and ncnn, `admm` by MNN (Leng et al., arXiv 1707.09870), `eq` by EasyQuant
(arXiv 2006.16669). Each returns thresholds, the scale times the largest value
of the grid, as ratios of the largest magnitude; so `max_abs` is 1.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from fliqs_jax.numerics import formats
from fliqs_jax.numerics import quantize

# Fewer numbers than these give a histogram of noise, so `kl` is `max_abs`.
LEAST_VALUES = 100

_BINS = 2048
# Of `kl`: what a bin costs that the candidate lacks (MNN), and the share of the
# numbers that may be clipped.
_MISSING, _CLIPPED = 1.0, 0.25
# Of `admm` (MNN): what the largest magnitude is divided by at the start.
WEIGHTS_START, ACTIVATIONS_START = 1.25, 2.5
# Of `admm`: most iterations, and the relative change at which they end.
_ITERATIONS, _SETTLED = 300, 1e-6
# Of `eq` (EasyQuant): candidates as multiples of the start, and most rounds.
_LEAST, _MOST, _CANDIDATES, _ROUNDS = 0.5, 2.0, 100, 3
# Candidates that are tried at once: XLA joins their products into one.
_AT_ONCE = 5
# Cosines this near are equal: several candidates may round all values alike.
_EQUAL = 1e-6

Product = Callable[[quantize.Quantized, quantize.Quantized], jax.Array]
OnGrid = Callable[[jax.Array], quantize.Quantized]  # From ratios.


def kl(x: jax.Array, numeric_format: formats.NumericFormat) -> jax.Array:
  """Returns the threshold at which the histogram of |x| changes least.

  Of 2,048 equal bins, zeros left out, the first i are merged into as many equal
  groups as the format has magnitudes, and each group is spread evenly over its
  bins that are not empty. The threshold is the middle of bin i for the i of the
  least Kullback-Leibler divergence to the histogram that is clipped there. Only
  those i count that keep three quarters of the numbers, in at least as many
  filled bins as there are groups. In histograms of floats the least divergence
  does; but fewer bins are merged without loss wherever they are clipped, and
  where half of the numbers are the same, such as the background of images, no
  coarse group is like them.

  Args:
    x: [...] the numbers of one scale.
    numeric_format: an integer.

  Returns:
    [] ratio of the largest magnitude; 1 if there are fewer than `LEAST_VALUES`
    numbers, or too few different ones.
  """
  if x.size < LEAST_VALUES:
    return jnp.ones(())
  groups = 2 ** (numeric_format.bits - 1)
  magnitudes = jnp.abs(x).ravel().astype(jnp.float32)
  largest = jnp.max(magnitudes)
  place = magnitudes / jnp.where(largest > 0, largest, 1.0) * _BINS
  place = jnp.minimum(place.astype(jnp.int32), _BINS - 1)
  histogram = jnp.zeros(_BINS, jnp.int32).at[place].add(magnitudes > 0)
  kept = jnp.arange(groups, _BINS)
  divergences = _divergences(histogram, kept, groups)
  filled = jnp.cumsum(histogram > 0)[kept - 1]
  inside = jnp.cumsum(histogram)[kept - 1] / jnp.sum(histogram)
  allowed = (filled >= groups) & (inside >= 1 - _CLIPPED)
  divergences = jnp.where(allowed, divergences, jnp.inf)
  best = (kept[0] + jnp.argmin(divergences) + 0.5) / _BINS
  return jnp.where(jnp.isfinite(jnp.min(divergences)), best, 1.0)


def _divergences(
  histogram: jax.Array, kept: jax.Array, groups: int
) -> jax.Array:
  """Returns the divergence for each number of bins that is kept, [M] float32.

  With the share P of a bin and Q of its candidate it is the sum of P log P/Q.
  Bins within a group have the same Q, so a group needs only their sum.

  Args:
    histogram: [_BINS] int32.
    kept: [M] numbers of bins; what lies beyond is added to the last of them.
    groups: G, the number of groups that they are merged into, a power of two.
  """
  sums = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(histogram)])
  filled = (histogram > 0).astype(jnp.int32)
  filled_sums = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(filled)])
  # [M, G + 1] the ends of groups, exact: G is a power of two.
  edges = jnp.arange(groups + 1)[None] * (kept[:, None] / groups)
  floor = jnp.floor(edges).astype(jnp.int32)
  ceiling = jnp.ceil(edges).astype(jnp.int32)
  part = edges - floor
  cut_bin = jnp.minimum(floor, _BINS - 1)

  def of_groups(sums: jax.Array, counts: jax.Array) -> jax.Array:
    # The difference of integers comes first: it is exact.
    whole = jnp.diff(sums[floor]).astype(jnp.float32)
    return whole + jnp.diff(part * counts[cut_bin])

  level = of_groups(sums, histogram) / jnp.maximum(
    of_groups(filled_sums, filled), 1e-30
  )
  within = sums[floor[:, 1:]] - sums[jnp.minimum(ceiling[:, :-1], floor[:, 1:])]
  # A group is at least as wide as a bin, which so lies in two at most.
  mixed = part[:, 1:-1] * level[:, :-1] + (1 - part[:, 1:-1]) * level[:, 1:]
  cut = jnp.where(part[:, 1:-1] > 0, histogram[cut_bin[:, 1:-1]], 0)
  log_q = jnp.sum(_times_log(within, level), axis=1) + jnp.sum(
    _times_log(cut, mixed), axis=1
  )
  total = jnp.maximum(sums[-1], 1).astype(jnp.float32)
  inside = jnp.maximum(sums[kept], 1).astype(jnp.float32)
  own = _times_log(histogram, histogram / total)
  log_p = jnp.concatenate([jnp.zeros(1), jnp.cumsum(own)])[kept]
  divergence = (log_p - log_q + sums[kept] * jnp.log(inside)) / total
  # So far without what is clipped: the last bin gets it.
  last = histogram[kept - 1]
  whole_last = part[:, -2] * (floor[:, -2] == kept - 1)
  q = jnp.where(whole_last > 0, mixed[:, -1], level[:, -1]) / inside
  p, before = (last + sums[-1] - sums[kept]) / total, last / total
  changed = _times_log(p, p / jnp.where(last > 0, q, 1.0)) - _times_log(
    before, before / jnp.where(last > 0, q, 1.0)
  )
  missing = jnp.where(p > 0, _MISSING, 0.0)
  return divergence + jnp.where(last > 0, changed, missing)


def _times_log(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns x log y, and 0 where x is 0."""
  return jnp.where(x > 0, x * jnp.log(jnp.where(x > 0, y, 1.0)), 0.0)


def admm(
  x: jax.Array,
  grid: quantize.Grid,
  axes: tuple[int, ...],
  start: float,
) -> jax.Array:
  """Returns the threshold of least squared error that two steps converge to.

  They alternate: the grid values nearest to x, and the scale that fits these
  best.

  Args:
    x: [...] the numbers.
    grid: the grid of a format.
    axes: the axes that share a scale.
    start: the first threshold is the largest magnitude over it;
      `WEIGHTS_START` or `ACTIVATIONS_START`.

  Returns:
    Ratios of the largest magnitudes, with `axes` of length 1; 1 where all
    numbers are zero.
  """
  peak = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
  unit = x / jnp.where(peak > 0, peak, 1.0)

  def fit(carry: tuple[Any, ...]) -> tuple[Any, ...]:
    count, scale, _ = carry
    q = quantize.round_to_grid(unit / scale, grid)
    fitted = jnp.sum(q * unit, axis=axes, keepdims=True) / (
      jnp.sum(q * q, axis=axes, keepdims=True) + 1e-9
    )
    fitted = jnp.where(peak > 0, fitted, scale)
    change = jnp.max(jnp.abs(fitted - scale) / scale)
    return count + 1, fitted, change

  def moves(carry: tuple[Any, ...]) -> jax.Array:
    count, _, change = carry
    return (count < _ITERATIONS) & (change > _SETTLED)

  first = jnp.full(peak.shape, 1.0 / (start * grid.max_value), jnp.float32)
  # The first change is that of no step: any number above the bound.
  _, scale, _ = lax.while_loop(moves, fit, (0, first, jnp.ones(())))
  return jnp.where(peak > 0, scale * grid.max_value, 1.0)


def eq(
  product: Product,
  x: jax.Array,
  w: jax.Array,
  on_grids: tuple[OnGrid, OnGrid],
  starts: tuple[jax.Array, jax.Array],
  has_examples: bool,
) -> tuple[jax.Array, jax.Array]:
  """Returns the ratios at which a layer's output keeps its direction best.

  In turns, the ratios of the weights and the one of the activations become the
  candidates, 100 from half to twice the start, of the largest cosine between
  the output and that of unquantized operands, in the mean over examples; until
  the cosine does not rise, at most three times.

  Args:
    product: (activations, weights) -> output, scaled; linear in each.
    x: [...] activations.
    w: [...] weights.
    on_grids: functions from ratios to the activations, and to the weights.
    starts: ratios of the activations, [], and of the weights, of the shape of
      their scales.
    has_examples: whether the first axis of x and of the output are examples;
      otherwise all is one example.

  Returns:
    Ratios of the activations and of the weights.
  """
  on_x, on_w = on_grids
  layer = _Directions(product, x, w, jnp.ones_like(starts[1]), has_examples)
  multiples = jnp.linspace(_LEAST, _MOST, _CANDIDATES)

  def turn(carry: tuple[Any, ...]) -> tuple[Any, ...]:
    count, ratio, ratios, _, before = carry
    x_q = on_x(ratio)
    of_channels = lax.map(
      lambda m: layer.of_channels(x_q, on_w(m * starts[1])),
      multiples,
      batch_size=_AT_ONCE,
    )
    new_ratios = _best(of_channels, multiples, starts[1])
    w_q = on_w(new_ratios)
    of_all = lax.map(
      lambda m: layer.of_all(on_x(m * starts[0]), w_q),
      multiples,
      batch_size=_AT_ONCE,
    )
    after = jnp.max(of_all)
    rose = after > before + _EQUAL
    return (
      count + 1,
      jnp.where(rose, _best(of_all, multiples, starts[0]), ratio),
      jnp.where(rose, new_ratios, ratios),
      rose,
      jnp.maximum(after, before),
    )

  def rises(carry: tuple[Any, ...]) -> jax.Array:
    return (carry[0] < _ROUNDS) & carry[3]

  first = (0, *starts, jnp.array(True), jnp.array(-jnp.inf))
  _, ratio, ratios, _, _ = lax.while_loop(rises, turn, first)
  return ratio, ratios


def _best(
  cosines: jax.Array, multiples: jax.Array, start: jax.Array
) -> jax.Array:
  """Returns the least of the best candidates; the start if all are equal."""
  is_best = cosines >= jnp.max(cosines, axis=0, keepdims=True) - _EQUAL
  found = start * multiples[jnp.argmax(is_best, axis=0)]
  return jnp.where(jnp.all(is_best, axis=0), start, found)


class _Directions:
  """Compares a layer's output with that of unquantized operands."""

  def __init__(
    self,
    product: Product,
    x: jax.Array,
    w: jax.Array,
    ones: jax.Array,
    has_examples: bool,
  ):
    """Computes the exact output.

    Args:
      product: (activations, weights) -> output.
      x: [...] activations.
      w: [...] weights.
      ones: ones of the shape of the scales of the weights.
      has_examples: whether the first axis of x and of the output are examples.
    """
    self._product, self._has_examples = product, has_examples

    def exact(values: jax.Array) -> tuple[jax.Array, jax.Array]:
      y, pull = self._pulled(quantize.unquantized(values), w, ones)
      return y, pull(y)

    y, self._squares = self._each(exact, x)
    self._y = y.reshape(-1, *y.shape[2:]) if has_examples else y[0]

  def of_channels(
    self, x_q: quantize.Quantized, w_q: quantize.Quantized
  ) -> jax.Array:
    """Returns the cosine of each channel, the mean over examples."""
    return _cosine(*self._sums(x_q, w_q), self._squares)

  def of_all(
    self, x_q: quantize.Quantized, w_q: quantize.Quantized
  ) -> jax.Array:
    """Returns the cosine of the whole output, the mean over examples."""
    sums = (*self._sums(x_q, w_q), self._squares)
    return _cosine(*(s.reshape(len(s), -1).sum(1) for s in sums))

  def _sums(
    self, x_q: quantize.Quantized, w_q: quantize.Quantized
  ) -> tuple[jax.Array, jax.Array]:
    """Returns <y, y'> and <y, y> [examples, *scales]; y' is exact."""

    def sums(values: jax.Array, exact: jax.Array) -> tuple[jax.Array, ...]:
      x = quantize.Quantized(values, x_q.scale)
      y, pull = self._pulled(x, w_q.values, w_q.scale)
      return pull(exact) * w_q.scale, pull(y) * w_q.scale

    return self._each(sums, x_q.values, self._y)

  def _pulled(
    self, x: quantize.Quantized, values: jax.Array, scale: jax.Array
  ) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Returns the output, and sums of it times another one by channels.

    The gradient with respect to the scale of a channel is the sum of its
    outputs, without the scale, times the cotangent: so it knows the channels of
    any product.
    """
    y, pull = jax.vjp(
      lambda scale: self._product(x, quantize.Quantized(values, scale)), scale
    )
    return y, lambda other: pull(other)[0]

  def _each(self, function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Calls a function on each example; results have an axis in front."""
    if not self._has_examples:
      return jax.tree.map(lambda s: s[None], function(*arrays))
    return jax.vmap(lambda *one: function(*(a[None] for a in one)))(*arrays)


def _cosine(dot: jax.Array, own: jax.Array, other: jax.Array) -> jax.Array:
  norm = jnp.sqrt(own * other)
  return jnp.mean(jnp.where(norm > 0, dot / norm, 0.0), axis=0)
