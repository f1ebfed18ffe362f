"""What a run leaves as data: rows of layers and their sizes."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import mobilenetv2_imagenet
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run.records import results
from fliqs_jax.search import policy as policy_lib


@pytest.fixture(scope='module', name='experiment')
def _experiment():
  config = mobilenetv2_imagenet.get_config('smoke')
  with config.unlocked():
    config.model.width = 0.25
    config.cost.bound = 'near'
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


def test_layers_that_share_a_decision_are_listed_in_order(experiment):
  decision = results.decisions(experiment, experiment.space.zeros())
  assert decision['stage0/channels']['layers'] == [
    'stage0_block0/project',
    'stage1_block0/depthwise',
    'stage1_block0/expand',
    'stage1_block0/project',
  ]


def _settled(space, **logits):
  """Returns a policy that is all but sure of the first option of each."""
  sure = {
    d.name: 20.0 * np.eye(len(d.labels))[0]
    for d in space.decisions
    if len(d.labels) > 1
  }
  return space.zeros() | sure | logits


@pytest.mark.parametrize(
  ('share', 'error'),
  [
    (0.9, '-10.0%'),  # Missed from below: a better network could be had.
    (1.1, '+10.0%'),
    (0.94, '-6.0%'),
    (0.96, None),
    (1.04, None),
  ],
)
def test_a_missed_target_is_warned_of_from_either_side(
  experiment, share, error
):
  policy = _settled(experiment.space)
  cost = float(experiment.cost_of(policy_lib.argmax(policy)))
  missed = dataclasses.replace(experiment, target=cost / share)
  warnings = results.warnings(missed, policy)
  assert len(warnings) == (error is not None)
  for warning in warnings:
    assert f'{error} of the target' in warning


@pytest.mark.parametrize(
  ('probability', 'warns'), [(0.89, True), (0.91, False)]
)
def test_an_unsettled_decision_is_warned_of_by_name(
  experiment, probability, warns
):
  # Of two kernels: softmax(log(p / (1 - p)), 0) = p.
  logit = np.log(probability / (1 - probability))
  policy = _settled(
    experiment.space, **{'stage1_block0/kernel': np.array([0.0, logit])}
  )
  cost = float(experiment.cost_of(policy_lib.argmax(policy)))
  on_target = dataclasses.replace(experiment, target=cost)
  warnings = results.warnings(on_target, policy)
  assert len(warnings) == warns
  for warning in warnings:
    assert warning.startswith('stage1_block0/kernel had not settled')
    assert warning.endswith('probability 0.89')
