"""What a run leaves as data: rows of layers and their sizes."""

import jax
import pytest

from configs import mobilenetv2_imagenet
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import results
from fliqs_jax.search import policy as policy_lib


@pytest.fixture(scope='module', name='experiment')
def _experiment():
  config = mobilenetv2_imagenet.get_config('smoke')
  with config.unlocked():
    config.model.width = 0.25
    # A stage has 8 channels or more.
    config.sizes.widths = (1.0, 2.0)
    config.sizes.kernels = (3, 5)
    config.model.strides = (1,) * 8
  return experiment_lib.build(config)


def test_rows_name_the_decision_of_each_size(experiment):
  space = experiment.space
  choices = jax.device_get(policy_lib.argmax(space.zeros()))
  rows = {row['path']: row for row in results.layers(experiment, choices)}
  assert 'decided' not in rows['stem']
  # The first of two equally likely: 8 channels, six times as many expanded.
  expand = rows['stage1_block0/expand']
  assert expand['decided'] == {
    'input_channels': 'stage0/channels',
    'output_channels': 'stage0/channels',
  }
  assert (expand['input_channels'], expand['output_channels']) == (8, 48)
  depthwise = rows['stage1_block0/depthwise']
  assert depthwise['decided'] == {
    'output_channels': 'stage0/channels',
    'kernel': 'stage1_block0/kernel',
  }
  assert depthwise['kernel'] == 3
  kinds = [rows[path]['kind'] for path in ('stem', 'head')]
  assert kinds == ['conv', 'dense']
  assert (expand['kind'], depthwise['kind']) == ('pointwise', 'depthwise')
  decisions = results.decisions(experiment, space.zeros())
  for row in rows.values():
    assert set(row.get('decided', {}).values()) <= set(decisions)
