"""The fast forms compute what XLA's own convolution computes."""

import re

import jax
from jax import lax
from jax.extend import core as extend_core
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.numerics import float_ops
from tests import helpers

_NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))

# image, kernel, strides, padding, groups
_CASES = {
  'pointwise': ((2, 5, 6, 8), (1, 1, 8, 4), (1, 1), 'SAME', 1),
  'pointwise strided': ((2, 5, 6, 8), (1, 1, 8, 4), (2, 2), 'VALID', 1),
  'depthwise': ((2, 5, 6, 8), (3, 3, 1, 8), (1, 1), 'SAME', 8),
  'depthwise strided': ((2, 7, 6, 8), (5, 5, 1, 8), (2, 2), 'SAME', 8),
  'depthwise padded': ((2, 7, 6, 8), (3, 3, 1, 8), (1, 2), ((2, 0), (1, 1)), 8),
  'depthwise cropped': (
    (2, 7, 6, 8),
    (3, 3, 1, 8),
    (1, 2),
    ((-1, 0), (0, -2)),
    8,
  ),
  'pointwise cropped': (
    (2, 5, 6, 8),
    (1, 1, 8, 4),
    (1, 1),
    ((-1, -2), (0, -1)),
    1,
  ),
  'depthwise on one pixel': ((3, 1, 1, 8), (3, 3, 1, 8), (1, 1), 'SAME', 8),
  'depthwise with a rest': ((2, 6, 8, 8), (3, 2, 1, 8), (2, 3), 'VALID', 8),
  'small map': ((2, 2, 2, 8), (3, 3, 8, 4), (1, 1), 'SAME', 1),
  'small map strided': ((2, 2, 3, 8), (3, 3, 8, 4), (2, 2), 'SAME', 1),
  'small result': ((2, 4, 4, 8), (3, 3, 8, 4), (2, 2), ((1, 1), (1, 1)), 1),
  'small odd result': ((2, 5, 7, 8), (5, 3, 8, 4), (2, 3), 'VALID', 1),
  'small in one direction': ((2, 9, 4, 8), (1, 7, 8, 4), (1, 1), 'SAME', 1),
  'small result in one direction': (
    *((2, 4, 8, 8), (3, 3, 8, 4)),
    *((1, 1), 'VALID', 1),
  ),
  'result of the size of the kernel': (
    *((2, 5, 5, 8), (3, 3, 8, 4)),
    *((1, 1), 'VALID', 1),
  ),
  'apart': ((2, 8, 8, 3), (4, 4, 3, 4), (4, 4), 'VALID', 1),
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
  _assert_equal(
    _convolve(float_ops.conv_general_dilated, *how),
    _convolve(lax.conv_general_dilated, *how),
    x,
    w,
  )


@pytest.mark.parametrize(
  ('case', 'products'),
  [
    # A depthwise layer multiplies its taps by the identity, the fast forms of
    # the others multiply all windows at once, and the rest is XLA's.
    ('pointwise', ['dot_general']),
    ('pointwise strided', ['dot_general']),
    ('depthwise', ['dot_general']),
    ('small map', ['dot_general']),
    ('small result', ['dot_general']),
    ('small in one direction', ['dot_general']),
    ('small result in one direction', ['dot_general']),
    ('apart', ['conv_general_dilated']),
    ('result of the size of the kernel', ['conv_general_dilated']),
    ('usual', ['conv_general_dilated']),
    ('grouped', ['conv_general_dilated']),
  ],
)
def test_each_shape_takes_the_form_that_is_fast_for_it(case, products):
  x_shape, w_shape, *how = _CASES[case]
  convolve = _convolve(float_ops.conv_general_dilated, *how)
  jaxpr = jax.make_jaxpr(convolve)(jnp.zeros(x_shape), jnp.zeros(w_shape))
  assert _products(jaxpr.jaxpr) == products


def _products(jaxpr):
  """Returns the names of the products in a program and what it calls."""
  names = []
  for equation in jaxpr.eqns:
    if equation.primitive.name in ('conv_general_dilated', 'dot_general'):
      names.append(equation.primitive.name)
    for inner in extend_core.jaxprs_in_params(equation.params):
      names += _products(inner)
  return names


# activations, weights, ((contracted), (batch))
_DENSE_CASES = {
  'rows': ((6, 8), (8, 5), (((1,), (0,)), ((), ()))),
  'tokens': ((2, 3, 8), (8, 5), (((2,), (0,)), ((), ()))),
  'one vector': ((8,), (8, 5), (((0,), (0,)), ((), ()))),
  'no rows': ((0, 8), (8, 5), (((1,), (0,)), ((), ()))),
  'several axes': ((2, 3, 4, 5), (4, 5, 2, 3), (((2, 3), (0, 1)), ((), ()))),
  'other axes': ((2, 8, 3), (5, 8), (((1,), (1,)), ((), ()))),
  'crossed axes': ((2, 4, 5), (5, 4, 3), (((1, 2), (1, 0)), ((), ()))),
  'batch': ((2, 3, 8), (2, 8, 5), (((2,), (1,)), ((0,), (0,)))),
}


@pytest.mark.parametrize('case', _DENSE_CASES)
def test_dense_values_and_gradients_equal_those_of_lax(case):
  x_shape, w_shape, numbers = _DENSE_CASES[case]
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.integers(-7, 8, x_shape), jnp.float32)
  w = jnp.asarray(rng.integers(-7, 8, w_shape), jnp.float32)
  _assert_equal(
    lambda x, w: float_ops.dot_general(x, w, numbers, None),
    lambda x, w: lax.dot_general(x, w, numbers),
    x,
    w,
  )


def _assert_equal(ours, theirs, x, w):
  shape = jax.eval_shape(theirs, x, w).shape
  g = jnp.asarray(np.random.default_rng(1).integers(-7, 8, shape), x.dtype)

  def with_gradients(f):
    def run(x, w, g):
      y, vjp = jax.vjp(f, x, w)
      return y, vjp(g)

    return jax.jit(run)(x, w, g)

  helpers.same(with_gradients(ours), with_gradients(theirs))


def test_bfloat16_operands_are_summed_in_float32():
  # 300 ones are 300; bfloat16 would stop at 256.
  x, w = jnp.ones((1, 1, 1, 300), jnp.bfloat16), jnp.ones((1, 1, 300, 1))
  y = _convolve(float_ops.conv_general_dilated, (1, 1), 'SAME', 1)(
    x, w.astype(jnp.bfloat16)
  )
  assert y.dtype == jnp.float32
  assert y.item() == 300


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_gradients_are_multiplied_in_the_type_of_the_operands(dtype):
  def convolve(x, w):
    dilated = _convolve(float_ops.conv_general_dilated, (1, 1), 'SAME', 1)(x, w)
    axes = (((3,), (1,)), ((0,), (0,)))
    y = float_ops.dot_general(dilated.astype(x.dtype), w[0], axes, None)
    assert dilated.dtype == y.dtype == jnp.float32
    return jnp.sum(jnp.sin(y))

  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(3, 6, 6, 4)), dtype)
  w = jnp.asarray(rng.normal(size=(3, 3, 4, 4)) / 6, dtype)
  gradient = jax.grad(convolve, argnums=(0, 1))
  products = [
    equation
    for equation in jax.make_jaxpr(gradient)(x, w).eqns
    if equation.primitive.name in ('conv_general_dilated', 'dot_general')
  ]
  assert len(products) == 6
  assert {v.aval.dtype for p in products for v in p.invars} == {x.dtype}
  exact = jax.grad(convolve, (0, 1))(
    x.astype(jnp.float32), w.astype(jnp.float32)
  )
  for ours, theirs in zip(gradient(x, w), exact):
    assert ours.dtype == dtype
    scale = jnp.abs(theirs).max()
    np.testing.assert_allclose(
      ours.astype(jnp.float32) / scale,
      theirs / scale,
      atol=0.05 if dtype == jnp.bfloat16 else 1e-6,
    )


def _maxima(settled):
  """Returns how often a program of three residual blocks computes a ReLU."""

  def blocks(x, w):
    for _ in range(3):
      rounded = jnp.round(x).astype(jnp.int8)
      sums = lax.dot(rounded, w, preferred_element_type=jnp.int32)
      x = settled(jnp.maximum(sums.astype(jnp.float32) + x, 0.0))
    return x

  x, w = (jax.ShapeDtypeStruct((64, 64), t) for t in (jnp.float32, jnp.int8))
  program = jax.jit(blocks).lower(x, w).compile()
  return len(re.findall(r' maximum\(', program.as_text()))


@pytest.mark.optimized
def test_what_is_written_once_is_not_computed_by_each_reader():
  # Without it each block computes those before it anew: 1 + 2 + 3.
  assert _maxima(lambda y: y) == 6
  assert _maxima(float_ops.written_once) == 3


@pytest.mark.optimized
def test_what_is_written_once_keeps_its_values():
  x = jnp.asarray([1.5, -0.0, jnp.inf, -jnp.inf, jnp.nan, 1e-37], jnp.float32)
  y = jax.jit(float_ops.written_once)(x)
  np.testing.assert_array_equal(y, x)
  np.testing.assert_array_equal(jnp.signbit(y)[:-2], jnp.signbit(x)[:-2])
