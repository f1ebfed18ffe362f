"""Profiled clips: those that fit the activations that a layer saw."""

import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.numerics import formats
from fliqs_jax.search import calibration
from fliqs_jax.space import ops as ops_lib
from fliqs_jax.space import search_space


def _space(*paths):
  shape = ops_lib.OpShape(
    kind='dense',
    macs=1,
    weights=1,
    channels=1,
    weight_menu=None,
    act_menu=formats.menu(['INT2', 'BF16']),
    tied=False,
  )
  ops = tuple(ops_lib.Op(path, shape) for path in paths)
  return search_space.SearchSpace((), (), ops, 0)


def _apply(variables, images, *, train, mutable):
  """A model of one layer at `path`, which sees the images as they are."""
  assert (train, mutable) == (False, ['act_inputs'])
  path = '' if 'mean' in variables['quant_stats'] else 'a'
  sown = {'x': (images,)}
  return None, {'act_inputs': {path: sown} if path else sown}


@pytest.mark.parametrize('path', ['a', ''])
def test_a_clip_is_the_multiple_of_the_std_that_fits_all_batches(path):
  # The grid of INT2 is -1, 0, 1 times the threshold: one of 2 keeps 0 and +-2.
  # The std is sqrt(5 - 1**2) = 2, so the multiple is 1, which is a candidate.
  stats = dict(
    mean=jnp.float32(1), mean_square=jnp.float32(5), clip=jnp.ones(2)
  )
  batches = [np.zeros((2, 3), np.float32), np.full((2, 3), -2, np.float32)]
  found = calibration.profiled_clips(
    _apply,
    _space(path),
    dict(quant_stats={path: stats} if path else stats),
    batches,
  )
  found = found[path] if path else found
  np.testing.assert_array_equal(found['clip'], [1.0, np.inf])
  assert found['mean'] == 1
  assert found['mean_square'] == 5


def test_a_layer_that_saw_nothing_is_named():
  zero = jnp.float32(0)
  stats = dict(mean=zero, mean_square=zero, clip=jnp.ones(2))
  with pytest.raises(ValueError, match='act_clip=profiled: layer a: std=0.0'):
    calibration.profiled_clips(
      _apply, _space('a'), dict(quant_stats={'a': stats}), [np.zeros((1, 2))]
    )


def test_a_sample_is_spread_evenly_over_a_batch():
  # 250 000 values are more than twice 100 000: each third of them.
  sample = calibration._some(np.arange(250_000).reshape(50, 5000))
  assert sample[:3].tolist() == [0, 3, 6]
  assert sample[-1] == 249_999
  assert len(calibration._some(np.arange(100_000))) == 100_000
