"""Put a tensor on a format's grid, straight-through gradient (Eq. 10, 11).

The format is data, not code: five numbers that one branch-free program reads,
so a new format at every step neither recompiles nor costs more than one format
does. Values and scale are kept apart: an operation on the values of two
quantized tensors, scaled afterwards, is real low-bit arithmetic bit for bit.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.numerics import formats

# A scale must stay a normal float32, or XLA flushes it to zero: these bounds on
# the threshold keep it so for every max_value from 1 (INT2) to 2**64 (E7M0).
_MIN_THRESHOLD, _MAX_THRESHOLD = 1e-18, 1e30


class Grid(NamedTuple):
  """The grid of one format; every field an array of shape [], traced or not."""

  mantissa_bits: jax.Array  # int32
  min_exponent: jax.Array  # int32
  max_value: jax.Array  # float32
  inverse_max: jax.Array  # float32, rounded once: eager, jit and numpy agree
  scaled: jax.Array  # bool; False only for BF16


class Quantized(NamedTuple):
  """A tensor on a grid.

  Invariants: `values * scale` approximates the tensor; `values` are exact in
  bfloat16; `scale` is a normal float32, 1 where the format is not scaled.
  """

  values: jax.Array  # float32, the tensor's shape
  scale: jax.Array  # float32, the threshold's shape


def _table(menu: Sequence[formats.NumericFormat]) -> np.ndarray:
  rows = [
    (f.mantissa_bits, f.min_exponent, f.max_value, 1 / f.max_value, f.scaled)
    for f in menu
  ]
  return np.asarray(rows, np.float32)


def select(menu: Sequence[formats.NumericFormat], one_hot: jax.Array) -> Grid:
  """Returns the grid that `one_hot` [K] picks from a menu of K formats."""
  # A masked sum is exact; a matmul would round the table to bf16 on TPU.
  row = jnp.sum(jnp.where(one_hot[:, None] > 0.5, _table(menu), 0.0), axis=0)
  mantissa_bits, min_exponent, max_value, inverse_max, scaled = row
  return Grid(
    mantissa_bits.astype(jnp.int32),
    min_exponent.astype(jnp.int32),
    max_value,
    inverse_max,
    scaled > 0.5,
  )


def grid_of(numeric_format: formats.NumericFormat) -> Grid:
  """Returns the grid of a format known when the program is traced."""
  mantissa_bits, min_exponent, max_value, inverse_max, scaled = _table(
    [numeric_format]
  )[0]
  return Grid(
    np.int32(mantissa_bits),
    np.int32(min_exponent),
    max_value,
    inverse_max,
    np.bool_(scaled),
  )


def round_to_grid(x: jax.Array, grid: Grid) -> jax.Array:
  """Rounds to the nearest grid value, ties to even, saturating.

  Exact for every float32 (bfloat16 is widened first): NaN stays NaN, infinities
  saturate, -0 stays -0. With no mantissa bits a tie goes to the larger
  magnitude, as IEEE 754-2019 4.3.1 has it for one-digit precision.

  Args:
    x: [...] values in units of the grid.
    grid: the format.

  Returns:
    [...] float32 on the grid.
  """
  x = jnp.clip(x.astype(jnp.float32), -grid.max_value, grid.max_value)
  # The step is the power of two that the exponent's bits spell; exp2 and log2
  # are inexact, and adding and subtracting a constant is simplified away.
  exponent = ((lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF) - 127
  exponent = jnp.maximum(exponent, grid.min_exponent) - grid.mantissa_bits
  step = lax.bitcast_convert_type((127 + exponent) << 23, jnp.float32)
  inverse = lax.bitcast_convert_type((127 - exponent) << 23, jnp.float32)
  return lax.round(x * inverse, lax.RoundingMethod.TO_NEAREST_EVEN) * step


@jax.custom_vjp
def _straight_through(x, inverse_scale, threshold, grid):
  del threshold
  return round_to_grid(x * inverse_scale, grid)


def _straight_through_fwd(x, inverse_scale, threshold, grid):
  # Against the threshold itself: the rounding of x / scale would mask the
  # largest element, which defines an abs-max threshold, in a fifth of channels.
  inside = jnp.abs(x) <= threshold
  y = _straight_through(x, inverse_scale, threshold, grid)
  return y, (inside, inverse_scale)


def _straight_through_bwd(residuals, g):
  inside, inverse_scale = residuals
  return jnp.where(inside, g * inverse_scale, 0.0), None, None, None


_straight_through.defvjp(_straight_through_fwd, _straight_through_bwd)


def quantize(x: jax.Array, grid: Grid, threshold: jax.Array) -> Quantized:
  """Clips to +-threshold and rounds to the grid (Eq. 10, 11).

  The gradient with respect to `x` passes where |x| <= threshold, the largest
  element of an abs-max threshold included, and is zero elsewhere; threshold and
  scale get none.

  Args:
    x: [...] float32 or bfloat16.
    grid: the format; where it is not scaled, the threshold is ignored.
    threshold: broadcastable to x; the clipping threshold sigma_t.

  Returns:
    Values on the grid, float32 [...], and the scale, of the threshold's shape.
  """
  threshold = jnp.clip(
    lax.stop_gradient(threshold), _MIN_THRESHOLD, _MAX_THRESHOLD
  )
  # A product with a constant, not a quotient: XLA would turn the division into
  # a multiplication in some programs only.
  scale = jnp.where(grid.scaled, threshold * grid.inverse_max, 1.0)
  threshold = jnp.where(grid.scaled, threshold, jnp.inf)
  values = _straight_through(
    x.astype(jnp.float32), 1.0 / scale, threshold, grid
  )
  return Quantized(values, scale)


def unquantized(x: jax.Array) -> Quantized:
  """Returns a tensor that is left as it is, in `Quantized` form."""
  return Quantized(x, jnp.ones((), jnp.float32))


def rescale(
  y: jax.Array, lhs_scale: jax.Array, rhs_scale: jax.Array
) -> jax.Array:
  """Scales the result of an op on grid values: `y * lhs_scale * rhs_scale`.

  Args:
    y: [...] float32 accumulator.
    lhs_scale: [] scale of the activations.
    rhs_scale: scale of the weights, laid out to broadcast against y.

  Returns:
    [...] float32. The order, activations first, is that of AQT's serving path;
    a product of the scales would round differently.
  """
  return y * lhs_scale * rhs_scale


def fake_quant(
  x: jax.Array, numeric_format: str, threshold: jax.Array
) -> jax.Array:
  """Returns `x` [...] quantized and scaled back, float32 (Eq. 4)."""
  grid = grid_of(formats.parse(numeric_format))
  return functools.reduce(jnp.multiply, quantize(x, grid, threshold))
