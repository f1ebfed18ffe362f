"""Scores worked out by hand, and the step of the preset that uses them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.numerics import formats
from fliqs_jax.search import controller as controller_lib
from fliqs_jax.search import schedules
from fliqs_jax.search import sensitivity
from fliqs_jax.search.controllers import scored
from fliqs_jax.space import decisions as decisions_lib
from fliqs_jax.space import search_space
from fliqs_jax.space import sizes as sizes_lib


def _space(*names):
  """Returns a space of two layers, each with a menu of the named formats."""
  menu = tuple(map(formats.parse, names))
  return search_space.SearchSpace(
    tuple(
      decisions_lib.FormatDecision(name, (f'{name}/format',), menu)
      for name in ('first', 'second')
    ),
    (),
    ops=(),
    params=1,
  )


_SPACE = _space('INT2', 'INT4', 'INT8')


def _apply(variables, x, *, train):
  """y = w x times a number for each format of either layer."""
  assert not train
  arch = variables['arch']
  first = arch['first']['format'] @ jnp.asarray([3.0, 2.0, 1.0])
  second = arch['second']['format'] @ jnp.asarray([5.0, 1.0, 1.0])
  return variables['params']['w'] * x * first * second


def _loss(outputs, batch):
  return jnp.mean(outputs * batch['label']), {}


_BATCHES = (
  dict(x=jnp.asarray([1.0, 3.0]), label=jnp.asarray([1.0, -1.0])),
  dict(x=jnp.asarray([2.0, 2.0]), label=jnp.asarray([1.0, 1.0])),
)


def _scores(metric):
  score = sensitivity.scorer(_apply, metric, _SPACE)
  return score({'params': {'w': jnp.asarray(2.0)}}, _BATCHES)


def test_loss_is_the_mean_rise_against_the_dearest():
  # At the dearest formats y = 2 x, and the mean losses are (2 - 6) / 2 = -2 and
  # 4. Twice y changes them by -2 and 4, thrice by -4 and 8, five times by -8
  # and 16.
  scores = _scores(sensitivity.loss(_loss))
  np.testing.assert_allclose(scores['first'], [2.0, 1.0, 0.0])
  np.testing.assert_allclose(scores['second'], [4.0, 0.0, 0.0])


def test_fisher_is_half_the_mean_square_of_an_examples_change():
  # Losses of examples at the dearest: 2, -6; 4, 4. Twice y changes them by as
  # much: half the mean square is (4 + 36) / 4 = 10 and (16 + 16) / 4 = 8.
  # Thrice y: four times that; five times: sixteen times that.
  scores = _scores(sensitivity.fisher(_loss))
  np.testing.assert_allclose(scores['first'], [36.0, 9.0, 0.0])
  np.testing.assert_allclose(scores['second'], [144.0, 0.0, 0.0])


def test_kl_is_between_softmax_outputs():
  logits, dearest = jnp.log(jnp.asarray([[0.25, 0.75]])), jnp.zeros((1, 2))
  # 1/2 ln(2) + 1/2 ln(2/3) = 1/2 ln(4/3).
  np.testing.assert_allclose(
    sensitivity.kl(_loss)(logits, dearest, None), np.log(4 / 3) / 2, rtol=1e-6
  )
  assert sensitivity.kl(_loss)(dearest, dearest, None) == 0


def test_what_only_noise_explains_is_taken_out_of_scores():
  # INT4 is no worse than INT2, INT8 no worse than INT4; nothing is below zero.
  raw = {
    'first': np.asarray([2.0, 3.0, 0.0]),
    'second': np.asarray([4.0, -1.0, 0.0]),
  }
  regular, count = sensitivity.regular(_SPACE, raw)
  assert count == 1
  np.testing.assert_array_equal(regular['first'], [2.0, 2.0, 0.0])
  np.testing.assert_array_equal(regular['second'], [4.0, 0.0, 0.0])


def test_networks_are_compared_with_a_reference():
  # The reference gives 4 x, with losses of examples 4, -12; 8, 8. The dearest
  # formats give 2 x: half the mean square of the differences is (4 + 36) / 4
  # and (16 + 16) / 4, 9 in the mean. 4 x differs by nothing, 6 x as 2 x does,
  # and 10 x three times as much.
  def reference(variables, x, *, train):
    assert not train
    return 2 * variables['params']['w'] * x

  score = sensitivity.scorer(
    _apply, sensitivity.fisher(_loss), _SPACE, reference=reference
  )
  scores = score({'params': {'w': jnp.asarray(2.0)}}, _BATCHES)
  np.testing.assert_allclose(scores['first'], [0.0, -9.0, 0.0])
  np.testing.assert_allclose(scores['second'], [72.0, 0.0, 0.0])


def test_decisions_leave_the_best_single_strategy():
  space = _space('INT4:kl', 'INT8:max_abs', 'INT8:kl')

  def apply(variables, x, *, train):
    assert not train
    y = variables['params']['w'] * x
    for layer in variables['arch'].values():
      y = y * (layer['format'] @ jnp.asarray([3.0, 2.0, 1.0]))
    return y

  score = sensitivity.scorer(
    apply,
    sensitivity.fisher(_loss),
    space,
    reference=lambda variables, x, *, train: variables['params']['w'] * x,
  )
  scores = score({'params': {'w': jnp.asarray(2.0)}}, _BATCHES)
  # With kl alone the network is the reference. Twice its outputs are 9 away,
  # as above, thrice four times that; from max_abs they would be 81 away.
  for name in ('first', 'second'):
    np.testing.assert_allclose(scores[name], [36.0, 9.0, 0.0])


def test_the_best_of_equally_precise_options_is_at_zero():
  names = ('INT4:max_abs', 'INT8:max_abs', 'INT8:kl', 'INT8:admm')
  menu = tuple(map(formats.parse, names))
  decision = decisions_lib.FormatDecision('layer', ('layer/format',), menu)
  space = search_space.SearchSpace((decision,), (), ops=(), params=1)
  # INT4 is better than the anchor, the first of INT8, but not than its best.
  regular, count = sensitivity.regular(
    space, {'layer': np.asarray([-0.5, 0.0, -2.0, 1.0])}
  )
  assert count == 0
  np.testing.assert_array_equal(regular['layer'], [1.5, 1.5, 0.0, 1.5])


def test_sizes_are_judged_with_the_statistics_of_the_batch():
  channels = sizes_lib.Channels('net/channels', (2, 4), (2, 4))
  space = search_space.SearchSpace(
    (),
    (decisions_lib.SizeDecision('net/channels', ('net/width',), channels),),
    ops=(),
    params=1,
  )

  def apply(variables, x, *, train, mutable=(), rngs=None):
    y = x * (variables['arch']['net']['width'] @ jnp.asarray([2.0, 4.0]))
    stats = variables['batch_stats']
    if not train:
      return y / stats['scale']
    assert mutable == ['batch_stats']
    return y / jnp.mean(y), {'batch_stats': stats}

  score = sensitivity.scorer(apply, sensitivity.loss(_loss), space)
  variables = {'params': {}, 'batch_stats': {'scale': 3.0}}
  # Each width has its own mean, so that both networks give 0.5 and 1.5. With
  # the running mean the outputs of the narrow one would be half as large.
  scores = score(variables, _BATCHES[:1])
  np.testing.assert_allclose(scores['net/channels'], [0.0, 0.0], atol=1e-7)


def test_a_network_is_judged_when_the_one_before_has_ended():
  # Dozens of programs that sum over devices deadlock on a CPU.
  started, ended = [], []

  def slow(variables, x, *, train):
    y = _apply(variables, x, train=train)
    return y + 0.0 * jnp.sum(jax.lax.map(jnp.tanh, jnp.full((300_000,), y[0])))

  def jit(function):
    compiled = jax.jit(function)

    def call(*args):
      ended.extend(value.is_ready() for value in started[-1:])
      started.extend(jax.tree.leaves(result := compiled(*args)))
      return result

    return call

  score = sensitivity.scorer(slow, sensitivity.loss(_loss), _SPACE, jit)
  scores = score({'params': {'w': jnp.asarray(2.0)}}, _BATCHES)
  np.testing.assert_allclose(scores['first'], [2.0, 1.0, 0.0])
  assert len(ended) > 10
  assert np.mean(ended) > 0.8  # Not the zeros with which a batch begins.


def test_no_batch_is_an_error():
  score = sensitivity.scorer(_apply, sensitivity.loss(_loss), _SPACE)
  with pytest.raises(ValueError, match='at least one batch'):
    score({}, [])


def test_the_controller_keeps_to_what_was_allocated():
  phases = schedules.Phases(steps=8, act_start=0, search_start=2, freeze=6)

  def relative_cost(tree):
    return sum(a @ jnp.arange(1.0, 4.0) for a in tree.values())

  controller = scored.controller(relative_cost, phases)
  assert not controller.judges
  choices = _SPACE.at({'first': 1, 'second': 0})
  state = scored.allocated(choices, choices)
  for step in (2, 7):
    proposed = controller.propose(state, jax.random.key(0), jnp.asarray(step))
    jax.tree.map(
      lambda p, c: np.testing.assert_array_equal(p, c[None]), proposed, choices
    )
  after, metrics = controller.update(state, proposed, None, jnp.asarray(7))
  assert after is state
  np.testing.assert_allclose(metrics['cost'], 2 + 1, rtol=1e-6)
  assert metrics['entropy'] < 1e-6


def test_without_an_allocation_no_option_is_picked():
  # A layer that reads such a leaf gives NaN, so the loss shows it.
  phases = schedules.Phases(steps=8, act_start=0, search_start=2, freeze=6)
  controller = scored.controller(lambda tree: jnp.ones(()), phases)
  state = controller.init(_SPACE.zeros())
  proposed = controller.propose(state, jax.random.key(0), jnp.asarray(2))
  assert all(not leaf.any() for leaf in jax.tree.leaves(proposed))
  # A network with fixed formats needs no allocation.
  state = controller.init({'fixed': jnp.zeros(1)})
  proposed = controller.propose(state, jax.random.key(0), jnp.asarray(2))
  np.testing.assert_array_equal(proposed['fixed'], [[1.0]])


@pytest.mark.parametrize(
  ('count', 'steps'), [(0, ()), (1, (10,)), (2, (10, 30)), (3, (10, 20, 30))]
)
def test_scorings_are_evenly_spaced_from_the_start_to_the_freeze(count, steps):
  phases = schedules.Phases(steps=40, act_start=0, search_start=10, freeze=30)
  assert phases.scorings(count) == steps


def test_metrics_are_of_the_interface():
  assert set(sensitivity.METRICS) == {'loss', 'fisher', 'kl'}
  assert controller_lib.Controller._field_defaults['judges']
