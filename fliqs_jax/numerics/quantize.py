"""Quantization to a format's grid, straight-through gradient (Eq. 10, 11).

A format is data, not code: one program without branches reads four numbers. So
a new format at every step needs no compilation and costs no more than a
constant one. Values and scale are kept apart: an operation on the values of two
quantized tensors, scaled afterwards, is low-bit arithmetic bit for bit.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.numerics import float_ops
from fliqs_jax.numerics import formats
from fliqs_jax.numerics import one_hot as one_hot_lib

# The largest max_value of a format with a scale (E7M0).
_MAX_SCALED = 2.0**64
# XLA flushes a scale below the smallest normal float32, 2**-126, to zero. These
# bounds of the threshold keep `threshold / max_value` normal and finite for
# every max_value from 1 (INT2) to 2**64.
_MIN_THRESHOLD, _MAX_THRESHOLD = np.float32(1e-18), np.float32(1e30)
# The bits of a float32 that are its exponent; those of the number 1.
_EXPONENT, _ONE = 0xFF << 23, 127 << 23


class Grid(NamedTuple):
  """The grid of one format, as float32 numbers of shape []; of several, [K].

  They are traced where a one-hot leaf selects the format, and constants of
  NumPy where the format is known when the program is traced.

  Attributes:
    least: the smallest normal number, a power of two.
    steps: steps from one power of two to the next, 2**mantissa_bits.
    max_value: largest magnitude on the unscaled grid.
    inverse_max: 1 / max_value, rounded once, so that eager, compiled and NumPy
      code agree.
  """

  least: jax.Array | np.float32
  steps: jax.Array | np.float32
  max_value: jax.Array | np.float32
  inverse_max: jax.Array | np.float32

  @property
  def scaled(self) -> jax.Array | np.bool_:
    """Whether a scale maps values to the grid; False only for BF16."""
    return self.max_value <= _MAX_SCALED


class Quantized(NamedTuple):
  """A tensor on a grid.

  Invariants: `values * scale` approximates the tensor; `values` are exact in
  bfloat16; `scale` is a normal float32, 1 where the format is not scaled.

  Attributes:
    values: [...] of the tensor's shape, float32 or the layer's dtype.
    scale: float32, of the threshold's shape.
  """

  values: jax.Array
  scale: jax.Array


def _table(menu: Sequence[formats.NumericFormat]) -> np.ndarray:
  rows = [
    (2.0**f.min_exponent, 2.0**f.mantissa_bits, f.max_value, 1 / f.max_value)
    for f in menu
  ]
  return np.asarray(rows, np.float32)


def select(menu: Sequence[formats.NumericFormat], one_hot: jax.Array) -> Grid:
  """Returns the grid that a one-hot vector picks from a menu.

  Args:
    menu: [K] formats.
    one_hot: [K] entries in [0, 1]. If none is above 0.5, the largest value of
      the grid is NaN, and so is everything that is rounded to it.
  """
  return _picked(_table(menu), one_hot)[0]


def select_with(
  menu: Sequence[formats.NumericFormat],
  one_hot: jax.Array,
  numbers: jax.Array | np.ndarray,
) -> tuple[Grid, jax.Array]:
  """Returns the grid that a one-hot vector picks, and the number beside it.

  Args:
    menu: [K] formats.
    one_hot: [K], as of `select`.
    numbers: [K] float32, positive, infinity included.
  """
  table = jnp.concatenate([_table(menu), numbers[:, None]], axis=1)
  grid, (number,) = _picked(table, one_hot)
  return grid, number


def _picked(
  table: jax.Array | np.ndarray, one_hot: jax.Array
) -> tuple[Grid, list[jax.Array]]:
  # A masked sum, as in `one_hot.pick`, of all columns at once.
  row = jnp.sum(jnp.where(one_hot[:, None] > 0.5, table, 0.0), axis=0)
  least, steps, max_value, inverse_max, *others = row
  grid = Grid(least, steps, one_hot_lib.or_nan(max_value), inverse_max)
  return grid, others


def grids_of(menu: Sequence[formats.NumericFormat]) -> Grid:
  """Returns the grids [K] of K formats known when the program is traced."""
  return Grid(*_table(menu).T)


def grid_of(numeric_format: formats.NumericFormat) -> Grid:
  """Returns the grid of a format known when the program is traced."""
  return jax.tree.map(lambda numbers: numbers[0], grids_of([numeric_format]))


def round_to_grid(x: jax.Array, grid: Grid) -> jax.Array:
  """Rounds to the nearest grid value, ties to even, and saturates.

  The result is exact for every float32 (bfloat16 is widened first): NaN stays
  NaN, infinities saturate, -0 stays -0. Without mantissa bits a tie goes to the
  larger magnitude, as IEEE 754-2019 4.3.1 says for a precision of one digit.

  Args:
    x: [...] values in units of the grid.
    grid: the grid of one format.

  Returns:
    [...] float32, values of the grid.
  """
  x = lax.clamp(-grid.max_value, x.astype(jnp.float32), grid.max_value)
  # The step between grid values is a power of two, made from the bits of the
  # exponent: exp2 and log2 are inexact, and XLA simplifies the usual trick of
  # adding and subtracting a large constant.
  power = jnp.maximum(_bits(x) & _EXPONENT, _bits(grid.least))
  step = power - (_bits(grid.steps) - _ONE)
  inverse = 2 * _ONE - step
  return lax.round(
    x * _float(inverse), lax.RoundingMethod.TO_NEAREST_EVEN
  ) * _float(step)


def _bits(x: jax.Array | np.float32) -> jax.Array | np.int32:
  return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(bits, jnp.float32)


@jax.custom_vjp
def _straight_through(
  x: jax.Array, inverse_scale: jax.Array, threshold: jax.Array, grid: Grid
) -> jax.Array:
  del threshold
  return round_to_grid(x * inverse_scale, grid)


def _straight_through_fwd(
  x: jax.Array, inverse_scale: jax.Array, threshold: jax.Array, grid: Grid
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  # The comparison is with the threshold itself. One of x / scale with max_value
  # would, by rounding, mask the element that defines an abs-max threshold in a
  # fifth of all channels. It takes no magnitude: XLA would write out one that
  # others read, too.
  inside = (-threshold <= x) & (x <= threshold)
  return round_to_grid(x * inverse_scale, grid), (inside, inverse_scale)


def _straight_through_bwd(
  residuals: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, None, None, None]:
  inside, inverse_scale = residuals
  return jnp.where(inside, g * inverse_scale, 0.0), None, None, None


_straight_through.defvjp(_straight_through_fwd, _straight_through_bwd)


def _bounded(threshold: jax.Array) -> jax.Array:
  return lax.clamp(_MIN_THRESHOLD, lax.stop_gradient(threshold), _MAX_THRESHOLD)


def _scale(bounded: jax.Array, grid: Grid) -> jax.Array:
  # The scale is a product with a constant, not a quotient: XLA turns a division
  # into a multiplication in some programs and not in others.
  return jnp.where(grid.scaled, bounded * grid.inverse_max, 1.0)


def scale_of(threshold: jax.Array, grid: Grid) -> jax.Array:
  """Returns the scale of a threshold, float32 of its shape, without gradient.

  Args:
    threshold: the clipping threshold sigma_t.
    grid: the grid of one format; if it is not scaled, the scale is 1.
  """
  return _scale(_bounded(threshold), grid)


def quantize(x: jax.Array, grid: Grid, threshold: jax.Array) -> Quantized:
  """Clips to +-threshold and rounds to the grid (Eq. 10, 11).

  The gradient with respect to `x` passes where |x| <= threshold, the largest
  element of an abs-max threshold included, and is zero elsewhere; threshold and
  scale get none.

  Args:
    x: [...] float32 or bfloat16.
    grid: the grid of one format; if it is not scaled, the threshold is ignored.
    threshold: the clipping threshold sigma_t, in the units of `x`, of a shape
      that broadcasts to that of `x`.

  Returns:
    The values on the grid, float32 [...], and the scale, float32 of the
    threshold's shape.
  """
  threshold = _bounded(threshold)
  # Several readers would each compute it anew.
  scale = float_ops.written_once(_scale(threshold, grid))
  threshold = jnp.where(grid.scaled, threshold, jnp.inf)
  values = _straight_through(
    x.astype(jnp.float32), 1.0 / scale, threshold, grid
  )
  return Quantized(values, scale)


def unquantized(x: jax.Array) -> Quantized:
  """Returns x [...] unchanged, with a scale of 1."""
  return Quantized(x, jnp.ones((), jnp.float32))


def rescale(
  y: jax.Array, lhs_scale: jax.Array, rhs_scale: jax.Array
) -> jax.Array:
  """Scales the result of an op on grid values: `y * lhs_scale * rhs_scale`.

  Args:
    y: [...] float32 sums of the op.
    lhs_scale: [] the scale of the activations.
    rhs_scale: the scale of the weights, of a shape that broadcasts to that of
      `y`.

  Returns:
    [...] float32. The scale of the activations comes first, as in AQT's serving
    path; a product of the two scales would round differently.
  """
  return y * lhs_scale * rhs_scale


def fake_quant(
  x: jax.Array, numeric_format: str, threshold: jax.Array
) -> jax.Array:
  """Returns `x` [...] quantized and scaled back, float32 (Eq. 4)."""
  grid = grid_of(formats.parse(numeric_format))
  return functools.reduce(jnp.multiply, quantize(x, grid, threshold))
