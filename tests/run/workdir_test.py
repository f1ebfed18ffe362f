"""A workdir: read as it is, used by one run, bound to its config."""

import json
import shutil

import pytest

from fliqs_jax import export
from fliqs_jax.report import report
from fliqs_jax.run import evaluation
from fliqs_jax.run import train
from fliqs_jax.runtime import array_files
from fliqs_jax.runtime import workdir as workdir_lib
from fliqs_jax.sweep import collect
from fliqs_jax.sweep import sweep_file
from tests import helpers
from tests import tiny


@pytest.fixture(name='copy')
def _copy(finished, tmp_path):
  """A finished run that a test may change."""
  return shutil.copytree(finished[0], tmp_path / 'run')


def _edit(path, **values):
  """Changes the values of dotted keys, with two underscores for the dot."""
  content = json.loads(path.read_text())
  for key, value in values.items():
    *sections, last = key.split('__')
    section = content
    for name in sections:
      section = section[name]
    section[last] = value
  path.write_text(json.dumps(content))


def test_a_run_is_evaluated_and_exported_as_it_is(finished, tmp_path):
  """Nothing is written, so permission to read is enough."""
  workdir, result = finished
  live = workdir / 'checkpoints' / f'70{array_files.UNFINISHED}'
  live.mkdir()
  before = helpers.tree_of(workdir)
  assert evaluation.evaluate(str(workdir)) == result['found']
  export.export(workdir, tmp_path / 'export', examples=1)
  assert helpers.tree_of(workdir) == before
  live.rmdir()


@pytest.mark.parametrize('step', [0, 50])
def test_a_run_that_is_not_finished_is_not_evaluated(copy, step):
  shutil.rmtree(copy / 'checkpoints' / '60')
  if not step:
    shutil.rmtree(copy / 'checkpoints')
  with pytest.raises(ValueError, match=f'a run at step {step} of 60; finish'):
    evaluation.evaluate(str(copy))


def test_a_second_run_in_a_workdir_is_refused(copy):
  before = helpers.tree_of(copy / 'checkpoints'), helpers.facts(copy)
  with (
    workdir_lib.held(copy),
    pytest.raises(ValueError, match='in use by process'),
  ):
    train.train_and_evaluate(tiny.get_config(), copy)
  assert before == (helpers.tree_of(copy / 'checkpoints'), helpers.facts(copy))


@pytest.mark.parametrize(
  ('changed', 'named'),
  [
    (dict(seed=7), 'seed: 0 -> 7'),
    (dict(quant__formats='int_l'), "quant.formats: 'int_s' -> 'int_l'"),
    (dict(train__settle_batches=2), 'train.settle_batches: 3 -> 2'),
    (dict(train__steps=70), 'train.steps: 60 -> 70'),
  ],
)
def test_a_config_that_was_changed_is_named(copy, tmp_path, changed, named):
  _edit(copy / 'config.json', **changed)
  with pytest.raises(ValueError, match=f'another config, .* {named}; use'):
    evaluation.evaluate(str(copy))
  with pytest.raises(ValueError, match=named):
    export.export(copy, tmp_path / 'export')


def test_data_may_have_moved(copy, finished, tmp_path):
  _edit(copy / 'config.json', data__data_dir=str(tmp_path / 'elsewhere'))
  assert evaluation.evaluate(str(copy)) == finished[1]['found']


def test_a_run_without_its_config_is_that_of_its_checkpoints(copy):
  (copy / 'config.json').unlink()
  with pytest.raises(ValueError, match='seed: 0 -> 1'):
    train.train_and_evaluate(tiny.get_config('seed=1'), copy)
  assert not (copy / 'config.json').exists()


def test_checkpoints_without_a_binding_are_used(copy, finished, monkeypatch):
  """Those of 0.2.0."""
  monkeypatch.setattr(
    evaluation.restoring, 'newest_extra', lambda _: dict(seconds=1.0)
  )
  assert evaluation.evaluate(str(copy)) == finished[1]['found']


@pytest.mark.filterwarnings('ignore:the load_module')  # Of ml_collections.
def test_a_run_of_an_earlier_version_goes_on(copy, finished):
  # Its config.json lacks what was added since.
  path = copy / 'config.json'
  content = json.loads(path.read_text())
  for section, key in (('cost', 'caps'), ('cost', 'reported')):
    del content[section][key]
  path.write_text(json.dumps(content))
  found = finished[1]['found']
  run = sweep_file.Run(copy.name, {}, 'tests/tiny.py', {})
  assert collect.look(run, copy)['state'] == 'finished'
  assert evaluation.evaluate(str(copy)) == found
  again = train.train_and_evaluate(tiny.get_config(), copy)
  assert again['found'] == found


@pytest.mark.parametrize('content', ['{"seed": 0, "tra', '', '[]', '\x00'])
def test_a_damaged_config_is_named_with_its_remedy(copy, content):
  (copy / 'config.json').write_text(content)
  for call in (
    lambda: evaluation.evaluate(str(copy)),
    lambda: train.train_and_evaluate(tiny.get_config(), copy),
  ):
    with pytest.raises(ValueError, match='config.json is damaged: .*Delete it'):
      call()


def test_the_formats_of_an_arch_are_bound_and_its_place_is_not(
  finished, tmp_path
):
  arch = shutil.copy(finished[0] / 'arch.json', tmp_path / 'arch.json')
  config = tiny.get_config(f'steps=10,arch={arch}')
  workdir = tmp_path / 'run'
  found = train.train_and_evaluate(config, workdir)['found']
  moved = shutil.move(arch, tmp_path / 'moved.json')
  _edit(workdir / 'config.json', quant__arch=str(moved))
  assert evaluation.evaluate(str(workdir)) == found
  sides = dict(weights='BF16', activations='BF16')
  _edit(tmp_path / 'moved.json', layers__head=sides)
  with pytest.raises(ValueError, match='head: .* -> .*BF16'):
    evaluation.evaluate(str(workdir))


def test_a_run_is_finished_only_with_its_report(copy, monkeypatch):
  expected = helpers.facts(copy)
  for name in ('result.json', 'report.html', 'curves.png'):
    (copy / name).unlink()

  def killed(*_):
    assert not (copy / 'result.json').exists()
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(report.page, 'render', killed)
    with pytest.raises(KeyboardInterrupt):
      train.train_and_evaluate(tiny.get_config(), copy)
  assert not (copy / 'result.json').exists()
  train.train_and_evaluate(tiny.get_config(), copy)
  assert (copy / 'report.html').exists()
  assert helpers.facts(copy) == expected


def test_what_does_not_change_training_may_change(copy):
  config = tiny.get_config()
  with config.unlocked(), config.ignore_type():
    config.train.checkpoints_kept = 5
    config.train.max_loss = 99.0
  expected = helpers.facts(copy)[0]
  train.train_and_evaluate(config, copy)
  assert helpers.facts(copy)[0] == expected
  written = json.loads((copy / 'config.json').read_text())
  assert written['train']['checkpoints_kept'] == 5
  assert evaluation.evaluate(str(copy)) == expected['found']


def test_what_was_found_is_written_before_references_train(copy, monkeypatch):
  config = tiny.get_config()
  with config.unlocked():
    config.references = ('INT4',)
  for name in ('arch.json', 'result.json'):
    (copy / name).unlink()

  def killed(*_, **__):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(train, '_reference', killed)
    with pytest.raises(KeyboardInterrupt):
      train.train_and_evaluate(config, copy)
  assert (copy / 'arch.json').exists()
  # The reference may be left out after all.
  train.train_and_evaluate(tiny.get_config(), copy)
  assert (copy / 'result.json').exists()
