"""The fast forms compute what XLA's own convolution computes."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax import linear

_NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))

# image, kernel, strides, padding, groups
_CASES = {
  'pointwise': ((2, 5, 6, 8), (1, 1, 8, 4), (1, 1), 'SAME', 1),
  'pointwise strided': ((2, 5, 6, 8), (1, 1, 8, 4), (2, 2), 'VALID', 1),
  'depthwise': ((2, 5, 6, 8), (3, 3, 1, 8), (1, 1), 'SAME', 8),
  'depthwise strided': ((2, 7, 6, 8), (5, 5, 1, 8), (2, 2), 'SAME', 8),
  'depthwise padded': ((2, 7, 6, 8), (3, 3, 1, 8), (1, 2), ((2, 0), (1, 1)), 8),
  'small map': ((2, 2, 2, 8), (3, 3, 8, 4), (1, 1), 'SAME', 1),
  'small map strided': ((2, 2, 3, 8), (3, 3, 8, 4), (2, 2), 'SAME', 1),
  'usual': ((2, 6, 6, 8), (3, 3, 8, 4), (1, 1), 'SAME', 1),
  'grouped': ((2, 6, 6, 8), (3, 3, 4, 4), (1, 1), 'SAME', 2),
}


def _convolve(f, strides, padding, groups):
  def convolve(x, w):
    return f(
      x,
      w,
      strides,
      padding,
      lhs_dilation=(1, 1),
      rhs_dilation=(1, 1),
      dimension_numbers=_NHWC,
      feature_group_count=groups,
      precision=None,
    )

  return convolve


@pytest.mark.parametrize('case', _CASES)
def test_values_and_gradients_equal_those_of_lax(case):
  x_shape, w_shape, *how = _CASES[case]
  rng = np.random.default_rng(0)
  # Small integers: every sum is exact in float32, so equal means equal.
  x = jnp.asarray(rng.integers(-7, 8, x_shape), jnp.float32)
  w = jnp.asarray(rng.integers(-7, 8, w_shape), jnp.float32)
  theirs, their_vjp = jax.vjp(_convolve(lax.conv_general_dilated, *how), x, w)
  ours, our_vjp = jax.vjp(_convolve(linear.conv_general_dilated, *how), x, w)
  np.testing.assert_array_equal(ours, theirs)
  g = jnp.asarray(rng.integers(-7, 8, ours.shape), jnp.float32)
  for a, b in zip(our_vjp(g), their_vjp(g), strict=True):
    np.testing.assert_array_equal(a, b)


def test_bfloat16_operands_are_summed_in_float32():
  # 300 ones are 300; bfloat16 would stop at 256.
  x, w = jnp.ones((1, 1, 1, 300), jnp.bfloat16), jnp.ones((1, 1, 300, 1))
  y = _convolve(linear.conv_general_dilated, (1, 1), 'SAME', 1)(
    x, w.astype(jnp.bfloat16)
  )
  assert y.dtype == jnp.float32
  assert y.item() == 300
