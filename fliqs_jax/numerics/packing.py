"""How values on a grid are stored: codes of a format, dense or native.

A code is what the format's name says: two's complement for an integer; sign,
exponent and mantissa for a float, whose bias is 2**(x - 1) - 1 and whose codes
are all finite. A native type is used only where it holds every value of the
grid: float8_e4m3fn, for one, has a NaN where E4M3 has its largest value, which
every channel uses. The `fnuz` types have the same codes at half the value.
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
  """How the values of one format lie in a file.

  Attributes:
    dtype: numpy's name of the stored elements: one per value, or `uint8` for
      codes packed without gaps, the first value in the lowest bits. Codes of
      float8 too: safetensors reads its `fnuz` types into torch only.
    native: name of the ml_dtypes type whose codes these are, or None.
    factor: a value is `factor` times what the native type says.
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
  """Returns how a format's values are stored."""
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
  """Returns grid values as they are stored; -0 becomes 0.

  Args:
    values: [...] float32 on the format's grid.
    numeric_format: the format.

  Returns:
    [...] of the layout's dtype, or packed codes, uint8 [bytes].

  Raises:
    ValueError: a value is not on the grid.
  """
  values = np.asarray(values, np.float32) + np.float32(0)  # No -0: see fnuz.
  how = layout(numeric_format)
  if not how.packed:
    stored = values.astype(np.dtype(how.dtype))
    exact = stored.astype(np.float32) == values
    if how.native == 'int8':  # -128 is a code, but no value of the grid.
      exact &= abs(values) <= numeric_format.max_value
  else:
    grid = table(numeric_format)
    order = np.argsort(grid, kind='stable')  # Of 0 and -0, 0 comes first.
    found = np.searchsorted(grid[order], values).clip(max=len(grid) - 1)
    codes = order[found].astype(np.uint8)
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
  """Returns grid values from what is stored.

  Args:
    stored: as `encode` returns it; numpy, or a `jax.Array`, traced or not.
    numeric_format: the format.
    shape: of the values.

  Returns:
    int8 for an integer format, else bfloat16, which holds every grid value.
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
