"""Several limits: what is served keeps all, and mistakes are named."""

import json

import jax
import numpy as np
import pytest

from configs import digits
import fliqs_jax as fliqs
from fliqs_jax.run import budgets
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import sensitivity_table
from fliqs_jax.run import train
from fliqs_jax.run.records import results
from fliqs_jax.space import allocation
from fliqs_jax.space import baselines
from fliqs_jax.space import cost_model
from tests import tiny
from tests.run import cases

# MACs of a ResNet-8 of 4, 8 and 16 channels on 8 x 8 pixels of one channel.
_MACS = 64 * 36 + 2 * 64 * 144  # Stem, and the stage of 8 x 8 pixels.
_MACS += 16 * (288 + 576 + 32) + 4 * (1152 + 2304 + 128) + 160


def _config(arg='', **cost):
  config = tiny.get_config(arg)
  with config.unlocked(), config.ignore_type():
    config.cost.update(cost)
  return config


@pytest.mark.parametrize(
  ('cost', 'message'),
  [
    (dict(caps=('size',)), "cost.caps='size': it must be KIND=NUMBER"),
    (dict(caps=('size=fast',)), "'size=fast': it must be KIND=NUMBER"),
    (dict(caps=('size=1xINT9',)), "unknown format 'INT9'"),
    (dict(caps=('watts=1',)), "'watts=1': cost.kind='watts' is unknown"),
    (dict(caps=('size=0',)), 'the limit must be a finite number above 0'),
    (dict(caps=('size=1e999',)), 'the limit must be a finite number above 0'),
    (dict(caps=('size=1..2',)), '1..2 is no number'),
    (dict(caps=('bops=2xINT4',)), 'bops is limited twice'),
    (dict(caps=('size=2xINT4',) * 2), 'size is limited twice'),
    (
      dict(caps=('size=.5xINT4',)),
      r"cost.caps='size=.5xINT4': it cannot be met: 0.00\d+ Mbit are "
      'allowed, and the cheapest network costs 0.00',
    ),
    (
      dict(caps=('latency:t4=9',)),
      "cost.caps='latency:t4=9': .*latency:t4 has no price of BF16",
    ),
    (dict(reported=('speed:t4',)), "cost.reported='speed:t4': .* no section"),
    (dict(kind='latency:t4'), "cost.kind='latency:t4': .* no price of BF16"),
    (dict(kind='latency:none'), "cost.kind='latency:none': .* no file none"),
    (dict(caps='size=2'), "cost.caps='size=2' must be a list of limits"),
  ],
)
def test_a_mistake_in_a_limit_is_named_before_training(cost, message):
  with pytest.raises(ValueError, match=message):
    experiment_lib.build(_config(**cost))


def test_limits_that_exclude_each_other_name_the_least_that_satisfies_all():
  space = cases.opposed()
  # What is cheap by one cost is dear by the other; see `cases.opposed`.
  keys = tiny.get_config().cost
  with keys.unlocked(), keys.ignore_type():
    keys.caps = (f'{cases.FLOATS_CHEAP}=1.1xE4M3', 'size=1.1xINT4')
  with pytest.raises(
    ValueError, match='cost.caps exclude each other'
  ) as caught:
    budgets.caps(keys, space)
  # With floats of 8 bits, which alone are cheap there, the size is E4M3's.
  size = cost_model.uniform(space.cost('size'), 'E4M3')
  assert f'the lowest size is {size:.6g} Mbit' in str(caught.value)
  with keys.unlocked():
    keys.update(caps=('size=1.1xINT4',), kind=cases.FLOATS_CHEAP)
    keys.update(relative_to='E4M3', target=1.2)
  caps = budgets.caps(keys, space)
  cost = space.cost(cases.FLOATS_CHEAP)
  within = min(
    float(cost(choices))
    for choices in cases.every(space)
    if caps[0].admits(choices)
  )
  with pytest.raises(ValueError, match='exclude each other') as caught:
    budgets.target(keys, cost, space, caps)
  assert f'within the caps costs {within:.6g}' in str(caught.value)


@pytest.mark.parametrize('chosen', [0, -1])
def test_budgets_of_a_found_network_are_those_of_its_search(tmp_path, chosen):
  caps = 'caps=size=1.5xINT4+energy:45nm=2xINT4'
  search = experiment_lib.build(digits.get_config(f'nas,{caps}'))
  assert search.target == pytest.approx(1.5 * 16 * _MACS / 1e9, rel=1e-6)
  # All formats and sizes are the cheapest, or the dearest.
  choices = search.space.at(
    {d.name: range(len(d.labels))[chosen] for d in search.space.decisions}
  )
  path = tmp_path / 'arch.json'
  path.write_text(json.dumps(results.arch(search, choices)))
  found = experiment_lib.build(digits.get_config(f'nas,arch={path},{caps}'))
  assert found.cost_of(found.space.only()) == pytest.approx(
    search.cost_of(choices), rel=1e-6
  )
  assert found.target == pytest.approx(search.target, rel=1e-6)
  limits = [[cap.target for cap in run.caps] for run in (found, search)]
  assert limits[0] == pytest.approx(limits[1], rel=1e-6)


@pytest.mark.parametrize('seed', range(8))
def test_no_way_to_choose_exceeds_a_limit(seed):
  config = _config(
    'space=int_l,target=1.6',
    caps=('size=1.3xINT4', 'energy:45nm=1.5xINT4'),
  )
  experiment = experiment_lib.build(config)
  space, rng = experiment.space, np.random.default_rng(seed)
  scores = {
    d.name: np.sort(rng.exponential(size=len(d.labels)))[::-1]
    for d in space.decisions
  }
  policy = {d.name: rng.normal(size=len(d.labels)) for d in space.decisions}
  limits = [
    allocation.Budget(experiment.cost, experiment.target),
    *experiment.caps,
  ]
  assert len(limits) == 3
  chosen = [
    experiment.allocate(scores),
    experiment.selected(policy),
    sensitivity_table.allocate(experiment, scores, 'greedy').choices,
    baselines.random_at_cost(
      space, experiment.cost, experiment.target, rng, experiment.caps
    ),
  ]
  for choices in chosen:
    assert all(limit.admits(choices) for limit in limits)
  # The exact solver is as good as the best of all that keep the limits.
  best = min(
    sum(float(scores[n] @ choices[n]) for n in scores)
    for choices in cases.every(space)
    if all(limit.admits(choices) for limit in limits)
  )
  total = sum(float(scores[n] @ chosen[0][n]) for n in scores)
  assert total == pytest.approx(best)


@pytest.mark.parametrize('preset', ['default', 'edmips'])
def test_a_run_keeps_its_limits_and_reports_them(preset, tmp_path):
  path = tmp_path / 'mine.yaml'
  path.write_text(cases.CHIP)
  config = _config(
    f'steps=12,preset={preset},target=2,space=int_l',
    caps=('size=1.2xINT4', 'energy:45nm=1.7xINT4'),
    reported=(f'latency:{path}',),
  )
  with config.unlocked():
    config.train.checkpoint_every = 5
  result = train.train_and_evaluate(config, tmp_path / preset)
  kinds = [row['kind'] for row in result['costs']]
  assert kinds == ['bops', 'size', 'energy:45nm', f'latency:{path}']
  for row in result['costs'][:3]:
    assert row['value'] <= row['limit'] * (1 + 1e-6)
    assert row['bound'] == 'at_most'
  assert result['costs'][3]['limit'] is None
  # That chip has no INT4 to INT7 and runs them as INT8, at the same cost.
  found = {row['path']: row['weights'] for row in result['layers']}
  for layer in result['costs'][3]['layers']:
    name = found[layer['path']]
    assert layer['weights'] == ('BF16' if name == 'BF16' else 'INT8')
    assert layer['gains'] == (name in ('INT8', 'BF16'))
  page = (tmp_path / preset / 'report.html').read_text()
  assert 'on My chip; it is not measured here' in page
  saved = json.loads((tmp_path / preset / 'result.json').read_text())
  assert saved['costs'] == result['costs']


def test_a_changed_file_of_a_chip_is_another_run(tmp_path):
  path = tmp_path / 'mine.yaml'
  path.write_text(cases.CHIP)
  config = _config('steps=10', kind=f'latency:{path}')
  binding = experiment_lib.build(config).binding
  assert list(binding['chips']) == [f'latency:{path}']
  path.write_text(cases.CHIP.replace('teraops: 2', 'teraops: 3'))
  other = experiment_lib.build(config).binding
  with pytest.raises(ValueError, match='the file of latency:'):
    experiment_lib.config_lib.check_binding(
      other, dict(binding=binding), 'somewhere'
    )


def test_a_policy_learns_to_keep_a_cap():
  # Two decisions; the target is met anyway, the cap by the second options only.
  phases = fliqs.phases(400, 0.0, 0.1, 1.0)
  costs = jax.numpy.asarray([1.0, 1.0]) / 2
  capped = jax.numpy.asarray([2.0, 0.4]) / 2

  def of(table):
    return lambda choices: sum((choices[n] * table).sum() for n in 'ab')

  for preset in ('default', 'paper'):
    controller = fliqs.make_controller(
      preset, of(costs), phases, caps=[of(capped)], gamma=-1.0
    )
    qualities = jax.numpy.zeros(controller.samples)

    def one_step(state, step, controller=controller, qualities=qualities):
      key = jax.random.fold_in(jax.random.key(0), step)
      archs = controller.propose(state, key, step)
      # The first options are a little better.
      better = sum(archs[n][:, 0] for n in 'ab') * 0.01
      return controller.update(state, archs, qualities + better, step)

    @jax.jit
    def search(controller=controller, one_step=one_step):
      state = controller.init({n: jax.numpy.zeros(2) for n in 'ab'})
      return jax.lax.scan(one_step, state, jax.numpy.arange(phases.steps))[0]

    policy = search().policy
    assert all(policy[n][1] > policy[n][0] for n in 'ab'), preset
