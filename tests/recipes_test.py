"""The recipes of configs/: the paper's numbers, and that every one runs."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

from fliqs_jax import data
from fliqs_jax import export
from fliqs_jax.numerics import formats as formats_lib
from fliqs_jax.report import number_text
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import train
from fliqs_jax.run.configs import config as config_lib
from fliqs_jax.run.configs import recipe
from fliqs_jax.search import presets

pytestmark = pytest.mark.slow

_ROOT = pathlib.Path(__file__).parents[1]
# Every file of configs/ that is a recipe; imagenet.py is what some share.
RECIPES = sorted(
  path.stem
  for path in (_ROOT / 'configs').glob('*.py')
  if path.stem not in ('__init__', 'imagenet')
)
IMAGENET = [name for name in RECIPES if name.endswith('_imagenet')]
# Table 4, as (schedule, optimizer, rate, warm-up and all epochs, start).
RESIDUAL = ('cosine', 'sgd', 2.64, 10, 350, 15_000)
MOBILE = ('exponential', 'rmsprop', 0.256, 15, 360, 18_000)
TABLE_4 = {
  'resnet18': RESIDUAL,
  'resnet50': RESIDUAL,
  'inceptionv3': RESIDUAL,
  'mobilenetv2': MOBILE,
  'efficientnet': MOBILE,
  'deit': ('cosine', 'adamw', 4e-3, 30, 400, 15_000),
}


def _config(name, arg=None):
  return importlib.import_module(f'configs.{name}').get_config(arg)


@pytest.mark.parametrize('name', RECIPES)
@pytest.mark.parametrize(
  'arg',
  [
    '',
    'smoke',
    'preset=paper,references',
    'strategies=max_abs+kl',
    *(f'preset={preset}' for preset in presets.PRESETS),
  ],
)
def test_a_recipe_has_exactly_the_known_keys(name, arg):
  config_lib.check(_config(name, arg))


@pytest.mark.parametrize('name', RECIPES)
def test_every_argument_of_a_recipe_alone_is_in_the_docstring(name):
  config = importlib.import_module(f'configs.{name}')
  shared = importlib.import_module('configs.imagenet').__doc__
  text = config.__doc__ + (shared if name in IMAGENET else '')
  with pytest.raises(ValueError, match='allowed: ') as error:
    config.get_config('?')
  names = str(error.value).partition('allowed: ')[2].split(', ')
  assert set(recipe.ARGUMENTS) <= set(names)
  for argument in set(names) - set(recipe.ARGUMENTS):
    assert f'  {argument}: ' in text


@pytest.mark.parametrize('name', IMAGENET)
def test_an_imagenet_recipe_is_table_4_s(name):
  config = _config(name)
  optimizer, train = config.optimizer, config.train
  schedule, kind, rate, warmup, epochs, start = TABLE_4[name.split('_')[0]]
  assert (optimizer.schedule, optimizer.name) == (schedule, kind)
  assert optimizer.learning_rate == rate
  # 1,281,167 images in batches of 2048 (A.2): 625.6 steps an epoch.
  assert config.data.batch_size == 2048
  assert train.steps == round(epochs * 1_281_167 / 2048)
  assert optimizer.warmup * epochs == pytest.approx(warmup)
  assert round(config.quant.act_start * train.steps) == start
  assert config.quant.act_clip == '4'
  assert train.label_smoothing == 0.1  # A.4, as the two below.
  assert config.search.start == 0.25
  assert _config(name, 'preset=paper').search.entropy_beta == 0.5


@pytest.mark.parametrize('name', IMAGENET)
def test_the_pareto_curves_train_as_long_as_a_2_says(name):
  config = _config(name, 'pareto')
  steps, start = config.train.steps, config.quant.act_start
  residual = TABLE_4[name.split('_')[0]] is RESIDUAL
  assert steps == (30_200 if residual else 112_000)
  assert round(start * steps) == (7500 if residual else 20_000)


@pytest.mark.parametrize('name', IMAGENET)
def test_an_imagenet_recipe_says_how_to_get_the_data(name, tmp_path):
  config = _config(name)
  config.data.data_dir = str(tmp_path)
  with pytest.raises(ValueError, match='imagenet2012'):
    experiment_lib.build(config)


@pytest.mark.parametrize('name', ['efficientnet', 'deit'])
def test_an_unknown_variant_is_refused(name):
  with pytest.raises(ValueError, match="variant='b9' is unknown; allowed: "):
    _config(f'{name}_imagenet', 'variant=b9')


@pytest.mark.parametrize('model', ['resnet', 'mobilenet'])
def test_fashion_mnist_has_two_networks_and_menus_of_ones_own(model):
  config = _config('fashion_mnist', f'model={model},space=INT2+INT8,nas')
  config_lib.check(config)
  menu = formats_lib.menu(config.quant.formats)
  assert [f.name for f in menu] == ['INT2', 'INT8']
  with pytest.raises(ValueError, match="'dense' is unknown; allowed: resnet, "):
    _config('fashion_mnist', 'model=dense')


def test_fashion_mnist_s_transformer_has_20_layers_and_no_sizes():
  config = _config('fashion_mnist', 'model=transformer,smoke')
  layers = experiment_lib.build(config).space.formats
  # Patches, classifier, and 3 blocks of query, key, value, out and two of MLP.
  assert len(layers) == 2 + 3 * 6
  with pytest.raises(ValueError, match='transformer has no sizes to search'):
    _config('fashion_mnist', 'model=transformer,nas')


def test_an_export_quantizes_what_the_run_does():
  # Squeeze-and-excitation of an EfficientNet is stock in a run: it stays so.
  run = experiment_lib.build(_config('efficientnet_imagenet', 'smoke'))
  layers = run.space.assignment(run.space.dearest())
  assert not any('squeeze' in layer for layer in layers)
  inputs = data.model_inputs(next(iter(run.streams.test())))
  program = export.program(run, run.space.dearest(), inputs)
  _, parts = program.parts_of(inputs, train=False)
  assert {p.product.layer for p in parts if not p.reason} == set(layers)
  assert sum('squeeze' in part.product.layer for part in parts) == 7


# The slowest to compile judge one architecture a step, not four. Where sizes
# can be searched, they are, beside formats: a network with more decisions.
_ARGS = {
  'inceptionv3_imagenet': 'smoke,preset=paper,space=fp_s',
  'efficientnet_imagenet': 'smoke,preset=paper,space=fp_s',
  'mobilenetv2_imagenet': 'smoke,preset=paper,nas',
  'recommender_criteo': 'smoke,preset=paper,nas',
}
_KINDS = {
  'mobilenetv2_imagenet': {'format', 'channels', 'kernel'},
  'recommender_criteo': {'format', 'channels'},
}


def _run(name, arg, workdir):
  """Runs a recipe; returns its result."""
  if name != 'digits':  # The first command of a user.
    return train.train_and_evaluate(_config(name, arg), workdir)
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'fliqs_jax.main',
      f'--config=configs/{name}.py:{arg}',
      f'--workdir={workdir}',
    ],
    cwd=_ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    stderr=subprocess.PIPE,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return json.loads((workdir / 'result.json').read_text())


@pytest.mark.usefixtures('empty_pictures')
@pytest.mark.parametrize('name', RECIPES)
def test_every_recipe_runs_through_search_evaluation_and_report(name, tmp_path):
  result = _run(name, _ARGS.get(name, 'smoke'), tmp_path)
  most = 1 if number_text.unit(result['metric']) == '%' else 100
  assert 0 <= result['found'][result['metric']] <= most
  assert result['compilations'] == 1
  assert (tmp_path / 'report.html').stat().st_size > 0
  kinds = _KINDS.get(name, {'format'})
  assert {d['kind'] for d in result['decisions'].values()} == kinds
  sizes = json.loads((tmp_path / 'arch.json').read_text())['sizes']
  assert bool(sizes) == (kinds != {'format'})
