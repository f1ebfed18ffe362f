"""The fused step, in numbers that a reader can check by hand.

The model is y = w x at INT4 and y = 3 w x at INT8, its loss the mean of y^2. On
the training batch 1, 2, 3, 4 the mean of x^2 is 30 / 4 = 7.5, so plain descent
at a rate of 0.1 gives w' = w - 0.2 w 7.5 = -w / 2 at INT4. Of the validation
batch 10, 20, 30, 40 two samples are judged on the rows 0 and 2.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fliqs_jax.numerics import formats
from fliqs_jax.program import searchable as searchable_lib
from fliqs_jax.search import controller as controller_lib
from fliqs_jax.search import optimizers
from fliqs_jax.search import presets
from fliqs_jax.search import schedules
from fliqs_jax.search import train_state
from fliqs_jax.search import train_step
from fliqs_jax.space import decisions as decisions_lib
from fliqs_jax.space import quant_spec
from fliqs_jax.space import search_space
from fliqs_jax.space import sizes

_INT4, _INT8 = [1.0, 0.0], [0.0, 1.0]
_TRAIN = dict(x=jnp.arange(1.0, 5.0), label=jnp.zeros(4))
# A label is the place of its row: who pairs images with the labels of other
# rows gets another sum.
_VALID = dict(x=jnp.arange(10.0, 50.0, 10.0), label=jnp.arange(4.0))
_MENU = (formats.parse('INT4'), formats.parse('INT8'))


def _space(*menu):
  """Returns the space of the one layer."""
  decision = decisions_lib.FormatDecision('layer', ('layer/format',), menu)
  return search_space.SearchSpace((decision,), (), ops=(), params=1)


_SPACE = _space(*_MENU)


class _Record(types.SimpleNamespace):
  """What the parts of a step were given; steps run without jit here."""

  def __init__(self):
    super().__init__(
      proposing=[], training=[], mixing=[], phases=[], updates=[]
    )

  def apply(self, variables, x, *, train, mutable=(), rngs=None):
    active = variables['quant_stats']['layer']['active']
    self.phases.append((train, bool(active)))
    factor = variables['arch']['layer']['format'] @ jnp.asarray([1.0, 3.0])
    y = factor * variables['params']['w'] * x
    if not train:
      assert not mutable
      return y
    assert mutable == ['quant_stats']
    self.training.append(_bits(rngs['dropout']))
    stats = variables['quant_stats']['layer']
    return y, {'quant_stats': {'layer': stats | {'seen': stats['seen'] + 1}}}

  def mix(self, key, batch):
    self.mixing.append(_bits(key))
    return batch

  def controller(self, proposals, **fields):
    """Returns a controller that proposes `proposals` [steps, 2, 2]."""

    def propose(state, key, step):
      self.proposing.append(_bits(key))
      return dict(layer=jnp.asarray(proposals[int(step)]))

    def update(state, archs, qualities, step):
      archs = np.asarray(archs['layer']).tolist()
      judged = None if qualities is None else np.asarray(qualities).tolist()
      self.updates.append((int(step), archs, judged))
      return state + 1, dict(entropy=jnp.asarray(0.5))

    return controller_lib.Controller(
      init=lambda logits: 0,
      propose=propose,
      update=update,
      samples=2,
      **fields,
    )


def _bits(key):
  return tuple(np.asarray(jax.random.key_data(key)).tolist())


def _loss(outputs, batch):
  value = jnp.mean(outputs**2)
  return value, dict(loss=value)


def _quality(outputs, batch):
  return jnp.sum(outputs + batch['label'])


_STATS = {'quant_stats': {'layer': dict(active=jnp.asarray(True), seen=0)}}


def _steps(
  proposals,
  *,
  apply=None,
  model_state=_STATS,
  space=_SPACE,
  ema_decay=0.15,
  keep_average=True,
  accumulate=1,
  train=_TRAIN,
  valid=_VALID,
  **fields,
):
  """Takes a step for each proposal, the first two in phase one.

  Returns what the parts were given, the states, the first among them, and the
  metrics.
  """
  record = _Record()
  optimizer = optax.sgd(0.1)
  step = train_step.search_step(
    apply or record.apply,
    _loss,
    _quality,
    space,
    record.controller(proposals, **fields),
    optimizer,
    schedules.Phases(steps=4, act_start=2, search_start=2, freeze=4),
    mix=record.mix,
    ema_decay=ema_decay,
    accumulate=accumulate,
  )
  params = {'w': jnp.asarray(1.0)}
  state = train_state.TrainState(
    step=jnp.asarray(0),
    params=params,
    average=params if keep_average else {},
    opt_state=optimizer.init(params),
    model_state=model_state,
    search_state=0,
    key=jax.random.key(7),
  )
  states, metrics = [state], []
  for _ in proposals:
    state, new = step(state, train, valid)
    states.append(state)
    metrics.append(new)
  return record, states, metrics


@pytest.fixture(scope='module', name='four')
def _four():
  # What comes first is what the weights learn from: INT4 at each step. The
  # third step proposes it twice, so that the samples do not agree by place.
  int4_int8, int4_int4 = [_INT4, _INT8], [_INT4, _INT4]
  return _steps([int4_int8, int4_int8, int4_int4, int4_int8])


def _values(states, name):
  return [float(getattr(state, name)['w']) for state in states]


def test_weights_descend_the_loss_of_the_training_batch(four):
  _, states, metrics = four
  # w' = w - 0.2 w mean(x^2) = w - 1.5 w, from 1.
  weights = [1.0, -0.5, 0.25, -0.125, 0.0625]
  np.testing.assert_allclose(_values(states, 'params'), weights, rtol=1e-6)
  # Of the weights before the step: 7.5 w^2, and its slope |15 w|.
  before = np.asarray(weights[:-1])
  np.testing.assert_allclose(
    [m['loss'] for m in metrics], 7.5 * before**2, rtol=1e-6
  )
  np.testing.assert_allclose(
    [m['grad_norm'] for m in metrics], 15 * abs(before), rtol=1e-6
  )


def test_weights_learn_with_the_first_of_the_proposed_architectures():
  # y = 3 w x at INT8: w' = w - 0.2 9 w 7.5 = -12.5 w.
  _, states, _ = _steps([[_INT8, _INT4], [_INT4, _INT8]])
  np.testing.assert_allclose(
    _values(states, 'params'), [1.0, -12.5, 6.25], rtol=1e-6
  )


def test_weights_warm_up_at_the_dearest_formats():
  # Of INT4 at each step: -12.5 times at INT8 in the two steps before the
  # search, -1/2 times after.
  _, states, _ = _steps(
    [[_INT4, _INT8], [_INT4, _INT8], [_INT4, _INT8]], warm_up='dearest_formats'
  )
  np.testing.assert_allclose(
    _values(states, 'params'), [1.0, -12.5, 156.25, -78.125], rtol=1e-6
  )


@pytest.mark.parametrize(
  ('warm_up', 'weights'),
  [('dearest', [1.0, -12.5, 156.25]), ('dearest_formats', [1.0, -0.5, 0.25])],
)
def test_sizes_warm_up_at_the_largest_or_as_proposed(warm_up, weights):
  # The model triples at the second of two sizes, the larger one.
  channels = sizes.Channels('layer/channels', (2, 4), (2, 4))
  decision = decisions_lib.SizeDecision('layer', ('layer/format',), channels)
  space = search_space.SearchSpace((), (decision,), ops=(), params=1)
  _, states, _ = _steps(
    [[_INT4, _INT8], [_INT4, _INT8]], space=space, warm_up=warm_up
  )
  np.testing.assert_allclose(_values(states, 'params'), weights, rtol=1e-6)


def test_a_controller_that_judges_nothing_gets_no_qualities():
  record, states, _ = _steps([[_INT4, _INT8]], judges=False)
  assert record.updates == [(0, [_INT4, _INT8], None)]
  assert [train for train, _ in record.phases] == [True]
  np.testing.assert_allclose(_values(states, 'params'), [1.0, -0.5])


def test_new_weights_are_judged_on_the_same_rows_for_every_architecture(four):
  record, _, metrics = four
  # sum(k w' x + n) on the rows 0 and 2: k w' (10 + 30) + (0 + 2), with w' of
  # the weights after the step.
  assert record.updates == [
    (0, [_INT4, _INT8], [-18.0, -58.0]),  # w' = -1/2: 2 - 20, 2 - 60.
    (1, [_INT4, _INT8], [12.0, 32.0]),  # w' = 1/4: 2 + 10, 2 + 30.
    (2, [_INT4, _INT4], [-3.0, -3.0]),  # w' = -1/8: 2 - 5.
    (3, [_INT4, _INT8], [4.5, 9.5]),  # w' = 1/16: 2 + 2.5, 2 + 7.5.
  ]
  assert [float(m['entropy']) for m in metrics] == [0.5] * 4


def test_qualities_belong_to_their_architectures_in_any_order():
  record, _, _ = _steps([[_INT8, _INT4]])
  # w' = -12.5: 2 - 3 500 at INT8, 2 - 500 at INT4.
  assert record.updates == [(0, [_INT8, _INT4], [-1498.0, -498.0])]


def test_the_controller_s_state_is_its_own(four):
  _, states, _ = four
  assert [state.search_state for state in states] == [0, 1, 2, 3, 4]


def test_the_mean_of_the_weights_holds_the_new_ones(four):
  _, states, _ = four
  # d avg + (1 - d) w', where d is (1 + step) / (10 + step) until that exceeds
  # 0.15: 1/10 at step 0, 2/11 = 0.18 at step 1.
  first = 0.1 * 1.0 + 0.9 * -0.5  # -0.35
  second = 0.15 * first + 0.85 * 0.25  # 0.16
  third = 0.15 * second + 0.85 * -0.125  # -0.08225
  fourth = 0.15 * third + 0.85 * 0.0625  # 0.0407875
  np.testing.assert_allclose(
    _values(states, 'average'), [1.0, first, second, third, fourth], rtol=1e-5
  )


@pytest.mark.parametrize(('decay', 'kept'), [(0.9, False), (0.0, True)])
def test_a_decay_and_a_mean_of_the_weights_need_each_other(decay, kept):
  message = f'ema_decay={decay}, but .* with keep_average={kept}'
  with pytest.raises(ValueError, match=message):
    _steps([[_INT4, _INT8]], ema_decay=decay, keep_average=kept)


@pytest.mark.parametrize('decay', [-0.1, 1.0, 2.0])
def test_a_decay_that_is_none_is_refused(decay):
  with pytest.raises(ValueError, match='must be from 0, for no m'):
    _steps([], ema_decay=decay)


def test_phase_one_begins_at_the_first_step_and_ends_at_act_start(four):
  record, states, _ = four
  # A step trains once and judges in a loop, both in the same phase.
  steps = [record.phases[i : i + 2] for i in range(0, 8, 2)]
  assert steps == [
    [(True, active), (False, active)] for active in (False, False, True, True)
  ]
  # Every step trains on the statistics that the one before left.
  seen = [s.model_state['quant_stats']['layer']['seen'] for s in states]
  assert seen == [0, 1, 2, 3, 4]


def test_every_step_and_each_of_its_draws_has_a_key_of_its_own(four):
  record, states, _ = four
  keys = record.proposing + record.training + record.mixing
  assert len(keys) == len(set(keys)) == 3 * 4
  # Resumed runs repeat them: the key of the run stays as it is.
  assert {_bits(state.key) for state in states} == {_bits(jax.random.key(7))}
  assert [int(state.step) for state in states] == [0, 1, 2, 3, 4]


def test_the_same_state_draws_the_same_keys_again(four):
  again, _, _ = _steps([[_INT4, _INT8]])
  record, _, _ = four
  assert again.proposing == record.proposing[:1]
  assert again.training == record.training[:1]
  assert again.mixing == record.mixing[:1]


def test_accumulated_parts_are_averaged_and_draw_keys_of_their_own():
  # Parts are the rows 0, 2 and 1, 3: (1 + 9) / 2 and (4 + 16) / 2, on average
  # 7.5. The loop of the parts is traced, so the model records nothing.
  def apply(variables, x, *, train, mutable=(), rngs=None):
    y = variables['params']['w'] * x
    if not train:
      return y
    draw = jax.random.uniform(rngs['dropout'])
    seen = variables['quant_stats']['draws']
    return y, {'quant_stats': {'draws': jnp.roll(seen, 1).at[0].set(draw)}}

  _, (_, state), (metrics,) = _steps(
    [[_INT4, _INT8]],
    apply=apply,
    model_state={'quant_stats': {'draws': jnp.zeros(2)}},
    accumulate=2,
  )
  np.testing.assert_allclose(state.params['w'], -0.5, rtol=1e-6)
  np.testing.assert_allclose(metrics['loss'], 7.5, rtol=1e-6)
  first, second = np.asarray(state.model_state['quant_stats']['draws'])
  assert 0 < first != second > 0


@pytest.mark.parametrize('accumulate', [0, 3])
def test_a_batch_without_so_many_parts_is_refused(accumulate):
  with pytest.raises(ValueError, match='of 4 examples has no [03] equal parts'):
    _steps([[_INT4, _INT8]], accumulate=accumulate)


def test_one_value_for_all_examples_has_no_parts():
  train = dict(_TRAIN, example_mask=jnp.float32(1))
  message = r"into 2 parts, because \['example_mask'\] is one value"
  with pytest.raises(ValueError, match=message):
    _steps([[_INT4, _INT8]], accumulate=2, train=train)
  # One architecture is judged on the whole batch: -0.5 * 100 + 0 + 1 + 2 + 3.
  record, _, _ = _steps(
    [[_INT4]], valid=dict(_VALID, example_mask=jnp.float32(1))
  )
  assert record.updates == [(0, [_INT4], [-44])]


def test_a_model_without_mixtures_is_refused_by_who_learns_from_them():
  def step(mix):
    model = searchable_lib.searchable(
      lambda params, x: x @ params['w'],
      quant_spec.QuantSpec('int_s', mix=mix),
      params=dict(w=jnp.ones((3, 2))),
    )
    phases = schedules.Phases(steps=4, act_start=0, search_start=0, freeze=3)
    controller = presets.make('edmips', lambda choices: 1.0, phases)
    return train_step.search_step(
      model.apply, _loss, _quality, _SPACE, controller, optax.sgd(0.1), phases
    )

  step('composite')
  with pytest.raises(
    ValueError, match="mix='sampled': give it mix='composite'"
  ):
    step('sampled')


def test_a_space_with_nothing_open_is_not_judged():
  record, states, metrics = _steps([[_INT4, _INT4]], space=_space(_MENU[0]))
  assert record.updates == []
  assert record.phases == [(True, False)]
  assert 'entropy' not in metrics[0]
  assert states[1].search_state == 0


def test_evaluation_measures_the_given_weights_without_training():
  record = _Record()
  step = train_step.eval_step(
    record.apply, lambda outputs, batch: jnp.sum(outputs * batch['label'])
  )
  arch = _SPACE.expand(dict(layer=jnp.asarray(_INT8)))
  # 3 w x n = 3 2 (20 1 + 30 2 + 40 3).
  assert step({'w': 2.0}, _STATS, arch, _VALID) == 1200.0
  assert record.phases == [(False, True)]


def test_settling_moves_statistics_and_nothing_else():
  record = _Record()
  step = train_step.settle_step(record.apply)
  arch = _SPACE.expand(dict(layer=jnp.asarray(_INT8)))
  moved = step({'w': 2.0}, _STATS, arch, _TRAIN, jax.random.key(1))
  assert moved == {'quant_stats': {'layer': dict(active=True, seen=1)}}
  assert record.training == [_bits(jax.random.key(1))]


def _created(keep_average=False, **variables):
  """Returns the state before the first step of a model with these variables."""
  return train_state.create(
    types.SimpleNamespace(init=lambda key: variables),
    _SPACE,
    optax.sgd(1.0),
    types.SimpleNamespace(init=lambda logits: logits),
    jax.random.key(0),
    keep_average=keep_average,
  )


@pytest.mark.parametrize(
  ('how', 'average'), [({}, {}), (dict(keep_average=True), {'w': 2.0})]
)
def test_a_state_has_a_mean_of_the_weights_if_it_is_asked_for(how, average):
  one = jnp.ones(())
  state = _created(
    params={'w': 2 * one},
    quant_stats={'n': one},
    arch={},
    cost={},
    sizes={},
    **how,
  )
  assert state.step == 0
  assert state.average == average
  assert state.served_params == {'w': 2.0}
  # Architectures, costs and sizes do not change: they are not stored.
  assert state.model_state == {'quant_stats': {'n': 1.0}}
  assert state.search_state['layer'].tolist() == [0.0, 0.0]


def test_a_mean_of_bfloat16_moves_and_is_served_in_it():
  # Steps of a thousandth of 1 are rounded away in bfloat16.
  ones, threes = jnp.ones((), jnp.bfloat16), jnp.full((), 3.0, jnp.bfloat16)
  state = _created(params=ones, keep_average=True)
  mean = state.average
  for step in range(20_000, 21_000):
    mean = optimizers.averaged(mean, threes, 0.999, step)
  # 3 - 2 x .999^1000.
  np.testing.assert_allclose(mean, 3 - 2 * 0.999**1000, rtol=1e-4)
  served = dataclasses.replace(state, average=mean).served_params
  assert (served.dtype, served) == (jnp.bfloat16, jnp.bfloat16(mean))


def test_a_controller_that_differentiates_gets_the_slope_of_the_loss():
  record, states, _ = _steps(
    [[[0.5, 0.5], [0.5, 0.5]]], judges=False, differentiates=True
  )
  ((step, _, slope),) = record.updates
  # y = p [1, 3] w x = 2 x at w = 1. The loss is the mean of y^2, its slope that
  # of 2 y [1, 3] x = 4 x^2 [1, 3]: 30 and 90. Nothing is judged.
  assert step == 0
  np.testing.assert_allclose(slope['layer'], [30.0, 90.0], rtol=1e-6)
  assert record.phases == [(True, False)]
  # w' = 1 - 0.1 x 2 x 2^2 x 7.5 = -5.
  np.testing.assert_allclose(_values(states, 'params'), [1.0, -5.0], rtol=1e-6)
