"""Optimizers of the weights, against the recipes they come from."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fliqs_jax.search import optimizers
from fliqs_jax.search import schedules


def _walk(optimizer, gradients, kernel=1.0, bias=1.0):
  """Returns the kernel [1, 1] and the bias [1] after each gradient of both."""
  params = {'kernel': jnp.full((1, 1), kernel), 'bias': jnp.full(1, bias)}
  state = optimizer.init(params)
  for g in gradients:
    updates, state = optimizer.update(
      {'kernel': jnp.full((1, 1), g), 'bias': jnp.full(1, g)}, state, params
    )
    params = {k: params[k] + updates[k] for k in params}
    yield float(params['kernel'][0, 0]), float(params['bias'][0])


def test_rmsprop_is_tensorflow_s():
  # TF: ms = .9 ms + .1 g^2, from 1; mom = m mom + lr g / sqrt(ms + 1e-3).
  ms, momentum, expected, value = 1.0, 0.0, [], 1.0
  for g in (3.0, -1.0, 0.5):
    ms = 0.9 * ms + 0.1 * g**2
    momentum = 0.8 * momentum + 0.1 * g / np.sqrt(ms + 1e-3)
    value -= momentum
    expected.append(value)
  rmsprop = optimizers.make('rmsprop', lambda step: 0.1, 0.8, 0.0)
  found = [bias for _, bias in _walk(rmsprop, (3.0, -1.0, 0.5))]
  np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize('name', tuple(optimizers.OPTIMIZERS))
def test_weight_decay_is_for_kernels_alone(name):
  # Without a gradient only decay moves anything.
  optimizer = optimizers.make(name, lambda step: 0.1, 0.9, 0.5)
  *_, (kernel, bias) = _walk(optimizer, (0.0, 0.0))
  assert kernel < 1
  assert bias == 1


def test_adamw_decays_apart_from_the_gradient():
  # Decoupled: 1 - lr * wd = 0.95, where Adam would have divided wd away.
  adamw = optimizers.make('adamw', lambda step: 0.1, 0.9, 0.5)
  (kernel, _), *_ = _walk(adamw, (0.0,))
  assert kernel == pytest.approx(0.95)


def test_sgd_has_heavy_ball_momentum():
  # Steps of 0.1 * 1 and 0.1 * (1 + 0.9).
  sgd = optimizers.make('sgd', lambda step: 0.1, 0.9, 0.0)
  found = [bias for _, bias in _walk(sgd, (1.0, 1.0))]
  np.testing.assert_allclose(found, [0.9, 0.9 - 0.19], rtol=1e-6)


def test_an_unknown_optimizer_is_an_error():
  with pytest.raises(ValueError, match="'lion' is unknown; allowed: sgd, rms"):
    optimizers.make('lion', lambda step: 0.1, 0.9, 0.0)


def test_the_mean_of_the_weights_forgets_fast_at_first():
  def mean(step):
    return float(optimizers.averaged(jnp.zeros(()), jnp.ones(()), 0.999, step))

  # Decays of (1 + n) / (10 + n): 1/10, 11/20; then of 0.999.
  assert mean(0) == pytest.approx(0.9)
  assert mean(10) == pytest.approx(0.45)
  assert mean(100_000) == pytest.approx(0.001, rel=1e-3)


def test_the_exponential_schedule_has_150_stairs_after_the_warm_up():
  rate = schedules.learning_rate('exponential', 1.0, 3000, 100)
  # Linear to step 100; then a stair of 0.97 each 3000 / 150 = 20 steps.
  found = [float(rate(s)) for s in (0, 50, 100, 119, 120, 139, 140)]
  expected = [0, 0.5, 1, 1, 0.97, 0.97, 0.97**2]
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def _updated(optimizer, value):
  params = dict(w=jnp.ones(()))
  return optimizers.updated(
    optimizer, params, optimizer.init(params), params, jnp.asarray(value)
  )[0]['w']


def test_an_optimizer_may_adapt_to_the_loss():
  # Polyak's step is the loss over the gradient's square: 1 - 0.25 x 1.
  polyak = optax.polyak_sgd(max_learning_rate=1.0)
  np.testing.assert_allclose(_updated(polyak, 0.25), 0.75, rtol=1e-5)
  assert _updated(optax.sgd(0.5), 0.25) == 0.5


def test_a_line_search_is_refused():
  with pytest.raises(ValueError, match="'value_fn'; use one without a line s"):
    _updated(optax.lbfgs(), 0.25)
