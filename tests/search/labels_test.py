"""A label of several arrays: what a loss reads beside the target."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fliqs_jax.program import searchable as searchable_lib
from fliqs_jax.search import presets
from fliqs_jax.search import schedules
from fliqs_jax.search import sensitivity
from fliqs_jax.search import train_state
from fliqs_jax.search import train_step
from fliqs_jax.space import cost_model
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec


def _loss(outputs, batch):
  label = batch['label']
  errors = (outputs[:, 0] - label['target']) ** 2
  value = jnp.sum(label['weight'] * errors) / jnp.sum(label['weight'])
  return value, dict(loss=value)


def _quality(outputs, batch):
  return -_loss(outputs, batch)[0]


def _batch(weights):
  x = np.random.default_rng(0).standard_normal((16, 4), np.float32)
  return dict(image=x, label=dict(target=x.sum(axis=1), weight=weights))


def _step(preset):
  spec = quant_spec.QuantSpec(formats='int_s')
  model = searchable_lib.searchable(nn.Dense(1), spec)
  images = jnp.zeros((1, 4))
  space = discovery.find(model, images)
  cost = space.cost('bops')
  target = cost_model.uniform(cost, 'INT4')
  phases = schedules.phases(10, 0.0, 0.0, 1.0)
  search = presets.make(preset, space.relative_cost(cost, target), phases)
  optimizer = optax.sgd(0.1)
  state = train_state.create(
    model, space, optimizer, search, jax.random.key(0), images
  )
  step = train_step.search_step(
    model.apply, _loss, _quality, space, search, optimizer, phases
  )
  return jax.jit(step), state, model, space


@pytest.mark.parametrize('preset', ['paper', 'default'])
def test_a_step_takes_weights_of_examples(preset):
  step, state, *_ = _step(preset)

  def loss(weights):
    batch = _batch(np.asarray(weights, np.float32))
    return float(step(state, batch, batch)[1]['loss'])

  equal = loss(np.ones(16))
  assert loss(np.full(16, 2.0)) == pytest.approx(equal, rel=1e-6)
  assert loss(np.arange(16) % 2) != pytest.approx(equal, rel=1e-3)


def test_scores_take_weights_of_examples():
  _, state, model, space = _step('sensitivity')
  score = sensitivity.scorer(model.apply, sensitivity.loss(_loss), space)
  variables = {'params': state.params, **state.model_state}
  weights = np.zeros(16, np.float32)
  weights[:4] = 1
  found = score(variables, [_batch(weights)])
  few = jax.tree.map(lambda x: x[:4], _batch(weights))
  expected = score(variables, [few])
  np.testing.assert_allclose(found[''], expected[''], rtol=1e-5)
