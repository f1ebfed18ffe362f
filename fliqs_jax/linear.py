"""Convolutions and matrix products in the form that is fast on the backend.

XLA's CPU kernels for depthwise and 1x1 convolutions, for maps smaller than the
kernel and for the weight gradients of all of these are up to a hundred times
slower than the same sums written as matrix products or shifted multiply-adds
(benchmarks/convolution.py). Same mathematics, another order of summation; sums
of grid values are exact in float32, so there not even that shows. TPU and GPU
get XLA's own convolution.
"""

from collections.abc import Sequence

import jax
from jax import lax
import jax.numpy as jnp

# Linen's: channels last.
_IMAGES = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


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
  if _on_cpu() and plain and dimension_numbers == _IMAGES:
    size, kernel, channels = lhs.shape[1:3], rhs.shape[:2], lhs.shape[3]
    if isinstance(padding, str):
      padding = lax.padtype_to_pads(size, kernel, window_strides, padding)
    depthwise = feature_group_count == channels == rhs.shape[3] > 1
    small = max(kernel) > 1 and min(size) < max(kernel)
    if depthwise or (feature_group_count == 1 and (kernel == (1, 1) or small)):
      windows = _windows(lhs, kernel, window_strides, padding)
      if depthwise:
        return _depthwise(windows, rhs)
      patches = jnp.concatenate(windows, axis=-1)
      rows = patches.reshape((-1, patches.shape[3]))
      weights = rhs.reshape((-1, rhs.shape[3]))
      y = dot_general(rows, weights, (((1,), (0,)), ((), ())), precision)
      return y.reshape((*patches.shape[:3], -1))
  return lax.conv_general_dilated(
    lhs,
    rhs,
    window_strides,
    padding,
    lhs_dilation=lhs_dilation,
    rhs_dilation=rhs_dilation,
    dimension_numbers=dimension_numbers,
    feature_group_count=feature_group_count,
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def dot_general(
  lhs: jax.Array,
  rhs: jax.Array,
  dimension_numbers: lax.DotDimensionNumbers,
  precision: lax.PrecisionLike,
) -> jax.Array:
  """`lax.dot_general` with a float32 result."""
  y = lax.dot_general(
    lhs,
    rhs,
    dimension_numbers,
    precision=precision,
    preferred_element_type=jnp.float32,
  )
  return _unfused_gradient(y) if _on_cpu() else y


def _on_cpu() -> bool:
  return jax.default_backend() == 'cpu'


def _windows(x, kernel, strides, padding) -> list[jax.Array]:
  """Returns x as each element of the kernel sees it, [N, H', W', C] each."""
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  last = [
    (size - k) // s * s
    for size, k, s in zip(x.shape[1:3], kernel, strides, strict=True)
  ]
  return [
    x[:, i : i + last[0] + 1 : strides[0], j : j + last[1] + 1 : strides[1]]
    for i in range(kernel[0])
    for j in range(kernel[1])
  ]


def _depthwise(windows, rhs):
  taps = rhs.astype(jnp.float32).reshape((len(windows), 1, 1, 1, -1))
  return sum(window * tap for window, tap in zip(windows, taps, strict=True))


@jax.custom_vjp
def _unfused_gradient(x):
  return x


# XLA would fuse the elementwise work behind a layer into the products of its
# gradient on CPU, and compute those in a scalar loop.
_unfused_gradient.defvjp(
  lambda x: (x, None), lambda _, g: (lax.optimization_barrier(g),)
)
