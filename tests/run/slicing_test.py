"""A search of formats and sizes, and the network that is cut out of it."""

import json
import pathlib

import jax
import numpy as np
import pytest

from configs import digits
from fliqs_jax import export
from fliqs_jax.run import evaluation
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import slicing
from fliqs_jax.run import train

pytestmark = pytest.mark.slow


def _config():
  config = digits.get_config('smoke,nas,preset=paper')
  with config.unlocked(), config.ignore_type():
    config.optimizer.ema_decay = 0.9
  return config


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A searched run, the run sliced out of it, and both results."""
  workdir = tmp_path_factory.mktemp('searched')
  # Neither the directory nor its parent exists.
  out = tmp_path_factory.mktemp('sliced') / 'runs' / 'run'
  found = train.train_and_evaluate(_config(), workdir)['found']
  return workdir, out, found, slicing.slice_run(str(workdir), str(out))


def _read(path):
  return json.loads(pathlib.Path(path).read_text())


def test_the_sliced_network_is_the_found_one(runs):
  _, _, found, sliced = runs
  assert sliced['examples'] == found['examples']
  # Sums over fewer, otherwise equal, terms: of 360 images one may flip.
  assert abs(sliced['accuracy'] - found['accuracy']) <= 1.5 / 360
  assert sliced['loss'] == pytest.approx(found['loss'], rel=1e-3)


def test_the_sliced_network_costs_what_the_found_one_does(runs):
  _, _, found, sliced = runs
  for kind in ('cost', 'gbops', 'size_bits', 'average_bits', 'cost_target'):
    assert sliced[kind] == pytest.approx(found[kind], rel=1e-6), kind


def test_the_sliced_network_has_the_found_sizes_and_no_more(runs):
  workdir, out, *_ = runs
  arch = _read(workdir / 'arch.json')
  assert _read(out / 'arch.json')['sizes'] == arch['sizes']
  assert _read(out / 'arch.json')['layers'] == arch['layers']
  experiment, state, _ = evaluation.restore(str(out))
  assert experiment.space.is_fixed
  # The smoke run ends where it ends; not everything was kept at its largest.
  searched, whole, _ = evaluation.restore(str(workdir))
  assert experiment.space.params < searched.space.params
  params = sum(x.size for x in jax.tree.leaves(state.params))
  assert params == experiment.space.params
  assert params < sum(x.size for x in jax.tree.leaves(whole.params))


def test_the_sliced_network_trains_on(runs):
  experiment, state, _ = evaluation.restore(str(runs[1]))
  step = jax.jit(experiment.search_step())
  train_batch = next(experiment.streams.train(0))
  valid_batch = next(experiment.streams.valid(0))
  state, metrics = step(state, train_batch, valid_batch)
  assert np.isfinite(metrics['loss'])
  assert state.step == experiment.phases.steps + 1


def test_an_arch_with_sizes_builds_the_network_from_nothing(runs):
  workdir, out, *_ = runs
  config = digits.get_config(f'smoke,nas,arch={workdir / "arch.json"}')
  built = experiment_lib.build(config)
  sliced, *_ = evaluation.restore(str(out))
  assert built.space.ops == sliced.space.ops
  assert built.space.params == sliced.space.params


def test_the_sliced_network_is_what_is_exported(runs, tmp_path):
  workdir, out, *_ = runs
  manifest = export.export(workdir, tmp_path / 'export')
  sizes = {layer: row['shape'] for layer, row in manifest['layers'].items()}
  params = evaluation.restore(str(out)).state.params
  assert sizes['head'] == list(params['head']['kernel'].shape)
  difference = export.verify(tmp_path / 'export')
  # Integers are equal to the bit; layers that stayed BF16 are float sums.
  assert difference['max_difference'] <= 1e-5 * difference['largest_output']


def test_a_directory_that_is_not_empty_is_refused(runs):
  with pytest.raises(ValueError, match='is not empty'):
    slicing.slice_run(str(runs[0]), str(runs[0]))


def _build_with(runs, tmp_path, change):
  arch = _read(runs[0] / 'arch.json')
  change(arch['sizes'])
  path = tmp_path / 'arch.json'
  path.write_text(json.dumps(arch))
  return experiment_lib.build(digits.get_config(f'smoke,arch={path}'))


def test_an_arch_of_another_space_names_what_differs(runs, tmp_path):
  def lacks(sizes):
    del sizes['stage1/channels']

  with pytest.raises(ValueError, match='lack stage1/channels'):
    _build_with(runs, tmp_path, lacks)

  def surplus(sizes):
    sizes['stage9/channels'] = 8

  with pytest.raises(ValueError, match='names stage9/channels that the model'):
    _build_with(runs, tmp_path, surplus)

  def impossible(sizes):
    sizes['stage1/channels'] = 0

  with pytest.raises(ValueError, match='stage1/channels=0, which must be'):
    _build_with(runs, tmp_path, impossible)


def test_open_sizes_beside_an_arch_are_refused(runs):
  config = digits.get_config(f'smoke,arch={runs[0] / "arch.json"}')
  with config.unlocked(), config.ignore_type():
    config.sizes.widths = (0.5, 1.0)
  with pytest.raises(ValueError, match='quant.arch fixes every size'):
    experiment_lib.build(config)


def test_sizes_that_a_network_does_not_have_are_refused():
  config = _config()
  with config.unlocked(), config.ignore_type():
    config.sizes.kernels = (3, 5)
  with pytest.raises(ValueError, match='sizes.kernels=.*has no such sizes'):
    experiment_lib.build(config)


def test_average_bits_cannot_steer_sizes():
  config = _config()
  with config.unlocked():
    config.cost.kind, config.cost.target = 'average_bits', 6.0
    config.cost.relative_to = ''
  with pytest.raises(ValueError, match='does not depend on sizes'):
    experiment_lib.build(config)
