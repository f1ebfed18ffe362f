"""Tests of one-hot vectors that pick."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.numerics import one_hot as one_hot_lib


def test_the_entry_above_a_half_picks_its_number():
  values = jnp.asarray([3.0, 5.0, np.inf])
  picked = [one_hot_lib.pick(row, values) for row in jnp.eye(3)]
  np.testing.assert_array_equal(picked, [3.0, 5.0, np.inf])


def test_a_vector_without_an_entry_above_a_half_picks_nan():
  soft = jnp.asarray([0.5, 0.3, 0.2])
  assert np.isnan(one_hot_lib.pick(soft, jnp.asarray([3.0, 5.0, 7.0])))


@pytest.mark.parametrize('leaf', [[0.5, 0.5], [0.0, 0.0], [1.0, 1.0]])
def test_a_known_vector_that_does_not_pick_one_is_refused(leaf):
  with pytest.raises(ValueError, match='^arch leaf a/b/format is .* one-hot'):
    one_hot_lib.check('a/b/format', np.asarray(leaf, np.float32), 2)


@pytest.mark.parametrize('wrap', [np.asarray, jax.jit(jnp.asarray)])
@pytest.mark.parametrize('leaf', [[1.0], [0.0, 1.0], 1.0])
def test_a_leaf_of_another_menu_is_refused(leaf, wrap):
  with pytest.raises(ValueError, match='a/format has the shape .* 3 options'):
    one_hot_lib.check('a/format', wrap(leaf), 3)


def test_the_shape_of_a_mean_and_of_a_traced_leaf_is_checked():
  with pytest.raises(ValueError, match='3 options'):
    one_hot_lib.check('a/format', np.ones(2) / 2, 3, is_mean=True)
  with pytest.raises(ValueError, match='3 options'):
    jax.jit(lambda leaf: one_hot_lib.check('a/format', leaf, 3))(np.ones(2))
  one_hot_lib.check('a/format', np.ones(2) / 2, 2, is_mean=True)


def test_a_traced_vector_is_not_read():
  def checked(leaf):
    one_hot_lib.check('a/format', leaf, 2)
    return leaf

  soft = jnp.asarray([0.5, 0.5])
  np.testing.assert_array_equal(jax.jit(checked)(soft), soft)
