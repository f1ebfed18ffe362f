"""Convolutions and dense layers in the form that is fast on the backend.

XLA's CPU kernels for depthwise and 1x1 convolutions, for maps smaller than the
kernel and for the weight gradients of all of these are up to a hundred times
slower than the same sums written as matrix products or shifted multiply-adds
(benchmarks/step_time.py, `stock` against `train`). Same mathematics, another
order of summation; sums of grid values are exact in float32, so there not even
that shows. TPU and GPU get XLA's own ops.
"""

from collections.abc import Sequence
import functools
import math

import jax
from jax import lax
import jax.numpy as jnp

# Linen's: channels last.
IMAGES = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def conv_general_dilated(
  lhs: jax.Array,
  rhs: jax.Array,
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  *,
  lhs_dilation: Sequence[int],
  rhs_dilation: Sequence[int],
  dimension_numbers: lax.ConvDimensionNumbers,
  feature_group_count: int,
  precision: lax.PrecisionLike,
) -> jax.Array:
  """`lax.conv_general_dilated` with a float32 result.

  Args:
    lhs: [N, H, W, C] for two spatial dimensions.
    rhs: [h, w, C / groups, features].
    window_strides: per spatial dimension.
    padding: `SAME`, `VALID` or (low, high) per spatial dimension.
    lhs_dilation: per spatial dimension.
    rhs_dilation: per spatial dimension.
    dimension_numbers: channels last, as linen has it.
    feature_group_count: groups.
    precision: of the products.

  Returns:
    [N, H', W', features] float32.
  """
  plain = set(lhs_dilation) | set(rhs_dilation) == {1}
  if _on_cpu() and plain and dimension_numbers == IMAGES:
    size, kernel, channels = lhs.shape[1:3], rhs.shape[:2], lhs.shape[3]
    if isinstance(padding, str):
      padding = lax.padtype_to_pads(size, kernel, window_strides, padding)
    if feature_group_count == channels == rhs.shape[3] > 1:
      how = (kernel, tuple(window_strides), tuple(map(tuple, padding)))
      return _depthwise(lhs.astype(jnp.float32), _taps(rhs), *how)
    if feature_group_count == 1 and _as_matmul(
      size, kernel, window_strides, padding
    ):
      padded = jnp.pad(lhs, ((0, 0), *padding, (0, 0)))
      patches = jnp.concatenate(
        windows(padded, kernel, window_strides), axis=-1
      )
      return _matmul(patches, rhs.reshape((-1, rhs.shape[3])), 1, precision)
  op = functools.partial(
    lax.conv_general_dilated,
    window_strides=window_strides,
    padding=padding,
    lhs_dilation=lhs_dilation,
    rhs_dilation=rhs_dilation,
    dimension_numbers=dimension_numbers,
    feature_group_count=feature_group_count,
    precision=precision,
  )
  return _with_float32_sums(op, lhs, rhs)


def dot_general(
  lhs: jax.Array,
  rhs: jax.Array,
  dimension_numbers: lax.DotDimensionNumbers,
  precision: lax.PrecisionLike,
) -> jax.Array:
  """`lax.dot_general` with a float32 result.

  Args:
    lhs: [...] activations.
    rhs: [...] weights.
    dimension_numbers: as of `lax.dot_general`.
    precision: of the products.

  Returns:
    [...] float32.
  """
  (lhs_contract, rhs_contract), (lhs_batch, _) = dimension_numbers
  summed = len(rhs_contract)
  last = tuple(range(lhs.ndim - summed, lhs.ndim))
  first = tuple(range(summed))
  dense = (tuple(lhs_contract), tuple(rhs_contract)) == (last, first)
  if _on_cpu() and dense and not lhs_batch:
    return _matmul(lhs, rhs, summed, precision)
  op = functools.partial(
    lax.dot_general, dimension_numbers=dimension_numbers, precision=precision
  )
  return _with_float32_sums(op, lhs, rhs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_float32_sums(op, lhs, rhs):
  """Returns the float32 result of an op, linear in both of its operands.

  JAX would multiply a float32 gradient with operands that it widens; the
  gradient is rounded to their type instead, as that of an op of this type is.
  """
  return op(lhs, rhs, preferred_element_type=jnp.float32)


def _with_float32_sums_fwd(op, lhs, rhs):
  return _with_float32_sums(op, lhs, rhs), (lhs, rhs)


def _with_float32_sums_bwd(op, operands, g):
  y, transpose = jax.vjp(op, *operands)
  return transpose(g.astype(y.dtype))


_with_float32_sums.defvjp(_with_float32_sums_fwd, _with_float32_sums_bwd)


def computed_once(y: jax.Array, scale: jax.Array) -> jax.Array:
  """Returns `y`; value and gradient are computed once, not at each use.

  XLA on CPU would fuse the scaling of a layer's result into every sum that
  batch norm takes of it, and the elementwise work behind the layer into every
  tap of its gradient (a third of a step of MobileNetV2; an optimization barrier
  changes nothing). It does not fuse a division more than once, because it holds
  it for expensive; so there is one, by 1.

  Args:
    y: [...] the scaled result of a layer's op.
    scale: of its weights. Positive, which XLA does not know, so that the 1 is
      no constant to it.
  """
  if not _on_cpu():
    return y
  return _computed_once(y, jnp.where(scale.reshape(-1)[0] > 0, 1.0, 2.0))


@jax.custom_vjp
def _computed_once(y, one):
  return y / one


_computed_once.defvjp(
  lambda y, one: (y / one, one), lambda one, g: (g / one, None)
)


def _on_cpu() -> bool:
  return jax.default_backend() == 'cpu'


def _as_matmul(size, kernel, strides, padding) -> bool:
  """Returns whether windows are so few that they may be written out.

  Those of a 1x1 kernel are the map itself. Else the map is smaller than the
  kernel, or the result is and the windows overlap: XLA spreads a strided
  convolution's gradient out with zeros and then takes the slow path all the
  same.
  """
  if max(kernel) == 1:
    return True
  results = [
    (n + sum(pad) - k) // s + 1
    for n, k, s, pad in zip(size, kernel, strides, padding, strict=True)
  ]
  overlap = max(strides) < max(kernel)
  return min(size) < max(kernel) or (overlap and min(results) < max(kernel))


def _matmul(lhs, rhs, summed: int, precision) -> jax.Array:
  """Sums over the last axes of `lhs` and the first `summed` ones of `rhs`.

  As a product of matrices: with more axes than two XLA would transpose the
  incoming gradient for that of the weights, element by element.
  """
  rows, columns = lhs.shape[: lhs.ndim - summed], rhs.shape[summed:]
  terms = math.prod(rhs.shape[:summed])
  y = jnp.matmul(
    lhs.reshape((math.prod(rows), terms)),
    rhs.reshape((terms, math.prod(columns))),
    precision=precision,
    preferred_element_type=jnp.float32,
  )
  return y.reshape((*rows, *columns))


def windows(padded, kernel, strides) -> list[jax.Array]:
  """Returns what each tap of the kernel sees, [N, H', W', C] each."""
  last = [
    (size - k) // s * s
    for size, k, s in zip(padded.shape[1:3], kernel, strides, strict=True)
  ]
  rows, columns = [
    [slice(i, i + end + 1, s) for i in range(k)]
    for end, k, s in zip(last, kernel, strides, strict=True)
  ]
  return [padded[:, row, column] for row in rows for column in columns]


def _taps(rhs: jax.Array) -> jax.Array:
  """Returns a depthwise kernel as float32 [taps, C]."""
  taps = rhs.astype(jnp.float32).reshape((-1, rhs.shape[3]))
  # The product with 1 is there because XLA does not fuse across it: else the
  # kernel would be quantized anew for every element of the output.
  return jnp.eye(taps.shape[0]) @ taps


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _depthwise(x, taps, kernel, strides, padding):
  padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  return _weighted(windows(padded, kernel, strides), taps)


def _weighted(windows, taps):
  return sum(w * tap[None, None, None] for w, tap in zip(windows, taps))


def _depthwise_fwd(x, taps, kernel, strides, padding):
  return _depthwise(x, taps, kernel, strides, padding), (x, taps)


def _depthwise_bwd(kernel, strides, padding, residuals, g):
  x, taps = residuals
  padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  # All taps in one pass over an image. As sums of their own each would have its
  # windows written out first, because XLA leaves a sum of a single array to a
  # library that cannot read a slice.
  products = [window * g for window in windows(padded, kernel, strides)]
  per_image = lax.reduce(
    products,
    [jnp.zeros((), g.dtype)] * len(products),
    lambda sums, terms: [a + b for a, b in zip(sums, terms, strict=True)],
    (1, 2),
  )
  # The input's gradient is again a depthwise convolution: of the gradient,
  # spread out by the strides, with the kernel turned round.
  config = [(0, 0, 0)]
  for axis in (0, 1):
    low = kernel[axis] - 1 - padding[axis][0]
    spread = (g.shape[1 + axis] - 1) * strides[axis] + 1
    high = x.shape[1 + axis] + kernel[axis] - 1 - low - spread
    config.append((low, high, strides[axis] - 1))
  spread_out = lax.pad(g, jnp.zeros((), g.dtype), (*config, (0, 0, 0)))
  turned = _weighted(windows(spread_out, kernel, (1, 1)), taps[::-1])
  return turned, jnp.stack(per_image).sum(axis=1)


_depthwise.defvjp(_depthwise_fwd, _depthwise_bwd)
