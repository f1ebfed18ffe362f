"""The differentiable controller: each update by hand, and a whole search."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.search import policy as policy_lib
from fliqs_jax.search import schedules
from fliqs_jax.search.controllers import relaxed

PHASES = schedules.Phases(steps=10, act_start=0, search_start=2, freeze=8)
KEY = jax.random.key(0)


def _relative_cost(choices):
  return jnp.sum(choices['a'] * jnp.asarray([0.5, 2.0]))


def _controller(phases=PHASES, rate=0.1):
  return relaxed.controller(_relative_cost, phases, learning_rate=rate)


def _update(state, gradient, step):
  controller = _controller()
  gradient = {'a': jnp.asarray(gradient)}
  mixtures = controller.propose(state, KEY, step)
  return controller.update(state, mixtures, gradient, jnp.int32(step))


def test_it_asks_for_a_gradient_and_for_no_judgement():
  controller = _controller()
  assert (controller.judges, controller.differentiates) == (False, True)
  assert controller.samples == 1


def test_it_proposes_probabilities_and_after_the_freeze_their_argmax():
  controller = _controller()
  state = controller.init({'a': jnp.log(jnp.asarray([1.0, 3.0]))})
  for step, expected in [(0, [0.25, 0.75]), (7, [0.25, 0.75]), (8, [0, 1])]:
    proposed = controller.propose(state, KEY, jnp.int32(step))
    np.testing.assert_allclose(proposed['a'], [expected], rtol=1e-6)


@pytest.mark.parametrize('step', [1, 8])
def test_nothing_is_learnt_before_the_search_and_after_the_freeze(step):
  before = _controller().init({'a': jnp.zeros(2)})
  after, _ = _update(before, [1.0, -1.0], step)
  jax.tree.map(np.testing.assert_array_equal, after, before)


def test_logits_descend_the_loss_and_the_priced_cost():
  # At equal logits d p_k / d theta_j = p_k (1[k = j] - p_j) = +-1/4. The loss
  # falls by 1 for the second format: 1/4 of slope. Its cost is 1.5 C_T more; at
  # a price of 1 the slopes are 1/4 (-1 + 1.5) > 0, so it loses. Adam's first
  # step is the learning rate in the direction of the sign.
  state = _controller().init({'a': jnp.zeros(2)})
  cheap, metrics = _update(state, [0.0, -1.0], 2)
  np.testing.assert_allclose(cheap.policy['a'], [-0.1, 0.1], rtol=1e-4)
  dear, _ = _update(state.replace(price=jnp.ones(())), [0.0, -1.0], 2)
  np.testing.assert_allclose(dear.policy['a'], [0.1, -0.1], rtol=1e-4)
  # The cost is (0.5 + 2) / 2 = 1.25 C_T. In a search of 8 steps the price
  # rises by 0.5 / 8 of the excess.
  np.testing.assert_allclose(metrics['cost'], 1.25)
  np.testing.assert_allclose(metrics['price'], 0.25 * 0.5 / 8)


def test_the_price_falls_below_the_target_but_never_below_zero():
  state = _controller().init({'a': jnp.asarray([9.0, -9.0])})  # 0.5 C_T.
  state = state.replace(price=jnp.asarray(0.05))
  once, _ = _update(state, [0.0, 0.0], 3)
  np.testing.assert_allclose(once.price, 0.05 - 0.5 * 0.5 / 8, rtol=1e-5)
  twice, _ = _update(once, [0.0, 0.0], 3)
  assert twice.price == 0.0


def test_a_search_meets_its_target_with_what_matters_most():
  # Eight layers, each at 1/2 or 2 times its share of C_T. With n at 2 the cost
  # is (2 n + (8 - n) / 2) / 8: 0.875 for n = 2, 1.0625 for 3. Gains fall from
  # layer to layer.
  gains = jnp.asarray([80.0, 40.0, 20.0, 10.0, 5.0, 2.0, 1.0, 0.5]) / 2000
  names = [str(i) for i in range(8)]

  def relative_cost(choices):
    costs = jnp.asarray([0.5, 2.0]) / 8
    return sum(jnp.sum(choices[n] * costs) for n in names)

  phases = schedules.phases(800, 0.0, 0.1, 1.0)
  controller = relaxed.controller(relative_cost, phases, learning_rate=0.07)

  def one_step(state, step):
    mixtures = controller.propose(state, KEY, step)
    gradient = {n: jnp.asarray([0.0, -1.0]) * g for n, g in zip(names, gains)}
    return controller.update(state, mixtures, gradient, step)

  @jax.jit
  def search():
    state = controller.init({n: jnp.zeros(2) for n in names})
    return jax.lax.scan(one_step, state, jnp.arange(phases.steps))

  state, metrics = search()
  best = policy_lib.argmax(state.policy)
  precise = [bool(best[n][1]) for n in names]
  assert precise == sorted(precise, reverse=True)
  assert sum(precise) in (2, 3)
  assert 0.87 < metrics['cost'][-100:].mean() < 1.07
