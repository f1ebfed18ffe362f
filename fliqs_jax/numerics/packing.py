"""Storage of grid values: codes of a format, packed densely or native.

The code of an integer is its two's complement. The code of a float ExMy is its
sign, exponent and mantissa, with bias 2**(x - 1) - 1; all codes are finite.
A native type is used only if it holds every value of the grid. For example,
float8_e4m3fn has a NaN in place of the largest value of E4M3, which every
channel uses. The `fnuz` types have the same codes at half the value.
"""

from collections.abc import Sequence
import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from fliqs_jax.numerics import formats


class Layout(NamedTuple):
  """The layout in a file of the values of one format.

  Attributes:
    dtype: NumPy's name of the stored elements: one per value, or `uint8` for
      codes packed without gaps, the first value in the lowest bits. Float8 is
      stored as codes, too: safetensors reads `fnuz` types into torch only.
    native: name of the ml_dtypes type that has the same codes, or None.
    factor: ratio of a value of the format to that of the native type.
  """

  dtype: str
  native: str | None
  factor: float = 1.0

  @property
  def packed(self) -> bool:
    """Whether the elements are bytes of a stream of codes."""
    return self.dtype == 'uint8'


_LAYOUTS = {
  'INT2': Layout('uint8', 'int2'),
  'INT4': Layout('uint8', 'int4'),
  'INT8': Layout('int8', 'int8'),
  'E2M1': Layout('uint8', 'float4_e2m1fn'),
  'E2M3': Layout('uint8', 'float6_e2m3fn'),
  'E3M2': Layout('uint8', 'float6_e3m2fn'),
  'E4M3': Layout('uint8', 'float8_e4m3fnuz', 2.0),
  'E5M2': Layout('uint8', 'float8_e5m2fnuz', 2.0),
  'BF16': Layout('bfloat16', 'bfloat16'),
}
_CODES = Layout('uint8', None)


def layout(numeric_format: formats.NumericFormat) -> Layout:
  """Returns the layout of a format's values."""
  return _LAYOUTS.get(numeric_format.name, _CODES)


def nearest_native(numeric_format: formats.NumericFormat) -> str:
  """Returns the smallest format with a native type that holds this grid."""
  for name in ('INT2', 'INT4', 'E2M1', 'E2M3', 'E3M2', 'INT8', 'E4M3', 'E5M2'):
    other = formats.parse(name)
    if not numeric_format.scaled:
      break
    if set(table(numeric_format)) <= set(table(other)):
      return name
  return formats.BF16.name


@functools.cache
def table(numeric_format: formats.NumericFormat) -> np.ndarray:
  """Returns the value of every code, float32 [2**bits]; not for BF16."""
  codes = np.arange(2**numeric_format.bits)
  half = len(codes) // 2
  if numeric_format.is_integer:
    return (codes - 2 * half * (codes >= half)).astype(np.float32)
  mantissa_bits = numeric_format.mantissa_bits
  exponents, mantissas = np.divmod(codes % half, 2**mantissa_bits)
  normal = exponents > 0
  step = np.maximum(exponents - 1, 0) + numeric_format.min_exponent
  magnitudes = np.ldexp(
    mantissas + normal * 2.0**mantissa_bits, step - mantissa_bits
  )
  return np.where(codes < half, magnitudes, -magnitudes).astype(np.float32)


def encode(
  values: np.ndarray, numeric_format: formats.NumericFormat
) -> np.ndarray:
  """Returns grid values in their stored form; -0 becomes 0.

  Args:
    values: [...] float32 values of the format's grid.
    numeric_format: the format.

  Returns:
    [...] of the layout's dtype, or packed codes, uint8 [bytes].

  Raises:
    ValueError: a value is not on the grid.
  """
  # Adding 0 turns -0 into 0: the code of -0 is NaN in the fnuz types.
  values = np.asarray(values, np.float32) + np.float32(0)
  how = layout(numeric_format)
  if not how.packed:
    stored = values.astype(np.dtype(how.dtype))
    exact = stored.astype(np.float32) == values
    if how.native == 'int8':  # -128 has a code, but is not on the grid.
      exact &= abs(values) <= numeric_format.max_value
  else:
    grid = table(numeric_format)
    order = np.argsort(grid, kind='stable')  # Of 0 and -0, 0 comes first.
    ranks = np.searchsorted(grid[order], values).clip(max=len(grid) - 1)
    codes = order[ranks].astype(np.uint8)
    exact = grid[codes] == values
    stored = pack(codes, numeric_format.bits)
  if not exact.all():
    raise ValueError(
      f'{values[~exact][0]} is not on the grid of {numeric_format.name}'
    )
  return stored


def decode(
  stored: Any,
  numeric_format: formats.NumericFormat,
  shape: Sequence[int],
) -> Any:
  """Returns grid values from their stored form.

  Args:
    stored: the result of `encode`, a NumPy array or a `jax.Array`, traced or
      not.
    numeric_format: the format.
    shape: the shape of the values.

  Returns:
    Values of the given shape, int8 for an integer format, else bfloat16, which
    holds every grid value.
  """
  xp = np if isinstance(stored, np.ndarray) else jnp
  how = layout(numeric_format)
  integer = numeric_format.is_integer
  dtype = np.dtype(np.int8) if integer else np.dtype(ml_dtypes.bfloat16)
  if not how.packed:
    return stored
  codes = unpack(stored, numeric_format.bits, math.prod(shape))
  return xp.asarray(table(numeric_format).astype(dtype))[codes].reshape(shape)


def stored_shape(
  numeric_format: formats.NumericFormat, shape: Sequence[int]
) -> tuple[int, ...]:
  """Returns the shape in which values of the given shape are stored."""
  if not layout(numeric_format).packed:
    return tuple(shape)
  return (-(-math.prod(shape) * numeric_format.bits // 8),)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
  """Returns codes [n] below 2**bits as bytes, uint8 [ceil(n * bits / 8)]."""
  each = codes.reshape((-1, 1)) >> np.arange(bits, dtype=np.uint8) & 1
  return np.packbits(each.astype(np.uint8).reshape(-1), bitorder='little')


def unpack(packed: Any, bits: int, count: int) -> Any:
  """Returns `count` codes from bytes [ceil(count * bits / 8)], uint8."""
  if bits == 8:
    return packed
  xp = np if isinstance(packed, np.ndarray) else jnp
  each = xp.unpackbits(packed, count=count * bits, bitorder='little')
  weights = np.left_shift(1, np.arange(bits)).astype(np.uint8)
  return (each.reshape((count, bits)) * weights[None]).sum(1, dtype=np.uint8)
