"""Integer products in every form: the sums of NumPy's own integers."""

import functools
import itertools
import pathlib

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.numerics import float_ops
from fliqs_jax.numerics import int8_ops

pytestmark = pytest.mark.optimized

_OTHER_AXES = lax.ConvDimensionNumbers((0, 1, 2, 3), (3, 2, 0, 1), (0, 1, 2, 3))


def _draw(shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(-127, 128, shape).astype(np.int8)


# image, kernel, strides, padding, groups
_CASES = {
  'rows of the kernel': ((2, 5, 6, 3), (3, 2, 3, 4), (1, 1), 'SAME', 1),
  'windows': ((2, 5, 6, 3), (3, 2, 3, 4), (2, 1), ((1, 0), (0, 2)), 1),
  'patches': ((2, 6, 4, 3), (3, 2, 3, 4), (3, 2), 'VALID', 1),
  'patches with a rest': ((2, 7, 5, 3), (3, 2, 3, 4), (3, 2), 'VALID', 1),
  'pointwise padded': ((2, 3, 4, 3), (1, 1, 3, 4), (1, 1), ((1, 0),) * 2, 1),
  'wide': ((2, 5, 6, 8), (3, 3, 8, 20), (1, 1), 'SAME', 1),
  # Up to 16 channels, of which two pixels have more.
  'pairs of pixels': ((2, 5, 6, 9), (3, 3, 9, 12), (1, 1), 'SAME', 1),
  'pairs, strided': ((2, 5, 6, 9), (3, 2, 9, 12), (2, 1), ((1, 1), (0, 1)), 1),
  'pairs, even kernel': ((1, 4, 8, 3), (2, 4, 3, 9), (1, 1), 'SAME', 1),
  'pairs, no padding': ((1, 5, 8, 9), (3, 3, 9, 3), (1, 1), 'VALID', 1),
  'pairs, one side': (
    (1, 4, 8, 9),
    (3, 5, 9, 3),
    (1, 1),
    ((0, 2), (4, 0)),
    1,
  ),
  'odd width': ((1, 4, 7, 9), (3, 3, 9, 3), (1, 1), 'SAME', 1),
  'larger result': ((1, 4, 6, 9), (3, 3, 9, 3), (1, 1), ((2, 2),) * 2, 1),
  'larger kernel': ((1, 2, 2, 9), (3, 3, 9, 3), (1, 1), 'SAME', 1),
  'depthwise': ((2, 5, 6, 3), (3, 3, 1, 3), (2, 1), ((2, 0), (1, 1)), 3),
  'depthwise cropped': (
    (2, 7, 6, 3),
    (3, 3, 1, 3),
    (1, 2),
    ((-1, 1), (0, -1)),
    3,
  ),
  'windows cropped': (
    (2, 7, 6, 3),
    (3, 2, 3, 4),
    (2, 1),
    ((-1, -1), (-2, 0)),
    1,
  ),
  'pairs cropped': (
    (2, 7, 8, 9),
    (3, 3, 9, 3),
    (1, 1),
    ((-1, -1), (-1, -2)),
    1,
  ),
  'grouped': ((2, 5, 6, 4), (3, 3, 2, 6), (1, 1), 'SAME', 2),
}


def _sums(x, w, strides, padding, groups):
  """Returns the sums of a convolution by the definition, int64."""
  pads = float_ops.padding_pairs(x.shape[1:3], w.shape[:2], strides, padding)
  wider = [(max(low, 0), max(high, 0)) for low, high in pads]
  padded = np.pad(x.astype(np.int64), ((0, 0), *wider, (0, 0)))
  for axis, (low, high) in enumerate(pads, 1):  # A negative one cuts off.
    last = padded.shape[axis] + min(high, 0)
    padded = padded.take(range(max(-low, 0), last), axis)
  height, width = (
    (size - k) // s + 1
    for size, k, s in zip(padded.shape[1:3], w.shape[:2], strides)
  )
  y = np.zeros((len(x), height, width, w.shape[3]), np.int64)
  inputs, outputs = x.shape[3] // groups, w.shape[3] // groups
  for i, j, f in itertools.product(
    range(height), range(width), range(w.shape[3])
  ):
    top, left = i * strides[0], j * strides[1]
    first = f // outputs * inputs
    window = padded[:, top : top + w.shape[0], left : left + w.shape[1]]
    window = window[..., first : first + inputs]
    y[:, i, j, f] = (window * w[..., f].astype(np.int64)).sum((1, 2, 3))
  return y


# Only convolutions without groups have the unsigned form.
_FORMS = [(case, False) for case in _CASES]
_FORMS += [(case, True) for case, row in _CASES.items() if row[-1] == 1]


@pytest.mark.parametrize(('case', 'shifted'), _FORMS)
def test_sums_of_a_convolution_are_those_of_the_definition(case, shifted):
  x_shape, w_shape, strides, padding, groups = _CASES[case]
  x, w = _draw(x_shape), _draw(w_shape, seed=1)
  shift = None
  if shifted:
    # 128 times the sum of each feature's weights.
    expected = 128 * w.astype(np.int64).sum((0, 1, 2), keepdims=True)
    shift = int8_ops.offset(jnp.asarray(w), (0, 1, 2))
    np.testing.assert_array_equal(shift, expected)
  convolve = functools.partial(
    int8_ops.conv_general_dilated,
    window_strides=strides,
    padding=padding,
    lhs_dilation=(1, 1),
    rhs_dilation=(1, 1),
    dimension_numbers=float_ops.IMAGES,
    feature_group_count=groups,
  )
  y = jax.jit(convolve)(x, w, shift=shift)
  assert y.dtype == jnp.int32
  np.testing.assert_array_equal(y, _sums(x, w, strides, padding, groups))


@pytest.mark.parametrize(
  ('dilation', 'axes'),
  [((2, 1), float_ops.IMAGES), ((1, 1), _OTHER_AXES)],
)
def test_dilated_kernels_and_other_axes_are_left_to_xla(dilation, axes):
  x, w = _draw((2, 5, 6, 5)), _draw((2, 2, 5, 3), seed=1)
  how = dict(
    window_strides=(1, 1),
    padding='VALID',
    lhs_dilation=(1, 1),
    rhs_dilation=dilation,
    dimension_numbers=axes,
    feature_group_count=1,
  )
  # Sums of 20 products of at most 127 * 127 are exact in float32.
  expected = lax.conv_general_dilated(
    x.astype(np.float32), w.astype(np.float32), **how
  )
  y = int8_ops.conv_general_dilated(jnp.asarray(x), jnp.asarray(w), **how)
  assert y.dtype == jnp.int32
  np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize('shifted', [False, True])
def test_sums_of_a_product_over_two_axes_in_another_order(shifted):
  x, w = _draw((2, 3, 4, 5)), _draw((5, 6, 4), seed=1)
  numbers = (((2, 3), (2, 0)), ((), ()))
  shift = int8_ops.offset(jnp.asarray(w), (0, 2)) if shifted else None
  y = int8_ops.dot_general(jnp.asarray(x), jnp.asarray(w), numbers, shift)
  assert y.dtype == jnp.int32
  expected = np.einsum('abcd,dec->abe', x.astype(int), w.astype(int))
  np.testing.assert_array_equal(y, expected)


def test_a_product_with_batch_axes_is_signed_and_needs_no_shift():
  x, w = _draw((2, 3, 4)), _draw((2, 4, 5), seed=1)
  numbers = (((2,), (1,)), ((0,), (0,)))
  shift = int8_ops.offset(jnp.asarray(w), (1,))
  y = int8_ops.dot_general(jnp.asarray(x), jnp.asarray(w), numbers, shift)
  assert y.dtype == jnp.int32
  np.testing.assert_array_equal(y, x.astype(int) @ w.astype(int))


def test_integers_are_rounded_to_the_nearest_ties_to_even():
  eighths = np.arange(-127 * 8, 127 * 8 + 1, dtype=np.float32) / 8
  x = np.concatenate([eighths, np.nextafter(eighths, np.float32(0)), [-0.0]])
  x = x.astype(np.float32)
  y = jax.jit(int8_ops.rounded)(x)
  assert y.dtype == jnp.int8
  np.testing.assert_array_equal(y, np.rint(x))
  assert int8_ops.rounded(jnp.float32(np.nan)) == 0


@pytest.mark.parametrize(
  ('flags', 'instructions'),
  [
    ('flags: avx512_vnni amx_tile amx_int8', 'amx'),
    ('flags: avx512_vnni', 'vnni'),
    ('flags: avx2', ''),
    (None, ''),
  ],
)
def test_a_processor_has_the_products_of_its_flags(
  monkeypatch, flags, instructions
):
  def read_text(path, encoding):
    assert path == pathlib.Path('/proc/cpuinfo')
    if flags is None:  # As on a system that has no such file.
      raise FileNotFoundError
    return flags

  monkeypatch.setattr(pathlib.Path, 'read_text', read_text)
  assert int8_ops.instructions.__wrapped__() == instructions


def test_the_unsigned_form_is_for_processors_with_vnni_alone(monkeypatch):
  for instructions, prefers in {'vnni': True, 'amx': False, '': False}.items():
    monkeypatch.setattr(
      int8_ops, 'instructions', lambda name=instructions: name
    )
    assert int8_ops.prefers_unsigned() is prefers
