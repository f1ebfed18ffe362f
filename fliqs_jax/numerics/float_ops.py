"""Convolutions and dense layers in the form that is fast on the backend.

XLA's CPU kernels for depthwise and 1x1 convolutions, for maps smaller than the
kernel and for the weight gradients of all of these are up to a hundred times
slower than the same sums written as matrix products or shifted multiply-adds
(benchmarks/step_time.py, `stock` against `train`). Same mathematics, another
order of summation; sums of grid values are exact in float32, so their results
do not change at all. TPU and GPU get XLA's own ops.
"""

from collections.abc import Callable, Sequence
import functools
import math
import operator

import jax
from jax import lax
import jax.numpy as jnp

from fliqs_jax.numerics import explicit_axes

# The axes of images, kernels and results in linen's layers: channels last.
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
    window_strides: one stride per spatial dimension.
    padding: `SAME`, `VALID` or (low, high) per spatial dimension.
    lhs_dilation: one dilation of the input per spatial dimension.
    rhs_dilation: one dilation of the kernel per spatial dimension.
    dimension_numbers: the order of axes; the fast forms need `IMAGES`.
    feature_group_count: the number of groups of channels.
    precision: the precision of the products, as in `lax`.

  Returns:
    [N, H', W', features] float32.
  """
  plain = set(lhs_dilation) | set(rhs_dilation) == {1}
  if _has_fast_forms(lhs, rhs) and plain and dimension_numbers == IMAGES:
    size, kernel, channels = lhs.shape[1:3], rhs.shape[:2], lhs.shape[3]
    pads = padding_pairs(size, kernel, window_strides, padding)
    if feature_group_count == channels == rhs.shape[3] > 1:
      strides = tuple(window_strides)
      images = lhs.astype(jnp.float32)
      return _depthwise(images, _taps(rhs), kernel, strides, pads)
    if feature_group_count == 1 and _as_matmul(
      size, kernel, window_strides, pads
    ):
      padded = pad_images(lhs, pads)
      if max(kernel) > 1:
        # Otherwise each tap of the kernel would compute the images anew.
        padded = written_once(padded)
      taps = windows(padded, kernel, window_strides)
      patches = jnp.concatenate(taps, axis=-1)
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
  out_sharding: jax.sharding.Sharding | None = None,
) -> jax.Array:
  """`lax.dot_general` with a float32 result.

  Args:
    lhs: [...] activations.
    rhs: [...] weights.
    dimension_numbers: the contracted and the batch axes, as in `lax`.
    precision: the precision of the products, as in `lax`.
    out_sharding: the sharding of the result on a mesh of explicit axes.

  Returns:
    [...] float32.
  """
  (lhs_contract, rhs_contract), (lhs_batch, _) = dimension_numbers
  summed = len(rhs_contract)
  last = tuple(range(lhs.ndim - summed, lhs.ndim))
  first = tuple(range(summed))
  dense = (tuple(lhs_contract), tuple(rhs_contract)) == (last, first)
  if _has_fast_forms(lhs, rhs) and dense and not lhs_batch:
    return _matmul(lhs, rhs, summed, precision)
  op = functools.partial(
    lax.dot_general,
    dimension_numbers=dimension_numbers,
    precision=precision,
    out_sharding=out_sharding,
  )
  return _with_float32_sums(op, lhs, rhs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_float32_sums(
  op: Callable[..., jax.Array], lhs: jax.Array, rhs: jax.Array
) -> jax.Array:
  """Returns the float32 result of an op that is linear in both operands.

  JAX would widen the operands and multiply them by a float32 gradient. Here
  the gradient is rounded to the operands' type instead, as it is for an op
  whose result has that type.
  """
  return op(lhs, rhs, preferred_element_type=jnp.float32)


def _with_float32_sums_fwd(
  op: Callable[..., jax.Array], lhs: jax.Array, rhs: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _with_float32_sums(op, lhs, rhs), (lhs, rhs)


def _with_float32_sums_bwd(
  op: Callable[..., jax.Array],
  operands: tuple[jax.Array, jax.Array],
  g: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  y, transpose = jax.vjp(op, *operands)
  return transpose(g.astype(y.dtype))


_with_float32_sums.defvjp(_with_float32_sums_fwd, _with_float32_sums_bwd)


def computed_once(y: jax.Array, scale: jax.Array) -> jax.Array:
  """Returns `y`; value and gradient are computed once, not at each use.

  XLA on CPU would fuse the scaling of a layer's result into every sum that
  batch norm takes of it, and the elementwise work behind the layer into every
  tap of its gradient (a third of a step of MobileNetV2; an optimization barrier
  changes nothing). XLA considers a division expensive and does not fuse it into
  several users; so `y` is divided by 1.

  Args:
    y: [...] the scaled result of a layer's op.
    scale: [...] the scale of the layer's weights. It is positive, but XLA does
      not know that, so it cannot see that the divisor is always 1.
  """
  if not _on_cpu():
    return y
  return _computed_once(y, jnp.where(explicit_axes.first(scale) > 0, 1.0, 2.0))


@jax.custom_vjp
def _computed_once(y: jax.Array, one: jax.Array) -> jax.Array:
  return y / one


def _computed_once_fwd(
  y: jax.Array, one: jax.Array
) -> tuple[jax.Array, jax.Array]:
  return y / one, one


def _computed_once_bwd(one: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
  return g / one, None


_computed_once.defvjp(_computed_once_fwd, _computed_once_bwd)


def written_once(y: jax.Array) -> jax.Array:
  """Returns `y` [...], floats that several readers read, computed once.

  XLA on CPU would fuse what is before `y` into each of its readers: a block of
  a residual network would compute those before it anew. Its rule for divisions
  is that of `computed_once`, but it turns a divisor that is one number into a
  factor, so here each element has its own: 1, and 2 if it is NaN.
  """
  return y / jnp.where(jnp.isnan(y), 2.0, 1.0) if _on_cpu() else y


def _has_fast_forms(lhs: jax.Array, rhs: jax.Array) -> bool:
  """Returns whether operands may be reshaped and cut for the CPU."""
  return _on_cpu() and not any(map(explicit_axes.is_split, (lhs, rhs)))


def _on_cpu() -> bool:
  return jax.default_backend() == 'cpu'


def padding_pairs(
  size: Sequence[int],
  kernel: Sequence[int],
  strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
) -> tuple[tuple[int, int], ...]:
  """Returns the padding as (low, high) per spatial dimension.

  Args:
    size: height and width of the input, in pixels.
    kernel: height and width of the kernel, in pixels.
    strides: one stride per spatial dimension.
    padding: `SAME`, `VALID` or the pairs themselves.
  """
  if isinstance(padding, str):
    pairs = lax.padtype_to_pads(size, kernel, strides, padding)
  else:
    pairs = padding
  return tuple((low, high) for low, high in pairs)


def _as_matmul(
  size: Sequence[int],
  kernel: Sequence[int],
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
) -> bool:
  """Returns whether a convolution is faster as a product with all windows.

  It is for a 1x1 kernel, whose windows are the map itself; for a map smaller
  than the kernel; and for a result smaller than the kernel if the windows
  overlap: XLA spreads the gradient of a strided convolution out with zeros and
  then takes its slow path, too.
  """
  if max(kernel) == 1:
    return True
  results = [
    (n + sum(pad) - k) // s + 1
    for n, k, s, pad in zip(size, kernel, strides, padding, strict=True)
  ]
  overlap = max(strides) < max(kernel)
  return min(size) < max(kernel) or (overlap and min(results) < max(kernel))


def _matmul(
  lhs: jax.Array, rhs: jax.Array, summed: int, precision: lax.PrecisionLike
) -> jax.Array:
  """Sums over the last `summed` axes of `lhs` and the first ones of `rhs`.

  Both are flattened to matrices: with more than two axes XLA would transpose
  the incoming gradient element by element to get the gradient of the weights.
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


def pad_images(
  images: jax.Array, padding: Sequence[tuple[int, int]]
) -> jax.Array:
  """Returns images [N, H, W, C] with zeros around them.

  Args:
    images: [N, H, W, C].
    padding: (low, high) of height and width, in pixels; a negative one cuts
      pixels off.
  """
  zero = jnp.zeros((), images.dtype)
  none = (0, 0, 0)
  inside = [(low, high, 0) for low, high in padding]
  return lax.pad(images, zero, (none, *inside, none))


def windows(
  padded: jax.Array, kernel: Sequence[int], strides: Sequence[int]
) -> list[jax.Array]:
  """Returns what each tap of the kernel multiplies, [N, H', W', C] each.

  Args:
    padded: [N, H, W, C] the input with its padding.
    kernel: height and width of the kernel, in pixels.
    strides: one stride per spatial dimension.

  Returns:
    height x width arrays, row by row.
  """
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
  # XLA does not fuse across the product with the identity. Without it the
  # kernel would be quantized again for every element of the output.
  return jnp.eye(taps.shape[0]) @ taps


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _depthwise(
  x: jax.Array,
  taps: jax.Array,
  kernel: tuple[int, ...],
  strides: tuple[int, ...],
  padding: tuple[tuple[int, int], ...],
) -> jax.Array:
  return _weighted(windows(pad_images(x, padding), kernel, strides), taps)


def _weighted(windows: Sequence[jax.Array], taps: jax.Array) -> jax.Array:
  """Returns the sum of windows [N, H', W', C], each times its tap [C]."""
  terms = (w * tap[None, None, None] for w, tap in zip(windows, taps))
  return functools.reduce(operator.add, terms)


def _depthwise_fwd(
  x: jax.Array,
  taps: jax.Array,
  kernel: tuple[int, ...],
  strides: tuple[int, ...],
  padding: tuple[tuple[int, int], ...],
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _depthwise(x, taps, kernel, strides, padding), (x, taps)


def _depthwise_bwd(
  kernel: tuple[int, ...],
  strides: tuple[int, ...],
  padding: tuple[tuple[int, int], ...],
  residuals: tuple[jax.Array, jax.Array],
  g: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  x, taps = residuals
  # One reduction sums all taps in one pass over an image. XLA gives a sum of a
  # single array to a library that cannot read slices, so that separate sums
  # would first write out the windows of each tap.
  shifted = windows(pad_images(x, padding), kernel, strides)
  products = [window * g for window in shifted]
  per_image = lax.reduce(
    products,
    [jnp.zeros((), g.dtype)] * len(products),
    _add_each,
    (1, 2),
  )
  # The input's gradient is a depthwise convolution, too: the result's gradient,
  # spread out by the strides, with the kernel rotated by half a turn.
  config = [(0, 0, 0)]
  for axis in (0, 1):
    low = kernel[axis] - 1 - padding[axis][0]
    spread = (g.shape[1 + axis] - 1) * strides[axis] + 1
    high = x.shape[1 + axis] + kernel[axis] - 1 - low - spread
    config.append((low, high, strides[axis] - 1))
  spread_out = lax.pad(g, jnp.zeros((), g.dtype), (*config, (0, 0, 0)))
  turned = _weighted(windows(spread_out, kernel, (1, 1)), taps[::-1])
  return turned, jnp.stack(per_image).sum(axis=1)


def _add_each(
  sums: Sequence[jax.Array], terms: Sequence[jax.Array]
) -> list[jax.Array]:
  return [a + b for a, b in zip(sums, terms, strict=True)]


_depthwise.defvjp(_depthwise_fwd, _depthwise_bwd)
