"""Extensions from outside of the package: a file and its registration each."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import digits
from fliqs_jax import tasks
from fliqs_jax.data import dataset as dataset_lib
from fliqs_jax.data import streams
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.search import controller as controller_lib
from fliqs_jax.search import optimizers
from fliqs_jax.search import presets
from fliqs_jax.space import cost_model
from fliqs_jax.tasks import classification
from launch import __main__ as launch


def _energy(op, leaves):
  """A unit of energy for each bit of a weight, ten for each bit of an input."""
  value = op.expected(leaves, lambda f: f.bits, lambda f: 10 * f.bits)
  return op.shape.weights * value


def _first(relative_cost, phases, *, gamma, learning_rate, **unused):
  """A controller that always takes the first option."""
  del relative_cost, phases, gamma, learning_rate, unused

  def first(logits):
    return jnp.eye(logits.shape[-1])[:1]

  return controller_lib.Controller(
    init=lambda logits: types.SimpleNamespace(policy=logits),
    propose=lambda state, key, step: jax.tree.map(first, state.policy),
    update=lambda state, archs, qualities, step: (state, {}),
    samples=1,
  )


def _points(config):
  """Forty examples of a split; their only number is the label."""
  del config
  label = np.arange(40, dtype=np.int32) % 10
  points = dataset_lib.Arrays(
    image=label.astype(np.float32)[:, None, None, None], label=label
  )

  def inputs(columns, bits=None):
    del bits
    return {
      'image': np.broadcast_to(
        columns['image'], (len(columns['label']), 8, 8, 1)
      )
    }

  return dataset_lib.Dataset(
    name='points',
    num_classes=10,
    inputs={'image': dataset_lib.Spec((8, 8, 1))},
    split_sizes={'train': 40, 'test': 40},
    open=lambda split: points,
    train_inputs=inputs,
    eval_inputs=inputs,
  )


@pytest.fixture(name='config')
def _config(monkeypatch):
  kinds, keys = cost_model.KINDS, presets.PRESETS['default'].keys
  monkeypatch.setitem(kinds, 'energy', cost_model.Kind('E', _energy))
  monkeypatch.setitem(presets.PRESETS, 'first', presets.Preset(_first, keys))
  monkeypatch.setitem(tasks.TASKS, 'mine', classification)
  monkeypatch.setitem(
    optimizers.OPTIMIZERS, 'plain', lambda rate, *unused: optax.sgd(rate)
  )
  monkeypatch.setitem(streams.DATASETS, 'points', streams.Known(_points))
  config = digits.get_config('steps=10')
  with config.unlocked():
    config.data.update(name='points', train_split='train[:20]')
    config.data.update(valid_split='train[20:]', test_split='test')
    config.data.update(batch_size=8, valid_batch_size=8, test_batch_size=8)
    config.cost.kind, config.cost.relative_to = 'energy', 'INT4'
    config.search.preset, config.task = 'first', 'mine'
    config.optimizer.name = 'plain'
  return config


def test_a_cost_a_controller_a_task_data_and_an_optimizer(config):
  experiment = experiment_lib.build(config)
  assert experiment.task is classification
  batch = next(experiment.streams.train(0))
  np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['label'])
  assert experiment.controller.samples == 1
  # By hand: 4 bits of each weight times 10 * 4 bits of each input.
  weights = sum(op.shape.weights for op in experiment.space.ops)
  int4 = experiment.space.uniform('INT4')
  assert experiment.cost(int4) == pytest.approx(4 * 40 * weights)
  assert experiment.target == pytest.approx(config.cost.target * 160 * weights)
  state = experiment.controller.init(experiment.space.zeros())
  chosen = experiment.controller.propose(state, jax.random.key(0), 0)
  assert all(float(x[0, 0]) == 1 for x in chosen.values())


@pytest.mark.filterwarnings('ignore:the load_module')
def test_a_platform_is_a_module_and_its_name(monkeypatch, capsys):
  platform = types.ModuleType('mine', 'Runs nowhere.')
  platform.ACTIONS = ('up',)
  platform.add_flags = lambda parser: None
  platform.script = lambda args, plan: 'echo mine\n'
  monkeypatch.setitem(launch.PLATFORMS, 'mine', platform)
  flags = ['--config=configs/digits.py', '--workdir=/w', '--dry_run']
  assert launch.main(['mine', *flags]) == 0
  assert capsys.readouterr().out == 'echo mine\n'
