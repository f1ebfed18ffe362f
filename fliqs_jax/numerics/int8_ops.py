"""Products of int8 tensors with int32 accumulators, in the form that is fast.

Every form gives the same integers: sums wrap around at 2**31, so their order
does not matter. Measured with jaxlib 0.10.2:

- On a CPU with VNNI but without AMX, XLA's product of int8 and int8 is 1.5
  times as fast as that of float32, and the product of uint8 and int8 3 to 4
  times, because VNNI multiplies these types. There the activations are shifted
  by 128 to become unsigned, and a convolution, which XLA has for int8 only, is
  written as a matrix product.
- On a CPU with AMX both products are 10 times as fast as that of float32, and
  XLA's convolution, which copies no windows, takes a quarter to a half of the
  time of the matrix product.

TPU gets XLA's own convolution.
"""

from collections.abc import Iterable, Sequence
import functools
import math
import operator
import pathlib

import jax
from jax import lax
import jax.numpy as jnp

from fliqs_jax.numerics import float_ops
from fliqs_jax.numerics import unsigned_matmul

_SHIFT = 128  # Added to an int8 to make it a uint8.
_INTEGERS = 1.5 * 2**23  # The float32 of this size are integers.
_Pads = tuple[tuple[int, int], ...]  # (low, high) per spatial dimension.


@functools.cache
def instructions() -> str:
  """Returns this process's CPU's fast products: `amx`, `vnni` or nothing."""
  try:
    information = pathlib.Path('/proc/cpuinfo').read_text('utf-8')
  except OSError:
    return ''
  if jax.default_backend() != 'cpu':
    return ''
  known = {'amx_int8': 'amx', 'vnni': 'vnni'}
  return next((name for flag, name in known.items() if flag in information), '')


def prefers_unsigned() -> bool:
  """Returns whether the unsigned form is the fastest in this process."""
  return instructions() == 'vnni'


def rounded(x: jax.Array) -> jax.Array:
  """Returns x [...] rounded to integers, ties to even, as int8.

  Args:
    x: [...] float32, of which no magnitude exceeds 127; NaN becomes 0.
  """
  # The sum is rounded to the last bit, which is 1, so the integer is in the
  # lowest byte. It takes half the time of a rounding and a conversion.
  return lax.bitcast_convert_type(x + _INTEGERS, jnp.int32).astype(jnp.int8)


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
  y = unsigned_matmul.matmul(_unsigned(rows), columns) - shift.reshape((1, -1))
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
  on_cpu = ours
  if not depthwise and _has_library(size, kernel, strides, pads):
    on_cpu = functools.partial(_convolution, strides=strides, padding=pads)
  # CUDA has no integer convolution.
  return lax.platform_dependent(lhs, rhs, tpu=xla, cpu=on_cpu, default=ours)


# Of a convolution with no more channels XLA's own loops are 50 times slower
# than the library that takes wider ones.
_NARROW = 16


def _has_library(
  size: Sequence[int],
  kernel: Sequence[int],
  strides: Sequence[int],
  padding: _Pads,
) -> bool:
  """Returns whether XLA's convolution on a CPU is faster than the product.

  It is where windows overlap, so that they need not be copied. XLA gives none
  to the library whose kernel or result is larger than the image.
  """
  grows = any(
    sum(pad) >= k for pad, k in zip(padding, kernel, strict=True)
  ) or any(k > n for k, n in zip(kernel, size, strict=True))
  return not grows and any(k > s for k, s in zip(kernel, strides, strict=True))


def _convolution(
  x: jax.Array, w: jax.Array, *, strides: tuple[int, ...], padding: _Pads
) -> jax.Array:
  """Returns the sums of XLA's convolution on a CPU, int32.

  The library is slow if the channels are no multiple of 4, so zeros are added.
  For narrow images two neighbours become one pixel of twice the channels; where
  that is impossible, more zeros are added.
  """
  convolve = functools.partial(
    lax.conv_general_dilated,
    dimension_numbers=float_ops.IMAGES,
    preferred_element_type=jnp.int32,
  )
  channels, features = w.shape[2:]
  widest = max(channels, features)
  width = x.shape[2] + sum(padding[1]) - w.shape[1] + 1
  paired = (
    widest <= _NARROW < 2 * widest
    and strides[1] == 1
    and x.shape[2] % 2 == width % 2 == 0
  )
  least = _NARROW + 4 if widest <= _NARROW and not paired else channels
  more = -(-least // 4) * 4 - channels
  x = lax.pad(x, jnp.int8(0), [*[(0, 0, 0)] * 3, (0, more, 0)])
  w = lax.pad(w, jnp.int8(0), [*[(0, 0, 0)] * 2, (0, more, 0), (0, 0, 0)])
  if not paired:
    return convolve(x, w, strides, padding)
  w, pads = _paired(w, padding[1], x.shape[2] // 2, width // 2)
  x = x.reshape((*x.shape[:2], x.shape[2] // 2, 2 * x.shape[3]))
  y = convolve(x, w, strides, (padding[0], pads))
  return y.reshape((*y.shape[:2], width, features))


def _paired(
  w: jax.Array, padding: tuple[int, int], pairs: int, results: int
) -> tuple[jax.Array, tuple[int, int]]:
  """Returns the kernel that makes pairs of pixels of pairs, and its padding.

  Args:
    w: int8 [h, w, C, features].
    padding: low and high padding of the width, in pixels.
    pairs: width of the image in pairs.
    results: width of the result in pairs.

  Returns:
    int8 [h, taps, 2 * C, 2 * features], and low and high padding in pairs.
  """
  height, taps, channels, features = w.shape
  low = -(-padding[0] // 2)
  first = 2 * low - padding[0]  # Pixels before the first tap.
  wide = -(-(first + 1 + taps) // 2)  # Taps in pairs.
  none = (0, 0, 0)
  each = [
    lax.pad(
      w,
      jnp.int8(0),
      [none, (start, 2 * wide - taps - start, 0), none, none],
    )
    for start in (first, first + 1)
  ]
  kernel = jnp.concatenate(each, axis=3)
  kernel = kernel.reshape((height, wide, 2 * channels, 2 * features))
  return kernel, (low, results + wide - 1 - pairs - low)


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
    y = unsigned_matmul.matmul(lines, columns)
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
  taps = w.reshape((-1, w.shape[3])).astype(jnp.int32)
  padded = float_ops.pad_images(x, padding)
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
