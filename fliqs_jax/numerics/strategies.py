"""Strategies: rules that find a clipping threshold in the numbers themselves.

The candidates of DQSS (arXiv 2404.08010). Its text was not to be had, so they
are defined as by the tools from which their names come: `kl` by TensorRT, MNN
and ncnn, `admm` by MNN (Leng et al., arXiv 1707.09870), `eq` by EasyQuant
(arXiv 2006.16669). Each returns thresholds, the scale times the largest value
of the grid, as ratios of the largest magnitude; so `max_abs` is 1.
"""

from collections.abc import Callable

import jax
from jax import lax
import jax.numpy as jnp

from fliqs_jax.numerics import formats
from fliqs_jax.numerics import quantize

# Fewer numbers than these give a histogram of noise, so `kl` is `max_abs`.
LEAST_VALUES = 100

_BINS = 2048
# Of `kl`: what a bin costs that the candidate lacks (MNN).
_MISSING = 1.0
# Of `admm` (MNN): what the largest magnitude is divided by at the start.
WEIGHTS_START, ACTIVATIONS_START = 1.25, 2.5
# Of `admm`: most iterations, and the relative change at which they end.
_ITERATIONS, _SETTLED = 300, 1e-6
# Of `eq` (EasyQuant): candidates as multiples of the start, and most rounds.
_LEAST, _MOST, _CANDIDATES, _ROUNDS = 0.5, 2.0, 100, 3
# Cosines this near are equal: several candidates may round all values alike.
_EQUAL = 1e-6

Product = Callable[[quantize.Quantized, quantize.Quantized], jax.Array]
OnGrid = Callable[[jax.Array], quantize.Quantized]  # From ratios.
_Three = tuple[jax.Array, jax.Array, jax.Array]


def kl(x: jax.Array, numeric_format: formats.NumericFormat) -> jax.Array:
  """Returns the threshold at which the histogram of |x| changes least.

  Of 2,048 equal bins, zeros left out, the first i are merged into as many equal
  groups as the format has magnitudes, and each group is spread evenly over its
  bins that are not empty. The threshold is the middle of bin i for the i of the
  least Kullback-Leibler divergence to the histogram that is clipped there. Only
  those i count whose bins hold numbers in at least as many bins as there are
  groups: fewer are merged without loss wherever they are clipped, and layers
  before may have left only a few different numbers.

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
  divergences = lax.map(
    lambda bins: _divergence(histogram, bins, groups), kept, batch_size=64
  )
  filled = jnp.cumsum(histogram > 0)[kept - 1]
  divergences = jnp.where(filled >= groups, divergences, jnp.inf)
  best = (kept[jnp.argmin(divergences)] + 0.5) / _BINS
  return jnp.where(jnp.isfinite(jnp.min(divergences)), best, 1.0)


def _divergence(
  histogram: jax.Array, bins: jax.Array, groups: int
) -> jax.Array:
  """Returns the divergence of a histogram whose first bins are merged.

  Args:
    histogram: [_BINS] int32.
    bins: [] int32, how many are kept; the others are clipped.
    groups: how many groups they are merged into, a power of two.
  """
  index = jnp.arange(_BINS)
  is_kept = index < bins
  inside = jnp.where(is_kept, histogram, 0)
  clipped = jnp.sum(histogram) - jnp.sum(inside)
  reference = inside + jnp.where(index == bins - 1, clipped, 0)
  # Exact: the number of groups is a power of two.
  edges = jnp.arange(groups + 1) * (bins / groups)
  per_bin = _between(inside, edges) / jnp.maximum(
    _between(jnp.sign(inside), edges), 1e-30
  )
  # A group is at least as wide as a bin, which so lies in two groups at most.
  first = jnp.minimum(index * groups // bins, groups - 1)
  second = jnp.minimum(first + 1, groups - 1)
  share = jnp.clip(edges[first + 1] - index, 0.0, 1.0)
  merged = share * per_bin[first] + (1.0 - share) * per_bin[second]
  merged = jnp.where(inside > 0, merged, 0.0)
  p = reference / jnp.maximum(jnp.sum(histogram), 1)
  q = merged / jnp.maximum(jnp.sum(inside), 1)
  term = jnp.where(q > 0, p * jnp.log(p / jnp.where(q > 0, q, 1.0)), _MISSING)
  return jnp.sum(jnp.where(p > 0, term, 0.0))


def _between(counts: jax.Array, edges: jax.Array) -> jax.Array:
  """Returns the counts [N] between edges [M + 1] that may cut bins, [M]."""
  whole = jnp.floor(edges).astype(jnp.int32)
  sums = jnp.concatenate([jnp.zeros(1, counts.dtype), jnp.cumsum(counts)])
  cut = (edges - whole) * counts[jnp.minimum(whole, _BINS - 1)]
  # The difference of integers comes first: it is exact.
  return jnp.diff(sums[whole]).astype(jnp.float32) + jnp.diff(cut)


def admm(
  x: jax.Array,
  numeric_format: formats.NumericFormat,
  axes: tuple[int, ...],
  start: float,
) -> jax.Array:
  """Returns the threshold of least squared error that two steps converge to.

  They alternate: the grid values nearest to x, and the scale that fits these
  best.

  Args:
    x: [...] the numbers.
    numeric_format: format of the grid.
    axes: the axes that share a scale.
    start: the first threshold is the largest magnitude over it;
      `WEIGHTS_START` or `ACTIVATIONS_START`.

  Returns:
    Ratios of the largest magnitudes, with `axes` of length 1; 1 where all
    numbers are zero.
  """
  grid = quantize.grid_of(numeric_format)
  peak = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
  unit = x / jnp.where(peak > 0, peak, 1.0)

  def fit(carry: tuple) -> tuple:
    count, scale, _ = carry
    q = quantize.round_to_grid(unit / scale, grid)
    fitted = jnp.sum(q * unit, axis=axes, keepdims=True) / (
      jnp.sum(q * q, axis=axes, keepdims=True) + 1e-9
    )
    fitted = jnp.where(peak > 0, fitted, scale)
    change = jnp.max(jnp.abs(fitted - scale) / scale)
    return count + 1, fitted, change

  def moves(carry: tuple) -> jax.Array:
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
  exact = quantize.Quantized(w, jnp.ones_like(starts[1]))
  multiples = jnp.linspace(_LEAST, _MOST, _CANDIDATES)

  def sums(x_q: quantize.Quantized, w_q: quantize.Quantized) -> _Three:
    """Returns <y, y'>, <y, y> and <y', y'> [examples, *scales]; y' is exact."""

    def one(values: jax.Array, exact_values: jax.Array) -> _Three:
      # The gradient with respect to the scale of a channel is the sum of its
      # outputs times the cotangent: it knows the channels of any product.
      def outputs(scale: jax.Array) -> jax.Array:
        return product(
          quantize.Quantized(values, x_q.scale),
          quantize.Quantized(w_q.values, scale),
        )

      def exact_outputs(scale: jax.Array) -> jax.Array:
        return product(
          quantize.unquantized(exact_values), exact._replace(scale=scale)
        )

      y, pull = jax.vjp(outputs, w_q.scale)
      y_exact, pull_exact = jax.vjp(exact_outputs, exact.scale)
      return (
        pull(y_exact)[0] * w_q.scale,
        pull(y)[0] * w_q.scale,
        pull_exact(y_exact)[0],
      )

    if not has_examples:
      return tuple(s[None] for s in one(x_q.values, x))
    return jax.vmap(lambda v, e: one(v[None], e[None]))(x_q.values, x)

  def cosine(dot: jax.Array, own: jax.Array, other: jax.Array) -> jax.Array:
    norm = jnp.sqrt(own * other)
    return jnp.mean(jnp.where(norm > 0, dot / norm, 0.0), axis=0)

  def of_channels(ratios: jax.Array, x_q: quantize.Quantized) -> jax.Array:
    return cosine(*sums(x_q, on_w(ratios)))

  def of_all(ratio: jax.Array, w_q: quantize.Quantized) -> jax.Array:
    totals = (s.reshape(len(s), -1).sum(1) for s in sums(on_x(ratio), w_q))
    return cosine(*totals)

  def best(cosines: jax.Array, start: jax.Array) -> jax.Array:
    """Returns the least of the best candidates; the start if all are equal."""
    is_best = cosines >= jnp.max(cosines, axis=0, keepdims=True) - _EQUAL
    found = start * multiples[jnp.argmax(is_best, axis=0)]
    return jnp.where(jnp.all(is_best, axis=0), start, found)

  def turn(carry: tuple) -> tuple:
    count, ratio, ratios, _, before = carry
    x_q = on_x(ratio)
    new_ratios = best(
      lax.map(lambda m: of_channels(m * starts[1], x_q), multiples), starts[1]
    )
    w_q = on_w(new_ratios)
    cosines = lax.map(lambda m: of_all(m * starts[0], w_q), multiples)
    after = jnp.max(cosines)
    rose = after > before + _EQUAL
    return (
      count + 1,
      jnp.where(rose, best(cosines, starts[0]), ratio),
      jnp.where(rose, new_ratios, ratios),
      rose,
      jnp.maximum(after, before),
    )

  def rises(carry: tuple) -> jax.Array:
    return (carry[0] < _ROUNDS) & carry[3]

  first = (0, *starts, jnp.array(True), jnp.array(-jnp.inf))
  _, ratio, ratios, _, _ = lax.while_loop(rises, turn, first)
  return ratio, ratios
