"""A whole run: what it leaves, and that a kill leaves no trace."""

import functools
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.run import evaluation
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import loop
from fliqs_jax.run import train
from fliqs_jax.run.records import metrics
from fliqs_jax.run.records import run_log
from fliqs_jax.runtime import devices as devices_lib
from fliqs_jax.runtime import restoring
from tests import helpers
from tests import tiny

_ROOT = pathlib.Path(__file__).parents[2]
_FILES = ['arch.json', 'config.json', 'history.jsonl', 'report.html']


def _final_state(workdir, config):
  experiment = experiment_lib.build(config)
  abstract = jax.eval_shape(experiment.initial_state)
  return restoring.restore_latest(workdir / 'checkpoints', abstract)


def _same_state(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_a_run_leaves_what_it_promises(finished):
  workdir, result = finished
  for name in [*_FILES, 'result.json', 'architecture.png', 'curves.png']:
    assert (workdir / name).stat().st_size > 0, name
  arch = json.loads((workdir / 'arch.json').read_text())
  assert list(arch['layers']) == ['hidden0', 'head']
  assert result['steps'] == 60
  # 360 test images, ten classes: an MLP that learnt anything beats 0.1 by far.
  assert result['found']['examples'] == 360
  assert result['found']['accuracy'] > 0.5


def test_a_run_logs_and_saves_at_its_intervals(finished):
  workdir, _ = finished
  # 60 steps: a row each 5, a checkpoint each 10, of which the last 2 are kept.
  rows = metrics.read_history(workdir)
  assert [row['step'] for row in rows] == list(range(5, 61, 5))
  assert _checkpointed(workdir) == [50, 60]


def test_a_run_compiles_its_step_once(finished):
  assert finished[1]['compilations'] == 1
  # At least the gradients of 64 x 16 and 16 x 10 weights, in float32.
  assert finished[1]['step_bytes'] > 4 * (1024 + 160)


def test_the_found_architecture_is_the_frozen_policy(finished):
  workdir, _ = finished
  arch = json.loads((workdir / 'arch.json').read_text())
  result = json.loads((workdir / 'result.json').read_text())
  for layer, decision in result['decisions'].items():
    best = int(np.argmax(decision['probabilities']))
    assert arch['layers'][layer]['weights'] == decision['options'][best]


@pytest.mark.slow
def test_starting_a_finished_run_again_changes_nothing(finished, capsys):
  workdir, _ = finished
  before = helpers.facts(workdir)
  result = train.train_and_evaluate(tiny.get_config(), workdir)
  assert helpers.facts(workdir) == before
  for name in ('step_seconds', 'compilations', 'compile_seconds'):
    assert result[name] == finished[1][name]  # It took no step.


def test_a_workdir_of_another_config_is_refused_by_name(finished):
  with pytest.raises(ValueError, match=r'seed: 0 -> 7'):
    train.train_and_evaluate(tiny.get_config('seed=7'), finished[0])


def test_evaluation_with_the_found_arch_gives_the_run_s_own_result(finished):
  workdir, result = finished
  arch = str(workdir / 'arch.json')
  assert evaluation.evaluate(str(workdir), arch_path=arch) == result['found']


def test_the_test_loss_is_that_of_a_loop_by_hand(finished):
  """Of the averaged weights, with the better statistics for the argmax."""
  workdir, result = finished
  experiment = experiment_lib.build(tiny.get_config())
  state = _final_state(workdir, tiny.get_config()).state
  # {decision: [3] logits} to {layer: {'format': one-hot}}.
  arch = {
    layer: {'format': np.eye(3, dtype=np.float32)[np.argmax(logits)]}
    for layer, logits in state.search_state.policy.items()
  }
  stats = trained = state.model_state['quant_stats']
  settle, test = (
    jax.jit(functools.partial(experiment.model.apply, **how))
    for how in (dict(train=True, mutable=['quant_stats']), dict(train=False))
  )
  # Three times sixteen training batches behind the last step, 16 x 64 = 1024
  # examples, forward; the mean of the statistics behind the second and third.
  seen = []
  batches = iter(experiment.streams.train(60))
  for _ in range(3):
    images = np.concatenate([next(batches)['image'] for _ in range(16)])
    variables = {'params': state.average, 'arch': arch, 'quant_stats': stats}
    stats = settle(variables, images)[1]['quant_stats']
    seen.append(stats)
  for layer in stats:
    for name in ('mean', 'variance', 'largest'):
      stats[layer][name] = (seen[1][layer][name] + seen[2][layer][name]) / 2

  def measured(stats, batches):
    variables = {'params': state.average, 'arch': arch, 'quant_stats': stats}
    losses, hits = [], []
    for batch in batches:
      real = np.ones(len(batch['label'])) == batch.get('example_mask', 1)
      logits = np.asarray(test(variables, batch['image']), np.float64)[real]
      labels = batch['label'][real]
      log_sum = np.log(np.exp(logits).sum(-1))
      losses += list(log_sum - logits[np.arange(len(labels)), labels])
      hits += list(logits.argmax(-1) == labels)
    return losses, hits

  def validation_loss(stats):
    batches = itertools.islice(experiment.streams.valid(0), 8)
    return np.mean(measured(stats, batches)[0])

  best = min(stats, trained, key=validation_loss)
  losses, hits = measured(best, experiment.streams.test())
  assert len(losses) == 360
  assert result['found']['loss'] == pytest.approx(np.mean(losses), rel=1e-5)
  assert result['found']['accuracy'] == pytest.approx(np.mean(hits))


def test_statistics_are_the_settled_or_the_trained_ones(finished, monkeypatch):
  run = evaluation.restore(str(finished[0]))
  devices = devices_lib.one_device(run.experiment.config)

  def chosen(state):
    found = evaluation.served(run.experiment, state, run.choices, devices)
    return found.statistics

  # All activations are clipped to nearly nothing, so every class is as likely.
  damaged = {
    'quant_stats': {
      layer: stats | dict(largest=jnp.float32(1e-6), count=jnp.int32(1))
      for layer, stats in run.state.model_state['quant_stats'].items()
    }
  }
  settled = chosen(run.state.replace(model_state=damaged))
  assert settled['quant_stats']['hidden0']['largest'] > 0.1
  monkeypatch.setattr(
    evaluation.statistics_lib, 'settled', lambda *args: damaged
  )
  assert chosen(run.state) is run.state.model_state


def test_a_uniform_format_is_evaluated_by_the_same_code(finished):
  result = evaluation.evaluate(str(finished[0]), numeric_format='INT8')
  assert result['average_bits'] == 8.0


@pytest.mark.slow
def test_an_arch_trains_as_that_very_assignment(finished, tmp_path):
  workdir, _ = finished
  config = tiny.get_config('steps=20')
  with config.unlocked():
    config.quant.arch = str(workdir / 'arch.json')
  train.train_and_evaluate(config, tmp_path)
  ours = json.loads((tmp_path / 'arch.json').read_text())
  theirs = json.loads((workdir / 'arch.json').read_text())
  assert ours['layers'] == theirs['layers']


def test_an_arch_of_another_model_names_missing_and_surplus(finished, tmp_path):
  arch = json.loads((finished[0] / 'arch.json').read_text())
  arch['layers']['hidden7'] = arch['layers'].pop('hidden0')
  path = tmp_path / 'arch.json'
  path.write_text(json.dumps(arch))
  config = tiny.get_config()
  with config.unlocked():
    config.quant.arch = str(path)
  with pytest.raises(ValueError, match='misses: hidden0; .* lacks: hidden7'):
    experiment_lib.build(config)


@pytest.mark.slow
def test_profiled_clips_replace_the_table_s(tmp_path):
  config = tiny.get_config('steps=20,act_clip=profiled')
  train.train_and_evaluate(config, tmp_path)
  stats = _final_state(tmp_path, config).state.model_state['quant_stats']
  # The table's Laplacian multiples of INT4 and INT8; BF16 is not clipped.
  for layer in stats.values():
    int4, int8, bf16 = np.asarray(layer['clip'])
    assert 0 < int4 < int8 < bf16 == np.inf
    assert int4 != np.float32(4.027)
    assert layer['active']


@pytest.mark.slow
def test_references_are_trained_by_the_same_code(tmp_path):
  config = tiny.get_config('steps=20')
  with config.unlocked():
    config.references = ('INT4',)
  result = train.train_and_evaluate(config, tmp_path)
  assert result['references']['INT4']['average_bits'] == 4.0
  assert (tmp_path / 'uniform_INT4' / 'report.html').exists()
  assert (tmp_path / 'pareto.png').exists()


def _checkpointed(workdir):
  return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())


@pytest.mark.slow
def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
  config = tiny.get_config()
  with config.unlocked():
    config.optimizer.warmup = 0.5  # The first of 60 steps are moderate ...
    config.optimizer.schedule = 'constant'
    config.optimizer.learning_rate = 50.0
    config.train.max_loss = 3.0  # ... and uniform guessing costs ln 10 = 2.3.
    config.train.checkpoint_every = config.train.log_every
  with pytest.raises(
    run_log.DivergedError, match='loss is .*checkpoint'
  ) as error:
    train.train_and_evaluate(config, tmp_path)
  assert not (tmp_path / 'result.json').exists()
  # Each logging point before it was saved, the diverged one was not.
  step = int(re.search(r'at step (\d+)', str(error.value)).group(1))
  kept = config.train.checkpoints_kept
  good = list(range(config.train.log_every, step, config.train.log_every))
  assert step > config.train.log_every
  assert _checkpointed(tmp_path) == good[-kept:]


def _within_budget(workdir):
  cost = json.loads((workdir / 'arch.json').read_text())['cost']
  return cost['value'] <= cost['target'] * (1 + 1e-6)


@pytest.mark.slow
def test_a_scored_run_that_is_stopped_ends_bit_identical(tmp_path):
  config = tiny.get_config('preset=sensitivity')
  with config.unlocked():
    config.search.start, config.search.freeze = 0.25, 0.75
    config.search.scorings = 3
  # Scored before the steps 15, 30 and 45. Saved at 30 and at 47: once before a
  # scoring, once after the last.
  whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
  scored = train.train_and_evaluate(config, whole)['scored']
  for steps in (30, 17):
    asked = iter([False] * (steps - 1) + [True])
    with pytest.raises(loop.PreemptedError):
      train.train_and_evaluate(config, stopped, stop=asked.__next__)
  result = train.train_and_evaluate(config, stopped)
  assert result['scored'] == scored
  assert result['compilations'] == 3
  _same_state(
    _final_state(whole, config).state, _final_state(stopped, config).state
  )
  assert (whole / 'arch.json').read_text() == (
    stopped / 'arch.json'
  ).read_text()
  assert _within_budget(whole)
  # What is served has the least sum of scores of all nine architectures within
  # the budget of 28,416 bit operations: 1024 MACs, and 160.
  menu, sums = (4, 8, 16), {}
  first, second = (
    scored['decisions'][n]['scores'] for n in ('hidden0', 'head')
  )
  for i, j in itertools.product(range(3), repeat=2):
    if 1024 * menu[i] ** 2 + 160 * menu[j] ** 2 <= 28_416:
      sums[i, j] = first[i] + second[j]
  assert scored['sum'] == pytest.approx(min(sums.values()))
  assert scored['sum'] > 0
  assert scored['decisions']['head']['anchor'] == 'BF16'


@pytest.mark.slow
@pytest.mark.parametrize('preset', ['edmips', 'dnas'])
def test_a_relaxed_run_serves_one_hots_and_says_what_they_lost(
  tmp_path, preset
):
  config = tiny.get_config(f'preset={preset},target=2.5')
  whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
  result = train.train_and_evaluate(config, whole)
  assert _within_budget(whole)
  relaxed = result['relaxed']
  assert relaxed['gap'] == relaxed['soft_quality'] - relaxed['hard_quality']
  # Saved at step 30, in the search, and resumed: the freeze is at 45.
  asked = iter([False] * 29 + [True])
  with pytest.raises(loop.PreemptedError):
    train.train_and_evaluate(config, stopped, stop=asked.__next__)
  again = train.train_and_evaluate(config, stopped)
  _same_state(
    _final_state(whole, config).state, _final_state(stopped, config).state
  )
  assert again['relaxed'] == relaxed


def test_the_likeliest_architecture_is_repaired_where_it_is_too_dear():
  experiment = experiment_lib.build(tiny.get_config())
  # 64 x 16 and 16 x 10 MACs: 1024 and 160. Within 1.5 times INT4, 16 x 1.5 x
  # 1184 = 28,416 bit operations, the first layer cannot be INT8 (65,536), the
  # second can (10,240 + 16,384).
  policy = {'hidden0': [0.0, 1.0, -9.0], 'head': [0.0, 2.0, -9.0]}
  policy = {name: np.asarray(v, np.float32) for name, v in policy.items()}
  choices = experiment.selected(policy)
  assert experiment.space.assignment(choices) == {
    'hidden0': ('INT4', 'INT4'),
    'head': ('INT8', 'INT8'),
  }
  with experiment.config.unlocked():
    experiment.config.cost.bound = 'near'
  near = experiment.selected(policy)
  assert experiment.space.assignment(near)['hidden0'] == ('INT8', 'INT8')


@pytest.mark.slow
def test_a_run_that_is_stopped_while_it_diverges_saves_nothing(tmp_path):
  config = tiny.get_config()
  with config.unlocked():
    config.optimizer.warmup = 0.0
    config.optimizer.schedule = 'constant'
    config.optimizer.learning_rate = 1e30  # Infinite after a step or two.
  asked = iter([False, False, True])
  with pytest.raises(run_log.DivergedError, match='at step 3 '):
    train.train_and_evaluate(config, tmp_path, stop=lambda: next(asked))
  assert _checkpointed(tmp_path) == []


@pytest.mark.slow
def test_steps_are_profiled_on_request(tmp_path):
  config = tiny.get_config('steps=20')
  train.train_and_evaluate(config, tmp_path, profile_steps='3:5')
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


@pytest.mark.parametrize('steps', ['3', '5:3', '-1:4', 'a:b', '50:61'])
def test_steps_that_cannot_be_profiled_are_refused(tmp_path, steps):
  with pytest.raises(ValueError, match='must be N:M .* it has 60'):
    train.train_and_evaluate(
      tiny.get_config(), tmp_path / 'run', profile_steps=steps
    )
  assert not (tmp_path / 'run').exists()


def _start(workdir, *extra):
  return subprocess.Popen(
    [
      sys.executable,
      '-m',
      'fliqs_jax.main',
      '--config=tests/tiny.py',
      f'--workdir={workdir}',
      *extra,
    ],
    cwd=_ROOT,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )


def _ended_at(process, moment, how):
  """Signals the process when it logs `moment`; returns its status."""
  # The pipe is read to its end, or the last lines of the log have no reader.
  for line in process.stderr:
    if moment in line:
      process.send_signal(how)
      break
  process.communicate()
  return process.returncode


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_bit_identical(tmp_path):
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  process = _start(whole)
  assert process.communicate()[1]
  assert process.returncode == 0
  # Before the first checkpoint, between two, while one is being written, and
  # after the last step, while results are written.
  for moment, how, status in (
    ('step 5/60', signal.SIGKILL, -signal.SIGKILL),
    ('compiling the step', signal.SIGINT, 75),  # Nothing is lost yet.
    ('step 25/60', signal.SIGTERM, 75),  # It saves, wherever it is.
    ('step 40/60', signal.SIGKILL, -signal.SIGKILL),
    ('step 60/60', signal.SIGKILL, -signal.SIGKILL),
    ('cost target', signal.SIGTERM, 75),  # It evaluates; no step is left.
  ):
    assert _ended_at(_start(broken), moment, how) == status, moment
  process = _start(broken)
  assert process.communicate()[1]
  assert process.returncode == 0
  assert helpers.facts(broken) == helpers.facts(whole)
  config = tiny.get_config()
  _same_state(
    _final_state(broken, config).state, _final_state(whole, config).state
  )
