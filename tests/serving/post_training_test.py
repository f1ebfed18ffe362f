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
  for target in (0, math.nan, math.inf, None):
    with pytest.raises(ValueError, match=f'target={target} must be a finite'):
      post_training.allocate(f, PARAMS, BATCHES, target, spec=SPEC)
  with pytest.raises(ValueError, match='at least one batch'):
    post_training.allocate(f, PARAMS, [], 1.5, spec=SPEC)
  model = searchable_lib.searchable(f, SPEC, params=PARAMS)
  with pytest.raises(ValueError, match='has its own'):
    post_training.allocate(model, dict(params=PARAMS), BATCHES, 1, spec=SPEC)
  with pytest.raises(ValueError, match='cheapest|lowest'):
    post_training.allocate(model, dict(params=PARAMS), BATCHES, 0.01)
  with pytest.raises(ValueError, match='target=nan must be a finite'):
    post_training.allocate(model, dict(params=PARAMS), BATCHES, np.nan)
  with pytest.raises(ValueError, match="have coarse, fine, but no 'params'"):
    post_training.allocate(model, PARAMS, BATCHES, 1.5)
  with pytest.raises(ValueError, match='a batch is a tuple; it must be a dict'):
    post_training.allocate(model, dict(params=PARAMS), [(X,)], 1.5)
  profiled = quant_spec.QuantSpec(act_clip='profiled')
  with pytest.raises(ValueError, match="'profiled': allocate profiles no"):
    post_training.allocate(f, PARAMS, BATCHES, 1.5, spec=profiled)


@pytest.mark.parametrize(
  ('batch', 'message'),
  [
    (dict(x=X.tolist()), "'x' holds float; give arrays"),
    (dict(x=X, label='abc'), "'label' holds str; give arrays"),
    (dict(x=X, name=np.array(['a', 'bc'])), "'name' holds <U2; give"),
  ],
)
def test_an_entry_of_a_batch_that_is_no_array_is_named(batch, message):
  with pytest.raises(ValueError, match=message):
    post_training.allocate(f, PARAMS, [BATCHES[0], batch], 1.5, spec=SPEC)


def test_leaves_that_are_no_floats_stay_as_they_are():
  extra = dict(PARAMS, steps=np.arange(3), act=jnp.tanh)
  plain = post_training.allocate(f, PARAMS, BATCHES, 1.5, spec=SPEC)
  model = searchable_lib.searchable(f, SPEC, params=extra)
  for found in (
    post_training.allocate(f, extra, BATCHES, 1.5, spec=SPEC),
    post_training.allocate(model, dict(params=extra), BATCHES, 1.5),
  ):
    helpers.same(found.scores['fine'], plain.scores['fine'])


def test_strategies_find_their_thresholds_before_they_are_scored():
  # At INT4 the step of max_abs is 100 / 7 = 14, so that all inputs but one,
  # between -1 and 1, are zero; their products are nearly all of the outputs,
  # since the weight of the large one is small.
  x = np.random.default_rng(0).uniform(-1, 1, (64, 16)).astype(np.float32)
  x[0, 0] = 100.0
  params = dict(w=helpers.random((16, 4), seed=4))
  params['w'][0] = 1e-3
  spec = quant_spec.QuantSpec(
    ('INT4',), mode='activations', strategies=('max_abs', 'kl')
  )
  found = post_training.allocate(
    lambda params, x: x @ params['w'],
    params,
    [dict(x=x)],
    1.0,
    spec=spec,
    relative_to='INT4',
  )
  (sides,) = found.space.assignment(found.choices).values()
  assert sides == (None, 'INT4:kl')
  max_abs, kl = found.variables['quant_stats']['w']['ratio']
  # A grid that keeps the distribution reaches about as far as the many.
  assert max_abs == 1
  assert 0.005 < kl < 0.05
  score, zero = found.scores['w']
  assert score > zero == 0


def test_the_network_does_not_change():
  found = post_training.allocate(f, PARAMS, BATCHES, 4, spec=SPEC)
  helpers.same(found.variables['params'], PARAMS)
  assert 'arch' not in found.variables
  assert jax.tree.structure(found.variables['params']) == jax.tree.structure(
    PARAMS
  )
