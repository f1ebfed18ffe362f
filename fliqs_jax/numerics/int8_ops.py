"""Products of int8 tensors with int32 accumulators, in the form that is fast.

Every form gives the same integers: sums wrap around at 2**31, so their order
does not matter. Measured with jaxlib 0.10.2 on a CPU with VNNI but without AMX,
XLA's product of int8 and int8 is 1.5 times as fast as that of float32, and the
product of uint8 and int8 3 to 4 times, because VNNI multiplies these types.
XLA's convolutions take int8 only, and with up to 16 channels they use a kernel
that is 5 times slower than float32. So a convolution is written as a matrix
product, and on a CPU with VNNI the activations are shifted by 128 to become
unsigned. TPU gets XLA's own convolution.
"""

from collections.abc import Iterable, Sequence
import functools
import math
import operator
import pathlib
from typing import Any

import jax
from jax import lax
from jax.extend import core as extend_core
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import batching
from jax.interpreters import mlir
import jax.numpy as jnp

from fliqs_jax.numerics import float_ops

_SHIFT = 128  # Added to an int8 to make it a uint8.
_Pads = tuple[tuple[int, int], ...]  # (low, high) per spatial dimension.


@functools.cache
def prefers_unsigned() -> bool:
  """Returns whether this process's CPU multiplies uint8 by int8 (VNNI)."""
  try:
    information = pathlib.Path('/proc/cpuinfo').read_text('utf-8')
  except OSError:
    return False
  return jax.default_backend() == 'cpu' and 'vnni' in information


def offset(w: jax.Array, contracted: Sequence[int]) -> jax.Array:
  """Returns what the shift of the activations adds to each sum.

  Args:
    w: [...] int8 weights.
    contracted: the axes of `w` that the op sums over.

  Returns:
    int32 array of the rank of `w`, with size 1 along `contracted`.
  """
  return _SHIFT * jnp.sum(
    w.astype(jnp.int32), axis=tuple(contracted), keepdims=True
  )


def dot_general(
  lhs: jax.Array,
  rhs: jax.Array,
  dimension_numbers: lax.DotDimensionNumbers,
  shift: jax.Array | None = None,
) -> jax.Array:
  """`lax.dot_general` of int8 with an int32 result.

  Args:
    lhs: [...] int8 activations.
    rhs: [...] int8 weights.
    dimension_numbers: the contracted and the batch axes, as in `lax`.
    shift: the `offset` of the weights for the unsigned form; None for the
      signed form.

  Returns:
    [...] int32, with the axes of `lax.dot_general`.
  """
  (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
  if shift is None or lhs_batch:
    return lax.dot_general(
      lhs, rhs, dimension_numbers, preferred_element_type=jnp.int32
    )
  lhs_free = [i for i in range(lhs.ndim) if i not in lhs_contract]
  rhs_free = [i for i in range(rhs.ndim) if i not in rhs_contract]
  summed = math.prod(rhs.shape[i] for i in rhs_contract)
  rows = lhs.transpose((*lhs_free, *lhs_contract)).reshape((-1, summed))
  columns = rhs.transpose((*rhs_contract, *rhs_free)).reshape((summed, -1))
  y = _matmul(_unsigned(rows), columns) - shift.reshape((1, -1))
  return y.reshape(
    [lhs.shape[i] for i in lhs_free] + [rhs.shape[i] for i in rhs_free]
  )


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
  shift: jax.Array | None = None,
) -> jax.Array:
  """`float_ops.conv_general_dilated` of int8 with an int32 result.

  Args:
    lhs: int8 [N, H, W, C] for two spatial dimensions.
    rhs: int8 [h, w, C / groups, features].
    window_strides: one stride per spatial dimension.
    padding: `SAME`, `VALID` or (low, high) per spatial dimension.
    lhs_dilation: one dilation of the input per spatial dimension.
    rhs_dilation: one dilation of the kernel per spatial dimension.
    dimension_numbers: the order of axes; only `float_ops.IMAGES` is fast.
    feature_group_count: the number of groups of channels.
    shift: the `offset` of the weights for the unsigned form; None for the
      signed form.

  Returns:
    int32 [N, H', W', features].
  """
  xla = functools.partial(
    lax.conv_general_dilated,
    window_strides=window_strides,
    padding=padding,
    lhs_dilation=lhs_dilation,
    rhs_dilation=rhs_dilation,
    dimension_numbers=dimension_numbers,
    feature_group_count=feature_group_count,
    preferred_element_type=jnp.int32,
  )
  size, kernel, channels = lhs.shape[1:3], rhs.shape[:2], lhs.shape[-1]
  plain = set(lhs_dilation) | set(rhs_dilation) == {1}
  depthwise = feature_group_count == channels == rhs.shape[-1] > 1
  if dimension_numbers != float_ops.IMAGES or not plain:
    return xla(lhs, rhs)
  if feature_group_count > 1 and not depthwise:
    return xla(lhs, rhs)
  strides = tuple(window_strides)
  pads = float_ops.padding_pairs(size, kernel, strides, padding)
  if depthwise:
    ours = functools.partial(_depthwise, strides=strides, padding=pads)
  else:
    ours = functools.partial(
      _windows_times_kernel, strides=strides, padding=pads, shift=shift
    )
  if shift is not None:  # Only a CPU has the unsigned form.
    return ours(lhs, rhs)
  # CUDA has no integer convolution.
  return lax.platform_dependent(lhs, rhs, tpu=xla, default=ours)


def _windows_times_kernel(
  x: jax.Array,
  w: jax.Array,
  *,
  strides: tuple[int, ...],
  padding: _Pads,
  shift: jax.Array | None,
) -> jax.Array:
  """Returns the sums of a convolution, int32 [N, H', W', features]."""
  features = w.shape[3]
  if shift is None:
    padded = _padded(x, padding, 0, w)
  else:
    padded = _padded(_unsigned(x), padding, _SHIFT, w)
  # Copying the windows takes longer than multiplying them. Without strides only
  # the windows of one kernel row are copied: one product multiplies them by
  # all rows of the kernel side by side, and the results that belong to the same
  # output are added.
  rows = w.shape[0] if strides[0] == 1 else 1
  windows = _windows(padded, (w.shape[0] // rows, w.shape[1]), strides)
  columns = w.reshape((rows, -1, features)).transpose((1, 0, 2))
  columns = columns.reshape((-1, rows * features))
  lines = windows.reshape((-1, windows.shape[3]))
  if shift is None:
    y = lax.dot(lines, columns, preferred_element_type=jnp.int32)
  else:
    y = _matmul(lines, columns)
  y = y.reshape((*windows.shape[:3], rows, features))
  last = y.shape[1] - rows + 1
  y = _sum(y[:, row : row + last, :, row] for row in range(rows))
  return y if shift is None else y - shift


def _windows(
  x: jax.Array, kernel: tuple[int, int], strides: tuple[int, ...]
) -> jax.Array:
  """Returns the kernel's inputs at each place, [N, H', W', h * w * C]."""
  n, height, width, channels = x.shape
  h, w = kernel
  if kernel == strides and height % h == width % w == 0:
    # Patches do not overlap: one transposition is enough.
    x = x.reshape((n, height // h, h, width // w, w, channels))
    x = x.transpose((0, 1, 3, 2, 4, 5))
    return x.reshape((n, height // h, width // w, h * w * channels))
  return jnp.concatenate(float_ops.windows(x, kernel, strides), axis=-1)


def _padded(
  x: jax.Array, padding: _Pads, value: int, w: jax.Array
) -> jax.Array:
  """Returns x [N, H, W, C], padded with `value`.

  If there are several windows, the result is written to memory: XLA on CPU
  would fuse the padding, and the rounding of the activations with it, into
  each window and compute all that anew. XLA does not fuse across a branch, so
  there is one whose condition is always true: no weight is -128. (Writing x
  into a larger array is fused, too, and a division by one, as in `float_ops`,
  is slow for integers.)
  """
  low_high = [(0, 0, 0), *((*pair, 0) for pair in padding), (0, 0, 0)]

  def pad(image: jax.Array) -> jax.Array:
    return lax.pad(image, jnp.array(value, image.dtype), low_high)

  def never(image: jax.Array) -> jax.Array:
    return pad(image) + 1

  if w[..., 0, 0].size == 1:
    return pad(x)
  return lax.cond(w[0, 0, 0, 0] >= -127, pad, never, x)


def _depthwise(
  x: jax.Array, w: jax.Array, *, strides: tuple[int, ...], padding: _Pads
) -> jax.Array:
  """Returns the sums of a depthwise convolution, int32 [N, H', W', C]."""
  padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  taps = w.reshape((-1, w.shape[3])).astype(jnp.int32)
  windows = float_ops.windows(padded, w.shape[:2], strides)
  return _sum(
    window.astype(jnp.int32) * tap[None, None, None]
    for window, tap in zip(windows, taps)
  )


def _sum(terms: Iterable[jax.Array]) -> jax.Array:
  return functools.reduce(operator.add, terms)


def _unsigned(x: jax.Array) -> jax.Array:
  """Returns int8 x + 128 as uint8, by inverting the sign bit."""
  return lax.bitcast_convert_type(x, jnp.uint8) ^ jnp.uint8(_SHIFT)


# On a CPU, JAX widens operands of different types to int32 before XLA sees
# them, and an int32 product is 30 times slower. XLA itself takes uint8 x int8.
_matmul_p = extend_core.Primitive('uint8_int8_matmul')


def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
  """Returns uint8 [M, K] times int8 [K, N], int32 [M, N]."""
  return _matmul_p.bind(x, w)


@_matmul_p.def_abstract_eval
def _result_type(
  x: jax.core.ShapedArray, w: jax.core.ShapedArray
) -> jax.core.ShapedArray:
  return jax.core.ShapedArray((x.shape[0], w.shape[1]), jnp.int32)


def _lower(
  context: mlir.LoweringRuleContext, x: ir.Value[Any], w: ir.Value[Any]
) -> list[ir.Value[Any]]:
  (result,) = context.avals_out
  numbers = stablehlo.DotDimensionNumbers.get([], [], [1], [0])
  unknown = ir.ShapedType.get_dynamic_size()  # Of a symbolic batch size.
  sizes = [n if isinstance(n, int) else unknown for n in result.shape]
  int32 = ir.IntegerType.get_signless(32)
  shape = ir.RankedTensorType.get(sizes, int32)
  return [stablehlo.dot_general(shape, x, w, numbers)]


def _batched(
  operands: Sequence[jax.Array], axes: Sequence[int | None]
) -> tuple[jax.Array, int]:
  """Batches the product as plain ones: XLA's fast kernel takes no batches."""
  x, w = (
    a if axis is None else jnp.moveaxis(a, axis, 0)
    for a, axis in zip(operands, axes)
  )
  if axes[1] is None:
    y = _matmul(x.reshape((-1, x.shape[-1])), w)
    return y.reshape((*x.shape[:2], -1)), 0
  if axes[0] is None:
    return lax.map(functools.partial(_matmul, x), w), 0
  return lax.map(_matmul_pair, (x, w)), 0


def _matmul_pair(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
  return _matmul(*pair)


batching.primitive_batchers[_matmul_p] = _batched
mlir.register_lowering(_matmul_p, _lower, platform='cpu')
_matmul_p.def_impl(jax.jit(_matmul))
