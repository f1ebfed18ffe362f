"""The pictures that a run leaves are those of its network."""

import io
import itertools

import jax
import numpy as np
import pytest

from configs import digits
from configs import super_resolution
from fliqs_jax.run import evaluation
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import statistics
from fliqs_jax.run.records import results
from fliqs_jax.runtime import devices as devices_lib


@pytest.fixture(scope='module', name='experiment')
def _experiment():
  return experiment_lib.build(super_resolution.get_config('smoke,space=INT4'))


def test_pictures_are_of_all_the_split_as_the_network_makes_them(experiment):
  state = jax.jit(experiment.initial_state)()
  choices = experiment.space.only()
  devices = devices_lib.one_device(experiment.config)
  shown = evaluation.pictures(
    experiment, state, choices, state.model_state, devices
  )
  batches = list(experiment.streams.test())
  image, label = (
    np.concatenate([batch[name] for batch in batches])
    for name in ('image', 'label')
  )
  # Of 4 pictures with 2 crops each, the first crop of every one.
  assert experiment.streams.num_examples['test'] == 8
  np.testing.assert_array_equal(shown['target'], label[::2])
  np.testing.assert_array_equal(shown['low'], np.round(255 * image[::2]))
  variables = dict(
    params=state.params,
    arch=experiment.space.expand(choices),
    **state.model_state,
  )
  expected = experiment.model.apply(variables, image[::2], train=False)
  expected = np.round(255 * np.clip(expected, 0, 1))
  assert np.mean(expected != shown['made']) < 0.01  # Rounding in 8 bits.
  assert np.max(np.abs(expected - shown['made'])) <= 1
  with np.load(io.BytesIO(results.packed(shown))) as stored:
    np.testing.assert_array_equal(stored['made'], shown['made'])


def test_a_batch_of_pictures_is_large_enough_to_settle_statistics(experiment):
  # 16 patches of 24 x 24 pixels; of images without pixels to predict, 1,024.
  (batch,) = itertools.islice(statistics._joined(experiment, 0, 1024), 1)
  assert batch['image'].shape == (16, 12, 12, 3)
  digits_run = experiment_lib.build(digits.get_config('smoke,space=INT4'))
  (batch,) = itertools.islice(statistics._joined(digits_run, 0, 1024), 1)
  assert len(batch['image']) == 1024


def test_a_recipe_of_the_paper_is_edsr_s():
  config = super_resolution.get_config('size=paper,scale=4,space=INT8')
  keys, train = config.optimizer, config.train
  assert (keys.learning_rate, keys.schedule) == (1e-4, 'halved')
  assert (train.steps, config.data.batch_size) == (300_000, 16)
  assert config.data.patch == 192
  assert (config.model.blocks, config.model.channels) == (16, 64)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'model.scale': 3}, 'model.scale=3 and data.scale=2 must be the same'),
    ({'train.label_smoothing': 0.1}, 'label_smoothing=0.1 must be 0'),
    ({'train.mixup': 0.2}, "need images and task='classification'"),
    ({'task': 'classification'}, 'labels are classes'),
    ({'search.quality': 'accuracy'}, 'allowed: psnr, l1'),
  ],
)
def test_a_config_that_does_not_fit_the_task_is_refused(changes, words):
  config = super_resolution.get_config('smoke')
  with config.unlocked():
    config.update_from_flattened_dict(changes)
    if 'task' in changes:
      config.search.quality = 'accuracy'
  with pytest.raises(ValueError, match=words):
    experiment_lib.build(config)


def test_classes_are_refused_by_the_task():
  config = super_resolution.get_config('smoke')
  with config.unlocked():
    config.data.update(name='synthetic', image_size=12, num_classes=3)
    config.data.update(train_split='train[:50%]', valid_split='train[50%:]')
    config.data.update(test_split='test')
    for key in ('patch', 'scale', 'crop', 'crops'):
      del config.data[key]
  with pytest.raises(ValueError, match='needs data whose labels are pictures'):
    experiment_lib.build(config)


@pytest.mark.parametrize(('model', 'layers'), [('espcn', 3), ('rdn', 12)])
def test_other_networks_fit_the_task(model, layers):
  config = super_resolution.get_config(f'smoke,model={model},scale=3')
  assert len(experiment_lib.build(config).space.formats) == layers


def test_an_unknown_network_is_refused():
  with pytest.raises(
    ValueError, match="model='unet' is unknown; allowed: edsr"
  ):
    super_resolution.get_config('model=unet')
