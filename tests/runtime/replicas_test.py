"""Replicas: what differs between them, and what they agree on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.runtime import replicas as replicas_lib

# Replicas along an axis of `jax.vmap` behave as those on devices.
ALONG = replicas_lib.along('replica')


def _each(function, *args):
  return jax.vmap(function, axis_name='replica')(*args)


def test_numbers_are_averaged_and_counters_kept():
  tree = dict(x=jnp.asarray([1.0, 2.0, 6.0]), n=jnp.asarray([4, 4, 4]))
  mean = _each(ALONG.mean, tree)
  # (1 + 2 + 6) / 3.
  np.testing.assert_array_equal(mean['x'], [3.0, 3.0, 3.0])
  np.testing.assert_array_equal(mean['n'], [4, 4, 4])
  assert mean['n'].dtype == jnp.int32


def test_a_baseline_is_the_mean_of_the_others():
  # (2 + 6) / 2, (1 + 6) / 2, (1 + 2) / 2.
  others = _each(ALONG.others, jnp.asarray([1.0, 2.0, 6.0]))
  np.testing.assert_array_equal(others, [4.0, 3.5, 1.5])


def test_each_replica_has_a_key_of_its_own():
  keys = _each(lambda _: ALONG.key(jax.random.key(0)), jnp.zeros(3))
  data = jax.random.key_data(keys)
  assert len({tuple(row) for row in data.tolist()}) == 3
  expected = jax.random.fold_in(jax.random.key(0), 2)
  np.testing.assert_array_equal(data[2], jax.random.key_data(expected))


def test_a_step_alone_has_nobody_to_agree_with():
  key, tree = jax.random.key(0), {'x': 1.0}
  assert replicas_lib.ONE.key(key) is key
  assert replicas_lib.ONE.mean(tree) is tree
  with pytest.raises(ValueError, match='needs at least two replicas'):
    replicas_lib.ONE.others(jnp.zeros(()))
