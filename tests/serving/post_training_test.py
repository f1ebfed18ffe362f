"""Formats for a trained network, without any training."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax import serving
from fliqs_jax.program import searchable as searchable_lib
from fliqs_jax.serving import export_model
from fliqs_jax.serving import post_training
from fliqs_jax.space import quant_spec
from tests import helpers

SPEC = quant_spec.QuantSpec(('INT2', 'INT4', 'INT8'))
# The outputs depend on `fine` by eight orders more than on `coarse`.
PARAMS = dict(
  fine=dict(w=helpers.random((8, 3), seed=1)),
  coarse=dict(w=helpers.random((8, 3), seed=2)),
)
X = helpers.random((16, 8), seed=3)
BATCHES = [dict(x=X), dict(x=X + 1)]


def f(params, x):
  return x @ params['fine']['w'] + 1e-8 * (x @ params['coarse']['w'])


def test_bits_go_where_the_outputs_depend_on_them(tmp_path):
  # Both products have 24 MACs. Uniform INT4 costs 2 * 24 * 16; 64 + 4 of 2 * 16
  # is 2.125 times that, and leaves INT8 to one product only.
  found = post_training.allocate(f, PARAMS, BATCHES, 2.125, spec=SPEC)
  assert found.space.assignment(found.choices) == {
    'fine': ('INT8', 'INT8'),
    'coarse': ('INT2', 'INT2'),
  }
  np.testing.assert_allclose(found.cost, (64 + 4) * 24 / 1e9, rtol=1e-6)
  np.testing.assert_allclose(found.target, found.cost, rtol=1e-6)
  # Its activations have thresholds: two batches were seen.
  assert int(found.variables['quant_stats']['fine']['count']) == 2
  export_model.export_model(
    found.model, found.variables, found.choices, X, out=tmp_path / 'served'
  )
  outputs = serving.load(tmp_path / 'served')(X)
  error = jnp.linalg.norm(outputs - f(PARAMS, X))
  assert error < 0.05 * jnp.linalg.norm(f(PARAMS, X))


def test_a_loss_may_score_instead_of_the_outputs():
  def loss(outputs, batch):
    value = jnp.mean((outputs - f(PARAMS, batch['x'])) ** 2)
    return value, {}

  model = searchable_lib.searchable(f, SPEC, params=PARAMS)
  found = post_training.allocate(
    model, dict(params=PARAMS), BATCHES, 2.125, loss=loss
  )
  assert found.space.assignment(found.choices)['fine'] == ('INT8', 'INT8')
  assert found.scores['fine'][0] > found.scores['coarse'][0]


def test_wrong_arguments_are_named():
  for target in (0, math.nan, math.inf):
    with pytest.raises(ValueError, match=f'target={target} must be a finite'):
      post_training.allocate(f, PARAMS, BATCHES, target, spec=SPEC)
  with pytest.raises(ValueError, match='at least one batch'):
    post_training.allocate(f, PARAMS, [], 1.5, spec=SPEC)
  model = searchable_lib.searchable(f, SPEC, params=PARAMS)
  with pytest.raises(ValueError, match='has its own'):
    post_training.allocate(model, dict(params=PARAMS), BATCHES, 1, spec=SPEC)
  with pytest.raises(ValueError, match='cheapest|lowest'):
    post_training.allocate(model, dict(params=PARAMS), BATCHES, 0.01)


def test_the_network_does_not_change():
  found = post_training.allocate(f, PARAMS, BATCHES, 4, spec=SPEC)
  helpers.same(found.variables['params'], PARAMS)
  assert 'arch' not in found.variables
  assert jax.tree.structure(found.variables['params']) == jax.tree.structure(
    PARAMS
  )
