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
    inputs=1,
    outputs=1,
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
  # With a deviation of 2 the multiple is 1, which is a candidate.
  stats = dict(mean=jnp.float32(1), variance=jnp.float32(4), clip=jnp.ones(2))
  batches = [np.zeros((2, 3), np.float32), np.full((2, 3), -2, np.float32)]
  found = calibration.profiled_clips(
    _apply,
    _space(path),
    dict(quant_stats={path: stats} if path else stats),
    batches,
    'deviation',
  )
  found = found[path] if path else found
  np.testing.assert_array_equal(found['clip'], [1.0, np.inf])
  assert found['mean'] == 1
  assert found['variance'] == 4


def _profiled(rule, values, mean, std):
  stats = dict(
    mean=jnp.float32(mean), variance=jnp.float32(std**2), clip=jnp.ones(2)
  )
  variables = dict(quant_stats={'a': stats})
  batches = [np.float32(values)[None]]
  found = calibration.profiled_clips(
    _apply, _space('a'), variables, batches, rule
  )
  return found['a']['clip'].tolist()


def test_a_clip_about_a_mean_leaves_out_the_mean():
  # INT2 is exact with a threshold of 5, which is the mean and 4 deviations. The
  # candidates are powers of 1.01.
  clip, _ = _profiled('magnitude', [0, 0, 5, 5], mean=3, std=0.5)
  assert 3 + 0.5 * clip == pytest.approx(5, rel=0.01)
  # Of a constant the threshold is its mean.
  assert _profiled('magnitude', [3, 3], mean=3, std=0) == [0, np.inf]


@pytest.mark.parametrize('rule', ['magnitude', 'deviation'])
def test_a_layer_of_zeros_keeps_its_clip_with_a_warning(rule, caplog):
  assert _profiled(rule, [0, 0], mean=0, std=0) == [1, 1]
  assert 'activations of layer a are all zero' in caplog.text


def test_a_layer_that_is_not_finite_is_named():
  with pytest.raises(ValueError, match='act_clip=profiled: layer a: .* nan'):
    _profiled('magnitude', [1, np.nan], mean=1, std=1)


def test_a_sample_is_spread_evenly_over_a_batch():
  # 250 000 values are more than twice 100 000: each third of them.
  sample = calibration._some(np.arange(250_000).reshape(50, 5000))
  assert sample[:3].tolist() == [0, 3, 6]
  assert sample[-1] == 249_999
  assert len(calibration._some(np.arange(100_000))) == 100_000
