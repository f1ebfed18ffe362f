"""Runs that quantize a trained network: `fliqs_jax.ptq`."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from fliqs_jax import ptq
from fliqs_jax.run import evaluation
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import train
from tests import tiny


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """The workdir of a trained network, unquantized."""
  workdir = tmp_path_factory.mktemp('trained')
  config = tiny.get_config('steps=60,space=BF16')
  train.train_and_evaluate(config, workdir)
  return str(workdir)


def _config(trained, arg, steps=20, teacher=False, **quant):
  config = tiny.get_config(arg)
  with config.unlocked(), config.ignore_type():
    config.init_from = trained
    config.quant.update(quant)
  ptq.adapt(config, steps, teacher)
  return config


def _arrays(workdir):
  state = evaluation.restore(workdir).state
  return jax.tree.leaves(state.params)


@pytest.mark.parametrize(
  ('arg', 'options'),
  [
    ('space=int_s,preset=sensitivity', {}),
    (
      'space=INT4,preset=dqss',
      dict(strategies=('max_abs', 'admm'), mode='separate'),
    ),
  ],
)
def test_only_formats_and_thresholds_are_learnt(
  trained, tmp_path, arg, options
):
  teacher = bool(options)
  config = _config(trained, arg, teacher=teacher, **options)
  result = train.train_and_evaluate(config, tmp_path)
  # The checkpoint holds the mean of the weights, from which this run starts.
  started = evaluation.restore(trained).state.served_params
  for before, after in zip(jax.tree.leaves(started), _arrays(str(tmp_path))):
    np.testing.assert_array_equal(before, after)
  # Chance is 10 %; the trained network has about 85 %.
  assert result['found']['accuracy'] > 0.6
  for stats in jax.tree.leaves(
    evaluation.restore(str(tmp_path)).state.model_state['quant_stats']
  ):
    assert np.isfinite(np.nan_to_num(stats, posinf=0.0)).all()
  arch = json.loads((tmp_path / 'arch.json').read_text('utf-8'))
  assert len(arch['layers']) == 2


def test_a_frozen_network_must_be_a_trained_one():
  config = tiny.get_config()
  ptq.adapt(config, 20, False)
  with pytest.raises(ValueError, match='train.frozen=True keeps the weights'):
    experiment_lib.build(config)


def test_a_teacher_teaches_frozen_networks_only():
  config = tiny.get_config()
  config.train.teacher = True
  with pytest.raises(ValueError, match='train.teacher=True learns from'):
    experiment_lib.build(config)


def test_a_frozen_network_is_not_trained_again(tmp_path):
  config = tiny.get_config()
  ptq.adapt(config, 20, False)
  with pytest.raises(ValueError, match='--retrain trains .* leave it out'):
    train.train_and_evaluate(config, tmp_path / 'run', retrain=True)
  assert not (tmp_path / 'run').exists()


def test_what_the_user_sets_stays():
  config = tiny.get_config()
  overrides = {
    'search.learning_rate': 5.0,
    'search.freeze': 0.6,
    'train.checkpoint_every': 4,
  }
  config.update_from_flattened_dict(overrides)
  ptq.adapt(config, 20, False, overrides)
  assert (config.search.start, config.search.freeze) == (0, 0.6)
  assert config.search.learning_rate == 5
  # A tenth of 20 steps.
  assert (config.train.log_every, config.train.checkpoint_every) == (2, 4)


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('train.steps', 77, '--config.train.steps=77: .* given by --steps'),
    ('train.teacher', True, '--config.train.teacher=True: .* need --teacher'),
    ('train.frozen', False, '--config.train.frozen=False: .* fliqs_jax.main'),
    ('optimizer.ema_decay', 0.5, 'ema_decay=0.5: .* never train here'),
  ],
)
def test_what_a_flag_of_the_command_says_is_no_key(key, value, message):
  with pytest.raises(ValueError, match=message):
    ptq.adapt(tiny.get_config(), 20, False, {key: value})


def test_the_command_knows_what_the_user_sets(tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'fliqs_jax.ptq', '--config=tests/tiny.py'),
      *('--config.train.steps=77', f'--workdir={tmp_path / "run"}'),
    ],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert 'is given by --steps' in done.stderr.splitlines()[-1]
  assert not (tmp_path / 'run').exists()


def test_activations_of_a_frozen_network_are_quantized_from_the_start(trained):
  config = _config(trained, 'space=int_s')
  config.quant.act_start = 0.5
  config.search.start = 0.6
  with pytest.raises(ValueError, match='quant.act_start=0.5 must be 0'):
    experiment_lib.build(config)
