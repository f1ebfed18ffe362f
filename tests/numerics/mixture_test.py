"""The mean of a tensor over the formats of a menu."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.numerics import formats
from fliqs_jax.numerics import mixture
from fliqs_jax.numerics import quantize


def _on_grid(x, menu, thresholds):
  """Returns x on the grid of one of the formats, each with its threshold."""

  def on_grid(one_hot):
    threshold = jnp.sum(one_hot * jnp.float32(thresholds))
    return quantize.quantize(x, quantize.select(menu, one_hot), threshold)

  return on_grid


def _mixed(menu, thresholds, x, p):
  return mixture.mixed(_on_grid(x, menu, thresholds), p)


def _product(menu, thresholds, x, p):
  q = _mixed(menu, thresholds, x, p)
  return q.values * q.scale


@pytest.mark.optimized
def test_a_one_hot_gives_the_format_itself_bit_for_bit():
  menu = formats.menu(('INT2', 'INT5', 'E4M3', 'BF16'))
  rng = np.random.default_rng(0)
  x = rng.normal(size=999).astype(np.float32)
  x[:6] = [0.0, -0.0, -1e-3, 1e9, -np.inf, np.nan]
  on_grid = _on_grid(x, menu, [0.7, 1.1, 2.3, 1.0])
  mixed = jax.jit(lambda p: mixture.mixed(on_grid, p))
  for p in mixture.one_hots(4):
    for actual, expected in zip(mixed(p), jax.jit(on_grid)(p)):
      np.testing.assert_array_equal(
        np.asarray(actual).view(np.int32), np.asarray(expected).view(np.int32)
      )


def test_the_mean_and_its_gradients_are_those_of_the_formats():
  # On INT2 (grid 1, threshold 1) 0.6 is 1; on INT3 (grid 1/3) 2/3. Of 1/4 and
  # 3/4 the mean is 3/4. 2 is clipped to 1 by INT2; by INT3, of which the
  # threshold is 3 here, it stays 2: the mean is 1/4 + 3/2. 9 is clipped by
  # both: 1/4 + 9/4.
  menu = formats.menu(('INT2', 'INT3'))
  p = jnp.asarray([0.25, 0.75])
  first = functools.partial(_product, menu, [1.0, 1.0])
  np.testing.assert_allclose(first(jnp.asarray([0.6]), p), [0.75], rtol=1e-6)
  product = functools.partial(_product, menu, [1.0, 3.0])
  x = jnp.asarray([1.0, 2.0, 9.0])
  y, vjp = jax.vjp(product, x, p)
  np.testing.assert_allclose(y, [1.0, 1.75, 2.5], rtol=1e-6)
  # The cotangent passes where a format does not clip; towards p it meets what
  # each format makes of x: INT2 [1, 1, 1], INT3 [1, 2, 3].
  dx, dp = vjp(jnp.asarray([1.0, 10.0, 100.0]))
  np.testing.assert_allclose(dx, [1.0, 7.5, 0.0], rtol=1e-6)
  np.testing.assert_allclose(dp, [111.0, 321.0], rtol=1e-6)


def test_probabilities_that_are_no_numbers_show():
  menu = formats.menu(('INT2', 'INT3'))
  q = _mixed(menu, [1.0, 1.0], jnp.ones(3), jnp.full(2, jnp.nan))
  assert np.isnan(q.values).all()


@pytest.mark.optimized
def test_memory_does_not_grow_with_the_menu():
  x = jax.ShapeDtypeStruct((1 << 18,), jnp.float32)

  def temporaries(menu):
    size = len(menu)

    def loss(x, p):
      return jnp.sum(jnp.sin(_product(menu, np.ones(size), x, p)))

    p = jax.ShapeDtypeStruct((size,), jnp.float32)
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, p).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  few, many = formats.menu('int_s')[:2], formats.menu('fp_l')
  assert len(many) > 6 * len(few)
  assert temporaries(many) < 1.2 * temporaries(few)
