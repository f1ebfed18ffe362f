"""Codes of every format: none is lost, native types read them."""

import jax
import ml_dtypes
import numpy as np
import pytest

from fliqs_jax.numerics import formats
from fliqs_jax.numerics import packing

INTEGERS = [f'INT{bits}' for bits in range(2, 9)]
FLOATS = [
  f'E{x}M{y}' for x in range(1, 8) for y in range(8) if 4 <= 1 + x + y <= 8
]
FORMAT = pytest.mark.parametrize(
  'fmt', [formats.parse(name) for name in INTEGERS + FLOATS], ids=str
)


def grid(fmt):
  """Returns all values of a grid: those of its codes that are no -2**k."""
  values = packing.table(fmt)
  return values[np.abs(values) <= fmt.max_value]


@FORMAT
def test_every_value_survives_storage(fmt):
  values = np.random.default_rng(0).permutation(grid(fmt))
  stored = packing.encode(values, fmt)
  assert stored.shape == packing.stored_shape(fmt, values.shape)
  # Dense: bits of all values, in whole bytes.
  assert stored.nbytes == -(-len(values) * fmt.bits // 8)
  decoded = packing.decode(stored, fmt, values.shape)
  np.testing.assert_array_equal(decoded.astype(np.float32), values)
  in_graph = jax.jit(lambda x: packing.decode(x, fmt, values.shape))(stored)
  assert in_graph.dtype == decoded.dtype
  np.testing.assert_array_equal(np.asarray(in_graph).astype(np.float32), values)


@pytest.mark.parametrize(
  'fmt', [formats.parse(name) for name in FLOATS], ids=str
)
def test_codes_of_a_float_are_sign_exponent_mantissa(fmt):
  # Every code has a value of its own, but for the two zeros; the largest is
  # the format's, and the smallest above 0 its step.
  values = packing.table(fmt)
  assert len(set(values)) == len(values) - 1
  assert values.max() == fmt.max_value
  assert values[1] == 2.0 ** (fmt.min_exponent - fmt.mantissa_bits)


def test_bf16_is_stored_as_it_is():
  values = np.float32([0, 1, -3.140625, 2.0**-119, formats.BF16.max_value])
  stored = packing.encode(values, formats.BF16)
  assert stored.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(stored.astype(np.float32), values)


@FORMAT
def test_native_types_read_the_codes(fmt):
  how = packing.layout(fmt)
  if how.native is None:
    return
  values = grid(fmt)
  stored = packing.encode(values, fmt)
  native = np.dtype(getattr(ml_dtypes, how.native, how.native))
  if how.packed:
    # ml_dtypes holds a code in a byte; integers are extended by their sign.
    codes = packing.unpack(stored, fmt.bits, len(values))
    if how.native.startswith('int'):
      codes = (codes.astype(np.int8) << (8 - fmt.bits)) >> (8 - fmt.bits)
    stored = codes.astype(np.uint8)
  read = stored.view(native).astype(np.float32) * how.factor
  np.testing.assert_array_equal(read, values)


def test_no_native_float8_is_used_that_lacks_a_value():
  # 480 and 114688 are NaN and infinity to the types that hardware has most.
  for name, rejected in (('E4M3', 'float8_e4m3fn'), ('E5M2', 'float8_e5m2')):
    fmt = formats.parse(name)
    dtype = getattr(ml_dtypes, rejected)
    assert not np.isfinite(np.float32(fmt.max_value).astype(dtype))
    assert packing.layout(fmt).native.endswith('fnuz')


def test_the_first_code_is_in_the_lowest_bits():
  # 1 and 2 in four bits each; 1, 2, 3 in three bits: 0b011_010_001.
  assert packing.pack(np.uint8([1, 2]), 4).tolist() == [0x21]
  assert packing.pack(np.uint8([1, 2, 3]), 3).tolist() == [0b11010001, 0]


def test_a_value_off_the_grid_is_refused():
  for name, value in (('INT4', 8), ('INT4', 0.5), ('INT8', -128), ('E2M1', 5)):
    with pytest.raises(ValueError, match=f'is not on the grid of {name}'):
      packing.encode(np.float32([value]), formats.parse(name))
    with pytest.raises(ValueError, match=f'^{float(value)} is not on the grid'):
      packing.encode(np.float32([1, value, 0]), formats.parse(name))


@pytest.mark.parametrize(
  ('name', 'nearest'),
  [
    ('INT3', 'INT4'),
    ('INT5', 'INT8'),
    ('E3M1', 'E3M2'),
    ('E4M2', 'E4M3'),
    ('E6M1', 'BF16'),  # Exponents down to -30: beyond every 8-bit type.
  ],
)
def test_the_nearest_native_format_holds_the_grid(name, nearest):
  assert packing.nearest_native(formats.parse(name)) == nearest
