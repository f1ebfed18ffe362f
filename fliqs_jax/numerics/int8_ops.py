"""Products of int8 tensors with int32 accumulators, in the form that is fast.

Same integers whatever the form: sums wrap around at 2**31, so nothing depends
on their order. As measured with jaxlib 0.10.2, XLA's CPU kernels of
int8 x int8 gain 1.5 over float32 where only the VNNI instructions are there,
those of uint8 x int8 3 to 4, because that is what VNNI multiplies; its
convolutions take int8 only, and up to 16 channels fall back to a kernel that is
5 times slower than float32. So a convolution is a matrix product, and the
activations are shifted by 128 to be unsigned where the processor likes that.
TPU gets XLA's own convolution.
"""

from collections.abc import Sequence
import functools
import math
import pathlib

import jax
from jax import lax
from jax.extend import core as extend_core
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import batching
from jax.interpreters import mlir
import jax.numpy as jnp

from fliqs_jax.numerics import float_ops

_SHIFT = 128  # From int8 to uint8.


@functools.cache
def likes_unsigned() -> bool:
  """Returns whether this process's CPU multiplies uint8 by int8 (VNNI)."""
  try:
    information = pathlib.Path('/proc/cpuinfo').read_text()
  except OSError:
    return False
  return jax.default_backend() == 'cpu' and 'vnni' in information


def offset(w: jax.Array, contracted: Sequence[int]) -> jax.Array:
  """Returns what the shift of the activations adds to each sum.

  Args:
    w: int8 weights.
    contracted: axes that the op sums over.

  Returns:
    int32, of w's rank, of size 1 along `contracted`.
  """
  w = w.astype(jnp.int32)
  return _SHIFT * jnp.sum(w, axis=tuple(contracted), keepdims=True)


def dot_general(
  lhs: jax.Array,
  rhs: jax.Array,
  dimension_numbers: lax.DotDimensionNumbers,
  shift: jax.Array | None = None,
) -> jax.Array:
  """`lax.dot_general` of int8 with an int32 result.

  Args:
    lhs: int8 activations.
    rhs: int8 weights.
    dimension_numbers: as of `lax.dot_general`.
    shift: `offset` of the weights, for the unsigned form; None for the signed.
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
  """`linear.conv_general_dilated` of int8 with an int32 result.

  Args:
    lhs: int8 [N, H, W, C] for two spatial dimensions.
    rhs: int8 [h, w, C / groups, features].
    window_strides: per spatial dimension.
    padding: `SAME`, `VALID` or (low, high) per spatial dimension.
    lhs_dilation: per spatial dimension.
    rhs_dilation: per spatial dimension.
    dimension_numbers: channels last, as linen has it.
    feature_group_count: groups.
    shift: `offset` of the weights, for the unsigned form; None for the signed.

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
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(size, kernel, window_strides, padding)
  how = dict(strides=tuple(window_strides), padding=tuple(padding))
  if depthwise:
    ours = functools.partial(_depthwise, **how)
  else:
    ours = functools.partial(_windows_times_kernel, shift=shift, **how)
  if shift is not None:  # A CPU for certain.
    return ours(lhs, rhs)
  # CUDA has no integer convolution.
  return lax.platform_dependent(lhs, rhs, tpu=xla, default=ours)


def _windows_times_kernel(x, w, *, strides, padding, shift):
  features = w.shape[3]
  if shift is not None:
    x = _unsigned(x)
  x = _padded(x, padding, 0 if shift is None else _SHIFT, w)
  # Copying the windows takes longer than multiplying them. Without strides it
  # is enough to copy those of one row of the kernel: one product with all of
  # its rows side by side, whose results are added where they meet.
  rows = w.shape[0] if strides[0] == 1 else 1
  windows = _windows(x, (w.shape[0] // rows, w.shape[1]), strides)
  columns = w.reshape((rows, -1, features)).transpose((1, 0, 2))
  columns = columns.reshape((-1, rows * features))
  lines = windows.reshape((-1, windows.shape[3]))
  if shift is None:
    y = lax.dot(lines, columns, preferred_element_type=jnp.int32)
  else:
    y = _matmul(lines, columns)
  y = y.reshape((*windows.shape[:3], rows, features))
  last = y.shape[1] - rows + 1
  y = sum(y[:, row : row + last, :, row] for row in range(rows))
  return y if shift is None else y - shift


def _windows(x, kernel, strides):
  """Returns what the kernel sees at each place, [N, H', W', h * w * C]."""
  n, height, width, channels = x.shape
  h, w = kernel
  if kernel == tuple(strides) and height % h == width % w == 0:
    # Patches, which do not overlap: one transposition.
    x = x.reshape((n, height // h, h, width // w, w, channels))
    x = x.transpose((0, 1, 3, 2, 4, 5))
    return x.reshape((n, height // h, width // w, h * w * channels))
  return jnp.concatenate(float_ops.windows(x, kernel, strides), axis=-1)


def _padded(x, padding, value, w):
  """Returns x [N, H, W, C], padded.

  If there are several windows, it is in memory: XLA on CPU would fuse the pad,
  and the rounding of the activations with it, into each of them, and compute
  all that anew. It does not look into a branch, so there is one; no weight is
  -128. (A larger array that x is written into is fused too, and a division by
  one, as in `linear`, is slow in integers.)
  """

  def pad(x):
    zero = jnp.array(value, x.dtype)
    return lax.pad(x, zero, [(0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)])

  if w[..., 0, 0].size == 1:
    return pad(x)
  return lax.cond(w[0, 0, 0, 0] >= -127, pad, lambda x: pad(x) + 1, x)


def _depthwise(x, w, *, strides, padding):
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  taps = w.reshape((-1, w.shape[3])).astype(jnp.int32)
  windows = float_ops.windows(x, w.shape[:2], strides)
  return sum(
    window.astype(jnp.int32) * tap[None, None, None]
    for window, tap in zip(windows, taps)
  )


def _unsigned(x):
  """Returns x + 128, by turning the sign bit over."""
  return lax.bitcast_convert_type(x, jnp.uint8) ^ jnp.uint8(_SHIFT)


# JAX widens operands of different types to int32 on a CPU before XLA sees them,
# and an int32 product is 30 times slower; XLA itself takes uint8 x int8.
_matmul_p = extend_core.Primitive('uint8_int8_matmul')


def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
  """Returns uint8 [M, K] times int8 [K, N], int32 [M, N]."""
  return _matmul_p.bind(x, w)


@_matmul_p.def_abstract_eval
def _(x, w):
  return jax.core.ShapedArray((x.shape[0], w.shape[1]), jnp.int32)


def _lower(context, x, w):
  (result,) = context.avals_out
  int32 = ir.IntegerType.get_signless(32)
  numbers = stablehlo.DotDimensionNumbers.get([], [], [1], [0])
  shape = ir.RankedTensorType.get(result.shape, int32)
  return [stablehlo.dot_general(shape, x, w, numbers)]


def _batched(operands, axes):
  """Batches the product, in which XLA has its fast kernel without batches."""
  x, w = (
    a if axis is None else jnp.moveaxis(a, axis, 0)
    for a, axis in zip(operands, axes)
  )
  if axes[1] is None:
    y = _matmul(x.reshape((-1, x.shape[-1])), w)
    return y.reshape((*x.shape[:2], -1)), 0
  if axes[0] is None:
    return lax.map(lambda w: _matmul(x, w), w), 0
  return lax.map(lambda pair: _matmul(*pair), (x, w)), 0


batching.primitive_batchers[_matmul_p] = _batched
mlir.register_lowering(_matmul_p, _lower, platform='cpu')
_matmul_p.def_impl(jax.jit(_matmul))
